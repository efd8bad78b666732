"""Reads any Keras model into one flat list of operations."""

import collections
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_taylor.reading.tracing import (
    CallSequence,
    LayerStaysClosed,
    UnsupportedModelError,
    call_sequence,
    functional_view,
    is_functional,
    is_openable,
    trace_layer,
)
from keras_taylor.rules.attention import is_attention
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.keras_internals import (
    Node,
    input_structure,
    layers_inside,
    mask_of_tensor,
    nodes_in_order,
    output_structure,
    producer,
    sequential_function,
)
from keras_taylor.support.types import Shape, Tree


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """Stands for a tensor in a call's arguments.

    Attributes:
        index: The number of the tensor in its graph.
    """

    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One place in a model or sub-model where an operation is applied.

    Attributes:
        operation: The layer or `keras.ops` operation.
        args, kwargs: Its call arguments, with a symbolic `KerasTensor` for each tensor.
        outputs: The symbolic tensors that it returns, flattened.
    """

    operation: keras.Operation
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[keras.KerasTensor, ...]

    @functools.cached_property
    def flat(self) -> tuple[Any, ...]:
        """The flattened call arguments."""
        return _flatten_arguments(self.args, self.kwargs)

    def packed(self, flat: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments in the structure of this site's, with other leaves."""
        if _has_flat_arguments(self.args, self.kwargs):
            return tuple(flat), {}
        return keras.tree.pack_sequence_as((self.args, self.kwargs), list(flat))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One application of one operation.

    Attributes:
        number: Its position in the order of execution, which is its index in `Graph.calls`.
        name: Path of the operation, such as `"backbone/conv1"` inside a sub-model.
        operation: The layer or `keras.ops` operation.
        site: The place in the model's structure. If a sub-model is used twice, its calls share their sites.
        args, kwargs: Call arguments, with a `TensorRef` in the place of each tensor.
        inputs: Indices of the tensors among the arguments, in flattened order.
        outputs: Indices of the tensors that the call returns, in flattened order.
        closed_reason: Why the layer could not be opened; `None` if nobody tried.
    """

    number: int
    name: str
    operation: keras.Operation
    site: Site
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    closed_reason: str | None = None

    @functools.cached_property
    def flat(self) -> tuple[Any, ...]:
        """The flattened call arguments."""
        return _flatten_arguments(self.args, self.kwargs)

    @functools.cached_property
    def tensor_positions(self) -> list[int]:
        """Where the tensors stand among the flattened call arguments."""
        return [i for i, x in enumerate(self.flat) if isinstance(x, TensorRef)]


@dataclasses.dataclass(frozen=True, eq=False)
class SubmodelGraph:
    """The operations of one functional model, sub-model or opened layer, without those of its sub-models.

    Attributes:
        model: The model or the opened layer.
        inputs, outputs: Nested structures of symbolic tensors, as the model was made with. For an opened
            layer, `inputs` is a flat list.
        input_layers: The `InputLayer` of each flattened input.
        sites: Where operations are applied, in the order of execution.
    """

    model: keras.Layer
    inputs: Tree
    outputs: Tree
    input_layers: tuple[keras.layers.InputLayer, ...]
    sites: tuple[Site, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model as a flat list of calls over numbered tensors.

    Attributes:
        model: The model that was read.
        calls: All calls, those of sub-models included, producers before consumers.
        shapes: Shape of every tensor, batch axis first, `None` where a size is unknown.
        inputs, outputs: Tensor indices, in the model's flattened order.
        root: The operations of the model itself.
        submodels: What is applied at a site, for the sites of sub-models and of opened layers.
        bindings: The tensors that each symbolic input of a model, sub-model or opened layer stands for, one
            for each of its applications.
    """

    model: keras.Layer
    calls: list[Call]
    shapes: list[Shape]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    root: SubmodelGraph
    submodels: Mapping[Site, SubmodelGraph]
    bindings: Mapping[keras.KerasTensor, list[int]]

    def is_used_once(self, operation: keras.Operation) -> bool:
        """Whether an operation has exactly one call."""
        return self._num_calls[operation] == 1

    @functools.cached_property
    def needed_calls(self) -> list[Call]:
        """The calls on which an output depends. Others make masks for sub-models, which make their own."""
        tensors, needed = set(self.outputs), []
        for call in reversed(self.calls):
            if not tensors.isdisjoint(call.outputs):
                tensors.update(call.inputs)
                needed.append(call)
        return needed[::-1]

    @functools.cached_property
    def _num_calls(self) -> collections.Counter[keras.Operation]:
        return collections.Counter(call.operation for call in self.calls)

    def layers(self) -> list[tuple[str, keras.Layer]]:
        """Names and layers that have a call, each layer once."""
        names: dict[keras.Layer, str] = {}
        for call in self.calls:
            if isinstance(call.operation, keras.Layer):
                names.setdefault(call.operation, call.name)
        return [(name, layer) for layer, name in names.items()]


