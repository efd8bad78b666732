"""Flat lists of arrays, one for each input or output of a model: random ones, files, batches.

All arrays of a list have the same number of examples along their first axis.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.support.types import Array, FloatArray, Shape, Tensor, Tree

_UNKNOWN_SIZE = 32  # stands for an axis of unknown size


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


def as_number(result: Any) -> float:
    """The result of a metric as a float. Of a metric with several values, one a class, it is their mean."""
    return float(np.mean(keras.ops.convert_to_numpy(result), dtype=np.float64))


def as_float32(outputs: Tree) -> list[FloatArray]:
    """A structure of tensors or arrays as a flat list of float32 arrays."""
    return [
        keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))
        for output in keras.tree.flatten(outputs)
    ]
