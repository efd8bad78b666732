"""The smaller model that a plan describes, weights copied (`prune`)."""

import contextlib

import keras
import numpy as np

from keras_taylor import graph as graphs
from keras_taylor.cloning import clone_operation, compile_settings, copy_weights, uninitialized
from keras_taylor.groups import read_channels
from keras_taylor.optimizers import carry_state
from keras_taylor.plan import kept_units, mask_of
from keras_taylor.rules.base import weight_of


def prune(model, plan):
    """Builds the smaller model that a plan describes, without any training.

    Args:
        model: The model that the plan was made for. It is not changed.
        plan: A `Plan`.

    Returns:
        A plain Keras model of the same kind and structure: same layer names,
        trainable flags, regularisers, dtype policies, shared layers and sub-models;
        weights copied. Compiled as `model` is, with an optimizer of its own that goes on
        where that of `model` stands (step count, momentum, moments of what survives);
        not compiled if `model` is not.

    Raises:
        ValueError: if the plan was made for another model.
        UnsupportedModelError: if a layer cannot be made again from its configuration.
    """
    channels = read_channels(model)
    return cut(channels, kept_units(channels, plan))


def cut(channels, kept, compiled_as=None, optimizer=None, carry=True):
    """The model without the units that are not kept, compiled.

    Args:
        channels: `groups.Channels` of the model.
        kept: Bool array `(num_units,)`.
        compiled_as: The model whose compile settings it gets; `None`: the one that is cut.
        optimizer: Whose state the new optimizer takes over; `None`: that of the model
            that is cut.
        carry: Whether it takes it over.
    """
    small, weights = rebuild(channels, kept)
    model = channels.graph.model
    settings = compile_settings(compiled_as or model)
    if settings is not None:
        small.compile(**settings)
        source = optimizer or model.optimizer
        if carry and source is not None and small.optimizer is not None:
            carry_state(source, small.optimizer, small.trainable_variables, weights)
    return small


def whole_copy(model):
    """All of a model, compiled as it is."""
    channels = read_channels(model)
    return cut(channels, np.ones(channels.num_units, bool))


def rebuild(channels, kept):
    """The model without the units that are not kept, not compiled.

    Returns:
        The model, and for each of its weights (by `id`) the weight that it was cut
        from and a tuple with a bool array, or `None`, for each axis.
    """
    surgeon = _Surgeon(channels, kept)
    small = surgeon.model(channels.graph.model)
    weights = surgeon.copy_all_weights()
    surgeon.set_trainable_flags()
    return small, weights


class _Surgeon:
    def __init__(self, channels, kept):
        self._channels, self._kept = channels, kept
        self._structures = channels.graph.structures
        calls = channels.graph.calls
        pairs = list(zip(calls, channels.effects, strict=True))
        self._names = {id(c.operation): c.name for c in calls}
        self._effect_of_operation = {id(c.operation): e for c, e in reversed(pairs)}
        self._effect_of_site = {id(c.site): e for c, e in reversed(pairs)}
        self._made = {}  # id of an operation -> (it, its successor)

    def model(self, model):
        """The successor of a model or sub-model, made once however often it is used."""
        if id(model) not in self._made:
            structure = self._structures[id(model)]
            sequential = isinstance(model, keras.Sequential)
            new = self._sequential(structure) if sequential else self._functional(structure)
            if new.dtype_policy != model.dtype_policy:
                new.dtype_policy = model.dtype_policy
            self._made[id(model)] = (model, new)
        return self._made[id(model)][1]

    def _sequential(self, structure):
        layers = [self._input(structure, 0)] + [self._operation(s.operation) for s in structure.sites]
        with contextlib.ExitStack() as stack:
            for layer in filter(_will_be_built, layers):
                stack.enter_context(uninitialized(layer))
            return keras.Sequential(layers, name=structure.model.name)

    def _functional(self, structure):
        placeholders = keras.tree.flatten(structure.inputs)
        tensors = {id(t): self._input(structure, k).output for k, t in enumerate(placeholders)}
        for site in structure.sites:
            args, kwargs = self._arguments(site, tensors)
            operation = self._operation(site.operation)
            with uninitialized(operation) if _will_be_built(operation) else contextlib.nullcontext():
                outputs = operation(*args, **kwargs)
            tensors.update(zip(map(id, site.outputs), keras.tree.flatten(outputs), strict=True))
        inputs, outputs = keras.tree.map_structure(
            lambda t: tensors[id(t)], (structure.inputs, structure.outputs)
        )
        return type(structure.model)(inputs=inputs, outputs=outputs, name=structure.model.name)

    def _input(self, structure, number):
        layer = structure.input_layers[number]
        placeholder = keras.tree.flatten(structure.inputs)[number]
        index = self._channels.graph.bindings[id(placeholder)][0]
        labels, shape = self._channels.labels[index], list(placeholder.shape)
        for axis, size in enumerate(labels.shape):
            if size > 1:
                shape[axis] = int(self._mask(labels).sum())
        return clone_operation(layer, layer.name, {"batch_shape": tuple(shape)})

    def _operation(self, operation):
        """The successor of a layer, an operation or a sub-model."""
        if graphs.is_container(operation):
            return self.model(operation)
        if id(operation) not in self._made:
            edits = self._effect_of_operation[id(operation)].config
            changes = {key: self._value(edit) for key, edit in edits.items() if self._touched(edit)}
            new = clone_operation(operation, self._names[id(operation)], changes)
            self._made[id(operation)] = (operation, new)
        return self._made[id(operation)][1]

    def _arguments(self, site, tensors):
        effect = self._effect_of_site.get(id(site))
        flat = [
            tensors[id(x)] if isinstance(x, keras.KerasTensor) else x
            for x in keras.tree.flatten((site.args, site.kwargs))
        ]
        for position, edit in (effect.arguments if effect else {}).items():
            if self._touched(edit):
                flat[position] = self._value(edit)
        return keras.tree.pack_sequence_as((site.args, site.kwargs), flat)

    def _mask(self, labels):
        return mask_of(self._channels, labels, self._kept)

    def _touched(self, edit):
        return not all(self._mask(labels).all() for labels in edit.labels)

    def _value(self, edit):
        return edit.value(*[self._mask(labels) for labels in edit.labels])

    def copy_all_weights(self):
        weights = {}
        for old, new in self._made.values():
            if isinstance(old, keras.Layer) and not graphs.is_container(old):
                axes_of = self._effect_of_operation[id(old)].weights
                masks = {
                    id(weight): tuple(None if a is None else self._mask(a) for a in axes)
                    for name, axes in axes_of.items()
                    if (weight := weight_of(old, name)) is not None
                }
                copy_weights(old, new, masks)
                pairs = zip(old.weights, new.weights, strict=True)
                weights.update({id(after): (before, masks.get(id(before), ())) for before, after in pairs})
        return weights

    def set_trainable_flags(self):
        """Containers first: setting one's flag sets those of all its layers."""
        pairs = [(o, n) for o, n in self._made.values() if isinstance(o, keras.Layer)]
        containers = [(o, n) for o, n in pairs if graphs.is_container(o)]
        for old, new in containers[::-1] + [p for p in pairs if p not in containers]:
            if new.trainable != old.trainable:
                new.trainable = old.trainable


def _will_be_built(operation):
    return isinstance(operation, keras.Layer) and not operation.built
