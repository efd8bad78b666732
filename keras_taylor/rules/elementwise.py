"""Operations that look at one position at a time: activations, sums, products."""

import numpy as np

from keras_taylor.rules.base import Edit, Effect, LabeledTensor, elementwise_work, is_elementwise, lock_inputs
from keras_taylor.rules.labels import FIXED


def unary(ctx):
    """Channels go through: one value in, one value out."""
    labels = ctx.inputs[0].labels
    return Effect(outputs=[labels], work=elementwise_work(labels, ctx.output_shapes[0]))


def identity(ctx):
    """Channels go through: nothing changes at inference."""
    return Effect(outputs=[ctx.inputs[0].labels])


def activation(ctx):
    """Channels go through where the function is known to look at one value at a time."""
    return unary(ctx) if is_elementwise(ctx.operation.activation) else lock_inputs(ctx)


def softmax(ctx):
    """What is normalized together stays together; a mask may go with it."""
    tensor, axis = ctx.inputs[0], getattr(ctx.operation, "axis", -1)
    axes = range(tensor.rank) if axis is None else [k % tensor.rank for k in np.atleast_1d(axis)]
    if any(_raised(t, tensor.rank).channel_axis in axes for t in ctx.inputs):
        for mixed in ctx.inputs:
            ctx.lock(mixed.labels, "normalized together")
        return Effect(
            outputs=[ctx.fixed_labels()], work=elementwise_work(ctx.fixed_labels(), tensor.shape, 3.0)
        )
    labels = broadcast_labels(ctx, ctx.inputs, tensor.rank)
    return Effect(
        outputs=[labels], arguments=_constants(ctx, labels), work=elementwise_work(labels, tensor.shape, 3.0)
    )


def masking(ctx):
    """Channels stay: whether a step is masked depends on all of them."""
    return lock_inputs(ctx, "decides with others whether a step is masked")


def merge(ctx):
    """Channels that meet become one, with broadcasting; constants are cut too."""
    labels = broadcast_labels(ctx, ctx.inputs, len(ctx.output_shapes[0]))
    factor = float(max(1, len(ctx.inputs) - 1))
    return Effect(
        outputs=[labels],
        arguments=_constants(ctx, labels),
        work=elementwise_work(labels, ctx.output_shapes[0], factor),
    )


def broadcast_labels(ctx, tensors, rank):
    """Labels of tensors that broadcast against each other, an array of `rank` axes."""
    tensors = [_raised(t, rank) for t in tensors]
    axes = {t.channel_axis for t in tensors} - {None}
    if len(axes) != 1:
        for tensor in tensors:
            ctx.lock(tensor.labels, "combined with channels on another axis")
        return np.full((1,) * rank, FIXED)
    (axis,) = axes
    result = None
    for tensor in tensors:
        if tensor.channel_axis is None and tensor.shape[axis] == 1:
            continue  # broadcast: it meets every channel and belongs to none
        labels = tensor.labels_along(axis)
        labels = labels if labels.size else np.full(1, FIXED)  # of unknown size
        if result is not None:
            ctx.union(result, labels)
        result = labels if result is None else np.maximum(result, labels)
    shape = [1] * rank
    shape[axis] = -1
    return result.reshape(shape)


def _raised(tensor, rank):
    missing = (1,) * (rank - tensor.rank)
    return LabeledTensor(tensor.labels.reshape(missing + tensor.labels.shape), missing + tensor.shape)


def _constants(ctx, labels):
    """Edits of numeric constants that have a channel axis, as in `x * np.array(...)`."""
    axis = LabeledTensor(labels, ctx.output_shapes[0]).channel_axis
    edits = {}
    for position, value in enumerate(ctx.constants):
        if axis is None or not hasattr(value, "shape"):
            continue
        from_end = labels.ndim - axis
        if len(value.shape) >= from_end and value.shape[-from_end] > 1:
            edits[position] = cut_constant(value, len(value.shape) - from_end, labels.reshape(-1))
    return edits


def cut_constant(value, axis, vector):
    """An edit: a constant with what is kept along one of its axes."""
    return Edit((vector,), lambda kept: np.compress(kept, np.asarray(value), axis))
