"""Pictures of a report."""

import importlib
import io
import re

import numpy as np

_MOST_LINES = 8  # groups; more are drawn as a heat map
_LEAST = 1e-12  # where a logarithmic scale ends


def plot_rounds(info, path, **how):
    """Parameters and metrics against rounds, in a picture file.

    Args:
        info: An `Info`.
        path: File name; its ending tells the format. Or an open file.
        **how: What `Figure.savefig` takes besides.
    """
    figure_class = _matplotlib("matplotlib.figure").Figure
    metrics = [n for n in dict.fromkeys(n for r in info.rounds for n in r.history) if n != "learning_rate"]
    losses = [name for name in metrics if name.endswith("loss")]
    others = [name for name in metrics if not name.endswith("loss")]
    panels = [names for names in (others, losses) if names]
    curve = _curve(info)
    num = 1 + len(panels)
    figure = figure_class(figsize=(7, 2.6 * (num + bool(curve))), layout="constrained")
    axes = [figure.add_subplot(num + bool(curve), 1, 1)]
    axes += [figure.add_subplot(num + bool(curve), 1, 2 + k, sharex=axes[0]) for k in range(len(panels))]
    numbers = [0] + [one.number for one in info.rounds]
    axes[0].step(numbers, [info.before["params"]] + [r.params for r in info.rounds], where="post", marker="o")
    axes[0].set(ylabel="parameters", ylim=(0, None))
    for panel, names in zip(axes[1:], panels, strict=True):
        for name in names:
            rounds = [one for one in info.rounds if one.history.get(name)]
            panel.plot(
                [r.number for r in rounds], [r.history[name][-1] for r in rounds], marker="o", label=name
            )
        panel.legend(framealpha=0)
    for panel in axes[:-1]:
        panel.tick_params(labelbottom=False)
    axes[-1].set(xlabel="round", xticks=numbers)
    if curve:
        _draw_curve(figure.add_subplot(num + 1, 1, num + 1), info, *curve)
    _save(figure, path, **how)


def plot_sensitivity(sensitivity, path=None, what=None):
    """What the removal of a share of one group costs: a line a group, or a heat map of many groups.

    Args:
        sensitivity: A `loss_curves.Sensitivity`.
        path: File name; its ending tells the format. `None`: no file.
        what: The name of a metric in place of the loss.

    Returns:
        The `matplotlib.figure.Figure`.
    """
    what = sensitivity.checked(what)
    is_loss = what == sensitivity.measure
    many = len(sensitivity.curves) > _MOST_LINES
    height = 1.6 + 0.24 * len(sensitivity.curves) if many else 4.5
    figure = _matplotlib("matplotlib.figure").Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    (_heat_map if many else _lines)(axes, sensitivity, what, is_loss)
    axes.set_xlabel("share of the group's channels that is gone, the least important first")
    axes.set_title(
        f"{what} of the whole model: {sensitivity.whole[what]:.4g}"
        + many * f"; red: up to there a {sensitivity.measure} at most {sensitivity.max_increase:.2g} larger",
        fontsize="medium",
    )
    if path is not None:
        _save(figure, path)
    return figure


def _lines(axes, sensitivity, what, is_loss):
    for name, curve in sensitivity.curves.items():
        gone, first = np.unique(np.append(0, curve.num_gone), return_index=True)
        values = np.append(sensitivity.whole[what], curve.values[what])[first]
        if is_loss:
            values = values - sensitivity.whole[what]
        axes.plot(gone / len(curve.order), values, marker="o", markersize=4, label=name)
    if is_loss:
        most = max(sensitivity.max_increase, _LEAST)
        lowest = min([np.nanmin(line.get_ydata()) for line in axes.lines], default=0)
        axes.axhline(most, color="grey", linestyle=":", linewidth=1, label=f"{most:.2g} larger")
        axes.set_yscale("symlog", linthresh=most)
        axes.set_ylim(bottom=1.2 * lowest - 0.1 * most)
    axes.set(ylabel=f"{what}, increase" if is_loss else what, xlim=(0, 1))
    axes.xaxis.set_major_formatter(_matplotlib("matplotlib.ticker").PercentFormatter(1, symbol=" %"))
    axes.legend(framealpha=0, fontsize="small")


