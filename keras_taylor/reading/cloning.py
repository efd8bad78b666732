"""Copies of single operations, of their weights, and of compile settings."""

import contextlib
import copy
import inspect

import keras
import numpy as np

from keras_taylor.reading.configurations import completed, keep_configuration
from keras_taylor.reading.tracing import UnsupportedModelError, compile_arguments
from keras_taylor.rules.attention import inner_layers
from keras_taylor.rules.base import is_from_keras, override_attributes
from keras_taylor.support.copies import copy_kept
from keras_taylor.support.optimizers import fresh_optimizer


def clone_operation(operation, name, changes=None):
    """A new operation of the same class and configuration.

    Args:
        operation: A layer or a `keras.ops` operation.
        name: Path of the operation, for messages.
        changes: Configuration values that differ, by key; dots lead into dicts.

    Returns:
        The copy, not built.

    Raises:
        UnsupportedModelError: if it cannot be made from its configuration.
    """
    try:
        if type(operation) is keras.layers.Lambda:
            return _lambda_copy(operation)
        config, fault = completed(operation)
        if is_from_keras(type(operation)):
            config = _not_built(config)
        if _is_own_function(getattr(operation, "activation", None)) and "activation" in config:
            config["activation"] = operation.activation  # its name need not be registered
        for path, value in (changes or {}).items():
            config = _changed(config, path.split("."), value)
        new = type(operation).from_config(config)
        keep_configuration(new, config, fault)
        wanted = (changes or {}).get("name", operation.name)
        if isinstance(new, keras.Layer) and new.name != wanted:
            new.name = wanted  # a class may forget it
        return new
    except Exception as error:
        if not changes and not isinstance(operation, keras.Layer):
            return _bare_copy(operation)
        raise UnsupportedModelError(
            f"Layer '{name}' cannot be made again from its configuration "
            f"({type(error).__name__}: {error}). Give its class a `get_config` that returns all "
            f"arguments of `__init__`. Received: {name}={operation!r}"
        ) from error


def _lambda_copy(layer):
    """A Lambda with the same function: from a configuration Keras makes it only in unsafe mode."""
    return keras.layers.Lambda(
        layer.function,
        output_shape=layer._output_shape,
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )


def _is_own_function(activation):
    return inspect.isfunction(activation) and not is_from_keras(activation)


def _not_built(config):
    """A configuration of one of Keras' own; inner layers are built with the outer one, not before."""
    return {
        key: _not_built(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "build_config"
    }


def _changed(config, path, value):
    """A dict in which one value, at the end of a path of keys, is another."""
    key, *rest = path
    return {**config, key: _changed(config[key], rest, value) if rest else value}


@contextlib.contextmanager
def uninitialized(layer):
    """Within it, the layer's new weights are zeros: they get their values by copying.

    Random initializers would be wasted, and JAX compiles one for every shape.
    """
    with contextlib.ExitStack() as stack:
        for each in _with_inner_layers(layer):
            stack.enter_context(
                override_attributes(each, add_weight=_adding(each.add_weight, lambda name: _zeros))
            )
        yield


@contextlib.contextmanager
def initialized_with(layer, source, masks, done):
    """Within it, the layer's new weights have the values of `source`'s, cut, from the start, or are zeros.

    So no other array of a weight's size is there beside it. Only for weights that are found by their names
    in a layer of Keras' own: `build` of another one might assign to them. What a distribution divides
    among devices is made by a compiled initializer, and copied later.

    Args:
        layer: The layer that will be built.
        source: The layer that it was cloned from.
        masks: As in `copy_weights`.
        done: A set, to which the names of such weights are added.
    """
    alone = len(_with_inner_layers(layer)) == 1 and keras.distribution.distribution() is None
    weights = _by_name(source) if alone and is_from_keras(type(layer)) else {}

    def initializer_of(name):
        if name not in weights or name in done:
            return _zeros

        def initialize(shape, dtype=None):
            number, weight = weights[name]
            value = copy_kept(weight, masks.get(number, ()))
            if tuple(value.shape) != tuple(shape):
                return _zeros(shape, dtype)
            done.add(name)
            return keras.ops.convert_to_tensor(value, dtype)

        return initialize

    with (
        uninitialized(layer),
        override_attributes(layer, add_weight=_adding(type(layer).add_weight.__get__(layer), initializer_of)),
    ):
        yield


def _adding(add_weight, initializer_of):
    """`add_weight` with other initializers, found by the names of weights."""

    def add(shape=None, initializer=None, **arguments):
        return add_weight(shape, initializer=initializer_of(arguments.get("name")), **arguments)

    return add


def _by_name(layer):
    """A layer's weights with their positions, by name, without those that share a name."""
    names = [weight.name for weight in layer.weights]
    return {w.name: (number, w) for number, w in enumerate(layer.weights) if names.count(w.name) == 1}


def _with_inner_layers(layer):
    """A layer and those inside, each once: cells, what a wrapper wraps."""
    return list(dict.fromkeys((layer, *inner_layers(layer))))


def _zeros(shape, dtype=None):
    return keras.ops.convert_to_tensor(np.zeros(shape, np.float32), dtype)


def build_like(clone, layer, name):
    """Builds a cloned layer with the shapes that `layer` was built with."""
    if not clone.built and layer.built:
        config = layer.get_build_config()
        if config is not None:
            with uninitialized(clone):
                clone.build_from_config(config)
                if len(clone.weights) != len(layer.weights) and "input_shape" in config:
                    clone(keras.KerasTensor(config["input_shape"]))  # layers inside are built when called
    if len(clone.weights) != len(layer.weights):
        raise UnsupportedModelError(
            f"Layer '{name}' has {len(layer.weights)} weights, its copy has {len(clone.weights)}. "
            "Create all weights in `build`. "
            f"Received: {name}={layer!r}"
        )


def copy_weights(source, target, masks=None, done=()):
    """Copies weights, cut along the axes that have a mask.

    Args:
        source, target: Layers of the same class.
        masks: What stays along each axis, by the weight's position in `source.weights`; weights that are
            not there stay whole.
        done: Names of weights that have their values already (`initialized_with`).
    """
    for number, (old, new) in enumerate(zip(source.weights, target.weights, strict=True)):
        if not (old.name == new.name and new.name in done):
            new.assign(copy_kept(old, (masks or {}).get(number, ())))
    if hasattr(target, "finalize_state"):  # layers with `adapt` compute with values made from their weights
        target.finalize_state()


def compile_settings(model):
    """Arguments to compile another model like this one: metrics and optimizer made anew.

    Returns:
        A dict for `compile`; `None` for a model that was not compiled.
    """
    if not getattr(model, "compiled", False):
        return None
    settings = compile_arguments(model)
    if model.optimizer is not None:
        settings["optimizer"] = fresh_optimizer(settings["optimizer"])
    for key in ("metrics", "weighted_metrics"):
        settings[key] = keras.tree.map_structure(_fresh_metric, settings[key])
    return settings


def _fresh_metric(metric):
    if not isinstance(metric, keras.Metric):
        return metric
    return type(metric).from_config(metric.get_config())


def _bare_copy(operation):
    """A copy without the record of calls, for an operation whose arguments have no config."""
    clone = copy.copy(operation)
    clone._inbound_nodes, clone._outbound_nodes = [], []
    return clone
