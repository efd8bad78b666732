"""Which channels to keep for a goal: a value that can be printed, edited, compared, saved and replayed."""

import dataclasses
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from keras_taylor.budget.costs import COSTS
from keras_taylor.plans.plan_difference import LayerDifference, PlanDifference
from keras_taylor.plans.structure import PlanStructure
from keras_taylor.support.console import render_table
from keras_taylor.support.files import AtomicFile, to_json_text
from keras_taylor.support.types import BoolArray, Costs

_PLAN_FORMAT = 1  # of `Plan.to_json`


def check_plan_class(plan: object) -> None:
    """Refuses what is no `Plan`."""
    if not isinstance(plan, Plan):
        raise TypeError(
            "Expected a `keras_taylor.Plan`: what `make_plan` returns, or `Plan.load` of a file. "
            f"Received: plan={plan!r} (of type {type(plan).__name__})"
        )


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Which channels one layer keeps.

    Attributes:
        width: Number of channels of the layer in the original model, an int.
        kept: Indices of the channels that it keeps, a tuple of ints from 0 to `width - 1`.

    Example:

    >>> keras_taylor.LayerPlan(width=6, kept=(0, 2, 5))
    LayerPlan(width=6, kept=(0, 2, 5))
    """

    width: int
    kept: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which channels of which layers stay, by their indices in the original model.

    `make_plan` makes plans, `prune` carries them out. Plans are equal if they keep the same channels and
    leave the same costs. `first - second` tells in which channels and costs two plans differ (a
    `PlanDifference`); `first | second` removes the channels that either of them removes.

    Attributes:
        layers: Layer name -> `LayerPlan`, for every layer that loses channels. Empty by default.
        before: Cost -> its amount without the plan, an int: "params", "flops" (of one example's forward
            pass, 2 per multiply-add) and "activation_memory" (bytes). `None` for costs that are unknown.
        after: The same with the plan. Costs are missing if only the model could tell them.
        exact: `False` if channels that are normalized together may leave (see `analyze`). `True` by default.
        structure: What the plan knows about its model: which channels leave together, in which order, and
            what they cost. `None` in plans that were made by hand, which cannot be edited with `keep`.
        branches: `True` if whole residual branches may leave (see `Selection`). Each bears the name of its
            sum in `layers`, as one channel: `LayerPlan(width=1, kept=())` removes it. `False` by default.

    Example:

    >>> scores = keras_taylor.score(model, (x, y))
    >>> plan = keras_taylor.make_plan(model, scores, 0.3)
    >>> plan.after["params"] <= 0.7 * plan.before["params"]
    True
    >>> plan.save("plan.json")
    >>> keras_taylor.Plan.load("plan.json") == plan
    True
    >>> small = keras_taylor.prune(model, plan)
    """

    layers: Mapping[str, LayerPlan] = dataclasses.field(default_factory=dict)
    before: Costs = dataclasses.field(default_factory=dict)
    after: Costs = dataclasses.field(default_factory=dict)
    exact: bool = True
    structure: PlanStructure | None = dataclasses.field(default=None, compare=False, repr=False)
    branches: bool = False

    def keep(self, layer: str, channels: int | Iterable[int]) -> "Plan":
        """This plan with other channels kept of one layer, and of all layers whose channels leave with them.

        Groups that are tied to theirs (`Selection(uniform=...)`, and the layers of a task of KerasHub) lose
        equally many units, the least important ones. Other things that the plan was made with, such as
        `round_to`, do not hold for these layers any more.

        Args:
            layer: Name of a layer that makes channels; `"mha/query"` for the heads of an attention "mha".
            channels: An int: how many channels the layer keeps, those with the highest scores, whatever
                it keeps now. Or several ints: the indices, in the original, of the channels that it keeps.

        Returns:
            A new `Plan`; its costs are counted again.

        Raises:
            ValueError: for a plan that does not know the structure of its model, a layer that the model does
                not have, or channels that the layer cannot keep.

        Example:

        >>> plan = keras_taylor.make_plan(model, keras_taylor.score(model, (x, y)), 0.3)
        >>> name, layer = next(iter(plan.layers.items()))
        >>> plan.keep(name, layer.width).layers.get(name) is None
        True
        >>> plan.keep(name, [0]).layers[name].kept
        (0,)
        """
        structure = self._structure_with(layer)
        width = len(structure.layer_units[layer])
        mask = structure.mask_of_channels(self._kept_channels())
        if isinstance(channels, Iterable) and not isinstance(channels, (str, bytes)):
            indices = sorted({_parse_channel_index(one, layer, width) for one in channels})
            mask = structure.keep_channels(mask, layer, indices)
        else:
            mask = structure.keep_most_important(mask, layer, _parse_num_channels(channels, layer, width))
        mask = structure.keep_ties(mask, layer)
        empty = structure.find_empty_group(mask)
        if empty is not None:
            raise ValueError(
                f"No channel of '{empty}' would be left. Expected at least one. "
                f"Received: channels={channels!r}"
            )
        return dataclasses.replace(
            self, layers=layer_plans(structure, mask), after=self._costs_of_mask(structure, mask)
        )

    def compose(self, later: "Plan") -> "Plan":
        """This plan followed by one for the model that this one leads to.

        Args:
            later: A `Plan` whose indices are those of the model that this plan pruned.

        Returns:
            A `Plan` for the original that does both at once.

        Raises:
            ValueError: if the later plan was made for other widths.

        Example:

        >>> first = keras_taylor.make_plan(model, keras_taylor.score(model, (x, y)), 0.2)
        >>> small = keras_taylor.prune(model, first)
        >>> second = keras_taylor.make_plan(small, keras_taylor.score(small, criterion="magnitude"), 0.2)
        >>> smaller = keras_taylor.prune(model, first.compose(second))
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
        structure = self.structure if self.layers else self.structure or later.structure
        if self.structure and later.structure and later.branches and not self.branches:
            structure = None  # this one does not know the branches
        elif self.structure and later.structure:
            structure = self.structure.followed_by(later.structure, self._kept_channels())
        if structure:  # it knows all layers, in the order of the network
            for name in structure.layers_gone({name: layer.kept for name, layer in layers.items()}):
                layers.pop(name, None)
            order = {name: number for number, name in enumerate(structure.layer_units)}
            layers = dict(sorted(layers.items(), key=lambda one: order.get(one[0], len(order))))
        exact, branches = self.exact and later.exact, self.branches or later.branches
        return Plan(
            layers, self.before or later.before, later.after or self.after, exact, structure, branches
        )

    def __sub__(self, other: "Plan") -> PlanDifference:
        """In which channels and costs this plan differs from another one for the same model."""
        if not isinstance(other, Plan):
            return NotImplemented
        layers = {}
        for name in _layers_that_lose_channels(self, other):
            width = _common_width(self, other, name)
            first, second = (plan._channels_kept_of(name, width) for plan in (self, other))
            if first != second:
                first_only, second_only = tuple(sorted(first - second)), tuple(sorted(second - first))
                layers[name] = LayerDifference(width, first_only, second_only, len(second))
        costs = {}
        for cost, amount in self.after.items():
            other_amount = other.after.get(cost)
            if amount is not None and other_amount is not None:
                costs[cost] = amount - other_amount
        return PlanDifference(layers, costs)

    def __or__(self, other: "Plan") -> "Plan":
        """The plan that removes the channels that either of two plans for the same model removes."""
        if not isinstance(other, Plan):
            return NotImplemented
        layers = {}
        for name in _layers_that_lose_channels(self, other):
            width = _common_width(self, other, name)
            kept = self._channels_kept_of(name, width) & other._channels_kept_of(name, width)
            if not kept and all(plan._channels_kept_of(name, width) for plan in (self, other)):
                raise ValueError(
                    f"Together the plans leave no channel of layer '{name}'. Expected plans that both keep "
                    f"at least one channel. Received: {self.layers[name]!r} | {other.layers[name]!r}"
                )
            layers[name] = LayerPlan(width, tuple(sorted(kept)))
        exact, branches = self.exact and other.exact, self.branches or other.branches
        knowing = self.structure if self.branches == branches else None
        structure = knowing or (other.structure if other.branches == branches else None)
        merged = Plan(layers, self.before or other.before, {}, exact, structure, branches)
        if merged.structure is None:
            return merged
        mask = merged.structure.mask_of_channels(merged._kept_channels())
        return dataclasses.replace(
            merged,
            layers=layer_plans(merged.structure, mask),
            after=merged._costs_of_mask(merged.structure, mask),
        )

    def to_json(self) -> str:
        """The plan as a JSON string, which `from_json` reads.

        Example:

        >>> plan = keras_taylor.make_plan(model, keras_taylor.score(model, (x, y)), 0.3)
        >>> keras_taylor.Plan.from_json(plan.to_json()) == plan
        True
        """
        content: dict[str, Any] = {
            "format": _PLAN_FORMAT,
            "before": dict(self.before),
            "after": dict(self.after),
            "exact": self.exact,
            "branches": self.branches,
            "layers": {n: {"width": p.width, "kept": list(p.kept)} for n, p in self.layers.items()},
        }
        if self.structure is not None:
            content["structure"] = self.structure.to_dict()
        return to_json_text(content)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote.

        Args:
            text: A JSON string.

        Returns:
            A `Plan`.

        Raises:
            ValueError: if the text is not such a plan.

        Example:

        >>> keras_taylor.Plan.from_json(keras_taylor.Plan().to_json())
        Plan(layers={}, before={}, after={}, exact=True, branches=False)
        """
        try:
            content = json.loads(text)
            if content["format"] != _PLAN_FORMAT:
                raise ValueError(f"format {content['format']}")
            layers = {
                n: LayerPlan(int(p["width"]), tuple(int(i) for i in p["kept"]))
                for n, p in content["layers"].items()
            }
            structure = content.get("structure")
            return cls(
                layers,
                content["before"],
                content["after"],
                bool(content.get("exact", True)),
                None if structure is None else PlanStructure.from_dict(structure),
                bool(content.get("branches", False)),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The text is not a plan that `Plan.to_json` wrote ({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file, as `to_json` does; it replaces an existing file.

        Args:
            path: Where to write it. The directory must exist.

        Example:

        >>> keras_taylor.Plan().save("plan.json")
        """
        target = pathlib.Path(path)
        with AtomicFile(target) as draft:
            draft.path.write_text(self.to_json(), encoding="utf-8")
            draft.move_to(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """The plan that `save` wrote to a file.

        Args:
            path: Where the file is.

        Returns:
            A `Plan`.

        Raises:
            ValueError: if the file does not hold a plan.
            FileNotFoundError: if there is no file.

        Example:

        >>> keras_taylor.Plan().save("plan.json")
        >>> plan = keras_taylor.Plan.load("plan.json")
        """
        return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))

    def __str__(self) -> str:
        table = Table()
        for column in ("layer", "channels", "kept"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, layer in self.layers.items():
            table.add_row(name, str(layer.width), str(len(layer.kept)))
        return f"{self._headline()}\n{render_table(table)}"

    def _headline(self) -> str:
        parts = []
        for cost in COSTS:
            before, after = self.before.get(cost), self.after.get(cost)
            if before and after is not None:
                parts.append(f"{cost} {before:,} -> {after:,} ({1 - after / before:.1%} less)")
        return "plan: " + (", ".join(parts) or f"{len(self.layers)} layers lose channels")

    def _kept_channels(self) -> dict[str, tuple[int, ...]]:
        return {name: layer.kept for name, layer in self.layers.items()}

    def _channels_kept_of(self, name: str, width: int) -> set[int]:
        """The channels that a layer of this width keeps."""
        return set(self.layers[name].kept if name in self.layers else range(width))

    def _costs_of_mask(self, structure: PlanStructure, mask: BoolArray) -> dict[str, int | None]:
        """Those costs of the kept units that `before` has."""
        counted = structure.costs_of_mask(mask)
        return {cost: counted.get(cost) for cost in self.before}

    def _structure_with(self, layer: str) -> PlanStructure:
        """The structure; refuses a layer that it does not have."""
        if self.structure is None:
            raise ValueError(
                "The plan does not know the structure of its model: it was made by hand, or by an older "
                "version. Make it with `make_plan`, which notes the structure. Received: plan with "
                f"{len(self.layers)} layers and structure=None"
            )
        names = list(self.structure.layer_units)
        if layer not in names:
            raise ValueError(
                "The plan's model has no such layer that makes channels. Expected one of "
                f"{', '.join(names[:8])}{', ...' if names[8:] else ''}. Received: layer={layer!r}"
            )
        return self.structure


def layer_plans(structure: PlanStructure, mask: BoolArray) -> dict[str, LayerPlan]:
    """The plans of the layers that lose channels if only the units in `mask` `(num_units,)` are kept."""
    channels = structure.channels_of_mask(mask)
    return {name: LayerPlan(len(structure.layer_units[name]), kept) for name, kept in channels.items()}


def _layers_that_lose_channels(first: Plan, second: Plan) -> list[str]:
    """Layers that lose channels in one of two plans, in the order of the network if that is known."""
    structure = first.structure or second.structure
    known = [] if structure is None else list(structure.layer_units)
    found = dict.fromkeys([*first.layers, *second.layers])
    return [name for name in known if name in found] + [name for name in found if name not in known]


def _common_width(first: Plan, second: Plan, name: str) -> int:
    """The number of channels of a layer in the original; refuses plans for different models."""
    widths = [_width_in_plan(plan, name) for plan in (first, second)]
    known = {width for width in widths if width is not None}
    if len(known) > 1:
        raise ValueError(
            f"The plans are for different models. Expected layers of the same size; '{name}' has {widths[0]} "
            f"channels in the first and {widths[1]} in the second. Received: plans with {len(first.layers)} "
            f"and {len(second.layers)} layers"
        )
    return known.pop()


def _width_in_plan(plan: Plan, name: str) -> int | None:
    """The number of channels of a layer in the original, 0 for one that it does not have; `None`: unknown."""
    if name in plan.layers:
        return plan.layers[name].width
    return None if plan.structure is None else len(plan.structure.layer_units.get(name, ()))


def _parse_num_channels(value: Any, layer: str, width: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number <= width:
        raise ValueError(
            f"Expected the number of channels that layer '{layer}' keeps, from 1 to {width}, or their "
            f"indices. Received: channels={value!r}"
        )
    return number


def _parse_channel_index(value: Any, layer: str, width: int) -> int:
    try:
        index = operator.index(value)
    except TypeError:
        index = -1
    if isinstance(value, bool) or not 0 <= index < width:
        raise ValueError(
            f"Layer '{layer}' has channels from 0 to {width - 1}. Expected such indices. "
            f"Received: {value!r} among the channels"
        )
    return index