def _heat_map(axes, sensitivity, what, is_loss):
    names = list(sensitivity.curves)
    values = np.stack([curve.values[what] for curve in sensitivity.curves.values()])
    norm = None
    if is_loss:
        values = values - sensitivity.whole[what]
        linear = max(sensitivity.max_increase, _LEAST)
        top = max(np.nanmax(np.where(np.isfinite(values), values, np.nan), initial=0), 2 * linear)
        norm = _matplotlib("matplotlib.colors").SymLogNorm(linear, vmin=0, vmax=top)
    cells = axes.imshow(values, norm=norm, cmap="viridis_r" if is_loss else "viridis", aspect="auto")
    label = f"{what}, increase" if is_loss else what
    height = axes.figure.get_size_inches()[1]
    axes.figure.colorbar(
        *(cells, None, axes), label=label, extend="min" if is_loss else "neither", shrink=min(1, 4 / height)
    )
    fractions = [f"{100 * one:.3g} %" for one in sensitivity.fractions]
    axes.set_xticks(range(len(fractions)), fractions)
    axes.tick_params(top=True, labeltop=True)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    for row, (name, num) in enumerate(sensitivity.num_dispensable().items()):
        # a bar after the last cell that costs no more than `max_increase`
        column = np.searchsorted(sensitivity.curves[name].num_gone, num, side="right") - 0.5
        axes.plot([column, column], [row - 0.5, row + 0.5], color="red", linewidth=2, clip_on=False)


def _curve(info):
    """The metric on the validation data: its name, points `(params, value, held)`; or `None`."""
    before = info.metrics.get("before", {})
    judged = [one for one in info.rounds if one.metrics]
    name = next((name for name in before if not name.endswith("loss")), next(iter(before), None))
    if name is None or len(judged) < 2:
        return None
    points = [(one.params, one.metrics[name], one.held) for one in judged]
    return name, [(info.before["params"], before[name], True), *points]


def _draw_curve(panel, info, name, points):
    """A metric against what is left; goals that were reached are filled, what was undone is a cross."""
    reached = {stop["costs"]["params"] for stop in info.stops}
    held = [point for point in points if point[2]]
    (line,) = panel.plot(*zip(*[point[:2] for point in held], strict=True))
    for params, value, holds in points:
        marker = (
            {"marker": "o", "fillstyle": "full" if params in reached else "none"}
            if holds
            else {"marker": "x"}
        )
        panel.plot([params], [value], color=line.get_color(), **marker)
    panel.set(xlabel="parameters", ylabel=f"validation {name}")


def rounds_as_svg(info):
    """The same picture as an SVG element, lines of text and axes in the color of the page around it."""
    file = io.StringIO()
    nameless = {"Date": None, "Creator": None, "Format": None, "Type": None}
    plot_rounds(info, file, format="svg", transparent=True, metadata=nameless)
    svg = file.getvalue()
    return re.sub(r"#000000\b", "currentColor", svg[svg.index("<svg") :])


def check_picture(path):
    """Refuses the name of a picture that could not be written, before any work.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an ending that is none of a picture.
    """
    known = _matplotlib("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    ending = str(path).rpartition(".")[2].lower()
    if ending not in known:
        raise ValueError(
            f"A picture's name ends in one of {', '.join(f'.{one}' for one in known)}. "
            f"Received: path={str(path)!r}"
        )


def _save(figure, path, **how):
    with _matplotlib("matplotlib").rc_context({"svg.hashsalt": "keras_taylor"}):  # the same file each time
        figure.savefig(path, **{"dpi": 150, **how})


def _matplotlib(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib. Install the extra: pip install "keras-taylor[plots]"'
        ) from error
