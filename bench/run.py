"""Run the benchmarks and write ``bench/results``: the scripts beside this one, then every suite of ``bench/suites``.

Names given on the command line choose among them: ``python bench/run.py surgery_cost digits``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(chosen: list[str]) -> int:
    """Run what was chosen (everything by default); the number of benchmarks that failed."""
    scripts = ("surgery_cost", "verdicts", "audit_speed", "reference_speed", "null_tables")
    commands = {name: [sys.executable, str(HERE / f"{name}.py")] for name in scripts}
    for suite in sorted((HERE / "suites").glob("*.toml")):
        commands[suite.stem] = [sys.executable, "-m", "expunge", "bench", str(suite), "--out", str(HERE / "results")]
    unknown = [name for name in chosen if name not in commands]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    return sum(subprocess.run(commands[name], check=False).returncode != 0 for name in chosen or commands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
