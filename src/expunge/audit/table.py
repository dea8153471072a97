"""A report for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expunge.audit import words

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from expunge.audit.report import Report
    from expunge.audit.subject import Reading

MAIN = (
    "average_gap",
    "forget_accuracy",
    "retain_accuracy",
    "test_accuracy",
    "forget_loss",
    "retain_loss",
    "test_loss",
    "membership_auc",
    "membership_auc_same_class",
    "seconds",
)


def table(report: Report, names: tuple[str, ...] = MAIN) -> Table:
    """One line per model: value over its interval, the verdict last. Names stay text, whatever they hold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = [name for name in words.ordered(report.rows) if name in names]
    caption = Text("value, 95% interval below; retrain: each held out in turn")
    made = Table(title=Text(report.title), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    made.add_column("model", min_width=9, max_width=15, overflow="fold")
    for name in columns:
        unit = next(row.readings[name].unit for row in report.rows if name in row.readings)
        made.add_column(Text(words.title(name) + (f" ({unit})" if unit else "")), justify="right", overflow="fold")
    made.add_column("verdict", min_width=14, no_wrap=True)
    for row in report.rows:
        cells = [_cell(row.readings.get(name)) for name in columns]
        made.add_row(Text(row.name), *cells, Text(row.verdict or "–"))
    return made


def _cell(reading: Reading | None) -> Text:
    from rich.text import Text

    if reading is None:
        return Text("–")
    style = {"within": "green", "": "", "above": "", "unclear": "yellow"}.get(reading.verdict, "red")
    text = Text(words.number(reading.value, reading.unit), style=style)
    between = words.spread(reading)
    if "-" not in between:
        between = between.replace(" to ", "–")  # a line less in each row of a narrow terminal
    return text.append(f"\n{between}", style="dim") if between else text
