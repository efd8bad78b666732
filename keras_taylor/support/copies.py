"""Copies of variables' values without some channels, a block at a time."""

import math

import numpy as np
from keras import ops

_BLOCK_BYTES = 4 * 2**20
_MOST_PARTS = 16  # JAX concatenates so many at a time: with more there would be a third copy in between


def kept_copy(variable, masks=()):
    """A variable's value without what masks leave out, in memory of its own.

    Beside it there are only its parts and a few blocks of the whole value: `ops.convert_to_numpy` copies all
    that it gets, and TensorFlow copies an array twice to make a tensor of it. JAX donates buffers, so what
    a source holds must never be handed on as it is.

    Args:
        variable: A Keras variable.
        masks: For each axis a bool array or `None`; may be shorter than there are axes.

    Returns:
        An array or tensor that nobody else holds.
    """
    shape = tuple(variable.shape)
    masks = [None if mask is None or mask.all() else mask for mask in masks]
    if math.prod(shape) * 4 <= _MOST_PARTS * _BLOCK_BYTES:
        return _cut(ops.convert_to_numpy(variable), masks)
    axis = int(np.argmax(shape))
    length = max(_BLOCK_BYTES * shape[axis] // (4 * math.prod(shape)), 1)
    starts = range(0, shape[axis], length)
    some = -(-len(starts) // _MOST_PARTS)
    parts = [
        ops.convert_to_tensor(
            np.concatenate(
                [_block(variable, axis, start, length, masks) for start in starts[k : k + some]], axis
            )
        )
        for k in range(0, len(starts), some)
    ]
    return ops.concatenate(parts, axis)


def _block(variable, axis, start, length, masks):
    begin, size = [0] * len(variable.shape), list(variable.shape)
    begin[axis], size[axis] = start, min(length, size[axis] - start)
    masks = [
        mask[start : start + length] if k == axis and mask is not None else mask
        for k, mask in enumerate(masks)
    ]
    return _cut(ops.convert_to_numpy(ops.slice(variable.value, begin, size)), masks)


def _cut(value, masks):
    """An array of its own without what the masks leave out."""
    cut = value
    for axis, mask in enumerate(masks):
        if mask is not None:
            cut = np.compress(mask, cut, axis)
    return np.array(value) if cut is value else cut
