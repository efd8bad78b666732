"""Opens models and layers whose insides can only be seen by running them."""

import ast
import contextlib
import dataclasses
import inspect
import itertools
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_taylor.rules.attention import is_attention
from keras_taylor.rules.base import is_from_keras
from keras_taylor.rules.registry import REGISTERED
from keras_taylor.support.arguments import check_model_class
from keras_taylor.support.hub_tasks import is_from_hub
from keras_taylor.support.identity import IdentityMap, IdentitySet
from keras_taylor.support.keras_internals import (
    Node,
    call_records,
    compile_arguments,
    count_calls,
    functional_class,
    input_structure,
    layers_inside,
    node_arguments,
    nodes_in_order,
    output_structure,
)
from keras_taylor.support.types import Shape, Tree

# Methods of training that a model's class may override. Another model would not run them.
_TRAINING_METHODS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
_COMPARED_TYPES = (int, float, str, bool, slice, type(None))
# Prime numbers of examples, to see what is computed from their number.
_BATCH_SIZES = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149)
_ORIGIN = "_keras_taylor_origin"  # an attribute of models that stand for a task
_PROBED_SIZE = 7  # of random inputs along axes of unknown size
_SETTING_TYPES = (*_COMPARED_TYPES, tuple, list)


class UnsupportedModelError(ValueError):
    """A model that cannot be read or pruned. The message names the layer and says what to do.

    Example:
        >>> class Gated(keras.Model):
        ...     def call(self, x):
        ...         return x if keras.ops.max(x) > 0 else -x
        >>> gated = Gated()
        >>> outputs = gated(x[:2])
        >>> try:
        ...     keras_taylor.analyze(gated)
        ... except keras_taylor.UnsupportedModelError as error:
        ...     print("cannot be opened" in str(error))
        True
    """


class LayerStaysClosed(Exception):
    """The insides of a layer cannot be seen. The message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """The task or backbone that a plain model stands for: its layers, or smaller ones in their places.

    Attributes:
        model: The task or backbone.
        positions: Weight of the plain model -> the position of its counterpart in `model.weights`.
        lacks_branches: Whether residual branches have left, with their layers.
    """

    model: keras.Model
    positions: IdentityMap[keras.Variable, int]
    lacks_branches: bool = False


def origin_of(model: keras.Model) -> Origin | None:
    """The origin of a plain model that stands for a task or backbone, else `None`."""
    return vars(model).get(_ORIGIN)


def set_origin(model: keras.Model, origin: Origin) -> None:
    """Notes which task or backbone a plain model stands for; Keras does not track it."""
    vars(model)[_ORIGIN] = origin


def _plain_model(model: keras.Model) -> keras.Model:
    """A Functional model over the layers of a task or backbone, which stands for it; not compiled."""
    plain = keras.Model(input_structure(model), output_structure(model), name=model.name)
    positions = IdentityMap((weight, number) for number, weight in enumerate(model.weights))
    set_origin(plain, Origin(model, positions))
    return plain


def functional_view(model: keras.Model) -> keras.Model:
    """A Functional model over the layers of a subclassed one: the same weights, compiled alike.

    Sequential and Functional models are returned as they are. For a task or backbone of KerasHub it is a
    plain model that remembers where it comes from (`Origin`).

    Args:
        model: A built `keras.Model`. It is not changed.

    Raises:
        UnsupportedModelError: if its `call` cannot be traced; the message says why.
        ValueError: if it is no model, or not built.
    """
    check_model_class(model)
    if is_functional(model):
        return _compiled_like(model, _plain_model(model)) if is_from_hub(model) else model
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built: its weights do not exist yet. Call it once on a batch of "
            f"data. Received: model={model!r}"
        )
    try:
        shape = _recorded_input_shapes(model)
        view = _trace_model(model, shape, "float32")
        if _feeds_only_embeddings(view):
            view = _trace_model(model, shape, "int32")
    except LayerStaysClosed as reason:
        raise UnsupportedModelError(
            f"Model '{model.name}' is a subclassed model (class `{type(model).__name__}`) that cannot be "
            f"opened: {reason}. Build it with the functional API: `x = keras.Input(shape); keras.Model(x, "
            f"<the layers called on x>)`. Received: {model.name}={model!r}"
        ) from reason
    view.name = model.name
    return _compiled_like(model, view)


def _compiled_like(model: keras.Model, view: keras.Model) -> keras.Model:
    """A view of a model, with its dtype policy, and compiled as it is."""
    if view.dtype_policy != model.dtype_policy:
        view.dtype_policy = model.dtype_policy
    if getattr(model, "compiled", False):
        view.compile(**compile_arguments(model))
        if hasattr(model, "history"):
            view.history = model.history
    return view


def trainable_view(model: keras.Model) -> keras.Model:
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


def overridden_training_method(model: keras.Model) -> str | None:
    """Name of a method of training that a model's class overrides, `None` if it trains as Keras does."""
    if not isinstance(model, keras.Model):
        return None
    overridden = (n for n in _TRAINING_METHODS if getattr(type(model), n) is not getattr(keras.Model, n))
    return next(overridden, None)


