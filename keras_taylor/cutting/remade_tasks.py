"""Tasks and backbones of KerasHub that are made again, smaller, from their configurations."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np
from scipy.optimize import nnls

from keras_taylor.plans.task_numbers import make_from, numbers_of_task, task_config
from keras_taylor.reading.cloning import compile_settings
from keras_taylor.reading.config_numbers import ConfigNumbers, NumberPath, Numbers, WeightAxis
from keras_taylor.reading.tracing import Origin, origin_of
from keras_taylor.support.arrays import copy_kept
from keras_taylor.support.hub_tasks import has_configuration, hub_class, is_task
from keras_taylor.support.identity import IdentityMap, IdentitySet
from keras_taylor.support.keras_internals import input_structure, layers_inside
from keras_taylor.support.optimizers import CutWeight, carry_exclusions, carry_state
from keras_taylor.support.types import Shape

_LENGTH = 4  # of sequences of any length


def as_task(small: keras.Model) -> keras.Model:
    """A smaller plain model as the task or backbone that it stands for, compiled as it is.

    It is made from the configuration of the original with smaller numbers, and gets the weights. If no
    numbers lead to these weights, it is Functional: within a task of the same class if its backbone alone is,
    and that class does not generate; else it is a plain task that preprocesses its data. A warning says so.

    Args:
        small: A model that stands for no task is returned as it is.
    """
    origin = origin_of(small)
    if origin is None:
        return small
    if not has_configuration(origin.model):  # a task that was made here, of what was cut before
        return _preprocessing(small, origin)
    sources = {origin.positions[weight]: weight for weight in small.weights if weight in origin.positions}
    made = _with_fewer_blocks(small, origin, sources) if origin.lacks_branches else None
    if made is not None:
        return made
    numbers = None if origin.lacks_branches else _find_numbers(origin.model, sources)
    if numbers is None:
        return _functional(small, origin, sources)
    made = make_from(origin.model, numbers)
    weights = IdentityMap(
        (new, sources.get(position, origin.model.weights[position]))
        for position, new in enumerate(made.weights)
    )
    return _completed(made, small, origin, weights)


def _with_fewer_blocks(
    small: keras.Model, origin: Origin, sources: Mapping[int, keras.Variable]
) -> keras.Model | None:
    """The task with fewer blocks in its configuration, and narrower; `None` if that is not the smaller model.

    That shapes agree does not say that the blocks do the same, so both are run.
    """
    found, left = numbers_of_task(origin.model), sorted(sources)
    wanted = [found.shapes[position] for position in left]
    changes = next(
        (
            {path: fewer}
            for path, number in found.numbers.items()
            for fewer in _fewer_blocks(found, path, number, len(wanted))
            if found.shapes_with({path: fewer}) == wanted
        ),
        None,
    )
    if changes is None:
        return None
    shallower = make_from(origin.model, changes)
    kept = {number: sources[position] for number, position in enumerate(left)}
    numbers = _find_numbers(shallower, kept)
    if numbers is None:
        return None
    made = make_from(shallower, numbers)
    weights = IdentityMap((new, kept[number]) for number, new in enumerate(made.weights))
    made = _completed(made, small, origin, weights)
    return made if _computes_the_same_as(made, small) else None


def _fewer_blocks(found: ConfigNumbers, path: NumberPath, number: int, num_weights: int) -> list[int]:
    """The number of blocks with which a task has this number of weights, if this number counts blocks."""
    shapes = found.shapes_with({path: number - 1})
    missing = 0 if shapes is None else len(found.shapes) - len(shapes)
    if missing <= 0:
        return []
    gone, rest = divmod(len(found.shapes) - num_weights, missing)
    return [number - gone] if not rest and 0 < gone < number else []


def _computes_the_same_as(made: keras.Model, small: keras.Model) -> bool:
    """Whether two models have equal outputs for one example of random values; integers are 0 or 1."""
    random = np.random.default_rng(0)
    examples = [
        random.normal(size=shape).astype("float32") if "float" in x.dtype else random.integers(0, 2, shape)
        for x in small.inputs
        for shape in [tuple(size or _LENGTH for size in x.shape)]
    ]
    try:
        outputs = [
            keras.tree.flatten(model(keras.tree.pack_sequence_as(input_structure(small), examples)))
            for model in (made, small)
        ]
        pairs = [[keras.ops.convert_to_numpy(y) for y in pair] for pair in zip(*outputs, strict=True)]
    except Exception:  # a class may want other values
        return False
    return all(np.allclose(ours, theirs, rtol=1e-3, atol=1e-4) for ours, theirs in pairs)


def _find_numbers(model: keras.Model, sources: Mapping[int, keras.Variable]) -> Numbers | None:
    """The numbers in the configuration of a model that lead to weights of these shapes; `None` if none do."""
    found = numbers_of_task(model)
    before = found.shapes
    wanted = [
        tuple(sources[position].shape) if position in sources else shape
        for position, shape in enumerate(before)
    ]
    lost = {
        WeightAxis(weight, axis): size - smaller
        for weight, (old, new) in enumerate(zip(before, wanted, strict=True))
        for axis, (size, smaller) in enumerate(zip(old, new, strict=True))
        if size != smaller
    }
    if not lost:
        return {} if found.lead_back else None
    # first the numbers that are a length of what changed: the others are seldom needed
    lengths = {before[weight][axis] for weight, axis in lost}
    likely = [path for path, number in found.numbers.items() if number in lengths]
    for paths in (likely, list(found.numbers)):
        numbers = _numbers_for(found, paths, lost) if paths else {}
        if numbers and found.shapes_with(numbers) == wanted:
            return numbers
        if not found.lead_back:
            return None
    return None


def _numbers_for(
    found: ConfigNumbers, paths: Sequence[NumberPath], lost: Mapping[WeightAxis, int]
) -> Numbers:
    """The numbers by which axes lose these entries, as far as changes of these numbers alone tell."""
    axes_of = {path: found.growth(path) for path in paths}
    rows = sorted(set(lost).union(*axes_of.values()))
    growth = np.array([[axes.get(row, 0.0) for axes in axes_of.values()] for row in rows])
    falls = np.round(nnls(growth, np.array([lost.get(row, 0) for row in rows], float))[0]).astype(int)
    return {
        path: found.numbers[path] - fall for path, fall in zip(paths, falls.tolist(), strict=True) if fall
    }


def _completed(
    made: keras.Model,
    small: keras.Model,
    origin: Origin,
    weights: IdentityMap[keras.Variable, keras.Variable],
) -> keras.Model:
    """A new model with the weights and flags of a smaller one, compiled as that is."""
    for new, old in weights.items():
        if new is not old:
            new.assign(copy_kept(old))
    for old_layer, new_layer in _pairs_of_layers(origin.model, made):
        if new_layer.trainable != old_layer.trainable:
            new_layer.trainable = old_layer.trainable
    for new, old in weights.items():
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    settings = compile_settings(small)
    if settings is None:
        return made
    made.compile(**settings, **_own_compile_arguments(origin.model, made))
    cuts = IdentityMap((new, CutWeight(old, ())) for new, old in weights.items())
    if small.optimizer is not None and made.optimizer is not None:
        carry_exclusions(small.optimizer, made.optimizer, made.trainable_variables, cuts)
        if int(small.optimizer.iterations):  # else it stays open for other weights, such as those of LoRA
            carry_state(small.optimizer, made.optimizer, made.trainable_variables, cuts)
    return made


def _pairs_of_layers(old: keras.Model, new: keras.Model) -> Iterator[tuple[keras.Layer, keras.Layer]]:
    """The layers of a model and of one that was made alike; nothing if it was not."""
    first, second = layers_inside(old), layers_inside(new)
    if [type(layer) for layer in first] == [type(layer) for layer in second]:
        yield from zip(first, second, strict=True)


def _own_compile_arguments(model: keras.Model, made: keras.Model) -> dict[str, object]:
    """The arguments that the `compile` of a task's class has beside Keras' own, such as `sampler`."""
    plain = inspect.signature(keras.Model.compile).parameters
    own = [
        parameter.name
        for parameter in inspect.signature(type(made).compile).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    return {name: getattr(model, name) for name in own if name not in plain and hasattr(model, name)}


def _functional(small: keras.Model, origin: Origin, sources: Mapping[int, keras.Variable]) -> keras.Model:
    """What stands for a task that cannot be made again from its configuration; a warning says why."""
    model = origin.model
    what = "to layers without these branches" if origin.lacks_branches else "to these widths"
    why = f"no numbers in the configuration of {type(model).__name__} lead {what}"
    if not is_task(model):
        warnings.warn(f"The smaller '{model.name}' is a plain Functional model: {why}.", stacklevel=4)
        return small
    made = _with_functional_backbone(small, model, sources)
    if made is not None:
        warnings.warn(
            f"The backbone of the smaller '{model.name}' is a plain Functional model: {why}.", stacklevel=4
        )
        own = IdentitySet(small.weights)
        named = IdentityMap((weight, weight) for weight in made.weights if weight in own)
        head = [weight for weight in made.weights if weight not in own]
        named.update(zip(head, _head_weights(model, sources), strict=True))
        return _completed(made, small, origin, named)
    warnings.warn(
        f"The smaller '{model.name}' is a plain Functional model that preprocesses its data: {why}. To save "
        "it, save `keras.Model(small.inputs, small.outputs)`.",
        stacklevel=4,
    )
    return _preprocessing(small, origin)


def _preprocessing(small: keras.Model, origin: Origin) -> keras.Model:
    """A plain task of a Functional model: it preprocesses its data as the original does."""
    made = hub_class("Task")(small.inputs, small.outputs, compile=False, name=origin.model.name)
    made.preprocessor = origin.model.preprocessor
    return _completed(made, small, origin, IdentityMap((weight, weight) for weight in made.weights))


def _head_weights(model: keras.Model, sources: Mapping[int, keras.Variable]) -> list[keras.Variable]:
    """The smaller weights of a task that its backbone does not have."""
    inside = IdentitySet(model.backbone.weights)
    return [
        sources.get(position, weight) for position, weight in enumerate(model.weights) if weight not in inside
    ]


def _with_functional_backbone(
    small: keras.Model, model: keras.Model, sources: Mapping[int, keras.Variable]
) -> keras.Model | None:
    """A task of the same class over the smaller backbone as it is; `None` if the class does not take it."""
    backbone = next((layer for layer in small.layers if layer.name == model.backbone.name), None)
    if not isinstance(backbone, keras.Model) or hasattr(model, "generate"):
        return None
    try:
        made = type(model).from_config({**task_config(model), "backbone": backbone})
    except Exception:  # a class may raise anything
        return None
    own = IdentitySet(backbone.weights)
    shapes: list[Shape] = [tuple(weight.shape) for weight in made.weights if weight not in own]
    wanted = [tuple(weight.shape) for weight in _head_weights(model, sources)]
    return made if shapes == wanted else None
