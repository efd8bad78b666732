"""A model whose channel units have gates."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.branches import Branch
from keras_taylor.reading.cloning import build_like, clone_operation, copy_weights
from keras_taylor.reading.graph import Call, Graph, TensorRef
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.rules.base import InternalRead
from keras_taylor.rules.labels import BatchAxis
from keras_taylor.scores.gates import Gates
from keras_taylor.scores.losses import example_losses
from keras_taylor.support.arrays import as_float32, outputs_in_batches
from keras_taylor.support.keras_internals import copy_mask, in_order_of_inputs
from keras_taylor.support.types import Array, FloatArray, IntArray, Tensor, Tree

_PREDICTED_AT_ONCE = 128  # examples


class GatedNetwork(keras.layers.Layer):
    """A model run call by call, with a gate on every edge into a mixing layer.

    Args:
        labeled: The labels of the model.
        frozen: `True`: run a clone with weights of its own, none of them trainable; running, fitting and
            masking it leaves the model unchanged. `False`: run the model's own layers, and train them.
        gates: The gate layer; `None`: a plain `Gates`.
    """

    def __init__(
        self, labeled: LabeledModel, frozen: bool = True, gates: Gates | None = None, **kwargs: Any
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # inputs reach the first layers without a cast
        operations = {call.operation: call.operation for call in labeled.graph.calls}
        if frozen:
            operations = _clone_operations(labeled)
            self.network_layers = [c for c in operations.values() if isinstance(c, keras.Layer)]
        else:
            self.model = labeled.graph.model
        # the last: its variables are the last ones
        self.gates = gates or Gates(labeled.num_units, name="gates")
        self._wiring = _GateWiring(labeled, operations)
        self.built = True

    def call(self, inputs: Tree, training: bool | None = None) -> Tree:
        """The model's outputs, each gate applied."""
        graph = self._wiring.graph
        tensors = dict(zip(graph.inputs, _input_tensors(inputs, graph), strict=True))
        for _ in self._run(tensors, training):
            pass
        flat = [tensors[index] for index in graph.outputs]
        # not kept as an attribute: Keras would turn its dicts and lists into others
        return keras.tree.pack_sequence_as(graph.root.outputs, flat)

    @property
    def input_structure(self) -> Tree:
        """The structure of the model's inputs."""
        return self._wiring.graph.root.inputs

    def copy_of(self, operation: keras.Operation) -> keras.Operation:
        """The operation that runs here in place of one of the model's."""
        return self._wiring.operations[operation]

    def find_nonfinite(self, inputs: Tree) -> str | None:
        """Name of the first operation whose output holds NaN or infinity, `None` if there is none."""
        graph = self._wiring.graph
        tensors = dict(zip(graph.inputs, _input_tensors(inputs, graph), strict=True))
        for call in self._run(tensors, training=False):
            if not all(_is_finite(tensors[index]) for index in call.outputs):
                return call.name
        return None

    def _run(self, tensors: dict[int, Tensor], training: bool | None) -> Iterator[Call]:
        """Runs call by call and fills `tensors`; yields each call after it ran."""
        wiring = self._wiring
        carrier = self.gates(next(iter(tensors.values())))
        gated: dict[tuple[int, _EdgeGates], Tensor] = {}
        for call in wiring.graph.calls:
            operation = wiring.operations[call.operation]
            normalization = wiring.normalizations.get(call)
            if normalization is not None:
                outputs = [normalization.run(operation, tensors[call.inputs[0]], carrier)]
            else:
                args, kwargs = wiring.arguments(call, tensors, gated, carrier)
                if training is not None and call.operation in wiring.takes_training:
                    kwargs["training"] = training
                with wiring.internal_gates(call, carrier):
                    outputs = keras.tree.flatten(operation(*args, **kwargs))
            if call in wiring.whole_layers:
                outputs = [wiring.whole_layers[call].mix(tensors[call.inputs[0]], outputs[0], carrier)]
            tensors.update(zip(call.outputs, outputs, strict=True))
            yield call


