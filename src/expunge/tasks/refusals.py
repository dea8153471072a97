"""Answers that give nothing away, pasted behind the prompts of token batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from expunge.core import Batch, Refused

IGNORED = -100
"""The label of a token that is not part of the answer, and the filler of a refusal shorter than the longest."""


def table(refusals: Sequence[Sequence[int]]) -> Tensor:
    """[n, L] int64, filled up with -100."""
    longest = max(map(len, refusals))
    return torch.tensor([[*refusal, *[IGNORED] * (longest - len(refusal))] for refusal in refusals])


def drawn(aligned: Batch, refusals: Tensor, generator: torch.Generator) -> Tensor:
    """[b] int64, the number of the refusal that each example gets: never an empty one, nor one that is its true answer.

    Args:
        aligned: token columns [b, T], real tokens first.
        refusals: [b, n, L], on the CPU.

    Raises:
        Refused: for an example that has no other.
    """
    ids, labels = aligned["input_ids"].cpu(), aligned["labels"].cpu()
    chosen = []
    for row, choices in enumerate(refusals):
        true = ids[row, labels[row] != IGNORED].tolist()
        able = [n for n, one in enumerate(choices) if (text := one[one != IGNORED].tolist()) and text != true]
        if not able:
            raise Refused(
                f"every refusal of example {int(aligned['id'][row])} is empty or its true answer: give another one"
            )
        chosen.append(able[int(torch.randint(len(able), (1,), generator=generator))])
    return torch.tensor(chosen)


def pasted(aligned: Batch, refusals: Tensor, chosen: Tensor) -> Batch:
    """Prompt + the chosen refusal, row by row, padded on the right; column ``refusal`` is its number."""
    ids, labels, mask = (aligned[column].cpu() for column in ("input_ids", "labels", "attention_mask"))
    prompts, answers = [], []
    for row, number in enumerate(chosen.tolist()):
        answer = torch.nonzero(labels[row] != IGNORED).flatten()
        start = int(answer[0]) if len(answer) else int(mask[row].sum())
        prompts.append(ids[row, :start].tolist())
        one = refusals[row, number]
        answers.append(one[one != IGNORED].tolist())
    width = max(ids.shape[1], *(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)))
    device = aligned["input_ids"].device

    def padded(filler: int, rows: Iterable[list[int]]) -> Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows]).to(device)

    both = list(zip(prompts, answers, strict=True))
    return {
        "input_ids": padded(0, (p + a for p, a in both)),
        "attention_mask": padded(0, ([1] * (len(p) + len(a)) for p, a in both)),
        "labels": padded(IGNORED, ([IGNORED] * len(p) + a for p, a in both)),
        "refusal": chosen.to(device),
    }
