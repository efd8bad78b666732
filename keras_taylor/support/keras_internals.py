"""The private parts of Keras that this package reads, each with the reason why no public way will do.

Nothing else in the package should touch them, so that a new version of Keras is followed here.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.backend.common import global_state

from keras_taylor.support.types import Shape, Tensor, Tree

# The record of one symbolic call. Its class has no public name.
Node: TypeAlias = Any

_WAITING = "uninitialized_variables"  # weights that get their values when a scope ends


@functools.cache
def functional_class() -> type[keras.Model]:
    """The class that `keras.Model(inputs, outputs)` makes. It has no public name."""
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


def input_structure(function: keras.Function) -> Tree:
    """The symbolic inputs, nested as the function was made with; `inputs` is a flat list."""
    return function._inputs_struct


def output_structure(function: keras.Function | keras.Model) -> Tree | None:
    """The symbolic outputs, nested as the function was made with; `outputs` is a flat list.

    `None` for a Sequential or subclassed model.
    """
    return getattr(function, "_outputs_struct", None)


def in_order_of_inputs(x: Tree, model: keras.Model) -> list[Any]:
    """Data as a flat list in the order of a model's inputs, whether it is a tensor, a list or a dict.

    As in Keras, a dict may have entries that are no inputs. Its keys are those of the structure that the
    model was made with, or names of inputs; only the former has no public name.
    """
    if isinstance(x, Mapping):
        structure = getattr(model, "_inputs_struct", None)
        keys = sorted(structure) if isinstance(structure, dict) else [t.name for t in model.inputs]
        if set(keys) <= set(x):
            x = [x[key] for key in keys]
    return keras.tree.flatten(x)


def sequential_function(model: keras.Sequential) -> keras.Function | None:
    """The function that a Sequential builds over its layers, `None` before that; `layers` has no tensors."""
    return model._functional


def nodes_in_order(function: keras.Function) -> list[Node]:
    """Records of a function's calls, in the order of execution; `operations` names each operation once."""
    by_depth = function._nodes_by_depth
    return [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth] if not n.is_input]


def node_arguments(node: Node) -> list[Any]:
    """The flattened arguments of a recorded call. The record itself is private."""
    return keras.tree.flatten([list(node.arguments.args), node.arguments.kwargs])


def producer(tensor: keras.KerasTensor) -> keras.Operation:
    """The operation that made a symbolic tensor. Tensors have no public link to it."""
    return tensor._keras_history.operation


def count_calls(tensors: Iterable[keras.KerasTensor]) -> int:
    """How many recorded calls lead to symbolic tensors. Tensors have no public link to them."""
    seen, ahead = set(), list(tensors)
    while ahead:
        operation, number, _ = ahead.pop()._keras_history
        if (operation, number) not in seen:
            seen.add((operation, number))
            ahead.extend(operation._inbound_nodes[number].input_tensors)
    return len(seen)


def num_inbound_nodes(layer: keras.Layer) -> int:
    """How often a layer was called symbolically. `layer.input` only tells one call from several."""
    return len(layer._inbound_nodes)


def call_records(layer: keras.Layer) -> list[list[Node]]:
    """The lists in which a layer, and each layer inside of it, keeps its symbolic calls.

    A traced model must not differ afterwards, and only these lists let a call be taken back.
    """
    layers = layer._flatten_layers()
    return [records for each in layers for records in (each._inbound_nodes, each._outbound_nodes)]


def copy_operation(operation: keras.Operation) -> keras.Operation:
    """A shallow copy that has not been called, for an operation that cannot be made from a configuration.

    `copy.copy` would save and load it.
    """
    clone: keras.Operation = object.__new__(type(operation))
    vars(clone).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return clone


def layers_inside(layer: keras.Layer) -> list[keras.Layer]:
    """The layers inside a layer at any depth, in the order in which they were made.

    Only models have a public `layers`, and those are the outermost ones.
    """
    return layer._flatten_layers(include_self=False)


def lambda_output_shape(layer: keras.layers.Lambda) -> Shape | None:
    """The `output_shape` that a Lambda was made with; its configuration serializes the function."""
    return layer._output_shape


