"""Copies of single operations, of their weights, and of compile settings."""

import contextlib
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_taylor.reading.configurations import complete_configuration, override_get_config
from keras_taylor.reading.tracing import UnsupportedModelError
from keras_taylor.rules.attention import inner_layers
from keras_taylor.rules.base import is_from_keras, override_attributes
from keras_taylor.support.arrays import copy_kept, zeros_of_host
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.keras_internals import (
    compile_arguments,
    copy_operation,
    lambda_output_shape,
    output_structure,
    own_variables,
    producer,
)
from keras_taylor.support.optimizers import fresh_optimizer
from keras_taylor.support.types import Masks, Tensor, Tree


def clone_operation(
    operation: keras.Operation, name: str, changes: Mapping[str, Any] | None = None
) -> keras.Operation:
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
            return _copy_lambda(operation)
        config, fault = complete_configuration(operation)
        if is_from_keras(type(operation)):
            config = _without_build_config(config)
        if _is_user_function(getattr(operation, "activation", None)) and "activation" in config:
            config["activation"] = operation.activation  # its name need not be registered
        for path, value in (changes or {}).items():
            config = with_value(config, path.split("."), value)
        new = type(operation).from_config(config)
        override_get_config(new, config, fault)
        wanted = (changes or {}).get("name", operation.name)
        if isinstance(new, keras.Layer) and new.name != wanted:
            new.name = wanted  # a class may forget it
        return new
    except Exception as error:
        if not changes and not isinstance(operation, keras.Layer):
            return copy_operation(operation)
        raise UnsupportedModelError(
            f"Layer '{name}' cannot be made again from its configuration "
            f"({type(error).__name__}: {error}). Give its class a `get_config` that returns all "
            f"arguments of `__init__`. Received: {name}={operation!r}"
        ) from error


def _copy_lambda(layer: keras.layers.Lambda) -> keras.layers.Lambda:
    """A Lambda with the same function; from a configuration Keras makes it in unsafe mode only."""
    return keras.layers.Lambda(
        layer.function,
        output_shape=lambda_output_shape(layer),
        mask=layer.mask,
        arguments=layer.arguments,
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )


def _is_user_function(activation: Any) -> bool:
    return inspect.isfunction(activation) and not is_from_keras(activation)


def _without_build_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of a layer of Keras, whose inner layers are built together with the outer one."""
    return {
        key: _without_build_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "build_config"
    }


def with_value(config: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested dicts with another value at the end of a path of keys."""
    key, *rest = path
    return {**config, key: with_value(config[key], rest, value) if rest else value}


@contextlib.contextmanager
def zero_initialized(layer: keras.Layer) -> Iterator[None]:
    """Within it, the layer's new weights are zeros: their values are copied later.

    Random initializers would take time for nothing, and JAX compiles one for every shape.
    """
    with contextlib.ExitStack() as stack:
        for each in _with_inner_layers(layer):
            add_weight = _initializing(each.add_weight, lambda name: zeros_of_host)
            stack.enter_context(override_attributes(each, add_weight=add_weight))
        yield


@contextlib.contextmanager
def initialized_from(
    layer: keras.Layer, source: keras.Layer, masks: Mapping[int, Masks], done: set[str]
) -> Iterator[None]:
    """Within it, new weights of the layer get the kept values of `source` at once, or zeros.

    So there is never a second array of a weight's size. It works for weights that are found by their names
    in a layer of Keras; the `build` of another layer might assign to them. Weights that a distribution
    divides among devices are made by a compiled initializer, and copied later.

    Args:
        layer: The layer that will be built.
        source: The layer that it was cloned from.
        masks: As in `copy_weights`.
        done: Gets the names of the weights that have their values.
    """
    is_alone = len(_with_inner_layers(layer)) == 1 and keras.distribution.distribution() is None
    weights = _weights_by_name(source) if is_alone and is_from_keras(type(layer)) else {}

    def initializer_of(name: str) -> Callable[..., Tensor]:
        if name not in weights or name in done:
            return zeros_of_host

        def initialize(shape: Sequence[int], dtype: str | None = None) -> Tensor:
            number, weight = weights[name]
            value = copy_kept(weight, masks.get(number, ()))
            if tuple(value.shape) != tuple(shape):
                return zeros_of_host(shape, dtype)
            done.add(name)
            return keras.ops.convert_to_tensor(value, dtype)

        return initialize

    add_weight = _initializing(type(layer).add_weight.__get__(layer), initializer_of)
    with zero_initialized(layer), override_attributes(layer, add_weight=add_weight):
        yield


def _initializing(
    add_weight: Callable[..., keras.Variable], initializer_of: Callable[[str], Callable[..., Tensor]]
) -> Callable[..., keras.Variable]:
    """`add_weight` with an initializer that is found by the name of the weight."""

    def add(shape: Sequence[int] | None = None, initializer: Any = None, **arguments: Any) -> keras.Variable:
        return add_weight(shape, initializer=initializer_of(arguments.get("name", "")), **arguments)

    return add


def _weights_by_name(layer: keras.Layer) -> dict[str, tuple[int, keras.Variable]]:
    """A layer's weights with their positions, by name, without those that share a name."""
    names = [weight.name for weight in layer.weights]
    return {w.name: (number, w) for number, w in enumerate(layer.weights) if names.count(w.name) == 1}


