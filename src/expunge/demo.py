"""``expunge demo``: a trained classifier of handwritten digits forgets real records, beside models retrained without them.

Two requests: ``digit``, one whole digit; and ``memorised``, the tenth of the records that the model fits but would not
predict had it not seen them. A random tenth would prove nothing: there, doing nothing is as near to retraining as one
retrained model is to another.
"""

from __future__ import annotations

import torch

from expunge.core import Data, Key, Request
from expunge.data.builtin import Suite
from expunge.data.split import split
from expunge.oracle import positions


def most_memorised(suite: Suite, train: Data, seed: int, share: float = 0.1, folds: int = 5) -> Request:
    """Forget the share of the records with the largest out-of-fold loss: what the model knows only by having seen it.

    Each record's loss is that of a model trained, by the suite's own recipe, on the folds without it.
    """
    order = positions(Key(seed).at("folds"), len(train), len(train), 0)
    loss = torch.empty(len(train))
    for fold in range(folds):
        inside = order[fold::folds]
        outside = torch.ones(len(train), dtype=torch.bool)
        outside[inside] = False
        model = suite.fit(train.select(torch.nonzero(outside).flatten()), Key(seed).at("fold", fold).seed)
        loss[inside] = _losses(suite, model, train.select(inside))
    hardest = loss.argsort(descending=True)[:round(share * len(train))]
    return split(train, forget=train.ids[hardest])


def _losses(suite: Suite, model: torch.nn.Module, data: Data) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([suite.task.nll(model, batch) for batch in data.batches(1024)])
