"""What was removed, what was left and why, what it cost."""

import dataclasses
import html
import importlib
import json
import platform
from typing import Any

import keras
import numpy as np
from rich.table import Table

from keras_taylor import __version__
from keras_taylor.budget.measured_costs import format_amount, measured_cost_of
from keras_taylor.exports.artifacts import Artifact, artifact_table
from keras_taylor.plans.plan import Plan
from keras_taylor.support.console import render_table


@dataclasses.dataclass
class Round:
    """One round: score, prune, fine-tune.

    Attributes:
        number: From 1 on.
        costs: What is left after it: "params", "flops", ... (`None` for those that are unknown).
        layers: For each layer that lost channels in this round: channels before and after.
        history: Loss and metrics of each epoch, as `History.history` of Keras.
        step_losses: Training loss of every fine-tuning step.
        seconds: Time of the phases "score", "prune", "repair" and "fit".
        repairs: What `repair` did to each layer that lost inputs: `LayerRepair`s as dicts.
        metrics: Loss and metrics on the validation data after it, where they were needed: with
            `max_drop`, and where a goal was reached.
        held: `False`: its metric fell by more than `max_drop`, and it was undone.
    """

    number: int
    costs: dict
    layers: dict
    history: dict
    step_losses: list
    seconds: dict
    repairs: list = dataclasses.field(default_factory=list)
    metrics: dict = dataclasses.field(default_factory=dict)
    held: bool = True

    @property
    def label(self):
        """The round's number, and whether it was undone."""
        return str(self.number) if self.held else f"{self.number}, undone"

    @property
    def params(self):
        """Parameters that are left."""
        return self.costs["params"]

    @property
    def flops(self):
        """FLOPs that are left, `None` with an input of unknown size."""
        return self.costs["flops"]


