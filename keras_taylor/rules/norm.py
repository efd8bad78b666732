"""Normalization layers, and layers with one weight for each channel.

The functions `_gated_...` run a normalization with a gate for each channel: its statistics cover the open
channels only. Where a gate is zero, the other channels get the values that they have without this channel.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
from keras import ops

from keras_taylor.rules.base import (
    Context,
    Edit,
    Effect,
    LabeledTensor,
    WeightLabels,
    count_kept,
    elementwise_work,
)
from keras_taylor.support.types import Tensor

# Operations for each element: of a scale and a shift, as fused at inference, and of a whole normalization.
_SCALE_AND_SHIFT_WORK = 2.0
_NORMALIZATION_WORK = 8.0

_LEAST_SQUARE_SUM = 1e-24  # Keras clips the norm at 1e-12


def batch_normalization(ctx: Context) -> Effect:
    """Channels go through: at inference, each has a scale and a shift."""
    channels = ctx.inputs[0].labels_along(ctx.operation.axis)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    return _channelwise_effect(ctx, dict.fromkeys(names, (channels,)), work=_SCALE_AND_SHIFT_WORK)


def layer_normalization(ctx: Context) -> Effect:
    """Channels that are normalized together stay. With `exact=False` they go through."""
    is_known = not getattr(ctx.operation, "rms_scaling", False)
    return _normalization_effect(ctx, _gated_layer_normalization, ("gamma", "beta"), is_known)


def rms_normalization(ctx: Context) -> Effect:
    """As LayerNormalization, over the last axes."""
    rank = ctx.inputs[0].rank
    axes = _normalized_axes(ctx)
    is_known = axes == tuple(range(rank - len(axes), rank))  # else Keras scales along other axes
    return _normalization_effect(ctx, _gated_rms_normalization, ("scale",), is_known)


def unit_normalization(ctx: Context) -> Effect:
    """As LayerNormalization, without weights."""
    return _normalization_effect(ctx, _gated_unit_normalization, ())


def group_normalization(ctx: Context) -> Effect:
    """Each group of channels leaves as a whole. A single group goes through with `exact=False` only."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    axis = layer.axis % tensor.rank
    channels = tensor.labels_along(axis)
    if tensor.channel_axis not in (None, axis):
        return _lock_normalized(ctx)
    weights: dict[str, WeightLabels] = {"gamma": (channels,), "beta": (channels,)}
    if layer.groups == 1 and tensor.channel_axis is not None:
        axes = _from_end(tensor, range(1, tensor.rank))
        return _open_if_allowed(ctx, functools.partial(_gated_group_normalization, axes=axes), weights)
    group_size = channels.size // layer.groups if layer.groups > 0 else 1
    if group_size > 1:
        ctx.union(channels, np.repeat(channels[::group_size], group_size))
        if not ctx.space.exact:
            # A later plan would take single channels out of the last group.
            ctx.lock(channels[: 2 * group_size], "at least two groups of a group normalization stay")
    config = {"groups": count_kept(channels[::group_size])}
    return _channelwise_effect(ctx, weights, config, work=_NORMALIZATION_WORK)


def prelu(ctx: Context) -> Effect:
    """Channels go through: each has a slope of its own, or shares one."""
    tensor = ctx.inputs[0]
    sizes = tuple(ctx.operation.alpha.shape)
    axes = tuple(
        tensor.labels_along(k) if k == tensor.channel_axis and sizes[k - 1] > 1 else None
        for k in range(1, tensor.rank)
    )
    return _channelwise_effect(ctx, {"alpha": axes})


def layer_scale(ctx: Context) -> Effect:
    """Channels go through: each has a factor."""
    channels = ctx.inputs[0].labels_along(-1)
    return _channelwise_effect(ctx, {"gamma": (channels,)}, {"projection_dim": count_kept(channels)})


def normalization(ctx: Context) -> Effect:
    """Channels stay: mean and variance are given by the user."""
    ctx.lock(ctx.inputs[0].labels, "normalized with given statistics")
    return _fixed_effect(ctx, _SCALE_AND_SHIFT_WORK)


def rescaling(ctx: Context) -> Effect:
    """Channels go through if all have the same scale and offset."""
    layer, tensor = ctx.operation, ctx.inputs[0]
    if np.ndim(layer.scale) or np.ndim(layer.offset):
        ctx.lock(tensor.labels, "rescaled with a list of factors")
        return _fixed_effect(ctx, _SCALE_AND_SHIFT_WORK)
    return _channelwise_effect(ctx, {}, work=_SCALE_AND_SHIFT_WORK)


def _normalization_effect(
    ctx: Context, call_with_gate: Callable[..., Tensor], names: Sequence[str], is_known: bool = True
) -> Effect:
    """The effect of a normalization over `operation.axis`.

    Args:
        ctx: The call.
        call_with_gate: One of the functions `_gated_...`.
        names: Its weights, which have the normalized axes.
        is_known: Whether `call_with_gate` computes this configuration of the layer.
    """
    tensor, axes = ctx.inputs[0], _normalized_axes(ctx)
    if tensor.channel_axis not in axes:
        return _channelwise_effect(ctx, {}, work=_NORMALIZATION_WORK)
    if not is_known or list(axes) != sorted(axes):
        return _lock_normalized(ctx)
    labels = tuple(tensor.labels_along(k) if k == tensor.channel_axis else None for k in axes)
    call_with_gate = functools.partial(call_with_gate, axes=_from_end(tensor, axes))
    return _open_if_allowed(ctx, call_with_gate, dict.fromkeys(names, labels))


