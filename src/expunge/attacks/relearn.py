"""Relearning: how fast does a model win back what it was made to forget, beside models that never had it?

Copies of the model, of retrained ones, of the original and of a fresh one are fine-tuned on the same batches. What is
only suppressed comes back in fewer steps than what was never learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from expunge.attacks.recovery import (
    Finetune,
    Recovery,
    Run,
    drawn,
    finetuned,
    nested_interval,
    normalised_recovery,
    parted,
    retrained_band,
)
from expunge.audit.subject import Curve, Model, Reading, Subject
from expunge.core import Data, Key, Refused, require
from expunge.edits import reinitialise
from expunge.optim import Adam
from expunge.registry import measure


@dataclass(frozen=True)
class Relearning:
    """What the attacker tries: every dose with every learning rate and seed, the same batches for every model.

    Args:
        doses: whole numbers are examples, >= 1; others are shares of the forget set, in (0, 0.5]. Doses that the
            attacker's half does not hold, and repetitions, are left out.
        rates: learning rates of Adam, > 0; at least three for a headline.
        steps: mini-batches per run, >= 1. batch: examples per mini-batch, >= 1.
        seeds: attacks, each with its own examples and order, >= 1; five or more for a headline.
        probe: held-out and test examples that are looked at after every step, >= 1.
    """

    doses: tuple[int | float, ...] = (1, 5, 10, 50, 0.01, 0.1, 0.5)
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    steps: int = 10
    seeds: int = 3
    batch: int = 32
    probe: int = 128

    def __post_init__(self) -> None:
        require(len(self.doses) > 0 and all(map(_is_dose, self.doses)), self, "doses", "examples >= 1, or in (0, 0.5]")
        require(len(self.rates) > 0 and all(rate > 0 for rate in self.rates), self, "rates", "positive numbers")
        for setting in ("steps", "seeds", "batch", "probe"):
            require(getattr(self, setting) >= 1, self, setting, "at least 1")

    def counts(self, forget: int) -> tuple[int, ...]:
        """The doses in examples, for a forget set of that size: rising, each once."""
        most = forget // 2
        wanted = {d if isinstance(d, int) else max(1, min(most, round(d * forget))) for d in self.doses}
        return tuple(sorted(count for count in wanted if count <= most))


def _is_dose(dose: int | float) -> bool:
    return dose >= 1 if isinstance(dose, int) else 0 < dose <= 0.5


@measure(asked=True)
def relearn(subject: Subject) -> Reading | None:
    """Area under the accuracy on held-out forget examples while another part of the forget set is learnt again.

    See ``relearned``. None where the forget set has fewer than two examples: nothing could be held out.
    """
    return relearned(subject) if _applies(subject, labelled=True, benign=False) else None


@measure(asked=True)
def relearn_loss(subject: Subject) -> Reading | None:
    """The same with the loss per unit, for tasks without labels."""
    return relearned(subject) if _applies(subject, labelled=False, benign=False) else None


@measure(asked=True)
def relearn_benign(subject: Subject) -> Reading | None:
    """The accuracy on forget examples while only retain examples are learnt: does harmless fine-tuning bring them back?

    See ``relearned``. None without retain data.
    """
    return relearned(subject, benign=True) if _applies(subject, labelled=True, benign=True) else None


@measure(asked=True)
def relearn_benign_loss(subject: Subject) -> Reading | None:
    """The same with the loss per unit, for tasks without labels."""
    return relearned(subject, benign=True) if _applies(subject, labelled=False, benign=True) else None


def _applies(subject: Subject, *, labelled: bool, benign: bool) -> bool:
    if (subject.outputs("forget").correct is not None) != labelled:
        return False
    return subject.has("retain") if benign else len(subject.data("forget")) > 1


def relearned(subject: Subject, settings: Relearning = Relearning(), *, benign: bool = False) -> Reading:
    """Fine-tune copies, look at the held-out forget examples after every step, and take the area under that curve.

    The forget set is cut in two once. The attacker trains on `dose` examples of the first part with the task's NLL
    (modes as in evaluation: no dropout, running statistics as they are); the second part is only looked at, or plain
    learning of the first would be measured. With `benign` the training examples are retain examples and the whole
    forget set is looked at. The value is the mean over doses, rates and seeds of the trapezoid under accuracy (percent;
    the loss per unit, for a task without labels), so it includes the accuracy before the first step.

    Detail: the normalised recovery rho(t) = (acc_u(t) - acc_r(t)) / (acc_o - acc_r(t)) of the mean curves, its largest
    value and its mean over t; the area per dose; test accuracy at its lowest and at the end; runs that diverged, whose
    curve stays at its last number; whether whole classes are forgotten (``class_level``: not to be held beside single
    examples). The interval resamples the attack seeds, then the held-out examples.

    It does not promise that a better attacker would not do better. Cost per model: doses x rates x seeds x steps
    mini-batches and as many looks; by default at most 7 x 9 x 10 = 630. Results are kept per model.

    Raises:
        Refused: for a forget set of one example, or without any dose that it holds.

    Paper: the protocol of the relearning attacks on unlearning (arXiv:2402.16835 and others), with the held-out part,
    the fresh model and the normalised recovery in a form derived here.
    """
    plan = _Plan.of(subject, settings, benign)
    found = plan.recovery(subject, subject.after)
    references = [plan.recovery(subject, model) for model in subject.retrained]
    original, fresh = plan.recovery(subject, subject.before), plan.fresh(subject)
    name = plan.name if found.labelled else f"{plan.name}_loss"
    table = found.areas().mean((0, 1))  # [seeds, examples]
    low, high = nested_interval(table, subject.draws, subject.key.at(name, "interval"), shares=found.labelled)
    scale = 100.0 if found.labelled else 1.0
    lines: dict[str, Curve] = {"unlearned": _line(found, scale), "original": _line(original, scale)}
    if references:
        curves = scale * np.stack([one.curve() for one in references])
        lines["retrained"] = retrained_band([float(step) for step in range(curves.shape[1])], curves)
    if fresh is not None:
        lines["fresh"] = _line(fresh, scale)
    detail = {f"area_{count}_examples": scale * float(v) for count, v in zip(plan.counts, found.by_dose(), strict=True)}
    detail |= found.side_effects() | _rho(found, references, original)
    detail["class_level"] = float(bool(subject.forgotten_classes()))
    unit = "%" if found.labelled else subject.task.unit
    value = float(table.mean())
    axes = ("mini-batches", "accuracy on held-out forget examples, %" if found.labelled else f"loss, {unit}")
    return Reading(
        name,
        scale * value,
        scale * min(low, value),
        scale * max(high, value),
        table.shape[1],
        unit,
        detail=detail,
        curves=lines,
        axes=axes,
    )


def _rho(found: Recovery, references: Sequence[Recovery], original: Recovery) -> dict[str, float]:
    if not references:
        return {}
    retrained = np.mean([one.curve() for one in references], axis=0)
    start = float(original.curve()[0])
    rho = normalised_recovery(found.curve(), retrained, start)
    if not np.isfinite(rho).any():  # retrained models are as good as the original: there is nothing to recover
        return {}
    return {"rho_max": float(np.nanmax(rho)), "rho_mean": float(np.nanmean(rho))}


def _line(found: Recovery, scale: float) -> Curve:
    curve = scale * found.curve()
    return tuple(map(float, range(len(curve)))), tuple(map(float, curve))


@dataclass(frozen=True)
class _Plan:
    """The same examples, orders and looks for every model of one audit."""

    settings: Relearning
    name: str
    source: Data
    held: Data
    test: Data | None
    counts: tuple[int, ...]
    key: Key

    @staticmethod
    def of(subject: Subject, settings: Relearning, benign: bool) -> _Plan:
        name, forget = "relearn_benign" if benign else "relearn", subject.data("forget")
        key = subject.key.at(name)
        if benign:
            source, held = subject.data("retain"), forget
            counts: tuple[int, ...] = (min(len(source), settings.steps * settings.batch),)
        else:
            source, held = parted(forget, key.at("part"))
            counts = settings.counts(len(forget))
        if not counts:
            raise Refused(
                f"no dose of {settings.doses} fits the {len(source)} forget examples that the attacker gets: expected one "
                f"of at most that many"
            )
        test = subject.data("test") if subject.has("test") else None
        return _Plan(
            settings,
            name,
            source,
            drawn(held, settings.probe, key.at("held")),
            None if test is None else drawn(test, settings.probe, key.at("test")),
            counts,
            key,
        )

    def recovery(self, subject: Subject, model: Model) -> Recovery:
        """Every run from this model, kept."""
        return subject.cache.get(model, f"{self.name} {self.settings}", lambda: self._run(subject, model))

    def fresh(self, subject: Subject) -> Recovery | None:
        """Every run from re-initialised weights; None for a model that cannot be re-initialised."""

        def compute() -> Recovery | None:
            try:
                model = reinitialise(subject.opened(subject.before), self.key.at("fresh"))
            except Refused:
                return None
            return self._run(subject, model)

        return subject.cache.get(subject.before, f"fresh {self.name} {self.settings}", compute)

    def _run(self, subject: Subject, model: Model) -> Recovery:
        opened = subject.opened(model)
        runs = [
            [
                [self._once(subject, opened, count, rate, seed) for seed in range(self.settings.seeds)]
                for rate in self.settings.rates
            ]
            for count in self.counts
        ]
        return Recovery.of(runs)

    def _once(self, subject: Subject, model: nn.Module, count: int, rate: float, seed: int) -> Run:
        key = self.key.at("seed", seed)
        chosen = drawn(self.source, count, key.at("chosen"))
        plan = Finetune(Adam(rate), self.settings.steps, self.settings.batch)
        return finetuned(subject, model, plan, chosen, (self.held, self.test), key)
