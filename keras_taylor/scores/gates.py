"""The gate layer, and the wrapper model that carries gates."""

import contextlib
import functools
import inspect

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.cloning import build_like, clone_operation, copy_weights
from keras_taylor.reading.graph import TensorRef
from keras_taylor.scores.losses import example_losses
from keras_taylor.support.replicas import num_replicas, sum_over_replicas

# Rows of the statistics: sums over examples, or over batches, of functions of the
# gate derivative g of each example.
ROWS = ("sum", "absolute", "square", "batch_square", "examples", "batches")


class Gates(keras.layers.Layer):
    """One gate for each channel unit, and the statistics of its derivatives.

    Called on a tensor whose first axis is the batch, it returns the carrier: the
    mask, one row an example, shape `(batch, num_units + 1)`, float32; the last
    column is 1, for channels without a gate. In the backward pass the carrier
    receives dLoss/dgate of each example; the gradient of `statistics` is its old
    value plus this batch's, which a Keras optimizer assigns to it.

    Args:
        num_units: Number of gates.
        rows: Names of the rows of the statistics.

    Attributes:
        averaged: Whether the loss is the mean over the batch, so that what arrives is
            each example's derivative divided by their number. Read when a step is
            traced.
    """

    def __init__(self, num_units, rows=ROWS, **kwargs):
        super().__init__(dtype="float32", **kwargs)
        self.num_units = num_units
        self.averaged = False
        self.mask = self.add_weight(
            shape=(num_units,), initializer="ones", trainable=False, autocast=False, name="mask"
        )
        self.statistics = self.add_weight(
            shape=(len(rows), num_units),
            initializer="zeros",
            autocast=False,
            overwrite_with_gradient=True,
            aggregation="only_first_replica",  # the same in all: `batch_statistics` adds up
            name="statistics",
        )
        self.built = True

    def call(self, like):
        """The carrier for a batch as large as `like`."""
        batch = ops.shape(like)[0]
        mask = ops.convert_to_tensor(self.mask)
        statistics = ops.convert_to_tensor(self.statistics)
        carrier = _carrier(batch, self.num_units, self.averaged)(mask, statistics)
        return ops.concatenate([carrier, ops.ones((batch, 1), carrier.dtype)], axis=1)


def _carrier(batch, num_units, averaged):
    @ops.custom_gradient
    def carry(mask, statistics):
        def backward(*arguments, upstream=None):
            derivative = arguments[0] if upstream is None else upstream
            if averaged:
                derivative = derivative * ops.cast(batch * num_replicas(), derivative.dtype)
            update = batch_statistics(derivative, batch, num_units)
            return ops.zeros_like(mask), statistics + update

        return ops.broadcast_to(mask, (batch, num_units)), backward

    return carry


def batch_statistics(derivative, batch, num_units):
    """The rows of `ROWS` for one batch of gate derivatives `(batch, num_units)`, on all replicas together."""
    ones = ops.ones((num_units,), derivative.dtype)
    total, absolute, square, examples = ops.unstack(
        sum_over_replicas(
            ops.stack(
                [
                    ops.sum(derivative, 0),
                    ops.sum(ops.abs(derivative), 0),
                    ops.sum(ops.square(derivative), 0),
                    ones * ops.cast(batch, derivative.dtype),
                ]
            )
        ),
        4,
    )
    return ops.stack([total, absolute, square, ops.square(total / examples), examples, ones])


