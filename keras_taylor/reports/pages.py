"""A report as one HTML page."""

import importlib
import importlib.resources

from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.exports.artifacts import artifact_row, format_kib, variant_label
from keras_taylor.reports import plots


def page(info):
    """The report of a run as one self-contained HTML page: no network, light and dark, wide and narrow.

    Args:
        info: An `Info`.

    Returns:
        The page, a string.

    Raises:
        ImportError: without jinja2 and matplotlib (`pip install "keras-taylor[report]"`).
    """
    template = importlib.resources.files("keras_taylor.reports") / "templates/report.html"
    return (
        _environment()
        .from_string(template.read_text("utf-8"))
        .render(
            title=f"{info.name or 'A model'}, {_goal(info)} removed",
            summary=f"{info.headline()}. Ended: {info.stop_reason or 'unknown'}.",
            cards=_cards(info),
            layers=_layers(info),
            curves=plots.rounds_as_svg(info) if info.rounds else "",
            tables=[
                _frontier(info),
                _rounds(info),
                _artifacts(info),
                _repairs(info),
                _inexact(info),
                _locked(info),
            ],
            command=info.command,
            environment=", ".join(f"{key} {value}" for key, value in info.environment.items()),
        )
    )


def _environment():
    try:
        return importlib.import_module("jinja2").Environment(autoescape=True)
    except ImportError as error:
        raise ImportError(
            'An HTML report needs jinja2. Install the extra: pip install "keras-taylor[report]"'
        ) from error


def _goal(info):
    gone = info.reduction
    return ", ".join(f"{100 * gone[what]:.3g} % of {what}" for what in info.goal if what in gone)


def _cards(info):
    """What a user looks at first: before and after of all that was measured."""
    cards = []
    for what, name in (("params", "parameters"), ("flops", "FLOPs")):
        if info.before[what]:
            change = info.after[what] / info.before[what] - 1
            cards.append(_card(name, f"{info.after[what]:,}", f"{info.before[what]:,}", f"{change:+.1%}"))
    for what in info.measured():
        if what in info.after:
            change = info.after[what] / info.before[what] - 1
            amounts = [format_amount(what, costs[what], named=False) for costs in (info.after, info.before)]
            cards.append(_card(what, *amounts, f"{change:+.1%}"))
    for name, after in info.metrics.get("after", {}).items():
        before = info.metrics["before"][name]
        cards.append(_card(name, f"{after:.4g}", f"{before:.4g}", f"{after - before:+.4g}"))
    for before, after in info.exported():
        for what, old, new, text in (
            ("size", before.num_bytes, after.num_bytes, format_kib),
            ("latency", before.latency_ms, after.latency_ms, _milliseconds),
        ):
            cards.append(
                _card(f"{variant_label(after)}, {what}", text(new), text(old), f"{new / old - 1:+.1%}")
            )
    return cards


def _card(name, after, before, change):
    return {"name": name, "after": after, "note": f"before {before} ({change})"}


def _milliseconds(value):
    return f"{value:.3f} ms"


def _layers(info):
    largest = max(info.layers.values(), default=1)
    rows = []
    for name, width in info.layers.items():
        kept = len(info.plan.layers[name].kept) if name in info.plan.layers else width
        count = f"{width} → {kept}" if kept < width else f"{width}"
        rows.append(
            {
                "name": name,
                "width": round(100 * width / largest, 2),
                "kept": round(100 * kept / width, 2),
                "count": count,
            }
        )
    return rows


def _rounds(info):
    metrics = list(dict.fromkeys(name for one in info.rounds for name in one.history))
    rows = [
        [
            one.label,
            f"{one.params:,}",
            "unknown" if one.flops is None else f"{one.flops:,}",
            *(f"{one.history[m][-1]:.4g}" if one.history.get(m) else "" for m in metrics),
            f"{sum(one.seconds.values()):.1f}",
        ]
        for one in info.rounds
    ]
    return {"title": "Rounds", "header": ["round", "parameters", "FLOPs", *metrics, "seconds"], "rows": rows}


def _frontier(info):
    """What was left at each goal, if there were several."""
    header, rows = info.frontier()
    return {
        "title": "What is left at each goal",
        "header": header,
        "rows": rows if len(info.stops) > 1 else [],
    }


def _artifacts(info):
    rows = [artifact_row(one) for pair in info.exported() for one in pair]
    header = list(rows[0]) if rows else []
    return {"title": "Files", "header": header, "rows": [list(cells.values()) for cells in rows]}


def _repairs(info):
    done = info.rounds[-1].repairs if info.rounds else []
    rows = [
        [
            one["name"],
            *("" if one[e] is None else f"{one[e]:.2g}" for e in ("error_before", "error_after")),
            one["reason"] or "",
        ]
        for one in done
    ]
    header = ["layer", "relative squared error, cut", "repaired", "left alone because"]
    return {"title": "Repair in the last round", "header": header, "rows": rows, "wraps": True}


def _inexact(info):
    rows = [[name, e["channels"], ", ".join(e["changes"])] for name, e in info.inexact.items()]
    header = ["group", "channels", "their removal changes the values of"]
    return {"title": "Open with exact=False only", "header": header, "rows": rows, "wraps": True}


def _locked(info):
    rows = [[name, entry["channels"], entry["reason"]] for name, entry in info.locked.items()]
    header = ["layer", "channels", "why they stay"]
    return {"title": "What stays, and why", "header": header, "rows": rows, "wraps": True}