class GatedModel(keras.Model):
    """A model with gates; frozen for scoring: dropout off, BatchNorm on moving statistics.

    Args:
        labeled: The labels of the model.
        frozen, gates: As in `GatedNetwork`.
    """

    def __init__(
        self, labeled: LabeledModel, frozen: bool = True, gates: Gates | None = None, **kwargs: Any
    ) -> None:
        policy = labeled.graph.model.dtype_policy
        super().__init__(autocast=False, dtype=policy, **kwargs)
        self._frozen = frozen
        self.network = GatedNetwork(labeled, frozen, gates, name="network", dtype=policy)
        self.output_names = list(getattr(labeled.graph.model, "output_names", None) or [])
        if not self.output_names:
            del self.output_names

    def call(self, inputs: Tree, training: bool | None = None) -> Tree:
        """The model's outputs; if frozen, it is never in training mode, whatever `fit` asks for."""
        return self.network(inputs, training=False if self._frozen else training)

    def example_losses(self, loss: Tree, mean: bool = False) -> Tree:
        """The losses to compile with for scoring, see `losses.example_losses`."""
        return example_losses(loss, mean)

    @property
    def mask(self) -> FloatArray:
        """1 for units that stay, 0 for units that are removed: a float32 array `(num_units,)`."""
        _synchronize(self)
        return ops.convert_to_numpy(self.network.gates.mask)

    @mask.setter
    def mask(self, value: Array) -> None:
        changed = not np.array_equal(self.mask, value)
        self.network.gates.mask.assign(np.asarray(value, np.float32))
        if changed:
            self._forget_best_epochs()

    def _forget_best_epochs(self) -> None:
        """Called when the mask has changed: epochs before and after it cannot be compared."""

    def set_weights(self, weights: Sequence[Array]) -> None:
        """As `keras.Model.set_weights`; gates that are closed stay closed."""
        with self.network.gates.closed_gates_kept():
            super().set_weights(weights)

    def set_state_tree(self, state_tree: dict[str, Any]) -> None:
        """As `keras.Model.set_state_tree`; gates that are closed stay closed."""
        with self.network.gates.closed_gates_kept():
            super().set_state_tree(state_tree)

    @property
    def statistics(self) -> FloatArray:
        """The sums that the gates gathered, a float64 array `(num_rows, num_units)`."""
        _synchronize(self)
        return ops.convert_to_numpy(self.network.gates.statistics).astype(np.float64)

    @statistics.setter
    def statistics(self, value: Array) -> None:
        _synchronize(self)
        self.network.gates.statistics.assign(np.asarray(value, np.float32))

    def predict_arrays(self, inputs: Sequence[Array], batch_size: int | None = None) -> list[FloatArray]:
        """Flattened outputs as float32 arrays.

        Args:
            inputs: Flattened inputs, batch first.
            batch_size: Examples a batch, of few ones as well; `None`: at most 128.
        """
        structure = self.network.input_structure
        return outputs_in_batches(
            lambda batch: as_float32(self.predict_on_batch(keras.tree.pack_sequence_as(structure, batch))),
            inputs,
            batch_size or min(len(inputs[0]), _PREDICTED_AT_ONCE),
        )

    def pop_statistics(self) -> FloatArray:
        """Returns the statistics, and sets them to 0."""
        values = self.statistics
        self.statistics = np.zeros(values.shape)
        return values


def _synchronize(model: keras.Model) -> None:
    """Within `fit`, Keras' trainer for JAX keeps the values apart from the variables until it is asked.

    Keras' own callbacks ask like this whenever they read `self.model`.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


class _EdgeGates:
    """Takes the gates of one edge out of the carrier.

    Args:
        units: The unit of each position, `-1` for positions without a gate: an int array of the rank of
            the edge's tensor, size 1 along every axis on which it does not vary.
        axis: The axis of the channels.
        batch: Where the examples are in the tensor.
    """

    def __init__(self, units: IntArray, axis: int, batch: BatchAxis) -> None:
        self._batch, self._axis = batch, axis
        self._other_axes = [k for k in range(units.ndim) if k not in (axis, batch.axis)]
        self._repeats = 1
        self._start: int | None = None
        flat = units.reshape(-1)
        period = _period(flat)
        if period < flat.size:
            self._repeats, flat = flat.size // period, flat[:period]
        self._units = flat.astype("int32")
        if flat[0] >= 0 and (np.diff(flat) == 1).all():
            self._start = int(flat[0])

    def multiply(self, x: Tensor, carrier: Tensor) -> Tensor:
        """`x` times the gate of each of its channels."""
        return copy_mask(x, x * ops.cast(self.gate(carrier), x.dtype))

    def mix(self, x: Tensor, y: Tensor, carrier: Tensor) -> Tensor:
        """`y` where the gate is 1, `x` where it is 0."""
        gate = ops.cast(self.gate(carrier), y.dtype)
        return copy_mask(y, gate * y + (1 - gate) * ops.cast(x, y.dtype))

    def gate(self, carrier: Tensor) -> Tensor:
        """The gates of all channels, in the rank of the tensor."""
        if self._start is None:
            last = carrier.shape[1] - 1
            gate = ops.take(carrier, np.where(self._units < 0, last, self._units), axis=1)
        else:
            gate = carrier[:, self._start : self._start + len(self._units)]
        if self._repeats > 1:
            gate = ops.tile(gate, (1, self._repeats))
        if self._batch.num_rows > 1:  # the rows of an example have the same gates
            gate = ops.tile(ops.repeat(gate, self._batch.inner, axis=0), (self._batch.outer, 1))
        if self._batch.axis > self._axis:
            gate = ops.transpose(gate)
        return ops.expand_dims(gate, self._other_axes)


class _GatedNormalization(NamedTuple):
    """How a call that normalizes units together runs while some gates are closed."""

    gated_call: Callable[..., Tensor]
    edge: _EdgeGates

    def run(self, layer: keras.Layer, x: Tensor, carrier: Tensor) -> Tensor:
        """The layer's output without the channels whose gates are closed."""
        return copy_mask(x, self.gated_call(layer, x, self.edge.gate(carrier)))


