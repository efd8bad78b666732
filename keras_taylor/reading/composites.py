"""A rule for composite layers that stay closed: they are built again with fewer units inside."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from keras_taylor.reading.cloning import with_value
from keras_taylor.reading.closed_layers import (
    InnerGroup,
    InnerStructure,
    KernelAxis,
    LockedGroup,
    UnitCount,
    UnitWork,
    trace_uncallable_layers,
)
from keras_taylor.reading.config_numbers import ConfigNumbers, KnownShape, NumberPath, Numbers, Step
from keras_taylor.reading.configurations import configuration_of
from keras_taylor.reading.graph import Call, Graph, read_layer
from keras_taylor.reading.rule_checks import computes_the_same, draw_kept_units, make_copy
from keras_taylor.reading.tracing import LayerStaysClosed, UnsupportedModelError
from keras_taylor.rules.base import Effect, KeptLabels, is_from_keras, producing_kernels, weight_of
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.types import BoolArray, IntArray, Shape

_PLAIN_TYPES = (int, float, str, bool, type(None))


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

    def kept_labels(self, kept: BoolArray) -> KeptLabels:
        """What follows for weights and configurations if these units are kept."""


class _LayerKey(NamedTuple):
    """Equal for calls of layers of one class with equal configurations, arguments and shapes."""

    layer_class: type
    description: str


_structures: dict[_LayerKey, InnerStructure | None] = {}


def find_structure(
    call: Call, shapes: Sequence[Shape], label_graph: Callable[[Graph], LabeledGraph]
) -> InnerStructure | None:
    """The inside of a layer that cannot be opened for inputs of any size, found by reading it at some sizes.

    Units inside are those that occur equally at two sizes. They can leave if configuration values count
    them. To find these values, the layer is built again with other values, and shapes are compared. The
    inside of a smaller layer must be that of the whole one as the rules shrink it. Where shapes and
    configurations cannot tell, the smaller layer and the whole one with closed gates run on random inputs.

    It is found once for layers of equal class and configuration.

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
    return _structures[key]


def _describe_layer(call: Call, shapes: Sequence[Shape]) -> _LayerKey:
    """The layer's class, configuration and call arguments."""
    config = _without_names(configuration_of(call.operation))
    arguments = [x if isinstance(x, (int, float, str, bool)) else None for x in call.site.flat]
    sizes = [shapes[index] for index in call.inputs]
    description = json.dumps([config, arguments, sizes], sort_keys=True, default=repr)
    return _LayerKey(type(call.operation), description)


def _find_structure(
    call: Call, shapes: Sequence[Shape], label_graph: Callable[[Graph], LabeledGraph]
) -> InnerStructure | None:
    """The units inside a layer, with the configuration values that count them; `None` if nothing is seen."""
    try:
        first, second = (
            _Reading(sizes.batch_size, label_graph(sizes.read(call.operation)))
            for sizes in (_Sizes(call, shapes, 0), _Sizes(call, shapes, 1))
        )
        if not _have_same_calls(first.labeled, second.labeled):
            return None
        structure = _describe_inside(call, shapes, first, second)
        search = _ConfigSearch(call, shapes, first.labeled, structure)
        return search.run() or structure.restricted_to([])
    except (LayerStaysClosed, UnsupportedModelError):
        return None


