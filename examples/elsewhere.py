"""A model that was unlearned without expunge, in plain PyTorch: what `expunge audit` is given by an outside auditor.

    python examples/elsewhere.py out/elsewhere

leaves two files of weights (before.pt, after.pt), three files of row numbers (forget.txt, retain.txt, test.txt) and the
data (digits.npz). What it calls unlearning is a few epochs on the rest, which is a common shortcut.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


def build() -> nn.Module:
    """The architecture."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, lr: float) -> None:
    """Ordinary training."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def main(folder: Path) -> None:
    """Train, "unlearn" all sevens, and write the files."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x))
    test, seen = order[:360].sort().values, order[360:].sort().values
    forget, retain = seen[y[seen] == 7], seen[y[seen] != 7]
    model = build()
    fit(model, x[seen], y[seen], epochs=30, lr=0.05)
    torch.save(model.state_dict(), folder / "before.pt")
    fit(model, x[retain], y[retain], epochs=3, lr=0.05)
    torch.save(model.state_dict(), folder / "after.pt")
    np.savez(folder / "digits.npz", x=x.numpy(), y=y.numpy())
    for name, rows in {"forget": forget, "retain": retain, "test": test}.items():
        (folder / f"{name}.txt").write_text("\n".join(map(str, rows.tolist())) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
