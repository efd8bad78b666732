"""Operations run on random inputs: checks of registered rules, and rules for operations without one."""

import functools
import inspect
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.cloning import build_like, clone_operation, copy_weights
from keras_taylor.reading.closed_layers import Gate, InnerStructure, gate_inside, kept_entries
from keras_taylor.reading.graph import Call, TensorRef
from keras_taylor.reading.tracing import UnsupportedModelError
from keras_taylor.rules.base import KeptLabels, LabeledTensor, Rule, is_from_keras, unknown_operation
from keras_taylor.rules.labels import FIRST_AXIS, FIXED, BatchAxis, LabelSpace
from keras_taylor.rules.probing import NUM_PROBED_EXAMPLES, ChannelMap, ProbedInput, find_channel_map
from keras_taylor.rules.registry import REGISTERED, apply_rule, rule_for
from keras_taylor.rules.shape import follow_channel_map
from keras_taylor.support.keras_internals import give_values, shapes_only
from keras_taylor.support.types import Array, BoolArray, IntArray, Shape

_NUM_RANDOM_EXAMPLES = 2  # of random inputs
_NUM_FOLLOWED = 3  # examples of random inputs that are followed
_SIZE_IF_UNKNOWN = 5  # of random inputs along axes of unknown size
_SIZES_OF_UNKNOWN = (12, 64)  # the same of probed operations, which may divide an axis or crop it
_NUM_CHECKS = 2  # of a registered rule, with different random numbers
_NUM_DRAWS = 20  # of channels that leave, until some stay along every axis
_LEAVING_FRACTION = 0.4  # of the channels
_COPY_TOLERANCE = 1e-5  # of a copy with the same configuration and weights, relative to the largest value
_TINY = 1e-30  # in the place of a largest value of zero


class _CheckedRule(NamedTuple):
    """A registered rule with everything that the check of a layer depends on."""

    layer_class: type
    wrapped_class: type
    rule: Rule | None
    wrapped_rule: Rule | None
    exact: bool
    layer: str  # configuration and shapes as JSON


# Registered rules that hold, so that they are not checked again.
_rules_that_hold: set[_CheckedRule] = set()

# How channels go through an operation, for the inputs on which it was probed.
_probe_results: weakref.WeakKeyDictionary[
    keras.Operation, dict[tuple[BatchAxis, tuple[ProbedInput, ...]], ChannelMap | None]
] = weakref.WeakKeyDictionary()

# Where the examples are in the outputs of operations that were run, by shape and batch axis of the inputs.
_batches_found: weakref.WeakKeyDictionary[
    keras.Operation, dict[tuple[tuple[Shape, BatchAxis | None], ...], Sequence[BatchAxis | None]]
] = weakref.WeakKeyDictionary()


def check_registered_rule(
    call: Call,
    labels: Sequence[IntArray],
    shapes: Sequence[Shape],
    batches: Sequence[BatchAxis | None],
    exact: bool = True,
) -> None:
    """Refuses a registered rule that does not hold for this layer.

    A layer with closed gates must equal the layer without these channels. So some channels are closed
    where the rule says that they are read, the layer is built without them, and both run on the same
    random inputs. A rule that has passed once is not checked again.

    Args:
        call: The call of the layer.
        labels: Label array of every tensor seen so far, by index.
        shapes: Shape of every tensor.
        batches: Where the examples are in every tensor seen so far.
        exact: Whether channels that are normalized together stay.

    Raises:
        ValueError: if the rule does not hold.
    """
    layer_class, wrapped_class = type(call.operation), type(getattr(call.operation, "layer", None))
    rules = REGISTERED.get(layer_class), REGISTERED.get(wrapped_class)
    if rules == (None, None):
        return
    axes = {index: LabeledTensor(labels[index], shapes[index]).channel_axis for index in call.inputs}
    config = {k: v for k, v in call.operation.get_config().items() if k != "name"}
    sizes = [(shapes[index], axes[index]) for index in (*call.inputs, *call.outputs) if index in axes]
    layer = json.dumps([config, sizes], sort_keys=True, default=repr)
    checked = _CheckedRule(layer_class, wrapped_class, *rules, exact, layer)
    if checked in _rules_that_hold:
        return
    try:
        for seed in range(_NUM_CHECKS):
            _RuleCheck(call, shapes, batches, axes, seed, exact).run()
    except _RuleFailsError as error:
        registered = wrapped_class if rules[0] is None else layer_class
        raise ValueError(
            f"The rule that was registered for `{registered.__name__}` does not hold "
            f"for layer '{call.name}': {error}. Register another one (`register_rule`), or none. "
            f"Received: {call.name}={call.operation!r}"
        ) from error.__cause__
    _rules_that_hold.add(checked)


