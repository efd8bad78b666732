"""Opens models and layers whose insides can only be seen by running them."""

import contextlib
import functools
import inspect
import math
import sys
from typing import Any, TypeAlias

import keras

from keras_taylor.rules.attention import is_attention
from keras_taylor.rules.base import is_from_keras
from keras_taylor.rules.registry import REGISTERED
from keras_taylor.support.identity import IdentityMap, IdentitySet

# What a model's class may override, and another model would not run.
_TRAINING_METHODS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_PLAIN_TYPES = (int, float, str, bool, slice, type(None))
_SETTING_TYPES = (*_PLAIN_TYPES, tuple, list)


class UnsupportedModelError(ValueError):
    """A model that cannot be read, with the layer's name and the way out."""


class LayerStaysClosed(Exception):
    """A layer whose insides cannot be seen; the message says why."""


def functional_view(model):
    """A Functional model over the layers of a subclassed one: the same weights, compiled alike.

    Sequential and Functional models are returned as they are.

    Args:
        model: A built `keras.Model`. It is not changed.

    Raises:
        UnsupportedModelError: if its `call` cannot be traced; the message says why.
        ValueError: if it is not built.
    """
    if not isinstance(model, keras.Model) or is_functional(model):
        return model
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built: its weights do not exist yet. Call it once on a batch of "
            f"data. Received: model={model!r}"
        )
    try:
        shape = _recorded_input_shapes(model)
        view = _trace(model, _make_inputs(shape, "float32"), make=keras.Model)
        if _feeds_only_embeddings(view):
            view = _trace(model, _make_inputs(shape, "int32"), make=keras.Model)
    except LayerStaysClosed as reason:
        raise UnsupportedModelError(
            f"Model '{model.name}' is a subclassed model (class `{type(model).__name__}`) that cannot be "
            f"opened: {reason}. Build it with the functional API: `x = keras.Input(shape); keras.Model(x, "
            f"<the layers called on x>)`. Received: {model.name}={model!r}"
        ) from reason
    view.name = model.name
    if view.dtype_policy != model.dtype_policy:
        view.dtype_policy = model.dtype_policy
    if getattr(model, "compiled", False):
        view.compile(**compile_arguments(model))
        view.optimizer = model.optimizer
    return view


def compile_arguments(model):
    """What `model.compile` was called with, a dict.

    `get_compile_config()`, the public way, serializes it, which functions and
    lambdas do not survive; so the record behind it is read here, and only here.
    """
    return dict(model._compile_config.config)


def trainable_view(model):
    """`functional_view`, refused for a subclassed model that is trained in its own way."""
    view = functional_view(model)
    name = overridden_training_method(model)
    if view is not model and name is not None:
        raise ValueError(
            f"The model's class overrides `{name}`, and the smaller model is a plain Functional one, which "
            "would be trained without it. Prune with `score`, `make_plan` and `prune`, and train the result "
            f"in your own loop. Received: model={model.name!r} of class `{type(model).__name__}`"
        )
    return view


def _recorded_input_shapes(model):
    """The input shapes that Keras has on record for a subclassed model."""
    config = model.get_build_config() or {}
    shapes = (
        [config["input_shape"]] if "input_shape" in config else list(config.get("shapes_dict", {}).values())
    )
    if not shapes:
        raise LayerStaysClosed(
            "Keras has no input shapes on record; its `call` may not run on symbolic inputs"
        )
    return shapes[0]


def overridden_training_method(model):
    """Name of a method of training that a model's class overrides, `None` if it trains as Keras does."""
    if not isinstance(model, keras.Model):
        return None
    return next(
        (n for n in _TRAINING_METHODS if getattr(type(model), n) is not getattr(keras.Model, n)), None
    )


def is_functional(model):
    """Whether a model's layers and the way between them are on record."""
    if isinstance(model, keras.Sequential):
        return True
    return isinstance(model, keras.Function) and type(model).call is functional_class().call


@functools.cache
def functional_class():
    """The class that `keras.Model(inputs, outputs)` makes; it has no public name."""
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


def is_openable(operation):
    """Whether to look into a layer: the user's own ones without a registered rule, and attention."""
    if not isinstance(operation, keras.Layer) or is_functional(operation) or type(operation) in REGISTERED:
        return False
    return is_attention(operation) or not is_from_keras(type(operation))


def trace_layer(layer, args, kwargs):
    """What a layer does with its arguments, as a `keras.Function` of the tensors among them.

    Args:
        layer: A built layer. It is not changed.
        args, kwargs: Call arguments, `KerasTensor`s among them.

    Returns:
        The function; its inputs are a list, one for each tensor in the order of the flattened arguments.

    Raises:
        LayerStaysClosed: if that cannot be found out; the message says why.
    """
    # flattened, packed and flattened: mapping would take dicts in another order than flattening does
    flat = keras.tree.flatten((args, kwargs))
    for place, x in enumerate(flat):
        if isinstance(x, keras.KerasTensor):
            flat[place] = keras.Input(batch_shape=x.shape, dtype=x.dtype, name=f"{layer.name}_{place}")
    args, kwargs = keras.tree.pack_sequence_as((args, kwargs), flat)
    inputs = [x for x in flat if isinstance(x, keras.KerasTensor)]
    if getattr(layer, "quantization_mode", None):
        raise LayerStaysClosed("it is quantized")
    return _trace(layer, inputs, args, kwargs)


