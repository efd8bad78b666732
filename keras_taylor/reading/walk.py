"""Runs a model call by call over batches that stay in memory."""

import contextlib
import inspect

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.graph import TensorRef
from keras_taylor.support.datasets import flat_inputs
from keras_taylor.support.replicas import from_first_process

# Bytes of values that may be in memory, and the examples that are taken in any case.
_MEMORY, _FEWEST = 2**30, 64
_NUM_BATCHES, _BATCH = 8, 64  # at most so many batches, of at least so many examples if there are four such
_SPARE = 8  # examples a batch from which on a few may be left out


class Walk:
    """A model at inference, one operation after the other, for all batches each.

    A tensor is kept as long as a later operation, or the model's outputs, read it.

    Args:
        graph: `graph.Graph` of the model.
        batches: For each batch a list of arrays, one an input of the model.

    Attributes:
        tensors: For each tensor that is alive (by index) a list of its values, one a batch.
    """

    def __init__(self, graph, batches):
        self.graph = graph
        columns = [[ops.convert_to_tensor(x) for x in column] for column in zip(*batches, strict=True)]
        self.tensors = dict(zip(graph.inputs, columns, strict=True))
        self._num_batches = len(batches)
        self._last = {index: k for k, call in enumerate(graph.calls) for index in call.inputs}
        self._last.update(dict.fromkeys(graph.outputs, len(graph.calls)))

    def run(self, number):
        """Runs the call of this number: all before it must have been run."""
        call = self.graph.calls[number]
        options = {}
        if "training" in inspect.signature(call.operation.call).parameters:
            options["training"] = False
        with _seeds_kept(call.operation):
            columns = [self._run(call, batch, options) for batch in range(self._num_batches)]
        for index, column in zip(call.outputs, zip(*columns, strict=True), strict=True):
            self.tensors[index] = list(column)

    def forget(self, number):
        """Lets go of what no call after this one reads."""
        for index in [i for i in self.tensors if self._last.get(i, -1) <= number]:
            del self.tensors[index]

    def outputs(self):
        """Values of the model's flattened outputs, a list a batch each."""
        return [self.tensors[index] for index in self.graph.outputs]

    def num_bytes(self):
        """Bytes of the tensors that are alive."""
        sizes = (ops.size(x) * _itemsize(x) for column in self.tensors.values() for x in column)
        return int(sum(sizes))

    def _run(self, call, batch, options):
        args, kwargs = keras.tree.map_structure(
            lambda x: self.tensors[x.index][batch] if isinstance(x, TensorRef) else x,
            (call.args, dict(call.kwargs)),
        )
        outputs = keras.tree.flatten(call.operation(*args, **{**kwargs, **options}))
        return [_detached(y) for y in outputs]


@contextlib.contextmanager
def _seeds_kept(operation):
    """Within it a layer may draw: on TensorFlow recurrent ones draw dropout masks at inference, too."""
    weights = {id(w) for w in getattr(operation, "weights", ())}
    seeds = [v for v in getattr(operation, "variables", ()) if id(v) not in weights]
    values = [ops.convert_to_numpy(v) for v in seeds]
    yield
    for seed, value in zip(seeds, values, strict=True):
        seed.assign(value)


def outputs_of(graph, batches):
    """A model's flattened outputs at inference, batch by batch; only one is in memory at a time."""
    for batch in batches:
        walk = Walk(graph, [batch])
        for number in range(len(graph.calls)):
            walk.run(number)
            walk.forget(number)
        yield [column[0] for column in walk.outputs()]


def example_inputs(feed, graph, num_examples=512):
    """Flattened inputs in random order, as many as memory holds when two such models are walked.

    Several processes walk the same ones, those of the first: what they fit has to be the same.

    Args:
        feed: `datasets.Feed`.
        graph: `graph.Graph` of the model.
        num_examples: At most so many, evenly spread over arrays, the first ones of an iterable.

    Returns:
        A list of arrays, one an input of the model.
    """
    inputs = flat_inputs(feed, graph.model, num_examples)
    order = np.random.default_rng(0).permutation(len(inputs[0]))
    affordable = max(_MEMORY // max(2 * _peak(graph, inputs), 1), _FEWEST)
    return [from_first_process(x[order[:affordable]]) for x in inputs]


def in_batches(inputs):
    """Flattened inputs as a list of at most eight batches, each a list of arrays.

    They have the same size, so that nothing is compiled twice: up to seven examples are left out, but of
    the fewest none.
    """
    num = len(inputs[0])
    count = min(max(num // _BATCH, 4), _NUM_BATCHES)
    if num >= _SPARE * count:
        num -= num % count
    size = -(-num // count)
    return [[x[k : min(k + size, num)] for x in inputs] for k in range(0, num, size)]


def _peak(graph, inputs):
    """Bytes that are alive at the worst point when one example goes through a model."""
    walk = Walk(graph, [[x[:1] for x in inputs]])
    peak = walk.num_bytes()
    for number in range(len(graph.calls)):
        walk.run(number)
        peak = max(peak, walk.num_bytes())
        walk.forget(number)
    return peak


def _detached(y):
    """A value without the record of how it came about, which torch would keep alive."""
    detached = ops.stop_gradient(y)
    mask = getattr(y, "_keras_mask", None)
    if mask is not None:
        detached._keras_mask = mask
    return detached


def _itemsize(x):
    bits = {"float64": 64, "int64": 64, "float16": 16, "bfloat16": 16, "bool": 8, "int8": 8, "uint8": 8}
    return bits.get(keras.backend.standardize_dtype(x.dtype), 32) // 8
