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

from keras_taylor.artefacts import Artefact, artefact_table
from keras_taylor.plan import Plan
from keras_taylor.tables import render
from keras_taylor.version import VERSION


@dataclasses.dataclass
class Round:
    """One round: score, prune, fine-tune.

    Attributes:
        number: From 1 on.
        params, flops: What is left after it (`flops` is `None` with an input of unknown size).
        layers: For each layer that lost channels in this round: channels before and after.
        history: Loss and metrics of each epoch, as `History.history` of Keras.
        step_losses: Training loss of every fine-tuning step.
        seconds: Time of the phases "score", "prune", "repair" and "fit".
        repairs: What `repair` did to each layer that lost inputs: `LayerRepair`s as dicts.
    """

    number: int
    params: int
    flops: int | None
    layers: dict
    history: dict
    step_losses: list
    seconds: dict
    repairs: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(repr=False)
class Info:
    """What a run of `compress` did; `print(info)` is a table.

    Attributes:
        goal: What was asked, `{"params": 0.3}`.
        criterion: Name of the criterion.
        before, after: "params" and "flops" of the original and of the result.
        rounds: A `Round` for each completed round.
        locked: For each layer with channels that cannot leave: how many, and why.
        inexact: For each group that is open with `exact=False` only: its "channels", and the
            normalisations whose values their removal "changes".
        unknown: Operations without a rule, whose input channels stay.
        plan: The `Plan` from the original model to the result.
        stop_reason: Why the run ended.
        name: The model's name.
        layers: Channels of every layer that makes some, in the network's order, before the run.
        metrics: "before" and "after": loss and metrics on the validation data, where there is any.
        artefacts: "before" and "after": lists of the `Artefact`s of the original and of the result, in
            the same order, timed together (`measure_artefacts`); empty until you fill it.
        command: The call, for those who want to repeat it.
        environment: Versions of what the run depended on.
    """

    goal: dict
    criterion: str
    before: dict
    after: dict
    plan: Any
    rounds: list = dataclasses.field(default_factory=list)
    locked: dict = dataclasses.field(default_factory=dict)
    inexact: dict = dataclasses.field(default_factory=dict)
    unknown: tuple = ()
    stop_reason: str = ""
    name: str = ""
    layers: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    artefacts: dict = dataclasses.field(default_factory=dict)
    command: str = ""
    environment: dict = dataclasses.field(default_factory=lambda: versions())

    @property
    def reduction(self):
        """Fraction of "params" and "flops" that is gone."""
        return {
            what: 1 - self.after[what] / before for what, before in self.before.items() if before is not None
        }

    @property
    def pruned_layers(self):
        """Names of the layers that lost channels."""
        return list(self.plan.layers)

    def to_json(self):
        """Everything as a JSON string."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        content["rounds"] = [dataclasses.asdict(one) for one in self.rounds]
        content["artefacts"] = {
            when: [dataclasses.asdict(one) for one in made] for when, made in self.artefacts.items()
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
            content["artefacts"] = {
                when: [Artefact(**one) for one in made] for when, made in content["artefacts"].items()
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

        Args:
            path: File name; its ending tells the format (`.png`, `.svg`, `.pdf`).

        Raises:
            ImportError: without matplotlib (`pip install "keras-taylor[plots]"`).
        """
        from keras_taylor import plots

        plots.plot_rounds(self, path)

    def to_html(self):
        """The report as one HTML page, a string: no network needed, light and dark, wide and narrow.

        Raises:
            ImportError: without jinja2 and matplotlib (`pip install "keras-taylor[report]"`).
        """
        from keras_taylor import pages

        return pages.page(self)

    def __str__(self):
        metrics = list(dict.fromkeys(name for one in self.rounds for name in one.history))
        table = Table(
            title=self.headline(), caption=f"stopped: {self.stop_reason}" if self.stop_reason else None
        )
        for column in ("round", "parameters", "FLOPs", *metrics, "seconds"):
            table.add_column(column, justify="right")
        table.add_row("0", _number(self.before["params"]), _number(self.before["flops"]))
        for one in self.rounds:
            values = [f"{one.history[m][-1]:.4g}" if one.history.get(m) else "" for m in metrics]
            seconds = f"{sum(one.seconds.values()):.1f}"
            table.add_row(str(one.number), _number(one.params), _number(one.flops), *values, seconds)
        text = render(table, width=max(100, 16 * (4 + len(metrics))))
        made = [one for pair in self.exported() for one in pair]
        return "\n".join([text, render(artefact_table(made), width=140)]) if made else text

    def exported(self):
        """Pairs of the original's and the result's `Artefact`, a format each."""
        return list(zip(self.artefacts.get("before", ()), self.artefacts.get("after", ()), strict=True))

    def _repr_html_(self):
        """What a notebook shows: the table, and the picture where matplotlib is there."""
        from keras_taylor import plots

        try:
            picture = plots.rounds_as_svg(self) if self.rounds else ""
        except ImportError:
            picture = ""
        return f'<pre style="line-height: normal">{html.escape(str(self))}</pre>{picture}'

    def __repr__(self):
        return f"<Info: {self.headline()}; {len(self.rounds)} rounds>"

    def headline(self):
        """One line: what has gone, and where from."""
        gone = ", ".join(f"{share:.1%} of {what}" for what, share in self.reduction.items())
        return f"{gone} removed from {len(self.pruned_layers)} layers by '{self.criterion}'"


def versions():
    """Versions of what a run depends on, a dict of strings."""
    backend = keras.backend.backend()
    return {
        "keras_taylor": VERSION,
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _number(value):
    return "unknown" if value is None else f"{value:,}"
