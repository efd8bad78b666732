"""What a run of `compress` did, as a value that goes to JSON and comes back."""

import dataclasses
import importlib
import json
import platform
from typing import NotRequired, Self, TypedDict

import keras
import numpy as np

from keras_taylor import __version__
from keras_taylor.budget.measured_costs import measured_cost_of
from keras_taylor.cutting.layer_fits import LayerRepair
from keras_taylor.exports.artifacts import Artifact, artifact_from_dict
from keras_taylor.plans.plan import Plan
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.scores.criteria import Criterion
from keras_taylor.support.files import to_json_text, with_nan_by_name
from keras_taylor.support.types import Costs


class RepairRecord(TypedDict):
    """What a repair did to one layer: the fields of `cutting.layer_fits.LayerRepair`."""

    name: str
    error_before: float | None
    error_after: float | None
    ridge: float | None
    reason: str | None


class GoalRecord(TypedDict):
    """What was left when a goal was reached, and by how much measurements then missed it, in words."""

    goal: dict[str, float | int]
    round: int
    costs: dict[str, int | None]
    metrics: dict[str, float]
    missed: list[str]


class LockedRecord(TypedDict):
    """A group of channels that cannot leave: how many channels, and why they stay."""

    channels: int
    reason: str | None


class InexactRecord(TypedDict):
    """A group that is open with `exact=False` only: how many channels, and what changes without them."""

    channels: int
    changes: list[str]


# What `stop_reason` says of a run that was successful.
GOAL_REACHED, NOTHING_TO_DO = "goal reached", "the model keeps to the goal as it is"
ON_VALIDATION_DATA = "the validation data"  # what `examples` of a `JudgedRecord` may say


class JudgedRecord(TypedDict):
    """Which state of a round's model was kept: as repaired (epoch 0), or after an epoch of training.

    `metrics` has an entry for each state that was judged, the one before training first. `cut` has the
    metrics before repair; it is empty without repair.
    """

    epoch: int
    measure: str
    examples: str
    metrics: list[dict[str, float]]
    cut: NotRequired[dict[str, float]]
    reason: str


class RateRecord(TypedDict):
    """The highest learning rate of a round, and the trials that found it: rates, each with what it led to."""

    peak: float
    steps: int
    measure: str
    trials: list[list[float]]