class _GateWiring:
    """Which operation runs for each call, and where gates apply.

    A plain object, so that Keras does not track what is in it.

    Args:
        labeled: The labels of the model.
        operations: For each of the model's operations the one that runs in its place.

    Attributes:
        takes_training: The model's operations whose `call` has an argument `training`.
        normalizations: Calls that normalize units together, which gates change from within.
        whole_layers: Calls of closed layers that can leave as a whole, with their gates.
    """

    def __init__(self, labeled: LabeledModel, operations: dict[keras.Operation, keras.Operation]) -> None:
        self.graph = labeled.graph
        self.operations = operations
        self.takes_training = {
            key for key, o in operations.items() if "training" in inspect.signature(o.call).parameters
        }
        self._edges = _edges_by_call(labeled)
        self._internal = _internal_reads_by_call(labeled)
        self.normalizations = _normalizations_by_call(labeled)
        self.whole_layers = _whole_layers_by_call(labeled)

    def arguments(
        self,
        call: Call,
        tensors: dict[int, Tensor],
        gated: dict[tuple[int, _EdgeGates], Tensor],
        carrier: Tensor,
    ) -> Any:
        """Positional and keyword arguments of a call, with tensors in their places.

        `gated` keeps products of tensors and gates, which other calls may need as well.
        """

        def value(argument: Any) -> Any:
            if not isinstance(argument, TensorRef):
                return argument
            edge = self._edges.get((call, argument.index))
            if edge is None:
                return tensors[argument.index]
            key = (argument.index, edge)
            if key not in gated:
                gated[key] = edge.multiply(tensors[argument.index], carrier)
            return gated[key]

        return keras.tree.map_structure(value, (call.args, dict(call.kwargs)))

    @contextlib.contextmanager
    def internal_gates(self, call: Call, carrier: Tensor) -> Iterator[None]:
        """A context in which gates apply to the values that a call reads inside of its operation."""
        with contextlib.ExitStack() as stack:
            for read, edge in self._internal.get(call, ()):
                stack.enter_context(read.apply_gate(self.operations[call.operation], edge.gate(carrier)))
            yield


def _period(units: IntArray) -> int:
    """Length of the shortest prefix that, repeated, gives the whole (a flattened map)."""
    repeats = np.flatnonzero(units[1:] == units[0]) + 1
    for period in repeats[:1].tolist():
        if units.size % period == 0 and (units.reshape(-1, period) == units[:period]).all():
            return period
    return units.size


def _edges_by_call(labeled: LabeledModel) -> dict[tuple[Call, int], _EdgeGates]:
    """Gated edges by call and tensor; equal edges of a tensor are one object."""
    edges: dict[tuple[Call, int], _EdgeGates] = {}
    shared: dict[tuple[int, int], _EdgeGates] = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for number, axis in effect.reads.items():
            index = call.inputs[number]
            units = labeled.units_of(labeled.labels[index])
            if (units >= 0).any():
                if (index, axis) not in shared:
                    shared[index, axis] = _EdgeGates(units, axis, _batch_of(labeled, index))
                edges[call, index] = shared[index, axis]
    for call, branch, unit in _calls_of_branches(labeled):
        if not branch.is_layer:
            index = branch.added(call)
            edges[call, index] = _edge_of_branch(labeled, index, unit)
    return edges


