"""Magnitude pruning: does removing the smallest weights bring back what was forgotten?"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from expunge.attacks.recovery import copied, retrained_band
from expunge.audit import intervals
from expunge.audit.subject import Curve, Model, Outputs, Reading, Subject, run
from expunge.core import Refused
from expunge.registry import measure

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@measure(asked=True)
def pruned_forget_accuracy(subject: Subject) -> Reading | None:
    """Forget accuracy, averaged over pruning 10 to 90 % of the weights. See ``pruned_reading``."""
    return pruned_reading(subject, labelled=True)


@measure(asked=True)
def pruned_forget_loss(subject: Subject) -> Reading | None:
    """The same with the loss per unit, for tasks without labels."""
    return pruned_reading(subject, labelled=False)


def pruned_reading(subject: Subject, shares: tuple[float, ...] = SHARES, *, labelled: bool) -> Reading | None:
    """Mean over `shares` of the forget accuracy (or loss) of copies with the smallest weights set to 0.

    Global: one ranking over every weight of two or more dimensions (``pruned``). Curves of the model, the original and
    the retrained models (mean, lowest and highest). Detail: the largest gain over the model as it is, the same for the
    retrained, and at which share. The interval resamples examples. It does not fine-tune after pruning: see
    ``relearn``. Cost per model: one pass over the forget set per share, 9 by default; kept per model.

    Returns:
        None where the task has labels and `labelled` is False, or the other way round.

    Raises:
        Refused: for shares outside [0, 1].
    """
    if (subject.outputs("forget").correct is not None) != labelled:
        return None
    ours, original = (_table(subject, model, shares) for model in (subject.after, subject.before))
    theirs = [_table(subject, model, shares) for model in subject.retrained]
    scale = 100.0 if labelled else 1.0
    samples = intervals.resampled_mean(ours[1:].mean(0), subject.draws, subject.key.at("resample", "forget"))
    ends = intervals.share_interval(samples, ours.shape[1]) if labelled else intervals.percentile(samples)
    x = tuple(100 * share for share in (0.0, *shares))
    curves: dict[str, Curve] = {
        name: (x, tuple((scale * table.mean(1)).tolist()))
        for name, table in (("unlearned", ours), ("original", original))
    }
    detail = _gain(ours, scale, labelled, shares)
    if theirs:
        lines = scale * np.stack([table.mean(1) for table in theirs])
        curves["retrained"] = retrained_band(x, lines)
        gains = [_gain(table, scale, labelled, shares)["gain"] for table in theirs]
        detail["gain_retrained"] = float(np.mean(gains))
    unit = "%" if labelled else subject.task.unit
    return Reading(
        f"pruned_forget_{'accuracy' if labelled else 'loss'}",
        scale * float(ours[1:].mean()),
        scale * ends[0],
        scale * ends[1],
        ours.shape[1],
        unit,
        detail=detail,
        curves=curves,
        axes=("weights pruned, %", f"forget {'accuracy' if labelled else 'loss'}, {unit}"),
    )


def _gain(table: np.ndarray, scale: float, labelled: bool, shares: tuple[float, ...]) -> dict[str, float]:
    """The best that pruning does for the forgotten: more accuracy, less loss."""
    change = scale * (table[1:].mean(1) - table[0].mean()) * (1 if labelled else -1)
    return {"gain": float(change.max()), "gain_at": 100 * shares[int(change.argmax())]}


def _table(subject: Subject, model: Model, shares: tuple[float, ...]) -> np.ndarray:
    """[1 + shares, n] correct (or loss per unit) of the model as it is, and at each share; kept per model."""

    def compute() -> np.ndarray:
        opened, data = subject.opened(model), subject.data("forget")
        rows = [_values(subject.outputs("forget", model))]
        for share in shares:
            arrays = run(pruned(opened, share), subject.task, data, subject.batch, subject.key.at("audit", "forget"))
            rows.append(_values(Outputs.of(arrays)))
        return np.stack(rows)

    return subject.cache.get(model, f"pruned {shares}", compute)


def _values(outputs: Outputs) -> np.ndarray:
    return outputs.loss if outputs.correct is None else outputs.correct.astype(np.float64)


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy in eval mode with the `share` smallest weights set to 0, exactly round(share x number) of them.

    Ranked by magnitude over all weights of two or more dimensions together; of equal ones the first goes first.

    Raises:
        Refused: for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise Refused(f"pruned: share must lie in [0, 1], found {share!r}")
    copy = copied(model)
    weights = [p for p in copy.parameters() if p.is_floating_point() and p.ndim >= 2]
    if not weights:
        return copy
    sizes = torch.cat([weight.detach().abs().flatten().cpu().float() for weight in weights])
    gone = torch.zeros(len(sizes), dtype=torch.bool)
    gone[torch.argsort(sizes, stable=True)[: round(share * len(sizes))]] = True
    with torch.no_grad():
        for weight, part in zip(weights, gone.split([weight.numel() for weight in weights]), strict=True):
            weight.masked_fill_(part.view(weight.shape).to(weight.device), 0.0)
    return copy
