"""Runs a model call by call over batches that stay in memory."""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.graph import Call, Graph, TensorRef
from keras_taylor.support.datasets import Feed, flat_inputs
from keras_taylor.support.keras_internals import copy_mask, layers_inside
from keras_taylor.support.replicas import from_first_process
from keras_taylor.support.types import Array, Tensor

_MAX_BYTES = 2**30  # of all tensors that are in memory at once
_MIN_EXAMPLES = 64  # taken even if they need more memory
_MAX_BATCHES, _MIN_BATCHES = 8, 4
_MIN_BATCH_SIZE = 64  # with more than `_MIN_BATCHES` batches
# From this batch size on, the examples that remain after batches of one size are dropped.
_DROP_REMAINDER_FROM = 8

# The arrays of one batch, one for each input of the model, in flattened order.
InputBatch = Sequence[Array]


class ComputedTensors(Protocol):
    """Tensors of a graph that have been computed, as those of a `Walk`."""

    @property
    def graph(self) -> Graph:
        """The graph whose tensors these are."""

    @property
    def tensors(self) -> dict[int, list[Tensor]]:
        """Number of the tensor -> its value for each batch."""


class Walk:
    """A model, run one operation after the other, each for all batches.

    A tensor stays in memory until `free_after` finds that no later operation and no output reads it.

    Args:
        graph: The graph of the model.
        batches: The inputs.
        training: Whether operations run as in training, not as at inference. Their variables are restored.

    Attributes:
        graph: The graph of the model.
        tensors: The tensors in memory: number of the tensor -> its value for each batch.
    """

    def __init__(self, graph: Graph, batches: Sequence[InputBatch], training: bool = False) -> None:
        self.graph, self._training = graph, training
        columns = [[ops.convert_to_tensor(x) for x in column] for column in zip(*batches, strict=True)]
        self.tensors: dict[int, list[Tensor]] = dict(zip(graph.inputs, columns, strict=True))
        self._num_batches = len(batches)
        self._last_readers = {index: k for k, call in enumerate(graph.calls) for index in call.inputs}
        self._last_readers.update(dict.fromkeys(graph.outputs, len(graph.calls)))

    def run(self, number: int) -> None:
        """Runs the call of this number. All calls before it must have been run."""
        call = self.graph.calls[number]
        options = {}
        if "training" in inspect.signature(call.operation.call).parameters:
            options["training"] = self._training
        with calls_without_trace(call.operation, self._training):
            columns = [self._run_on_batch(call, batch, options) for batch in range(self._num_batches)]
        for index, column in zip(call.outputs, zip(*columns, strict=True), strict=True):
            self.tensors[index] = list(column)

    def free_after(self, number: int) -> None:
        """Frees the tensors that are not read after the call of this number."""
        for index in [i for i in self.tensors if self._last_readers.get(i, -1) <= number]:
            del self.tensors[index]

    def outputs(self) -> list[list[Tensor]]:
        """The model's flattened outputs, each as a list of its values for each batch."""
        return [self.tensors[index] for index in self.graph.outputs]

    def num_bytes(self) -> int:
        """Size of the tensors in memory."""
        sizes = (ops.size(x) * _item_size(x) for column in self.tensors.values() for x in column)
        return int(sum(sizes))

    def _run_on_batch(self, call: Call, batch: int, options: dict[str, Any]) -> list[Tensor]:
        args, kwargs = keras.tree.map_structure(
            lambda x: self.tensors[x.index][batch] if isinstance(x, TensorRef) else x,
            (call.args, dict(call.kwargs)),
        )
        outputs = keras.tree.flatten(call.operation(*args, **{**kwargs, **options}))
        return [_detach(y) for y in outputs]