def _recorded_input_shapes(model: keras.Model) -> Tree:
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


def _make_inputs(shape: Tree, dtype: str, taken: Container[str], name: str = "input") -> Tree:
    """`keras.Input`s in the structure of recorded shapes, for any number of examples.

    Their names are the keys of dicts, unless a layer has taken a name.
    """
    if isinstance(shape, dict):
        return {key: _make_inputs(one, dtype, taken, str(key)) for key, one in shape.items()}
    if all(isinstance(size, (int, type(None))) for size in shape):
        name = f"{name}_input" if name in taken else name
        return keras.Input(batch_shape=(None, *shape[1:]), dtype=dtype, name=name)
    return [_make_inputs(one, dtype, taken, f"{name}_{k}") for k, one in enumerate(shape)]


def _feeds_only_embeddings(function: keras.Function) -> bool:
    """Whether the inputs go to embeddings only, which read whole numbers."""
    inputs = IdentitySet(keras.tree.flatten(input_structure(function)))
    readers = [
        node.operation
        for node in nodes_in_order(function)
        if any(x in inputs for x in node.arguments.keras_tensors)
    ]
    return bool(readers) and all(isinstance(o, keras.layers.Embedding) for o in readers)


def is_functional(model: Any) -> bool:
    """Whether Keras has a record of a model's layers and of how they are connected."""
    if isinstance(model, keras.Sequential):
        return True
    return isinstance(model, keras.Function) and type(model).call is functional_class().call


def is_openable(operation: keras.Operation) -> bool:
    """Whether to look into a layer: attention, and the user's own layers without a registered rule."""
    if not isinstance(operation, keras.Layer) or is_functional(operation) or type(operation) in REGISTERED:
        return False
    return is_attention(operation) or not is_from_keras(type(operation))


