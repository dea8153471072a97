"""Networks like the one given, trained from nothing for a short while inside a run: proxies, not results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from expunge.core import Case, Key
from expunge.descend import Descend
from expunge.edits import reinitialise
from expunge.scope import Scope


def trained_afresh(case: Case, train: Descend, key: Key, make: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A fresh network of the Case's structure after `train`, every floating weight of it in scope, in eval mode.

    The Case's own model is left alone and nothing of what it learnt comes in, whatever was frozen in it. The work is
    counted by the Case's meter, and continues after a kill where the run has a journal.

    Args:
        case: its request is what the network is trained on; its scope is not the network's.
        train: the loop.
        key: of the fresh weights and of the loop.
        make: builds the network, untrained; None resets every module of a copy by its own ``reset_parameters``.

    Raises:
        Refused: without `make`, when the model has a module whose parameters cannot be drawn anew.
    """
    fresh = reinitialise(case.model, key.at("weights"), make)
    for parameter in fresh.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    train(replace(case, model=fresh, scope=Scope.all(fresh), rng=key.at("training"), watch=None))
    return fresh.eval()
