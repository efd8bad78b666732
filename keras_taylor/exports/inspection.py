"""Measurements of one exported file: time, memory, tensor arena, outputs on examples."""

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

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
    int8_io_arena_bytes: int | None


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
    tensors = LiveTensors.of_file(path, names, batch) if format == "litert" else None
    integers = tensors and tensors.with_int8_io()
    return {
        "inputs": runner.inputs,
        "outputs": runner.outputs,
        **summarize_latency(seconds, batch_size or 1),
        "peak_memory": None if before is None or peak is None else max(0, peak - before),
        "arena_bytes": tensors.arena_size() if tensors is not None else None,
        "int8_io_arena_bytes": None if integers is None else integers.arena_size(),
    }


class Operation(NamedTuple):
    """An operation of a LiteRT model: its name, and the indices of the tensors that it reads and makes."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LiveTensors:
    """Which tensors of a LiteRT model are alive when.

    Attributes:
        sizes: Tensor -> bytes.
        inputs: Tensors that the model takes.
        outputs: Tensors that the model returns.
        operations: What it does, in order.
    """

    sizes: Mapping[int, int]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    operations: tuple[Operation, ...]

    @classmethod
    def of_file(cls, path: str, names: Sequence[str], arrays: Sequence[Array]) -> Self:
        """The tensors of a file.

        Args:
            path: The file.
            names: Names of the Keras model's flattened inputs.
            arrays: One batch, an array for each input.
        """
        runner = LiteRTRunner(path, names, delegates=False)
        runner.run(runner.prepare(arrays))  # sizes of dynamic tensors are known after a call
        interpreter = runner.interpreter
        # there is no public way to ask which operation reads a tensor
        operations = [
            Operation(one["op_name"], tuple(one["inputs"]), tuple(one["outputs"]))
            for one in interpreter._get_ops_details()
        ]
        return cls(
            {tensor["index"]: _tensor_bytes(tensor) for tensor in interpreter.get_tensor_details()},
            tuple(tensor["index"] for tensor in interpreter.get_input_details()),
            tuple(tensor["index"] for tensor in interpreter.get_output_details()),
            tuple(operations),
        )

    def arena_size(self) -> int:
        """Bytes of the largest set of tensors that are alive at the same time.

        A tensor is alive from the operation that makes it (an input from the start) to the last one that
        reads it (an output to the end). Sizes are rounded up to 16 bytes. Weights lie in the file and do not
        count. This is a lower bound for every memory plan. Interpreters for microcontrollers come close to
        it; they add scratch buffers of their kernels and their own records.
        """
        first = dict.fromkeys(self.inputs, 0)
        last = dict(first)
        for step, operation in enumerate(self.operations):
            for index in operation.outputs:
                first.setdefault(index, step)
                last[index] = step
            for index in operation.inputs:
                if index in first:
                    last[index] = step
        last.update(dict.fromkeys(self.outputs, len(self.operations)))
        alive = [index for index in first if index in self.sizes]
        steps = range(max(1, len(self.operations)))
        return max(
            sum(self.sizes[index] for index in alive if first[index] <= step <= last[index]) for step in steps
        )

    def with_int8_io(self) -> Self | None:
        """The tensors of the same file with integers outside; `None` if they are integers already.

        No input is quantized first then, and no output is turned into reals at the end.
        """
        readers = collections.Counter(index for one in self.operations for index in one.inputs)
        moved, gone = dict[int, int](), list[bool]()
        for name, (read, *_), (made, *_) in self.operations:
            is_first = name == "QUANTIZE" and read in self.inputs and readers[read] == 1
            is_last = name == "DEQUANTIZE" and made in self.outputs and not readers[made]
            if is_first:
                moved[read] = made
            elif is_last:
                moved[made] = read
            gone.append(is_first or is_last)
        if not moved:
            return None
        return dataclasses.replace(
            self,
            inputs=tuple(moved.get(index, index) for index in self.inputs),
            outputs=tuple(moved.get(index, index) for index in self.outputs),
            operations=tuple(one for one, is_gone in zip(self.operations, gone, strict=True) if not is_gone),
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
