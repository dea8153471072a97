"""Min-K % and Min-K++ % against a computation by hand and against what the authors' code gives on the same arrays.

The numbers are of two scripts run on the logits below: ``run.py`` of zjysteven/mink-plus-plus at 5596c65 and
``src/run.py`` of swj0419/detect-pretrain-code, which compute in float32.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.audit.language import min_k, min_k_plus, zlib_score
from expunge.tasks.causal_lm import IGNORED, CausalLM

LENGTHS, VOCAB = (6, 12, 21), 11
THEIRS = {
    "loss": (-5.71166992, -6.11477852, -4.45587826),
    "zlib": (-0.407976423, -0.305738926, -0.153650974),
    "mink_0.2": (-8.59152317, -8.85050392, -8.79304981),
    "mink_0.4": (-8.10672569, -8.02281189, -7.47998381),
    "mink_1.0": (-5.71166992, -6.11477852, -4.4558773),
    "mink++_0.2": (-13.9231195, -8.52786255, -10.1440449),
    "mink++_0.4": (-10.6214914, -7.64694023, -7.91236305),
    "mink++_1.0": (-6.03960323, -5.30491447, -3.91098166),
}
FIRST_CODE = {0.2: (8.59152317, 8.85050344, 8.79304981), 0.5: (8.10672617, 7.76968393, 6.97141433)}
"""Of the authors of Min-K, who give the negative."""


class Table(nn.Module):
    """Says what is written down: logits [n, T, V] by the first token of a row, which is its number."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> Tensor:
        found = torch.zeros(*input_ids.shape, self.logits.shape[-1], dtype=self.logits.dtype)
        for row, number in enumerate(input_ids[:, 0].tolist()):
            found[row] = self.logits[number][: input_ids.shape[1]]
        return found


def texts() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits [T, V] and token ids [T] of each text, as the authors' scripts were given them."""
    rng = np.random.default_rng(20)
    drawn = [
        ((3 * rng.normal(size=(size, VOCAB))).astype(np.float32), rng.integers(0, VOCAB, size)) for size in LENGTHS
    ]
    return [logits for logits, _ in drawn], [ids for _, ids in drawn]


def statistics(left: bool) -> list[np.ndarray]:
    """Log-probabilities, mean, variance and mask of the texts in one padded batch, through the task.

    The first token, which is not judged, is put out for the number of the text.
    """
    logits, ids = texts()
    table = torch.zeros(len(ids), max(LENGTHS), VOCAB)
    columns = {
        name: torch.full((len(ids), max(LENGTHS)), fill) for name, fill in (("input_ids", 0), ("labels", IGNORED))
    }
    columns["attention_mask"] = torch.zeros_like(columns["labels"])
    for number, (one, tokens) in enumerate(zip(logits, ids, strict=True)):
        table[number, : len(one)] = torch.from_numpy(one)
        place = slice(max(LENGTHS) - len(tokens), None) if left else slice(0, len(tokens))
        tokens = torch.cat([torch.tensor([number]), torch.from_numpy(tokens[1:])])
        columns["input_ids"][number, place], columns["labels"][number, place] = tokens, tokens
        columns["attention_mask"][number, place] = 1
    said = CausalLM(VOCAB).token_statistics(Table(table), {"id": torch.arange(len(ids)), **columns})
    return [part.detach().numpy() for part in (said.log_probs, said.mean, said.variance, said.mask)]


@pytest.mark.parametrize("left", [False, True])
def test_the_authors_scores(left: bool) -> None:
    logs, mean, variance, mask = statistics(left)
    assert mask.sum(1).tolist() == [size - 1 for size in LENGTHS]
    for share in (0.2, 0.4, 1.0):
        np.testing.assert_allclose(min_k(logs, mask, share), THEIRS[f"mink_{share}"], rtol=1e-6)
        np.testing.assert_allclose(min_k_plus(logs, mean, variance, mask, share), THEIRS[f"mink++_{share}"], rtol=1e-5)
    for share, theirs in FIRST_CODE.items():
        np.testing.assert_allclose(-min_k(logs, mask, share), theirs, rtol=1e-6)
    loss = -(logs * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(-loss, THEIRS["loss"], rtol=1e-6)
    sizes = [len(zlib.compress("".join(chr(97 + token) for token in ids).encode())) for ids in texts()[1]]
    np.testing.assert_allclose(zlib_score(loss, np.array(sizes)), THEIRS["zlib"], rtol=1e-6)


def test_by_hand() -> None:
    """Two tokens of three: probabilities 1/2, 1/4, 1/4 and 8/10, 1/10, 1/10."""
    first, second = (0.5, 0.25, 0.25), (0.8, 0.1, 0.1)
    logits = torch.tensor([[first, second, (1.0, 1.0, 1.0)]], dtype=torch.float64).log()
    ids = torch.tensor([[0, 1, 0]])
    batch = {"id": torch.arange(1), "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    said = CausalLM(3).token_statistics(Table(logits), batch)
    means = [sum(p * math.log(p) for p in row) for row in (first, second)]
    variances = [sum(p * math.log(p) ** 2 for p in row) - m * m for row, m in zip((first, second), means, strict=True)]
    logs = [math.log(0.25), math.log(0.8)]
    np.testing.assert_allclose(said.log_probs.detach().numpy()[0], logs)
    np.testing.assert_allclose(said.mean.detach().numpy()[0], means)
    np.testing.assert_allclose(said.variance.detach().numpy()[0], variances)
    z = [(a - b) / math.sqrt(c) for a, b, c in zip(logs, means, variances, strict=True)]
    parts = [part.detach().numpy() for part in (said.log_probs, said.mean, said.variance)]
    assert min_k_plus(*parts, said.mask.numpy(), 0.5)[0] == pytest.approx(min(z))
    assert min_k_plus(*parts, said.mask.numpy(), 1.0)[0] == pytest.approx(sum(z) / 2)
    assert min_k(parts[0], said.mask.numpy(), 0.1)[0] == pytest.approx(logs[0]), "at least one token"
