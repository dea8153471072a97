"""What a search may vary: a range for each setting that matters, from its default and the range that the method declares."""

from __future__ import annotations

import fnmatch
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.core import Refused
from expunge.registry import Method, Range, did_you_mean

MATTER = ("lr", "DOSE", "*_weight", "*_epochs", "STRENGTH", "*_lr", "*_steps")
"""Names of settings worth a search, the first ones first; the rest (batch, momentum, chunk, caps) stay at their defaults."""
STRENGTHS = {
    *(
        "alpha",
        "beta",
        "gamma",
        "rho",
        "rate",
        "scale",
        "share",
        "keep",
        "strength",
        "tolerance",
        "exponent",
        "epsilon",
    ),
    *("temperature", "percentile", "penalty", "threshold", "damping", "importance", "saturation", "steps", "epochs"),
}
MOST = 6  # dimensions: a few dozen trials say little about more
WIDTH = 10.0  # how far above and below its default a strength goes
SHORTER, LONGER = 4, 2  # a length is searched from a quarter of its default to twice that: a run's price goes with it
DIGITS = 4  # significant digits of a number that is tried, so that it can be written down as it was


@dataclass(frozen=True)
class Dimension:
    """The values that one setting may take: numbers from low to high, or choices.

    Attributes:
        low, high: both included. log: drawn evenly in the logarithm, of the size where the numbers are below zero.
        whole: integers only. choices: instead of numbers.
    """

    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    def describe(self) -> Any:
        """JSON-able, and what ``of`` reads."""
        return list(self.choices) if self.choices else [self.low, self.high]

    @property
    def _sign(self) -> int:
        """-1 where the search goes over sizes of negative numbers."""
        return -1 if self.log and self.high < 0 else 1

    def distribution(self, optuna: Any) -> Any:
        """As optuna draws from it."""
        kinds = optuna.distributions
        if self.choices:
            return kinds.CategoricalDistribution(self.choices)
        low, high = sorted((self._sign * self.low, self._sign * self.high))
        if self.whole:
            return kinds.IntDistribution(int(low), int(high), log=self.log)
        return kinds.FloatDistribution(low, high, log=self.log)

    def setting(self, drawn: Any) -> Any:
        """The value of the setting, of a number that was drawn: to a few digits, inside the range."""
        if self.choices:
            return drawn
        return self.nearest(self._sign * (int(drawn) if self.whole else _tidy(drawn)))

    def drawn(self, setting: Any) -> Any:
        """The inverse of ``setting``."""
        return setting if self.choices else self._sign * setting

    def nearest(self, value: Any) -> Any:
        """The value itself, where it can be taken, or else the nearest, or the first of the choices."""
        if self.choices:
            return value if value in self.choices else self.choices[0]
        kept = min(max(value, self.low), self.high)
        return int(kept) if self.whole else float(kept)


Space = dict[str, Dimension]


def space_of(method: Method, fixed: Mapping[str, Any], asked: Mapping[str, Any] | None = None) -> Space:
    """Setting -> what may be tried of it.

    Args:
        method: that is tuned. fixed: settings that stay as they are, unless `asked` names them.
        asked: the user's own ranges: ``{"lr": [1e-4, 1e-1], "variant": ["fast", "paper"]}``. Two numbers are a range
            (in the logarithm where both are on one side of zero), anything else a list of choices. They replace the derived space.

    Raises:
        Refused: for an unknown setting, a range that the method does not take, or where nothing is left to vary.
    """
    hints = hints_of(method)
    for name in (*fixed, *(asked or {})):
        if name not in hints:
            raise Refused(
                f"{method.name} has no setting {name!r}{did_you_mean(name, hints)}; it has {', '.join(hints)}"
            )
    if asked:
        return {name: _asked(method, name, value, hints[name]) for name, value in asked.items()}
    found = {
        name: made for name in _ranked(method) if name not in fixed and (made := _derived(method, name)) is not None
    }
    if not found:
        vary = ", ".join(_ranked(method)) or ", ".join(hints)
        raise Refused(
            f"there is nothing to tune: every setting of {method.name} that matters is fixed; leave one out of [method] "
            f"or give [tune] space a range for it ({vary})"
        )
    return dict(list(found.items())[:MOST])


