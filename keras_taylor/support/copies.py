"""Copies of variables' values without some channels, a block at a time."""

import math

import numpy as np
from keras import KerasTensor, Variable, ops

from keras_taylor.support.types import Array, BoolArray, Masks, Tensor

BLOCK_BYTES = 4 * 2**20
_MOST_PARTS = 16  # JAX concatenates this many arrays at a time; more would take a third copy


def copy_kept(variable: Variable | KerasTensor, masks: Masks = ()) -> Array | Tensor:
    """A variable's value without the entries that masks leave out, in memory of its own.

    The function needs memory for the parts of the result and a few blocks of the value, not for a second
    whole value: `ops.convert_to_numpy` copies everything it gets, and TensorFlow copies an array twice to
    make a tensor of it. JAX donates buffers, so a source's own array must never be handed on.

    Args:
        variable: A Keras variable.
        masks: A bool array for each axis, or `None` for an axis that stays whole; may be shorter than the
            number of axes.

    Returns:
        An array or tensor that nobody else holds.
    """
    shape = tuple(variable.shape)
    masks = [None if mask is None or mask.all() else mask for mask in masks]
    if math.prod(shape) * 4 <= _MOST_PARTS * BLOCK_BYTES:
        return _compress(ops.convert_to_numpy(variable), masks)
    axis = int(np.argmax(shape))
    length = max(BLOCK_BYTES * shape[axis] // (4 * math.prod(shape)), 1)
    starts = range(0, shape[axis], length)
    blocks_a_part = -(-len(starts) // _MOST_PARTS)
    parts = [
        ops.convert_to_tensor(
            np.concatenate(
                [
                    _copy_block(variable, axis, start, length, masks)
                    for start in starts[k : k + blocks_a_part]
                ],
                axis,
            )
        )
        for k in range(0, len(starts), blocks_a_part)
    ]
    return ops.concatenate(parts, axis)


def _copy_block(variable: Variable, axis: int, start: int, length: int, masks: Masks) -> Array:
    """The kept entries of `length` positions along an axis."""
    begin, size = [0] * len(variable.shape), list(variable.shape)
    begin[axis], size[axis] = start, min(length, size[axis] - start)
    of_block: list[BoolArray | None] = [
        mask[start : start + length] if k == axis and mask is not None else mask
        for k, mask in enumerate(masks)
    ]
    return _compress(ops.convert_to_numpy(ops.slice(variable.value, begin, size)), of_block)


def _compress(value: Array, masks: Masks) -> Array:
    """A new array without the entries that the masks leave out."""
    cut = value
    for axis, mask in enumerate(masks):
        if mask is not None:
            cut = np.compress(mask, cut, axis)
    return np.array(value) if cut is value else cut
