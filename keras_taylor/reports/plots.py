"""Pictures of runs and of sensitivity scans, drawn with matplotlib."""

from __future__ import annotations  # matplotlib is optional

import importlib
import io
import os
import re
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_taylor.reports.loss_curves import Sensitivity
from keras_taylor.reports.run_record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_LINES = 8  # more groups than this are drawn as a heat map
_SMALLEST_INCREASE = 1e-12  # where a logarithmic scale ends


class MetricPoint(NamedTuple):
    """A validation metric after a round: parameters that are left, the metric, whether the round held."""

    params: int
    value: float
    held: bool


class MetricCurve(NamedTuple):
    """A validation metric against the parameters that are left, the original model first."""

    metric: str
    points: list[MetricPoint]


def plot_rounds(record: RunRecord, path: str | os.PathLike[str] | IO[Any], **save_options: Any) -> None:
    """Draws parameters and metrics against rounds.

    Args:
        record: The run.
        path: File name; its ending chooses the format. Or an open file.
        **save_options: More arguments of `Figure.savefig`.
    """
    metrics = list(dict.fromkeys(name for one in record.rounds for name in one.history))
    losses = [name for name in metrics if name.endswith("loss")]
    others = [name for name in metrics if not name.endswith("loss") and name != "learning_rate"]
    panels = [names for names in (others, losses) if names]
    curve = _metric_curve(record)
    num_panels = 1 + len(panels) + (curve is not None)
    figure = _new_figure(7, 2.6 * num_panels)
    first = figure.add_subplot(num_panels, 1, 1)
    axes = [first] + [figure.add_subplot(num_panels, 1, 2 + k, sharex=first) for k in range(len(panels))]
    numbers = [0] + [one.number for one in record.rounds]
    params = [record.before["params"] or 0] + [one.params for one in record.rounds]
    first.step(numbers, params, where="post", marker="o")
    first.set(ylabel="parameters", ylim=(0, None))
    for panel, names in zip(axes[1:], panels, strict=True):
        for name in names:
            rounds = [one for one in record.rounds if name in one.kept_history]
            values = [one.kept_history[name] for one in rounds]
            panel.plot([one.number for one in rounds], values, marker="o", label=_plain(name))
        panel.legend(framealpha=0)
    for panel in axes[:-1]:
        panel.tick_params(labelbottom=False)
    axes[-1].set(xlabel="round", xticks=numbers)
    if curve is not None:
        _draw_metric_curve(figure.add_subplot(num_panels, 1, num_panels), record, curve)
    _save_figure(figure, path, **save_options)


def _metric_curve(record: RunRecord) -> MetricCurve | None:
    """The first validation metric, or else the loss; `None` with fewer than two points."""
    before, params = record.metrics.get("before", {}), record.before["params"]
    validated = [one for one in record.rounds if one.metrics]
    metric = next((name for name in before if not name.endswith("loss")), next(iter(before), None))
    if metric is None or params is None or len(validated) < 2:
        return None
    points = [MetricPoint(one.params, one.metrics[metric], one.held) for one in validated]
    return MetricCurve(metric, [MetricPoint(params, before[metric], True), *points])


def _draw_metric_curve(panel: Axes, record: RunRecord, curve: MetricCurve) -> None:
    """Draws a line of circles, filled where a goal was reached. A cross is a round that was undone."""
    reached = {stop["costs"]["params"] for stop in record.stops}
    held = [point for point in curve.points if point.held]
    (line,) = panel.plot([point.params for point in held], [point.value for point in held])
    for point in curve.points:
        style: dict[str, Any] = {"marker": "x"}
        if point.held:
            style = {"marker": "o", "fillstyle": "full" if point.params in reached else "none"}
        panel.plot([point.params], [point.value], color=line.get_color(), **style)
    panel.set(xlabel="parameters", ylabel=f"validation {_plain(curve.metric)}")


