"""Configurations from which layers can be copied, even if their own `get_config` is wrong.

Keras copies and loads a layer with `from_config`, from what its `get_config` returned. If that is not what
`__init__` takes, a layer that is made here gets a `get_config` of its own, which returns the values that it
was made from. Its file then loads with the class as it is.
"""

import inspect
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_taylor.rules.base import is_from_keras
from keras_taylor.support.keras_internals import recorded_arguments, shapes_only

_PLAIN_VALUE_TYPES = (int, float, str, bool, type(None))
_CONFIGURABLE_TYPES = (keras.Initializer, keras.Regularizer, keras.constraints.Constraint)


class Configuration(NamedTuple):
    """Values from which an operation can be copied.

    Attributes:
        values: Arguments of `from_config`, by name.
        fault: What is wrong with the operation's own `get_config`, as a verb and an object; `None` if
            nothing is.
    """

    values: dict[str, Any]
    fault: str | None


class _Completion(NamedTuple):
    """How the values that a `get_config` returned are completed.

    Attributes:
        kept: Keys of the values that stay.
        added: Names of the arguments that are added.
        fault: As in `Configuration`.
    """

    kept: frozenset[str]
    added: tuple[str, ...]
    fault: str | None


_MOST_COMPLETIONS = 4096
_completions: dict[tuple[type, str], _Completion] = {}


class _GetConfig:
    """A `get_config` for one layer, which returns the values that the layer was made from.

    Args:
        layer: The layer.
        values: The values. The name, the trainable flag and the dtype are read from the layer again.
        fault: What is wrong with the `get_config` of its class.
    """

    def __init__(self, layer: keras.Layer, values: Mapping[str, Any], fault: str) -> None:
        self._layer, self._values, self.fault = layer, values, fault

    def __call__(self) -> dict[str, Any]:
        current = _base_configuration(self._layer)
        return {key: current.get(key, value) for key, value in self._values.items()}


def configuration_of(operation: keras.Operation) -> dict[str, Any]:
    """Values from which `from_config` copies the operation; errors as in `complete_configuration`."""
    return complete_configuration(operation).values


def complete_configuration(operation: keras.Operation) -> Configuration:
    """An operation's configuration, completed where its own `get_config` is not what its class takes.

    If `get_config` leaves out an argument, or fails, the argument is taken from those that Keras recorded,
    or else from an attribute of the same name. Values that `__init__` does not take are left out. An argument
    with a default is missing if it matters: if Keras recorded another value than the default, or if the
    attribute differs in a layer that is made without the argument.

    Args:
        operation: A layer or a `keras.ops` operation.

    Raises:
        Exception: whatever `get_config` raised, if an argument is found nowhere else.
    """
    get_config = vars(operation).get("get_config")
    if isinstance(get_config, _GetConfig):
        return Configuration(get_config(), get_config.fault)
    if not isinstance(operation, keras.Layer) or is_from_keras(type(operation)):
        return Configuration(operation.get_config(), None)
    try:
        values = operation.get_config()
    except Exception as error:
        return Configuration(_collect_arguments(operation, error), f"fails ({_describe_error(error)})")
    return _complete_values(operation, values)


def override_get_config(layer: keras.Layer, values: Mapping[str, Any], fault: str | None) -> None:
    """Makes a layer save the values that it was made from, if the `get_config` of its class has a fault."""
    if fault is not None:
        vars(layer)["get_config"] = _GetConfig(layer, values, fault)


def warn_about_saving(layer: keras.Layer) -> None:
    """Warns if a layer's class has a wrong `get_config`, and says what this means for saved models."""
    get_config = vars(layer).get("get_config")
    if not isinstance(get_config, _GetConfig):
        return
    problem = _find_loading_problem(layer, get_config())
    if problem is None:
        consequence = (
            "The smaller model is saved with the values that the layer was made from, so that its file "
            "loads. A model loaded from it has the `get_config` of the class again: before you save that "
            "model, prune it with an empty plan (`keras_taylor.prune(model, keras_taylor.Plan())`), or fix "
            "the class."
        )
    else:
        consequence = (
            f"The smaller model can be used and trained, but not loaded from a file: {problem}. Give the "
            "class a `get_config` that returns all arguments of `__init__`, as values that a file can hold."
        )
    name = type(layer).__name__
    warnings.warn(f"The `get_config` of class `{name}` {get_config.fault}. {consequence}", stacklevel=2)


