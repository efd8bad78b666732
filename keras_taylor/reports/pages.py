"""A run of `compress` as one HTML page."""

import importlib
import importlib.resources
from typing import Any, TypedDict

from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.exports.artifacts import format_kib, variant_label
from keras_taylor.reports import plots
from keras_taylor.reports.run_record import RunRecord
from keras_taylor.reports.run_tables import (
    TextTable,
    files_table,
    goals_table,
    inexact_table,
    locked_table,
    repairs_table,
    rounds_table,
)


class SummaryCard(TypedDict):
    """A quantity at the top of the page: its name, its value after the run, and what it was before."""

    name: str
    after: str
    note: str


class LayerBar(TypedDict):
    """A layer's bar: its width in percent of the widest layer, and the percentage that was kept."""

    name: str
    width: float
    kept: float
    count: str


def render_page(record: RunRecord) -> str:
    """The report of a run as one self-contained HTML page: no network, light and dark, wide and narrow.

    Raises:
        ImportError: without jinja2 and matplotlib (`pip install "keras-taylor[report]"`).
    """
    template = importlib.resources.files("keras_taylor.reports") / "templates/report.html"
    return (
        _template_environment()
        .from_string(template.read_text("utf-8"))
        .render(
            title=f"{record.name or 'A model'}, {_removed_shares(record)} removed",
            summary=f"{record.headline()}. {_asked(record)}Ended: {record.stop_reason or 'unknown'}.",
            cards=_summary_cards(record),
            layers=_layer_bars(record),
            curves=plots.rounds_as_svg(record) if record.rounds else "",
            tables=_page_tables(record),
            command=record.command,
            environment=", ".join(f"{name} {version}" for name, version in record.environment.items()),
        )
    )


def _template_environment() -> Any:
    """jinja2's environment, which escapes every text."""
    try:
        return importlib.import_module("jinja2").Environment(autoescape=True)
    except ImportError as error:
        raise ImportError(
            'An HTML report needs jinja2. Install the extra: pip install "keras-taylor[report]"'
        ) from error


def _removed_shares(record: RunRecord) -> str:
    """How much of each cost in the goal was removed, or of the parameters if that is not known."""
    removed = record.reduction
    shown = [cost for cost in record.goal if cost in removed] or ["params"]
    return ", ".join(f"{100 * removed[cost]:.3g} % of {cost}" for cost in shown)


def _asked(record: RunRecord) -> str:
    """The goal in words, if there was one: shares to remove, and amounts that may be left."""
    parts = [
        f"{amount:.0%} less of {cost}"
        if isinstance(amount, float)
        else f"{cost} of at most {format_amount(cost, amount, named=False)}"
        for cost, amount in record.goal.items()
    ]
    return f"Asked for: {', '.join(parts)}. " if parts else ""


def _summary_cards(record: RunRecord) -> list[SummaryCard]:
    """Before and after of everything that was counted, measured or exported."""
    cards = []
    names = {"params": "parameters", "flops": "FLOPs", **{cost: cost for cost in record.measured()}}
    for cost, name in names.items():
        before, after = record.before[cost], record.after.get(cost)
        if before and after is not None:
            texts = [format_amount(cost, amount, named=False) for amount in (before, after)]
            cards.append(_summary_card(name, texts[0], texts[1], _percent_change(before, after)))
    for data, metrics in (("validation", record.metrics), ("test", record.test_metrics)):
        for metric, value in metrics.get("after", {}).items():
            first = metrics["before"][metric]
            texts = [f"{first:.4g}", f"{value:.4g}", f"{value - first:+.4g}"]
            cards.append(_summary_card(f"{metric}, {data}", *texts))
    for old, new in record.exported():
        label = variant_label(new)
        change = _percent_change(old.num_bytes, new.num_bytes)
        sizes = format_kib(old.num_bytes), format_kib(new.num_bytes)
        cards.append(_summary_card(f"{label}, size", *sizes, change))
        change = _percent_change(old.latency_ms, new.latency_ms)
        times = f"{old.latency_ms:.3f} ms", f"{new.latency_ms:.3f} ms"
        cards.append(_summary_card(f"{label}, latency", *times, change))
    return cards


def _summary_card(name: str, before: str, after: str, change: str) -> SummaryCard:
    return {"name": name, "after": after, "note": f"before {before} ({change})"}


def _percent_change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}"


def _layer_bars(record: RunRecord) -> list[LayerBar]:
    """A bar for each layer that makes channels, in the network's order."""
    largest = max(record.layers.values(), default=1)
    bars: list[LayerBar] = []
    for name, width in record.layers.items():
        kept = len(record.plan.layers[name].kept) if name in record.plan.layers else width
        bars.append(
            {
                "name": name,
                "width": round(100 * width / largest, 2),
                "kept": round(100 * kept / width, 2),
                "count": f"{width} → {kept}" if kept < width else f"{width}",
            }
        )
    return bars


def _page_tables(record: RunRecord) -> list[TextTable]:
    """All tables that have something to say."""
    tables = [goals_table(record)] if len(record.stops) > 1 else []
    tables += [rounds_table(record)] if record.rounds else []
    tables += [files_table(record), repairs_table(record), inexact_table(record), locked_table(record)]
    return [table for table in tables if table.rows]
