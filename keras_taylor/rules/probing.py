"""Functions tried out on random numbers: does each value, each channel stand for itself?"""

import keras
import numpy as np
from keras import ops

_SCALES = (0.1, 1.0, 10.0)  # of random inputs, each with a seed of its own
_NUM_SUBSETS = 6
_TOLERANCE = {"float32": 1e-5, "float64": 1e-5}  # relative; other types are less exact
_valuewise: dict = {}


def is_elementwise_function(function):
    """Whether a function of one tensor looks at one value at a time, as far as random inputs tell."""
    if function not in _valuewise:
        _valuewise[function] = _holds(lambda: _check_values(_on_arrays(function)))
    return _valuewise[function]


def is_channelwise(run, run_anew, shape, axis, dtype="float32"):
    """Whether what comes out in a channel depends on this channel of this example only, and in one way.

    Args:
        run: A function from an array of this shape to an array.
        run_anew: The same, made anew, for arrays with fewer channels.
        shape: Of the input, all sizes known.
        axis: Of its channels.
        dtype: Name of the type that it computes in.
    """
    return _holds(lambda: _check_channels(run, run_anew, shape, axis, _TOLERANCE.get(dtype, 1e-2)))


class _NotSoError(Exception):
    pass


def _holds(check):
    try:
        check()
    except Exception:  # whatever goes wrong: it is not known to hold
        return False
    return True


def _check_values(run):
    for seed, scale in enumerate(_SCALES):
        random = np.random.default_rng(seed)
        x = scale * random.normal(size=(3, 4, 5)).astype("float32")
        y = _finite(run(x))
        _same(run(x), y)
        order = random.permutation(x.size)
        _same(run(x.reshape(-1)[order].reshape(4, 15)).reshape(-1), y.reshape(-1)[order])
        _same(run(x[:1, :1, :2]), y[:1, :1, :2])
        for _ in range(_NUM_SUBSETS):
            stays = random.random(x.shape) < 0.5
            _same(run(np.where(stays, x, 0))[stays], y[stays])


def _check_channels(run, run_anew, shape, axis, tolerance):
    def taken(array, channels):
        return np.compress(channels, array, axis)

    for seed, scale in enumerate(_SCALES):
        random = np.random.default_rng(seed)
        x, other = scale * random.normal(size=(2, *shape)).astype("float32")
        y = _finite(run(x))
        if y.shape != x.shape:
            raise _NotSoError
        _same(run(x), y, tolerance)
        order = random.permutation(shape[axis])
        _same(run(np.take(x, order, axis)), np.take(y, order, axis), tolerance)
        _same(run(np.concatenate([x[:1], other[1:]]))[:1], y[:1], tolerance)
        for k in range(_NUM_SUBSETS):
            chosen = random.random(shape[axis]) < 0.5
            chosen[random.choice(shape[axis], 2, replace=False)] = True, False
            for stays in (chosen, ~chosen):
                mask = np.expand_dims(stays, [a for a in range(len(shape)) if a != axis])
                changed = run(np.where(mask, x, other if k % 2 else 0).astype("float32"))
                _same(taken(changed, stays), taken(y, stays), tolerance)
                _same(run_anew(taken(x, stays)), taken(y, stays), tolerance)


def _same(given, wanted, tolerance=1e-5):
    if given.shape != wanted.shape or not np.abs(given - wanted).max() <= tolerance * np.abs(wanted).max():
        raise _NotSoError


def _finite(y):
    if not np.isfinite(y).all():
        raise _NotSoError
    return y


def _on_arrays(function):
    def run(x):
        y = function(ops.convert_to_tensor(np.asarray(x, np.float32)))
        if not keras.ops.is_tensor(y):
            raise _NotSoError
        return np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")))

    return run
