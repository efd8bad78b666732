"""The whole numbers in the configuration of a task or backbone."""

import json
from collections.abc import Hashable, Iterator
from typing import Any

import keras

from keras_taylor.reading.config_numbers import (
    ConfigNumbers,
    KnownShape,
    KnownShapes,
    NumberPath,
    Numbers,
)
from keras_taylor.support.keras_internals import shapes_only

_NOT_NUMBERS = ("preprocessor", "build_config", "compile_config", "dtype")
# Ends of the names of numbers that measure images and windows. They count no channels.
_SPATIAL = (
    *("image_shape", "image_size", "kernel_size", "kernel_sizes", "stride", "strides", "pool_size"),
    *("dilation_rate", "dilation_rates", "patch_size", "patch_sizes", "upsampling_size"),
)
_MOST_KNOWN = 64  # configurations

_known_shapes: dict[Hashable, KnownShapes] = {}


def task_config(model: keras.Model) -> dict[str, Any]:
    """The configuration of a task or backbone, with its preprocessor itself, and without `compile`."""
    config = dict(model.get_config())
    if "preprocessor" in config:
        config |= {"preprocessor": model.preprocessor, "compile": False}
    return _without_builds(config)


def make_from(model: keras.Model, numbers: Numbers) -> keras.Model:
    """A new model of the same class, not compiled, with other numbers in its configuration.

    Raises:
        Exception: whatever the class raises if it cannot be made so.
    """
    config = task_config(model)
    for path, number in numbers.items():
        config = _with_number(config, path, number)
    return type(model).from_config(config)


def numbers_of_task(model: keras.Model) -> ConfigNumbers:
    """The whole numbers above 1 in the configuration of a task or backbone.

    What they lead to is found once for each class and configuration.
    """
    config = task_config(model)
    named = {key: value for key, value in config.items() if key != "preprocessor"}
    description = type(model), json.dumps(named, sort_keys=True, default=repr)
    if description not in _known_shapes and len(_known_shapes) >= _MOST_KNOWN:
        _known_shapes.clear()

    def find_shapes(numbers: Numbers) -> list[KnownShape]:
        with shapes_only():
            return [tuple(weight.shape) for weight in make_from(model, numbers).weights]

    shapes = [tuple(weight.shape) for weight in model.weights]
    known = _known_shapes.setdefault(description, {})
    return ConfigNumbers(dict(_walk(config, ())), shapes, find_shapes, known)


def _walk(value: Any, path: NumberPath) -> Iterator[tuple[NumberPath, int]]:
    """Yields the whole numbers above 1 in nested dicts and lists that may count channels, with paths."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in _NOT_NUMBERS and not key.endswith(_SPATIAL):
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
