"""How wide the noise is that overwrites what the retain data do not need: the variances of Fisher forgetting."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

TINY = 1e-8
"""Added to the Fisher information, as in the released code."""


@dataclass(frozen=True)
class Spread:
    """Variance of the noise of a tensor at alpha = 1: min(1 / (F + 1e-8), cap), F its Fisher information.

    Args:
        cap: the largest, > 0.
        rows: take the mean over the second dimension of every tensor that has one.
        vectors: factor on that of tensors of one dimension, > 0.
        head: factor for every tensor of the last layer, in the place of `vectors`, > 0; None treats it as any other layer.
        head_cap: the largest of the last layer, where less than `cap`, > 0.
    """

    cap: float
    rows: bool
    vectors: float
    head: float | None = None
    head_cap: float | None = None

    @property
    def apart(self) -> bool:
        """Whether the last layer is another matter."""
        return self.head is not None or self.head_cap is not None

    def __call__(self, fisher: Tensor, last: bool = False) -> Tensor:
        """The variances, of the weight's shape; `last`: of a tensor of the last layer."""
        cap = min(self.cap, self.head_cap) if last and self.head_cap is not None else self.cap
        found = (1.0 / (fisher + TINY)).clamp(max=cap)
        if self.rows and fisher.ndim > 1:
            found = found.mean(1, keepdim=True).expand_as(found)
        if last and self.head is not None:
            return found * self.head
        return found * self.vectors if fisher.ndim == 1 else found
