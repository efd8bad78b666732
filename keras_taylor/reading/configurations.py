"""Configurations that layers can be made again from, also where their own `get_config` gives none.

Keras makes a layer again, and loads it, with `from_config` out of what its `get_config` gave. Where that is
not what `__init__` takes, a layer that is made here gets a `get_config` of its own, which gives what it was
made from. So a file of it loads with the class as it is.
"""

import inspect
import json
import warnings

import keras
import numpy as np

from keras_taylor.rules.base import is_from_keras

_PLAIN = (int, float, str, bool, type(None))
_DESCRIBED = (keras.Initializer, keras.Regularizer, keras.constraints.Constraint)


class _MadeFrom:
    """The `get_config` of one layer: what it was made from.

    Attributes:
        config: Configuration values.
        fault: What is wrong with the `get_config` of its class, a verb and what follows.
    """

    def __init__(self, layer, config, fault):
        self._layer, self.config, self.fault = layer, config, fault

    def __call__(self):
        now = _of_every_layer(self._layer)
        return {key: now.get(key, value) for key, value in self.config.items()}


def configuration_of(operation):
    """Values that the operation's class makes it from, a dict."""
    return completed(operation)[0]


def completed(operation):
    """An operation's configuration, made up for where its own is not what its class takes.

    What `get_config` leaves out, or all where it fails, is taken from the arguments that Keras has on
    record, or else from attributes of the same names; what `__init__` does not take is left out.
    An argument that may be left out counts as missing if it matters: if Keras has another value than the
    default on record, or if the attribute is another one in a layer that is made without it.

    Args:
        operation: A layer or a `keras.ops` operation.

    Returns:
        Values for `from_config`, a dict, and what is wrong with the operation's own: a verb and what
        follows, `None` if nothing is.

    Raises:
        Exception: whatever `get_config` raised, if nothing else tells.
    """
    made_from = vars(operation).get("get_config")
    if isinstance(made_from, _MadeFrom):
        return made_from(), made_from.fault
    if not isinstance(operation, keras.Layer) or is_from_keras(type(operation)):
        return operation.get_config(), None
    try:
        config = operation.get_config()
    except Exception as error:
        return _without_its_own(operation, error), f"fails ({_said(error)})"
    return _mended(operation, config)


def keep_configuration(layer, config, fault):
    """Lets a layer be saved with what it was made from, if `completed` found fault with its class."""
    if fault is not None:
        vars(layer)["get_config"] = _MadeFrom(layer, config, fault)


def warn_of_file(layer):
    """Says what it means for files that a layer's class does not tell what the layer is made from."""
    made_from = vars(layer).get("get_config")
    if not isinstance(made_from, _MadeFrom):
        return
    trouble = _trouble_when_loaded(layer, made_from())
    if trouble is None:
        what = (
            "The smaller model is saved with what the layer was made from, so that its file loads. What was "
            "loaded from it has the `get_config` of the class: before that is saved again, prune it with an "
            "empty plan (`keras_taylor.prune(model, keras_taylor.Plan())`), or mend the class."
        )
    else:
        what = (
            f"The smaller model can be used and trained, but not loaded from a file: {trouble}. Give the "
            "class a `get_config` that returns all arguments of `__init__`, as values that a file can hold."
        )
    name = type(layer).__name__
    warnings.warn(f"The `get_config` of class `{name}` {made_from.fault}. {what}", stacklevel=2)


def _without_its_own(operation, error):
    """Configuration values of a layer whose `get_config` raised an error."""
    taken = _taken(type(operation))
    config = {key: value for key, value in _of_every_layer(operation).items() if key in taken}
    missing = [p for p in _parameters(type(operation)) if p.name not in config]
    found = _held(operation, missing)
    if len(found) < len(missing):
        raise error
    return {**config, **found}


def _mended(operation, config):
    """A configuration, completed, and what was wrong with it."""
    cls = type(operation)
    missing = [p for p in _parameters(cls) if p.name not in config]
    if not missing and _taken(cls).issuperset(config):
        return config, None
    needed = _held(operation, [p for p in missing if p.default is p.empty])
    faults, copy = [], _made(cls, config)
    if copy is None and needed:
        config, faults = {**config, **needed}, [f"leaves out {_listed(needed)}"]
        copy = _made(cls, config)
    # first what no parent takes either: those that a class hands on to them, it may set itself
    for taken in (_taken(cls, its_parents=True), _taken(cls)):
        part = {key: value for key, value in config.items() if key in taken}
        if copy is None and (copy := _made(cls, part)) is not None:
            faults.append(f"gives {_listed(config.keys() - taken)}, which `__init__` does not take")
            config = part
    if copy is not None and _is_inherited(cls.from_config):
        optional = [p for p in missing if p.default is not p.empty and p.name not in ("name", "trainable")]
        mattering = _mattering(operation, copy, optional)
        if mattering and _made(cls, {**config, **mattering}) is not None:
            config = {**config, **mattering}
            faults.append(f"leaves out {_listed(mattering)}")
    return config, " and ".join(faults) or None


