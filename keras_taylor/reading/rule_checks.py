"""Layers tried out on random numbers: registered rules, and layers without one."""

import inspect
import json
import weakref

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.cloning import build_like, clone_operation, copy_weights
from keras_taylor.reading.graph import TensorRef
from keras_taylor.rules import elementwise
from keras_taylor.rules.base import KeptLabels, LabeledTensor, unknown_operation
from keras_taylor.rules.labels import FIXED, LabelSpace
from keras_taylor.rules.probing import is_channelwise
from keras_taylor.rules.registry import REGISTERED, apply_rule, rule_for

_BATCH, _UNKNOWN_SIZE = 2, 5  # of random inputs: examples, and axes of unknown size
_NUM_DRAWS, _NUM_TRIES = 2, 20
_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}  # relative; other types are less exact
_passed: set = set()
_probed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def check_registered_rule(call, labels, shapes, exact=True):
    """Refuses a registered rule that does not hold for this layer.

    Gates at zero must equal the layer without these channels: some channels are closed
    where the rule says that they are read, the layer is cut, and both run on the same
    random inputs. What has passed once is not tried again.

    Args:
        call: A `graph.Call`.
        labels: Label array of every tensor seen so far, by index.
        shapes: Shape of every tensor.
        exact: Whether channels that are normalized together stay.

    Raises:
        ValueError: if the rule does not hold.
    """
    classes = [type(call.operation), type(getattr(call.operation, "layer", None))]  # of a wrapper
    registered = tuple(REGISTERED.get(one) for one in classes)
    if registered == (None, None):
        return
    rule = rule_for(call.operation)
    axes = {index: LabeledTensor(labels[index], shapes[index]).channel_axis for index in call.inputs}
    config = {k: v for k, v in call.operation.get_config().items() if k != "name"}
    sizes = [(shapes[index], axes[index]) for index in (*call.inputs, *call.outputs) if index in axes]
    key = (*classes, *registered, exact, json.dumps([config, sizes], sort_keys=True, default=repr))
    if key in _passed:
        return
    try:
        for seed in range(_NUM_DRAWS):
            _Trial(call, shapes, axes, rule, seed, exact).run()
    except _NotHeldError as error:
        raise ValueError(
            f"The rule that was registered for `{classes[registered[0] is None].__name__}` does not hold "
            f"for layer '{call.name}': {error}. Register another one (`register_rule`), or none. "
            f"Received: {call.name}={call.operation!r}"
        ) from error.__cause__
    _passed.add(key)


def find_rule_by_probing(call, labels, shapes):
    """The rule of an operation that has none and no weights, found by running it; `None` if it has one.

    Where each channel stands for itself, also with fewer channels, it is let through.

    Args:
        call: A `graph.Call`.
        labels: Label array of every tensor seen so far, by index.
        shapes: Shape of every tensor.
    """
    operation = call.operation
    if rule_for(operation) is not unknown_operation or not _is_probed(operation):
        return None
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        return None
    (index,) = call.inputs
    axis = LabeledTensor(labels[index], shapes[index]).channel_axis
    if (
        axis in (None, 0)
        or shapes[index] != shapes[call.outputs[0]]
        or "float" not in tensor_dtype(call, index)
    ):
        return None
    found = _probed.setdefault(operation, {})
    if (shapes[index], axis) not in found:
        found[shapes[index], axis] = _stands_for_itself(call, shapes[index], axis)
    return elementwise.unary if found[shapes[index], axis] else None


def _is_probed(operation):
    """Keras' own layers without a rule lock on purpose; what has weights is never guessed."""
    if not isinstance(operation, keras.Layer):
        return True
    own = type(operation).__module__.split(".")[0] == "keras" and type(operation) is not keras.layers.Lambda
    return not own and not operation.weights and not hasattr(operation, "reset_state")


def _stands_for_itself(call, shape, axis):
    (index,), operation = call.inputs, call.operation

    def run_anew(x):
        return run_like_call(call, clone_operation(operation, call.name), {index: x})[0]

    def run(x):
        return run_like_call(call, copy, {index: x})[0]

    try:
        copy = clone_operation(operation, call.name)
    except ValueError:
        return False
    shape = (_BATCH, *(_UNKNOWN_SIZE if d is None else d for d in shape[1:]))
    return is_channelwise(run, run_anew, shape, axis, getattr(operation, "compute_dtype", "float32"))


class _NotHeldError(Exception):
    """What was found, as the end of a sentence."""


