"""A rule for composite layers that stay closed: they are built again with fewer units inside."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import keras

from keras_taylor.reading.closed_layers import (
    InnerGroup,
    InnerStructure,
    KernelAxis,
    UnitWork,
    trace_uncallable_layers,
)
from keras_taylor.reading.config_search import GroupSearch, LayerRebuilder, combine_groups, search_group
from keras_taylor.reading.configurations import configuration_of
from keras_taylor.reading.graph import Call, Graph, read_layer
from keras_taylor.reading.tracing import LayerStaysClosed, UnsupportedModelError
from keras_taylor.rules.base import Context, Effect, producing_kernels, weight_of
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.types import IntArray, Shape


class LabeledGroup(Protocol):
    """A group of units, as `groups.Group` is one."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def num_units(self) -> int:
        """How many units it has."""

    @property
    def start(self) -> int:
        """Its first unit."""


class LabeledGraph(Protocol):
    """A graph with labels, as `groups.LabeledModel` is one; that module imports this one."""

    @property
    def graph(self) -> Graph:
        """The graph."""

    @property
    def effects(self) -> Sequence[Effect]:
        """The effect of each call."""

    @property
    def labels(self) -> Sequence[IntArray]:
        """Labels of each tensor."""

    @property
    def groups(self) -> Sequence[LabeledGroup]:
        """The groups whose units can leave."""

    def units_of(self, labels: IntArray) -> IntArray:
        """The unit of each label, -1 for what stays."""


class _LayerKey(NamedTuple):
    """Equal for calls of layers of one class with equal configurations, arguments and shapes."""

    layer_class: type
    description: str


class _KnownSearch(NamedTuple):
    """The result of a search that layers with other numbers of units can use again.

    Attributes:
        counting_keys: The configuration values that count units.
        key: The layer, described without these values.
        searches: The result for each group, by its name.
    """

    counting_keys: tuple[str, ...]
    key: _LayerKey
    searches: dict[str, GroupSearch]


_structures: dict[_LayerKey, InnerStructure | None] = {}
_known_searches: list[_KnownSearch] = []


def find_rule_by_rebuilding(
    call: Call, shapes: Sequence[Shape], label_graph: Callable[[Graph], LabeledGraph]
) -> Callable[[Context], Effect] | None:
    """The rule of a layer that cannot be opened for inputs of any size, found by reading it at some sizes.

    Units inside are those that occur equally at two sizes. They can leave if configuration values count
    them. To find these values, the layer is built again with other values, and is compared on random inputs
    with the whole layer whose gates are closed.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of the graph.
        label_graph: Makes the `groups.LabeledModel` of a graph.

    Returns:
        `None` if the inside cannot be read, or if the layer is not closed.
    """
    has_unknown_size = any(None in shapes[index] for index in call.inputs)
    if not call.closed_reason or not has_unknown_size or not call.operation.weights:
        return None
    try:
        key = _describe_layer(call, shapes)
    except Exception:  # a user's `get_config` may raise anything
        return None
    if key not in _structures:
        _structures[key] = _find_structure(call, shapes, label_graph)
    structure = _structures[key]
    return None if structure is None else structure.make_effect


def _describe_layer(call: Call, shapes: Sequence[Shape], without: Sequence[str] = ()) -> _LayerKey:
    """The layer's class, configuration and call arguments, some configuration values left out."""
    config = {
        key: value
        for key, value in configuration_of(call.operation).items()
        if key not in ("name", *without) and not key.endswith("initializer")  # initializers have seeds
    }
    arguments = [x if isinstance(x, (int, float, str, bool)) else None for x in call.site.flat]
    sizes = [shapes[index] for index in call.inputs]
    description = json.dumps([config, arguments, sizes], sort_keys=True, default=repr)
    return _LayerKey(type(call.operation), description)


def _find_structure(
    call: Call, shapes: Sequence[Shape], label_graph: Callable[[Graph], LabeledGraph]
) -> InnerStructure | None:
    """The units inside a layer, with the configuration values that count them; `None` if nothing is seen."""
    try:
        first = _read_at_sizes(call, shapes, 0, label_graph)
        rebuilder = LayerRebuilder(call, shapes)
        names = {group.name for group in first.labeled.groups}
        for known in _known_searches:
            if names <= known.searches.keys() and known.key == _describe_layer(
                call, shapes, known.counting_keys
            ):
                structure = _describe_inside(call, shapes, first, first)
                return combine_groups(structure, known.searches, rebuilder) or structure.restricted_to([])
        second = _read_at_sizes(call, shapes, 1, label_graph)
        if not _have_same_calls(first.labeled, second.labeled):
            return None
        structure = _describe_inside(call, shapes, first, second)
        searches = {
            name: search_group(structure.restricted_to([name]), rebuilder) for name, _ in structure.groups
        }
        combined = combine_groups(structure, searches, rebuilder)
    except (LayerStaysClosed, UnsupportedModelError):
        return None
    if combined is not None and names <= searches.keys():
        counting_keys = tuple(combined.config)
        key = _describe_layer(call, shapes, counting_keys)
        _known_searches.append(_KnownSearch(counting_keys, key, searches))
    return combined or structure.restricted_to([])


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """The inside of a closed layer, read at some sizes.

    Attributes:
        batch_size: The size that was put in for the unknown number of examples.
        labeled: What was read.
    """

    batch_size: int
    labeled: LabeledGraph