class GatedNetwork(keras.layers.Layer):
    """A model run call by call, with a gate on every edge into a mixing layer.

    Args:
        channels: `groups.LabeledModel` of the model.
        frozen: Run a clone with weights of its own, none of them trainable, so that
            running, fitting and masking leaves the model as it is; otherwise run the
            model's own layers, and train them.
        gates: `Gates`; `None`: plain ones.
    """

    def __init__(self, labeled, frozen=True, gates=None, **kwargs):
        super().__init__(autocast=False, **kwargs)  # inputs reach the first layers as they are
        operations = {id(c.operation): c.operation for c in labeled.graph.calls}
        if frozen:
            operations = _clone_operations(labeled)
            self.network_layers = [c for c in operations.values() if isinstance(c, keras.Layer)]
        else:
            self.model = labeled.graph.model
        # the last: its variables are the last ones
        self.gates = gates or Gates(labeled.num_units, name="gates")
        self._plumbing = _Plumbing(labeled, operations)
        self.built = True

    def call(self, inputs, training=None):
        """The model's outputs, each gate applied."""
        graph = self._plumbing.graph
        tensors = dict(zip(graph.inputs, _flat_inputs(inputs, graph), strict=True))
        for _ in self._run(tensors, training):
            pass
        flat = [tensors[index] for index in graph.outputs]
        # not kept as an attribute: Keras would turn its dicts and lists into others
        return keras.tree.pack_sequence_as(graph.root.outputs, flat)

    def copy_of(self, operation):
        """What runs here in the place of one of the model's operations."""
        return self._plumbing.operations[id(operation)]

    def first_not_finite(self, inputs):
        """Name of the first operation whose output holds NaN or infinity, `None` if all is well."""
        graph = self._plumbing.graph
        tensors = dict(zip(graph.inputs, _flat_inputs(inputs, graph), strict=True))
        for call in self._run(tensors, training=False):
            if not all(_is_finite(tensors[index]) for index in call.outputs):
                return call.name
        return None

    def _run(self, tensors, training):
        """Runs call by call, filling `tensors`; yields each call that is done."""
        plumbing = self._plumbing
        carrier = self.gates(next(iter(tensors.values())))
        gated = {}
        for call in plumbing.graph.calls:
            operation = plumbing.operations[id(call.operation)]
            if id(call) in plumbing.normalized:
                outputs = [plumbing.normalized[id(call)](operation, tensors[call.inputs[0]], carrier)]
            else:
                args, kwargs = plumbing.arguments(call, tensors, gated, carrier)
                if training is not None and id(call.operation) in plumbing.takes_training:
                    kwargs["training"] = training
                with plumbing.gated_within(call, carrier):
                    outputs = keras.tree.flatten(operation(*args, **kwargs))
            tensors.update(zip(call.outputs, outputs, strict=True))
            yield call


class _Plumbing:
    """What runs where, and which edges are gated: out of reach of Keras' attribute tracking."""

    def __init__(self, labeled, operations):
        self.graph = labeled.graph
        self.operations = operations
        self.takes_training = {
            key for key, o in operations.items() if "training" in inspect.signature(o.call).parameters
        }
        self._edges, self._within = _edges(labeled), _within(labeled)
        self.normalized = _normalized(labeled)  # calls that run otherwise while gates are closed

    def arguments(self, call, tensors, gated, carrier):
        """The arguments of a call, tensors in their places; `gated` keeps what was gated before."""

        def value(argument):
            if not isinstance(argument, TensorRef):
                return argument
            edge = self._edges.get((id(call), argument.index))
            if edge is None:
                return tensors[argument.index]
            key = (argument.index, id(edge))
            if key not in gated:
                gated[key] = edge.apply(tensors[argument.index], carrier)
            return gated[key]

        return keras.tree.map_structure(value, (call.args, dict(call.kwargs)))

    @contextlib.contextmanager
    def gated_within(self, call, carrier):
        """A context within which what a call reads inside of it is gated."""
        with contextlib.ExitStack() as stack:
            for read, edge in self._within.get(id(call), ()):
                stack.enter_context(read.apply_gate(self.operations[id(call.operation)], edge.gate(carrier)))
            yield


class GatedModel(keras.Model):
    """A model with gates; frozen for scoring: dropout off, BatchNorm on moving statistics.

    Args:
        channels: `groups.LabeledModel` of the model.
        frozen, gates: As in `GatedNetwork`.
    """

    def __init__(self, labeled, frozen=True, gates=None, **kwargs):
        policy = labeled.graph.model.dtype_policy
        super().__init__(autocast=False, dtype=policy, **kwargs)
        self._frozen = frozen
        self.network = GatedNetwork(labeled, frozen, gates, name="network", dtype=policy)
        self.output_names = list(getattr(labeled.graph.model, "output_names", None) or [])
        if not self.output_names:
            del self.output_names

    def call(self, inputs, training=None):
        """The model's outputs; frozen, it is never in training mode, whatever `fit` asks for."""
        return self.network(inputs, training=False if self._frozen else training)

    def example_losses(self, loss, mean=False):
        """What to compile with for scoring, see `losses.example_losses`."""
        return example_losses(loss, mean)

    @property
    def mask(self):
        """1 for units that stay, 0 for those taken out: a float32 array `(num_units,)`."""
        _synchronize(self)
        return ops.convert_to_numpy(self.network.gates.mask)

    @mask.setter
    def mask(self, value):
        _synchronize(self)
        self.network.gates.mask.assign(np.asarray(value, np.float32))

    @property
    def statistics(self):
        """The gates' rows, a float64 array `(num_rows, num_units)`."""
        _synchronize(self)
        return ops.convert_to_numpy(self.network.gates.statistics).astype(np.float64)

    @statistics.setter
    def statistics(self, value):
        _synchronize(self)
        self.network.gates.statistics.assign(np.asarray(value, np.float32))

    def take_statistics(self):
        """Returns the statistics, and sets them to 0."""
        values = self.statistics
        self.statistics = np.zeros(values.shape)
        return values


