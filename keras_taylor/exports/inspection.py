"""Measurements of one exported file: time, memory, tensor arena, outputs on examples."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_taylor.exports.artifacts import TensorDetails
from keras_taylor.exports.runners import LiteRTRunner, load_runner, run_examples, start_runtime
from keras_taylor.exports.timing import Latency, summarize_latency, time_in_turn
from keras_taylor.support.arrays import read_arrays, write_arrays
from keras_taylor.support.types import Array

_ARENA_ALIGNMENT = 16  # bytes


class Inspection(Latency):
    """Attributes of an `Artifact` that are measured of the file alone."""

    inputs: dict[str, TensorDetails]
    outputs: dict[str, TensorDetails]
    peak_memory: int | None
    arena_bytes: int | None


def inspect_file(
    format: str,
    path: str,
    names: Sequence[str],
    batch_size: int | None,
    tables: Sequence[tuple[str, str]],
    repetitions: int,
) -> Inspection:
    """Loads a file, times it and runs it on examples, in a process that has run no file before.

    Args:
        format: Key of `formats.SUFFIXES`.
        path: The file, or the directory of a SavedModel.
        names: Names of the Keras model's flattened inputs.
        batch_size: Number of examples that a call takes; `None` for any number.
        tables: Pairs of `.npz` files: one to read, with examples for each of the flattened inputs, and one
            to write, with outputs.
        repetitions: Number of timed calls, at most.
    """
    start_runtime(format)
    before = _resident_memory("VmRSS")
    runner = load_runner(format, path, names)
    arrays = read_arrays(tables[0][0])
    rows = np.arange(batch_size or 1) % len(arrays[0])
    batch = [array[rows] for array in arrays]
    (seconds,) = time_in_turn([runner], [batch], repetitions)
    peak = _resident_memory("VmHWM")
    for source, target in tables:
        write_arrays(target, run_examples(runner, read_arrays(source), batch_size))
    return {
        "inputs": runner.inputs,
        "outputs": runner.outputs,
        **summarize_latency(seconds, batch_size or 1),
        "peak_memory": None if before is None or peak is None else max(0, peak - before),
        "arena_bytes": arena_size(path, names, batch) if format == "litert" else None,
    }


def arena_size(path: str, names: Sequence[str], arrays: Sequence[Array]) -> int:
    """Bytes of the largest set of tensors in a LiteRT model that are alive at the same time.

    A tensor is alive from the operation that makes it (an input from the start) to the last one that
    reads it (an output to the end). Sizes are rounded up to 16 bytes. Weights lie in the file and do not
    count. This is a lower bound for every memory plan. Interpreters for microcontrollers come close to it;
    they add scratch buffers of their kernels and their own records.

    Args:
        path: The file.
        names: Names of the Keras model's flattened inputs.
        arrays: One batch, an array for each input.
    """
    runner = LiteRTRunner(path, names, delegates=False)
    runner.run(runner.prepare(arrays))  # sizes of dynamic tensors are known after a call
    interpreter = runner.interpreter
    details = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    operations = (
        interpreter._get_ops_details()
    )  # there is no public way to ask which operation reads a tensor
    first = {tensor["index"]: 0 for tensor in interpreter.get_input_details()}
    last = dict(first)
    for step, operation in enumerate(operations):
        for index in operation["outputs"]:
            first.setdefault(index, step)
            last[index] = step
        for index in operation["inputs"]:
            if index in first:
                last[index] = step
    last.update({tensor["index"]: len(operations) for tensor in interpreter.get_output_details()})
    sizes = {index: _tensor_bytes(details[index]) for index in first if index in details}
    steps = range(max(1, len(operations)))
    return max(
        sum(size for index, size in sizes.items() if first[index] <= step <= last[index]) for step in steps
    )


def _tensor_bytes(details: dict[str, Any]) -> int:
    num_bytes = int(np.prod(details["shape"])) * np.dtype(details["dtype"]).itemsize
    return -(-num_bytes // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT


def _resident_memory(field: str) -> int | None:
    """Bytes of this process's memory: now ("VmRSS"), or the largest so far ("VmHWM")."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))
