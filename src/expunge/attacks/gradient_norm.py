"""Membership by the gradient norm: what a model was trained on moves it little."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from expunge import runtime
from expunge.audit import intervals, roc
from expunge.audit.language import is_language, kept_scores
from expunge.audit.subject import Reading, Subject
from expunge.core import Case, Data, Key, Request, Task, lent_stream, rows_of
from expunge.objectives import NLL
from expunge.oracle import borrowed, prepared, sum_gradient, take
from expunge.registry import measure
from expunge.scope import Scope


@measure(asked=True)
def lm_gradient_norm(subject: Subject) -> Reading | None:
    """Membership AUC of minus the norm of each example's gradient of the loss per token; DeLong interval.

    One backward pass per example and model, so it runs only where it is asked for. The norm is that of the whole
    gradient; the detail has the area for the mean over parameter tensors of their norms, the form of open-unlearning
    (there without the last token). It does not depend on the batch size, since every example is differentiated alone.

    Paper: Maini et al. 2024 (arXiv:2406.06443).
    """
    if not (is_language(subject.task) and subject.has("test")):
        return None

    def scores(name: str) -> dict[str, np.ndarray]:
        def compute(module: nn.Module, data: Data) -> dict[str, np.ndarray]:
            return gradient_norms(module, subject.task, data, subject.batch, subject.key.at("audit", name))

        return dict(kept_scores(subject, "gradient norms 1", name, subject.after, compute))

    forget, unseen = scores("forget"), scores("test")
    by_tensor = intervals.auc(-forget["by_tensor"], -unseen["by_tensor"])
    return roc.separation("lm_gradient_norm", -forget["norm"], -unseen["norm"], mean_of_tensors=by_tensor)


def gradient_norms(model: nn.Module, task: Task, data: Data, size: int, key: Key) -> dict[str, np.ndarray]:
    """Norms of the gradient of each example's loss per unit, over all floating parameters, in eval mode.

    One example at a time, cut to its own length, so that no more than one gradient is held: the usual models cannot be
    batched over examples (their attention looks at whether there is any padding), and trying costs a pass. The model's
    weights, buffers, gradients, modes and ``requires_grad`` flags are as before afterwards.

    Args:
        size: examples read at once; nothing depends on it.

    Returns:
        ``id`` [n], ``norm`` [n] and ``by_tensor`` [n], the mean over parameter tensors of each one's norm.
    """
    floating = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    scope = Scope({name: True for name in floating}, tuple(name for name, _ in model.named_parameters()))
    case = Case(model, Request(), task, scope)
    found: list[list[float]] = []
    with borrowed(case), lent_stream(key):
        for batch in prepared(case, data, size, key):
            for row in range(rows_of(batch)):
                grads = sum_gradient(case, NLL(), take(batch, torch.tensor([row])))
                found.append([runtime.dot({name: grad}, {name: grad}) for name, grad in grads.items()])
    whole = np.array([sum(squares) for squares in found])
    by_tensor = np.array(
        [np.sqrt(squares).sum() / len(floating) for squares in found]
    )  # one that it does not reach is 0
    return {"id": data.ids.numpy(), "norm": np.sqrt(whole), "by_tensor": by_tensor}