def _trace(layer, inputs, args=None, kwargs=None, make=keras.Function):
    """The `keras.Function` of a layer's `call`, checked to be the same while training."""
    args = (inputs,) if args is None else args
    _refuse_own_weights(layer)
    if layer.activity_regularizer is not None:
        raise LayerStaysClosed("it has an activity regularizer of its own")
    function = _trace_call(layer, inputs, args, kwargs or {}, make)
    _refuse_computed_weights(layer, function)
    if "training" in inspect.signature(layer.call).parameters and "training" not in (kwargs or {}):
        training = _trace_call(layer, inputs, args, {**(kwargs or {}), "training": True})
        if call_sequence(training) != call_sequence(function):
            raise LayerStaysClosed("its `call` takes another way while training")
    return function


def _trace_call(layer, inputs, args, kwargs, make=keras.Function):
    with _call_records_restored(layer):
        try:
            outputs = layer.call(*_cast_arguments(layer, args), **_cast_arguments(layer, kwargs))
            given = IdentitySet(keras.tree.flatten(inputs))
            # a sub-model that hands its input through would put out a tensor that has been made already
            outputs = keras.tree.map_structure(lambda y: keras.ops.copy(y) if y in given else y, outputs)
            with recursion_limit_raised(_count_calls(outputs)):
                function = make(inputs, outputs)
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            open_ended = any(None in x.shape[1:] for x in keras.tree.flatten(inputs))
            hint = "; an input axis of unknown size may be why (`keras.Input((128,))` gives it one)"
            hint = hint if open_ended else ""
            raise LayerStaysClosed(f"{type(error).__name__}: {text}{hint}") from error
    if any(not isinstance(y, keras.KerasTensor) for y in keras.tree.flatten(outputs)):
        raise LayerStaysClosed("its `call` returns something that is no tensor")
    shapes = IdentityMap()
    for number, node in enumerate(nodes(function)):
        arguments = [list(node.arguments.args), node.arguments.kwargs]
        if any(isinstance(x, keras.Variable) for x in keras.tree.flatten(arguments)):
            raise LayerStaysClosed("its `call` uses weights outside of layers")
        if any(callable(x) for x in keras.tree.flatten(arguments)):
            raise LayerStaysClosed("its `call` branches or loops by functions, whose insides are not seen")
        if not isinstance(node.operation, keras.Layer):
            # made by this call, with a name that counts all operations so far; plans go by names
            node.operation.name = f"{type(node.operation).__name__.lower()}_{number}"
        _settle_shape(node, shapes)
    return function


@contextlib.contextmanager
def recursion_limit_raised(num_calls):
    """Within it Keras can make a model of so many calls, whatever the recursion limit is.

    It goes from the outputs to the inputs by recursion, a frame a call; nothing else here does.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 2 * num_calls + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _count_calls(outputs):
    """How many calls lead to symbolic tensors."""
    seen, ahead = set(), [y for y in keras.tree.flatten(outputs) if isinstance(y, keras.KerasTensor)]
    while ahead:
        operation, number, _ = ahead.pop()._keras_history
        if (operation, number) not in seen:
            seen.add((operation, number))
            ahead.extend(operation._inbound_nodes[number].input_tensors)
    return len(seen)


def _settle_shape(node, shapes):
    """Puts what is known in the place of sizes that the code asked for and that were not known to it.

    Args:
        node: The record of a call.
        shapes: Shapes of tensors made before it, where more is known of them than they say.
            Those of its outputs are added.
    """
    operation = node.operation
    settings = {}
    if not isinstance(operation, keras.Layer):  # those that take sizes infer them when they run
        settings = {k: v for k, v in vars(operation).items() if isinstance(v, (tuple, list)) and None in v}
    if "newshape" in settings:
        first = node.arguments.keras_tensors[0]
        wanted = _infer_newshape(shapes.get(first, first.shape), operation.newshape)
        if wanted.count(None) == 1:
            operation.newshape = tuple(-1 if size is None else size for size in wanted)
            # one that was made so: copies are made from what an operation was made with
            node.operation = type(operation)(operation.newshape)
            node.operation.name = operation.name
            del settings["newshape"]
    is_resizing = isinstance(operation, keras.layers.Resizing)
    if {"newshape", "shape", "size"} & settings.keys() or (
        is_resizing and None in (operation.height, operation.width)
    ):
        raise LayerStaysClosed(f"its `call` needs a size that is not known ('{operation.name}')")
    is_more_known = node.operation is not operation or any(x in shapes for x in node.arguments.keras_tensors)
    if is_more_known and any(None in x.shape[1:] for x in node.outputs):
        shapes.update(_infer_output_shapes(node, shapes))


def _infer_output_shapes(node, shapes):
    """Shapes of a call's outputs, computed again from what is known of its inputs."""
    args, kwargs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(shapes[x], dtype=x.dtype) if x in shapes else x,
        (node.arguments.args, node.arguments.kwargs),
    )
    outputs = keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
    return IdentityMap((x, tuple(y.shape)) for x, y in zip(node.outputs, outputs, strict=True))


