"""Normalizations in which channels are closed: statistics over those that are open.

Each function runs a layer on `x` with a gate for every channel, an array that broadcasts
against `x`. Where a gate is zero, the other channels come out as if this one were not there.
Axes are counted from the end.
"""

import keras
from keras import ops

_LEAST = 1e-24  # Keras' 1e-12, squared


def layer_normalization(layer, x, gate, axes):
    """`LayerNormalization`: mean and variance over open channels."""
    x, gate = _exact_enough(x, gate)
    centered = x - _mean(x, gate, axes)
    y = centered * ops.rsqrt(_mean(ops.square(centered), gate, axes) + layer.epsilon)
    return _output(layer, _scaled(y, layer.gamma, layer.beta, axes), gate)


def rms_normalization(layer, x, gate, axes):
    """`RMSNormalization`: the mean square over open channels."""
    x, gate = _exact_enough(x, gate)
    y = x * ops.rsqrt(_mean(ops.square(x), gate, axes) + layer.epsilon)
    return _output(layer, _scaled(y, layer.scale, None, axes), gate)


def unit_normalization(layer, x, gate, axes):
    """`UnitNormalization`: the sum of squares over open channels."""
    x, gate = _exact_enough(x, gate)
    total = ops.sum(ops.square(x) * gate, axes, keepdims=True)
    return _output(layer, x * ops.rsqrt(ops.maximum(total, _LEAST)), gate)


def group_normalization(layer, x, gate, axes):
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
