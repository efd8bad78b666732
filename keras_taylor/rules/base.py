"""What a rule is: the effect of one operation on labels, and how it shrinks."""

import contextlib
import dataclasses
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import keras
import numpy as np

from keras_taylor.rules.labels import FIXED
from keras_taylor.rules.probing import is_elementwise_function
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.types import BoolArray, IntArray, Masks

EditKey = TypeVar("EditKey")  # of a configuration value (a path) or of a call argument (its position)


@dataclasses.dataclass(frozen=True, eq=False)
class LabeledTensor:
    """Labels of a tensor: an int array of its rank, size 1 along every axis (the
    batch's among them) on which they do not vary. At most one axis varies."""

    labels: np.ndarray
    shape: tuple

    @property
    def rank(self):
        """Number of axes, the batch's among them."""
        return len(self.shape)

    @property
    def channel_axis(self):
        """The axis along which labels vary, `None` where nothing here is a channel."""
        return next((k for k, size in enumerate(self.labels.shape) if size > 1), None)

    def labels_along(self, axis):
        """Labels of the positions along `axis`, an int64 array `(shape[axis],)`."""
        axis %= self.rank
        if self.channel_axis == axis:
            return self.labels.reshape(-1)
        return np.full(self.shape[axis] or 0, FIXED)


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """How a configuration value or an argument follows from what is kept.

    `new_value(*masks)` gets, for each label array, a bool array: kept or not.
    """

    labels: tuple
    new_value: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Floating point operations: `factor` times the widths of these axes."""

    factor: float
    labels: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class InternalRead:
    """What an operation reads where no tensor of the graph is: of its own past, or inside of it.

    Attributes:
        labels: Label array of it.
        apply_gate: `apply_gate(operation, gate)` is a context: within it a call of the operation (or of a
            copy) reads this times `gate`, a tensor that broadcasts to it.
        layer_number: That of the inner layer which reads it, among all inner layers; `None` for the past.
    """

    labels: np.ndarray
    apply_gate: Callable[..., Any]
    layer_number: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Effect:
    """What an operation does to labels, and everything that shrinking it needs.

    Attributes:
        outputs: Label array of each output tensor.
        weights: For each weight (attribute path, `"cell.kernel"`), the labels along
            each of its axes, `None` for an axis that stays whole.
        config: Edits of configuration values, by key (a path: `"layer.config.units"`).
        arguments: Edits of call arguments, by position in the flattened call.
        reads: For each input (by number) that is contracted: the axis. A gate
            belongs on this edge.
        internal_reads: What it reads elsewhere, `InternalRead` each: gates belong there, too.
        call_with_gate: For an operation that normalizes channels together, and lets them through: a
            function of it, of its input and of a gate for each channel of that, which puts out
            what the operation would without the channels whose gate is zero.
        work: Floating point operations of one example.
        has_rule: False where no rule knows the operation.
        accelerate: Makes a copy of the layer cheaper to differentiate, in place, its
            values the same; `None` where there is no such way.
        inner_kernels: Weights with the axis along which they make the units inside of it.
    """

    outputs: list
    weights: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    arguments: Mapping[int, Edit] = dataclasses.field(default_factory=dict)
    reads: Mapping[int, int] = dataclasses.field(default_factory=dict)
    internal_reads: tuple = ()
    call_with_gate: Callable[..., Any] | None = None
    work: tuple = ()
    has_rule: bool = True
    accelerate: Callable[..., None] | None = None
    inner_kernels: tuple = ()  # of (weight, axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """What a rule gets to see of a call."""

    space: Any  # LabelSpace
    name: str
    operation: Any
    inputs: list  # of LabeledTensor
    input_positions: list  # of each input among the flattened arguments
    constants: list  # the flattened arguments, `None` in the place of each tensor
    args: tuple
    kwargs: dict
    output_shapes: list
    closed: str | None = None  # why a layer could not be opened

    def new_labels(self, num):
        """Labels of channels that this call makes."""
        return self.space.new_labels(num, self.name)

    def lock(self, labels, why):
        """Keeps these labels for ever; the report says why and where."""
        self.space.lock(labels, f"{why} ('{self.name}')")

    def record_normalization(self, labels):
        """Notes that these are normalized together; says whether they may leave (`exact=False`)."""
        return self.space.record_normalization(labels, type(self.operation).__name__, self.name)

    def union(self, first, second):
        """Makes labels that meet here one."""
        self.space.union(first, second, f"meets values that are no channels in '{self.name}'")

    def fixed_labels(self, output=0):
        """Labels of an output that has no channels."""
        return np.full((1,) * len(self.output_shapes[output]), FIXED)

    def output_labels(self, vector, axis, output=0):
        """Labels of an output that vary along one axis as `vector` does."""
        rank = len(self.output_shapes[output])
        shape = [1] * rank
        shape[axis % rank] = -1
        vector = np.asarray(vector)
        return vector.reshape(shape) if vector.size > 1 and vector.any() else self.fixed_labels(output)

    def input_labels(self, index, axis):
        """Labels along the axis that an operation sums over; others of the tensor are locked."""
        tensor = self.inputs[index]
        axis %= tensor.rank
        if tensor.channel_axis not in (None, axis):
            self.lock(tensor.labels, "summed together over an axis that is not the channels'")
        return tensor.labels_along(axis)

    def argument(self, position, name, default=None):
        """A call argument that is no tensor."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def merge_to_one_axis(self, labels):
        """Labels on one axis at most: where two vary, those of one slice become one unit."""
        varying = [k for k, size in enumerate(labels.shape) if size > 1]
        for axis in list(varying):
            first = np.take(labels, [0], axis)
            if (labels == first).all():
                labels = first
                varying.remove(axis)
        if not varying:
            self.lock(labels, "stands alone on its axis")
            return np.zeros_like(labels)
        axis = max(varying, key=lambda k: (labels.shape[k], k))
        for other in varying:
            if other != axis:
                first = np.take(labels, [0], other)
                self.union(labels, np.broadcast_to(first, labels.shape))
                labels = np.maximum(first, labels.max(other, keepdims=True))
        return labels