@contextlib.contextmanager
def calls_without_trace(operation: keras.Operation, training: bool = False) -> Iterator[None]:
    """A context in which calls leave no trace: untrained variables and attributes are restored.

    Recurrent layers keep their dropout masks, on TensorFlow they also draw them; stateful ones keep states.
    In training even kernels change (`SpectralNormalization`).
    """
    if not isinstance(operation, keras.Layer):
        yield
        return
    changing = [v for v in operation.variables if training or not v.trainable]
    values = [np.array(ops.convert_to_numpy(v)) for v in changing]
    attributes = [(vars(layer), dict(vars(layer))) for layer in (operation, *layers_inside(operation))]
    try:
        yield
    finally:
        for variable, value in zip(changing, values, strict=True):
            variable.assign(value)
        for now, before in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)


def run_batches(graph: Graph, batches: Iterable[InputBatch]) -> Iterator[list[Tensor]]:
    """Yields a model's flattened outputs at inference for each batch, with one batch in memory at a time."""
    for batch in batches:
        walk = Walk(graph, [batch])
        for number in range(len(graph.calls)):
            walk.run(number)
            walk.free_after(number)
        yield [column[0] for column in walk.outputs()]


def sample_inputs(feed: Feed, graph: Graph, num_examples: int = 512) -> list[Array]:
    """Flattened inputs in random order, as many as two models can be walked with in 1 GiB of memory.

    All processes get the examples of the first one, so that they fit the same kernels.

    Args:
        feed: The data.
        graph: The graph of the model.
        num_examples: At most this many examples: evenly spread over arrays, the first ones of an iterable.

    Returns:
        An array for each input of the model.
    """
    inputs = flat_inputs(feed, graph.model, num_examples)
    order = np.random.default_rng(0).permutation(len(inputs[0]))
    affordable = max(_MAX_BYTES // max(2 * _peak_bytes(graph, inputs), 1), _MIN_EXAMPLES)
    return [from_first_process(x[order[:affordable]]) for x in inputs]


def split_into_batches(inputs: Sequence[Array], fixed_size: int | None = None) -> list[list[Array]]:
    """Splits flattened inputs into at most eight batches.

    The batches have one size, so that nothing is compiled twice. For this, up to seven examples are left
    out, but none if there are few.

    Args:
        inputs: The inputs.
        fixed_size: The only number of examples that the model takes, as that of a stateful layer; `None`: it
            takes any. What fills no batch is left out then, and few examples come again.
    """
    num = len(inputs[0])
    if fixed_size is not None:
        if num < fixed_size:
            return [[np.resize(x, (fixed_size, *x.shape[1:])) for x in inputs]]
        return [[x[k : k + fixed_size] for x in inputs] for k in range(0, num - fixed_size + 1, fixed_size)]
    count = min(max(num // _MIN_BATCH_SIZE, _MIN_BATCHES), _MAX_BATCHES)
    if num >= _DROP_REMAINDER_FROM * count:
        num -= num % count
    size = -(-num // count)
    return [[x[k : min(k + size, num)] for x in inputs] for k in range(0, num, size)]


def fixed_batch_size(graph: Graph) -> int | None:
    """The only number of examples that a model takes, `None` if it takes any."""
    return graph.model.inputs[0].shape[0] if graph.model.inputs else None


def _peak_bytes(graph: Graph, inputs: Sequence[Array]) -> int:
    """The most memory that tensors take at once while one example goes through a model."""
    num = fixed_batch_size(graph) or 1
    walk = Walk(graph, [[np.resize(x[:num], (num, *x.shape[1:])) for x in inputs]])
    peak = walk.num_bytes()
    for number in range(len(graph.calls)):
        walk.run(number)
        peak = max(peak, walk.num_bytes())
        walk.free_after(number)
    return -(-peak // num)


def _detach(y: Tensor) -> Tensor:
    """A tensor without the autograd history, which PyTorch would keep in memory; its Keras mask stays."""
    return copy_mask(y, ops.stop_gradient(y))


def _item_size(x: Tensor) -> int:
    """Bytes of one element."""
    bits = {"float64": 64, "int64": 64, "float16": 16, "bfloat16": 16, "bool": 8, "int8": 8, "uint8": 8}
    return bits.get(keras.backend.standardize_dtype(x.dtype), 32) // 8
