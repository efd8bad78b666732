"""What is inside a layer that stays closed: its units, and gates on the inputs of its inner layers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np

from keras_taylor.reading.config_numbers import WeightAxis
from keras_taylor.rules.base import (
    Context,
    Edit,
    Effect,
    InternalRead,
    Work,
    override_attributes,
    unknown_operation,
)
from keras_taylor.rules.labels import FIXED
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.types import Array, BoolArray, IntArray, Shape, Tensor

Gate: TypeAlias = Callable[[Tensor], Tensor]  # from the input of a layer to the input that it gets instead


class InnerGroup(NamedTuple):
    """A group of units inside a closed layer."""

    name: str
    num_units: int


class LockedGroup(NamedTuple):
    """A group inside a closed layer whose units cannot leave, and why."""

    name: str
    num_units: int
    reason: str


class KernelAxis(NamedTuple):
    """An axis along which a weight, given by its number, makes units."""

    weight: int
    axis: int


class UnitCount(NamedTuple):
    """A configuration value that falls from `number` by `factor` with each of the `units` that leaves."""

    units: IntArray
    factor: int
    number: int

    def new_value(self, kept: BoolArray) -> int:
        """The value for the kept entries of `units`, a bool array."""
        return self.number - self.factor * int((~kept).sum())


class UnitWork(NamedTuple):
    """Floating point operations: `factor` times the number of kept units along each axis."""

    factor: float
    axes: tuple[IntArray, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class InnerStructure:
    """The units inside a layer of some class and configuration, and where they occur.

    Units are numbered through all groups. The unit -1 stands for entries that always stay.

    Attributes:
        groups: The groups of units that can leave.
        weights: Number of a weight -> the unit of each entry along each of its axes, `None` for an axis
            without units.
        reads: Number of an inner layer -> the units of what it contracts.
        kernel_axes: Where units are made.
        config: Key of a configuration value -> what it counts.
        work: Floating point operations.
        keeps_examples: Whether examples are on the first axis of the outputs as they are in the inputs.
        locked: The groups of units that cannot leave.
    """

    groups: tuple[InnerGroup, ...]
    weights: Mapping[int, tuple[IntArray | None, ...]]
    reads: Mapping[int, IntArray]
    kernel_axes: tuple[KernelAxis, ...]
    config: Mapping[str, UnitCount]
    work: tuple[UnitWork, ...]
    keeps_examples: bool
    locked: tuple[LockedGroup, ...] = ()

    def make_effect(self, ctx: Context) -> Effect:
        """The rule of such a layer: channels of its inputs and outputs stay, units inside can leave."""
        if not self.groups:  # what is known is the work
            work = tuple(Work(f, tuple(np.full(len(u), FIXED) for u in axes)) for f, axes in self.work)
            return dataclasses.replace(unknown_operation(ctx), work=work)
        for tensor in ctx.inputs:
            ctx.lock(tensor.labels, f"read by {type(ctx.operation).__name__}, which loses only units inside")
        new_labels = [ctx.space.new_labels(num, f"{ctx.name}/{name}") for name, num in self.groups]
        label_of_unit = np.concatenate([*new_labels, [FIXED]])
        for number, labels_of_group in enumerate(new_labels):
            if self._is_shared(number):
                ctx.lock(
                    labels_of_group[:2],
                    "units that share it would be divided differently without one of these",
                )
        for name, num, reason in self.locked:
            ctx.lock(ctx.space.new_labels(num, f"{ctx.name}/{name}"), reason)

        def labels(axes: Sequence[IntArray | None]) -> tuple[IntArray | None, ...]:
            return tuple(None if units is None else label_of_unit[units] for units in axes)

        return Effect(
            outputs=[ctx.fixed_labels(k) for k in range(len(ctx.output_shapes))],
            weights={f"weights.{k}": labels(axes) for k, axes in self.weights.items()},
            config={
                key: Edit((label_of_unit[count.units],), count.new_value)
                for key, count in self.config.items()
            },
            work=tuple(Work(f, tuple(label_of_unit[units] for units in axes)) for f, axes in self.work),
            internal_reads=tuple(
                InternalRead(label_of_unit[units], _gate_input_of(k), k) for k, units in self.reads.items()
            ),
            inner_kernels=tuple((f"weights.{k}", axis) for k, axis in self.kernel_axes),
        )

    def axes_of(self, name: str) -> dict[WeightAxis, float]:
        """How many entries along axes of weights go with one unit of a group; NaN where units differ."""
        own, counts = self.units_of(name), dict[WeightAxis, float]()
        for weight, axes in self.weights.items():
            for axis, units in enumerate(axes):
                found = (
                    np.zeros(1) if units is None else np.bincount(units + 1, minlength=own[-1] + 2)[own + 1]
                )
                if found.any():
                    even = bool((found == found[0]).all())
                    counts[WeightAxis(weight, axis)] = float(found[0]) if even else np.nan
        return counts

    def units_of(self, name: str) -> IntArray:
        """The numbers of the units of a group."""
        start = 0
        for group in self.groups:
            if group.name == name:
                return np.arange(start, start + group.num_units)
            start += group.num_units
        raise KeyError(name)

    def config_changes(self, kept: BoolArray) -> dict[str, int]:
        """Configuration values for the kept units, a bool array `(num_units,)`."""
        return {key: count.new_value(kept_entries(count.units, kept)) for key, count in self.config.items()}

    def shapes_of(self, layer: keras.Layer, kept: BoolArray) -> list[Shape]:
        """Shapes of the weights of such a layer that remain with the kept units."""
        shapes: list[Shape] = [tuple(weight.shape) for weight in layer.weights]
        for number, masks in self.weight_masks(kept).items():
            shapes[number] = tuple(
                size if mask is None else int(mask.sum())
                for size, mask in zip(shapes[number], masks, strict=True)
            )
        return shapes

    def weight_masks(self, kept: BoolArray) -> dict[int, tuple[BoolArray | None, ...]]:
        """Number of a weight -> which entries along each of its axes are kept, `None` for all."""
        return {
            number: tuple(None if units is None else kept_entries(units, kept) for units in axes)
            for number, axes in self.weights.items()
        }

    def restricted_to(self, names: Collection[str]) -> InnerStructure:
        """The structure with only some of its groups, without configuration values.

        The units of other groups become -1.
        """
        groups = tuple(group for group in self.groups if group.name in names)
        numbers: list[int] = []
        num_units = 0
        for group in self.groups:
            if group in groups:
                numbers += range(num_units, num_units + group.num_units)
                num_units += group.num_units
            else:
                numbers += [-1] * group.num_units
        new_number = np.array([*numbers, -1])

        def renumber(units: IntArray | None) -> IntArray | None:
            return None if units is None or (new_number[units] < 0).all() else new_number[units]

        weights = {number: tuple(map(renumber, axes)) for number, axes in self.weights.items()}
        reads = {number: renumber(units) for number, units in self.reads.items()}
        return InnerStructure(
            groups=groups,
            weights=weights,
            reads={number: units for number, units in reads.items() if units is not None},
            kernel_axes=tuple(one for one in self.kernel_axes if weights[one.weight][one.axis] is not None),
            config={},
            keeps_examples=self.keeps_examples,
            work=tuple(UnitWork(f, tuple(new_number[units] for units in axes)) for f, axes in self.work),
        )

    def _is_shared(self, number: int) -> bool:
        """Whether units of a group occur several times along one axis, as heads that share a key do."""
        all_own = self.units_of(self.groups[number].name)
        axes = itertools.chain.from_iterable(self.weights.values())
        for units in (units for units in axes if units is not None):
            own = units[np.isin(units, all_own)]
            if np.unique(own).size < own.size == units.size:
                return True
        return False


def kept_entries(units: IntArray, kept: BoolArray) -> BoolArray:
    """Which entries stay along an axis with these units, for a bool array `(num_units,)`."""
    return np.append(kept, True)[units]


def _gate_input_of(number: int) -> Callable[[keras.Layer, Tensor], contextlib.AbstractContextManager[None]]:
    """A function of a closed layer and a gate that multiplies the input of an inner layer by the gate."""
    return lambda layer, gate: gate_inside(layer, {number: lambda x: x * keras.ops.cast(gate, x.dtype)})


@contextlib.contextmanager
def gate_inside(layer: keras.Layer, gates: Mapping[int, Gate]) -> Iterator[None]:
    """Within it, inner layers of a closed layer get gated inputs.

    Args:
        layer: The closed layer.
        gates: Number of an inner layer, among `layers_inside(layer)`, -> its gate.
    """
    inner = layers_inside(layer) if gates else []
    with contextlib.ExitStack() as stack:
        for number, gate in gates.items():
            call = _call_gated(inner[number].call, gate)
            stack.enter_context(override_attributes(inner[number], call=call))
        yield


@contextlib.contextmanager
def record_inside(layer: keras.Layer, number: int) -> Iterator[tuple[list[Array], list[Array]]]:
    """Within it, the inputs and the outputs of an inner layer are appended to two lists.

    Args:
        layer: The closed layer.
        number: Number of the inner layer, among `layers_inside(layer)`.

    Yields:
        The list of inputs and the list of outputs, one array for each time that the inner layer is called.
    """
    inner = layers_inside(layer)[number]
    inputs: list[Array] = []
    outputs: list[Array] = []

    def record_input(x: Tensor) -> Tensor:
        inputs.append(keras.ops.convert_to_numpy(x))
        return x

    call = _call_gated(inner.call, record_input)

    def call_and_record(*args: Any, **kwargs: Any) -> Tensor:
        y = call(*args, **kwargs)
        outputs.append(keras.ops.convert_to_numpy(y))
        return y

    with override_attributes(inner, call=call_and_record):
        yield inputs, outputs


def _call_gated(call: Callable[..., Any], gate: Gate) -> Callable[..., Any]:
    """A layer's `call` with a gate on its first argument."""

    def call_with_gate(*args: Any, **kwargs: Any) -> Any:
        if args:
            return call(gate(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))
        return call(**{**kwargs, name: gate(kwargs[name])})

    return call_with_gate


@contextlib.contextmanager
def trace_uncallable_layers(layer: keras.Layer) -> Iterator[None]:
    """Within it, inner layers that fail on symbolic tensors are traced through their `call`.

    A layer, or its parent class, may describe other outputs than it returns. Keras then refuses it.
    """
    with contextlib.ExitStack() as stack:
        for inner in layers_inside(layer):
            stack.enter_context(override_attributes(inner, symbolic_call=_call_symbolic_or_trace(inner)))
        yield


def _call_symbolic_or_trace(layer: keras.Layer) -> Callable[..., Any]:
    """A layer's `symbolic_call`; where it fails, the operations of its `call`."""
    symbolic_call = layer.symbolic_call

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return symbolic_call(*args, **kwargs)
        except Exception:
            return layer.call(*args, **kwargs)

    return call