def find_rule_by_probing(
    call: Call, labels: Sequence[IntArray], shapes: Sequence[Shape], batches: Sequence[BatchAxis | None]
) -> Rule | None:
    """A rule that lets channels through, for an operation without a rule and without weights.

    The operation runs on random inputs. Each channel of an output must depend on the same channels of the
    inputs only, also if there are fewer channels.

    Args:
        call: The call of the operation.
        labels: Label array of every tensor seen so far, by index.
        shapes: Shape of every tensor.
        batches: Where the examples are in every tensor seen so far.

    Returns:
        `None` if the operation has a rule, or if channels cannot be let through.
    """
    operation = call.operation
    if rule_for(operation) is not unknown_operation or not _may_be_probed(operation):
        return None
    axes = [LabeledTensor(labels[index], shapes[index]).channel_axis for index in call.inputs]
    numbers = {shapes[index][axis] for index, axis in zip(call.inputs, axes, strict=True) if axis is not None}
    batch, *others = {batches[index] for index in call.inputs}
    if len(numbers) != 1 or batch is None or others:
        return None
    for size in _SIZES_OF_UNKNOWN:
        inputs = tuple(
            ProbedInput(
                _known_shape(shapes[index], batch, NUM_PROBED_EXAMPLES, size), axis, tensor_dtype(call, index)
            )
            for index, axis in zip(call.inputs, axes, strict=True)
        )
        channel_map = _probe(call, inputs, batch, [shapes[index] for index in call.outputs])
        if channel_map is not None:
            return functools.partial(follow_channel_map, channel_map=channel_map)
    return None


def _may_be_probed(operation: keras.Operation) -> bool:
    """Whether a rule may be guessed: not for layers of Keras, which lock on purpose, nor with weights."""
    if not isinstance(operation, keras.Layer):
        return True
    is_own = is_from_keras(type(operation)) and type(operation) is not keras.layers.Lambda
    return not is_own and not operation.weights and not hasattr(operation, "reset_state")


def _probe(
    call: Call, inputs: tuple[ProbedInput, ...], batch: BatchAxis, shapes: Sequence[Shape]
) -> ChannelMap | None:
    """How channels go through the operation of a call on such inputs; the answer is remembered.

    Args:
        call: The call.
        inputs: What the operation is probed on.
        batch: Where the examples are in all of them.
        shapes: What the shapes of the outputs should be; Keras is wrong about those of some operations.
    """
    operation = call.operation
    results = _probe_results.setdefault(operation, {})
    if (batch, inputs) not in results:

        def run(x: Sequence[Array]) -> list[Array]:
            outputs = run_like_call(call, copy, dict(zip(call.inputs, x, strict=True)))
            if not all(_fits(y, shape, batch) for y, shape in zip(outputs, shapes, strict=True)):
                raise ValueError("another shape than Keras says")
            return outputs

        def run_smaller(x: Sequence[Array]) -> list[Array]:
            clone = clone_operation(operation, call.name)
            return run_like_call(call, clone, dict(zip(call.inputs, x, strict=True)))

        try:
            copy = clone_operation(operation, call.name)
        except ValueError:
            return None
        dtype = getattr(operation, "compute_dtype", "float32")
        results[batch, inputs] = find_channel_map(run, run_smaller, inputs, batch, dtype)
    return results[batch, inputs]


def _fits(array: Array, shape: Shape, batch: BatchAxis) -> bool:
    """Whether an array has a shape, whatever the number of examples is."""
    sizes = enumerate(zip(array.shape, shape, strict=False))
    return array.ndim == len(shape) and all(
        wanted in (None, size) or axis == batch.axis for axis, (size, wanted) in sizes
    )