def notes_of_compilation(model: keras.Model) -> dict[str, Any]:
    """What this package notes of a compiled model; it is gone with the model, or when that is compiled again.

    It lies beside the arguments of `compile`: an attribute of the model itself would be saved, or tracked.
    """
    arguments = getattr(model, "_compile_config", None)
    if arguments is None:
        return {}
    notes: dict[str, Any] = vars(arguments).setdefault("keras_taylor_notes", {})
    return notes


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """The arguments of `model.compile` that make another model train as this one does now, as objects.

    `get_compile_config()` serializes them, which functions and lambdas do not survive. Attributes may have
    been assigned since; the optimizer is the present one, with the loss scale that `compile` may have added.
    """
    return {
        **model._compile_config.config,
        "optimizer": model.optimizer,
        "run_eagerly": model.run_eagerly,
        "jit_compile": model.jit_compile and not model.run_eagerly,
        "steps_per_execution": model.steps_per_execution,
        "auto_scale_loss": False,
    }


def mask_of_tensor(tensor: Tensor) -> Tensor | None:
    """The mask that a layer attached to a tensor, `None` if it has none.

    Layers hand masks on to each other like this, with no public way to it: in an attribute, or beside tensors
    that take none, as JAX's within a compiled step.
    """
    return get_keras_mask(tensor)


def copy_mask(source: Tensor, target: Tensor) -> Tensor:
    """The target, with the mask that a layer attached to the source."""
    mask = mask_of_tensor(source)
    if mask is not None:
        set_keras_mask(target, mask)
    return target


def own_variables(metric: keras.Metric) -> list[keras.Variable]:
    """The variables that a metric made itself; `variables` has those of metrics inside of it, too."""
    return list(metric._variables)


def is_excluded_from_decay(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> bool:
    """Whether a variable was passed to `exclude_from_weight_decay`; configurations leave that out."""
    return optimizer._var_key(variable) in getattr(optimizer, "_exclude_from_weight_decay", ())


def names_excluded_from_decay(optimizer: keras.optimizers.Optimizer) -> str | None:
    """A regular expression for the names of variables that were passed to `exclude_from_weight_decay`."""
    pattern = getattr(optimizer, "_exclude_from_weight_decay_pattern", None)
    return None if pattern is None else pattern.pattern


def variable_indices(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> list[int] | None:
    """The number of each weight among those that an optimizer was built for, `None` if these are others.

    Slots are listed by optimizers in that order, and nothing public tells it.
    """
    numbers = getattr(optimizer, "_trainable_variables_indices", {})
    keys = [optimizer._var_key(variable) for variable in variables]
    return [numbers[key] for key in keys] if set(keys) == set(numbers) else None


def learning_rate_setting(optimizer: keras.optimizers.Optimizer) -> Any:
    """The schedule, function or variable behind `learning_rate`, which only gives its present value."""
    return getattr(optimizer, "_learning_rate", None)


def recorded_arguments(operation: keras.Operation) -> dict[str, Any]:
    """The arguments that an operation was made with, if all are plain values; else an empty dict.

    `get_config` returns them only for a class that does not define its own.
    """
    recorded = getattr(operation, "_auto_config", None)
    return {} if recorded is None else dict(recorded.config)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within it, layers get weights without values: shapes alone.

    A public `StatelessScope` does so. But it notes these weights in a global list, and the next scope that
    ends would draw values for all of them.
    """
    waiting = list(global_state.get_global_attribute(_WAITING, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(_WAITING, waiting)


def give_values(layer: keras.Layer) -> None:
    """Gives values to what a layer that was made within `shapes_only` lacks them for: zeros to its weights.

    An `assign` copies into values that are there, and nothing public puts the first ones in.
    """
    for weight in layer.weights:
        if weight._value is None:
            weight._initialize(keras.ops.convert_to_tensor(np.zeros(weight.shape), weight.dtype))
    for variable in layer.variables:  # states of seeds
        if variable._value is None:
            variable._deferred_initialize()
