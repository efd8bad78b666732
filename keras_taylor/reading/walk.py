"""Runs a model call by call over batches that stay in memory, compiled where that is slow otherwise."""

import collections
import contextlib
import hashlib
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.graph import Call, Graph, TensorRef
from keras_taylor.reading.matmul_views import matmul_view
from keras_taylor.support.datasets import Feed, flat_inputs
from keras_taylor.support.keras_internals import copy_mask, layers_inside, mask_of_tensor
from keras_taylor.support.replicas import from_first_process
from keras_taylor.support.types import Array, Tensor, Tree

# Examples of a repair: 1024 keep 0.7 points more than 512, 2048 no more (docs/experiments/repair.md).
NUM_EXAMPLES = 1024
_MAX_BYTES = 2**30  # of all tensors that are in memory at once
_MIN_EXAMPLES = 64  # taken even if they need more memory
_MAX_BATCHES, _MIN_BATCHES = 8, 4
_MIN_BATCH_SIZE = 64  # with more than `_MIN_BATCHES` batches
# From this batch size on, the examples that remain after batches of one size are dropped.
_DROP_REMAINDER_FROM = 8

# The arrays of one batch, one for each input of the model, in flattened order.
InputBatch = Sequence[Array]
# Gets the values of a tensor, one for each batch.
Observer: TypeAlias = Callable[[list[Tensor]], None]

# A function of lists of tensors.
CompiledFunction: TypeAlias = Callable[..., Any]
_MOST_PROGRAMS = 1024
_PROGRAMS: collections.OrderedDict[tuple[str, ...], CompiledFunction] = collections.OrderedDict()
# The compiled functions of each graph that is in use; `None` for what cannot be compiled.
_FUNCTIONS: weakref.WeakKeyDictionary[Graph, dict[Any, CompiledFunction | None]] = weakref.WeakKeyDictionary()


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

    Calls that were run wait until one of their tensors is asked for, or until a linear layer comes. Those
    that wait run as one function: where a backend compiles each operation, they are compiled together.

    Args:
        graph: The graph of the model.
        batches: The inputs.
        training: Whether operations run as in training, not as at inference. Their variables are restored.
            BatchNormalizations always run as at inference.
        observers: Functions that get the values of single tensors, one for each batch, when they are
            computed; by the number of the tensor.

    Attributes:
        graph: The graph of the model.
    """

    def __init__(
        self,
        graph: Graph,
        batches: Sequence[InputBatch],
        training: bool = False,
        observers: Mapping[int, Observer] | None = None,
    ) -> None:
        self.graph, self._training, self._observers = graph, training, observers or {}
        columns = [[ops.convert_to_tensor(x) for x in column] for column in zip(*batches, strict=True)]
        self._computed: dict[int, list[Tensor]] = dict(zip(graph.inputs, columns, strict=True))
        self._num_batches = len(batches)
        self._last_readers = {index: k for k, call in enumerate(graph.calls) for index in call.inputs}
        self._last_readers.update(dict.fromkeys(graph.outputs, len(graph.calls)))
        self._waiting: list[Call] = []
        self._freed_after = -1

    @property
    def tensors(self) -> dict[int, list[Tensor]]:
        """The tensors in memory: number of the tensor -> its value for each batch."""
        self.run_waiting()
        return self._computed

    def run(self, number: int) -> None:
        """Runs the call of this number. All calls before it must have been run."""
        call = self.graph.calls[number]
        is_linear = matmul_view(call.operation) is not None
        if is_linear:
            self.run_waiting()
        self._waiting.append(call)
        if is_linear:
            self.run_waiting()

    def run_alone(self, number: int) -> None:
        """Runs the call of this number at once, not compiled: its operation may have been changed for it."""
        self.run_waiting()
        self._waiting.append(self.graph.calls[number])
        self.run_waiting(is_compiled=False)

    def free_after(self, number: int) -> None:
        """Frees the tensors that are not read after the call of this number."""
        self._freed_after = max(self._freed_after, number)
        read = {index for call in self._waiting for index in call.inputs}
        for index in [i for i in self._computed if i not in read and not self._is_read_later(i)]:
            del self._computed[index]

    def outputs(self) -> list[list[Tensor]]:
        """The model's flattened outputs, each as a list of its values for each batch."""
        return [self.tensors[index] for index in self.graph.outputs]

    def _is_read_later(self, index: int) -> bool:
        return self._last_readers.get(index, -1) > self._freed_after

    def run_waiting(self, is_compiled: bool = True) -> None:
        """Runs the calls that wait, as one function that is compiled where that pays if `is_compiled`."""
        if not self._waiting:
            return
        calls, self._waiting = self._waiting, []
        made = [index for call in calls for index in call.outputs]
        wanted = tuple(i for i in made if self._is_read_later(i) or i in self._observers)
        section = _Section(self.graph, tuple(calls), wanted, self._training)
        read = [[self._computed[index][k] for index in section.inputs] for k in range(self._num_batches)]
        for index in section.inputs:
            if not self._is_read_later(index):
                del self._computed[index]
        columns = zip(*section.run(read, is_compiled), strict=True)
        for index, column in zip(wanted, columns, strict=True):
            self._computed[index] = list(column)
            if index in self._observers:
                self._observers[index](self._computed[index])
                if not self._is_read_later(index):
                    del self._computed[index]


