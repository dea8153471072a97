"""Which method, from what one has: filtered by what each method needs and promises, ordered by what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from expunge.core import Refused
from expunge.registry import Method, find, methods, tasks

KINDS: Mapping[str, str] = {
    "class": "every example of a class",
    "subclass": "a group inside a class",
    "random": "some examples, as a person's records",
    "memorised": "examples that the model knows by heart",
    "worst": "examples that are hardest to erase",
    "turns": "one request after another",
    "range": "a range of a number that the model predicts",
    "corrective": "bad examples, of which some were found",
}
GUARANTEES = ("none", "exact")
HEAD = ("method", "gap left", "rows", "forgotten", "measured on", "")
FROM_THE_START = ("sisa", "s3t")  # exact deletion of models that were trained in shards


@dataclass(frozen=True)
class Has:
    """What a user has.

    Args:
        task: name of a task. request: one of ``KINDS``.
        retain: examples to keep are at hand. labels: with their labels.
        original: the trained model may be read a second time, as a teacher.
        time: what unlearning may cost, as a share of retraining, > 0; 1 is retraining.
        guarantee: "exact" where nothing but retraining, or its equal, will do.
    """

    task: str = "classification"
    request: str = "random"
    retain: bool = True
    labels: bool = True
    original: bool = True
    time: float = 1.0
    guarantee: str = "none"

    def __post_init__(self) -> None:
        find("task", self.task, tasks())
        find("kind of request", self.request, KINDS)
        find("guarantee", self.guarantee, dict.fromkeys(GUARANTEES))
        if not self.time > 0:
            raise Refused(f"time is a share of retraining's and must be above 0, found {self.time:g}")


@dataclass(frozen=True)
class Advice:
    """A method that fits, and what is known of it.

    Attributes:
        method: name. left: median share of do-nothing's average gap that it left on such requests, over suites; None where
            it was not measured on any. cost: median share of retraining's rows. suites: where that is from.
        forgotten, runs: how many audits of how many said "forgotten". why: sentences.
    """

    method: str
    left: float | None
    cost: float | None
    suites: tuple[str, ...]
    forgotten: int
    runs: int
    why: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "suites": list(self.suites), "why": list(self.why)}


def recommend(has: Has, measured: Sequence[Mapping[str, Any]] | None = None) -> tuple[list[Advice], dict[str, str]]:
    """Methods that fit, the best measured first, and for each other method of the task why it does not.

    The order is of measurements on the benchmark's suites, with the settings that were found there. It does not promise
    the same on other models and data: run the first two or three, and let ``audit`` decide.

    Args:
        has: what the user has.
        measured: lines as ``collected`` gives them; those that this version was released with by default.
    """
    lines = released() if measured is None else measured
    fit, rest = [], {}
    for name, method in methods().items():
        if has.task not in method.tasks:
            continue
        why_not = _unfit(method, has)
        found = [line for line in lines if line["method"] == name and line["task"] == has.task]
        own = [line for line in found if line["kind"] == has.request]
        cost = _median([line["cost"] for line in own or found])
        if not why_not and has.time < 1 and cost is not None and cost > has.time and method.promise != "exact":
            why_not = f"it differentiated {100 * cost:.0f} % of retraining's rows where it was measured"
        if why_not:
            rest[name] = why_not
        else:
            fit.append(_advice(method, own, cost, bool(found)))
    return sorted(fit, key=_order), rest


def _order(advice: Advice) -> tuple[Any, ...]:
    left = advice.left
    return (left is None, 0.0 if left is None else left, advice.method)


def _unfit(method: Method, has: Has) -> str:
    """Why a method cannot be used; "" where it can."""
    if has.guarantee == "exact" and method.promise != "exact":
        return "it promises nothing exact"
    if has.time < 1 and method.name == "retrain":
        return "it is retraining itself"
    for need in sorted(method.needs):
        options = need.split("|")
        if "retain" in options and not has.retain:
            return "it needs examples to keep"
        if options == ["teacher:original"] and not has.original:
            return "it needs the original model a second time, as a teacher"
    if method.labels and not has.labels:
        return "it reads labels"
    return ""


def _advice(method: Method, own: Sequence[Mapping[str, Any]], cost: float | None, elsewhere: bool) -> Advice:
    why = []
    if method.promise == "exact":
        why.append(
            "equals retraining to the bit"
            + (", if the model was trained by it" if method.name in FROM_THE_START else "")
        )
    if not own:
        why.append("measured on other requests only" if elsewhere else "not measured")
    if "retain" not in method.needs:
        why.append("needs no examples to keep")
    if not method.labels:
        why.append("reads no labels")
    return Advice(
        method.name,
        _median([line["left"] for line in own]),
        cost,
        tuple(sorted({line["suite"] for line in own})),
        sum(line["verdicts"].get("forgotten", 0) for line in own),
        sum(sum(line["verdicts"].values()) for line in own),
        tuple(why),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def rows(fit: Sequence[Advice]) -> list[list[str]]:
    """The cells of a table."""
    return [
        [
            advice.method,
            "" if advice.left is None else f"{100 * advice.left:.0f} %",
            "" if advice.cost is None else f"{100 * advice.cost:.1f} %",
            f"{advice.forgotten} of {advice.runs}" if advice.runs else "",
            ", ".join(advice.suites),
            "; ".join(advice.why),
        ]
        for advice in fit
    ]


def released() -> list[dict[str, Any]]:
    """What was measured for this version."""
    text = resources.files("expunge.bench").joinpath("measured.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def collected(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per suite, request and row of results files of ``expunge bench``; of several rows of a method, the best."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for found in results:
        for request, lines in found["table"].items():
            for line in lines:
                settings = found["spec"]["methods"].get(line["row"])
                if settings is None or line["left"] is None:
                    continue
                name = settings.get("method", line["row"])
                made = {
                    "suite": found["name"],
                    "task": found["task"],
                    "request": request,
                    "kind": kind_of(found["spec"]["requests"][request], found),
                    "method": name,
                    **{part: line[part] for part in ("left", "above_floor", "cost", "verdicts")},
                }
                key = (found["name"], request, name)
                if key not in best or made["left"] < best[key]["left"]:
                    best[key] = made
    return list(best.values())


def kind_of(asked: Any, found: Mapping[str, Any]) -> str:
    """Which of ``KINDS`` a request of a suite file is."""
    if isinstance(asked, Mapping):
        if asked.get("turns", 1) > 1:
            return "turns"
        rule = next(name for name in ("random", "memorised", "worst_case", "identified") if asked.get(name) is not None)
        return {"worst_case": "worst", "identified": "corrective"}.get(rule, rule)
    if found["task"] == "regression":
        return "range"
    if isinstance(asked, str) and asked.split()[0] in ("y", "label"):
        return "class"
    return "subclass" if isinstance(asked, str) else "random"
