"""The whole numbers in the configuration of a task, and which axes of its weights each of them counts."""

import json
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import keras

from keras_taylor.support.keras_internals import shapes_only

KnownShape: TypeAlias = tuple[int, ...]

# The keys that lead to a number, through dicts and lists.
NumberPath: TypeAlias = tuple[str | int, ...]

_NOT_NUMBERS = ("preprocessor", "build_config", "compile_config", "dtype")


class WeightAxis(NamedTuple):
    """An axis of a weight, given by the weight's position in `model.weights`."""

    weight: int
    axis: int


AxesOfNumbers: TypeAlias = Mapping[NumberPath, Mapping[WeightAxis, float]]

_MOST_KNOWN = 4096  # results that are kept
_known_shapes: dict[Hashable, list[KnownShape] | None] = {}
_known_axes: dict[Hashable, AxesOfNumbers] = {}


def task_config(model: keras.Model) -> dict[str, Any]:
    """The configuration of a task or backbone, with its preprocessor itself, and without `compile`."""
    config = dict(model.get_config())
    if "preprocessor" in config:
        config |= {"preprocessor": model.preprocessor, "compile": False}
    return _without_builds(config)


def make_from(model: keras.Model, numbers: Mapping[NumberPath, int]) -> keras.Model:
    """A new model of the same class, not compiled, with other numbers in its configuration.

    Raises:
        Exception: whatever the class raises if it cannot be made so.
    """
    config = task_config(model)
    for path, number in numbers.items():
        config = _with_number(config, path, number)
    return type(model).from_config(config)


def numbers_in(model: keras.Model) -> dict[NumberPath, int]:
    """The whole numbers above 1 in the configuration of a task or backbone."""
    return dict(_walk(task_config(model), ()))


def weight_shapes(model: keras.Model, numbers: Mapping[NumberPath, int]) -> list[KnownShape] | None:
    """The shapes of the weights if the configuration had these numbers; `None` if it cannot have them."""
    return _shapes_with(model, _description(model), numbers)


def axes_of_numbers(model: keras.Model) -> AxesOfNumbers:
    """How fast the axes of weights grow with each number, for the numbers that axes grow with.

    Each number is changed alone, and the model is made again without values.
    """
    description = _description(model)
    if description not in _known_axes:
        _make_room(_known_axes)
        _known_axes[description] = _find_axes(model, description)
    return _known_axes[description]


def _description(model: keras.Model) -> Hashable:
    """Equal for models of one class and configuration."""
    config = {key: value for key, value in task_config(model).items() if key != "preprocessor"}
    return type(model), json.dumps(config, sort_keys=True, default=repr)


def _shapes_with(
    model: keras.Model, description: Hashable, numbers: Mapping[NumberPath, int]
) -> list[KnownShape] | None:
    key = description, tuple(numbers.items())
    if key not in _known_shapes:
        _make_room(_known_shapes)
        try:
            with shapes_only():
                _known_shapes[key] = [tuple(weight.shape) for weight in make_from(model, numbers).weights]
        except Exception:  # a class may raise anything
            _known_shapes[key] = None
    return _known_shapes[key]


def _make_room(known: dict[Any, Any]) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()


def _find_axes(model: keras.Model, description: Hashable) -> AxesOfNumbers:
    shapes = _shapes_with(model, description, {})
    if shapes != [tuple(weight.shape) for weight in model.weights]:
        return {}
    found = {}
    for path, number in numbers_in(model).items():
        for other in (2 * number, number + 1, number // 2):
            changed = _shapes_with(model, description, {path: other})
            if changed is not None:
                axes = _growth(shapes, changed, other - number)
                if axes:
                    found[path] = axes
                break
    return found


def _growth(shapes: list[KnownShape], changed: list[KnownShape], by: int) -> dict[WeightAxis, float]:
    """How much axes grow if a number grows by one; nothing if there are other weights then."""
    if len(shapes) != len(changed) or any(len(a) != len(b) for a, b in zip(shapes, changed, strict=True)):
        return {}
    pairs = [
        (WeightAxis(weight, axis), size, new)
        for weight, (before, after) in enumerate(zip(shapes, changed, strict=True))
        for axis, (size, new) in enumerate(zip(before, after, strict=True))
    ]
    return {axis: (new - size) / by for axis, size, new in pairs if new != size}


def _walk(value: Any, path: NumberPath) -> Iterator[tuple[NumberPath, int]]:
    """Yields the whole numbers above 1 in nested dicts and lists, with their paths."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in _NOT_NUMBERS:
                yield from _walk(one, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from _walk(one, (*path, index))
    elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
        yield path, value


def _with_number(value: Any, path: NumberPath, number: int) -> Any:
    """A copy of nested dicts and lists with another number at the end of a path."""
    if not path:
        return number
    key, *rest = path
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _with_number(value[key], tuple(rest), number)
    return tuple(copy) if isinstance(value, tuple) else copy


def _without_builds(value: Any) -> Any:
    """A configuration in which no part says how it was built: that depends on the numbers."""
    if isinstance(value, dict):
        return {
            k: _without_builds(v) for k, v in value.items() if k not in ("build_config", "compile_config")
        }
    return [_without_builds(one) for one in value] if type(value) is list else value