def _synchronize(model):
    """Within `fit`, JAX' trainer keeps the values apart from the variables until it is asked.

    Keras' own callbacks ask like this whenever they read `self.model`.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


class _Edge:
    """How one edge takes its gates out of the carrier."""

    def __init__(self, units, axis, rank):
        self.shape = [1] * rank
        self.shape[axis] = units.size
        self.repeats = 1
        self.start = None
        period = _period(units)
        if period < units.size:
            self.repeats, units = units.size // period, units[:period]
        self.units = units.astype("int32")
        if units[0] >= 0 and (np.diff(units) == 1).all():
            self.start = int(units[0])

    def apply(self, x, carrier):
        """`x` times the gate of each of its channels."""
        return _with_mask_of(x, x * ops.cast(self.gate(carrier), x.dtype))

    def gate(self, carrier):
        """The gates of all channels, in the rank of the tensor."""
        if self.start is None:
            gate = ops.take(carrier, np.where(self.units < 0, carrier.shape[1] - 1, self.units), axis=1)
        else:
            gate = carrier[:, self.start : self.start + len(self.units)]
        if self.repeats > 1:
            gate = ops.tile(gate, (1, self.repeats))
        return ops.reshape(gate, (-1, *self.shape[1:]))


def _with_mask_of(x, y):
    mask = getattr(x, "_keras_mask", None)
    if mask is not None:
        y._keras_mask = mask
    return y


def _period(units):
    """Length of the shortest prefix that, repeated, gives the whole (a flattened map)."""
    again = np.flatnonzero(units[1:] == units[0]) + 1
    for period in again[:1].tolist():
        if units.size % period == 0 and (units.reshape(-1, period) == units[:period]).all():
            return period
    return units.size


def _edges(labeled):
    """Gated edges by call and tensor; equal ones of a tensor are one object."""
    edges, shared = {}, {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for number, axis in effect.reads.items():
            index = call.inputs[number]
            units = labeled.units(labeled.labels[index])
            if (units >= 0).any():
                key = (index, axis)
                if key not in shared:
                    shared[key] = _Edge(units.reshape(-1), axis, units.ndim)
                edges[id(call), index] = shared[key]
    return edges


def _edge_of(units):
    """The edge of a tensor whose units vary along one axis."""
    return _Edge(units.reshape(-1), int(np.argmax(units.shape)), units.ndim)


def _within(labeled):
    """For each call: what it reads through gates where no tensor of the graph is, and the edges."""
    found = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for read in effect.internal_reads:
            units = labeled.units(read.labels)
            if (units >= 0).any():
                edge = _edge_of(units)
                found.setdefault(id(call), []).append((read, edge))
    return found


def _normalized(labeled):
    """For calls that normalize units together: functions of the layer, its input and the carrier."""
    found = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        units = labeled.units(labeled.labels[call.inputs[0]]) if effect.call_with_gate else np.full(1, -1)
        if (units >= 0).any():
            edge = _edge_of(units)
            found[id(call)] = functools.partial(_run_normalized, effect.call_with_gate, edge)
    return found


def _run_normalized(gated, edge, layer, x, carrier):
    return _with_mask_of(x, gated(layer, x, edge.gate(carrier)))


def _clone_operations(labeled):
    clones = {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if id(call.operation) not in clones:
            clone = clone_operation(call.operation, call.name)
            if isinstance(clone, keras.Layer):
                build_like(clone, call.operation, call.name)
                copy_weights(call.operation, clone)
                clone.trainable = False
                clone.activity_regularizer = None
                if effect.accelerate is not None:
                    effect.accelerate(clone)
            clones[id(call.operation)] = clone
    return clones


def _flat_inputs(inputs, graph):
    """Inputs in the model's order, whether given as a tensor, a list or a dict by name."""
    structure = graph.root.inputs
    flat = keras.tree.flatten(structure)
    if isinstance(inputs, dict) and not isinstance(structure, dict):
        values = [inputs[t.name] for t in flat]
    else:
        values = keras.tree.flatten(inputs)
    return [ops.cast(ops.convert_to_tensor(x), t.dtype) for x, t in zip(values, flat, strict=True)]


def _is_finite(tensor):
    if "float" not in keras.backend.standardize_dtype(tensor.dtype):
        return True
    return bool(ops.convert_to_numpy(ops.all(ops.isfinite(ops.cast(tensor, "float32")))))