def read_model(model: keras.Model) -> Graph:
    """Reads a built model. Sub-models are inlined, composite layers are opened.

    Args:
        model: A built `keras.Model`. If it is subclassed, its `tracing.functional_view` is read.

    Raises:
        UnsupportedModelError: if the model is neither Sequential nor Functional, and cannot be opened; if
            its layers are quantized, have LoRA weights, or share single weights.
        ValueError: if the model is not built.
    """
    model = functional_view(model)
    graph = _open_and_inline(_read_submodel(model, model.name))
    _check_plain_weights(graph)
    return graph


def read_layer(layer: keras.Layer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Graph:
    """Reads what a layer does with arguments that hold symbolic tensors, as `read` reads a model.

    Raises:
        LayerStaysClosed: if that cannot be seen; the message says why.
    """
    return _open_and_inline(_submodel_graph(layer, trace_layer(layer, args, kwargs)))


def single_layer_graph(layer: keras.Layer, name: str, input_shape: Shape, output_shape: Shape) -> Graph:
    """The graph of one layer alone, which reads tensor 0 and makes tensor 1."""
    site = Site(layer, (), {}, ())
    call = Call(0, name, layer, site, (TensorRef(0),), {}, inputs=(0,), outputs=(1,))
    root = SubmodelGraph(layer, [], [], (), (site,))
    return Graph(layer, [call], [input_shape, output_shape], (0,), (1,), root, {}, {})


def _check_plain_weights(graph: Graph) -> None:
    """Refuses weights that are quantized, that have LoRA weights beside them, or that two layers share."""
    owners: IdentityMap[keras.Variable, str] = IdentityMap()
    for name, layer in graph.layers():
        mode = getattr(layer, "quantization_mode", None)
        if mode:
            raise UnsupportedModelError(
                f"Layer '{name}' is quantized. Prune the model as it was before, and quantize the "
                f"smaller one. Received: {name}={layer!r} with quantization_mode={mode!r}"
            )
        if getattr(layer, "lora_enabled", False):
            raise UnsupportedModelError(
                f"Layer '{name}' has LoRA weights. Merge them first: `save_weights` writes the merged "
                f"ones; load these into a model without LoRA. Received: {name}={layer!r} with "
                "lora_enabled=True"
            )
        for weight in layer.weights:
            other = owners.setdefault(weight, name)
            if other != name:
                raise UnsupportedModelError(
                    f"Layers '{other}' and '{name}' share the weight '{weight.name}', and the smaller model "
                    "would have two of it. Use one layer at both places (`ReversibleEmbedding` reads its "
                    f"weight in both directions). Received: {name}={layer!r}"
                )


def _open_and_inline(root: SubmodelGraph) -> Graph:
    """The graph of a model or opened layer: first the layers inside are opened, then all is inlined."""
    openings = _Openings()
    if is_functional(root.model):
        openings.find_masks(_function_of(root.model, root.model.name))
    openings.visit(root)
    return _Inliner(openings, root).graph


class _Appearance(NamedTuple):
    """Equal for layers of one class that are configured, built and called alike."""

    layer_class: type[keras.Layer]
    description: str


def _appearance_of(layer: keras.Layer, site: Site) -> _Appearance | None:
    """What a layer is, seen from outside at one site; `None` if it holds more than plain values."""
    arguments = [
        [x.shape, x.dtype] if isinstance(x, keras.KerasTensor) else x for x in (*site.flat, list(site.kwargs))
    ]
    inside = [[type(each).__name__, each.name] for each in layers_inside(layer)]
    weights = [[weight.name, weight.shape] for weight in layer.weights]
    others = [getattr(layer, "quantization_mode", None), layer.activity_regularizer]
    try:
        config = {key: value for key, value in layer.get_config().items() if key != "name"}
        return _Appearance(
            type(layer), json.dumps([config, arguments, inside, weights, others], sort_keys=True)
        )
    except Exception:  # a user's `get_config` may raise anything
        return None


class _Openings:
    """Finds the sub-models in a model, and opens layers.

    A layer is opened if it does the same at all of its calls. Otherwise no single sub-model could take its
    place, and it stays closed everywhere.
    """

    def __init__(self) -> None:
        self._visited: set[SubmodelGraph] = set()
        self._models: dict[keras.Model, SubmodelGraph] = {}
        self._submodels: dict[Site, SubmodelGraph] = {}
        self._reasons: dict[Site, str] = {}  # why layers could not be opened
        self._sites: dict[keras.Layer, list[Site]] = {}  # sites with different arguments, already opened
        self._first_sequences: dict[keras.Layer, tuple[CallSequence, SubmodelGraph]] = {}
        self._closed: dict[_Appearance, str] = {}  # why layers could not be opened, for others like them
        self._changing: set[keras.Layer] = set()  # layers that do other things at one call than at another
        self._masked: set[keras.Layer] = set()  # layers that masks may reach

    def find_masks(self, function: keras.Function) -> None:
        """Finds the layers of a model that get tensors with masks, with all that is inside of them.

        Masks travel on tensors beside the arguments, and from a model into its sub-models. If a layer hides
        that it makes some, any tensor may have one.
        """
        nodes = [n for n in nodes_in_order(function) if isinstance(n.operation, keras.Layer)]
        masked = [n for n in nodes if any(mask_of_tensor(x) is not None for x in n.arguments.keras_tensors)]
        if any(_hides_mask(n.operation) for n in nodes) or any(_has_own_insides(n.operation) for n in masked):
            masked = nodes
        for node in masked:
            self._masked.update((node.operation, *layers_inside(node.operation)))

    def visit(self, submodel: SubmodelGraph, prefix: str = "") -> None:
        """Opens everything inside a model or opened layer."""
        self._visited.add(submodel)
        for site in submodel.sites:
            name = prefix + _local_name(submodel, site.operation)
            self._open(site, name)
            inner = self.submodel_at(site)
            if inner is not None and inner not in self._visited:
                self.visit(inner, name + "/")

    def submodel_at(self, site: Site) -> SubmodelGraph | None:
        """The sub-model or opened layer at a visited site; `None` for a single operation."""
        return None if site.operation in self._changing else self._submodels.get(site)

    def reason_at(self, site: Site) -> str | None:
        """Why the layer at a visited site stays closed; `None` if nobody tried to open it."""
        if site.operation in self._changing:
            return "it is called in several ways"
        return self._reasons.get(site)

    def _open(self, site: Site, name: str) -> None:
        operation = site.operation
        if operation in self._masked and is_openable(operation) and _may_use_masks(operation):
            self._reasons[site] = (
                "a mask reaches it that is no argument (`attention_mask=` instead of `mask_zero` opens it)"
            )
        elif isinstance(operation, keras.Model) and is_functional(operation):
            if operation not in self._models:
                self._models[operation] = _read_submodel(operation, name)
            self._submodels[site] = self._models[operation]
        elif is_openable(operation) and operation not in self._changing:
            known = self._sites.setdefault(operation, [])
            alike = next((other for other in known if _is_called_alike(site, other)), None)
            if alike is None:
                known.append(site)
                self._open_layer(operation, site)
            elif alike in self._submodels:
                self._submodels[site] = self._submodels[alike]
            else:
                self._reasons[site] = self._reasons[alike]

    def _open_layer(self, layer: keras.Layer, site: Site) -> None:
        is_new_class = all(one.layer_class is not type(layer) for one in self._closed)
        appearance = None if is_new_class else _appearance_of(layer, site)
        if appearance is not None and appearance in self._closed:
            self._reasons[site] = self._closed[appearance]
            return
        try:
            function = trace_layer(layer, site.args, site.kwargs)
        except LayerStaysClosed as reason:
            self._reasons[site] = str(reason)
            appearance = appearance or _appearance_of(layer, site)
            if appearance is not None:
                self._closed[appearance] = str(reason)
            return
        sequence = call_sequence(function)
        if layer not in self._first_sequences:
            self._first_sequences[layer] = sequence, _submodel_graph(layer, function)
        first, self._submodels[site] = self._first_sequences[layer]
        if first != sequence:
            self._changing.add(layer)


class _Inliner:
    """Makes the flat graph of a model whose layers were opened."""

    def __init__(self, openings: _Openings, root: SubmodelGraph) -> None:
        self._openings = openings
        self._calls: list[Call] = []
        self._submodels: dict[Site, SubmodelGraph] = {}
        self._bindings: IdentityMap[keras.KerasTensor, list[int]] = IdentityMap()
        self._shapes: list[Shape] = [tuple(t.shape) for t in keras.tree.flatten(root.inputs)]
        inputs = tuple(range(len(self._shapes)))
        outputs = self._inline(root, inputs, prefix="")
        self.graph = Graph(
            model=root.model,
            calls=self._calls,
            shapes=self._shapes,
            inputs=inputs,
            outputs=outputs,
            root=root,
            submodels=self._submodels,
            bindings=self._bindings,
        )

    def _inline(self, submodel: SubmodelGraph, inputs: tuple[int, ...], prefix: str) -> tuple[int, ...]:
        """Appends the calls of one application of a (sub-)model; returns its outputs."""
        tensors: IdentityMap[keras.KerasTensor, int] = IdentityMap(
            zip(keras.tree.flatten(submodel.inputs), inputs, strict=True)
        )
        for placeholder, index in tensors.items():
            self._bindings.setdefault(placeholder, []).append(index)
        for site in submodel.sites:
            name = prefix + _local_name(submodel, site.operation)
            args, kwargs = site.packed(
                TensorRef(tensors[x]) if isinstance(x, keras.KerasTensor) else x for x in site.flat
            )
            inner = self._openings.submodel_at(site)
            if inner is None:
                outputs = self._append_call(name, site, args, kwargs)
            else:
                self._submodels[site] = inner
                if is_functional(inner.model) and args:  # it computes its masks itself
                    args, kwargs = args[:1], {}
                outputs = self._inline(inner, _tensor_indices(args, kwargs), name + "/")
            tensors.update(zip(site.outputs, outputs, strict=True))
        return tuple(tensors[t] for t in keras.tree.flatten(submodel.outputs))

    def _append_call(
        self, name: str, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, ...]:
        """Appends one call; returns the indices of its outputs."""
        inputs = _tensor_indices(args, kwargs)
        outputs = tuple(range(len(self._shapes), len(self._shapes) + len(site.outputs)))
        self._shapes.extend(self._output_shapes(site, args, kwargs, inputs))
        call = Call(
            number=len(self._calls),
            name=name,
            operation=site.operation,
            site=site,
            args=args,
            kwargs=kwargs,
            inputs=inputs,
            outputs=outputs,
            closed_reason=self._openings.reason_at(site),
        )
        self._calls.append(call)
        return outputs

    def _output_shapes(
        self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: tuple[int, ...]
    ) -> list[Shape]:
        """Recorded shapes, inferred again where a sub-model gets other shapes than it was made with."""
        recorded = [tuple(t.shape) for t in site.flat if isinstance(t, keras.KerasTensor)]
        shapes = [self._shapes[i] for i in inputs]
        # A reshape in an opened layer may know more by now than when it was recorded.
        is_settled = not hasattr(site.operation, "newshape")
        if is_settled and recorded == shapes:
            return _einsum_sizes(site.operation, recorded, [tuple(t.shape) for t in site.outputs])
        args, kwargs = keras.tree.map_structure(
            lambda new, old: (
                keras.KerasTensor(self._shapes[new.index], dtype=old.dtype)
                if isinstance(new, TensorRef)
                else new
            ),
            (args, kwargs),
            (site.args, site.kwargs),
        )
        spec = site.operation.compute_output_spec(*args, **kwargs)
        return _einsum_sizes(site.operation, shapes, [tuple(t.shape) for t in keras.tree.flatten(spec)])


def _hides_mask(layer: keras.Layer) -> bool:
    """Whether a layer attaches a mask to its output that is not known before it runs."""

    def makes_mask(each: keras.Layer) -> bool:
        return isinstance(each, keras.layers.Masking) or getattr(each, "mask_zero", False)

    is_known = "reverse" not in inspect.signature(layer.call).parameters  # a `ReversibleEmbedding` hides it
    return any(map(makes_mask, layers_inside(layer))) or (makes_mask(layer) and not is_known)


def _has_own_insides(layer: keras.Layer) -> bool:
    """Whether a layer is a sub-model or the user's own: what becomes of its masks is seen when it runs."""
    return is_functional(layer) or (is_openable(layer) and not is_attention(layer))


def _may_use_masks(layer: keras.Layer) -> bool:
    """Whether a layer may compute with a mask that its input carries, or hand it on."""
    return any(
        each.supports_masking or any("mask" in name for name in inspect.signature(each.call).parameters)
        for each in (layer, *layers_inside(layer))
        if is_openable(each)
    )


def _is_called_alike(first: Site, second: Site) -> bool:
    """Whether the arguments of two sites are the same; symbolic tensors need the same shape and dtype."""

    def is_alike(one: Any, other: Any) -> bool:
        if isinstance(one, keras.KerasTensor) and isinstance(other, keras.KerasTensor):
            return tuple(one.shape) == tuple(other.shape) and one.dtype == other.dtype
        if isinstance(one, (int, float, str, bool, type(None))):
            return type(one) is type(other) and repr(one) == repr(other)
        return one is other

    return len(first.flat) == len(second.flat) and all(map(is_alike, first.flat, second.flat))


def _einsum_sizes(operation: keras.Operation, inputs: list[Shape], outputs: list[Shape]) -> list[Shape]:
    """Output shapes, with the sizes that `EinsumDense` leaves open although its input has them."""
    if type(operation) is not keras.layers.EinsumDense:
        return outputs
    read, made = operation.equation.partition(",")[0], operation.equation.partition("->")[2]
    if "..." in read or len(read) != len(inputs[0]):
        return outputs
    sizes = dict(zip(read, inputs[0], strict=True))
    return [tuple(sizes.get(c) if d is None else d for c, d in zip(made, outputs[0], strict=True))]


def _tensor_indices(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(x.index for x in _flatten_arguments(args, kwargs) if isinstance(x, TensorRef))


def _flatten_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(args if _has_flat_arguments(args, kwargs) else keras.tree.flatten((args, kwargs)))


def _has_flat_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether there is nothing to flatten, as in most calls: `keras.tree` is slow on PyTorch."""
    return not kwargs and not any(map(keras.tree.is_nested, args))


def _read_submodel(model: keras.Model, name: str) -> SubmodelGraph:
    return _submodel_graph(model, _function_of(model, name))


def _submodel_graph(model: keras.Layer, function: keras.Function) -> SubmodelGraph:
    """The graph of a model or layer, given the function that it computes."""
    inputs = input_structure(function)
    return SubmodelGraph(
        model=model,
        inputs=inputs,
        outputs=output_structure(function),
        input_layers=tuple(map(producer, keras.tree.flatten(inputs))),
        sites=tuple(
            Site(node.operation, _with_whole_indices(node), node.arguments.kwargs, tuple(node.outputs))
            for node in nodes_in_order(function)
        ),
    )


def _with_whole_indices(node: Node) -> tuple[Any, ...]:
    """Positional arguments of a recorded call, indices of `take` as an array: a list would be flattened."""
    args: tuple[Any, ...] = node.arguments.args
    if type(node.operation).__name__ == "Take" and isinstance(args[1], (list, tuple)):
        return args[0], np.asarray(args[1])
    return args


def _function_of(model: keras.Model, name: str) -> keras.Function:
    """The `keras.Function` behind a model: the model itself, or the one that a Sequential builds."""
    if isinstance(model, keras.Sequential):
        function = sequential_function(model) if model.built else None
        if function is None:
            raise ValueError(
                f"Model '{name}' is not built: its weights do not exist yet. Give it a "
                "`keras.Input` as its first layer, or call it once on a batch of data. "
                f"Received: model={model!r}"
            )
        return function
    if is_functional(model):
        return model
    raise UnsupportedModelError(
        f"Expected a Sequential or Functional model. Received: {name}={model!r} of class "
        f"`{type(model).__name__}`"
    )


def _local_name(submodel: SubmodelGraph, operation: keras.Operation) -> str:
    """The operation's own name, in attention layers without the counter that Keras appends to some."""
    name: str = operation.name
    return re.sub(r"_\d+$", "", name) if is_attention(submodel.model) else name