def _read_at_sizes(
    call: Call, shapes: Sequence[Shape], number: int, label_graph: Callable[[Graph], LabeledGraph]
) -> _Reading:
    """Reads the inside of a layer at sizes that stand for the unknown ones; `number` is 0 or 1."""
    known = {size for index in call.inputs for size in shapes[index]}
    free = [size for size in range(2, 99) if size not in known]
    batch_size, length = free[number], free[number + 2]
    tensors = iter(call.inputs)

    def with_known_shape(x: Any) -> Any:
        if not isinstance(x, keras.KerasTensor):
            return x
        first, *rest = shapes[next(tensors)]
        sizes = (length if size is None else size for size in rest)
        return keras.KerasTensor((batch_size if first is None else first, *sizes), dtype=x.dtype)

    args, kwargs = call.site.packed([with_known_shape(x) for x in call.site.flat])
    with trace_uncallable_layers(call.operation):
        return _Reading(batch_size, label_graph(read_layer(call.operation, args, kwargs)))


def _have_same_calls(first: LabeledGraph, second: LabeledGraph) -> bool:
    """Whether two readings have the same calls and the same groups."""
    calls = [
        [
            (c.name, c.operation if isinstance(c.operation, keras.Layer) else type(c.operation), c.inputs)
            for c in labeled.graph.calls
        ]
        for labeled in (first, second)
    ]
    return calls[0] == calls[1] and first.groups == second.groups


def _describe_inside(
    call: Call, shapes: Sequence[Shape], first: _Reading, second: _Reading
) -> InnerStructure:
    """The structure without its configuration values, and without groups that gates cannot close.

    Args:
        call: The call of the closed layer.
        shapes: Shape of every tensor of its graph.
        first, second: The inside at two sizes.
    """
    layer, labeled = call.operation, first.labeled
    inner_numbers = {inner: number for number, inner in enumerate(layers_inside(layer))}
    weight_numbers = IdentityMap((weight, number) for number, weight in enumerate(layer.weights))
    weights: dict[int, tuple[IntArray | None, ...]] = {}
    reads: dict[int, IntArray] = {}
    kernel_axes: list[KernelAxis] = []
    ungated_units: set[int] = set()
    seen: set[keras.Operation] = set()
    for inner_call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        operation = inner_call.operation
        for number in effect.reads:
            units = labeled.units_of(labeled.labels[inner_call.inputs[number]])
            if (units < 0).all():
                continue
            if operation in inner_numbers and _can_be_gated(inner_call, number, first, second):
                reads[inner_numbers[operation]] = units
            else:
                ungated_units.update(units.reshape(-1).tolist())
        if operation in seen or effect.internal_reads:
            continue
        seen.add(operation)
        numbers = {name: weight_numbers.get(weight_of(operation, name)) for name in effect.weights}
        for name, axes in effect.weights.items():
            weight = numbers[name]
            if weight is not None:
                weights[weight] = tuple(_units_along(labeled, labels) for labels in axes)
        for name, axis, _ in producing_kernels(effect):
            weight = numbers[name]
            if weight is not None:
                kernel_axes.append(KernelAxis(weight, axis))
    has_known_sizes = not any(None in shapes[index][1:] for index in call.inputs)
    structure = InnerStructure(
        groups=tuple(InnerGroup(group.name, group.num_units) for group in labeled.groups),
        weights=weights,
        reads=reads,
        kernel_axes=tuple(one for one in kernel_axes if weights[one.weight][one.axis] is not None),
        config={},
        work=tuple(_work_at_any_size(labeled, second.labeled, has_known_sizes)),
    )
    return structure.restricted_to(
        {
            group.name
            for group in labeled.groups
            if ungated_units.isdisjoint(range(group.start, group.start + group.num_units))
        }
    )


def _can_be_gated(inner_call: Call, number: int, first: _Reading, second: _Reading) -> bool:
    """Whether an inner layer is called once, on one tensor whose first axis is that of the examples."""
    batch_sizes = [reading.labeled.graph.shapes[inner_call.inputs[number]][0] for reading in (first, second)]
    is_called_on_one = len(inner_call.inputs) == 1
    is_called_once = first.labeled.graph.is_used_once(inner_call.operation)
    return is_called_on_one and is_called_once and batch_sizes == [first.batch_size, second.batch_size]


def _units_along(labeled: LabeledGraph, labels: IntArray | None) -> IntArray | None:
    """The units along an axis, `None` if it has none."""
    units = None if labels is None else labeled.units_of(labels)
    return None if units is None or (units < 0).all() else units


def _work_at_any_size(
    labeled: LabeledGraph, other: LabeledGraph, has_known_sizes: bool
) -> Iterator[UnitWork]:
    """The work inside; its factor is NaN where it depends on the sizes that were put in."""
    for effect, other_effect in zip(labeled.effects, other.effects, strict=True):
        for work, other_work in zip(effect.work, other_effect.work, strict=True):
            is_known = has_known_sizes and work.factor == other_work.factor
            factor = work.factor if is_known else math.nan
            yield UnitWork(factor, tuple(labeled.units_of(labels) for labels in work.labels))