class _Trial:
    """One layer with labels of its own, some of which leave."""

    def __init__(self, call, shapes, axes, rule, seed, exact):
        self._call, self._random = call, np.random.default_rng(seed)
        self._space, self._labels = LabelSpace(exact), {}
        for index in dict.fromkeys(call.inputs):
            rank = len(shapes[index])
            self._labels[index] = np.full((1,) * rank, FIXED)
            axis = rank - 1 if axes[index] is None else axes[index]
            if axis and (shapes[index][axis] or 0) > 1:
                vector = self._space.new_labels(shapes[index][axis], call.name)
                self._labels[index] = np.expand_dims(vector, [k for k in range(rank) if k != axis])
        positions = call.tensor_positions
        try:
            self._effect = apply_rule(self._space, call, self._labels, shapes, positions, rule)
        except Exception as error:
            raise _NotHeldError(f"it failed with {type(error).__name__}: {error}") from error
        self._inputs = {index: self._random_input(index, shapes[index]) for index in self._labels}

    def run(self):
        kept = self._draw()
        if kept is None:
            return
        self._kept, self._kept_labels = kept, KeptLabels(kept.__getitem__)
        whole = clone_operation(self._call.operation, self._call.name)
        build_like(whole, self._call.operation, self._call.name)
        try:
            self._outputs(whole, self._inputs)
        except Exception as error:
            raise _NotHeldError(f"the layer failed on random numbers ({_said(error)})") from error
        for weight in whole.weights:
            if "float" in weight.dtype:
                weight.assign(self._random.uniform(0.5, 1.5, weight.shape).astype("float32"))
        wanted = self._closed(whole)
        try:
            given = self._outputs(self._cut(whole), {i: self._short(i) for i in self._inputs}, cut=True)
        except _NotHeldError:
            raise
        except Exception as error:
            raise _NotHeldError(f"without some channels the layer failed ({_said(error)})") from error
        for y, z, labels in zip(wanted, given, self._effect.outputs, strict=True):
            if (
                any(a not in (1, b) for a, b in zip(labels.shape, y.shape, strict=False))
                or labels.ndim != y.ndim
            ):
                raise _NotHeldError(f"it says {labels.shape} of an output with the shape {y.shape}")
            self._compare(self._compressed(y, labels), z)

    def _compare(self, wanted, given):
        if wanted.shape != given.shape:
            raise _NotHeldError(
                f"without some channels it puts out the shape {given.shape}, and should {wanted.shape}"
            )
        difference = np.abs(wanted - given).max() / max(np.abs(wanted).max(), 1e-30) if wanted.size else 0.0
        dtype = getattr(self._call.operation, "compute_dtype", "float32")
        if not difference <= _TOLERANCE.get(dtype, 3e-2):
            raise _NotHeldError(
                "without some channels, those that stay come out otherwise than with these closed: they "
                f"differ by {difference:.2g} of the largest value"
            )

    def _draw(self):
        """Which labels stay: bool array; some of each axis do. `None` where none can leave."""
        roots, locks = self._space.resolve()
        free = (locks < 0) & (roots != FIXED)
        if not free.any():
            return None
        vectors = [*self._labels.values(), *self._effect.outputs]
        vectors += [v for axes in self._effect.weights.values() for v in axes if v is not None]
        for _ in range(_NUM_TRIES):
            leaving = free & (self._random.random(len(roots)) < 0.4)[roots]
            if leaving.any() and all((~leaving[v]).any() for v in vectors):
                return ~leaving
        return None

    def _random_input(self, index, shape):
        return random_input(self._random, shape, tensor_dtype(self._call, index))

    def _closed(self, whole):
        """What the layer puts out while what leaves is closed."""
        if self._effect.call_with_gate is None:
            return self._outputs(whole, {i: self._gated(i) for i in self._inputs})
        (index,) = self._inputs
        gate = ops.convert_to_tensor(self._kept[self._labels[index]].astype("float32"))
        y = self._effect.call_with_gate(whole, ops.convert_to_tensor(self._inputs[index]), gate)
        return [np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")))]

    def _gated(self, index):
        """An input with what leaves closed, where the rule says that the channels are read."""
        read = {self._call.inputs[number] for number in self._effect.reads}
        return self._inputs[index] * self._kept[self._labels[index]] if index in read else self._inputs[index]

    def _short(self, index):
        return self._compressed(self._inputs[index], self._labels[index])

    def _compressed(self, value, labels):
        axis = next((k for k, size in enumerate(labels.shape) if size > 1), None)
        return value if axis is None else np.compress(self._kept[labels.reshape(-1)], value, axis)

    def _cut(self, whole):
        changes = self._kept_labels.changes(self._effect.config)
        small = clone_operation(self._call.operation, self._call.name, changes)
        self._outputs(small, {i: self._short(i) for i in self._inputs}, cut=True)  # builds it
        copy_weights(whole, small, self._kept_labels.weight_masks(whole, self._effect))
        return small

    def _outputs(self, layer, inputs, cut=False):
        return run_like_call(self._call, layer, inputs, self._arguments() if cut else {})

    def _arguments(self):
        return self._kept_labels.changes(self._effect.arguments)


def run_like_call(call, operation, inputs, arguments=None):
    """Runs an operation as a call does, at inference.

    Args:
        call: A `graph.Call`.
        operation: What runs in the place of the call's operation.
        inputs: An array for each of the call's tensors, by index.
        arguments: Other values of arguments, by position in the flattened call.

    Returns:
        Its flattened outputs as a list of arrays.
    """
    flat = [ops.convert_to_tensor(inputs[x.index]) if isinstance(x, TensorRef) else x for x in call.flat]
    for position, value in (arguments or {}).items():
        flat[position] = value
    args, kwargs = keras.tree.pack_sequence_as((call.args, call.kwargs), flat)
    if "training" in inspect.signature(operation.call).parameters:
        kwargs = {**kwargs, "training": False}
    outputs = keras.tree.flatten(operation(*args, **kwargs))
    return [np.asarray(ops.convert_to_numpy(ops.cast(y, "float32"))) for y in outputs]


def random_input(random, shape, dtype):
    """Random values for a tensor of this shape, unknown sizes being small."""
    shape = (_BATCH, *(_UNKNOWN_SIZE if d is None else d for d in shape[1:]))
    if "float" in dtype:
        return random.normal(size=shape).astype("float32")
    return random.integers(0, 2, shape).astype(dtype)


def tensor_dtype(call, index):
    """The type of one of a call's tensors."""
    tensors = [x for x in call.site.flat if isinstance(x, keras.KerasTensor)]
    return keras.backend.standardize_dtype(tensors[call.inputs.index(index)].dtype)


def _said(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