def _whole_layers_by_call(labeled: LabeledModel) -> dict[Call, _EdgeGates]:
    """The calls of closed layers that can leave as a whole, with their gates."""
    return {
        call: _edge_of_branch(labeled, branch.added(call), unit)
        for call, branch, unit in _calls_of_branches(labeled)
        if branch.is_layer
    }


def _calls_of_branches(labeled: LabeledModel) -> Iterator[tuple[Call, Branch, int]]:
    """The calls of the sums of all branches that can leave, with the branches and their units."""
    for branch, unit in zip(labeled.branches.branches, labeled.branch_units.tolist(), strict=True):
        for call in labeled.graph.calls if unit >= 0 else ():
            if call.site is branch.site:
                yield call, branch, unit


def _edge_of_branch(labeled: LabeledModel, tensor: int, unit: int) -> _EdgeGates:
    """The gate of what a whole branch adds to a sum."""
    batch, rank = _batch_of(labeled, tensor), len(labeled.graph.shapes[tensor])
    axis = 0 if batch.axis == rank - 1 else rank - 1
    return _EdgeGates(np.full((1,) * rank, unit), axis, batch)


def _edge_of(labeled: LabeledModel, call: Call, units: IntArray) -> _EdgeGates:
    """The edge inside a call whose units vary along one axis."""
    return _EdgeGates(units, int(np.argmax(units.shape)), _batch_of(labeled, call.inputs[0]))


def _batch_of(labeled: LabeledModel, tensor: int) -> BatchAxis:
    """Where the examples are in a tensor that has gates: without that, its units would be locked."""
    batch = labeled.batches[tensor]
    assert batch is not None
    return batch


def _internal_reads_by_call(labeled: LabeledModel) -> dict[Call, list[tuple[InternalRead, _EdgeGates]]]:
    """For each call the gated values that it reads where no tensor of the graph is, and their edges."""
    found: dict[Call, list[tuple[InternalRead, _EdgeGates]]] = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for read in effect.internal_reads:
            units = labeled.units_of(read.labels)
            if (units >= 0).any():
                found.setdefault(call, []).append((read, _edge_of(labeled, call, units)))
    return found


def _normalizations_by_call(labeled: LabeledModel) -> dict[Call, _GatedNormalization]:
    """The calls that normalize units together."""
    found = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if effect.call_with_gate is not None:
            units = labeled.units_of(labeled.labels[call.inputs[0]])
            if (units >= 0).any():
                found[call] = _GatedNormalization(effect.call_with_gate, _edge_of(labeled, call, units))
    return found


def _clone_operations(labeled: LabeledModel) -> dict[keras.Operation, keras.Operation]:
    """A frozen clone of each of the model's operations."""
    clones: dict[keras.Operation, keras.Operation] = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if call.operation not in clones:
            clone = clone_operation(call.operation, call.name)
            if isinstance(clone, keras.Layer):
                build_like(clone, call.operation, call.name)
                copy_weights(call.operation, clone)
                clone.trainable = False
                clone.activity_regularizer = None
                if effect.accelerate is not None:
                    effect.accelerate(clone)
            clones[call.operation] = clone
    return clones


def _input_tensors(inputs: Tree, graph: Graph) -> list[Tensor]:
    """Inputs in the model's order, with its dtypes.

    As in Keras, an axis of size 1 at the end may be missing or added.
    """
    values, flat = in_order_of_inputs(inputs, graph.model), keras.tree.flatten(graph.root.inputs)
    tensors = []
    for value, t in zip(values, flat, strict=True):
        tensor = ops.cast(ops.convert_to_tensor(value), t.dtype)
        if len(tensor.shape) + 1 == len(t.shape):
            tensor = ops.expand_dims(tensor, -1)
        elif len(tensor.shape) == len(t.shape) + 1:
            tensor = ops.squeeze(tensor, -1)
        tensors.append(tensor)
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if "float" not in keras.backend.standardize_dtype(tensor.dtype):
        return True
    return bool(ops.convert_to_numpy(ops.all(ops.isfinite(ops.cast(tensor, "float32")))))
