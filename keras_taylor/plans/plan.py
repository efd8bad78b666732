"""Which channels to keep for a goal: a value to print, edit, save, replay."""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Iterable, Mapping

from rich.table import Table

from keras_taylor.budget.costs import COSTS
from keras_taylor.plans.plan_difference import LayerDifference, PlanDifference
from keras_taylor.plans.structure import PlanStructure
from keras_taylor.support.atomic_files import AtomicFile
from keras_taylor.support.console import render_table

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The channels that one layer keeps: `kept` indices of its original `width`."""

    width: int
    kept: tuple


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which channels of which layers stay; it speaks of the original model's indices.

    Plans are equal that keep the same channels and cost the same. `first - second` says in what two
    plans differ; `first | second` removes what either of them removes.

    Attributes:
        layers: Layer name -> `LayerPlan`, for every layer that loses channels.
        before, after: Costs ("params", "flops", ...) without and with the plan; `after` is `None` where
            a plan was edited whose costs only the model can tell.
        exact: `False` where channels that are normalized together may leave (see `analyze`).
        structure: What is known of the model: which channels leave together, in which order, and what
            they cost. `None` in plans that were made by hand.
    """

    layers: Mapping[str, LayerPlan] = dataclasses.field(default_factory=dict)
    before: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    after: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    exact: bool = True
    structure: PlanStructure | None = dataclasses.field(default=None, compare=False, repr=False)

    def keep(self, layer, channels):
        """This plan with other channels kept of one layer, and of all that live and die with it.

        Args:
            layer: Name of a layer that makes channels.
            channels: How many it keeps: those with the highest scores, whatever it keeps now. Or the
                indices, in the original, of those that it keeps.

        Returns:
            A new `Plan`, its costs counted anew.

        Raises:
            ValueError: for a plan that does not know its model's structure, a layer that the model does
                not have, or channels that it cannot keep.

        Example:

        >>> plan = plan.keep("conv3", 24).keep("conv4", [0, 5, 7])
        """
        structure = self._structure_of(layer)
        width = len(structure.layers[layer])
        mask = structure.mask(self._kept())
        if isinstance(channels, Iterable) and not isinstance(channels, (str, bytes)):
            indices = sorted({_index(one, layer, width) for one in channels})
            mask = structure.with_channels(mask, layer, indices)
        else:
            mask = structure.with_most_important(mask, layer, _number(channels, layer, width))
        empty = structure.empty_group(mask)
        if empty is not None:
            raise ValueError(
                f"No channel would be left of '{empty}'. Expected one at least. "
                f"Received: channels={channels!r}"
            )
        layers = {n: LayerPlan(len(structure.layers[n]), k) for n, k in structure.kept(mask).items()}
        return dataclasses.replace(self, layers=layers, after=self._costs(structure, mask))

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
        structure = self.structure if self.layers else self.structure or later.structure
        if self.structure and later.structure:
            structure = self.structure.followed_by(later.structure, self._kept())
        exact = self.exact and later.exact
        return Plan(layers, self.before or later.before, later.after or self.after, exact, structure)

    def __sub__(self, other):
        """In what this plan differs from another one for the same model: a `PlanDifference`."""
        if not isinstance(other, Plan):
            return NotImplemented
        layers = {}
        for name in _names(self, other):
            width = _common_width(self, other, name)
            one, two = (plan._kept_of(name, width) for plan in (self, other))
            if one != two:
                layers[name] = LayerDifference(
                    width, tuple(sorted(one - two)), tuple(sorted(two - one)), len(two)
                )
        costs = {
            what: after - other.after[what]
            for what, after in self.after.items()
            if after is not None and other.after.get(what) is not None
        }
        return PlanDifference(layers, costs)

    def __or__(self, other):
        """The plan that removes what either of two plans for the same model removes."""
        if not isinstance(other, Plan):
            return NotImplemented
        layers = {}
        for name in _names(self, other):
            width = _common_width(self, other, name)
            kept = self._kept_of(name, width) & other._kept_of(name, width)
            if not kept:
                raise ValueError(
                    f"Together the plans leave no channel to layer '{name}'. Expected plans that keep one in "
                    f"common at least. Received: {self.layers[name]!r} | {other.layers[name]!r}"
                )
            layers[name] = LayerPlan(width, tuple(sorted(kept)))
        exact = self.exact and other.exact
        merged = Plan(layers, self.before or other.before, {}, exact, self.structure or other.structure)
        if merged.structure is None:
            return merged
        mask = merged.structure.mask(merged._kept())
        return dataclasses.replace(merged, after=merged._costs(merged.structure, mask))

    def to_json(self):
        """The plan as a JSON string."""
        content = {
            "format": _FORMAT,
            "before": dict(self.before),
            "after": dict(self.after),
            "exact": self.exact,
            "layers": {n: {"width": p.width, "kept": list(p.kept)} for n, p in self.layers.items()},
        }
        if self.structure is not None:
            content["structure"] = self.structure.to_dict()
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
            structure = content.get("structure")
            return cls(
                layers,
                content["before"],
                content["after"],
                bool(content.get("exact", True)),
                None if structure is None else PlanStructure.from_dict(structure),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"This is no plan that `Plan.to_json` wrote ({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error

    def save(self, path):
        """Writes the plan to a file, as `to_json` does; a file that is there is replaced."""
        target = pathlib.Path(path)
        with AtomicFile(target) as draft:
            draft.path.write_text(self.to_json(), encoding="utf-8")
            draft.move_to(target)

    @classmethod
    def load(cls, path):
        """The plan that `save` wrote to a file.

        Raises:
            ValueError: if the file holds no plan.
        """
        return cls.from_json(pathlib.Path(path).read_text(encoding="utf-8"))

    def __str__(self):
        table = Table()
        for column in ("layer", "channels", "kept"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name, layer in self.layers.items():
            table.add_row(name, str(layer.width), str(len(layer.kept)))
        return f"{self._headline()}\n{render_table(table)}"

    def _headline(self):
        parts = [
            f"{what} {self.before[what]:,} -> {self.after[what]:,} "
            f"({1 - self.after[what] / self.before[what]:.1%} less)"
            for what in COSTS
            if self.before.get(what) and self.after.get(what) is not None
        ]
        return "plan: " + (", ".join(parts) or f"{len(self.layers)} layers lose channels")

    def _kept(self):
        return {name: layer.kept for name, layer in self.layers.items()}

    def _kept_of(self, name, width):
        """The channels that a layer of this width keeps, a set."""
        return set(self.layers[name].kept if name in self.layers else range(width))

    def _costs(self, structure, mask):
        counted = structure.cost(mask)
        return {what: counted.get(what) for what in self.before}

    def _structure_of(self, layer):
        """The structure; refuses a layer that it does not have."""
        if self.structure is None:
            raise ValueError(
                "The plan does not know the structure of its model: it was made by hand, or by an older "
                "version. Make it with `make_plan`, which notes the structure. Received: plan with "
                f"{len(self.layers)} layers and structure=None"
            )
        if layer not in self.structure.layers:
            names = list(self.structure.layers)
            raise ValueError(
                "The plan's model has no such layer that makes channels. Expected one of "
                f"{', '.join(names[:8])}{', ...' if names[8:] else ''}. Received: layer={layer!r}"
            )
        return self.structure


def _names(first, second):
    """Layers that lose channels in one of two plans, in the network's order where it is known."""
    known = next((plan.structure.layers for plan in (first, second) if plan.structure), {})
    found = dict.fromkeys([*first.layers, *second.layers])
    return [name for name in known if name in found] + [name for name in found if name not in known]


def _common_width(first, second, name):
    """The width of a layer; refuses plans for different models."""
    widths = [
        plan.layers[name].width
        if name in plan.layers
        else plan.structure and len(plan.structure.layers.get(name, ()))
        for plan in (first, second)
    ]
    known = {width for width in widths if width is not None}
    if len(known) > 1:
        raise ValueError(
            f"The plans are for different models. Expected layers of the same size; '{name}' has {widths[0]} "
            f"channels in the first and {widths[1]} in the second. Received: plans with {len(first.layers)} "
            f"and {len(second.layers)} layers"
        )
    return known.pop()


def _number(value, layer, width):
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number <= width:
        raise ValueError(
            f"Expected how many of the {width} channels layer '{layer}' keeps, from 1 on, or their indices. "
            f"Received: channels={value!r}"
        )
    return number


def _index(value, layer, width):
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
