"""Layers that stay closed: run with gates inside, and rebuilt from other configuration values."""

import contextlib

import keras
import numpy as np

from keras_taylor.reading.cloning import build_like, clone_operation, copy_weights
from keras_taylor.reading.configurations import configuration_of
from keras_taylor.reading.rule_checks import random_input, run_like_call, tensor_dtype
from keras_taylor.reading.tracing import UnsupportedModelError
from keras_taylor.rules.attention import inner_layers
from keras_taylor.rules.base import override_attributes

_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}
_EXACT = 1e-5  # a copy that is whole, relative


@contextlib.contextmanager
def gate_inside(layer, gates):
    """Within it, what inner layers read is gated.

    Args:
        layer: The outer layer.
        gates: For each inner layer that reads channels, by its number among `inner_layers(layer)`:
            a function from the tensor that it is called on to what it gets.
    """
    inner = inner_layers(layer) if gates else ()
    with contextlib.ExitStack() as stack:
        for number, gate in gates.items():
            stack.enter_context(override_attributes(inner[number], call=_gated(inner[number].call, gate)))
        yield


@contextlib.contextmanager
def record_inside(layer, number):
    """Within it, what an inner layer is called on and what it puts out goes into the two lists given."""
    inner, inputs, outputs = inner_layers(layer)[number], [], []

    def recorded(x):
        inputs.append(keras.ops.convert_to_numpy(x))
        return x

    call = _gated(inner.call, recorded)

    def recording(*args, **kwargs):
        y = call(*args, **kwargs)
        outputs.append(keras.ops.convert_to_numpy(y))
        return y

    with override_attributes(inner, call=recording):
        yield inputs, outputs


def _gated(call, gate):
    def gated(*args, **kwargs):
        if args:
            return call(gate(args[0]), *args[1:], **kwargs)
        name = next(iter(kwargs))
        return call(**{**kwargs, name: gate(kwargs[name])})

    return gated


class Remade:
    """One call of a layer, run with copies of the layer.

    Args:
        call: A `graph.Call`.
        shapes: Shape of every tensor of the graph.

    Attributes:
        numbers: The whole numbers among the layer's configuration values, by key.
    """

    def __init__(self, call, shapes):
        self.call, self._shapes = call, shapes
        config = configuration_of(call.operation)
        self.numbers = {k: v for k, v in config.items() if type(v) is int and v > 1}
        self._made = {}

    def fits(self, recipe, kept):
        """Whether the layer that is made for the units kept has weights of the shapes that are left."""
        wanted = [tuple(w.shape) for w in self.call.operation.weights]
        for number, axes in recipe.weights.items():
            wanted[number] = tuple(
                size if units is None else int(_kept_of(units, kept).sum())
                for size, units in zip(wanted[number], axes, strict=True)
            )
        return self._shapes_made(recipe, kept) == wanted

    def may_fit(self, recipe, kept):
        """Whether what fits might be made with other values changed, too: no other weights change."""
        made = self._shapes_made(recipe, kept)
        if made is None:
            return True  # it cannot be made with this change alone
        before = [tuple(w.shape) for w in self.call.operation.weights]
        changed = {k for k, (a, b) in enumerate(zip(before, made, strict=True)) if a != b}
        return bool(changed) and changed <= recipe.weights.keys()

    def _shapes_made(self, recipe, kept):
        """Shapes of the weights of the layer that is made for the units kept, `None` if it cannot be."""
        changes = changes_of(recipe, kept)
        key = tuple(sorted(changes.items()))
        if key not in self._made:
            try:
                self._made[key] = [tuple(w.shape) for w in self.smaller(changes).weights]
            except UnsupportedModelError:
                self._made[key] = None
        return self._made[key]

    def smaller(self, changes):
        """The layer with other configuration values, built, its weights not copied."""
        operation = self.call.operation
        clone = clone_operation(operation, self.call.name, changes)
        try:
            build_like(clone, operation, self.call.name)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"It cannot be built. Received: {operation!r}") from error
        return clone

    def run(self, layer, random_state, gates=None):
        """Flattened outputs of a layer in this place, for random inputs."""
        random = np.random.default_rng(random_state)
        indices = dict.fromkeys(self.call.inputs)
        inputs = {index: self._random_input(random, index, random_state) for index in indices}
        with gate_inside(layer, gates or {}):
            return run_like_call(self.call, layer, inputs)

    def _random_input(self, random, index, seed):
        dtype = tensor_dtype(self.call, index)
        values = random_input(random, self._shapes[index], dtype)
        if "float" in dtype:
            return values
        # masks: of ones only, or such that every row has something to attend to
        values[:, : None if seed == 0 else 1] = 1
        return values


def changes_of(recipe, kept):
    """Configuration values for the units kept."""
    return {key: factor * int(_kept_of(units, kept).sum()) for key, (units, factor) in recipe.config.items()}


def holds(recipe, remade, num_draws=2):
    """Whether a layer that is made with less puts out what the whole one does with these gates closed.

    Both are copies of the layer with random weights; one with the layer's own weights must put out
    what the layer does.
    """
    try:
        return all(_holds_once(recipe, remade, seed) for seed in range(num_draws))
    except UnsupportedModelError:
        return False


def _holds_once(recipe, remade, seed):
    random, operation = np.random.default_rng(seed), remade.call.operation
    whole = remade.smaller({})
    copy_weights(operation, whole)
    if _difference(remade.run(whole, seed), remade.run(operation, seed)) > _EXACT:
        return False
    for weight in whole.weights:
        if "float" in weight.dtype:
            weight.assign(random.normal(0, 0.5, weight.shape).astype("float32"))
    kept = _drawn(recipe, random)
    small = remade.smaller(changes_of(recipe, kept))
    masks = {
        number: tuple(None if a is None else _kept_of(a, kept) for a in axes)
        for number, axes in recipe.weights.items()
    }
    if not remade.fits(recipe, kept):
        return False
    copy_weights(whole, small, masks)
    gates = {number: _closing(_kept_of(units, kept)) for number, units in recipe.reads.items()}
    closed, cut = remade.run(whole, seed, gates), remade.run(small, seed)
    tolerance = _TOLERANCE.get(operation.compute_dtype, 3e-2)
    return _difference(cut, closed) <= tolerance < _difference(remade.run(whole, seed), closed)


def _drawn(recipe, random):
    """Some units of each group stay, and some go."""
    kept, start = [], 0
    for _, num in recipe.groups:
        part = random.random(num) < 0.6
        stays, goes = random.permutation(num)[:2]
        part[stays], part[goes] = True, False
        kept.append(part)
        start += num
    return np.concatenate(kept)


def _kept_of(units, kept):
    return np.append(kept, True)[units]


def _closing(mask):
    return lambda x: x * keras.ops.convert_to_tensor(mask.astype("float32"), x.dtype)


def _difference(first, second):
    """Largest difference, relative to the second's largest value; infinite where that is no number."""
    found = max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(first, second, strict=True))
    return found if np.isfinite(found) else np.inf