def _open_if_allowed(
    ctx: Context, call_with_gate: Callable[..., Tensor], weights: Mapping[str, WeightLabels]
) -> Effect:
    """The effect of a normalization over channels: they go through with `exact=False`, else they stay."""
    if getattr(ctx.operation, "activity_regularizer", None) is not None:
        return _lock_normalized(ctx)
    if not ctx.record_normalization(ctx.inputs[0].labels):
        return _fixed_effect(ctx, _NORMALIZATION_WORK)
    labels = ctx.inputs[0].labels
    return Effect(
        outputs=[labels],
        weights=weights,
        call_with_gate=call_with_gate,
        work=elementwise_work(labels, ctx.output_shapes[0], _NORMALIZATION_WORK),
    )


def _channelwise_effect(
    ctx: Context,
    weights: Mapping[str, WeightLabels],
    config: Mapping[str, Edit] | None = None,
    work: float = 1.0,
) -> Effect:
    """The effect of an operation that lets channels through, with this work for each element."""
    labels = ctx.inputs[0].labels
    return Effect(
        outputs=[labels],
        weights=weights,
        config=config or {},
        work=elementwise_work(labels, ctx.output_shapes[0], work),
    )


def _lock_normalized(ctx: Context) -> Effect:
    """The effect of a normalization over channels that cannot go through."""
    ctx.lock(ctx.inputs[0].labels, "normalized together")
    return _fixed_effect(ctx, _NORMALIZATION_WORK)


def _fixed_effect(ctx: Context, work: float) -> Effect:
    """The effect of an operation whose output has no channels, with this work for each element."""
    labels = ctx.fixed_labels()
    return Effect(outputs=[labels], work=elementwise_work(labels, ctx.inputs[0].shape, work))


def _normalized_axes(ctx: Context) -> tuple[int, ...]:
    """The axes over which the layer normalizes, counted from the start."""
    return tuple(int(k) % ctx.inputs[0].rank for k in np.atleast_1d(ctx.operation.axis))


def _from_end(tensor: LabeledTensor, axes: Sequence[int]) -> tuple[int, ...]:
    """The same axes, counted from the end."""
    return tuple(k - tensor.rank for k in axes)


def _gated_layer_normalization(layer: keras.Layer, x: Tensor, gate: Tensor, axes: Sequence[int]) -> Tensor:
    """`LayerNormalization` with mean and variance over open channels: m = sum(g x) / sum(g).

    Args:
        layer: The layer.
        x: Its input.
        gate: A gate for each channel, which broadcasts against `x`.
        axes: The normalized axes, counted from the end.
    """
    return _gated_standardization(layer, x, gate, axes, weight_axes=axes)


def _gated_rms_normalization(layer: keras.Layer, x: Tensor, gate: Tensor, axes: Sequence[int]) -> Tensor:
    """`RMSNormalization` with the mean square over open channels."""
    x, gate = _as_float32(x, gate)
    y = x * ops.rsqrt(_gated_mean(ops.square(x), gate, axes) + layer.epsilon)
    return _only_open(layer, _scale_and_shift(y, layer.scale, None, axes), gate)


def _gated_unit_normalization(layer: keras.Layer, x: Tensor, gate: Tensor, axes: Sequence[int]) -> Tensor:
    """`UnitNormalization` with the sum of squares over open channels."""
    x, gate = _as_float32(x, gate)
    total = ops.sum(ops.square(x) * gate, axes, keepdims=True)
    return _only_open(layer, x * ops.rsqrt(ops.maximum(total, _LEAST_SQUARE_SUM)), gate)


def _gated_group_normalization(layer: keras.Layer, x: Tensor, gate: Tensor, axes: Sequence[int]) -> Tensor:
    """`GroupNormalization` of one group with mean and variance over all positions of open channels."""
    axis = layer.axis if layer.axis < 0 else layer.axis - len(x.shape)
    return _gated_standardization(layer, x, gate, axes, weight_axes=(axis,))


def _gated_standardization(
    layer: keras.Layer, x: Tensor, gate: Tensor, axes: Sequence[int], weight_axes: Sequence[int]
) -> Tensor:
    """`x` with mean 0 and variance 1 over the open channels, then with the layer's scale and shift."""
    x, gate = _as_float32(x, gate)
    centered = x - _gated_mean(x, gate, axes)
    y = centered * ops.rsqrt(_gated_mean(ops.square(centered), gate, axes) + layer.epsilon)
    return _only_open(layer, _scale_and_shift(y, layer.gamma, layer.beta, weight_axes), gate)


def _as_float32(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or float64: Keras' own layers compute no statistics in a smaller type."""
    dtype = keras.backend.result_type(x.dtype, "float32")
    return ops.cast(x, dtype), ops.cast(gate, dtype)


def _gated_mean(x: Tensor, gate: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over these axes, weighted by the gates; the axes keep size 1."""
    return ops.mean(x * gate, axes, keepdims=True) / ops.mean(gate, axes, keepdims=True)


def _scale_and_shift(
    y: Tensor, gamma: keras.Variable | None, beta: keras.Variable | None, axes: Sequence[int]
) -> Tensor:
    """`y * gamma + beta` for weights whose axes are these axes of `y`."""
    shape = [1] * len(y.shape)
    for axis in axes:
        shape[axis] = y.shape[axis]
    if gamma is not None:
        y = y * ops.cast(ops.reshape(gamma, shape), y.dtype)
    if beta is not None:
        y = y + ops.cast(ops.reshape(beta, shape), y.dtype)
    return y


def _only_open(layer: keras.Layer, y: Tensor, gate: Tensor) -> Tensor:
    """The output with zeros in closed channels, whose values may be of any size."""
    return ops.cast(ops.where(gate > 0, y, ops.zeros_like(y)), layer.compute_dtype)
