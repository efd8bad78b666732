"""Arrays for the inputs and outputs of a model, and values of tensors: copies, zeros, rounded ones.

Arrays for inputs or outputs are in a flat list. All of a list have the same number of examples.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, Variable, ops

from keras_taylor.support.types import Array, BoolArray, FloatArray, Masks, Shape, Tensor, Tree

_UNKNOWN_SIZE = 32  # stands for an axis of unknown size
BLOCK_BYTES = 4 * 2**20
_MOST_PARTS = 16  # JAX concatenates this many arrays at a time; more would take a third copy


def random_arrays(shapes: Iterable[Shape], dtypes: Iterable[str], num: int) -> list[Array]:
    """Standard normal reals and integers 0 and 1, which every embedding has; the same on every call.

    Args:
        shapes: Shapes, batch axis first. An axis of unknown size gets 32.
        dtypes: Names of the dtypes.
        num: Number of examples.
    """
    random = np.random.default_rng(0)
    arrays: list[Array] = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        sizes = (num, *(size or _UNKNOWN_SIZE for size in shape[1:]))
        is_real = np.dtype(dtype).kind == "f"
        values = random.standard_normal(sizes) if is_real else random.integers(0, 2, sizes)
        arrays.append(values.astype(dtype))
    return arrays


def random_inputs(tensors: Sequence[Tensor], num: int) -> list[Array]:
    """`random_arrays` for symbolic tensors, such as a model's inputs."""
    dtypes = [keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors]
    return random_arrays([tuple(tensor.shape) for tensor in tensors], dtypes, num)


def read_arrays(path: str | os.PathLike[str]) -> list[Array]:
    """The arrays that `write_arrays` wrote."""
    with np.load(path) as file:
        return [file[str(k)] for k in range(len(file.files))]


def write_arrays(path: str | os.PathLike[str], arrays: Sequence[Array]) -> None:
    """Writes a list of arrays to an `.npz` file. bfloat16, which NumPy does not read, becomes float32."""
    known = [array.astype("float32") if array.dtype.name == "bfloat16" else array for array in arrays]
    # NumPy's types know no array of a name that is made from a number
    np.savez(path, **{str(k): array for k, array in enumerate(known)})  # type: ignore[arg-type]


def padded_batches(arrays: Sequence[Array], size: int) -> Iterator[list[Array]]:
    """All examples in batches of exactly `size`. The first examples fill up the last batch."""
    num = len(arrays[0])
    for start in range(0, num, size):
        rows = np.arange(start, start + size) % num
        yield [array[rows] for array in arrays]


def outputs_in_batches(
    call: Callable[[list[Array]], Sequence[Array]], arrays: Sequence[Array], size: int, pad: bool = True
) -> list[Array]:
    """A function's outputs for all examples, computed in batches.

    Args:
        call: Maps the arrays of a batch to a list of outputs, each with one row an example.
        arrays: Inputs of all examples.
        size: Number of examples in a batch.
        pad: Whether examples fill up the last batch, so that all have one shape and a model is compiled
            only once. Outputs for them are dropped.
    """
    num = len(arrays[0])
    batches: Iterable[list[Array]] = (
        padded_batches(arrays, size)
        if pad
        else ([array[start : start + size] for array in arrays] for start in range(0, num, size))
    )
    parts = [call(batch) for batch in batches]
    return [np.concatenate(column)[:num] for column in zip(*parts, strict=True)]


def zeros_of_host(shape: Sequence[int], dtype: str | None = None) -> Tensor:
    """An initializer that makes zeros without a program for each shape, as JAX's own zeros have one."""
    return ops.convert_to_tensor(np.zeros(shape, np.float32), dtype)


def assign_rounded(variable: Variable, values: Array) -> None:
    """Assigns float64 values to a variable, rounded here: JAX would compile a cast for every shape."""
    variable.assign(values if variable.dtype == "float64" else np.asarray(values, np.float32))


def as_number(result: Any) -> float:
    """The result of a metric as a float. Of a metric with several values, one a class, it is their mean."""
    return float(np.mean(keras.ops.convert_to_numpy(result), dtype=np.float64))


def as_float32(outputs: Tree) -> list[FloatArray]:
    """A structure of tensors or arrays as a flat list of float32 arrays."""
    return [
        keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))
        for output in keras.tree.flatten(outputs)
    ]


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


def to_float32(tensor: Tensor) -> FloatArray:
    """The values of a tensor, variable or array as a float32 array."""
    if keras.backend.standardize_dtype(tensor.dtype) == "float32":  # JAX compiles a cast for every shape
        return np.asarray(ops.convert_to_numpy(tensor))
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def view_float32(tensor: Tensor) -> FloatArray:
    """The same as `to_float32`, for reading only: it shares the tensor's memory where that is the host's."""
    if keras.backend.standardize_dtype(tensor.dtype) == "float32":
        with contextlib.suppress(TypeError, RuntimeError):  # PyTorch's, on a device or with a gradient
            return np.asarray(tensor)
    return to_float32(tensor)


def to_float64(tensor: Tensor) -> FloatArray:
    """The values of a tensor or variable as a float64 array."""
    return np.asarray(ops.convert_to_numpy(tensor), np.float64)
