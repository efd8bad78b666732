"""Reads any Keras model into one flat list of operations."""

import collections
import dataclasses
import functools
import re
from typing import Any

import keras

from keras_taylor.reading.tracing import (
    Closed,
    UnsupportedModelError,
    functional_view,
    is_functional,
    may_open,
    nodes,
    opened,
    record,
)
from keras_taylor.rules.attention import is_attention


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """Stands for a tensor in a call's arguments."""

    index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One application of one operation, in the order of execution.

    Attributes:
        name: Path of the operation, `"backbone/conv1"` inside a sub-model.
        operation: The `keras.Operation` (a layer or a `keras.ops` operation).
        site: The place in the model's structure; calls of a sub-model that is
            used twice share their sites.
        args, kwargs: Call arguments, with a `TensorRef` in the place of each tensor.
        inputs: Indices of the tensors among the arguments, in flattened order.
        outputs: Indices of the tensors that come out, in flattened order.
        closed: Why a layer could not be opened, `None` where nobody tried.
    """

    name: str
    operation: Any
    site: "Site"
    args: tuple
    kwargs: dict
    inputs: tuple
    outputs: tuple
    closed: str | None = None

    @functools.cached_property
    def flat(self):
        """The flattened call arguments, a tuple."""
        return _flattened(self.args, self.kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One place of a (sub-)model where an operation is applied.

    `args` and `kwargs` hold symbolic `KerasTensor`s, `outputs` is their flat list.
    """

    operation: Any
    args: tuple
    kwargs: dict
    outputs: tuple

    @functools.cached_property
    def flat(self):
        """The flattened call arguments, a tuple."""
        return _flattened(self.args, self.kwargs)

    def packed(self, flat):
        """Positional and keyword arguments like these, with other leaves."""
        if _is_plain(self.args, self.kwargs):
            return tuple(flat), {}
        return keras.tree.pack_sequence_as((self.args, self.kwargs), list(flat))


@dataclasses.dataclass(frozen=True, eq=False)
class SubmodelGraph:
    """The nodes of one functional (sub-)model or opened layer, not looking into those inside."""

    model: Any
    inputs: Any  # structure of KerasTensors, as the model was made with; of an opened layer a flat list
    outputs: Any
    input_layers: tuple
    sites: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model as a flat list of calls over numbered tensors.

    Attributes:
        model: The model that was read.
        calls: List of `Call`, sub-models inlined, producers before consumers.
        shapes: Shape of every tensor, batch axis first, `None` where unknown.
        inputs, outputs: Tensor indices, in the model's flattened order.
        structures: `SubmodelGraph` of the model and of every functional sub-model, by `id`.
        inside: `SubmodelGraph` of what is applied at a site, by the site's `id`, for sub-models and opened
            layers.
        bindings: For each input of a sub-model (by `id` of its `KerasTensor`) the
            tensors that it stands for, one a call of the sub-model.
    """

    model: Any
    calls: list
    shapes: list
    inputs: tuple
    outputs: tuple
    structures: dict
    inside: dict
    bindings: dict

    @property
    def root(self):
        """The `SubmodelGraph` of the model itself."""
        return self.structures[id(self.model)]

    def is_used_once(self, operation):
        """Whether an operation has one call."""
        return self._num_calls[id(operation)] == 1

    @functools.cached_property
    def _num_calls(self):
        return collections.Counter(id(call.operation) for call in self.calls)

    def layers(self):
        """Names and layers that have a call, each layer once."""
        seen = {}
        for call in self.calls:
            if isinstance(call.operation, keras.Layer):
                seen.setdefault(id(call.operation), (call.name, call.operation))
        return list(seen.values())


def read(model):
    """Reads a built model, sub-models inlined, composite layers opened.

    Args:
        model: A built `keras.Model`; of a subclassed one its `tracing.functional_view` is read.

    Returns:
        A `Graph`.

    Raises:
        UnsupportedModelError: if the model is neither Sequential nor Functional, and cannot be opened; if
            its layers are quantized, have LoRA weights, or share single weights.
        ValueError: if the model is not built.
    """
    model = functional_view(model)
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a `keras.Model`. Received: model={model!r} (of type {type(model).__name__})"
        )
    graph = _read(_read_structure(model, model.name))
    _refuse_other_forms(graph)
    return graph


def read_inside(layer, args, kwargs):
    """Reads what a layer does with arguments that hold symbolic tensors, as `read` does a model.

    Raises:
        Closed: if that cannot be seen; the message says why.
    """
    return _read(_structure_of(layer, opened(layer, args, kwargs)))


def _refuse_other_forms(graph):
    """Refuses weights that are not plain: quantized, with low-rank changes, in two layers at once."""
    owners = {}
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
            other = owners.setdefault(id(weight), name)
            if other != name:
                raise UnsupportedModelError(
                    f"Layers '{other}' and '{name}' share the weight '{weight.name}', and the smaller model "
                    "would have two of it. Use one layer at both places (`ReversibleEmbedding` reads its "
                    f"weight in both directions). Received: {name}={layer!r}"
                )


def _read(structure):
    several_ways = set()
    while True:
        try:
            return _read_once(structure, several_ways)
        except _SeveralWays as error:
            several_ways.add(id(error.layer))


def _read_once(structure, several_ways):
    model, reader = structure.model, _Reader(several_ways)
    reader.structures[id(model)] = structure
    shapes = [tuple(t.shape) for t in keras.tree.flatten(structure.inputs)]
    reader.shapes.extend(shapes)
    inputs = tuple(range(len(shapes)))
    outputs = reader.inline(structure, inputs, prefix="")
    return Graph(
        *(model, reader.calls, reader.shapes, inputs, outputs),
        *(reader.structures, reader.inside, reader.bindings),
    )


def tensor_positions(call):
    """Where tensors stand among a call's flattened arguments."""
    return [i for i, x in enumerate(call.flat) if isinstance(x, TensorRef)]