def lock_inputs(ctx, why="read by an operation that mixes channels"):
    """Mixes channels in a way that no channel may leave."""
    for tensor in ctx.inputs:
        ctx.lock(tensor.labels, why)
    outputs = [ctx.fixed_labels(k) for k in range(len(ctx.output_shapes))]
    return Effect(outputs=outputs)


def unknown_operation(ctx):
    """No rule knows the operation: it stays as it is, and the report names it."""
    why = f"stays closed: {ctx.closed}" if ctx.closed else "has no rule"
    for tensor in ctx.inputs:
        ctx.lock(tensor.labels, f"read by {type(ctx.operation).__name__}, which {why}")
    outputs = [ctx.fixed_labels(k) for k in range(len(ctx.output_shapes))]
    return Effect(outputs=outputs, has_rule=False)


def weight_of(operation, path):
    """The weight of an operation at an attribute path (`"cell.kernel"`), `None` if it has none.

    `"weights.3"` is the fourth of all its weights, those of inner layers among them.
    """
    head, _, number = path.rpartition(".")
    if head == "weights":
        return operation.weights[int(number)]
    try:
        return operator.attrgetter(path)(operation)
    except AttributeError:
        return None


def weight_axes(operation, effect: Effect) -> dict[int, tuple[IntArray | None, ...]]:
    """Labels along the axes of an operation's weights, by the weight's position in `operation.weights`."""
    numbers = IdentityMap((weight, number) for number, weight in enumerate(getattr(operation, "weights", ())))
    weights = ((weight_of(operation, name), axes) for name, axes in effect.weights.items())
    return {numbers[weight]: axes for weight, axes in weights if weight in numbers}