@dataclasses.dataclass
class Round:
    """One round of `compress`: score, prune, repair, fine-tune.

    Attributes:
        number: The number of the round, an int from 1.
        costs: What is left after the round: "params", "flops" (of one example), "activation_memory"
            (bytes), ... -> an int, or `None` if it is unknown. Measured costs ("bytes", "latency", ...)
            are included where a goal was reached; latencies are in nanoseconds.
        layers: Layer name -> `[before, after]`, the numbers of channels of each layer that lost some.
        history: Name -> list of floats, one for each epoch: the loss and the metrics of the fine-tuning,
            as in `keras.callbacks.History.history`; the mean of a metric with several values. Empty without
            fine-tuning.
        step_losses: The training loss of every step of the fine-tuning, a list of floats.
        seconds: "score", "prune", "repair" and "fit" -> the wall time of the phase, a float in seconds.
        repairs: What the repair did to each layer that lost inputs, a list of dicts: "name",
            "error_before" and "error_after" (floats: mean squared error of the outputs on held-out
            examples, divided by their mean square), "ridge" (float) and "reason" (why the layer was left
            alone). Values are `None` where they do not apply. Empty without repair.
        metrics: Name -> float: the loss and the metrics on the validation data after the round. Empty
            unless `max_drop` is set or the round reached a goal.
        judged: Which state of the model the round kept, a dict: "epoch" (an int; 0 is the model before
            training), "metrics" (a list of dicts, name -> float: of the model before training, then after
            each epoch), "cut" (a dict: the same before repair, empty without repair), "measure" (the name of
            the metric that was compared), "examples" (on which ones, a string) and "reason" (why it is epoch
            0, a string). `None` if states were not compared.
        learning_rate: The learning rate of the fine-tuning, a dict: "peak" (a float, from which it falls to
            zero, unless a callback of yours sets it), and of the trials that chose it "steps" (an int),
            "measure" (a string) and "trials" (a list of `[rate, value]`; empty without them). `None` without
            fine-tuning, and if the optimizer follows a schedule.
        held: A bool. `False` if a metric became worse by more than `max_drop`: the round was undone.
        epochs: For how many epochs the round was to be fine-tuned, an int: more than `num_epochs` if a
            callback of yours stopped it.

    Example:

    >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
    >>> [one.number for one in info.rounds] == list(range(1, len(info.rounds) + 1))
    True
    >>> info.rounds[-1].params == small.count_params()
    True
    """

    number: int
    costs: dict[str, int | None]
    layers: dict[str, list[int]]
    history: dict[str, list[float]]
    step_losses: list[float]
    seconds: dict[str, float]
    repairs: list[RepairRecord] = dataclasses.field(default_factory=list)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    judged: JudgedRecord | None = None
    learning_rate: RateRecord | None = None
    held: bool = True
    epochs: int = 0

    @property
    def num_epochs(self) -> int:
        """How many epochs of fine-tuning there were, those that were not kept among them."""
        return max(map(len, self.history.values()), default=0)

    @property
    def kept_epoch(self) -> int:
        """The epoch whose model was kept, an int; 0: the one before fine-tuning, or there was none."""
        return self.num_epochs if self.judged is None else self.judged["epoch"]

    @property
    def kept_history(self) -> dict[str, float]:
        """Name -> float: the history at the epoch that was kept, as far as it is known.

        Of the model before training only the metrics on the validation data are known.
        """
        last = self.kept_epoch - 1
        if last >= 0:
            return {name: values[last] for name, values in self.history.items() if last < len(values)}
        if self.judged is None or not self.judged["metrics"]:
            return {}
        named = {f"val_{name}": value for name, value in self.judged["metrics"][0].items()}
        if not self.history:
            return named if self.judged["examples"] == ON_VALIDATION_DATA else {}
        return {name: named[name] for name in self.history if name in named}

    @property
    def known_metrics(self) -> dict[str, float]:
        """Name -> float: `kept_history`, or else `metrics` with "val_" before their names."""
        return self.kept_history or {f"val_{name}": value for name, value in self.metrics.items()}

    @property
    def judged_values(self) -> dict[str, float]:
        """The compared metric of the states of the model, as far as they were judged.

        A dict from "cut" (before repair), "repaired" and "trained" to floats. Trained is the epoch that was
        kept, or the last one if none was. Without repair there is no "repaired".
        """
        if self.judged is None:
            return {}
        measure, cut = self.judged["measure"], self.judged.get("cut", {})
        values = [metrics[measure] for metrics in self.judged["metrics"]]
        found = {"cut": cut[measure]} if cut else {}
        if values:
            found["repaired" if self.repairs or cut else "cut"] = values[0]
        if values[1:]:
            found["trained"] = values[self.kept_epoch or -1]
        return found

    def verdict(self) -> str:
        """Which state was kept, and why, and whether a callback stopped the training, in one line.

        Empty if states were not compared and nothing stopped it.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, increment=0.3, return_info=True)
        >>> info.rounds[0].verdict()
        'epoch ... of 1 kept...'
        """
        is_stopped = 0 < self.num_epochs < self.epochs
        stopped = [f"stopped after {self.num_epochs} of {self.epochs} epochs"] if is_stopped else []
        if self.judged is None:
            return ", ".join(stopped)
        parts = [f"epoch {self.kept_epoch} of {self.num_epochs} kept"] if self.num_epochs else []
        parts += stopped
        parts += [self.judged["reason"]] if self.judged["reason"] else []
        found = ", ".join(f"{value:.4g} {state}" for state, value in self.judged_values.items())
        return ", ".join(parts) + (f": {self.judged['measure']} {found}" if found else "")

    @property
    def label(self) -> str:
        """The number of the round as text, with ", undone" if it was undone."""
        return str(self.number) if self.held else f"{self.number}, undone"

    @property
    def params(self) -> int:
        """The number of parameters that are left."""
        params = self.costs["params"]
        assert params is not None, "parameters can always be counted"
        return params

    @property
    def flops(self) -> int | None:
        """The FLOPs of one example that are left, `None` if an input size is unknown."""
        return self.costs["flops"]


