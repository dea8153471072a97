"""From audits to one table: every score beside doing nothing and retraining, over seeds, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.audit import intervals
from expunge.shelf import Made

SCORES = (
    "average_gap",
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "forget_loss",
    "retain_loss",
    "test_loss",
    "membership_auc",
    "corrected_accuracy",
    "unaffected_accuracy",
)


def table(audits: Sequence[Mapping[str, Any]], retrained: Mapping[str, Sequence[Made]], rows: Any) -> dict[str, Any]:
    """``table``, ``runs`` and ``failed``, the same to the bit whenever they are made; and ``time``, which is not.

    ``table[request]`` has a line per row. Each score is a mean over seeds with Student's 95 % interval over the seeds of
    the originals (over examples, where there is one seed; ``runs`` has that interval for each run). ``left`` is the share of
    do-nothing's average gap that is left; ``above_floor`` the average gap less that of a held-out retrained model, in
    points; ``cost`` the rows differentiated, as a share of retraining's.
    """
    runs = [_run(audit) for audit in audits]
    failed: dict[str, dict[str, str]] = {}
    for (request, row, _train, _seed), made in rows.items():
        if "failed" in made.record:
            failed.setdefault(request, {})[row] = made.record["failed"]
    lines = {request: _lines(request, runs, retrained[request], rows) for request in retrained}
    return {"table": lines, "failed": failed, "runs": runs, "time": _time(retrained, rows)}


def _run(audit: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for row in audit["rows"]:
        scores = {
            name: [reading["value"], reading["low"], reading["high"]]
            for name, reading in row["readings"].items()
            if name in SCORES
        }
        found[row["row"]] = {"verdict": row["verdict"], **scores}
    return {**{name: audit[name] for name in ("request", "train", "unlearn", "audit")}, "rows": found}


def _lines(request: str, runs: Sequence[Any], retrained: Sequence[Made], rows: Any) -> list[dict[str, Any]]:
    """The lines of one request: the controls first, then the best method first."""
    own = [run for run in runs if run["request"] == request]
    names = list(dict.fromkeys(name for run in own for name in run["rows"]))
    lines = [_line(name, own, _cost(request, name, retrained, rows)) for name in names]
    controls = [line for line in lines if line["row"] in ("original", "retrain")]
    others = [line for line in lines if line not in controls]
    return controls + sorted(others, key=_gap)


def _gap(line: Mapping[str, Any]) -> float:
    found = line["scores"].get("average_gap")
    return np.inf if found is None else found["value"]


def _line(name: str, runs: Sequence[Any], cost: float | None) -> dict[str, Any]:
    own = [run for run in runs if name in run["rows"]]
    scores = {}
    for score in SCORES:
        given = [(run["train"], run["rows"][name][score]) for run in own if score in run["rows"][name]]
        if given:
            scores[score] = _over_seeds(given, score)
    left = [_share(run, name) for run in own]
    above = [_above(run, name) for run in own]
    verdicts = Counter(run["rows"][name]["verdict"] for run in own)
    return {
        "row": name,
        "runs": len(own),
        "scores": scores,
        "left": _mean(left),
        "above_floor": _mean(above),
        "verdicts": dict(sorted(verdicts.items(), key=lambda pair: (-pair[1], pair[0]))),
        "cost": cost,
    }


def _over_seeds(given: Sequence[tuple[int, Sequence[float]]], score: str) -> dict[str, float]:
    """The mean, and the interval over train seeds, within the score's range; over examples where there is one seed."""
    values = np.array([one[0] for _, one in given], dtype=np.float64)
    seeds = sorted({seed for seed, _ in given})
    if len(seeds) > 1:
        means = [float(np.mean([one[0] for seed, one in given if seed == which])) for which in seeds]
        low, high = intervals.t_interval(means)
    else:
        low, high = (float(np.mean([one[part] for _, one in given])) for part in (1, 2))
    top = 100.0 if score.endswith("accuracy") else 1.0 if score == "membership_auc" else np.inf
    low, high = (float(np.clip(end, 0.0, top)) for end in (low, high))
    return {"value": float(values.mean()), "low": low, "high": high}


def _share(run: Any, name: str) -> float | None:
    nothing, own = (run["rows"].get(row, {}).get("average_gap") for row in ("original", name))
    return None if nothing is None or own is None or not nothing[0] else own[0] / nothing[0]


def _above(run: Any, name: str) -> float | None:
    floor, own = (run["rows"].get(row, {}).get("average_gap") for row in ("retrain", name))
    return None if floor is None or own is None else own[0] - floor[0]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _cost(request: str, row: str, retrained: Sequence[Made], rows: Any) -> float | None:
    """Rows differentiated, as a share of what retraining differentiates."""
    whole = [made.record["cost"].get("backward") for made in retrained]
    own = [
        made.record["cost"]["backward"]
        for key, made in rows.items()
        if key[:2] == (request, row) and "cost" in made.record
    ]
    if not own or not whole or None in whole:
        return None
    return float(np.mean(own) / np.mean(np.array(whole, dtype=np.float64)))


def _time(retrained: Mapping[str, Sequence[Made]], rows: Any) -> dict[str, Any]:
    """request -> row -> [median seconds, as a share of retraining's]; retraining itself under "retrain"."""
    found: dict[str, Any] = {}
    for request, made in retrained.items():
        whole = float(np.median([one.record["cost"]["seconds"] for one in made])) if made else None
        found[request] = {} if whole is None else {"retrain": [whole, 1.0]}
        for row in dict.fromkeys(key[1] for key in rows if key[0] == request):
            own = [
                m.record["cost"]["seconds"]
                for key, m in rows.items()
                if key[:2] == (request, row) and "cost" in m.record
            ]
            if own:
                seconds = float(np.median(own))
                found[request][row] = [seconds, None if not whole else seconds / whole]
    return found
