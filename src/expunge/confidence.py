"""How sure a model is, as a per-example loss: the spread of its logits, the probability of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.core import Batch, Case, Key, Refused, require
from expunge.objectives import RandomLabel
from expunge.tasks.causal_lm import IGNORED


@dataclass(frozen=True)
class LogitSpread:
    """(max_v z_v - mean_v z_v)^2 of the logits that predict each answer token, mean over answer tokens.

    0 where all logits are equal, so minimising it makes the prediction uniform (arXiv:2506.05314). Bounded below. Its
    scale is that of squared logits, hundreds for a trained language model: the learning rate and the weight of the
    retain loss must know it. It does not look at the true answer at all.

    Departure: the released code takes the logits AT each labelled token, which predict the token after it, so it judges
    the place after the end of the answer and leaves out the place of its first token; here they are the logits that
    predict it.
    """

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        task: Any = case.task  # logits and labels are capabilities, which not every Task has
        if not hasattr(task, "logits"):
            raise Refused(f"objective LogitSpread needs logits, which task {task.name!r} does not have")
        logits = task.logits(case.model, batch)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        spread = (logits.amax(-1) - logits.mean(-1)).square()
        judged = (task.labels(batch) != IGNORED).to(spread.dtype)
        if judged.shape != spread.shape:
            raise Refused(
                f"objective LogitSpread needs one label per row of logits: task {task.name!r} gives labels of shape "
                f"{tuple(judged.shape)} and rows of shape {tuple(spread.shape)}"
            )
        return (spread * judged).reshape(len(spread), -1).sum(1) / task.units(batch)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example."""
        return case.task.units(batch)


@dataclass(frozen=True)
class AnswerProbability:
    """Mean probability (0 to 1) that the model gives to the tokens of an answer, each after the true ones before it.

    A building block for ``OfMeans``: FLAT (arXiv:2410.11143) is a function of this number for the answer to forget and
    for a template answer. Probabilities, not their logarithms: the gradient vanishes where they are near 0 or 1.

    Args:
        of: "answer" (the example's own) or "template" (a wrong one that the task draws anew at every step: a refusal,
            another label).
        padded_length: 0 takes the mean over answer tokens. Another number T takes the sum over tokens divided by T - 1,
            which is what the released code does with examples padded to T tokens: the places of prompt and padding
            count with probability 0, so every number is that much smaller.

    Raises:
        Refused: for a task without probabilities of labels, and for an answer longer than T - 1.
    """

    of: str = "answer"
    padded_length: int = 0

    def __post_init__(self) -> None:
        require(self.of in ("answer", "template"), self, "of", "'answer' or 'template'")
        require(self.padded_length == 0 or self.padded_length > 1, self, "padded_length", "0 or at least 2")

    def draw(self, case: Case, batch: Batch, rng: Key) -> Batch:
        """The batch, with template answers where these are asked for."""
        return RandomLabel().draw(case, batch, rng) if self.of == "template" else batch

    def __call__(self, case: Case, batch: Batch) -> Tensor:
        units, summed = case.task.units(batch), self._summed(case, batch)
        if not self.padded_length:
            return summed / units
        if float(units.max()) > self.padded_length - 1:
            raise Refused(
                f"AnswerProbability: an answer has {int(units.max())} tokens, which do not fit in a padded_length of "
                f"{self.padded_length}: give the length that examples are padded to, prompt included"
            )
        return summed / (self.padded_length - 1)

    def weigh(self, case: Case, batch: Batch) -> Tensor:
        """Units per example, for a mean over all tokens; equal weights where all are padded to one length."""
        units = case.task.units(batch)
        return torch.ones_like(units) if self.padded_length else units

    def _summed(self, case: Case, batch: Batch) -> Tensor:
        """[b], the probabilities of an answer's tokens, summed."""
        task: Any = case.task  # see LogitSpread
        if hasattr(task, "token_nll"):
            probability = torch.exp(-task.token_nll(case.model, batch))
            judged = task.labels(batch) != IGNORED
            return torch.where(judged, probability, torch.zeros_like(probability)).sum(1)
        if not hasattr(task, "logits"):
            raise Refused(
                f"objective AnswerProbability needs probabilities of labels, which task {task.name!r} does not have"
            )
        return torch.exp(-task.nll(case.model, batch))