class _Section:
    """Calls of a model that run as one function.

    Args:
        graph: The graph of the model.
        calls: Calls that follow each other.
        outputs: Numbers of the tensors to return.
        training: As in `Walk`.

    Attributes:
        inputs: Numbers of the tensors that the calls read and do not make.
    """

    def __init__(
        self, graph: Graph, calls: tuple[Call, ...], outputs: tuple[int, ...], training: bool
    ) -> None:
        self._graph, self._calls, self._outputs, self._training = graph, calls, outputs, training
        made = {index for call in calls for index in call.outputs}
        self.inputs = tuple(dict.fromkeys(i for call in calls for i in call.inputs if i not in made))
        self._last = {index: call for call in calls for index in (*call.outputs, *call.inputs)}
        layers = dict.fromkeys(call.operation for call in calls)
        self._layers = [layer for layer in layers if isinstance(layer, keras.Layer)]
        self._variables = [variable for layer in self._layers for variable in layer.variables]

    def run(self, batches: list[list[Tensor]], is_compiled: bool) -> list[list[Tensor]]:
        """The outputs for the inputs of each batch. The list is emptied, so that inputs are freed early."""
        results = []
        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(calls_without_trace(layer, self._training))
            values = [variable.value for variable in self._variables] if is_compiled else []
            batches.reverse()
            while batches:
                tensors = batches.pop()
                function = self._compiled(values, tensors) if is_compiled else None
                if function is None:
                    results.append(self._run_calls(tensors))
                else:
                    outputs, values = function(values, tensors)
                    results.append(outputs)
        return results

    def _compiled(self, values: list[Tensor], tensors: list[Tensor]) -> CompiledFunction | None:
        """The compiled function of values of the variables and tensors; `None`: run the calls by themselves.

        It returns the outputs, and the values that the variables have afterwards.
        """
        if getattr(self._graph.model, "run_eagerly", False):
            return None
        if any(mask_of_tensor(x) is not None for x in tensors):
            return None
        programs = _FUNCTIONS.setdefault(self._graph, {})
        numbers = tuple(call.number for call in self._calls)
        shapes = tuple((tuple(x.shape), str(x.dtype)) for x in tensors)
        key = numbers, self._outputs, self._training, shapes
        if key not in programs:
            programs[key] = _compile_once(self._run_stateless, values, tensors)
        return programs[key]

    def _run_stateless(
        self, values: list[Tensor], tensors: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        pairs = list(zip(self._variables, values, strict=True))
        with keras.StatelessScope(state_mapping=pairs) as scope:
            outputs = self._run_calls(tensors)
        if any(mask_of_tensor(y) is not None for y in outputs):
            raise ValueError("Keras' masks cannot leave a compiled function.")
        return outputs, [scope.get_current_value(variable) for variable in self._variables]

    def _run_calls(self, tensors: list[Tensor]) -> list[Tensor]:
        """Runs the calls one after the other; what no later one reads is freed."""
        here = dict(zip(self.inputs, tensors, strict=True))
        tensors.clear()
        for call in self._calls:
            args, kwargs = keras.tree.map_structure(
                lambda x: here[x.index] if isinstance(x, TensorRef) else x, (call.args, dict(call.kwargs))
            )
            if "training" in inspect.signature(call.operation.call).parameters:
                is_normalization = isinstance(call.operation, keras.layers.BatchNormalization)
                kwargs["training"] = self._training and not is_normalization
            outputs = [_detach(y) for y in keras.tree.flatten(call.operation(*args, **kwargs))]
            here.update(zip(call.outputs, outputs, strict=True))
            for index in (*call.inputs, *call.outputs):
                if self._last[index] is call and index not in self._outputs:
                    here.pop(index, None)
        return [here[index] for index in self._outputs]


def _compile_once(function: CompiledFunction, *arguments: Tree) -> CompiledFunction | None:
    """A function, compiled for arguments of these shapes where a backend compiles every operation by itself.

    That is JAX. Equal functions are compiled once in a process, whichever model they belong to: they are
    known by the text of their program. The last 1024 are kept.

    Args:
        function: A function of structures of tensors, without side effects.
        arguments: Its arguments.

    Returns:
        The compiled function; `None` where it is to run operation by operation: on the other backends, or if
        it cannot be traced.
    """
    if keras.backend.backend() != "jax":
        return None
    import jax

    try:
        lowered = jax.jit(function).lower(*arguments)
    except Exception:  # values decide what it does, say; run by itself, it works or shows its own error
        return None
    places = (str(getattr(x, "sharding", None)) for x in keras.tree.flatten(arguments))
    key = (hashlib.sha256(lowered.as_text().encode()).hexdigest(), *places)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = lowered.compile()
        if len(_PROGRAMS) > _MOST_PROGRAMS:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key]


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