@dataclasses.dataclass(repr=False)
class Info:
    """What a run of `compress` did; `print(info)` is a table.

    Attributes:
        goal: What was asked, `{"params": 0.3}`; of several goals the last.
        criterion: Name of the criterion.
        before, after: "params" and "flops" of the original and of the result.
        rounds: A `Round` for each completed round, and for one that was undone.
        stops: For each goal that was reached: the "goal", the number of the "round", the "costs" that are
            left, and the "metrics" on the validation data.
        locked: For each layer with channels that cannot leave: how many, and why.
        inexact: For each group that is open with `exact=False` only: its "channels", and the
            normalizations whose values their removal "changes".
        unknown: Operations without a rule, whose input channels stay.
        plan: The `Plan` from the original model to the result.
        stop_reason: Why the run ended.
        name: The model's name.
        layers: Channels of every layer that makes some, in the network's order, before the run.
        round_to: Every group of channels keeps a multiple of so many.
        metrics: "before" and "after": loss and metrics on the validation data, where there is any.
        artifacts: "before" and "after": lists of the `Artifact`s of the original and of the result, in
            the same order, timed together (`measure_artifacts`); empty until you fill it.
        command: The call, for those who want to repeat it.
        environment: Versions of what the run depended on.
    """

    goal: dict
    criterion: str
    before: dict
    after: dict
    plan: Any
    rounds: list = dataclasses.field(default_factory=list)
    stops: list = dataclasses.field(default_factory=list)
    locked: dict = dataclasses.field(default_factory=dict)
    inexact: dict = dataclasses.field(default_factory=dict)
    unknown: tuple = ()
    stop_reason: str = ""
    name: str = ""
    layers: dict = dataclasses.field(default_factory=dict)
    round_to: int = 1
    metrics: dict = dataclasses.field(default_factory=dict)
    artifacts: dict = dataclasses.field(default_factory=dict)
    command: str = ""
    environment: dict = dataclasses.field(default_factory=lambda: versions())

    @classmethod
    def before_a_run(cls, labeled, costs, exact, goal, criterion, round_to):
        """The `Info` of a run that has not begun.

        Args:
            channels: `groups.LabeledModel` of the original.
            costs: What it costs, by "params", "flops", ...
            exact: As in `compress`.
            goal: The parts of the last goal.
            criterion: A name or a function.
            round_to: As in `compress`, a number.
        """
        return cls(
            goal=dict(goal),
            criterion=getattr(criterion, "__name__", str(criterion)),
            before=costs,
            after=costs,
            plan=Plan(before=costs, after=costs, exact=exact),
            locked={g.name: {"channels": g.num_units, "reason": g.reason} for g in labeled.locked_groups},
            inexact={
                g.name: {"channels": g.num_units, "changes": list(g.normalized_by)}
                for g in labeled.groups
                if g.normalized_by
            },
            unknown=tuple(labeled.unknown),
            name=labeled.graph.model.name,
            layers={name: stop - start for start, stop, name in labeled.label_space.producers},
            round_to=round_to,
        )

    @property
    def reduction(self):
        """Fraction of "params" and "flops" that is gone."""
        return {
            what: 1 - self.after[what] / before
            for what, before in self.before.items()
            if before is not None and what in self.after
        }

    @property
    def pruned_layers(self):
        """Names of the layers that lost channels."""
        return list(self.plan.layers)

    def to_json(self):
        """Everything as a JSON string."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        content["rounds"] = [dataclasses.asdict(one) for one in self.rounds]
        content["artifacts"] = {
            when: [dataclasses.asdict(one) for one in made] for when, made in self.artifacts.items()
        }
        content.update(
            reduction=self.reduction, pruned_layers=self.pruned_layers, plan=json.loads(self.plan.to_json())
        )
        return json.dumps(content)

    @classmethod
    def from_json(cls, text):
        """The `Info` that `to_json` wrote.

        Raises:
            ValueError: if the text is not such an `Info`.
        """
        try:
            content = json.loads(text)
            content = {f.name: content[f.name] for f in dataclasses.fields(cls) if f.name in content}
            content["rounds"] = [Round(**one) for one in content["rounds"]]
            content["artifacts"] = {
                when: [Artifact(**one) for one in made] for when, made in content["artifacts"].items()
            }
            content["unknown"] = tuple(content["unknown"])
            content["plan"] = Plan.from_json(json.dumps(content["plan"]))
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"This is no `Info` that `Info.to_json` wrote ({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error

    def plot(self, path):
        """Draws parameters and the metrics against rounds into a picture file.

        Where a run had several goals or `max_drop`, the metric on the validation data against parameters
        is drawn, too.

        Args:
            path: File name; its ending tells the format (`.png`, `.svg`, `.pdf`).

        Raises:
            ImportError: without matplotlib (`pip install "keras-taylor[plots]"`).
        """
        from keras_taylor.reports import plots

        plots.plot_rounds(self, path)

    def to_html(self):
        """The report as one HTML page, a string: no network needed, light and dark, wide and narrow.

        Raises:
            ImportError: without jinja2 and matplotlib (`pip install "keras-taylor[report]"`).
        """
        from keras_taylor.reports import pages

        return pages.page(self)

    def __str__(self):
        metrics = list(dict.fromkeys(name for one in self.rounds for name in one.history))
        table = Table(
            title=self.headline(), caption=f"stopped: {self.stop_reason}" if self.stop_reason else None
        )
        measured = self.measured()
        for column in ("round", "parameters", "FLOPs", *measured, *metrics, "seconds"):
            table.add_column(column, justify="right")
        whole = [format_amount(what, self.before[what], False) for what in measured]
        table.add_row("0", _number(self.before["params"]), _number(self.before["flops"]), *whole)
        for one in self.rounds:
            values = [f"{one.history[m][-1]:.4g}" if one.history.get(m) else "" for m in metrics]
            seconds = f"{sum(one.seconds.values()):.1f}"
            found = [format_amount(w, one.costs[w], False) if w in one.costs else "" for w in measured]
            table.add_row(one.label, _number(one.params), _number(one.flops), *found, *values, seconds)
        text = render_table(table, width=max(100, 16 * (4 + len(metrics) + len(measured))))
        made = [one for pair in self.exported() for one in pair]
        tables = [text]
        if len(self.stops) > 1:
            tables.append(render_table(self._frontier_table(), width=100))
        if made:
            tables.append(render_table(artifact_table(made), width=140))
        return "\n".join(tables)

    def measured(self):
        """What was measured for the goal, "bytes:onnx" or "latency": a list of names."""
        return [what for what in self.before if measured_cost_of(what) is not None]

    def frontier(self):
        """What is left at each goal that was reached, the whole model first.

        Returns:
            Names of columns, and rows of text.
        """
        points = [(self.before, self.metrics.get("before", {}))]
        points += [(stop["costs"], stop["metrics"]) for stop in self.stops]
        metrics = list(dict.fromkeys(name for _, values in points for name in values))
        rows = [
            [
                *(_left(costs, self.before, what) for what in ("params", "flops")),
                *(f"{values[name]:.4g}" if name in values else "" for name in metrics),
            ]
            for costs, values in points
        ]
        return ["parameters", "FLOPs", *metrics], rows

    def _frontier_table(self):
        header, rows = self.frontier()
        table = Table(title="what is left at each goal; metrics on the validation data")
        for column in header:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        return table

    def exported(self):
        """Pairs of the original's and the result's `Artifact`, a format each."""
        return list(zip(self.artifacts.get("before", ()), self.artifacts.get("after", ()), strict=True))

    def _repr_html_(self):
        """What a notebook shows: the table, and the picture where matplotlib is there."""
        from keras_taylor.reports import plots

        try:
            picture = plots.rounds_as_svg(self) if self.rounds else ""
        except ImportError:
            picture = ""
        return f'<pre style="line-height: normal">{html.escape(str(self))}</pre>{picture}'

    def __repr__(self):
        return f"<Info: {self.headline()}; {len(self.rounds)} rounds>"

    def headline(self):
        """One line: what has gone, and where from."""
        told = {"params", "flops", *self.goal}
        parts = [f"{share:.1%} of {what}" for what, share in self.reduction.items() if what in told]
        return f"{', '.join(parts)} removed from {len(self.pruned_layers)} layers by '{self.criterion}'"


def versions():
    """Versions of what a run depends on, a dict of strings."""
    backend = keras.backend.backend()
    return {
        "keras_taylor": __version__,
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _left(costs, before, what):
    """What is left of a cost, and the share of it: "12,345 (70.0%)"."""
    if costs[what] is None:
        return "unknown"
    return f"{costs[what]:,} ({costs[what] / before[what]:.1%})"


def _number(value):
    return "unknown" if value is None else f"{value:,}"
