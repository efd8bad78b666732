"""The tables about a run of `compress`, as text: for the terminal and for the HTML page."""

import dataclasses
from collections.abc import Iterator, Mapping

from rich.table import Table

from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.exports.artifacts import artifact_row
from keras_taylor.reports.run_record import Round, RunRecord
from keras_taylor.support.console import render_table
from keras_taylor.support.types import Costs

_MAX_CHARACTERS = 140  # a table of rounds that is wider becomes two
_SPLIT_CHARACTERS = 100  # the most of these
_STATES = ("cut", "repaired", "trained")  # of a round's model


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

    @property
    def num_characters(self) -> int:
        """The width of a row, if no text takes several lines but those of the header that have breaks."""
        columns = zip(self.header, *self.rows, strict=True)
        return 1 + sum(3 + max(len(line) for text in one for line in text.split("\n")) for one in columns)

    def broken(self) -> "TextTable":
        """The same table, with line breaks in the names of its columns, and of its rows that were undone."""
        header = [name.replace("_", "_\n") for name in self.header]
        rows = [[label.replace(", ", ",\n"), *cells] for label, *cells in self.rows]
        return dataclasses.replace(self, header=header, rows=rows)

    def as_text(self, width: int, title: str | None = None, caption: str | None = None) -> str:
        """The table as plain text, all columns aligned to the right.

        Args:
            width: The most characters of a line. Names of columns take several lines where that is too few.
            title: What stands above; `None`: the table's own title.
            caption: What stands below; `None`: nothing.
        """
        table = Table(title=title or self.title, caption=caption)
        shown = self if self.num_characters <= width else self.broken()
        for column in shown.header:
            table.add_column(column, justify="right")
        for row in shown.rows:
            table.add_row(*row)
        return render_table(table, width)


def rounds_table(record: RunRecord) -> TextTable:
    """Costs, metrics and seconds of each round; row 0 is the given model, on the validation data."""
    return _table_of_rounds(record, _metric_names(record))


def rounds_as_text(record: RunRecord, title: str, caption: str | None = None) -> str:
    """The rounds, for a terminal: one table, or two where one would be too wide.

    Then the first one has the costs and the whole loss, the second one the states of each round's model, and
    the third one the metrics and the losses of single outputs. Many metrics take more tables.

    Args:
        record: The run.
        title: What stands above.
        caption: What stands below; `None`: nothing.
    """
    table, names = rounds_table(record), _metric_names(record)
    if table.num_characters <= _MAX_CHARACTERS:
        return table.as_text(_MAX_CHARACTERS, title, caption)
    whole = [name for name in names if name in ("loss", "val_loss")]
    rest = [name for name in names if name not in whole and name != "learning_rate"]
    first, tables = _table_of_rounds(record, whole), [*_tables_of_metrics(record, rest)]
    if first.num_characters > _SPLIT_CHARACTERS and _verdict_columns(record):
        first = _table_of_rounds(record, whole, with_states=False)
        tables.insert(0, _table_of_states(record))
    texts = [first.as_text(_SPLIT_CHARACTERS, title, caption)]
    return "\n".join([*texts, *(table.as_text(_SPLIT_CHARACTERS) for table in tables)])


def _metric_names(record: RunRecord) -> list[str]:
    """The metrics that tables show: of the validation data if there is any, else of the training."""
    names = dict.fromkeys(name for one in record.rounds for name in one.known_metrics)
    return [name for name in names if name.startswith("val_")] or list(names)


def _table_of_rounds(record: RunRecord, metrics: list[str], with_states: bool = True) -> TextTable:
    measured, verdicts = record.measured(), _verdict_columns(record) if with_states else []
    first, *values = _metric_rows(record, metrics)
    rows = [["0", *_cost_cells(record.before, measured), *first, *[""] * len(verdicts), ""]]
    for one, found in zip(record.rounds, values, strict=True):
        verdict = _verdict_cells(one) if verdicts else []
        seconds = f"{sum(one.seconds.values()):.1f}"
        rows.append([one.label, *_cost_cells(one.costs, measured), *found, *verdict, seconds])
    header = ["round", "parameters", "FLOPs", *measured, *metrics, *verdicts, "seconds"]
    return TextTable("Rounds", header, rows)


def _table_of_states(record: RunRecord) -> TextTable:
    """What cutting, repair and training made of each round's model."""
    rows = [[one.label, *_verdict_cells(one)] for one in record.rounds]
    return TextTable("States of each round's model", ["round", *_verdict_columns(record)], rows)


def _tables_of_metrics(record: RunRecord, metrics: list[str]) -> Iterator[TextTable]:
    """As few tables as have room for all metrics."""
    while metrics:
        num = len(metrics)
        while num > 1 and (
            _table_of_metrics(record, metrics[:num]).broken().num_characters > _SPLIT_CHARACTERS
        ):
            num -= 1
        yield _table_of_metrics(record, metrics[:num])
        metrics = metrics[num:]


def _table_of_metrics(record: RunRecord, metrics: list[str]) -> TextTable:
    """Metrics that are all of the validation data, or all of the training."""
    is_validation = metrics[0].startswith("val_")
    labels = ["0", *(one.label for one in record.rounds)]
    rows = [[label, *found] for label, found in zip(labels, _metric_rows(record, metrics), strict=True)]
    title = "Metrics on the validation data" if is_validation else "Metrics in training"
    return TextTable(title, ["round", *(name.removeprefix("val_") for name in metrics)], rows)


def _metric_rows(record: RunRecord, metrics: list[str]) -> list[list[str]]:
    """Metrics of the given model, on the validation data, and after each round; empty where unknown."""
    given = {f"val_{name}": value for name, value in record.metrics.get("before", {}).items()}
    return [
        [f"{found[name]:.4g}" if name in found else "" for name in metrics]
        for found in (given, *(one.known_metrics for one in record.rounds))
    ]


def _verdict_columns(record: RunRecord) -> list[str]:
    """Names of the columns that say which states were kept; empty if none were compared."""
    measures = {one.judged["measure"] for one in record.rounds if one.judged is not None} - {""}
    return [name for measure in measures for name in (*(f"{measure} {s}" for s in _STATES), "epoch kept")]


def _verdict_cells(one: Round) -> list[str]:
    values = one.judged_values
    kept = f"{one.kept_epoch} of {one.num_epochs}" if one.num_epochs else ""
    return [*(f"{values[state]:.4g}" if state in values else "" for state in _STATES), kept]


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