class _ConfigSearch:
    """The search for the configuration values of a closed layer that count the units inside.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of its graph.
        labeled: The inside of the layer at some sizes.
        structure: The same without configuration values.
    """

    def __init__(
        self, call: Call, shapes: Sequence[Shape], labeled: LabeledGraph, structure: InnerStructure
    ) -> None:
        self._call, self._shapes, self._labeled, self._structure = call, shapes, labeled, structure
        values = configuration_of(call.operation)
        numbers: dict[NumberPath, int] = {
            (key,): value for key, value in values.items() if type(value) is int and value > 1
        }
        weights = [tuple(weight.shape) for weight in call.operation.weights]
        self._numbers = ConfigNumbers(numbers, weights, self._shapes_with)
        self._explained: dict[frozenset[str], bool] = {}

    def run(self) -> InnerStructure | None:
        """The structure with the configuration values of its groups; groups without such values are locked.

        `None` if no group can leave, or if the layer differs when all groups shrink together.
        """
        steps: dict[str, Step] = {}
        locked: list[LockedGroup] = []
        for group in self._structure.groups:
            step = self._find_step(group)
            if step is None:
                locked.append(LockedGroup(*group, "no configuration values count these alone"))
            elif self._is_equivalent({group.name: step}, num_draws=1):
                steps[group.name] = step
            else:
                locked.append(LockedGroup(*group, "its outputs change when it is built with fewer of these"))
        paths = [path for step in steps.values() for path in step.numbers]
        if not steps or len(set(paths)) < len(paths):
            return None
        if not self._is_equivalent(steps):
            return None
        return dataclasses.replace(self._with_config(steps), locked=tuple(locked))

    def _shapes_with(self, changes: Numbers) -> list[KnownShape]:
        made = make_copy(self._call, {str(key): value for (key,), value in changes.items()})
        return [tuple(weight.shape) for weight in made.weights]

    def _find_step(self, group: InnerGroup) -> Step | None:
        """The values that fall with the units of one group, and with no others; `None` if there are none."""
        groups = {one.name: self._structure.axes_of(one.name) for one in self._structure.groups}
        if group.num_units < 2:
            return None
        step = self._numbers.find_step(groups[group.name], groups)
        if step is None or step.units != {group.name: 1}:
            return None
        is_right = all(self._numbers.lead_to(step, groups, num) for num in {1, group.num_units - 1})
        return step if is_right else None

    def _with_config(self, steps: Mapping[str, Step]) -> InnerStructure:
        """The structure of some groups with the configuration values that count them."""
        part = self._structure.restricted_to(steps)
        config = {
            str(path[0]): UnitCount(part.units_of(name), fall, self._numbers.numbers[path])
            for name, step in steps.items()
            for path, fall in step.numbers.items()
        }
        return dataclasses.replace(part, config=config)

    def _is_equivalent(self, steps: Mapping[str, Step], num_draws: int = 2) -> bool:
        """Whether the layer built with fewer units computes what the whole one with closed gates does."""
        structure, names = self._with_config(steps), frozenset(steps)
        if names not in self._explained:
            self._explained[names] = self._is_explained(structure)
        return self._explained[names] or computes_the_same(self._call, self._shapes, structure, num_draws)

    def _is_explained(self, structure: InnerStructure) -> bool:
        """Whether the inside of the smaller layer is that of the whole one as the rules shrink it."""
        labeled, layer = self._labeled, self._call.operation
        kept = draw_kept_units(structure, np.random.default_rng(0))
        all_kept = np.ones(labeled.groups[-1].start + labeled.groups[-1].num_units, bool)
        for group in labeled.groups:
            if group.name in {name for name, _ in structure.groups}:
                own = kept[structure.units_of(group.name)]
                all_kept[group.start : group.start + group.num_units] = own
        try:
            small = make_copy(self._call, structure.config_changes(kept))
            if [tuple(weight.shape) for weight in small.weights] != structure.shapes_of(layer, kept):
                return False
            graph = _Sizes(self._call, self._shapes, 0).read(small)
        except (LayerStaysClosed, UnsupportedModelError):
            return False
        return _is_shrunk_alike(labeled, labeled.kept_labels(all_kept), graph)