def num_inbound_nodes(layer):
    """How often a layer was called symbolically (a law counts it before and after)."""
    return len(layer._inbound_nodes)


class _SeveralWays(Exception):
    """A layer does other things at one call than at another: no one sub-model stands for it."""

    def __init__(self, layer):
        super().__init__(layer.name)
        self.layer = layer


class _Reader:
    def __init__(self, several_ways):
        self.calls = []
        self.shapes = []
        self.structures = {}
        self.inside = {}
        self.bindings = {}
        self._several_ways = several_ways  # ids of layers
        self._opened, self._ways = {}, {}

    def structure(self, model, name):
        if id(model) not in self.structures:
            self.structures[id(model)] = _read_structure(model, name)
        return self.structures[id(model)]

    def inline(self, structure, inputs, prefix):
        """Appends the calls of one application of a (sub-)model; returns its outputs."""
        placeholders = keras.tree.flatten(structure.inputs)
        tensors = {id(t): i for t, i in zip(placeholders, inputs, strict=True)}
        for placeholder, index in tensors.items():
            self.bindings.setdefault(placeholder, []).append(index)
        for site in structure.sites:
            name = prefix + _local_name(structure, site.operation)
            args, kwargs = site.packed(
                TensorRef(tensors[id(x)]) if isinstance(x, keras.KerasTensor) else x for x in site.flat
            )
            inner, closed = self._inside(site, name)
            if inner is None:
                outputs = self._append(name, site, args, kwargs, closed)
            else:
                self.inside[id(site)] = inner
                # a sub-model makes its masks itself
                taken = _taken(args[:1], {}) if is_functional(inner.model) and args else _taken(args, kwargs)
                outputs = self.inline(inner, taken, name + "/")
            tensors.update(zip(map(id, site.outputs), outputs, strict=True))
        return tuple(tensors[id(t)] for t in keras.tree.flatten(structure.outputs))

    def _inside(self, site, name):
        """The structure of what is applied at a site; `None` for a single operation; why it stays one."""
        operation = site.operation
        if isinstance(operation, keras.Model) and is_functional(operation):
            return self.structure(operation, name), None
        if not may_open(operation):
            return None, None
        if id(operation) in self._several_ways:
            return None, "it is called in several ways"
        key = (id(operation), *map(_signature, site.flat))
        if key not in self._opened:
            self._opened[key] = self._open(operation, site)
        return self._opened[key]

    def _open(self, operation, site):
        try:
            function = opened(operation, site.args, site.kwargs)
        except Closed as reason:
            return None, str(reason)
        way = record(function)
        first, structure = self._ways.setdefault(id(operation), (way, _structure_of(operation, function)))
        if first != way:
            raise _SeveralWays(operation)
        return structure, None

    def _append(self, name, site, args, kwargs, closed):
        taken = _taken(args, kwargs)
        outputs = tuple(range(len(self.shapes), len(self.shapes) + len(site.outputs)))
        self.shapes.extend(self._output_shapes(site, args, kwargs, taken))
        self.calls.append(Call(name, site.operation, site, args, kwargs, taken, outputs, closed))
        return outputs

    def _output_shapes(self, site, args, kwargs, taken):
        """Recorded shapes, inferred anew where a sub-model is fed other shapes than it was made with."""
        recorded = [tuple(t.shape) for t in site.flat if isinstance(t, keras.KerasTensor)]
        # a reshape in an opened layer may know more by now
        is_settled = not hasattr(site.operation, "newshape")
        if is_settled and recorded == [self.shapes[i] for i in taken]:
            return _completed(site.operation, recorded, [tuple(t.shape) for t in site.outputs])
        args, kwargs = keras.tree.map_structure(
            lambda new, old: (
                keras.KerasTensor(self.shapes[new.index], dtype=old.dtype)
                if isinstance(new, TensorRef)
                else new
            ),
            (args, kwargs),
            (site.args, site.kwargs),
        )
        spec = site.operation.compute_output_spec(*args, **kwargs)
        shapes = [self.shapes[i] for i in taken]
        return _completed(site.operation, shapes, [tuple(t.shape) for t in keras.tree.flatten(spec)])


