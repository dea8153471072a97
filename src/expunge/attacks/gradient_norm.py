"""Membership by the gradient norm: what a model was trained on moves it little."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audit import intervals, roc
from expunge.audit.language import is_language, kept_scores
from expunge.audit.subject import Reading, Subject
from expunge.core import Case, Data, Key, Request, Task, lent_stream
from expunge.objectives import NLL
from expunge.oracle import borrowed, example_gradients, prepared
from expunge.registry import measure
from expunge.scope import Scope

_CELLS = 1 << 26  # gradient entries held at once: bounds the memory, whatever the model


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

    The model's weights, buffers, gradients, modes and ``requires_grad`` flags are as before afterwards.

    Args:
        size: examples per batch at most; fewer where the gradients of so many would not fit into 256 MiB.

    Returns:
        ``id`` [n], ``norm`` [n] and ``by_tensor`` [n], the mean over parameter tensors of each one's norm.
    """
    floating = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    scope = Scope({name: True for name in floating}, tuple(name for name, _ in model.named_parameters()))
    case = Case(model, Request(), task, scope)
    rows = max(1, min(size, _CELLS // max(1, sum(p.numel() for p in floating.values()))))
    found: list[Tensor] = []
    with borrowed(case), lent_stream(key):
        for batch in prepared(case, data, rows, key):
            grads = example_gradients(case, NLL(), batch)
            squares = [grad.double().flatten(1).square().sum(1) for grad in grads.values()]
            found.append(torch.stack(squares, 1).cpu())
    each = torch.cat(found)
    return {"id": data.ids.numpy(), "norm": each.sum(1).sqrt().numpy(), "by_tensor": each.sqrt().mean(1).numpy()}
