"""What a rule is: a function from one call of an operation to the effect of that call on channels.

Every position along a channel axis has an integer *label*. Channels with equal labels are one unit, and leave
together. The label 0 (`labels.FIXED`) marks a position that always stays. Labels of a whole tensor are an
array of the tensor's rank, with size 1 along every axis but the one of the channels: a tensor of shape
`(batch, 28, 28, 64)` has labels of shape `(1, 1, 1, 64)`, or `(1, 1, 1, 1)` if it has no channels.

A rule gets a `Context` (one call: the operation, the labels of its inputs, its arguments) and returns an
`Effect`: the labels of the outputs, the labels along the axes of each weight, and the configuration values
that change. Costs, gates and surgery follow from the effect, so a rule is all that a new layer needs. A rule
never guesses: it locks channels (`Context.lock`, `lock_inputs`) where it does not know that they may leave.

The rule of a layer like `Dense`, which reads the last axis of its input and makes units of its own:

>>> import keras, keras_taylor
>>> from keras_taylor.rules.base import Context, Effect, Work, count_kept, num_elements
>>> class Project(keras.layers.Dense):
...     pass
>>> @keras_taylor.register_rule(Project)
... def project(ctx: Context) -> Effect:
...     last = ctx.inputs[0].rank - 1
...     read = ctx.input_labels(0, last)  # one label for each channel of the input
...     units = ctx.new_labels(ctx.operation.units)  # the layer makes these channels
...     positions = num_elements(ctx.inputs[0].shape, skip=(last,))
...     return Effect(
...         outputs=[ctx.output_labels(units, last)],
...         weights={"kernel": (read, units), "bias": (units,)},  # rows and columns that leave
...         config={"units": count_kept(units)},  # the smaller layer is made with fewer units
...         reads={0: last},  # the layer sums over this axis of input 0, so a gate can sit there
...         work=(Work(2.0 * positions, (read, units)),),  # a multiplication and an addition for each weight
...     )
>>> model = keras.Sequential([keras.Input((4,)), Project(8, name="wide"), keras.layers.Dense(2)])
>>> [(group.name, group.num_units) for group in keras_taylor.analyze(model).groups if group.prunable]
[('wide', 8)]
"""

import contextlib
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import keras
import numpy as np

from keras_taylor.rules.labels import FIRST_AXIS, FIXED, BatchAxis, LabelSpace
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.types import BoolArray, IntArray, Masks, Shape, Tensor

EditKey = TypeVar("EditKey")  # of a configuration value (a path) or of a call argument (its position)

