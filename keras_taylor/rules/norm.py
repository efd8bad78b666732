"""Normalisation layers, and layers with one weight a channel."""

import dataclasses

import numpy as np

from keras_taylor.rules.base import Effect, channel_axis, count, elements

# operations an element: what a fused scale and shift costs, and a full normalisation
_SCALE_AND_SHIFT = 2.0
_NORMALISE = 8.0


def batch_normalization(ctx):
    """Channels go through: at inference a scale and a shift of each."""
    vector = ctx.inputs[0].along(ctx.operation.axis)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    return _per_channel(ctx, dict.fromkeys(names, (vector,)), work=_SCALE_AND_SHIFT)


def layer_normalization(ctx):
    """What is normalised together stays together."""
    tensor, axis = ctx.inputs[0], ctx.operation.axis
    axes = {k % tensor.rank for k in np.atleast_1d(axis)}
    if tensor.channel_axis in axes:
        ctx.lock(tensor.labels, "normalised together")
        return Effect(outputs=[ctx.fixed()], work=elements(ctx.fixed(), tensor.shape, _NORMALISE))
    return _per_channel(ctx, {}, work=_NORMALISE)


def group_normalization(ctx):
    """With one group a channel they go through, else what is normalised together stays."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer.axis % tensor.rank
    vector = tensor.along(axis)
    if tensor.channel_axis not in (None, axis) or layer.groups not in (-1, tensor.shape[axis]):
        ctx.lock(tensor.labels, "normalised together")
        return Effect(outputs=[ctx.fixed()], work=elements(ctx.fixed(), tensor.shape, _NORMALISE))
    config = {} if layer.groups == -1 else {"groups": count(vector)}
    return _per_channel(ctx, {"gamma": (vector,), "beta": (vector,)}, config, work=_NORMALISE)


def prelu(ctx):
    """Channels go through: one slope for every position that is not shared."""
    tensor = ctx.inputs[0]
    sizes = tuple(ctx.operation.alpha.shape)
    axes = tuple(
        tensor.along(k) if k == tensor.channel_axis and sizes[k - 1] > 1 else None
        for k in range(1, tensor.rank)
    )
    return _per_channel(ctx, {"alpha": axes})


def layer_scale(ctx):
    """Channels go through: one factor each."""
    vector = ctx.inputs[0].along(-1)
    return _per_channel(ctx, {"gamma": (vector,)}, {"projection_dim": count(vector)})


def normalization(ctx):
    """Channels stay: its statistics are data of the user's."""
    ctx.lock(ctx.inputs[0].labels, "normalised with given statistics")
    return Effect(outputs=[ctx.fixed()], work=elements(ctx.fixed(), ctx.output_shapes[0], 2.0))


def rescaling(ctx):
    """Channels go through where one scale and offset serves all."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        ctx.lock(tensor.labels, "rescaled with a list of factors")
        return Effect(outputs=[ctx.fixed()], work=elements(ctx.fixed(), tensor.shape, 2.0))
    return _per_channel(ctx, {}, work=2.0)


def spatial(ctx):
    """Channels go through, each by itself; space may change its size."""
    tensor = ctx.inputs[0]
    axis = channel_axis(ctx.operation, tensor)
    vector = ctx.contracted(0, axis)
    out_rank = len(ctx.output_shapes[0])
    out_axis = axis if out_rank == tensor.rank else 1  # a global pooling leaves (batch, channels)
    window = getattr(ctx.operation, "pool_size", 1)
    factor = float(np.prod(window)) if out_rank == tensor.rank else 1.0
    labels = ctx.placed(vector, out_axis)
    shape = ctx.output_shapes[0] if out_rank == tensor.rank else tensor.shape
    work_labels = labels if out_rank == tensor.rank else tensor.labels
    return Effect(outputs=[labels], work=elements(work_labels, shape, factor))


def moved(ctx):
    """Channels go through; space changes its size."""
    return dataclasses.replace(spatial(ctx), work=())


def _per_channel(ctx, weights, config=None, work=1.0):
    labels = ctx.inputs[0].labels
    return Effect(
        outputs=[labels],
        weights=weights,
        config=config or {},
        work=elements(labels, ctx.output_shapes[0], work),
    )