def hints_of(method: Method) -> dict[str, Any]:
    """Setting -> its annotation, ranges included."""
    build = getattr(method.build, "__wrapped__", method.build)
    hints = typing.get_type_hints(build, include_extras=True)
    return {name: hints.get(name, float) for name in method.settings()}


def _ranked(method: Method) -> list[str]:
    """Settings with a number for a default that are worth a search, those that matter most first."""
    numbers = [name for name, parameter in method.settings().items() if _number(parameter.default)]
    ranked = {
        name: next((place for place, kind in enumerate(MATTER) if _is(method, name, kind)), None) for name in numbers
    }
    chosen = sorted((place, name) for name, place in ranked.items() if place is not None)
    return [name for _, name in chosen] or numbers


def _is(method: Method, name: str, kind: str) -> bool:
    if kind == "DOSE":
        return name == method.dose
    return name in STRENGTHS if kind == "STRENGTH" else fnmatch.fnmatch(name, kind)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0  # 0 says nothing of a scale


def _bounds(hint: Any) -> Range:
    return next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)), Range())


def _whole(hint: Any) -> bool:
    base = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    kinds = typing.get_args(base) or (base,)
    return int in kinds and float not in kinds


def _derived(method: Method, name: str) -> Dimension | None:
    """Around the default, inside the declared range; None where that leaves no room."""
    default, hint = method.settings()[name].default, hints_of(method)[name]
    bounds, length = _bounds(hint), name in ("steps", "epochs") or name.endswith(("_steps", "_epochs"))
    low, high = sorted((default / WIDTH, default * WIDTH))
    log = True
    if length:
        low, high = default / SHORTER, default * LONGER
    elif bounds.low > float("-inf") and bounds.high < float("inf"):
        width = bounds.high - bounds.low
        if default > bounds.low + 0.2 * width:  # a share that is not small: no logarithm
            low, high, log = bounds.low + 0.05 * width, bounds.high - (0.01 * width if bounds.open_high else 0.0), False
    low, high = max(low, bounds.low), min(high, bounds.high)
    if _whole(hint):
        low, high = max(1, round(low)), max(round(high), default + 1)
    else:
        low, high = _tidy(low), _tidy(high)
    return Dimension(low, high, log, _whole(hint)) if low < high else None


def _tidy(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _asked(method: Method, name: str, value: Any, hint: Any) -> Dimension:
    """A range or choices as the user gives them, each end tried on the method."""
    if isinstance(value, Dimension):
        return value
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise Refused(f"the space of {name} should be [low, high] or a list of choices, found {value!r}")
    for end in value:
        if end is not None and not isinstance(end, (bool, int, float, str)):
            raise Refused(f"the space of {name} may hold numbers, names, true and false, found {end!r}")
        method.build(**{name: end})
    if len(value) != 2 or not all(_number(end) or end == 0 for end in value) or any(isinstance(e, bool) for e in value):
        return Dimension(choices=tuple(value))
    low, high = value
    if not low < high:
        raise Refused(f"the space of {name} should go from a low to a higher number, found {list(value)}")
    whole = _whole(hint)
    return Dimension(low if whole else float(low), high if whole else float(high), low > 0 or high < 0, whole)


def defaults(method: Method, space: Space, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """What every search tries first: the settings as they are, as near as the space lets them be."""
    known = {name: parameter.default for name, parameter in method.settings().items()} | dict(fixed)
    return {name: dimension.nearest(known[name]) for name, dimension in space.items()}


def described(space: Space) -> dict[str, Any]:
    """JSON for the record."""
    return {name: dimension.describe() for name, dimension in space.items()}