def trace_layer(layer: keras.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> keras.Function:
    """The function that a layer computes from the tensors among its arguments.

    Args:
        layer: A built layer. It is not changed.
        args, kwargs: Call arguments, `KerasTensor`s among them.

    Returns:
        The function. Its inputs are a list, one for each tensor in the order of the flattened arguments.

    Raises:
        LayerStaysClosed: if that cannot be found out; the message says why.
    """
    # `map_structure` would visit the entries of a dict in another order than `flatten` does.
    flat = keras.tree.flatten((args, kwargs))
    for position, x in enumerate(flat):
        if isinstance(x, keras.KerasTensor):
            flat[position] = keras.Input(batch_shape=x.shape, dtype=x.dtype, name=f"{layer.name}_{position}")
    args, kwargs = keras.tree.pack_sequence_as((args, kwargs), flat)
    inputs = [x for x in flat if isinstance(x, keras.KerasTensor)]
    if getattr(layer, "quantization_mode", None):
        raise LayerStaysClosed("it is quantized")
    return _trace(layer, inputs, args, kwargs, keras.Function)


def _trace_model(model: keras.Model, shape: Tree, dtype: str) -> keras.Model:
    """The Functional model that a subclassed one computes from inputs of these shapes."""
    inputs = _make_inputs(shape, dtype, {layer.name for layer in layers_inside(model)})
    return _trace(model, inputs, (inputs,), {}, make_model)


def make_model(
    inputs: Tree, outputs: Tree, model_class: type[keras.Model] = keras.Model, **name: str
) -> keras.Model:
    """Makes a Functional model; names of inputs that differ from their keys are no reason to warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="When providing `inputs` as a dict")
        return model_class(inputs=inputs, outputs=outputs, **name)


def _as_dicts(outputs: Tree) -> Tree:
    """Outputs with plain dicts, sorted by their keys: a file of a model holds no others."""
    if isinstance(outputs, Mapping):
        return {key: _as_dicts(outputs[key]) for key in sorted(outputs)}
    if type(outputs) in (list, tuple):
        return type(outputs)(_as_dicts(one) for one in outputs)
    return outputs


def _trace(
    layer: keras.Layer,
    inputs: Tree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    function_class: Callable[[Tree, Tree], keras.Function],
) -> keras.Function:
    """The function of a layer's `call`: its way while training, which must do the same at inference."""
    _check_no_own_weights(layer)
    if layer.activity_regularizer is not None:
        raise LayerStaysClosed("it has an activity regularizer of its own")
    function = _trace_call(layer, inputs, args, kwargs, function_class)
    _check_no_computed_weights(layer, function)
    if "training" in inspect.signature(layer.call).parameters and "training" not in kwargs:
        training = _trace_call(layer, inputs, args, {**kwargs, "training": True}, function_class)
        if call_sequence(training) != call_sequence(function):
            first, second = (call_sequence(each, _does_nothing_at_inference) for each in (training, function))
            if first != second:
                raise LayerStaysClosed(
                    f"its `call` takes another way while training{_find_branches(layer)}. Call a layer there "
                    "that does nothing at inference, as Dropout does, or go the same way in both"
                )
            return _with_training_off(training, function)
    return function


def _does_nothing_at_inference(node: Node) -> bool:
    """Whether a layer returns its input at inference, as dropout does; judged by random numbers."""
    layer, tensors = node.operation, node.arguments.keras_tensors
    is_switched = isinstance(layer, keras.Layer) and "training" in inspect.signature(layer.call).parameters
    if not is_switched or layer.weights or len(tensors) != 1 or len(node.outputs) != 1:
        return False
    if tensors[0].shape != node.outputs[0].shape or "float" not in tensors[0].dtype:
        return False
    shape = [_PROBED_SIZE if size is None else size for size in tensors[0].shape]
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    try:
        y = layer.call(keras.ops.convert_to_tensor(x), training=False)
    except Exception:  # a user's layer may raise anything
        return False
    return keras.ops.is_tensor(y) and np.array_equal(keras.ops.convert_to_numpy(y), x)


def _with_training_off(training: keras.Function, inference: keras.Function) -> keras.Function:
    """The way while training, whose layers train when the model is told to, and not by themselves."""
    always = {n.operation for n in nodes_in_order(inference) if n.arguments.kwargs.get("training") is True}
    for node in nodes_in_order(training):
        if node.operation not in always and node.arguments.kwargs.get("training") is True:
            node.arguments.kwargs["training"] = False  # Keras puts in what the model is told
    return training


def _find_branches(layer: keras.Layer) -> str:
    """Where a layer's `call` asks whether it trains, as " (line 7 of model.py)"; "" if that is unknown."""
    try:
        source, start = inspect.getsourcelines(layer.call)
        tree = ast.parse(textwrap.dedent("".join(source)))
    except (OSError, TypeError, SyntaxError):
        return ""
    branches = [node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp))]
    lines = sorted(
        start + branch.lineno - 1
        for branch in branches
        if any(isinstance(name, ast.Name) and name.id == "training" for name in ast.walk(branch.test))
    )
    file = os.path.basename(inspect.getsourcefile(layer.call) or "")
    return f" (line {', '.join(map(str, lines))} of {file})" if lines else ""


def _trace_call(
    layer: keras.Layer,
    inputs: Tree,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    function_class: Callable[[Tree, Tree], keras.Function],
) -> keras.Function:
    """The function of one run of a layer's `call`."""
    with _call_records_restored(layer):
        try:
            return _trace_outputs(inputs, function_class, lambda: _call(layer, args, kwargs))
        except LayerStaysClosed as reason:
            # `4 * ops.shape(x)[0]` is a TypeError
            may_compute = isinstance(reason, _UnclearSizeError) or isinstance(reason.__cause__, TypeError)
            if not may_compute or any(x.shape[:1] != (None,) for x in keras.tree.flatten(inputs)):
                raise
            try:
                return _trace_outputs(
                    inputs, function_class, lambda: _call_for_one_batch_size(layer, inputs, args, kwargs)
                )
            except LayerStaysClosed:
                raise reason from reason.__cause__


class _UnclearSizeError(LayerStaysClosed):
    """Several numbers may be meant by the unknown size of the batch axis."""


