"""Which channels to keep for a goal: a value to print, edit, save, replay."""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from keras_taylor.costs import COSTS, CostModel, check_countable
from keras_taylor.groups import read_channels
from keras_taylor.tables import render

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The channels that one layer keeps: `kept` indices of its original `width`."""

    width: int
    kept: tuple


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which channels of which layers stay; it speaks of the original model's indices.

    Attributes:
        layers: Layer name -> `LayerPlan`, for every layer that loses channels.
        before, after: Costs ("params", "flops") without and with the plan.
        exact: `False` where channels that are normalised together may leave (see `analyze`).
    """

    layers: Mapping[str, LayerPlan] = dataclasses.field(default_factory=dict)
    before: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    after: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    exact: bool = True

    def compose(self, later):
        """This plan followed by one made for the model that this one leads to.

        Args:
            later: A `Plan` whose indices are those of the already pruned model.

        Returns:
            A `Plan` that does both at once.
        """
        layers = dict(self.layers)
        for name, then in later.layers.items():
            now = layers.get(name)
            if now is None:
                layers[name] = then
                continue
            if len(now.kept) != then.width:
                raise ValueError(
                    f"The plans do not follow each other at layer '{name}': the first keeps "
                    f"{len(now.kept)} channels, the second was made for {then.width}. "
                    f"Received: later={later.layers[name]!r}"
                )
            layers[name] = LayerPlan(now.width, tuple(now.kept[i] for i in then.kept))
        exact = self.exact and later.exact
        return Plan(layers, self.before or later.before, later.after or self.after, exact)

    def to_json(self):
        """The plan as a JSON string."""
        content = {
            "format": _FORMAT,
            "before": dict(self.before),
            "after": dict(self.after),
            "exact": self.exact,
            "layers": {n: {"width": p.width, "kept": list(p.kept)} for n, p in self.layers.items()},
        }
        return json.dumps(content)

    @classmethod
    def from_json(cls, text):
        """The plan that `to_json` wrote.

        Raises:
            ValueError: if the text is not such a plan.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}")
            layers = {
                n: LayerPlan(int(p["width"]), tuple(int(i) for i in p["kept"]))
                for n, p in content["layers"].items()
            }
            return cls(layers, content["before"], content["after"], bool(content.get("exact", True)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"This is no plan that `Plan.to_json` wrote ({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error

    def __str__(self):
        table = Table()
        for column in ("layer", "channels", "kept"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, layer in self.layers.items():
            table.add_row(name, str(layer.width), str(len(layer.kept)))
        return f"{self._headline()}\n{render(table)}"

    def _headline(self):
        parts = [
            f"{what} {self.before[what]:,} -> {self.after[what]:,} "
            f"({1 - self.after[what] / self.before[what]:.1%} less)"
            for what in COSTS
            if self.before.get(what) and self.after.get(what) is not None
        ]
        return "plan: " + (", ".join(parts) or f"{len(self.layers)} layers lose channels")


def make_plan(model, scores, goal=0.3, *, round_to=1, min_channels=1, include=None, exclude=(), exact=True):
    """Chooses the least important units of the whole network until the goal is met.

    Args:
        model: The model that was scored. It is not changed.
        scores: What `score` returned: group name -> array `(num_units,)`. Groups
            that are missing lose nothing.
        goal: Fraction of the parameters to remove, frozen ones and BatchNorm
            statistics counted (`model.count_params()`); or `{"params": 0.3}`, or
            `{"flops": 0.5}`.
        round_to: Every group keeps a multiple of this many channels.
        min_channels: Every group keeps at least so many channels.
        include, exclude, exact: As in `score`. The plan remembers `exact`.

    Returns:
        A `Plan` that removes the goal, or at most one unit (or one rounding step) more.

    Raises:
        ValueError: for a goal that is none, or that cannot be reached; the message
            says how much can be.
    """
    what, fraction = parse_goal(goal)
    channels = read_channels(model, include, exclude, exact)
    costs = CostModel(channels)
    check_countable(costs(), what, f"goal={goal!r}")
    removable = Removable(channels, costs, flat_scores(channels, scores), round_to, min_channels)
    kept = units_to_keep(channels, costs, removable, what, costs()[what] * (1 - fraction), goal)
    return plan_of(channels, costs, kept)


def units_to_keep(channels, costs, removable, what, ceiling, goal):
    """The largest mask of kept units whose cost is at most `ceiling`.

    Raises:
        ValueError: if there is none; it names `goal`, and how much can go.
    """
    kept = removable.until(what, ceiling)
    if kept is None:
        raise _unreachable(channels, costs, removable, what, goal)
    return kept


def parse_goal(goal):
    """A goal as `(what, fraction)`: "params" or "flops", and a float between 0 and 1.

    Raises:
        ValueError: for anything else.
    """
    what, value = "params", goal
    if isinstance(goal, Mapping) and len(goal) == 1:
        ((what, value),) = goal.items()
    number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if what not in COSTS or not number or not 0 < value < 1:
        raise ValueError(
            "`goal` is the fraction to remove. Expected a number above 0 and below 1 (0.3 removes "
            '30 % of the parameters), or {"params": 0.3} or {"flops": 0.3}. '
            f"Received: goal={goal!r}"
        )
    return what, float(value)


def flat_scores(channels, scores):
    """Scores of all units in one float64 array `(num_units,)`, infinite where there are none."""
    flat = np.full(channels.num_units, np.inf)
    names = {group.name: group for group in channels.groups}
    for name, values in scores.items():
        values = np.asarray(values, np.float64)
        group = names.get(name)
        if group is None or values.shape != (group.num_units,) or np.isnan(values).any():
            expected = (
                "one of its groups that are prunable with these `include`, `exclude` and `exact`"
                if group is None
                else f"shape ({group.num_units},), no NaN"
            )
            raise ValueError(
                f"The scores do not fit the model at '{name}'. Expected {expected}. "
                f"Received: scores[{name!r}] of shape {values.shape}"
            )
        flat[group.start : group.start + group.num_units] = values
    return flat


class Removable:
    """Units in the order in which they go, and the masks that this leads to.

    Args:
        channels: `groups.Channels`.
        costs: Its `CostModel`.
        flat: Scores, float64 `(num_units,)`; infinite: never.
        round_to, min_channels: As in `make_plan`.
    """

    def __init__(self, channels, costs, flat, round_to=1, min_channels=1):
        _check_whole("round_to", round_to)
        _check_whole("min_channels", min_channels)
        self._channels, self._costs, self._round_to = channels, costs, round_to
        self._group_of = np.repeat(np.arange(len(channels.groups)), [g.num_units for g in channels.groups])
        self._starts = np.array([g.start for g in channels.groups], np.int64)
        self._sizes = np.array([g.num_units for g in channels.groups], np.int64)
        self._ranked = np.lexsort((flat, self._group_of))  # within each group, worst first
        floors = np.minimum(self._sizes, min_channels)
        within = np.arange(flat.size) - self._starts[self._group_of] if flat.size else np.zeros(0, int)
        eligible = np.zeros(flat.size, bool)
        eligible[self._ranked] = within < (self._sizes - floors)[self._group_of]
        eligible &= np.isfinite(flat)
        order = np.argsort(flat, kind="stable")
        self._order = order[eligible[order]]

    def mask(self, num):
        """Units kept after the first `num` went, a bool array `(num_units,)`."""
        gone = np.bincount(self._group_of[self._order[:num]], minlength=len(self._sizes))
        kept = -(-(self._sizes - gone) // self._round_to) * self._round_to
        gone = self._sizes - np.minimum(kept, self._sizes)
        mask = np.ones(self._group_of.size, bool)
        within = np.arange(mask.size) - self._starts[self._group_of] if mask.size else np.zeros(0, int)
        mask[self._ranked] = within >= gone[self._group_of]
        return mask

    def least(self):
        """The mask with all gone that may go."""
        return self.mask(self._order.size)

    def until(self, what, ceiling):
        """The largest mask whose cost is at most `ceiling`, `None` if there is none."""
        low, high = 0, self._order.size
        if self._costs(self.mask(high))[what] > ceiling:
            return None
        while low < high:
            middle = (low + high) // 2
            if self._costs(self.mask(middle))[what] <= ceiling:
                high = middle
            else:
                low = middle + 1
        return self.mask(high)


def _unreachable(channels, costs, removable, what, goal):
    """The error for a goal out of reach."""
    before, least = costs()[what], costs(removable.least())[what]
    return ValueError(
        f"The goal is out of reach: at most {1 - least / before:.1%} of the {before:,} {what} can be "
        f"removed. What stays: {_blockers(channels)}. Lower the goal, or widen what may go "
        "(`include`, `exclude`, `round_to`, `min_channels`). "
        f"Received: goal={goal!r}"
    )


def _blockers(channels):
    largest = sorted(channels.locked, key=lambda g: -g.num_units)[:3]
    text = "; ".join(f"'{g.name}' ({g.num_units} channels: {g.reason})" for g in largest)
    return text or "the smallest width of every layer"


def plan_of(channels, costs, kept):
    """The `Plan` of a mask of kept units."""
    layers = {}
    for start, stop, name in channels.space.producers:
        mask = mask_of(channels, np.arange(start, stop), kept)
        if not mask.all() and name not in layers:
            layers[name] = LayerPlan(mask.size, tuple(np.flatnonzero(mask).tolist()))
    return Plan(layers, costs(), costs(kept), channels.exact)


def mask_of(channels, labels, kept):
    """Which positions stay: a bool array of the shape of `labels`."""
    return np.append(kept, True)[channels.units(labels)]


def kept_units(channels, plan):
    """The mask of kept units that a plan asks of a model.

    Raises:
        ValueError: if the plan does not belong to this model; the first difference is named.
    """
    kept = np.ones(channels.num_units, bool)
    producers = {}
    for start, stop, name in channels.space.producers:
        producers.setdefault(name, []).append(np.arange(start, stop))
    for name, layer in plan.layers.items():
        if name not in producers or producers[name][0].size != layer.width:
            width = producers[name][0].size if name in producers else "no such layer"
            raise ValueError(
                f"The plan was made for another model. Expected at layer '{name}': {layer.width} "
                f"channels; the model has: {width}. Received: plan.layers[{name!r}]"
            )
        _check_indices(name, layer)
        gone = np.ones(layer.width, bool)
        gone[list(layer.kept)] = False
        units = channels.units(producers[name][0])[gone]
        if (units < 0).any():
            raise ValueError(
                f"The plan removes channels of layer '{name}' that cannot leave. "
                f"Received: plan.layers[{name!r}], channel {int(np.flatnonzero(gone)[units < 0][0])}"
            )
        kept[units] = False
    _check_agreement(channels, plan, producers, kept)
    return kept


def _check_indices(name, layer):
    outside = [index for index in layer.kept if not 0 <= index < layer.width]
    if outside:
        raise ValueError(
            f"The plan keeps a channel that layer '{name}' does not have. Expected indices from 0 to "
            f"{layer.width - 1}. Received: plan.layers[{name!r}] with kept index {outside[0]}"
        )


def _check_agreement(channels, plan, producers, kept):
    for name, ranges in producers.items():
        mask = mask_of(channels, ranges[0], kept)
        planned = plan.layers.get(name)
        stays = np.flatnonzero(mask)
        wanted = np.arange(mask.size) if planned is None else np.unique(planned.kept)
        if not np.array_equal(stays, wanted):
            other = sorted(set(wanted.tolist()) ^ set(stays.tolist()))[0]
            raise ValueError(
                f"The plan is not consistent: channel {other} of layer '{name}' lives and dies with "
                "channels of other layers, and the plan treats them differently. "
                f"Received: plan.layers[{name!r}]"
            )
        if not mask.any():
            raise ValueError(f"The plan leaves no channel to layer '{name}'. Received: plan.layers[{name!r}]")


def _check_whole(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"`{name}` is a number of channels. Expected a whole number from 1 on. Received: {name}={value!r}"
        )