# Labels along each axis of a weight, `None` for an axis that stays whole.
WeightLabels: TypeAlias = tuple[IntArray | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LabeledTensor:
    """The labels and the shape of one tensor.

    Attributes:
        labels: int64 array of the tensor's rank. It has size 1 along every axis on which labels do not vary,
            the batch axis among them. At most one axis varies.
        shape: Sizes of all axes, `None` where unknown. The first one is the batch axis, if `batch` does not
            say otherwise; then the size of the batch axis is that for one example.
        batch: Where the examples are; `None` if no gate can follow them.
    """

    labels: IntArray
    shape: Shape
    batch: BatchAxis | None = FIRST_AXIS

    @property
    def rank(self) -> int:
        """Number of axes, the batch axis included."""
        return len(self.shape)

    @property
    def channel_axis(self) -> int | None:
        """The axis along which labels vary, `None` if the tensor has no channels."""
        return next((k for k, size in enumerate(self.labels.shape) if size > 1), None)

    @property
    def batch_axis(self) -> int | None:
        """The axis of the examples, `None` if unknown."""
        return None if self.batch is None else self.batch.axis

    def labels_along(self, axis: int) -> IntArray:
        """Returns the labels along an axis: int64 `(shape[axis],)`, empty if the size is unknown."""
        axis %= self.rank
        if self.channel_axis == axis:
            return self.labels.reshape(-1)
        return np.full(self.shape[axis] or 0, FIXED)


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """A value of a configuration or of a call that depends on which channels stay.

    Attributes:
        labels: The label arrays that the value depends on.
        new_value: Computes the value for the smaller operation. It gets one bool array for each array in
            `labels`, of the same shape: True for a channel that stays.
    """

    labels: tuple[IntArray, ...]
    new_value: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """A number of floating point operations: `factor` times the number of channels that stay in each array.

    A dense layer on one vector does `Work(2.0, (read, units))`: a multiplication and an addition for each
    pair of a channel it reads and a unit it makes.

    Attributes:
        factor: Operations for each combination of channels. NaN where a size is unknown.
        labels: Label arrays `(num,)`. What stays of each multiplies the factor.
    """

    factor: float
    labels: tuple[IntArray, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class InternalRead:
    """Channels that an operation reads from inside itself, where no tensor of the graph can carry a gate.

    A recurrent layer reads its own state. A closed composite layer reads what its inner layers pass on.

    Attributes:
        labels: Labels of the values that it reads, an array of their rank.
        apply_gate: `apply_gate(operation, gate)` is a context manager. Within it, a call of the operation (or
            of a copy) multiplies these values by `gate`, a tensor that broadcasts to them.
        layer_number: The position of the inner layer that reads them among `attention.inner_layers`; `None`
            for a recurrent layer's state.
    """

    labels: IntArray
    apply_gate: Callable[[keras.Operation, Tensor], contextlib.AbstractContextManager[None]]
    layer_number: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Effect:
    """The effect of one call on labels, and how the operation shrinks when channels leave.

    Only `outputs` is required. Everything else is empty for an operation without weights that lets channels
    through, such as an activation.

    Attributes:
        outputs: For each output tensor its label array, of the output's rank (`Context.output_labels`,
            `Context.fixed_labels`).
        weights: For each weight the labels along each of its axes, `None` for an axis that stays whole. The
            key is the attribute path of the weight (`"cell.kernel"`), or `"weights.3"` for
            `operation.weights[3]`.
        config: Edits of configuration values by key. The key may be a path: `"layer.config.units"`.
        arguments: Edits of call arguments by position in the flattened call.
        reads: The axis that the operation sums over, for each input (by number) whose channels it mixes.
            Gates multiply the input on this edge of the graph.
        internal_reads: Channels that the operation reads from inside itself. Gates belong there, too.
        call_with_gate: For an operation that normalizes its channels together and lets them through.
            `call_with_gate(operation, x, gate)` returns the output that the operation has without the
            channels whose gate is zero. `gate` broadcasts against `x`.
        work: Floating point operations of one example; of one row, if an example has several on the first
            axis. They follow from shapes alone: what locks its channels has the work that it has without any.
        batches: Where the examples are in each output, `None` in the place of one where gates cannot follow
            them. By default they are where they were in the inputs.
        has_rule: False if no rule knows the operation. The report names it.
        accelerate: `accelerate(layer)` changes a copy of the layer in place, so that its derivatives cost
            less and its values stay the same. `None` if there is no such change.
        inner_kernels: Path and axis of the weights in which a closed composite layer makes the units inside
            it. `producing_kernels` finds the kernels of other layers by itself.
    """

    outputs: Sequence[IntArray]
    weights: Mapping[str, WeightLabels] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    arguments: Mapping[int, Edit] = dataclasses.field(default_factory=dict)
    reads: Mapping[int, int] = dataclasses.field(default_factory=dict)
    internal_reads: tuple[InternalRead, ...] = ()
    call_with_gate: Callable[[keras.Layer, Tensor, Tensor], Tensor] | None = None
    work: tuple[Work, ...] = ()
    batches: Sequence[BatchAxis | None] | None = None
    has_rule: bool = True
    accelerate: Callable[[keras.Layer], None] | None = None
    inner_kernels: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One call of an operation, as a rule sees it.

    Attributes:
        space: Hands out labels, and collects unions and locks.
        name: Name of the operation in the graph, `"block/conv"` inside a sub-model. Reasons quote it.
        operation: The layer or `keras.ops` operation.
        inputs: Labels and shape of each input tensor, in the order of the flattened call.
        input_positions: Position of each input among the flattened arguments.
        constants: The flattened arguments, with `None` in the place of each input tensor.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        output_shapes: Shape of each output tensor, the batch axis first, `None` where unknown.
        recorded_shapes: Shapes of the inputs, then of the outputs, also with `None` on a batch axis that is
            not the first one.
        closed_reason: Why the operations inside a custom layer could not be read; `None` if they need not be.
    """

    space: LabelSpace
    name: str
    operation: keras.Operation
    inputs: Sequence[LabeledTensor]
    input_positions: Sequence[int]
    constants: Sequence[Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output_shapes: Sequence[Shape]
    recorded_shapes: Sequence[Shape]
    closed_reason: str | None = None

    def new_labels(self, num: int) -> IntArray:
        """Returns labels for `num` channels that this call makes: int64 `(num,)`."""
        return self.space.new_labels(num, self.name)

    def input_labels(self, index: int, axis: int) -> IntArray:
        """Returns the labels of an input along the one axis where the operation handles channels.

        Channels on any other axis of this input are locked: the operation would mix them.

        Args:
            index: Number of the input.
            axis: The axis, negative to count from the end.

        Returns:
            int64 array `(inputs[index].shape[axis],)`.
        """
        tensor = self.inputs[index]
        axis %= tensor.rank
        if tensor.channel_axis not in (None, axis):
            self.lock(tensor.labels, "summed over an axis that is not the channel axis")
        return tensor.labels_along(axis)

    def output_labels(self, channels: IntArray, axis: int, output: int = 0) -> IntArray:
        """Returns the label array of an output whose channels lie along one axis.

        Args:
            channels: Labels along this axis, `(num,)`.
            axis: The axis, negative to count from the end.
            output: Number of the output.

        Returns:
            int64 array of the output's rank, for `Effect.outputs`.
        """
        rank = len(self.output_shapes[output])
        shape = [1] * rank
        shape[axis % rank] = -1
        channels = np.asarray(channels)
        has_channels = channels.size > 1 and channels.any()
        return channels.reshape(shape) if has_channels else self.fixed_labels(output)

    def fixed_labels(self, output: int = 0) -> IntArray:
        """Returns the label array of an output without channels: `FIXED`, size 1 along every axis."""
        return np.full((1,) * len(self.output_shapes[output]), FIXED)

    def lock(self, labels: IntArray, reason: str) -> None:
        """Keeps these channels for good. Reports quote the reason and the name of the operation."""
        self.space.lock(labels, f"{reason} ('{self.name}')")

    def union(self, first: IntArray, second: IntArray) -> None:
        """Makes channels that meet in this operation one unit. The arrays broadcast against each other."""
        self.space.union(first, second, f"meets values in '{self.name}' that stay whole")

    def record_normalization(self, labels: IntArray) -> bool:
        """Records that these channels are normalized together.

        Returns:
            Whether they may leave (`exact=False`). If not, they are locked.
        """
        return self.space.record_normalization(labels, type(self.operation).__name__, self.name)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Returns an argument of the call that may be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def passes_channels(self, mixed: Sequence[int]) -> bool:
        """Whether channels of the first input pass on an axis that the layer does not mix.

        Then the layer's own units stay, also in a smaller model that has a single channel on this axis.

        Args:
            mixed: The axes that the layer mixes.
        """
        axis = self.inputs[0].channel_axis
        if axis in mixed:
            return False
        if axis is not None:
            self.space.passed.add(self.name)
        return self.name in self.space.passed

    def merge_to_one_axis(self, labels: IntArray) -> IntArray:
        """Returns labels that vary along one axis at most.

        Where labels vary along several axes, the longest one remains, or the one that remained in the
        original: channels that share a position on it become one unit.

        Args:
            labels: int64 array of a tensor's rank.

        Returns:
            int64 array of the same rank.
        """
        varying = [k for k, size in enumerate(labels.shape) if size > 1]
        for axis in list(varying):
            first = np.take(labels, [0], axis)
            if (labels == first).all():
                labels = first
                varying.remove(axis)
        longest = max(varying, key=lambda k: (labels.shape[k], k), default=0)
        axis = self.space.split_axes.get(self.name, longest)
        if len(varying) > 1:
            self.space.split_axes[self.name] = axis
        if labels.shape[axis] == 1:
            self.lock(labels, "the only channel on its axis")
            return np.full((1,) * labels.ndim, FIXED)
        for other in varying:
            if other != axis:
                first = np.take(labels, [0], other)
                self.union(labels, np.broadcast_to(first, labels.shape))
                labels = np.maximum(first, labels.max(other, keepdims=True))
        return labels


Rule: TypeAlias = Callable[[Context], Effect]


def lock_inputs(
    ctx: Context, reason: str = "read by an operation that mixes channels", work: Sequence[Work] = ()
) -> Effect:
    """The effect of an operation that mixes channels, so that none of them may leave."""
    for tensor in ctx.inputs:
        ctx.lock(tensor.labels, reason)
    return Effect(outputs=[ctx.fixed_labels(k) for k in range(len(ctx.output_shapes))], work=tuple(work))


def lock_batch_operation(ctx: Context) -> Effect:
    """The effect of an operation that adds, removes or mixes examples: a gate must know its example."""
    effect = lock_inputs(ctx, "read by an operation on the batch axis")
    return dataclasses.replace(effect, batches=[None] * len(ctx.output_shapes))


def unknown_operation(ctx: Context) -> Effect:
    """Channels stay: no rule knows the operation, and the report names it."""
    reason = f"stays closed: {ctx.closed_reason}" if ctx.closed_reason else "has no rule"
    twin = _layer_twin(ctx.operation, ctx.inputs[0].rank - 2)
    reason += f" (`keras.layers.{twin}` has one)" if twin else ""
    effect = lock_inputs(ctx, f"read by {type(ctx.operation).__name__}, which {reason}")
    return dataclasses.replace(effect, has_rule=False)


def _layer_twin(operation: keras.Operation, num_space_axes: int) -> str | None:
    """Name of the layer that does what an operation of `keras.ops` does, `None` if there is none."""
    if isinstance(operation, keras.Layer):
        return None
    wanted = {type(operation).__name__, f"{type(operation).__name__}ing"}
    names = (name for name in dir(keras.layers) if re.sub(r"\dD", "", name) in wanted)
    return next((name for name in names if f"{num_space_axes}D" in name or not re.search(r"\dD", name)), None)


def count_kept(labels: IntArray) -> Edit:
    """Returns an edit to the number of these channels that stay."""
    return Edit((labels,), lambda kept: int(kept.sum()))


def size_product(sizes: Iterable[int | None]) -> float:
    """The product of sizes of axes, NaN where one is unknown."""
    return math.prod(math.nan if size is None else size for size in sizes)


def num_elements(shape: Shape, skip: Sequence[int] = ()) -> float:
    """Number of elements of one example, without the axes in `skip`; NaN where a size is unknown."""
    return size_product(size for axis, size in enumerate(shape) if axis and axis not in skip)


def elementwise_work(labels: IntArray, shape: Shape, factor: float = 1.0) -> tuple[Work, ...]:
    """The work of `factor` operations for every element of a tensor.

    Args:
        labels: Labels of the tensor, an array of its rank.
        shape: Shape of the tensor.
        factor: Operations for each element.
    """
    tensor = LabeledTensor(labels, shape)
    axis = tensor.channel_axis
    if axis is None:
        return (Work(factor * num_elements(shape)),)
    return (Work(factor * num_elements(shape, (axis,)), (tensor.labels_along(axis),)),)


def layer_channel_axis(layer: keras.Layer, tensor: LabeledTensor) -> int:
    """The channel axis of a layer with a `data_format`; the last axis without one."""
    is_first = getattr(layer, "data_format", None) == "channels_first"
    return 1 if is_first else tensor.rank - 1


def weight_of(operation: keras.Operation, path: str) -> keras.Variable | None:
    """The weight of an operation at a path of `Effect.weights`, `None` if it has no such weight.

    The path is that of an attribute (`"cell.kernel"`), or `"weights.3"` for the fourth of all weights, those
    of inner layers included.
    """
    head, _, number = path.rpartition(".")
    if head == "weights":
        return operation.weights[int(number)]
    try:
        return operator.attrgetter(path)(operation)
    except AttributeError:
        return None


def weight_axes(operation: keras.Operation, effect: Effect) -> dict[int, WeightLabels]:
    """Labels along the axes of an operation's weights, by the weight's position in `operation.weights`."""
    numbers = IdentityMap((weight, number) for number, weight in enumerate(getattr(operation, "weights", ())))
    weights = ((weight_of(operation, path), axes) for path, axes in effect.weights.items())
    return {numbers[weight]: axes for weight, axes in weights if weight in numbers}


@dataclasses.dataclass(frozen=True)
class KeptLabels:
    """Which channels stay, and the weights, configuration values and call arguments that follow from it.

    Attributes:
        mask: A function from a label array to a bool array of the same shape: True for a channel that stays.
    """

    mask: Callable[[IntArray], BoolArray]

    def changes(self, edits: Mapping[EditKey, Edit]) -> dict[EditKey, Any]:
        """Returns the new value of each edit, without edits whose channels all stay."""
        masks = {key: [self.mask(labels) for labels in edit.labels] for key, edit in edits.items()}
        return {
            key: edit.new_value(*masks[key])
            for key, edit in edits.items()
            if not all(mask.all() for mask in masks[key])
        }

    def weight_masks(self, operation: keras.Operation, effect: Effect) -> dict[int, Masks]:
        """Returns what stays along each axis of a weight, by its position in `operation.weights`."""
        return {
            number: [None if labels is None else self.mask(labels) for labels in axes]
            for number, axes in weight_axes(operation, effect).items()
        }


class ProducingKernel(NamedTuple):
    """A kernel that makes channels: one slice along `axis` is the filter of one channel.

    Attributes:
        path: Path of the weight, as in `Effect.weights`.
        axis: The axis along which the kernel makes channels.
        labels: Labels along this axis, `(kernel.shape[axis],)`.
    """

    path: str
    axis: int
    labels: IntArray


def producing_kernels(effect: Effect) -> Iterator[ProducingKernel]:
    """Yields the kernels that make the units an operation counts in its configuration."""
    units = [labels for edit in effect.config.values() for labels in edit.labels]
    units = [labels for labels in units if _is_repeated(effect.outputs[0].reshape(-1), labels)]
    for path, axes in effect.weights.items():
        found = [
            (k, a) for k, a in enumerate(axes) if a is not None and any(_is_repeated(a, u) for u in units)
        ]
        if found and not path.endswith("bias") and len(axes) > 1:
            # The last axis: a recurrent kernel reads the same units along the axis before.
            yield ProducingKernel(path, *found[-1])
    for path, axis in effect.inner_kernels:
        labels = effect.weights[path][axis]
        if labels is not None:
            yield ProducingKernel(path, axis, labels)


def _is_repeated(labels: IntArray, once: IntArray) -> bool:
    """Whether `labels` are `once`, one or several times: a layer with several gates repeats its units."""
    times = labels.size // max(once.size, 1)
    return times > 0 and np.array_equal(labels, np.tile(once, times))


@contextlib.contextmanager
def override_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Within this context, an object has other attributes. Keras' tracking of attributes does not see it."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


def is_from_keras(item: Any) -> bool:
    """Whether a class or function is defined by Keras. A user's subclass may do anything in `call`."""
    return item.__module__.split(".")[0] == "keras"
