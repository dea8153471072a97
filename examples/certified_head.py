"""Certified removal from a classifier of handwritten digits, beside exact retraining: python examples/certified_head.py

Threes against eights on their pixels, each row scaled to length 1. Digits are removed one by one until the certificate is
used up. Then the head is compared with retraining: with the same noise, for the distance; and for its accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.core import Data, Key
from expunge.data.builtin import digits
from expunge.data.sources import collect
from expunge.guarantees import BudgetSpent, CertifiedHead, Promise, train_certified, unit_rows


def pixels(data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels -1 (a three) and +1 (an eight), and ids."""
    batch = collect(data)
    chosen = (batch["y"] == 3) | (batch["y"] == 8)
    return unit_rows(batch["x"][chosen].flatten(1).double()), (batch["y"][chosen] == 8) * 2 - 1, batch["id"][chosen]


def accuracy(head: CertifiedHead, data: Data) -> float:
    """Share of right answers."""
    inputs, labels, _ = pixels(data)
    return float(((inputs @ head.weights)[:, 0].sign() == labels).double().mean())


def main() -> dict[str, float]:
    """Train, remove, compare."""
    suite = digits()
    inputs, labels, ids = pixels(suite.train)
    promise = Promise(epsilon=1.0, delta=1e-4, sigma=0.5)
    head = first = train_certified(inputs, labels, ids=ids, promise=promise, penalty=0.01, key=Key(0))
    for number in ids[torch.randperm(len(ids), generator=Key(1).generator())].tolist():
        try:
            head = head.remove([number])
        except BudgetSpent:
            break
    exact = head.problem.optimum()
    return {
        "examples": len(first),
        "removed": len(head.removed),
        "distance without removal": float((first.weights - exact).norm()),
        "distance": float((head.weights - exact).norm()),
        "bound": head.distance_bound,
        "accuracy": accuracy(head, suite.test),
        "accuracy of retraining": accuracy(head.retrain(key=Key(2)), suite.test),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.4g}")