def find_batches_by_running(
    call: Call,
    shapes: Sequence[Shape],
    batches: Sequence[BatchAxis | None],
    expected: Sequence[BatchAxis | None],
) -> Sequence[BatchAxis | None]:
    """Where the examples are in the outputs of an operation that nobody knows.

    It may fold windows or time steps into the batch axis. So it runs on random inputs, a second time with
    other values in the first example.

    Args:
        call: The call of the operation.
        shapes: Shape of every tensor.
        batches: Where the examples are in every tensor seen so far.
        expected: Where they are if the operation leaves them where they are.

    Returns:
        `expected` if the sizes are as expected, if the operation is known, or if it does not run.
    """
    operation = call.operation
    if _keeps_examples(operation) or any(batches[index] is None for index in call.inputs):
        return expected
    results = _batches_found.setdefault(operation, {})
    key = tuple((shapes[index], batches[index]) for index in call.inputs)
    if key not in results:
        try:
            results[key] = _run_and_follow(call, shapes, batches, expected)
        except Exception:  # a user's layer may raise anything on random numbers
            results[key] = expected
    return results[key]


def _keeps_examples(operation: keras.Operation) -> bool:
    """Whether it is known what an operation does to the batch axis: layers of Keras leave it."""
    if not is_from_keras(type(operation)):
        return False
    is_layer = isinstance(operation, keras.Layer) and type(operation) is not keras.layers.Lambda
    return is_layer or rule_for(operation) is not unknown_operation


def _run_and_follow(
    call: Call,
    shapes: Sequence[Shape],
    batches: Sequence[BatchAxis | None],
    expected: Sequence[BatchAxis | None],
) -> Sequence[BatchAxis | None]:
    """As `find_batches_by_running`."""
    copy, random = clone_operation(call.operation, call.name), np.random.default_rng(0)
    if isinstance(copy, keras.Layer):
        build_like(copy, call.operation, call.name)
        _randomize_weights(copy, random)
    inputs: dict[int, Array] = {}
    others: dict[int, Array] = {}
    for index in call.inputs:
        batch = batches[index] or FIRST_AXIS
        dtype = tensor_dtype(call, index)
        x, other = (random_input(random, shapes[index], dtype, batch, _NUM_FOLLOWED) for _ in range(2))
        is_first = np.expand_dims(batch.rows_of_first(_NUM_FOLLOWED), [*range(1, x.ndim)])
        inputs[index] = x
        others[index] = np.where(np.moveaxis(is_first, 0, batch.axis), other, x)
    outputs = run_like_call(call, copy, inputs)
    if len(outputs) != len(expected):  # Keras is wrong about some operations
        return expected
    sizes = [batch and batch.num_rows * _NUM_FOLLOWED for batch in expected]
    axes = [batch.axis if batch else 0 for batch in expected]
    if all(y.ndim and y.shape[axis] == size for y, axis, size in zip(outputs, axes, sizes, strict=True)):
        return expected
    changed = run_like_call(call, copy, others)
    return [_rows_of_first(before != after) for before, after in zip(outputs, changed, strict=True)]


def _rows_of_first(changed: BoolArray) -> BatchAxis | None:
    """Where the examples are in an output, of which these values changed with the first one."""
    for axis, size in enumerate(changed.shape):
        rows = changed.any(tuple(k for k in range(changed.ndim) if k != axis))
        inner = int(np.argmin(rows))
        outer = size // (_NUM_FOLLOWED * inner) if inner else 0
        batch = BatchAxis(axis, outer, inner)
        if inner and np.array_equal(batch.rows_of_first(_NUM_FOLLOWED), rows):
            return batch
    return None


class _RuleFailsError(Exception):
    """A registered rule does not hold. The message is the end of a sentence."""