@dataclasses.dataclass(repr=False)
class RunRecord:
    """The data of an `Info`, which documents its attributes. Tables, pictures and pages read it."""

    goal: dict[str, float | int]
    criterion: str
    before: dict[str, int | None]
    after: dict[str, int | None]
    plan: Plan
    rounds: list[Round] = dataclasses.field(default_factory=list)
    stops: list[GoalRecord] = dataclasses.field(default_factory=list)
    locked: dict[str, LockedRecord] = dataclasses.field(default_factory=dict)
    inexact: dict[str, InexactRecord] = dataclasses.field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    stop_reason: str = ""
    name: str = ""
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    round_to: int = 1
    metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    test_metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    artifacts: dict[str, list[Artifact]] = dataclasses.field(default_factory=dict)
    command: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=lambda: package_versions())

    @classmethod
    def before_a_run(
        cls,
        labeled: LabeledModel,
        costs: Costs,
        exact: bool,
        goal: dict[str, float | int],
        criterion: Criterion,
        round_to: int,
    ) -> Self:
        """The record of a run that has not begun.

        Args:
            labeled: The original model.
            costs: Its costs.
            exact: As in `compress`.
            goal: The parts of the last goal.
            criterion: A name or a function.
            round_to: The multiple of channels that every group keeps.
        """
        return cls(
            goal=dict(goal),
            criterion=getattr(criterion, "__name__", str(criterion)),
            before=dict(costs),
            after=dict(costs),
            plan=Plan(before=costs, after=costs, exact=exact, branches=labeled.with_branches),
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
    def reduction(self) -> dict[str, float]:
        """Cost -> the fraction of it that was removed, a float.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> info.reduction["params"] >= 0.3
        True
        """
        return {
            cost: 1 - after / before
            for cost, before in self.before.items()
            if before is not None and (after := self.after.get(cost)) is not None
        }

    @property
    def pruned_layers(self) -> list[str]:
        """Names of the layers that lost channels, a list of strings.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> len(info.pruned_layers) > 0
        True
        """
        return list(self.plan.layers)

    def headline(self) -> str:
        """One line that says how much was removed, from how many layers, and how many residual branches.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> info.headline().endswith("by 'log_odds'")
        True
        """
        shown = {"params", "flops", *self.goal}
        parts = [f"{share:.1%} of {cost}" for cost, share in self.reduction.items() if cost in shown]
        gone = [name for name, layer in self.plan.layers.items() if not layer.kept]
        num_layers = len(self.plan.layers) - len(gone)
        where = [f"from {num_layers} layers"] if num_layers or not gone else []
        where += [f"with {len(gone)} residual branch{'es' if len(gone) > 1 else ''}"] if gone else []
        return f"{', '.join(parts)} removed {' and '.join(where)} by '{self.criterion}'"

    def measured(self) -> list[str]:
        """Names of the measured costs in the goal, such as "bytes:onnx" or "latency", a list of strings.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> info.measured()
        []
        """
        return [cost for cost in self.before if measured_cost_of(cost) is not None]

    def exported(self) -> list[tuple[Artifact, Artifact]]:
        """A list of pairs, one for each exported variant: the `Artifact`s of the original and of the result.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> files = [keras_taylor.export(m, f"{m.count_params()}.keras") for m in (model, small)]
        >>> before, after = keras_taylor.measure_artifacts(files)
        >>> info.artifacts = {"before": [before], "after": [after]}
        >>> info.exported() == [(before, after)]
        True
        """
        return list(zip(self.artifacts.get("before", ()), self.artifacts.get("after", ()), strict=True))

    def to_json(self) -> str:
        """Everything as a JSON string, with `reduction` and `pruned_layers`.

        Numbers that are not finite, such as the loss of a training that diverged, are `null` in it. They are
        NaN again when they are read.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> keras_taylor.Info.from_json(info.to_json()) == info
        True
        """
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        content["rounds"] = [dataclasses.asdict(one) for one in self.rounds]
        content["artifacts"] = {
            when: [dataclasses.asdict(one) for one in artifacts] for when, artifacts in self.artifacts.items()
        }
        content.update(
            reduction=self.reduction, pruned_layers=self.pruned_layers, plan=json.loads(self.plan.to_json())
        )
        return to_json_text(content)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The `Info` that `to_json` wrote.

        Args:
            text: The JSON string.

        Returns:
            An equal `Info`.

        Raises:
            ValueError: if the text is not such an `Info`.

        Example:

        >>> small, info = keras_taylor.compress(model, (x, y), 0.3, return_info=True)
        >>> keras_taylor.Info.from_json(info.to_json()).criterion == info.criterion
        True
        """
        try:
            content = json.loads(text)
            content = {f.name: content[f.name] for f in dataclasses.fields(cls) if f.name in content}
            content = with_nan_by_name(cls, content)
            content["rounds"] = [Round(**with_nan_by_name(Round, one)) for one in content["rounds"]]
            content["artifacts"] = {
                when: [artifact_from_dict(one) for one in artifacts]
                for when, artifacts in content["artifacts"].items()
            }
            content["unknown"] = tuple(content["unknown"])
            content["plan"] = Plan.from_json(json.dumps(content["plan"]))
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"This is not an `Info` that `Info.to_json` wrote ({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error


def repair_record(repair: LayerRepair) -> RepairRecord:
    """A `LayerRepair` as a dict."""
    return {
        "name": repair.name,
        "error_before": repair.error_before,
        "error_after": repair.error_after,
        "ridge": repair.ridge,
        "reason": repair.reason,
    }


def package_versions() -> dict[str, str]:
    """Name -> version of the packages that a run depends on."""
    backend = keras.backend.backend()
    return {
        "keras_taylor": __version__,
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
