"""The anamnesis index: how long a model takes to relearn what it was made to forget, as a multiple of retrained ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from expunge.attacks.recovery import Finetune, Look, batches_until
from expunge.audit.subject import Model, Reading, Subject
from expunge.core import Key, Refused, require
from expunge.optim import Adam, Optimizer
from expunge.registry import measure


@dataclass(frozen=True)
class Anamnesis:
    """How relearning is timed.

    Args:
        alpha: how near to the original's accuracy counts as relearnt, as a share of it, in (0, 1).
        cap: mini-batches after which a run is given up, >= 1; the run is then censored, and said to be.
        optimizer: of the attacker. batch: examples per mini-batch, >= 1.
        seeds: orders of the mini-batches, >= 1; five or more for a headline.
    """

    alpha: float = 0.05
    cap: int = 100
    optimizer: Optimizer = Adam(1e-3)
    batch: int = 32
    seeds: int = 3

    def __post_init__(self) -> None:
        require(0 < self.alpha < 1, self, "alpha", "in (0, 1)")
        for setting in ("cap", "batch", "seeds"):
            require(getattr(self, setting) >= 1, self, setting, "at least 1")


@measure(asked=True)
def anamnesis(subject: Subject) -> Reading | None:
    """Mini-batches to relearn the forget set, as a multiple of what retrained models need: 1 is ideal.

    See ``anamnesis_of``. None without retrained models.
    """
    return anamnesis_of(subject) if subject.retrained else None


def anamnesis_of(subject: Subject, settings: Anamnesis = Anamnesis()) -> Reading:
    """Anamnesis index: r(model) / r(retrained), below 1 where something is left, far above 1 where a hole was burnt.

    r is the number of mini-batches of the forget set until the accuracy there is at least (1 - alpha) times the
    original's (for a task without labels: the loss at most the original's plus alpha of its size), checked before the
    first and after every one. Runs are censored at ``cap``: the means are restricted to it, the detail says which share
    of the runs went over, and an end of the interval is infinite (or 0) where every run of one side did.

    Where retrained models meet the criterion before the first mini-batch (single examples that generalise) there is no
    ratio: the index is 1 for a model that does too, and otherwise the number of mini-batches itself, which is a lower
    bound, since retrained models need less than one.

    Cost per model: at most seeds x cap mini-batches and as many looks at the forget set; by default 300.

    Raises:
        Refused: without retrained models.

    Paper: Chundawat et al., zero-shot machine unlearning (arXiv:2201.05629), whose released code has no index. Relearnt
    on the forget set alone, as in the paper's words; ratio of means over seeds and retrained models, restricted at the
    cap, is derived here.
    """
    if not subject.retrained:
        raise Refused("the anamnesis index is a ratio to retrained models: found none, give retrained=")
    goal = _goal(subject, settings.alpha)
    ours = _times(subject, subject.after, settings, goal)
    theirs = np.stack([_times(subject, model, settings, goal) for model in subject.retrained])
    value = anamnesis_index(ours, theirs, settings.cap)
    low, high = _interval(ours, theirs, settings.cap, subject.draws, subject.key.at("anamnesis", "interval"))
    detail = {
        "batches": float(np.minimum(ours, settings.cap).mean()),
        "batches_retrained": float(np.minimum(theirs, settings.cap).mean()),
        "share relearnt at once, retrained": float((theirs == 0).mean()),
        f"share > cap of {settings.cap}": float(np.isinf(ours).mean()),
        f"share > cap of {settings.cap}, retrained": float(np.isinf(theirs).mean()),
    }
    return Reading("anamnesis", value, low, high, len(ours), "ratio", detail=detail)


def anamnesis_index(unlearned: np.ndarray, retrained: np.ndarray, cap: int) -> float:
    """Ratio of the mean numbers of mini-batches, each restricted to `cap`; 0 / 0 is 1, r / 0 is r (a lower bound).

    Args:
        unlearned: [seeds] mini-batches until relearnt, infinite where the cap came first. retrained: [..., seeds].
        cap: > 0.
    """
    if np.size(retrained) == 0 or np.size(unlearned) == 0:
        raise Refused("the anamnesis index needs relearn times of both sides: expected at least one run each")
    ours, theirs = np.minimum(unlearned, cap).mean(), np.minimum(retrained, cap).mean()
    return float(_ratio(ours, theirs))


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return np.where(theirs > 0, ours / np.where(theirs > 0, theirs, 1), np.where(ours > 0, ours, 1.0))


def _interval(unlearned: np.ndarray, retrained: np.ndarray, cap: int, draws: int, key: Key) -> tuple[float, float]:
    """Resampled seeds (the same for both sides) and retrained models; opened where all runs of a side are censored."""
    rng = np.random.Generator(np.random.PCG64(key.seed))
    seeds = rng.integers(0, len(unlearned), (draws, len(unlearned)))
    models = rng.integers(0, len(retrained), (draws, len(retrained)))
    ours = np.minimum(unlearned, cap)[seeds].mean(1)
    theirs = np.minimum(retrained, cap)[models[:, :, None], seeds[:, None, :]].mean((1, 2))
    low, high = np.quantile(_ratio(ours, theirs), [0.025, 0.975], method="nearest")
    return (0.0 if np.isinf(retrained).all() else float(low)), (np.inf if np.isinf(unlearned).all() else float(high))


def _goal(subject: Subject, alpha: float) -> Callable[[Look], bool]:
    """Whether a look at the forget set is within alpha of the original."""
    found = subject.outputs("forget", subject.before)
    if found.correct is not None:
        accuracy = (1 - alpha) * float(found.correct.mean())
        return lambda look: float(look.values.mean()) >= accuracy
    start = float(np.average(found.loss, weights=found.units))
    limit = start + alpha * abs(start)
    return lambda look: float(np.average(look.values, weights=found.units)) <= limit


def _times(subject: Subject, model: Model, settings: Anamnesis, goal: Callable[[Look], bool]) -> np.ndarray:
    """[seeds] mini-batches until the goal is met, infinite where the cap comes first; kept per model."""
    plan = Finetune(settings.optimizer, settings.cap, settings.batch)

    def compute() -> np.ndarray:
        opened, data = subject.opened(model), subject.data("forget")
        keys = [subject.key.at("anamnesis", seed) for seed in range(settings.seeds)]
        return np.array([batches_until(goal, subject, opened, plan, data, key) for key in keys])

    return subject.cache.get(model, f"anamnesis {settings}", compute)