class _RuleCheck:
    """One check of a layer's rule: the layer gets labels of its own, and some of its channels leave."""

    def __init__(
        self,
        call: Call,
        shapes: Sequence[Shape],
        batches: Sequence[BatchAxis | None],
        axes: Mapping[int, int | None],
        seed: int,
        exact: bool,
    ) -> None:
        self._call, self._random = call, np.random.default_rng(seed)
        self._space = LabelSpace(exact)
        self._labels: dict[int, IntArray] = {}
        for index in dict.fromkeys(call.inputs):
            rank = len(shapes[index])
            self._labels[index] = np.full((1,) * rank, FIXED)
            axis = axes[index]
            axis = rank - 1 if axis is None else axis
            size = shapes[index][axis] or 0
            if axis and size > 1:
                vector = self._space.new_labels(size, call.name)
                self._labels[index] = np.expand_dims(vector, [k for k in range(rank) if k != axis])
        try:
            self._effect = apply_rule(self._space, call, self._labels, shapes, batches)
        except Exception as error:
            raise _RuleFailsError(f"it failed with {type(error).__name__}: {error}") from error
        self._inputs = {
            index: random_input(self._random, shapes[index], tensor_dtype(call, index), batches[index])
            for index in self._labels
        }

    def run(self) -> None:
        """Raises an error if the layer without some channels differs from the layer with closed gates."""
        kept = self._draw_kept()
        if kept is None:
            return
        name, operation = self._call.name, self._call.operation
        whole = clone_operation(operation, name)
        build_like(whole, operation, name)
        try:
            run_like_call(self._call, whole, self._inputs)
        except Exception as error:
            raise _RuleFailsError(f"the layer failed on random numbers ({_summarize(error)})") from error
        _randomize_weights(whole, self._random)
        expected = self._run_gated(whole, kept)
        try:
            found = self._run_smaller(whole, kept)
        except Exception as error:
            raise _RuleFailsError(f"without some channels the layer failed ({_summarize(error)})") from error
        for y, y_small, labels in zip(expected, found, self._effect.outputs, strict=True):
            fits = all(a in (1, b) for a, b in zip(labels.shape, y.shape, strict=False))
            if labels.ndim != y.ndim or not fits:
                raise _RuleFailsError(f"it says {labels.shape} of an output with the shape {y.shape}")
            self._compare(_remove_channels(y, labels, kept), y_small)

    def _compare(self, expected: Array, found: Array) -> None:
        if expected.shape != found.shape:
            raise _RuleFailsError(
                f"without some channels it puts out the shape {found.shape}, and should {expected.shape}"
            )
        difference = 0.0
        if expected.size:
            difference = np.abs(expected - found).max() / max(np.abs(expected).max(), _TINY)
        dtype = getattr(self._call.operation, "compute_dtype", "float32")
        if not difference <= equivalence_tolerance(dtype):
            raise _RuleFailsError(
                "without some channels, those that stay come out otherwise than with these closed: they "
                f"differ by {difference:.2g} of the largest value"
            )

    def _draw_kept(self) -> BoolArray | None:
        """A mask over labels that keeps some along every axis; `None` if no channel can leave."""
        roots, locks = self._space.resolve()
        free = (locks < 0) & (roots != FIXED)
        if not free.any():
            return None
        vectors = [*self._labels.values(), *self._effect.outputs]
        vectors += [v for axes in self._effect.weights.values() for v in axes if v is not None]
        for _ in range(_NUM_DRAWS):
            leaving = free & (self._random.random(len(roots)) < _LEAVING_FRACTION)[roots]
            if leaving.any() and all((~leaving[v]).any() for v in vectors):
                return ~leaving
        return None

    def _run_gated(self, whole: keras.Layer, kept: BoolArray) -> list[Array]:
        """Outputs of the whole layer with closed gates, where the rule says that channels are read."""
        if self._effect.call_with_gate is None:
            read = {self._call.inputs[number] for number in self._effect.reads}
            inputs = {
                index: x * kept[self._labels[index]] if index in read else x
                for index, x in self._inputs.items()
            }
            return run_like_call(self._call, whole, inputs)
        ((index, x),) = self._inputs.items()
        gate = ops.convert_to_tensor(kept[self._labels[index]].astype("float32"))
        y = self._effect.call_with_gate(whole, ops.convert_to_tensor(x), gate)
        return [np.asarray(ops.convert_to_numpy(ops.cast(y, "float32")))]

    def _run_smaller(self, whole: keras.Layer, kept: BoolArray) -> list[Array]:
        """Outputs of the layer without the channels that leave, with the weights of the whole one."""
        kept_labels = KeptLabels(kept.__getitem__)
        inputs = {i: _remove_channels(x, self._labels[i], kept) for i, x in self._inputs.items()}
        arguments = kept_labels.changes(self._effect.arguments)
        changes = kept_labels.changes(self._effect.config)
        small = clone_operation(self._call.operation, self._call.name, changes)
        run_like_call(self._call, small, inputs, arguments)  # builds it
        copy_weights(whole, small, kept_labels.weight_masks(whole, self._effect))
        return run_like_call(self._call, small, inputs, arguments)


