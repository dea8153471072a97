"""The command line: demo, run, audit, reference, tune, bench, recommend, list, explain.

Exit status: 0 done, 1 a run that failed, 2 bad input or use, 3 a gate that an audit did not pass. Errors are one
sentence on stderr. What is heavy is imported inside the commands, so that ``expunge --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.audit import Report

DONE, FAILED, REFUSED, GATED, INTERRUPTED = 0, 1, 2, 3, 130
WIDTH = 120  # columns where the output is no terminal

app = typer.Typer(
    name="expunge",
    help="Make a trained model forget, with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Gate = Annotated[bool, typer.Option("--gate", help="Status 3 unless the audit's verdict is 'forgotten'.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input never ends in a traceback."""
    try:
        status = app(args=None if arguments is None else list(arguments), standalone_mode=False)
        if status == INTERRUPTED:
            raise KeyboardInterrupt  # typer has made a status of it
        return status if isinstance(status, int) else DONE
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that the interpreter's last flush has somewhere to go
        return DONE
    except KeyboardInterrupt:
        return _say(
            "stopped; the same command goes on from its last checkpoint, where it has an out folder", INTERRUPTED
        )
    except Exception as error:
        status = _status(error)
        if status is None:
            raise
        return _say(_sentence(error), status)


def _status(error: Exception) -> int | None:
    """The exit status that an error means; None for a fault of expunge itself."""
    if hasattr(error, "format_message"):  # every error of use that typer raises
        return REFUSED
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    from expunge.core import MissingExtra, Refused, RunFailed

    if isinstance(error, (Refused, MissingExtra)):
        return REFUSED
    return FAILED if isinstance(error, RunFailed) else None


def _sentence(error: Exception) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":
        return "say what to do: demo, run, audit, reference, tune, bench, recommend, list or explain; --help tells more"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(message.split())


def _say(sentence: str, status: int) -> int:
    print(f"expunge: {sentence}", file=sys.stderr)
    return status


def _version(wanted: bool) -> None:
    if wanted:
        from expunge.version import __version__

        print(f"expunge {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Make a trained model forget, with evidence."""


def _one_thread() -> None:
    """One thread for torch, unless OMP_NUM_THREADS says otherwise.

    The built-in suites train networks of a few thousand weights: sharing out such a step costs more than it saves, and
    on a machine that is busy with other work each step waits for the slowest thread: two are then many times slower.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of every random draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Forget something real on this machine and write a report."""
    from expunge import demo as story

    _one_thread()
    summary = dict(story.run(out=out, seed=seed))
    reports = summary.pop("_reports", {}).values()
    if as_json:
        _print_json(summary)
        return
    for report in reports:
        _print(*_report_parts(report), "")
    _print(f"written to {out}")


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="A run file (TOML); a language model needs none.")] = None,
    overrides: Overrides = None,
    task: Annotated[str | None, typer.Option(help="causal-lm, for a run without a run file.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a language model.")] = None,
    forget: Annotated[str | None, typer.Option(help="JSON lines of the texts to forget.")] = None,
    retain: Annotated[str | None, typer.Option(help="JSON lines of the texts to keep.")] = None,
    test: Annotated[str | None, typer.Option(help="JSON lines of texts that the model never saw.")] = None,
    method: Annotated[str | None, typer.Option(help="A registered method (see list methods).")] = None,
    adapter: Annotated[str | None, typer.Option(help="Train in an adapter: lora, and others.")] = None,
    retrained: Annotated[
        list[str] | None, typer.Option(help="Folder of a model trained without the forget texts; repeat it.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the model, its record and the report.")] = None,
    as_json: AsJson = False,
    gate: Gate = False,
) -> int:
    """Forget, and audit if asked: as a run file says, or for a language model as the options say."""
    from expunge.core import Refused
    from expunge.perform import perform
    from expunge.spec import RunSpec

    options = {
        "--task": ("data", "task", task),
        "--model": ("model", "weights", model),
        "--forget": ("request", "forget_file", forget),
        "--retain": ("request", "retain_file", retain),
        "--test": ("request", "test_file", test),
        "--method": ("method", "name", method),
        "--adapter": ("run", "adapter", adapter),
        "--retrained": ("audit", "weights", retrained or None),
        "--out": ("run", "out", out),
    }
    given: dict[str, dict[str, Any]] = {}
    for section, key, value in options.values():
        if value is not None:
            given.setdefault(section, {})[key] = value
    overrides = list(overrides or ())
    if file is not None and "=" in str(file) and not file.exists():
        file, overrides = None, [str(file), *overrides]  # without a run file the first setting stands in its place
    if file is None:
        needed = ("--task", "--model", "--forget", "--method")
        missing = [name for name in needed if options[name][2] is None]
        if missing:
            raise Refused(f"without a run file a run needs {', '.join(needed)}; missing: {', '.join(missing)}")
        given["run"] = {"out": "out/run"} | given.get("run", {})
    spec = RunSpec.read(file, overrides, given)
    if spec.data.suite is not None:
        _one_thread()
    if gate and not spec.audit.wanted:
        raise Refused(
            "--gate needs something to judge by: give audit.retrained=3, or [audit] weights of retrained models"
        )
    done = perform(spec)
    if as_json:
        _print_json(done.summary())
    else:
        record = done.outcome.record
        cost = record["cost"]
        lines = [
            f"{record['method']} was run to forget {record['examples'].get('forget', 0):,} examples: {cost['seconds']:.1f} s, "
            f"{cost['forward']:,} rows forward, {cost['backward']:,} backward",
            *_memory(cost),
            *record["notes"],
            *done.notes,
        ]
        if done.report is None:
            lines.append(
                "whether it forgot is not known: audit.retrained=3 compares it with models retrained without them"
            )
        where = [] if done.folder is None else [f"written to {done.folder}"]
        _print(*lines, *_report_parts(done.report), *where)
    return _gated(done.report) if gate else DONE


