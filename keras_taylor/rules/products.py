"""Products of two tensors without weights."""

import numpy as np

from keras_taylor.rules import elementwise
from keras_taylor.rules.base import Effect, Work, elements


def dot(ctx):
    """Channels that it sums over are one with those that they meet; others go through."""
    layer, (first, second) = ctx.operation, ctx.inputs
    axes = layer.axes if isinstance(layer.axes, (list, tuple)) else (layer.axes,) * 2
    axes = [axis % tensor.rank for axis, tensor in zip(axes, ctx.inputs, strict=True)]
    free = [_without(tensor, axis) for tensor, axis in zip(ctx.inputs, axes, strict=True)]
    rank = len(ctx.output_shapes[0])
    known = rank == free[0].ndim + free[1].ndim - 1 and 0 not in axes
    if layer.normalize or (not known and any(labels.size > 1 for labels in free)):
        return elementwise.locked(ctx)
    if all(labels.size > 1 for labels in free):
        for labels in free:
            ctx.lock(labels, "combined with channels on another axis")
        free = [np.zeros(1, np.int64)] * 2
    read = first.along(axes[0])
    ctx.union(read, second.along(axes[1]))
    outputs = ctx.fixed()
    if free[0].size > 1:
        outputs = free[0].reshape(free[0].shape + (1,) * (rank - free[0].ndim))
    elif free[1].size > 1:
        outputs = free[1].reshape((1,) * (rank - free[1].ndim + 1) + free[1].shape[1:])
    if axes[0] != first.channel_axis:
        factor = 2.0 * (np.nan if first.shape[axes[0]] is None else first.shape[axes[0]])
        return Effect(outputs=[outputs], work=elements(outputs, ctx.output_shapes[0], factor))
    work = [Work(2.0 * w.factor, (*w.axes, read)) for w in elements(outputs, ctx.output_shapes[0])]
    # one gate is enough: it multiplies the products
    return Effect(outputs=[outputs], reads={0: axes[0]}, work=tuple(work))


def _without(tensor, axis):
    """Labels of what is not summed over."""
    return np.take(tensor.labels, 0, axis) * (tensor.channel_axis != axis)
