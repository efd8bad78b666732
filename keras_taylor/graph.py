"""Reads any Keras model into one flat list of operations."""

import dataclasses
import functools
import itertools
from typing import Any

import keras


class UnsupportedModelError(ValueError):
    """A model that cannot be read, with the layer's name and the way out."""


@dataclasses.dataclass(frozen=True)
class Ref:
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
        args, kwargs: Call arguments, with a `Ref` in the place of each tensor.
        inputs: Indices of the tensors among the arguments, in flattened order.
        outputs: Indices of the tensors that come out, in flattened order.
    """

    name: str
    operation: Any
    site: "Site"
    args: tuple
    kwargs: dict
    inputs: tuple
    outputs: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One place of a (sub-)model where an operation is applied.

    `args` and `kwargs` hold symbolic `KerasTensor`s, `outputs` is their flat list.
    """

    operation: Any
    args: tuple
    kwargs: dict
    outputs: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """The nodes of one functional (sub-)model, not looking into sub-models."""

    model: Any
    inputs: Any  # structure of KerasTensors, as the model was made with
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
        structures: `Structure` of the model and of every sub-model, by `id`.
        bindings: For each input of a sub-model (by `id` of its `KerasTensor`) the
            tensors that it stands for, one a call of the sub-model.
    """

    model: Any
    calls: list
    shapes: list
    inputs: tuple
    outputs: tuple
    structures: dict
    bindings: dict

    def is_used_once(self, operation):
        """Whether an operation has one call."""
        return sum(call.operation is operation for call in self.calls) == 1

    def layers(self):
        """Names and layers that have a call, each layer once."""
        seen = {}
        for call in self.calls:
            if isinstance(call.operation, keras.Layer):
                seen.setdefault(id(call.operation), (call.name, call.operation))
        return list(seen.values())


def read(model):
    """Reads a built Sequential or Functional model, sub-models inlined.

    Args:
        model: A built `keras.Model`.

    Returns:
        A `Graph`.

    Raises:
        UnsupportedModelError: if the model, or a model used as a layer in it, is
            neither Sequential nor Functional.
        ValueError: if the model is not built.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a `keras.Model`. Received: model={model!r} (of type {type(model).__name__})"
        )
    reader = _Reader()
    structure = reader.structure(model, model.name)
    shapes = [tuple(t.shape) for t in keras.tree.flatten(structure.inputs)]
    reader.shapes.extend(shapes)
    inputs = tuple(range(len(shapes)))
    outputs = reader.inline(structure, inputs, prefix="")
    return Graph(model, reader.calls, reader.shapes, inputs, outputs, reader.structures, reader.bindings)


def tensor_positions(call):
    """Where tensors stand among a call's flattened arguments."""
    flat = keras.tree.flatten((call.args, call.kwargs))
    return [i for i, x in enumerate(flat) if isinstance(x, Ref)]


def is_container(operation):
    """Whether this operation is a model made of other operations."""
    return isinstance(operation, keras.Model)


def num_inbound_nodes(layer):
    """How often a layer was called symbolically (a law counts it before and after)."""
    return len(layer._inbound_nodes)


class _Reader:
    def __init__(self):
        self.calls = []
        self.shapes = []
        self.structures = {}
        self.bindings = {}

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
            operation, name = site.operation, prefix + site.operation.name
            args, kwargs = keras.tree.map_structure(
                lambda x: Ref(tensors[id(x)]) if isinstance(x, keras.KerasTensor) else x,
                (site.args, site.kwargs),
            )
            taken = _taken(args, kwargs)
            if is_container(operation):
                inner = self.structure(operation, name)
                outputs = self.inline(inner, taken, name + "/")
            else:
                outputs = self._append(name, site, args, kwargs, taken)
            tensors.update(zip(map(id, site.outputs), outputs, strict=True))
        return tuple(tensors[id(t)] for t in keras.tree.flatten(structure.outputs))

    def _append(self, name, site, args, kwargs, taken):
        outputs = tuple(range(len(self.shapes), len(self.shapes) + len(site.outputs)))
        self.shapes.extend(self._output_shapes(site, args, kwargs, taken))
        self.calls.append(Call(name, site.operation, site, args, kwargs, taken, outputs))
        return outputs

    def _output_shapes(self, site, args, kwargs, taken):
        """Recorded shapes, inferred anew where a sub-model is fed other shapes than it was made with."""
        recorded = [
            tuple(t.shape)
            for t in keras.tree.flatten((site.args, site.kwargs))
            if isinstance(t, keras.KerasTensor)
        ]
        if recorded == [self.shapes[i] for i in taken]:
            return _completed(site.operation, recorded, [tuple(t.shape) for t in site.outputs])
        args, kwargs = keras.tree.map_structure(
            lambda new, old: (
                keras.KerasTensor(self.shapes[new.index], dtype=old.dtype) if isinstance(new, Ref) else new
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
    return tuple(x.index for x in keras.tree.flatten((args, kwargs)) if isinstance(x, Ref))


def _read_structure(model, name):
    function = _function_of(model, name)
    inputs, outputs = function._inputs_struct, function._outputs_struct
    input_layers = tuple(t._keras_history.operation for t in keras.tree.flatten(inputs))
    return Structure(model, inputs, outputs, input_layers, tuple(_sites(function)))


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
    if isinstance(model, keras.Function) and type(model).call is functional_class().call:
        return model
    raise UnsupportedModelError(
        f"Model '{name}' is a subclassed model (class `{type(model).__name__}`), whose layers "
        "can only be seen by running it. Expected a Sequential or Functional model. Build it "
        "with the functional API: `x = keras.Input(shape); keras.Model(x, <the layers called "
        f"on x>)`. Received: {name}={model!r}"
    )


@functools.cache
def functional_class():
    """The class that `keras.Model(inputs, outputs)` makes; it has no public name."""
    inputs = keras.Input((1,))
    return type(keras.Model(inputs, inputs))


def _sites(function):
    """A function's nodes in the order of execution.

    Keras has no public way to ask for them; its private node records are read
    here and nowhere else.
    """
    by_depth = function._nodes_by_depth
    nodes = itertools.chain.from_iterable(by_depth[depth] for depth in sorted(by_depth, reverse=True))
    for node in nodes:
        if not node.is_input:
            arguments = node.arguments
            yield Site(node.operation, arguments.args, arguments.kwargs, tuple(node.outputs))
