"""Functions run on random numbers: does each value, or each channel, depend on itself only?"""

import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_taylor.support.types import Array, BoolArray, Tensor

_INPUT_SCALES = (0.1, 1.0, 10.0)  # of random inputs, each with its own seed
_NUM_SUBSETS = 6
_PROBE_TOLERANCE = {"float32": 1e-5, "float64": 1e-5}  # relative to the largest value
_LOW_PRECISION_PROBE_TOLERANCE = 1e-2  # for all other types


@functools.cache
def is_elementwise_function(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether each output value depends on the input value at the same place only, judged by random inputs.

    Args:
        function: A function from one tensor to one tensor. The result is remembered.
    """
    return _passes(lambda: _check_elements(_on_arrays(function)))


def is_channelwise(
    run: Callable[[Array], Array],
    run_smaller: Callable[[Array], Array],
    shape: tuple[int, ...],
    axis: int,
    dtype: str = "float32",
) -> bool:
    """Whether each output channel depends on the same channel of the same example only, and all in one way.

    The answer is judged by random inputs.

    Args:
        run: The function, from an array of this shape to an array.
        run_smaller: The same function for arrays with fewer channels. An operation is cloned for each call.
        shape: Shape of the input.
        axis: The channel axis.
        dtype: Name of the type in which the function computes.
    """
    tolerance = _PROBE_TOLERANCE.get(dtype, _LOW_PRECISION_PROBE_TOLERANCE)
    return _passes(lambda: _check_channels(run, run_smaller, shape, axis, tolerance))


class _ProbeFailedError(Exception):
    """A random input contradicts what was to be shown."""


def _passes(check: Callable[[], None]) -> bool:
    """Whether a check runs without an error of any kind: a function that fails proves nothing."""
    try:
        check()
    except Exception:
        return False
    return True


def _check_elements(run: Callable[[Array], Array]) -> None:
    """Raises an error unless values can be reordered, left out and zeroed without an effect on others."""
    for seed, scale in enumerate(_INPUT_SCALES):
        random = np.random.default_rng(seed)
        x = scale * random.normal(size=(3, 4, 5)).astype("float32")
        y = _require_finite(run(x))
        _require_equal(run(x), y)
        order = random.permutation(x.size)
        _require_equal(run(x.reshape(-1)[order].reshape(4, 15)).reshape(-1), y.reshape(-1)[order])
        _require_equal(run(x[:1, :1, :2]), y[:1, :1, :2])
        for _ in range(_NUM_SUBSETS):
            stays = random.random(x.shape) < 0.5
            _require_equal(run(np.where(stays, x, 0))[stays], y[stays])


def _check_channels(
    run: Callable[[Array], Array],
    run_smaller: Callable[[Array], Array],
    shape: tuple[int, ...],
    axis: int,
    tolerance: float,
) -> None:
    """Raises an error unless channels can be reordered, changed and removed without an effect on others."""

    def select(array: Array, channels: BoolArray) -> Array:
        return np.compress(channels, array, axis)

    num_channels = shape[axis]
    for seed, scale in enumerate(_INPUT_SCALES):
        random = np.random.default_rng(seed)
        x, other = scale * random.normal(size=(2, *shape)).astype("float32")
        y = _require_finite(run(x))
        if y.shape != x.shape:
            raise _ProbeFailedError
        _require_equal(run(x), y, tolerance)
        order = random.permutation(num_channels)
        _require_equal(run(np.take(x, order, axis)), np.take(y, order, axis), tolerance)
        _require_equal(run(np.concatenate([x[:1], other[1:]]))[:1], y[:1], tolerance)
        for k in range(_NUM_SUBSETS):
            chosen = random.random(num_channels) < 0.5
            chosen[random.choice(num_channels, 2, replace=False)] = True, False
            for stays in (chosen, ~chosen):
                mask = np.expand_dims(stays, [a for a in range(len(shape)) if a != axis])
                changed = run(np.where(mask, x, other if k % 2 else 0).astype("float32"))
                _require_equal(select(changed, stays), select(y, stays), tolerance)
                _require_equal(run_smaller(select(x, stays)), select(y, stays), tolerance)


def _require_equal(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    """Raises an error unless two arrays are equal, up to `tolerance` times the largest expected value."""
    if found.shape != expected.shape:
        raise _ProbeFailedError
    if not np.abs(found - expected).max() <= tolerance * np.abs(expected).max():
        raise _ProbeFailedError


def _require_finite(y: Array) -> Array:
    """The same array; raises an error if a value is infinite or NaN."""
    if not np.isfinite(y).all():
        raise _ProbeFailedError
    return y


def _on_arrays(function: Callable[[Tensor], Tensor]) -> Callable[[Array], Array]:
    """The function from float32 arrays to float32 arrays."""

    def run(x: Array) -> Array:
        y = function(ops.convert_to_tensor(np.asarray(x, np.float32)))
        if not keras.ops.is_tensor(y):
            raise _ProbeFailedError
        return np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")))

    return run
