"""Normalization layers, and layers with one weight a channel.

The functions `gated_...` run a normalization on `x` with a gate for every channel, an array that broadcasts
against `x`: statistics over the channels that are open. Where a gate is zero, the other channels come out as
if this one were not there. Axes are counted from the end.
"""

import dataclasses
import functools

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.base import Effect, count_kept, elementwise_work

# operations an element: what a fused scale and shift costs, and a full normalization
_SCALE_AND_SHIFT = 2.0
_NORMALIZE = 8.0


def batch_normalization(ctx):
    """Channels go through: at inference a scale and a shift of each."""
    vector = ctx.inputs[0].labels_along(ctx.operation.axis)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    return _per_channel(ctx, dict.fromkeys(names, (vector,)), work=_SCALE_AND_SHIFT)


def layer_normalization(ctx):
    """What is normalized together stays, but with `exact=False` goes through."""
    understood = not getattr(ctx.operation, "rms_scaling", False)
    return _over_axes(ctx, gated_layer_normalization, ("gamma", "beta"), understood)


def rms_normalization(ctx):
    """As LayerNormalization, over the last axes."""
    rank = ctx.inputs[0].rank
    axes = _axes(ctx)
    understood = axes == tuple(range(rank - len(axes), rank))  # else Keras scales along other axes
    return _over_axes(ctx, gated_rms_normalization, ("scale",), understood)


def unit_normalization(ctx):
    """As LayerNormalization, without weights."""
    return _over_axes(ctx, gated_unit_normalization, ())


def group_normalization(ctx):
    """What is normalized together leaves as a whole; all channels together only with `exact=False`."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer.axis % tensor.rank
    vector = tensor.labels_along(axis)
    if tensor.channel_axis not in (None, axis):
        return _stays(ctx)
    weights = {"gamma": (vector,), "beta": (vector,)}
    if layer.groups == 1 and tensor.channel_axis is not None:
        run = functools.partial(gated_group_normalization, axes=_from_end(tensor, range(1, tensor.rank)))
        return _let_through(ctx, run, weights)
    size = vector.size // layer.groups if layer.groups > 0 else 1
    if size > 1:
        ctx.union(vector, np.repeat(vector[::size], size))
        if not ctx.space.exact:
            # a later plan would take single channels out of the last group
            ctx.lock(vector[: 2 * size], "of several groups that are normalized two stay")
    return _per_channel(ctx, weights, {"groups": count_kept(vector[::size])}, work=_NORMALIZE)


def prelu(ctx):
    """Channels go through: one slope for every position that is not shared."""
    tensor = ctx.inputs[0]
    sizes = tuple(ctx.operation.alpha.shape)
    axes = tuple(
        tensor.labels_along(k) if k == tensor.channel_axis and sizes[k - 1] > 1 else None
        for k in range(1, tensor.rank)
    )
    return _per_channel(ctx, {"alpha": axes})


def layer_scale(ctx):
    """Channels go through: one factor each."""
    vector = ctx.inputs[0].labels_along(-1)
    return _per_channel(ctx, {"gamma": (vector,)}, {"projection_dim": count_kept(vector)})


def normalization(ctx):
    """Channels stay: its statistics are data of the user's."""
    ctx.lock(ctx.inputs[0].labels, "normalized with given statistics")
    return Effect(
        outputs=[ctx.fixed_labels()], work=elementwise_work(ctx.fixed_labels(), ctx.output_shapes[0], 2.0)
    )