def _trace_outputs(
    inputs: Tree, function_class: Callable[[Tree, Tree], keras.Function], call: Callable[[], Tree]
) -> keras.Function:
    """The function from symbolic inputs to the symbolic outputs that a call returns."""
    try:
        outputs = call() if function_class is keras.Function else _as_dicts(call())
        given = IdentitySet(keras.tree.flatten(inputs))
        # Each tensor has one producer in the graph, so an input must not be an output as well.
        outputs = keras.tree.map_structure(lambda y: keras.ops.copy(y) if y in given else y, outputs)
        symbolic = (y for y in keras.tree.flatten(outputs) if isinstance(y, keras.KerasTensor))
        with recursion_limit_raised(count_calls(symbolic)):
            function = function_class(inputs, outputs)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        has_unknown_size = any(None in x.shape[1:] for x in keras.tree.flatten(inputs))
        hint = "; an input axis of unknown size may be why (`keras.Input((128,))` gives it one)"
        hint = hint if has_unknown_size else ""
        raise LayerStaysClosed(f"{type(error).__name__}: {text}{hint}") from error
    if any(not isinstance(y, keras.KerasTensor) for y in keras.tree.flatten(outputs)):
        raise LayerStaysClosed("its `call` returns something that is no tensor")
    _settle_nodes(function)
    return function