def _infer_newshape(old, new):
    """A new shape of which the first size is that of the batch, with what follows for a -1."""
    new = [None if size in (None, -1) else size for size in new]
    if old[0] is None and new[0] is None and None not in old[1:] and new[1:].count(None) == 1:
        rest = math.prod(old[1:]) // math.prod(size for size in new[1:] if size is not None)
        new = [None, *(rest if size is None else size for size in new[1:])]
    return new


def _refuse_own_weights(layer):
    # there is no public way to ask for the layers inside one
    inside = IdentitySet(w for inner in layer._flatten_layers(include_self=False) for w in inner.weights)
    own = [w for w in layer.weights if w not in inside]
    if own:
        raise LayerStaysClosed(f"it has weights of its own ('{own[0].name}')")


def _refuse_computed_weights(layer, function):
    """Refuses layers inside that run on values of their own (positions): these would become constants."""
    steps = nodes(function)
    arguments = keras.tree.flatten([[list(node.arguments.args), node.arguments.kwargs] for node in steps])
    if not any(keras.ops.is_tensor(x) and not isinstance(x, keras.KerasTensor) for x in arguments):
        return
    seen = IdentitySet(w for node in steps for w in getattr(node.operation, "weights", ()))
    for inner in layer._flatten_layers(include_self=False):
        if inner.weights and not any(w in seen for w in inner.weights):
            raise LayerStaysClosed(f"it calls '{inner.name}' on values that do not come from its inputs")


def _cast_arguments(layer, arguments):
    """Arguments cast as the layer casts its inputs."""
    wanted = layer.compute_dtype

    def cast(x):
        is_other = isinstance(x, keras.KerasTensor) and "float" in x.dtype and x.dtype != wanted
        return keras.ops.cast(x, wanted) if is_other else x

    return keras.tree.map_structure(cast, arguments) if layer.autocast and wanted else arguments


@contextlib.contextmanager
def _call_records_restored(layer):
    """Takes back what calls within it leave in the records of a layer's insides."""
    # Keras keeps each symbolic call in private lists; a law of ours is that they stay as they were
    lists = [
        records
        for inner in layer._flatten_layers()
        for records in (inner._inbound_nodes, inner._outbound_nodes)
    ]
    lengths = [len(records) for records in lists]
    try:
        yield
    finally:
        for records, length in zip(lists, lengths, strict=True):
            del records[length:]


def nodes(function):
    """Records of a function's calls in the order of execution; Keras has no public way to ask for them."""
    by_depth = function._nodes_by_depth
    return [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth] if not n.is_input]


CallSequence: TypeAlias = tuple[list[tuple[Any, list[Any]]], list[Any]]


def call_sequence(function) -> CallSequence:
    """What is called in what order, whatever `training` is."""
    numbers: IdentityMap[keras.KerasTensor, int] = IdentityMap()

    def known(x):
        if isinstance(x, keras.KerasTensor):
            return ("tensor", numbers.setdefault(x, len(numbers)))
        return repr(x) if isinstance(x, _PLAIN_TYPES) else type(x).__name__

    steps = []
    for x in keras.tree.flatten(function._inputs_struct):
        known(x)
    for node in nodes(function):
        operation = node.operation
        if isinstance(operation, keras.Layer):
            what = operation
        else:
            settings = {k: v for k, v in vars(operation).items() if k not in ("name", "_name")}
            flat = keras.tree.flatten({k: v for k, v in settings.items() if isinstance(v, _SETTING_TYPES)})
            what = type(operation).__name__, [known(x) for x in flat]
        kwargs = {k: v for k, v in node.arguments.kwargs.items() if k != "training"}
        arguments = [known(x) for x in keras.tree.flatten([list(node.arguments.args), kwargs])]
        steps.append((what, arguments))
        for y in node.outputs:
            known(y)
    return steps, [known(y) for y in keras.tree.flatten(function._outputs_struct)]


def _make_inputs(shape, dtype, name="input"):
    """`keras.Input`s in the structure of recorded shapes, any number of examples."""
    if isinstance(shape, dict):
        return {key: _make_inputs(one, dtype, key) for key, one in shape.items()}
    if all(isinstance(size, (int, type(None))) for size in shape):
        return keras.Input(batch_shape=(None, *shape[1:]), dtype=dtype, name=name)
    return [_make_inputs(one, dtype, f"{name}_{k}") for k, one in enumerate(shape)]


def _feeds_only_embeddings(function):
    """Whether all that reads the inputs are embeddings, which take whole numbers."""
    inputs = IdentitySet(keras.tree.flatten(function._inputs_struct))
    readers = [
        node.operation for node in nodes(function) if any(x in inputs for x in node.arguments.keras_tensors)
    ]
    return bool(readers) and all(isinstance(o, keras.layers.Embedding) for o in readers)