def rescaling(ctx):
    """Channels go through where one scale and offset serves all."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        ctx.lock(tensor.labels, "rescaled with a list of factors")
        return Effect(
            outputs=[ctx.fixed_labels()], work=elementwise_work(ctx.fixed_labels(), tensor.shape, 2.0)
        )
    return _per_channel(ctx, {}, work=2.0)


def _over_axes(ctx, run, names, understood=True):
    """A normalization over `operation.axis`, with weights of the same axes."""
    tensor, axes = ctx.inputs[0], _axes(ctx)
    if tensor.channel_axis not in axes:
        return _per_channel(ctx, {}, work=_NORMALIZE)
    if not understood or list(axes) != sorted(axes):
        return _stays(ctx)
    along = tuple(tensor.labels_along(k) if k == tensor.channel_axis else None for k in axes)
    run = functools.partial(run, axes=_from_end(tensor, axes))
    return _let_through(ctx, run, dict.fromkeys(names, along))


def _let_through(ctx, run, weights):
    """What is normalized together goes through, or stays, as the caller of all this wants it."""
    if getattr(ctx.operation, "activity_regularizer", None) is not None:
        return _stays(ctx)
    if not ctx.record_normalization(ctx.inputs[0].labels):
        return _untouched(ctx)
    return dataclasses.replace(_per_channel(ctx, weights, work=_NORMALIZE), call_with_gate=run)


def _stays(ctx):
    ctx.lock(ctx.inputs[0].labels, "normalized together")
    return _untouched(ctx)


def _untouched(ctx):
    return Effect(
        outputs=[ctx.fixed_labels()],
        work=elementwise_work(ctx.fixed_labels(), ctx.inputs[0].shape, _NORMALIZE),
    )


def _axes(ctx):
    return tuple(int(k) % ctx.inputs[0].rank for k in np.atleast_1d(ctx.operation.axis))


def _from_end(tensor, axes):
    return tuple(k - tensor.rank for k in axes)


def _per_channel(ctx, weights, config=None, work=1.0):
    labels = ctx.inputs[0].labels
    return Effect(
        outputs=[labels],
        weights=weights,
        config=config or {},
        work=elementwise_work(labels, ctx.output_shapes[0], work),
    )


_LEAST = 1e-24  # Keras' 1e-12, squared


def gated_layer_normalization(layer, x, gate, axes):
    """`LayerNormalization`: mean and variance over open channels."""
    x, gate = _exact_enough(x, gate)
    centered = x - _mean(x, gate, axes)
    y = centered * ops.rsqrt(_mean(ops.square(centered), gate, axes) + layer.epsilon)
    return _output(layer, _scaled(y, layer.gamma, layer.beta, axes), gate)


def gated_rms_normalization(layer, x, gate, axes):
    """`RMSNormalization`: the mean square over open channels."""
    x, gate = _exact_enough(x, gate)
    y = x * ops.rsqrt(_mean(ops.square(x), gate, axes) + layer.epsilon)
    return _output(layer, _scaled(y, layer.scale, None, axes), gate)


def gated_unit_normalization(layer, x, gate, axes):
    """`UnitNormalization`: the sum of squares over open channels."""
    x, gate = _exact_enough(x, gate)
    total = ops.sum(ops.square(x) * gate, axes, keepdims=True)
    return _output(layer, x * ops.rsqrt(ops.maximum(total, _LEAST)), gate)


def gated_group_normalization(layer, x, gate, axes):
    """`GroupNormalization` with one group: mean and variance over all positions of open channels."""
    x, gate = _exact_enough(x, gate)
    centered = x - _mean(x, gate, axes)
    y = centered * ops.rsqrt(_mean(ops.square(centered), gate, axes) + layer.epsilon)
    axis = layer.axis if layer.axis < 0 else layer.axis - len(x.shape)
    return _output(layer, _scaled(y, layer.gamma, layer.beta, (axis,)), gate)


def _exact_enough(x, gate):
    """Both in float32 at least, as Keras' own layers compute."""
    dtype = keras.backend.result_type(x.dtype, "float32")
    return ops.cast(x, dtype), ops.cast(gate, dtype)


def _mean(x, gate, axes):
    return ops.mean(x * gate, axes, keepdims=True) / ops.mean(gate, axes, keepdims=True)


def _scaled(y, gamma, beta, axes):
    """Scale and shift, weights whose axes are `axes` of `y`."""
    shape = [1] * len(y.shape)
    for axis in axes:
        shape[axis] = y.shape[axis]
    if gamma is not None:
        y = y * ops.cast(ops.reshape(gamma, shape), y.dtype)
    if beta is not None:
        y = y + ops.cast(ops.reshape(beta, shape), y.dtype)
    return y


def _output(layer, y, gate):
    """Nothing for closed channels, whose values may be of any size."""
    return ops.cast(ops.where(gate > 0, y, ops.zeros_like(y)), layer.compute_dtype)