def _randomize_weights(layer: keras.Layer, random: np.random.Generator) -> None:
    for weight in layer.weights:
        if "float" in weight.dtype:
            weight.assign(random.uniform(0.5, 1.5, weight.shape).astype("float32"))


def _remove_channels(value: Array, labels: IntArray, kept: BoolArray) -> Array:
    """An array without the channels that leave, given its labels."""
    axis = next((k for k, size in enumerate(labels.shape) if size > 1), None)
    return value if axis is None else np.compress(kept[labels.reshape(-1)], value, axis)


def equivalence_tolerance(dtype: str) -> float:
    """The largest difference between a gated and a smaller layer, relative to the largest value.

    Args:
        dtype: Name of the type in which the layer computes.
    """
    return 1e-4 if dtype in ("float32", "float64") else 3e-2


def run_like_call(
    call: Call,
    operation: keras.Operation,
    inputs: Mapping[int, Array],
    arguments: Mapping[int, Any] | None = None,
) -> list[Array]:
    """Runs an operation with the arguments of a call, at inference.

    Args:
        call: The call.
        operation: The operation that runs instead of the call's.
        inputs: An array for each of the call's tensors, by index.
        arguments: Other values of arguments, by position in the flattened call.

    Returns:
        The flattened outputs, float32.
    """
    flat = [ops.convert_to_tensor(inputs[x.index]) if isinstance(x, TensorRef) else x for x in call.flat]
    for position, value in (arguments or {}).items():
        flat[position] = value
    args, kwargs = keras.tree.pack_sequence_as((call.args, call.kwargs), flat)
    if "training" in inspect.signature(operation.call).parameters:
        kwargs = {**kwargs, "training": False}
    outputs = keras.tree.flatten(operation(*args, **kwargs))
    if any("complex" in str(getattr(y, "dtype", "")) for y in outputs):
        raise ValueError("complex numbers come out")
    return [np.asarray(ops.convert_to_numpy(ops.cast(y, "float32"))) for y in outputs]


def random_input(
    random: np.random.Generator,
    shape: Shape,
    dtype: str,
    batch: BatchAxis | None = None,
    num_examples: int = _NUM_RANDOM_EXAMPLES,
) -> Array:
    """Random values for a tensor of this shape: a few examples, and a small size where none is known."""
    known_shape = _known_shape(shape, batch, num_examples)
    if "float" in dtype:
        return random.normal(size=known_shape).astype("float32")
    return random.integers(0, 2, known_shape).astype(dtype)


def _known_shape(
    shape: Shape,
    batch: BatchAxis | None,
    num_examples: int = _NUM_RANDOM_EXAMPLES,
    size: int = _SIZE_IF_UNKNOWN,
) -> tuple[int, ...]:
    batch = batch or FIRST_AXIS
    sizes = [size if known is None else known for known in shape]
    sizes[batch.axis] = num_examples * batch.num_rows
    return tuple(sizes)


def tensor_dtype(call: Call, index: int) -> str:
    """The type of one of a call's input tensors."""
    tensors = [x for x in call.site.flat if isinstance(x, keras.KerasTensor)]
    return keras.backend.standardize_dtype(tensors[call.inputs.index(index)].dtype)


def _summarize(error: Exception) -> str:
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def make_copy(call: Call, changes: Mapping[str, Any]) -> keras.Layer:
    """The layer of a call with other configuration values, built without values of weights.

    Raises:
        UnsupportedModelError: if it cannot be built.
    """
    operation = call.operation
    with shapes_only():
        clone = clone_operation(operation, call.name, changes)
        try:
            build_like(clone, operation, call.name)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"It cannot be built. Received: {operation!r}") from error
    return clone