def _collect_arguments(layer: keras.Layer, error: Exception) -> dict[str, Any]:
    """The arguments of a layer whose `get_config` raised an error; raises it if one is found nowhere."""
    accepted = _accepted_names(type(layer))
    values = {key: value for key, value in _base_configuration(layer).items() if key in accepted}
    missing = [p for p in _init_parameters(type(layer)) if p.name not in values]
    found = _argument_values(layer, missing)
    if len(found) < len(missing):
        raise error
    return {**values, **found}


def _complete_values(layer: keras.Layer, values: dict[str, Any]) -> Configuration:
    """Completes what a layer's `get_config` returned, in the same way for layers that are equal."""
    cls = type(layer)
    parameters = {p.name: p for p in _init_parameters(cls)}
    missing = [p for name, p in parameters.items() if name not in values]
    if not missing and _accepted_names(cls).issuperset(values):
        return Configuration(values, None)
    key = _plain_description(layer, values, missing)
    completion = None if key is None else _completions.get((cls, key))
    if completion is None:
        completion = _find_completion(layer, values, missing)
        if key is not None:
            if len(_completions) >= _MOST_COMPLETIONS:
                _completions.clear()
            _completions[cls, key] = completion
    kept = {key: value for key, value in values.items() if key in completion.kept}
    added = _argument_values(layer, [parameters[name] for name in completion.added])
    return Configuration({**kept, **added}, completion.fault)


def _plain_description(
    layer: keras.Layer, values: Mapping[str, Any], missing: Sequence[inspect.Parameter]
) -> str | None:
    """Equal for layers whose configurations are completed alike; `None` if some values are not plain."""
    named = {key: value for key, value in values.items() if key != "name"}
    others = {p.name: getattr(layer, p.name) for p in missing if hasattr(layer, p.name)}
    recorded = {key: value for key, value in recorded_arguments(layer).items() if key != "name"}
    try:
        return json.dumps([named, others, recorded], sort_keys=True)
    except (TypeError, ValueError):
        return None


def _find_completion(
    layer: keras.Layer, values: dict[str, Any], missing: Sequence[inspect.Parameter]
) -> _Completion:
    """How a layer's configuration is completed, by trying what its class takes."""
    cls, given = type(layer), values
    required = _argument_values(layer, [p for p in missing if p.default is p.empty])
    added: list[str] = []
    faults, copy = [], _make_layer(cls, values)
    if copy is None and required:
        values, faults = {**values, **required}, [f"leaves out {_quote_names(required)}"]
        added += required
        copy = _make_layer(cls, values)
    # First leave out only what no parent class takes either: a class may pass the rest on, or set it itself.
    for accepted in (_accepted_names(cls, with_parents=True), _accepted_names(cls)):
        part = {key: value for key, value in values.items() if key in accepted}
        if copy is None and (copy := _make_layer(cls, part)) is not None:
            surplus = values.keys() - accepted
            faults.append(f"gives {_quote_names(surplus)}, which `__init__` does not take")
            values = part
    if copy is not None and _has_default_from_config(cls):
        optional = [p for p in missing if p.default is not p.empty and p.name not in ("name", "trainable")]
        differing = _differing_arguments(layer, copy, optional)
        if differing and _make_layer(cls, {**values, **differing}) is not None:
            values = {**values, **differing}
            added += differing
            faults.append(f"leaves out {_quote_names(differing)}")
    kept = frozenset(key for key in values if key in given and key not in added)
    return _Completion(kept, tuple(name for name in added if name in values), " and ".join(faults) or None)


def _differing_arguments(
    layer: keras.Layer, copy: keras.Layer, optional: Sequence[inspect.Parameter]
) -> dict[str, Any]:
    """Arguments with defaults whose values in a layer differ from those in a copy made without them."""
    recorded = recorded_arguments(layer)

    def differs(parameter: inspect.Parameter, value: Any) -> bool:
        name = parameter.name
        if name in recorded:
            return bool(value != parameter.default)
        is_comparable = _is_comparable(value) and hasattr(copy, name)
        return is_comparable and not _is_same_value(value, getattr(copy, name))

    values = _argument_values(layer, optional)
    return {p.name: values[p.name] for p in optional if p.name in values and differs(p, values[p.name])}


def _argument_values(layer: keras.Layer, parameters: Sequence[inspect.Parameter]) -> dict[str, Any]:
    """Values of arguments, by name: those that Keras recorded, or else attributes that need no sharing."""
    attributes = {p.name: getattr(layer, p.name) for p in parameters if hasattr(layer, p.name)}
    values = {name: _untrack(value) for name, value in attributes.items() if not _holds_state(value)}
    recorded = recorded_arguments(layer)
    return {**values, **{p.name: recorded[p.name] for p in parameters if p.name in recorded}}


