"""What KLoM and the forgetting score say of populations that are equal: the number that a perfect method would get.

Normal margins, the same for unlearned and retrained, so that any reading above 0 (or below 1) is the instrument's own.
Beside each number stands one that was simulated apart, on about 150 examples a cell. A number is off
where it differs by more than three standard errors of both, and half of that number's last digit. The score's grid is in
units of the margin, so it is given for deviations 1 and 2 (the other numbers are of either, on a coarser grid): the nearer
counts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from expunge.audit import forgetting_score, klom
from expunge.core import Key
from expunge.version import revision

SEED, EXAMPLES, SCORED = 0, 3000, 300
RESULT = Path(__file__).parent / "results" / "null_tables.json"
SHEET_EXAMPLES = 150
# KLoM as released and Gaussian, mean and P95; epsilon and F.
KLOM = {
    5: (8.07, 10.5, 0.78, 2.9),
    10: (5.57, 8.0, 0.27, 0.82),
    20: (3.02, 5.1, 0.12, 0.37),
    50: (0.84, 1.7, 0.041, 0.12),
    100: (0.34, 0.65, 0.021, 0.066),
    200: (0.14, 0.27, 0.010, 0.029),
}
SCORE = {16: (1.5, 0.19), 32: (1.56, 0.19), 64: (1.55, 0.18), 128: (1.55, 0.19), 256: (1.56, 0.19), 512: (1.56, 0.19)}


def draw(count: int, examples: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Two tables [count, examples] of the same normal distribution."""
    rng = np.random.Generator(np.random.PCG64(Key(SEED).at(what, count).seed))
    return rng.normal(size=(count, examples)), rng.normal(size=(count, examples))


def klom_row(count: int) -> dict[str, float]:
    """Mean and P95 over examples of both estimators, and the Gaussian floor in closed form."""
    pair, row = draw(count, EXAMPLES, "klom"), {}
    for name, kind in (("released", klom.released), ("gaussian", klom.gaussian), ("energy", klom.energy)):
        found = kind(*pair)
        row[name], row[f"{name}_p95"] = float(found.mean()), float(np.quantile(found, 0.95))
        row[f"{name}_error"] = float(found.std(ddof=1) / np.sqrt(EXAMPLES))
    row["gaussian_closed_form"] = ((count - 1) / (count - 3) * (1 + 2 / count) - 1) / 2
    return row


def score_row(count: int) -> dict[str, float]:
    """Mean epsilon and F at deviations 1 and 2, each with its standard error over examples."""
    pair, row = draw(count, SCORED, "score"), {}
    for deviation in (1, 2):
        found = forgetting_score.epsilons(*(deviation * table for table in pair))
        for name, values in (("epsilon", found), ("score", forgetting_score.scores(found, count))):
            row[f"{name}_{deviation}"] = float(values.mean())
            row[f"{name}_{deviation}_error"] = float(values.std(ddof=1) / np.sqrt(SCORED))
    return row


def off(value: float, error: float, examples: int, wanted: float, step: float) -> bool:
    """Whether a mean over examples differs from the other simulation's by more than the noise of both and its rounding."""
    return abs(value - wanted) > 3 * error * np.sqrt(1 + examples / SHEET_EXAMPLES) + step / 2


def all_off(kloms: dict[int, dict[str, float]], scored: dict[int, dict[str, float]]) -> list[str]:
    """The cells that are off, named."""
    found = []
    for n, row in kloms.items():
        for name, wanted, step in (("released", KLOM[n][0], 0.01), ("gaussian", KLOM[n][2], 10.0 ** -(2 + (n > 20)))):
            if off(row[name], row[f"{name}_error"], EXAMPLES, wanted, step):
                found.append(f"{name} at {n}")
    for n, row in scored.items():
        for name, wanted, step in (("epsilon", SCORE[n][0], 0.1 if n == 16 else 0.01), ("score", SCORE[n][1], 0.01)):
            each = [off(row[f"{name}_{d}"], row[f"{name}_{d}_error"], SCORED, wanted, step) for d in (1, 2)]
            if all(each):
                found.append(f"{name} at {n}")
    return found


def main() -> None:
    """Print both tables and write the result; fail where a number is off the other simulation's by more than its noise."""
    kloms, scored = {n: klom_row(n) for n in KLOM}, {n: score_row(n) for n in SCORE}
    result = {
        "what": __doc__.splitlines()[0] if __doc__ else "",
        **{"seed": SEED, "revision": revision(), "examples": EXAMPLES, "examples_scored": SCORED},
        "klom": {str(n): {**row, "apart": KLOM[n]} for n, row in kloms.items()},
        "score": {str(n): {**row, "apart": SCORE[n]} for n, row in scored.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print("models  KLoM as released       Gaussian fit           (mean / P95, the other simulation's in brackets)")
    for n, row in kloms.items():
        cells = [row[k] for k in ("released", "released_p95", "gaussian", "gaussian_p95")]
        print(f"{n:6d}  " + "  ".join(f"{mine:6.3f} ({theirs})" for mine, theirs in zip(cells, KLOM[n], strict=True)))
    print("models  epsilon and F at deviation 1; at deviation 2")
    for n, row in scored.items():
        cells = [row[k] for k in ("epsilon_1", "score_1", "epsilon_2", "score_2")]
        print(f"{n:6d}  {cells[0]:.2f} {cells[1]:.3f}; {cells[2]:.2f} {cells[3]:.3f}  {SCORE[n]}")
    wrong = all_off(kloms, scored)
    if wrong:
        sys.exit(f"off the other simulation by more than its noise: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