def computes_the_same(
    call: Call, shapes: Sequence[Shape], structure: InnerStructure, num_draws: int = 2
) -> bool:
    """Whether the layer built for fewer units has the outputs of the whole layer with closed gates.

    Both are copies of the layer with random weights. A copy with the layer's own weights and configuration
    must also have the outputs of the layer.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of its graph.
        structure: The units inside, with the configuration values that count them.
        num_draws: How often units, weights and inputs are drawn.
    """
    try:
        return all(_CopyTrial(call, shapes, seed).passes(structure) for seed in range(num_draws))
    except UnsupportedModelError:
        return False


def inputs_with_masks(call: Call, shapes: Sequence[Shape]) -> dict[int, Array]:
    """Random inputs for a call of a layer, by index. Integers may be masks: they are one.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of its graph.
    """
    random = np.random.default_rng(0)
    inputs = {index: random_input(random, shapes[index], tensor_dtype(call, index)) for index in call.inputs}
    return {index: x if x.dtype.kind == "f" else np.ones_like(x) for index, x in inputs.items()}


class _CopyTrial:
    """A layer and its copies, run on the same random inputs.

    Args:
        call: The call of the layer.
        shapes: Shape of every tensor of its graph.
        seed: Of units, weights and inputs.
    """

    def __init__(self, call: Call, shapes: Sequence[Shape], seed: int) -> None:
        self._call, self._random = call, np.random.default_rng(seed)
        random = np.random.default_rng(seed)
        self._inputs = {
            index: self._values(random, shapes[index], index, seed) for index in dict.fromkeys(call.inputs)
        }

    def passes(self, structure: InnerStructure) -> bool:
        """As `computes_the_same`, for one draw."""
        layer = self._call.operation
        whole = make_copy(self._call, {})
        give_values(whole)
        copy_weights(layer, whole)
        if largest_difference(self._run(whole), self._run(layer)) > _COPY_TOLERANCE:
            return False
        for weight in whole.weights:
            if "float" in weight.dtype:
                weight.assign(self._random.normal(0, 0.5, weight.shape).astype("float32"))
        kept = draw_kept_units(structure, self._random)
        small = make_copy(self._call, structure.config_changes(kept))
        if [tuple(weight.shape) for weight in small.weights] != structure.shapes_of(layer, kept):
            return False
        give_values(small)
        copy_weights(whole, small, structure.weight_masks(kept))
        gates = {number: _gate_of(kept_entries(units, kept)) for number, units in structure.reads.items()}
        closed, cut = self._run(whole, gates), self._run(small)
        tolerance = equivalence_tolerance(layer.compute_dtype)
        # closed gates must make a difference, or else the comparison shows nothing
        has_effect = largest_difference(self._run(whole), closed) > tolerance
        return largest_difference(cut, closed) <= tolerance and has_effect

    def _run(self, layer: keras.Layer, gates: Mapping[int, Gate] | None = None) -> list[Array]:
        """Flattened outputs of a layer, called as in the call."""
        with gate_inside(layer, gates or {}):
            return run_like_call(self._call, layer, self._inputs)

    def _values(self, random: np.random.Generator, shape: Shape, index: int, seed: int) -> Array:
        """Random values of an input; integers may be masks, and each row of a mask needs a one."""
        dtype = tensor_dtype(self._call, index)
        values = random_input(random, shape, dtype)
        if "float" not in dtype:
            values[:, : None if seed == 0 else 1] = 1
        return values


def draw_kept_units(structure: InnerStructure, random: np.random.Generator) -> BoolArray:
    """A random bool array `(num_units,)`: some units of each group stay, and some leave."""
    parts = []
    for _, num in structure.groups:
        kept = random.random(num) < 0.6
        stays, leaves = random.permutation(num)[:2]
        kept[stays], kept[leaves] = True, False
        parts.append(kept)
    return np.concatenate(parts)


def _gate_of(mask: BoolArray) -> Gate:
    """A gate that is 1 where the mask is true, else 0."""
    return lambda x: x * keras.ops.convert_to_tensor(mask.astype("float32"), x.dtype)


def largest_difference(first: Sequence[Array], second: Sequence[Array]) -> float:
    """Largest difference of outputs, relative to the second ones' largest value; infinite for a NaN."""
    differences = [
        np.abs(a - b).max() / max(np.abs(b).max(), _TINY) for a, b in zip(first, second, strict=True)
    ]
    largest = max(differences)
    return float(largest) if np.isfinite(largest) else np.inf
