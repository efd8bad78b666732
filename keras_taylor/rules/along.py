"""Operations along one axis: repeats, rolls, running sums, stacks."""

import numpy as np

from keras_taylor.rules.base import Effect
from keras_taylor.rules.elementwise import locked, merged
from keras_taylor.rules.shape import on_batch


def repeat(ctx):
    """Each channel several times, side by side: the copies are one unit."""
    tensor, operation = ctx.inputs[0], ctx.operation
    if operation.axis is None:
        return on_batch(ctx)
    axis = operation.axis % tensor.rank
    if axis == 0:
        return on_batch(ctx)
    if tensor.channel_axis != axis:
        return Effect(outputs=[tensor.labels])
    if np.size(operation.repeats) != 1:
        return locked(ctx)
    return Effect(outputs=[ctx.placed(np.repeat(tensor.along(axis), operation.repeats), axis)])


def tile(ctx):
    """All channels several times, one after another: the copies are one unit."""
    tensor = ctx.inputs[0]
    repeats = [int(n) for n in np.atleast_1d(ctx.operation.repeats)]
    repeats = [1] * (tensor.rank - len(repeats)) + repeats
    if len(repeats) > tensor.rank or repeats[0] != 1:
        return on_batch(ctx)
    axis = tensor.channel_axis
    if axis is None:
        return Effect(outputs=[ctx.fixed()])
    return Effect(outputs=[ctx.placed(np.tile(tensor.along(axis), repeats[axis]), axis)])


def beside(ctx):
    """Acts along axes; channels on another one go through."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = () if axis is None else tuple(k % tensor.rank for k in np.atleast_1d(axis))
    if 0 in axes or not axes:
        return on_batch(ctx)
    return locked(ctx) if tensor.channel_axis in axes else Effect(outputs=[tensor.labels])


def triangle(ctx):
    """Zeros above or below the diagonal of the last two axes."""
    tensor = ctx.inputs[0]
    axis = tensor.channel_axis
    mixed = axis is not None and axis >= tensor.rank - 2
    return locked(ctx) if mixed or tensor.rank < 3 else Effect(outputs=[tensor.labels])


def stack(ctx):
    """A new axis; channels at the same place meet."""
    axis = ctx.operation.axis % len(ctx.output_shapes[0])
    if axis == 0:
        return on_batch(ctx)
    return Effect(outputs=[np.expand_dims(merged(ctx, ctx.inputs, ctx.inputs[0].rank), axis)])


def unstack(ctx):
    """An axis leaves, and its positions become tensors."""
    tensor = ctx.inputs[0]
    axis = ctx.operation.axis % tensor.rank
    if axis == 0:
        return on_batch(ctx)
    if tensor.channel_axis == axis:
        return locked(ctx)
    return Effect(outputs=[np.squeeze(tensor.labels, axis)] * len(ctx.output_shapes))
