"""Preference losses: an answer to give against an answer to forget. Per example, minimised, random only in ``draw``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from expunge.core import Batch, Case, Key, Refused, require
from expunge.objectives import RandomLabel, with_reference

OWN = ("reference", "teacher", "win", "win_reference", "refusal_references")
"""Columns that belong to the answer of the example itself, or to the pair: never to the other answer."""


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation with the forget answer as the losing one: -(2/beta) log sigmoid(beta (r_w - r_l)).

    r = S_ref - S, S the SUMMED negative log-likelihood of an answer and S_ref that of the model before unlearning. The
    winning answer is the nested batch column ``win`` (the columns in which it differs from the example's own), or, where
    the data have none, a wrong answer that the task draws anew at every step: a refusal, another label. At the first
    step the loss is (2/beta) log 2. Only the difference of the two answers is judged: it does not promise that the
    winning answer becomes likely, both may fall. Sums, so the longer answer of a pair outweighs the shorter.

    S_ref is read from the columns ``reference`` (of the forget answer) and ``win_reference`` (of ``win``), or, where the
    task draws from a list of refusals, ``refusal_references`` [b, r] (of each of them); each from the teacher where there
    is no such column. An answer drawn without a list has no column, so it needs the teacher.

    Rafailov et al. 2023 (arXiv:2305.18290) without the factor 2, which arXiv:2404.05868 and the benchmarks' code have.

    Args:
        beta: inverse temperature, > 0.
        teacher: name of the reference model.

    Raises:
        Refused: for a column ``win`` that is no nested batch, or ``win_reference`` without ``win``, or a winning answer
            without a token.
    """

    beta: float = 0.1
    teacher: str = "original"

    def __post_init__(self) -> None:
        require(self.beta > 0, self, "beta", "above 0")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch with its reference losses, and the winning answers with theirs as nested batch ``win``."""
        win = self._win(case, batch, rng)
        return {**with_reference(case, batch, self.teacher), "win": with_reference(case, win, self.teacher)}

    def _win(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """A whole batch, with ids, in which the answers are the winning ones."""
        plain = {name: column for name, column in batch.items() if name not in OWN}
        if "win" not in batch:
            if "win_reference" in batch:
                raise Refused(
                    "the data have a column 'win_reference' and no column 'win': a reference belongs to one answer; "
                    "give both, or leave it out and the original model is asked about the answer drawn"
                )
            win = RandomLabel().draw(case, plain, rng)
            return {**win, **_of_refusal(batch, win)}
        given = batch["win"]
        if not isinstance(given, Mapping):
            raise Refused(
                f"the column 'win' is a {type(given).__name__}: expected a nested batch, a dict of the columns of an "
                f"example with the answer to give"
            )
        cached = {"reference": batch["win_reference"]} if "win_reference" in batch else {}
        win = {**plain, **given, **cached}
        empty = case.task.units(win) <= 0
        if bool(empty.any()):
            raise Refused(
                f"the answer to give ('win') of example {int(batch['id'][empty][0])} has nothing to predict: expected at "
                f"least one answer token; correct or drop it"
            )
        return win

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        win, lose = (part["reference"] - case.task.nll(case.model, part) for part in (batch["win"], batch))
        return -2.0 / self.beta * F.logsigmoid(self.beta * (win - lose))


def _of_refusal(batch: Batch, win: Batch) -> Batch:
    """The cached reference of the refusal that was drawn, as a column; nothing where there is none."""
    if "refusal_references" not in batch or "refusal" not in win:
        return {}
    cached, drawn = batch["refusal_references"], win["refusal"].to(batch["refusal_references"].device)
    if int(drawn.max()) >= cached.shape[1]:
        raise Refused(
            f"the column 'refusal_references' is for {cached.shape[1]} refusals and number {int(drawn.max()) + 1} was "
            f"drawn: it belongs to another list; cache it anew"
        )
    return {"reference": cached.gather(1, drawn[:, None]).squeeze(1)}