def _call(layer: keras.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tree:
    """What a layer's `call` returns, with inputs cast as the layer casts them."""
    return layer.call(*_cast_arguments(layer, args), **_cast_arguments(layer, kwargs))


def _call_for_one_batch_size(
    layer: keras.Layer, inputs: Tree, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tree:
    """What a layer's `call` returns if it computes with the number of examples.

    It is called with a number that no other size is a multiple of. Where a reshape got a multiple of that,
    -1 takes its place. Then the same operations are called for any number of examples.
    """
    flat = keras.tree.flatten(inputs)
    sizes = {size for x in (*flat, *layer.weights) for size in x.shape if size}
    batch_size = next(prime for prime in _BATCH_SIZES if all(size % prime for size in sizes))
    sized = [keras.Input(batch_shape=(batch_size, *x.shape[1:]), dtype=x.dtype) for x in flat]
    sized_of = IdentityMap(zip(flat, sized, strict=True))
    args, kwargs = keras.tree.map_structure(
        lambda x: sized_of.get(x, x) if isinstance(x, keras.KerasTensor) else x, (args, kwargs)
    )
    function = keras.Function(sized, _call(layer, args, kwargs))
    for node in nodes_in_order(function):
        _free_batch_size(node, batch_size)
    return function.call(flat)


def _free_batch_size(node: Node, batch_size: int) -> None:
    """Makes a recorded call one for any number of examples, given the number with which it was recorded."""
    operation, shape = node.operation, node.outputs[0].shape
    is_layer = isinstance(operation, keras.Layer)
    is_free = [size is None or size % batch_size == 0 for size in shape]
    if not is_layer and hasattr(operation, "newshape") and sum(is_free) == 1:
        newshape = [-1 if free else size for size, free in zip(shape, is_free, strict=True)]
        node.operation = type(operation)(newshape)
        return
    settings = [value for value in vars(operation).values() if isinstance(value, _SETTING_TYPES)]
    settings = [] if is_layer else keras.tree.flatten(settings)
    numbers = [x for x in (*settings, *node_arguments(node)) if isinstance(x, int) and x]
    constants = [
        x for x in node_arguments(node) if hasattr(x, "shape") and not isinstance(x, keras.KerasTensor)
    ]
    numbers += [size for x in constants for size in x.shape if size]
    if any(number % batch_size == 0 for number in numbers):
        raise LayerStaysClosed(f"its `call` computes with the number of examples ('{operation.name}')")


def _settle_nodes(function: keras.Function) -> None:
    """Checks the calls of a traced function, numbers its operations, and fills in known sizes."""
    shapes: IdentityMap[keras.KerasTensor, Shape] = IdentityMap()
    is_folded = False
    for number, node in enumerate(nodes_in_order(function)):
        arguments = node_arguments(node)
        if any(isinstance(x, keras.Variable) for x in arguments):
            raise LayerStaysClosed("its `call` uses weights outside of layers")
        if any(callable(x) for x in arguments):
            raise LayerStaysClosed("its `call` branches or loops by functions, whose insides are not seen")
        if not isinstance(node.operation, keras.Layer):
            # Keras counts operations over the whole process, and plans go by names.
            node.operation.name = f"{type(node.operation).__name__.lower()}_{number}"
        if is_folded and {None, -1} <= set(getattr(node.operation, "newshape", ())):
            raise _UnclearSizeError(f"its `call` leaves a size open behind a fold ('{node.operation.name}')")
        is_folded = is_folded or _moves_examples(node)
        _settle_sizes(node, shapes)


def _moves_examples(node: Node) -> bool:
    """Whether an operation may change what the batch axis holds, so that its size is not the batch's."""
    operation, before, after = node.operation, node.arguments.keras_tensors[0].shape, node.outputs[0].shape
    if isinstance(operation, keras.Layer):
        return False
    known = [None not in shape[1:] for shape in (before, after)]
    is_other = hasattr(operation, "newshape") and all(known) and math.prod(before[1:]) != math.prod(after[1:])
    is_elsewhere = before[:1] == (None,) != after[:1]
    return is_other or getattr(operation, "axis", None) == 0 or is_elsewhere


def _settle_sizes(node: Node, shapes: IdentityMap[keras.KerasTensor, Shape]) -> None:
    """Fills in the sizes that a call asked for before they were known.

    Args:
        node: The record of the call.
        shapes: Shapes of earlier tensors that tell more than the tensors do. The call's outputs are added.
    """
    operation = node.operation
    settings: dict[str, Any] = {}
    if not isinstance(operation, keras.Layer):  # layers that take sizes infer them when they run
        settings = {k: v for k, v in vars(operation).items() if isinstance(v, (tuple, list)) and None in v}
    if "newshape" in settings:
        first = node.arguments.keras_tensors[0]
        wanted = _infer_newshape(shapes.get(first, first.shape), operation.newshape)
        if wanted.count(None) == 1:
            operation.newshape = tuple(-1 if size is None else size for size in wanted)
            # A copy is made from the arguments of `__init__`, so those have to hold the new shape.
            node.operation = type(operation)(operation.newshape)
            node.operation.name = operation.name
            del settings["newshape"]
    needs_size = bool({"newshape", "shape", "size"} & settings.keys())
    if isinstance(operation, keras.layers.Resizing):
        needs_size = None in (operation.height, operation.width)
    if needs_size:
        raise LayerStaysClosed(f"its `call` needs a size that is not known ('{operation.name}')")
    is_more_known = node.operation is not operation or any(x in shapes for x in node.arguments.keras_tensors)
    if is_more_known and any(None in x.shape[1:] for x in node.outputs):
        shapes.update(_infer_output_shapes(node, shapes))


def _infer_newshape(old: Shape, new: Iterable[int | None]) -> list[int | None]:
    """The new shape of a reshape that keeps the batch axis, with the size that a single -1 stands for."""
    sizes = [None if size in (None, -1) else size for size in new]
    known = [size for size in old[1:] if size is not None]
    if old[0] is None and sizes[0] is None and len(known) == len(old) - 1 and sizes[1:].count(None) == 1:
        rest = math.prod(known) // math.prod(size for size in sizes[1:] if size is not None)
        sizes = [None, *(rest if size is None else size for size in sizes[1:])]
    return sizes


def _infer_output_shapes(
    node: Node, shapes: IdentityMap[keras.KerasTensor, Shape]
) -> IdentityMap[keras.KerasTensor, Shape]:
    """Shapes of a call's outputs, computed again from what is known of its inputs."""
    args, kwargs = keras.tree.map_structure(
        lambda x: keras.KerasTensor(shapes[x], dtype=x.dtype) if x in shapes else x,
        (node.arguments.args, node.arguments.kwargs),
    )
    outputs = keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
    return IdentityMap((x, tuple(y.shape)) for x, y in zip(node.outputs, outputs, strict=True))


def _check_no_own_weights(layer: keras.Layer) -> None:
    inside = IdentitySet(w for inner in layers_inside(layer) for w in inner.weights)
    own = [w for w in layer.weights if w not in inside]
    if own:
        raise LayerStaysClosed(f"it has weights of its own ('{own[0].name}')")


def _check_no_computed_weights(layer: keras.Layer, function: keras.Function) -> None:
    """Refuses layers inside that run on constants, such as positions: their outputs would be constants."""
    nodes = nodes_in_order(function)
    arguments = [x for node in nodes for x in node_arguments(node)]
    if not any(keras.ops.is_tensor(x) and not isinstance(x, keras.KerasTensor) for x in arguments):
        return
    seen = IdentitySet(w for node in nodes for w in getattr(node.operation, "weights", ()))
    for inner in layers_inside(layer):
        if inner.weights and not any(w in seen for w in inner.weights):
            raise LayerStaysClosed(f"it calls '{inner.name}' on values that do not come from its inputs")


def _cast_arguments(layer: keras.Layer, arguments: Tree) -> Tree:
    """Arguments cast as the layer casts its inputs."""
    wanted = layer.compute_dtype

    def cast(x: Any) -> Any:
        differs = isinstance(x, keras.KerasTensor) and "float" in x.dtype and x.dtype != wanted
        return keras.ops.cast(x, wanted) if differs else x

    return keras.tree.map_structure(cast, arguments) if layer.autocast and wanted else arguments


@contextlib.contextmanager
def _call_records_restored(layer: keras.Layer) -> Iterator[None]:
    """Within it, a layer and the layers inside can be called; afterwards their records are as before."""
    lists = call_records(layer)
    lengths = [len(records) for records in lists]
    try:
        yield
    finally:
        for records, length in zip(lists, lengths, strict=True):
            del records[length:]


@contextlib.contextmanager
def recursion_limit_raised(num_calls: int) -> Iterator[None]:
    """Within it, Keras can make a model of this many calls.

    Keras goes from the outputs to the inputs by recursion, one frame a call.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, 2 * num_calls + 1000))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


class CallStep(NamedTuple):
    """One call of a function, comparable with calls of other functions.

    Attributes:
        operation: The layer; for another operation the name of its class and its settings.
        arguments: The flattened call arguments: numbers of tensors, plain values, types of all others.
    """

    operation: keras.Layer | tuple[str, list[Any]]
    arguments: list[Any]


class CallSequence(NamedTuple):
    """What a function calls, in which order: equal for two functions that do the same.

    Attributes:
        steps: The calls. The argument `training` is left out.
        outputs: Numbers of the output tensors.
    """

    steps: list[CallStep]
    outputs: list[Any]


def call_sequence(
    function: keras.Function, left_out: Callable[[Node], bool] = lambda node: False
) -> CallSequence:
    """What a function calls, with its tensors numbered in the order of their first appearance.

    Args:
        function: The function.
        left_out: Whether to leave out a call: its output counts as its input.
    """
    numbers: IdentityMap[keras.KerasTensor, int] = IdentityMap()
    count = itertools.count()

    def describe(x: Any) -> Any:
        if isinstance(x, keras.KerasTensor):
            if x not in numbers:
                numbers[x] = next(count)
            return "tensor", numbers[x]
        return repr(x) if isinstance(x, _COMPARED_TYPES) else type(x).__name__

    for x in keras.tree.flatten(input_structure(function)):
        describe(x)
    steps = []
    for node in _nodes_from_outputs(function):
        if left_out(node):
            numbers[node.outputs[0]] = numbers[node.arguments.keras_tensors[0]]
            continue
        operation = node.operation
        if not isinstance(operation, keras.Layer):
            settings = {k: v for k, v in vars(operation).items() if k not in ("name", "_name")}
            flat = keras.tree.flatten({k: v for k, v in settings.items() if isinstance(v, _SETTING_TYPES)})
            operation = type(operation).__name__, [describe(x) for x in flat]
        kwargs = {k: v for k, v in node.arguments.kwargs.items() if k != "training"}
        arguments = [describe(x) for x in keras.tree.flatten([list(node.arguments.args), kwargs])]
        steps.append(CallStep(operation, arguments))
        for y in node.outputs:
            describe(y)
    return CallSequence(steps, [describe(y) for y in keras.tree.flatten(output_structure(function))])


def _nodes_from_outputs(function: keras.Function) -> Iterator[Node]:
    """Yields the calls of a function, each one behind those that it needs.

    `nodes_in_order` sorts them by depth, which a call that is left out would change.
    """
    producers: IdentityMap[keras.KerasTensor, Node] = IdentityMap(
        (y, node) for node in nodes_in_order(function) for y in node.outputs
    )
    done: set[Node] = set()
    ahead = [producers[y] for y in reversed(keras.tree.flatten(output_structure(function))) if y in producers]
    while ahead:
        node = ahead[-1]
        needed = [producers[x] for x in reversed(node.arguments.keras_tensors) if x in producers]
        missing = [each for each in needed if each not in done]
        if node in done or not missing:
            ahead.pop()
            if node not in done:
                done.add(node)
                yield node
        ahead += [] if node in done else missing