class _Sizes:
    """Sizes that stand for the unknown ones of a layer's inputs.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of its graph.
        number: 0 or 1, for other sizes.

    Attributes:
        batch_size: The size that stands for the unknown number of examples.
    """

    def __init__(self, call: Call, shapes: Sequence[Shape], number: int) -> None:
        known = {size for index in call.inputs for size in shapes[index]}
        free = [size for size in range(2, 99) if size not in known]
        self.batch_size, self._length = free[number], free[number + 2]
        self._call, self._shapes = call, shapes

    def read(self, layer: keras.Layer) -> Graph:
        """The inside of the layer or of a copy, called as in the call.

        Raises:
            LayerStaysClosed: if that cannot be seen.
        """
        tensors = iter(self._call.inputs)

        def with_known_shape(x: Any) -> Any:
            if not isinstance(x, keras.KerasTensor):
                return x
            first, *rest = self._shapes[next(tensors)]
            sizes = (self._length if size is None else size for size in rest)
            return keras.KerasTensor((self.batch_size if first is None else first, *sizes), dtype=x.dtype)

        args, kwargs = self._call.site.packed([with_known_shape(x) for x in self._call.site.flat])
        with trace_uncallable_layers(layer):
            return read_layer(layer, args, kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """The inside of a closed layer, read at some sizes.

    Attributes:
        batch_size: The size that was put in for the unknown number of examples.
        labeled: What was read.
    """

    batch_size: int
    labeled: LabeledGraph


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
        keeps_examples=all(
            [one.labeled.graph.shapes[index][:1] for index in one.labeled.graph.outputs]
            == [(one.batch_size,)] * len(call.outputs)
            for one in (first, second)
        ),
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


def _is_shrunk_alike(labeled: LabeledGraph, kept: KeptLabels, small: Graph) -> bool:
    """Whether the inside of a smaller layer is that of the whole one as its rules shrink it, call by call.

    Then both compute the same, by the rules. `False` says only that shapes and configurations cannot tell.

    Args:
        labeled: The inside of the whole layer.
        kept: What stays of it.
        small: The inside of the smaller layer.
    """
    whole = labeled.graph
    if len(whole.calls) != len(small.calls) or whole.outputs != small.outputs:
        return False
    partners: dict[keras.Operation, keras.Operation] = {}
    positions = [
        IdentityMap((weight, number) for number, weight in enumerate(graph.model.weights))
        for graph in (whole, small)
    ]
    for call, effect, other in zip(whole.calls, labeled.effects, small.calls, strict=True):
        if partners.setdefault(call.operation, other.operation) is not other.operation:
            return False
        weights = [
            [position.get(weight) for weight in getattr(each.operation, "weights", ())]
            for each, position in zip((call, other), positions, strict=True)
        ]
        if weights[0] != weights[1] or None in weights[0]:
            return False
        if not _is_shrunk(call, effect, kept, other):
            return False
    return len(set(partners.values())) == len(partners)


def _is_shrunk(call: Call, effect: Effect, kept: KeptLabels, other: Call) -> bool:
    """Whether a call of the smaller layer is that of the whole one as its rule shrinks it."""
    operation, small = call.operation, other.operation
    if type(operation) is not type(small):
        return False
    if not is_from_keras(type(operation)) and not _is_same(*map(_plain_attributes, (operation, small))):
        return False  # a configuration may be incomplete
    if (call.inputs, call.outputs) != (other.inputs, other.outputs):
        return False
    flat = [*call.flat]
    for position, value in kept.changes(effect.arguments).items():
        flat[position] = value
    if len(flat) != len(other.flat) or not all(map(_is_same, flat, other.flat)):
        return False
    try:
        config = _without_names(operation.get_config())
        for path, value in kept.changes(effect.config).items():
            config = with_value(config, path.split("."), value)
        return _is_same(config, _without_names(small.get_config()))
    except Exception:  # an operation may have no configuration
        return False


def _plain_attributes(operation: keras.Operation) -> dict[str, Any]:
    """The attributes of an operation that hold plain values, without its names."""
    return {
        key: value
        for key, value in vars(operation).items()
        if not key.endswith(("name", "path")) and all(type(x) in _PLAIN_TYPES for x in _entries(value))
    }


def _entries(value: Any) -> list[Any]:
    """The entries of nested lists and tuples."""
    return [x for each in value for x in _entries(each)] if isinstance(value, (list, tuple)) else [value]


def _without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the name, and without initializers: they have seeds."""
    return {key: value for key, value in config.items() if key != "name" and not key.endswith("initializer")}


def _is_same(first: Any, second: Any) -> bool:
    """Whether two values are known to be equal."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_is_same, first, second))
    if isinstance(first, keras.Variable) or isinstance(second, keras.Variable):
        return False
    if isinstance(first, np.ndarray) or keras.ops.is_tensor(first):
        arrays = [keras.ops.convert_to_numpy(x) for x in (first, second)]
        return arrays[0].dtype == arrays[1].dtype and np.array_equal(*arrays)
    return type(first) is type(second) and bool(first == second)
