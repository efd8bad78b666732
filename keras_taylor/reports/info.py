"""What a run of `compress` did: the value that users print, save, plot and turn into a page."""

import dataclasses
import html
import os

from keras_taylor.exports.artifacts import artifact_table
from keras_taylor.reports import pages, plots
from keras_taylor.reports.run_record import RunRecord
from keras_taylor.reports.run_tables import goals_table, rounds_as_text
from keras_taylor.support.console import render_table


@dataclasses.dataclass(repr=False)
class Info(RunRecord):
    """What a run of `compress` did. `print(info)` shows it as a table.

    Costs are dicts: "params", "flops" (of one example's forward pass), "activation_memory" (bytes), and
    what the goal made `compress` measure ("bytes", "latency", ...) -> an int, `None` if it is unknown.
    Latencies are in nanoseconds.

    Attributes:
        goal: Cost -> what was asked: a float is the fraction to remove, an int is what may be left. If
            there were several goals, the last one.
        criterion: The name of the criterion, a string.
        before: The costs of the original model.
        after: The costs of the result.
        plan: The `Plan` from the original model to the result.
        rounds: A list of `Round`s: the completed ones, and a last one that was undone, if any.
        stops: A list with a dict for each goal that was reached: "goal" (as above), "round" (its number,
            an int), "costs" (what is left), "metrics" (name -> float, on the validation data) and "missed"
            (a text for each measured cost that is above the goal after all, a list of strings).
        locked: Group name -> a dict: "channels", the number of channels that cannot leave, an int, and
            "reason", a string.
        inexact: Group name -> a dict, for each group that is open with `exact=False` only: "channels",
            an int, and "changes", the names of the normalizations whose values change if the channels
            leave.
        unknown: Names of the operations that have no rule, a tuple. The channels that they read stay.
        stop_reason: Why the run ended, a string.
        name: The name of the model.
        layers: Layer name -> the number of channels that it made before the run, in the network's order.
        round_to: Every group keeps a multiple of this number of channels, an int.
        metrics: "before" and "after" -> a dict, name -> float: the loss and the metrics on the
            validation data. Empty without validation data.
        test_metrics: The same on test data, for the page and the file. It is empty until you fill it; the
            command line does.
        artifacts: "before" and "after" -> a list of `Artifact`s of the original and of the result, in
            the same order, measured together by `measure_artifacts`. It is empty until you fill it.
        command: The call, or the command line, that repeats the run.
        environment: Package name -> version, strings.

    Example:

    >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
    >>> print(info)
    >>> info.reduction["params"] >= 0.3
    True
    >>> page = info.to_html()
    """

    def frontier(self) -> tuple[list[str], list[list[str]]]:
        """What is left at each goal that was reached. The first row is the original model.

        Returns:
            The names of the columns, a list of strings, and the rows, lists of strings: parameters,
            FLOPs and the metrics on the validation data.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> columns, rows = info.frontier()
        >>> columns
        ['parameters', 'FLOPs'...]
        """
        table = goals_table(self)
        return table.header, table.rows

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws parameters and metrics against rounds into a picture file.

        If the run had several goals or a `max_drop`, a last panel shows the validation metric against
        the parameters.

        Args:
            path: The file name. Its ending chooses the format (`.png`, `.svg`, `.pdf`).

        Raises:
            ImportError: without matplotlib (`pip install "keras-taylor[plots]"`).

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> info.plot("rounds.png")
        """
        plots.plot_rounds(self, path)

    def to_html(self) -> str:
        """The report as one HTML page that needs no network.

        Returns:
            The page, a string.

        Raises:
            ImportError: without jinja2 and matplotlib (`pip install "keras-taylor[report]"`).

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> info.to_html().startswith("<!doctype html>")
        True
        """
        return pages.render_page(self)

    def __str__(self) -> str:
        caption = f"stopped: {self.stop_reason}" if self.stop_reason else None
        tables = [rounds_as_text(self, self.headline(), caption)]
        if len(self.stops) > 1:
            tables.append(goals_table(self).as_text(width=100))
        artifacts = [one for pair in self.exported() for one in pair]
        if artifacts:
            tables.append(render_table(artifact_table(artifacts), width=140))
        return "\n".join(tables)

    def __repr__(self) -> str:
        return f"<Info: {self.headline()}; {len(self.rounds)} rounds>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, and the picture if matplotlib is installed."""
        try:
            picture = plots.rounds_as_svg(self) if self.rounds else ""
        except ImportError:
            picture = ""
        return f'<pre style="line-height: normal">{html.escape(str(self))}</pre>{picture}'