def run_batches(
    graph: Graph, batches: Iterable[InputBatch], observers: Mapping[int, Observer] | None = None
) -> Iterator[list[Tensor]]:
    """Yields a model's flattened outputs at inference for each batch, with one batch in memory at a time."""
    for batch in batches:
        walk = Walk(graph, [batch], observers=observers)
        for number in range(len(graph.calls)):
            walk.run(number)
            walk.free_after(number)
        yield [column[0] for column in walk.outputs()]


def sample_inputs(feed: Feed, graph: Graph, num_examples: int = NUM_EXAMPLES) -> list[Array]:
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
    affordable = _MIN_EXAMPLES
    if len(order) > affordable:
        affordable = max(_MAX_BYTES // max(2 * _peak_bytes(graph), 1), affordable)
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


def _peak_bytes(graph: Graph) -> int:
    """The most memory that tensors take at once while one example goes through a model."""
    num = fixed_batch_size(graph) or 1
    inputs = keras.tree.flatten(graph.root.inputs)
    specs = {
        index: keras.KerasTensor((num, *x.shape[1:]), x.dtype)
        for index, x in zip(graph.inputs, inputs, strict=True)
    }
    last_readers = {index: k for k, call in enumerate(graph.calls) for index in call.inputs}
    last_readers.update(dict.fromkeys(graph.outputs, len(graph.calls)))
    peak = _num_bytes(specs.values())
    for number, call in enumerate(graph.calls):
        specs.update(zip(call.outputs, _output_specs(graph, call, specs), strict=True))
        peak = max(peak, _num_bytes(specs.values()))
        specs = {index: x for index, x in specs.items() if last_readers.get(index, -1) > number}
    return -(-peak // num)


def _output_specs(
    graph: Graph, call: Call, specs: Mapping[int, keras.KerasTensor]
) -> Sequence[keras.KerasTensor]:
    """Shapes and dtypes of what a call makes of tensors of these."""
    args, kwargs = keras.tree.map_structure(
        lambda x: specs[x.index] if isinstance(x, TensorRef) else x, (call.args, dict(call.kwargs))
    )
    with calls_without_trace(call.operation):
        return keras.tree.flatten(call.operation.compute_output_spec(*args, **kwargs))


def _num_bytes(specs: Iterable[keras.KerasTensor]) -> int:
    """Size of tensors of these shapes; an axis of unknown size counts as 1."""
    return sum(math.prod(size or 1 for size in x.shape) * _item_size(x) for x in specs)


def _detach(y: Tensor) -> Tensor:
    """A tensor without the autograd history, which PyTorch would keep in memory; its Keras mask stays."""
    return copy_mask(y, ops.stop_gradient(y))


def _item_size(x: Tensor) -> int:
    """Bytes of one element."""
    bits = {"float64": 64, "int64": 64, "float16": 16, "bfloat16": 16, "bool": 8, "int8": 8, "uint8": 8}
    return bits.get(keras.backend.standardize_dtype(x.dtype), 32) // 8