def rounds_as_svg(record: RunRecord) -> str:
    """The same picture as an SVG element. Its text and axes have the color of the page around it."""
    file = io.StringIO()
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    plot_rounds(record, file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    return re.sub(r"#000000\b", "currentColor", svg[svg.index("<svg") :])


def plot_sensitivity(
    sensitivity: Sensitivity, path: str | os.PathLike[str] | None = None, metric: str | None = None
) -> Figure:
    """What the removal of a share of one group costs: a line for each group, or a heat map of many.

    Args:
        sensitivity: The losses.
        path: File name; its ending chooses the format. `None`: no file.
        metric: The name of a metric; `None`: the loss.
    """
    metric = sensitivity.resolve_metric(metric)
    is_map = len(sensitivity.curves) > _MAX_LINES
    figure = _new_figure(8, 1.6 + 0.24 * len(sensitivity.curves) if is_map else 4.5)
    axes = figure.subplots()
    title = f"{_plain(metric)} of the whole model: {sensitivity.baseline[metric]:.4g}"
    if is_map:
        _draw_heat_map(figure, axes, sensitivity, metric)
        title += f"; left of the red bar the {sensitivity.measure} grows by at most "
        title += f"{sensitivity.max_increase:.2g}"
    else:
        _draw_lines(axes, sensitivity, metric)
    axes.set_xlabel("share of the group's channels that is removed, least important first")
    axes.set_title(title, fontsize="medium")
    if path is not None:
        _save_figure(figure, path)
    return figure


def _draw_lines(axes: Axes, sensitivity: Sensitivity, metric: str) -> None:
    """Draws a line for each group: the metric, or the increase of the loss."""
    is_loss = metric == sensitivity.measure
    for name, curve in sensitivity.curves.items():
        num_gone, first = np.unique(np.append(0, curve.num_gone), return_index=True)
        values = np.append(sensitivity.baseline[metric], curve.values[metric])[first]
        if is_loss:
            values = values - sensitivity.baseline[metric]
        axes.plot(num_gone / len(curve.order), values, marker="o", markersize=4, label=_plain(name))
    if is_loss:
        limit = max(sensitivity.max_increase, _SMALLEST_INCREASE)
        lowest = min([np.nanmin(np.asarray(line.get_ydata())) for line in axes.lines], default=0)
        axes.axhline(limit, color="grey", linestyle=":", linewidth=1, label=f"an increase of {limit:.2g}")
        axes.set_yscale("symlog", linthresh=limit)
        axes.set_ylim(bottom=1.2 * lowest - 0.1 * limit)
    axes.set(ylabel=f"{_plain(metric)}, increase" if is_loss else _plain(metric), xlim=(0, 1))
    axes.xaxis.set_major_formatter(_import_matplotlib("matplotlib.ticker").PercentFormatter(1, symbol=" %"))
    axes.legend(framealpha=0, fontsize="small")


def _draw_heat_map(figure: Figure, axes: Axes, sensitivity: Sensitivity, metric: str) -> None:
    """Draws a row for each group, a cell for each fraction, and a bar after the dispensable units."""
    is_loss = metric == sensitivity.measure
    names = list(sensitivity.curves)
    values = np.stack([curve.values[metric] for curve in sensitivity.curves.values()])
    norm = None
    if is_loss:
        values = values - sensitivity.baseline[metric]
        limit = max(sensitivity.max_increase, _SMALLEST_INCREASE)
        top = max(np.nanmax(np.where(np.isfinite(values), values, np.nan), initial=0), 2 * limit)
        norm = _import_matplotlib("matplotlib.colors").SymLogNorm(limit, vmin=0, vmax=top)
    cells = axes.imshow(values, norm=norm, cmap="viridis_r" if is_loss else "viridis", aspect="auto")
    figure.colorbar(
        cells,
        None,
        axes,
        label=f"{_plain(metric)}, increase" if is_loss else _plain(metric),
        extend="min" if is_loss else "neither",
        shrink=min(1, 4 / figure.get_size_inches()[1]),
    )
    fractions = [f"{100 * fraction:.3g} %" for fraction in sensitivity.fractions]
    axes.set_xticks(range(len(fractions)), fractions)
    axes.tick_params(top=True, labeltop=True)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize="small")
    for row, (name, num) in enumerate(sensitivity.num_dispensable().items()):
        # a bar after the last cell that costs no more than `max_increase`
        column = np.searchsorted(sensitivity.curves[name].num_gone, num, side="right") - 0.5
        axes.plot([column, column], [row - 0.5, row + 0.5], color="red", linewidth=2, clip_on=False)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuses the name of a picture that matplotlib cannot write, before any work.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the ending is not that of a picture.
    """
    backend = _import_matplotlib("matplotlib.backend_bases")
    known = backend.FigureCanvasBase.get_supported_filetypes()
    ending = str(path).rpartition(".")[2].lower()
    if ending not in known:
        raise ValueError(
            f"The name of a picture ends in one of {', '.join(f'.{one}' for one in known)}. "
            f"Received: path={str(path)!r}"
        )


def _plain(name: str) -> str:
    """A name as matplotlib shows it as it is: no formulas between dollars, not left out for an underscore."""
    return name.replace("$", r"\$").replace("_", " _", 1 if name.startswith("_") else 0)


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    figure_class = _import_matplotlib("matplotlib.figure").Figure
    return figure_class(figsize=(width, height), layout="constrained")


def _save_figure(figure: Figure, path: str | os.PathLike[str] | IO[Any], **save_options: Any) -> None:
    """Writes a figure; the same figure always gives the same file."""
    with _import_matplotlib("matplotlib").rc_context({"svg.hashsalt": "keras_taylor"}):
        figure.savefig(path, **{"dpi": 150, **save_options})


def _import_matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib. Install the extra: pip install "keras-taylor[plots]"'
        ) from error