def _with_inner_layers(layer: keras.Layer) -> list[keras.Layer]:
    """A layer and the layers inside, such as cells and wrapped layers, each once."""
    return list(dict.fromkeys((layer, *inner_layers(layer))))


def build_like(clone: keras.Layer, layer: keras.Layer, name: str) -> None:
    """Builds a cloned layer with the shapes that `layer` was built with.

    Raises:
        UnsupportedModelError: if the clone has another number of weights then.
    """
    if not clone.built and layer.built:
        config = layer.get_build_config()
        if config is not None:
            with zero_initialized(clone):
                clone.build_from_config(config)
                if len(clone.weights) != len(layer.weights) and "input_shape" in config:
                    clone(keras.KerasTensor(config["input_shape"]))  # layers inside are built when called
    if len(clone.weights) != len(layer.weights):
        raise UnsupportedModelError(
            f"Layer '{name}' has {len(layer.weights)} weights, its copy has {len(clone.weights)}. "
            "Create all weights in `build`. "
            f"Received: {name}={layer!r}"
        )


def copy_weights(
    source: keras.Layer,
    target: keras.Layer,
    masks: Mapping[int, Masks] | None = None,
    done: Container[str] = (),
) -> None:
    """Copies weights, without what the masks leave out.

    Args:
        source, target: Layers of the same class.
        masks: What stays along each axis, by the weight's position in `source.weights`. Weights without an
            entry stay whole.
        done: Names of weights that have their values already (`initialized_from`).
    """
    for number, (old, new) in enumerate(zip(source.weights, target.weights, strict=True)):
        if not (old.name == new.name and new.name in done):
            new.assign(copy_kept(old, (masks or {}).get(number, ())))
    if hasattr(target, "finalize_state"):  # layers with `adapt` compute with values made from their weights
        target.finalize_state()


def losses_by_output(model: keras.Model, num_outputs: int) -> list[Any]:
    """The compiled loss of each flattened output, `None` where there is none."""
    loss, structure = getattr(model, "loss", None), output_structure(model)
    if isinstance(loss, dict) and not isinstance(structure, dict):
        return [loss.get(name) for name in output_names(model)]
    losses = _losses_of_leaves(loss, structure)
    return losses * num_outputs if len(losses) == 1 else losses


def _losses_of_leaves(loss: Tree, structure: Tree) -> list[Any]:
    """The loss of each leaf of a structure of outputs; losses are nested as it is, or less deeply."""
    if isinstance(loss, dict) and isinstance(structure, dict):
        pairs = [(loss.get(name), structure[name]) for name in sorted(structure)]
    elif isinstance(loss, (list, tuple)):
        parts = structure if isinstance(structure, (list, tuple)) and len(structure) == len(loss) else loss
        pairs = list(zip(loss, parts, strict=True))
    else:
        return [loss] * len(keras.tree.flatten(structure))
    return [leaf for pair in pairs for leaf in _losses_of_leaves(*pair)]


def output_names(model: keras.Model) -> list[str]:
    """The names by which `compile` knows outputs; a Sequential model does not list them."""
    return getattr(model, "output_names", None) or [producer(tensor).name for tensor in model.outputs]


def compile_settings(model: keras.Model) -> dict[str, Any] | None:
    """Arguments of `compile` for another model like this one, with a new optimizer and new metrics.

    Returns:
        The arguments, as the model's attributes are now; `None` if the model is not compiled.
    """
    if not getattr(model, "compiled", False):
        return None
    settings, copies = compile_arguments(model), IdentityMap[Any, Any]()
    optimizer = settings["optimizer"]
    if optimizer is not None:
        settings["optimizer"] = fresh_optimizer(getattr(optimizer, "wrapped", optimizer))
    for key in ("metrics", "weighted_metrics"):
        settings[key] = keras.tree.map_structure(lambda one: _with_copies(one, copies), settings[key])
    return settings


def _with_copies(value: Any, copies: IdentityMap[Any, Any]) -> Any:
    """An attribute of a metric with copies of variables and metrics, by `copies`, in their places."""
    if isinstance(value, keras.Metric) and value not in copies:
        _copy_metric(value, copies)
    if value in copies:
        return copies[value]
    if isinstance(value, dict):
        return {key: _with_copies(one, copies) for key, one in value.items()}
    if type(value) is tuple or isinstance(value, list):
        parts = [_with_copies(one, copies) for one in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if inspect.ismethod(value) and value.__self__ in copies:
        return value.__func__.__get__(copies[value.__self__])
    return value


def _copy_metric(metric: keras.Metric, copies: IdentityMap[Any, Any]) -> None:
    """Adds to `copies` a copy of a metric in its state, and of all that it is made of.

    Configurations do not tell what was set after construction; those of classes without a `get_config`
    of their own do not even tell how to make another one.
    """
    new = object.__new__(type(metric))
    keras.Metric.__init__(new, dtype=metric.dtype, name=metric.name)
    copies[metric] = new
    attributes = {name: value for name, value in vars(metric).items() if name not in vars(new)}
    for old in own_variables(metric):
        variable = new.add_variable(old.shape, "zeros", old.dtype, old.aggregation, old.name)
        variable.assign(keras.ops.convert_to_numpy(old))
        copies[old] = variable
    for name, value in attributes.items():
        setattr(new, name, _with_copies(value, copies))