@app.command()
def audit(
    file: Annotated[Path | None, typer.Argument(help="A run file; the options below can say it all instead.")] = None,
    overrides: Overrides = None,
    after: Annotated[str | None, typer.Option(help="Weights to judge; the run's own by default.")] = None,
    before: Annotated[str | None, typer.Option(help="Weights before; the run file's model by default.")] = None,
    retrained: Annotated[list[str] | None, typer.Option(help="Weights of a retrained model; repeat it.")] = None,
    data: Annotated[
        str | None, typer.Option(help="All rows: a table, .npz, .safetensors, or a folder of images.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column of a table that holds the label.")] = None,
    model: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION that builds the architecture.")] = None,
    forget: Annotated[str | None, typer.Option(help="File with the ids to forget.")] = None,
    retain: Annotated[str | None, typer.Option(help="File with the ids to keep; the rest by default.")] = None,
    test: Annotated[str | None, typer.Option(help="File with the ids that no model was trained on.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="A measure that trains or attacks (see list measures), or all; repeat it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path("out/audit"),
    as_json: AsJson = False,
    gate: Gate = False,
) -> int:
    """Judge weights that are there, made by any tool, against retrained models."""
    from expunge.core import Refused
    from expunge.perform import audit_files
    from expunge.spec import RunSpec

    overrides = list(overrides or ())
    if file is not None and "=" in str(file) and not file.exists():
        file, overrides = None, [str(file), *overrides]  # without a run file the first setting stands in its place
    options: dict[str, dict[str, Any]] = {
        "data": {"train": data, "label": label},
        "model": {"python": model, "weights": before if file is None else None},
        "request": {"forget_file": forget, "retain_file": retain, "test_file": test},
    }
    given = {section: {k: v for k, v in keys.items() if v is not None} for section, keys in options.items()}
    if file is None:
        needed = {"--data": data, "--model": model, "--before": before, "--after": after, "--forget": forget}
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise Refused(f"without a run file an audit needs {', '.join(needed)}; missing: {', '.join(missing)}")
        given["run"] = {"out": str(out)}
    elif forget is not None:
        given["request"]["forget"] = None
    spec = RunSpec.read(file, overrides, {name: keys for name, keys in given.items() if keys}, method=False)
    if spec.data.suite is not None:
        _one_thread()
    if gate and not (retrained or spec.audit.wanted):
        raise Refused("--gate needs something to judge by: give --retrained FILE, or audit.retrained=3")
    report = audit_files(spec, after, before, retrained or [], out, also or ())
    if as_json:
        _print_json(report.to_json())
    else:
        _print(*_report_parts(report), f"written to {out}")
    return _gated(report) if gate else DONE


@app.command()
def reference(
    file: Annotated[Path, typer.Argument(help="The run file that names data, task, request and training.")],
    overrides: Overrides = None,
    retrained: Annotated[int | None, typer.Option(help="Models without the forget data.")] = None,
    originals: Annotated[int | None, typer.Option(help="Models with all data.")] = None,
    shadows: Annotated[int | None, typer.Option(help="Models on random halves of the data.")] = None,
    unlearn: Annotated[bool, typer.Option("--unlearn", help="Apply the method to originals and shadows too.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes on this machine; 2 by default.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, in place of processes.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the models and what they say.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the models that an audit is judged by, each once."""
    from expunge.perform import reference_folder, train_references
    from expunge.sections import AuditSection
    from expunge.spec import RunSpec, checked

    spec = RunSpec.read(file, overrides or ())
    asked: dict[str, Any] = {"retrained": retrained, "originals": originals, "shadows": shadows, "workers": workers}
    asked |= {"unlearn": unlearn or None, "ray": ray, "folder": out}
    given = {name: value for name, value in asked.items() if value is not None}
    section = {"workers": 2, **spec.audit.model_dump(exclude_unset=True), **given}
    spec = spec.model_copy(update={"audit": checked(AuditSection, section, "the command line")})
    folder, (_, rows) = reference_folder(spec, Path("out")), train_references(spec)
    if as_json:
        _print_json({"out": str(folder), "references": rows})
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    _print(_table(names, cells), f"written to {folder}")


@app.command()
def tune(
    file: Annotated[
        Path, typer.Argument(help="The run file whose method is tuned; what [method] sets stays as it is.")
    ],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(help="Settings tried; 30 by default.")] = None,
    rule: Annotated[str | None, typer.Option(help="blind (no retrained model) or proxy (other requests).")] = None,
    floor: Annotated[float | None, typer.Option(help="Points of utility that may be lost; 2 by default.")] = None,
    target: Annotated[float | None, typer.Option(help="Stop at a score of this or less.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds of trials.")] = None,
    backward: Annotated[int | None, typer.Option(help="Stop after so many differentiated rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the search; the run's, with -tune, by default.")] = None,
    as_json: AsJson = False,
) -> int:
    """Search a method's settings, without a look at the models and tests that they will be judged by."""
    from expunge.cli_tune import said, tune_file
    from expunge.spec import RunSpec

    spec = RunSpec.read(file, overrides or ())
    asked = {"trials": trials, "rule": rule, "floor": floor, "target": target, "seconds": seconds, "backward": backward}
    if spec.data.suite is not None:
        _one_thread()
    found, folder = tune_file(spec, {k: v for k, v in asked.items() if v is not None}, out)
    if as_json:
        _print_json(found.to_json())
    else:
        columns, rows, lines = said(found, file, folder)
        _print(_table(columns, rows), *lines)
    return DONE if found.best is not None else _say(f"no setting was found: {found.why_none()}", FAILED)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A name in bench/suites, or the path of a suite file.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench/results"),
    cells: Annotated[
        Path | None, typer.Option(help="Folder for finished models and audits; out/bench/NAME by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, in place of processes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a benchmark suite: methods x requests x seeds. A run that was stopped goes on where it was."""
    from expunge.bench import bench as run_suite
    from expunge.bench import suite_file
    from expunge.bench.pages import write
    from expunge.bench.words import HEAD, failures, rows

    _one_thread()
    path = suite_file(suite)
    found = run_suite(path, out, cells, workers, ray)
    if as_json:
        _print_json(found)
        return
    page = write(found, cells or Path("out/bench") / path.stem)
    _print(_table(HEAD, rows(found)), *failures(found), f"written to {out / path.stem}.json, drawn in {page}")


@app.command()
def recommend(
    task: Annotated[
        str, typer.Option(help="Of the model: classification, regression, causal_lm, diffusion.")
    ] = "classification",
    request: Annotated[
        str,
        typer.Option(
            help="What is to be forgotten: class, subclass, random, memorised, worst, turns, range, corrective."
        ),
    ] = "random",
    retain: Annotated[bool, typer.Option(help="Whether examples to keep are at hand.")] = True,
    labels: Annotated[bool, typer.Option(help="Whether they are labelled.")] = True,
    original: Annotated[bool, typer.Option(help="Whether memory holds the original model beside the new one.")] = True,
    time: Annotated[float, typer.Option(help="What it may cost, as a share of retraining.")] = 1.0,
    guarantee: Annotated[str, typer.Option(help="none, or exact.")] = "none",
    as_json: AsJson = False,
) -> None:
    """Which methods fit, from what you have; the best measured first."""
    from expunge.recommend import HEAD, Has
    from expunge.recommend import recommend as ask
    from expunge.recommend import rows as lines

    fit, rest = ask(Has(task, request, retain, labels, original, time, guarantee))
    if as_json:
        _print_json({"fit": [advice.to_json() for advice in fit], "unfit": rest})
        return
    _print(
        _table(HEAD, lines(fit)),
        *(["no method fits"] if not fit else []),
        f"{len(rest)} others do not fit: --json says why",
    )


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, objectives, combiners, measures, tasks or suites.")],
    as_json: AsJson = False,
) -> None:
    """List what there is."""
    from expunge.catalogue import catalogue

    entries = catalogue(kind)
    if as_json:
        _print_json(entries)
        return
    columns = [
        name
        for name in ("name", "runs", "summary", "paper", "status", "unit")
        if any(entry.get(name) for entry in entries)
    ]
    _print(_table(columns, [[str(entry.get(name) or "") for name in columns] for entry in entries]))


@app.command()
def explain(method: Annotated[str, typer.Argument(help="A registered method.")], as_json: AsJson = False) -> None:
    """Say what a method does, its settings, paper and cost."""
    from expunge.catalogue import described, page

    if as_json:
        _print_json(described(method))
        return
    from rich.markdown import Markdown

    _print(Markdown(page(method)))


def _memory(cost: Mapping[str, Any]) -> list[str]:
    """Peak memory and time of a step, as predicted before each loop and as measured."""
    from expunge.predict import shown

    return [
        f"peak memory {shown(loop['measured']['peak_bytes'])} (predicted {shown(loop['peak_bytes'])}), "
        f"{loop['measured']['step_seconds']:.3g} s a step (predicted {loop['step_seconds']:.3g})"
        for loop in cost.get("predicted", ())
        if "measured" in loop
    ]


def _gated(report: Report | None) -> int:
    """Status 3 unless the verdict is "forgotten"; the first reason on stderr."""
    if report is not None and report.verdict == "forgotten":
        return DONE
    verdict = "nothing to judge by" if report is None else report.verdict
    why = f": {report.reasons[0]}" if report is not None and report.reasons else ""
    return _say(f"the gate is closed, the verdict is {verdict!r}{why}", GATED)


def _report_parts(report: Report | None) -> list[Any]:
    if report is None:
        return []
    alone = sum(row.kind == "method" for row in report.rows) == 1  # a table of several says it in its last column
    verdict = [f"verdict: {report.verdict}", *(f"  {reason}" for reason in report.reasons)] if alone else []
    return [report.table(), report.summary, *report.notes, *verdict]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, no_wrap=name in ("name", "method", "request"))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _print(*parts: Any) -> None:
    """Tables and sentences; what is in them is text and never markup."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
    for part in parts:
        console.print(part)


def _print_json(tree: Any) -> None:
    print(json.dumps(tree, indent=1, default=str))
