"""Pictures of a report."""

import importlib
import io
import re


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
    figure = figure_class(figsize=(7, 2.6 * (1 + len(panels))), layout="constrained")
    axes = figure.subplots(1 + len(panels), 1, sharex=True, squeeze=False)[:, 0]
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
    axes[-1].set(xlabel="round", xticks=numbers)
    with _matplotlib("matplotlib").rc_context({"svg.hashsalt": "keras_taylor"}):  # the same file each time
        figure.savefig(path, **{"dpi": 150, **how})


def rounds_as_svg(info):
    """The same picture as an SVG element, lines of text and axes in the colour of the page around it."""
    file = io.StringIO()
    nameless = {"Date": None, "Creator": None, "Format": None, "Type": None}
    plot_rounds(info, file, format="svg", transparent=True, metadata=nameless)
    svg = file.getvalue()
    return re.sub(r"#000000\b", "currentColor", svg[svg.index("<svg") :])


def _matplotlib(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib. Install the extra: pip install "keras-taylor[plots]"'
        ) from error