@dataclasses.dataclass(frozen=True)
class KeptLabels:
    """Which labels stay, and what follows for weights, configuration values and call arguments.

    Attributes:
        mask: A function from a label array to a bool array of the same shape: kept or not.
    """

    mask: Callable[[IntArray], BoolArray]

    def changes(self, edits: Mapping[EditKey, Edit]) -> dict[EditKey, Any]:
        """New values of what is edited, without those that stay because all their labels do."""
        masks = {key: [self.mask(labels) for labels in edit.labels] for key, edit in edits.items()}
        return {
            key: edit.new_value(*masks[key])
            for key, edit in edits.items()
            if not all(mask.all() for mask in masks[key])
        }

    def weight_masks(self, operation, effect: Effect) -> dict[int, Masks]:
        """What stays along each axis of a weight, by the weight's position in `operation.weights`."""
        return {
            number: [None if labels is None else self.mask(labels) for labels in axes]
            for number, axes in weight_axes(operation, effect).items()
        }


def producing_kernels(effect):
    """Kernels with the axis along which they make channels: name, axis, labels."""
    made = [m for edit in effect.config.values() for m in edit.labels]
    made = [m for m in made if _repeats(effect.outputs[0].reshape(-1), m)]
    for name, axes in effect.weights.items():
        found = [k for k, a in enumerate(axes) if a is not None and any(_repeats(a, m) for m in made)]
        if found and not name.endswith("bias") and len(axes) > 1:
            yield name, found[-1], axes[found[-1]]  # recurrent kernels read, before, what they make
    for name, axis in effect.inner_kernels:
        yield name, axis, effect.weights[name][axis]


def _repeats(labels, once):
    """Whether labels are these, once or several times: the units of a layer with several gates."""
    times = labels.size // max(once.size, 1)
    return times > 0 and np.array_equal(labels, np.tile(once, times))


@contextlib.contextmanager
def override_attributes(owner, **values):
    """Within it an object has other attributes, out of sight of Keras' tracking."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update(before)


def is_from_keras(cls):
    """Whether a class or function is one of Keras' own: a user's subclass may do anything."""
    return cls.__module__.split(".")[0] == "keras"


def count_kept(labels):
    """An edit: as many as are kept of these labels."""
    return Edit((labels,), lambda kept: int(kept.sum()))


def layer_channel_axis(layer, tensor):
    """The channel axis of a layer with a `data_format`."""
    first = getattr(layer, "data_format", None) == "channels_first"
    return 1 if first else tensor.rank - 1


def num_elements(shape, skip=()):
    """Number of elements of one example, axes in `skip` left out; unknown counts as NaN."""
    dims = [d for k, d in enumerate(shape) if k and k not in skip]
    return math.nan if None in dims else math.prod(dims)


def elementwise_work(tensor_labels, shape, factor=1.0):
    """Work of `factor` operations for every element of a tensor."""
    tensor = LabeledTensor(tensor_labels, shape)
    axis = tensor.channel_axis
    if axis is None:
        return (Work(factor * num_elements(shape)),)
    return (Work(factor * num_elements(shape, (axis,)), (tensor.labels_along(axis),)),)


_ELEMENTWISE = {
    *("linear", "relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "swish", "mish", "sigmoid"),
    *("hard_sigmoid", "tanh", "hard_tanh", "softplus", "softsign", "exponential", "leaky_relu"),
    *("hard_silu", "hard_swish", "log_sigmoid", "soft_shrink", "hard_shrink", "tanh_shrink"),
    *("squareplus", "sparse_plus", "sparse_sigmoid", "threshold"),
}


def is_elementwise(activation):
    """Whether this is one of Keras' activations that look at one value at a time."""
    if isinstance(activation, keras.layers.Activation):
        return is_elementwise(activation.activation)
    if isinstance(activation, keras.Layer):
        return type(activation) in (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)
    if any(activation is getattr(keras.activations, name, None) for name in _ELEMENTWISE):
        return True
    return _is_custom(activation) and is_elementwise_function(activation)


def is_probed_activation(operation):
    """Whether a layer's activation is the user's, and was found to look at one value at a time."""
    activation = vars(operation).get("activation")
    return _is_custom(activation) and is_elementwise_function(activation)


def _is_custom(activation):
    """Functions only: what has a state could change its mind."""
    return inspect.isfunction(activation) and activation.__module__.split(".")[0] != "keras"