def _holds_state(value: object) -> bool:
    """Whether a value holds layers, weights or tensors, which two layers would share."""
    return any(
        isinstance(x, (keras.Layer, keras.Variable, keras.KerasTensor)) or keras.ops.is_tensor(x)
        for x in keras.tree.flatten(value)
    )


def _untrack(value: Any) -> Any:
    """A value with plain lists and dicts instead of those in which Keras tracks layers and weights."""
    if isinstance(value, dict):
        return {key: _untrack(each) for key, each in value.items()}
    if type(value) is tuple or isinstance(value, list):
        return (tuple if isinstance(value, tuple) else list)(map(_untrack, value))
    return value


def _is_comparable(value: object) -> bool:
    """Whether `_is_same_value` can tell a value from that of another layer."""
    flat = keras.tree.flatten(value)
    return all(
        isinstance(x, (*_PLAIN_VALUE_TYPES, *_CONFIGURABLE_TYPES)) or inspect.isfunction(x) for x in flat
    )


def _is_same_value(first: Any, second: Any) -> bool:
    """Whether two attributes are equal. Objects without a configuration are equal if their types are."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_is_same_value, first, second))
    if isinstance(first, _CONFIGURABLE_TYPES):
        return type(first) is type(second) and first.get_config() == second.get_config()
    if inspect.isfunction(first) and inspect.isfunction(second):
        return first is second or _is_same_activation(first, second)
    return bool(first == second) if isinstance(first, _PLAIN_VALUE_TYPES) else type(first) is type(second)


def _is_same_activation(first: Any, second: Any) -> bool:
    """Whether two functions of Keras compute the same; `keras.ops` and `keras.activations` share many."""
    if first.__name__ != second.__name__ or not (is_from_keras(first) and is_from_keras(second)):
        return False
    x = keras.ops.linspace(-8.0, 8.0, 65)
    try:
        y, z = (keras.ops.convert_to_numpy(function(x)) for function in (first, second))
    except Exception:
        return False
    return np.allclose(y, z, rtol=1e-6, atol=1e-7)


def _find_loading_problem(layer: keras.Layer, values: Mapping[str, Any]) -> str | None:
    """Why a layer cannot be made from these values after a file held them; `None` if it can."""
    try:
        loaded = json.loads(json.dumps(keras.saving.serialize_keras_object(values)))
        copy = type(layer).from_config(loaded)
    except Exception as error:
        return _describe_error(error)
    names = [
        p.name for p in _init_parameters(type(layer)) if hasattr(layer, p.name) and hasattr(copy, p.name)
    ]
    changed = [name for name in names if not _is_same_value(getattr(layer, name), getattr(copy, name))]
    return f"`{changed[0]}` would be {getattr(copy, changed[0])!r}" if changed else None


def _make_layer(cls: type[keras.Layer], values: Mapping[str, Any]) -> keras.Layer | None:
    """A layer, `None` if it cannot be made from these values."""
    try:
        with shapes_only():
            return cls.from_config(dict(values))
    except Exception:
        return None


def _base_configuration(layer: keras.Layer) -> dict[str, Any]:
    """The configuration values that every layer has."""
    return {
        "name": layer.name,
        "trainable": layer.trainable,
        "dtype": keras.dtype_policies.serialize(layer.dtype_policy),
    }


def _init_parameters(cls: type[keras.Layer]) -> list[inspect.Parameter]:
    """The named arguments of `__init__`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.kind in named]


def _accepted_names(cls: type, with_parents: bool = False) -> set[str]:
    """Names of the arguments that `__init__` takes.

    Where it passes `**kwargs` on, these include the arguments of Keras' base classes, and with `with_parents`
    also those of other parent classes.
    """
    names: set[str] = set()
    for each in cls.__mro__:
        if "__init__" not in vars(each) or (names and not with_parents and not is_from_keras(each)):
            continue
        parameters = inspect.signature(vars(each)["__init__"]).parameters.values()
        names.update(p.name for p in parameters)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names


def _has_default_from_config(cls: type[keras.Layer]) -> bool:
    """Whether a class has the `from_config` of `keras.Layer`, which passes all values to `__init__`."""
    return cls.from_config.__func__ is keras.Layer.from_config.__func__


def _quote_names(names: Iterable[str]) -> str:
    """Names in backticks, sorted."""
    return ", ".join(f"`{name}`" for name in sorted(names))


def _describe_error(error: Exception) -> str:
    """The class of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