def _mattering(operation, copy, optional):
    """Arguments that a copy was made without, and that make a difference, by name."""
    recorded = _recorded(operation)
    return {
        p.name: value
        for p in optional
        for value in _held(operation, [p]).values()
        if (
            value != p.default
            if p.name in recorded
            else _is_setting(value) and hasattr(copy, p.name) and not _alike(value, getattr(copy, p.name))
        )
    }


def _held(operation, parameters):
    """Values of arguments, by name: those on record, or attributes that can be given to another layer."""
    values = {p.name: getattr(operation, p.name) for p in parameters if hasattr(operation, p.name)}
    values = {name: _untracked(value) for name, value in values.items() if not _is_its_own(value)}
    recorded = _recorded(operation)
    return {**values, **{p.name: recorded[p.name] for p in parameters if p.name in recorded}}


def _recorded(operation):
    """The arguments that a layer was made with, where all are plain values: Keras keeps them.

    There is no public way to ask for them once the class has a `get_config`.
    """
    recorded = getattr(operation, "_auto_config", None)
    return {} if recorded is None else dict(recorded.config)


def _is_its_own(value):
    """Whether something in it would be shared if another layer got it: layers, weights, tensors."""
    return any(
        isinstance(x, (keras.Layer, keras.Variable, keras.KerasTensor)) or keras.ops.is_tensor(x)
        for x in keras.tree.flatten(value)
    )


def _untracked(value):
    """Lists and dicts as they were before Keras wrapped them."""
    if isinstance(value, dict):
        return {key: _untracked(each) for key, each in value.items()}
    if type(value) is tuple or isinstance(value, list):
        return (tuple if isinstance(value, tuple) else list)(map(_untracked, value))
    return value


def _is_setting(value):
    """Whether it is something that can be compared with what another layer has."""
    flat = keras.tree.flatten(value)
    return all(isinstance(x, (*_PLAIN, *_DESCRIBED)) or inspect.isfunction(x) for x in flat)


def _alike(first, second):
    """Whether two attributes say the same; of things that have no configuration, whether they are alike."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_alike, first, second))
    if isinstance(first, _DESCRIBED):
        return type(first) is type(second) and first.get_config() == second.get_config()
    if inspect.isfunction(first) and inspect.isfunction(second):
        return first is second or _is_same_activation(first, second)
    return first == second if isinstance(first, _PLAIN) else type(first) is type(second)


def _is_same_activation(first, second):
    """Whether two functions of Keras' own are one: `keras.ops` and `keras.activations` have most twice."""
    if first.__name__ != second.__name__ or not (is_from_keras(first) and is_from_keras(second)):
        return False
    x = keras.ops.linspace(-8.0, 8.0, 65)
    try:
        found = [keras.ops.convert_to_numpy(function(x)) for function in (first, second)]
    except Exception:
        return False
    return np.allclose(*found, rtol=1e-6, atol=1e-7)


def _trouble_when_loaded(layer, config):
    """Why a layer cannot be made again from what a file holds of a configuration, `None` if it can."""
    try:
        loaded = json.loads(json.dumps(keras.saving.serialize_keras_object(config)))
        again = type(layer).from_config(loaded)
    except Exception as error:
        return _said(error)
    names = [p.name for p in _parameters(type(layer)) if hasattr(layer, p.name) and hasattr(again, p.name)]
    changed = [name for name in names if not _alike(getattr(layer, name), getattr(again, name))]
    return f"`{changed[0]}` would be {getattr(again, changed[0])!r}" if changed else None


def _made(cls, config):
    """A layer, `None` if it cannot be made from these values."""
    try:
        return cls.from_config(dict(config))
    except Exception:
        return None


def _of_every_layer(layer):
    return {
        "name": layer.name,
        "trainable": layer.trainable,
        "dtype": keras.dtype_policies.serialize(layer.dtype_policy),
    }


def _parameters(cls):
    """The arguments of `__init__` that have names."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.kind in named]


def _taken(cls, its_parents=False):
    """Names that `__init__` takes: its own arguments, and Keras' (or all) of those that it hands on."""
    names: set = set()
    for each in cls.__mro__:
        if "__init__" not in vars(each) or (names and not its_parents and not is_from_keras(each)):
            continue
        parameters = inspect.signature(each.__init__).parameters.values()
        names.update(p.name for p in parameters)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names


def _is_inherited(from_config):
    """Whether a class has Keras' own `from_config`, which hands all values to `__init__`."""
    return from_config.__func__ is keras.Layer.from_config.__func__


def _listed(names):
    return ", ".join(f"`{name}`" for name in sorted(names))


def _said(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
