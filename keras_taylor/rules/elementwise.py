"""Operations that treat each position alike: activations, sums and products with broadcasting."""

import inspect
from collections.abc import Sequence

import keras
import numpy as np

from keras_taylor.rules.base import Context, Edit, Effect, LabeledTensor, elementwise_work, lock_inputs
from keras_taylor.rules.labels import FIXED
from keras_taylor.rules.probing import is_elementwise_function
from keras_taylor.support.types import Array, IntArray

# Keras' activations, by name, whose outputs each depend on the input value at the same place only.
_ELEMENTWISE_ACTIVATIONS = {
    *("linear", "relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "swish", "mish", "sigmoid"),
    *("hard_sigmoid", "tanh", "hard_tanh", "softplus", "softsign", "exponential", "leaky_relu"),
    *("hard_silu", "hard_swish", "log_sigmoid", "soft_shrink", "hard_shrink", "tanh_shrink"),
    *("squareplus", "sparse_plus", "sparse_sigmoid", "threshold"),
}
_SOFTMAX_WORK = 3.0  # operations for each element: exponential, sum, division


def unary(ctx: Context) -> Effect:
    """Channels go through: each output value depends on one input value."""
    labels = ctx.inputs[0].labels
    return Effect(outputs=[labels], work=elementwise_work(labels, ctx.output_shapes[0]))


def identity(ctx: Context) -> Effect:
    """Channels go through: nothing changes at inference."""
    return Effect(outputs=[ctx.inputs[0].labels])


def clip(ctx: Context) -> Effect:
    """Channels go through if all have the same bounds."""
    operation = ctx.operation
    if np.ndim(operation.x_min) or np.ndim(operation.x_max):
        return lock_inputs(ctx, "clipped to a list of bounds")
    return unary(ctx)


def activation_layer(ctx: Context) -> Effect:
    """Channels go through if the function is known to be elementwise."""
    return unary(ctx) if is_elementwise(ctx.operation.activation) else lock_inputs(ctx)


def softmax(ctx: Context) -> Effect:
    """Channels stay if they are normalized together, else they go through."""
    tensor, axis = ctx.inputs[0], getattr(ctx.operation, "axis", -1)
    axes = range(tensor.rank) if axis is None else [k % tensor.rank for k in np.atleast_1d(axis)]
    if any(_with_rank(t, tensor.rank).channel_axis in axes for t in ctx.inputs):
        for mixed in ctx.inputs:
            ctx.lock(mixed.labels, "normalized together")
        labels = ctx.fixed_labels()
        return Effect(outputs=[labels], work=elementwise_work(labels, tensor.shape, _SOFTMAX_WORK))
    labels = broadcast_labels(ctx, ctx.inputs, tensor.rank)
    return Effect(
        outputs=[labels],
        arguments=_constant_edits(ctx, labels),
        work=elementwise_work(labels, tensor.shape, _SOFTMAX_WORK),
    )


def masking(ctx: Context) -> Effect:
    """Channels stay: all of them decide whether a step is masked."""
    return lock_inputs(ctx, "decides together with other channels whether a step is masked")


def merge(ctx: Context) -> Effect:
    """Channels that meet become one unit, with broadcasting. Constants lose the same channels."""
    labels = broadcast_labels(ctx, ctx.inputs, len(ctx.output_shapes[0]))
    factor = float(max(1, len(ctx.inputs) - 1))
    return Effect(
        outputs=[labels],
        arguments=_constant_edits(ctx, labels),
        work=elementwise_work(labels, ctx.output_shapes[0], factor),
    )


def where(ctx: Context) -> Effect:
    """Channels that meet become one unit, with broadcasting. Without values to choose from, they stay."""
    return lock_inputs(ctx) if ctx.argument(1, "x1") is None else merge(ctx)


def broadcast_labels(ctx: Context, tensors: Sequence[LabeledTensor], rank: int) -> IntArray:
    """Returns the labels of tensors that broadcast against each other, and unites the channels that meet.

    Args:
        ctx: The call in which they meet.
        tensors: The tensors, of at most `rank` axes each.
        rank: Number of axes of the result.

    Returns:
        int64 array of this rank.
    """
    tensors = [_with_rank(t, rank) for t in tensors]
    axes = {t.channel_axis for t in tensors if t.channel_axis is not None}
    if len(axes) != 1:
        for tensor in tensors:
            ctx.lock(tensor.labels, "combined with channels on another axis")
        return np.full((1,) * rank, FIXED)
    (axis,) = axes
    meeting = []
    for tensor in tensors:
        if tensor.channel_axis is None and tensor.shape[axis] == 1:
            continue  # it broadcasts: it meets every channel and belongs to none
        labels = tensor.labels_along(axis)
        meeting.append(labels if labels.size else np.full(1, FIXED))  # the size may be unknown
    result = meeting[0]
    for labels in meeting[1:]:
        ctx.union(result, labels)
        result = np.maximum(result, labels)
    shape = [1] * rank
    shape[axis] = -1
    return result.reshape(shape)


def cut_constant(value: Array, axis: int, labels: IntArray) -> Edit:
    """Returns an edit that keeps the entries of a constant array whose channels stay.

    Args:
        value: The constant.
        axis: Its channel axis.
        labels: Labels along this axis, `(value.shape[axis],)`.
    """
    return Edit((labels,), lambda kept: np.compress(kept, np.asarray(value), axis))


def is_elementwise(activation: object) -> bool:
    """Whether an activation is known to compute each value from the value at the same place only.

    Args:
        activation: A function or layer. A user's own function is run on random numbers.
    """
    if isinstance(activation, keras.layers.Activation):
        return is_elementwise(activation.activation)
    if isinstance(activation, keras.Layer):
        return type(activation) in (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)
    if any(activation is getattr(keras.activations, name, None) for name in _ELEMENTWISE_ACTIVATIONS):
        return True
    return _is_custom_function(activation) and is_elementwise_function(activation)


def lock_unless_elementwise(ctx: Context, labels: IntArray) -> None:
    """Keeps these channels if the layer's activation may mix them."""
    if not is_elementwise(ctx.operation.activation):
        ctx.lock(labels, "goes through an activation that may mix channels")


def is_probed_activation(operation: keras.Operation) -> bool:
    """Whether an operation has a user's activation that proved elementwise on random numbers."""
    activation = vars(operation).get("activation")
    return _is_custom_function(activation) and is_elementwise_function(activation)


def _is_custom_function(activation: object) -> bool:
    """Whether this is a user's function. A callable object has a state, which may change its results."""
    return inspect.isfunction(activation) and activation.__module__.split(".")[0] != "keras"


def _with_rank(tensor: LabeledTensor, rank: int) -> LabeledTensor:
    """The tensor with axes of size 1 in front, as broadcasting adds them."""
    missing = (1,) * (rank - tensor.rank)
    return LabeledTensor(tensor.labels.reshape(missing + tensor.labels.shape), missing + tensor.shape)


def _constant_edits(ctx: Context, labels: IntArray) -> dict[int, Edit]:
    """Edits of array constants that have a channel axis, as in `x * np.array(...)`, by position.

    Args:
        ctx: The call.
        labels: Labels of the output, an array of its rank.
    """
    axis = LabeledTensor(labels, ctx.output_shapes[0]).channel_axis
    edits: dict[int, Edit] = {}
    for position, value in enumerate(ctx.constants):
        if axis is None or not hasattr(value, "shape"):
            continue
        from_end = labels.ndim - axis
        if len(value.shape) >= from_end and value.shape[-from_end] > 1:
            edits[position] = cut_constant(value, len(value.shape) - from_end, labels.reshape(-1))
    return edits