def _completed(operation, inputs, outputs):
    """Shapes with the sizes that an `EinsumDense` layer leaves open though its input has them."""
    if type(operation) is not keras.layers.EinsumDense:
        return outputs
    read, made = operation.equation.partition(",")[0], operation.equation.partition("->")[2]
    if "..." in read or len(read) != len(inputs[0]):
        return outputs
    sizes = dict(zip(read, inputs[0], strict=True))
    return [tuple(sizes.get(c) if d is None else d for c, d in zip(made, outputs[0], strict=True))]


def _taken(args, kwargs):
    return tuple(x.index for x in _flattened(args, kwargs) if isinstance(x, TensorRef))


def _flattened(args, kwargs):
    return tuple(args if _is_plain(args, kwargs) else keras.tree.flatten((args, kwargs)))


def _is_plain(args, kwargs):
    """Whether there is nothing to flatten: most calls are so, and `keras.tree` is slow on PyTorch."""
    return not kwargs and not any(map(keras.tree.is_nested, args))


def _read_structure(model, name):
    return _structure_of(model, _function_of(model, name))


def _structure_of(model, function):
    inputs, outputs = function._inputs_struct, function._outputs_struct
    input_layers = tuple(t._keras_history.operation for t in keras.tree.flatten(inputs))
    return SubmodelGraph(model, inputs, outputs, input_layers, tuple(_sites(function)))


def _function_of(model, name):
    """The `keras.Function` behind a model: the model itself, or what a Sequential builds."""
    if isinstance(model, keras.Sequential):
        if not model.built or model._functional is None:
            raise ValueError(
                f"Model '{name}' is not built: its weights do not exist yet. Give it a "
                "`keras.Input` as its first layer, or call it once on a batch of data. "
                f"Received: model={model!r}"
            )
        return model._functional
    if is_functional(model):
        return model
    raise UnsupportedModelError(
        f"Expected a Sequential or Functional model. Received: {name}={model!r} of class "
        f"`{type(model).__name__}`"
    )


def _local_name(structure, operation):
    """Its own name; inside attention, some layers are named by how many there have been in the process."""
    return re.sub(r"_\d+$", "", operation.name) if is_attention(structure.model) else operation.name


def _signature(argument):
    if isinstance(argument, keras.KerasTensor):
        return tuple(argument.shape), argument.dtype
    return repr(argument) if isinstance(argument, (int, float, str, bool, type(None))) else id(argument)


def _sites(function):
    return [
        Site(node.operation, node.arguments.args, node.arguments.kwargs, tuple(node.outputs))
        for node in nodes(function)
    ]
