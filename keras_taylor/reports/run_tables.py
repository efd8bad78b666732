"""The tables about a run of `compress`, as text: for the terminal and for the HTML page."""

import dataclasses
from collections.abc import Mapping

from rich.table import Table

from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.exports.artifacts import artifact_row
from keras_taylor.reports.run_record import Round, RunRecord
from keras_taylor.support.types import Costs


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: What stands above it.
        header: The names of the columns.
        rows: A text for each column.
        wraps: Whether the last column holds sentences, which may take several lines.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    wraps: bool = False

    def as_rich(self, title: str | None = None, caption: str | None = None) -> Table:
        """A rich table, all columns aligned to the right."""
        table = Table(title=title or self.title, caption=caption)
        for column in self.header:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


def rounds_table(record: RunRecord) -> TextTable:
    """Costs, metrics and seconds of each round; row 0 is the given model, on the validation data."""
    metrics = list(dict.fromkeys(name for one in record.rounds for name in one.history))
    measured, verdicts = record.measured(), _verdict_columns(record)
    given = {f"val_{name}": f"{value:.4g}" for name, value in record.metrics.get("before", {}).items()}
    first = [given.get(name, "") for name in metrics]
    rows = [["0", *_cost_cells(record.before, measured), *first, *[""] * len(verdicts), ""]]
    for one in record.rounds:
        values = [f"{one.kept_history[name]:.4g}" if name in one.kept_history else "" for name in metrics]
        verdict = _verdict_cells(one) if verdicts else []
        seconds = f"{sum(one.seconds.values()):.1f}"
        rows.append([one.label, *_cost_cells(one.costs, measured), *values, *verdict, seconds])
    header = ["round", "parameters", "FLOPs", *measured, *metrics, *verdicts, "seconds"]
    return TextTable("Rounds", header, rows)


def _verdict_columns(record: RunRecord) -> list[str]:
    """Names of the columns that say which states were kept; empty if none were compared."""
    measures = {one.judged["measure"] for one in record.rounds if one.judged is not None} - {""}
    return [
        name for measure in measures for name in ("epoch kept", f"{measure} repaired", f"{measure} trained")
    ]


def _verdict_cells(one: Round) -> list[str]:
    values = [f"{value:.4g}" for value in one.judged_values]
    return [f"{one.kept_epoch} of {one.num_epochs}", *values, *[""] * (2 - len(values))]


def _cost_cells(costs: Costs, measured: list[str]) -> list[str]:
    """Parameters, FLOPs and the measured costs that are known."""
    cells = ["unknown" if (amount := costs[name]) is None else f"{amount:,}" for name in ("params", "flops")]
    for name in measured:
        amount = costs.get(name)
        cells.append("" if amount is None else format_amount(name, amount, False))
    return cells


def goals_table(record: RunRecord) -> TextTable:
    """What was left at each goal that was reached; the first row is the original model."""
    points: list[tuple[Costs, Mapping[str, float]]] = [(record.before, record.metrics.get("before", {}))]
    points += [(stop["costs"], stop["metrics"]) for stop in record.stops]
    metrics = list(dict.fromkeys(name for _, values in points for name in values))
    rows = [
        [
            *(_remainder(costs[cost], record.before[cost]) for cost in ("params", "flops")),
            *(f"{values[name]:.4g}" if name in values else "" for name in metrics),
        ]
        for costs, values in points
    ]
    title = "What is left at each goal (metrics on the validation data)"
    return TextTable(title, ["parameters", "FLOPs", *metrics], rows)


def _remainder(left: int | None, before: int | None) -> str:
    """What is left of a cost, and the fraction that it is: "12,345 (70.0%)"."""
    return "unknown" if left is None or before is None else f"{left:,} ({left / before:.1%})"


def files_table(record: RunRecord) -> TextTable:
    """The exported files of the original and of the result."""
    rows = [artifact_row(one) for pair in record.exported() for one in pair]
    return TextTable("Files", list(rows[0]) if rows else [], [list(cells.values()) for cells in rows])


def repairs_table(record: RunRecord) -> TextTable:
    """What the repair in the last round did to each layer."""
    repairs = record.rounds[-1].repairs if record.rounds else []
    rows = [
        [
            one["name"],
            *("" if error is None else f"{error:.2g}" for error in (one["error_before"], one["error_after"])),
            one["reason"] or "",
        ]
        for one in repairs
    ]
    header = ["layer", "relative squared error after the cut", "after the repair", "left alone because"]
    return TextTable("Repair in the last round", header, rows, wraps=True)


def inexact_table(record: RunRecord) -> TextTable:
    """The groups that are open with `exact=False` only."""
    rows = [[name, str(e["channels"]), ", ".join(e["changes"])] for name, e in record.inexact.items()]
    header = ["group", "channels", "their removal changes the values of"]
    return TextTable("Open with exact=False only", header, rows, wraps=True)


def locked_table(record: RunRecord) -> TextTable:
    """The groups that cannot leave, and the reasons."""
    rows = [[name, str(e["channels"]), e["reason"] or ""] for name, e in record.locked.items()]
    return TextTable("What stays, and why", ["layer", "channels", "why they stay"], rows, wraps=True)
