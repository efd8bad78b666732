"""The smaller model that a plan describes, weights copied (`prune`)."""

import contextlib

import keras
import numpy as np

from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.cloning import (
    clone_operation,
    compile_settings,
    copy_weights,
    initialized_with,
    uninitialized,
)
from keras_taylor.reading.configurations import warn_of_file
from keras_taylor.reading.groups import label_model
from keras_taylor.reading.tracing import functional_class, is_functional, recursing
from keras_taylor.rules.attention import head_counts, inner_layers, is_attention
from keras_taylor.rules.base import weight_of
from keras_taylor.support.optimizers import carry_state
from keras_taylor.support.replicas import check_layout, strategy_scope


def prune(model, plan):
    """Builds the smaller model that a plan describes, without any training.

    Args:
        model: The model that the plan was made for. It is not changed.
        plan: A `Plan`.

    Returns:
        A plain Keras model of the same kind and structure: same layer names,
        trainable flags, regularizers, dtype policies, shared layers and sub-models;
        weights copied. Compiled as `model` is, with an optimizer of its own that goes on
        where that of `model` stands (step count, momentum, moments of what survives);
        not compiled if `model` is not.

    Raises:
        ValueError: if the plan was made for another model.
        UnsupportedModelError: if a layer cannot be made again from its configuration.
    """
    with strategy_scope(model):
        labeled = label_model(model, exact=plan.exact)
        return cut(labeled, kept_units(labeled, plan))


def cut(labeled, kept, compiled_as=None, optimizer=None, carry=True):
    """The model without the units that are not kept, compiled.

    Args:
        channels: `groups.LabeledModel` of the model.
        kept: Bool array `(num_units,)`.
        compiled_as: The model whose compile settings it gets; `None`: the one that is cut.
        optimizer: Whose state the new optimizer takes over; `None`: that of the model
            that is cut.
        carry: Whether it takes it over.
    """
    small, weights = rebuild(labeled, kept)
    model = labeled.graph.model
    settings = compile_settings(compiled_as or model)
    if settings is not None:
        small.compile(**settings)
        source = optimizer or model.optimizer
        if carry and source is not None and small.optimizer is not None:
            carry_state(source, small.optimizer, small.trainable_variables, weights)
    return small


def whole_copy(model):
    """All of a model, compiled as it is."""
    labeled = label_model(model)
    return cut(labeled, np.ones(labeled.num_units, bool))


def rebuild(labeled, kept):
    """The model without the units that are not kept, not compiled.

    Returns:
        The model, and for each of its weights (by `id`) the weight that it was cut
        from and a tuple with a bool array, or `None`, for each axis.
    """
    surgeon = _Surgeon(labeled, kept)
    surgeon.check_layouts()
    small = surgeon.container(labeled.graph.root)
    weights = surgeon.copy_all_weights()
    surgeon.set_trainable_flags()
    return small, weights


class _Surgeon:
    def __init__(self, labeled, kept):
        self._labeled, self._stays = labeled, np.append(kept, True)  # unit -1 is what stays
        self._inside = labeled.graph.inside
        calls = labeled.graph.calls
        pairs = list(zip(calls, labeled.effects, strict=True))
        self._names = {id(c.operation): c.name for c in calls}
        self._effect_of_operation = {id(c.operation): e for c, e in reversed(pairs)}
        self._effect_of_site = {id(c.site): e for c, e in reversed(pairs)}
        self._made = {}  # id of an operation -> (it, its successor)
        self._origins = {}  # id of a successor -> (what it succeeds, names of weights that have their values)
        self._containers = {}  # id of a structure -> (model or opened layer, its successor)

    def check_layouts(self):
        """Refuses widths that weights which are spread over devices cannot have."""
        for call, effect in zip(self._labeled.graph.calls, self._labeled.effects, strict=True):
            for name, axes in effect.weights.items():
                weight = weight_of(call.operation, name)
                if weight is not None:
                    shape = [
                        size if labels is None else int(self._mask(labels).sum())
                        for size, labels in zip(weight.shape, axes, strict=True)
                    ]
                    check_layout(weight, shape, f"{call.name}/{name}")

    def container(self, structure):
        """The successor of a model, sub-model or opened layer, made once however often it is used."""
        if id(structure) not in self._containers:
            model = structure.model
            if is_attention(model):
                new = self._attention(model)
            else:
                sequential = isinstance(model, keras.Sequential)
                new = self._sequential(structure) if sequential else self._functional(structure)
                if new.dtype_policy != model.dtype_policy:
                    new.dtype_policy = model.dtype_policy
            self._containers[id(structure)] = (model, new)
        return self._containers[id(structure)][1]

    def _attention(self, layer):
        """An attention layer with as many heads as are kept; its inner layers succeed the old ones'."""
        if id(layer) not in self._made:
            kept = {name: self._num_heads(part) for name, part in head_counts(layer).items()}
            new = clone_operation(layer, layer.name, kept)
            self._made[id(layer)] = (layer, new)
        return self._made[id(layer)][1]

    def _num_heads(self, projection):
        axes = self._effect_of_operation[id(projection)].weights.get("kernel")
        heads = axes and axes[1]
        return projection.kernel.shape[1] if heads is None else int(self._mask(heads).sum())

    def _sequential(self, structure):
        layers = [self._input(structure, 0), *(self._successor(site) for site in structure.sites)]
        with contextlib.ExitStack() as stack:
            for layer in filter(_will_be_built, layers):
                stack.enter_context(self._with_weights(layer))
            stack.enter_context(recursing(len(layers)))
            return keras.Sequential(layers, name=structure.model.name)

    def _functional(self, structure):
        placeholders = keras.tree.flatten(structure.inputs)
        tensors = {id(t): self._input(structure, k).output for k, t in enumerate(placeholders)}
        for site in structure.sites:
            outputs = self._applied(site, tensors)
            tensors.update(zip(map(id, site.outputs), keras.tree.flatten(outputs), strict=True))
        inputs, outputs = keras.tree.map_structure(
            lambda t: tensors[id(t)], (structure.inputs, structure.outputs)
        )
        with recursing(len(structure.sites)):
            return _class_of(structure.model)(inputs=inputs, outputs=outputs, name=structure.model.name)

    def _applied(self, site, tensors):
        """What comes out when the successor of what a site applies is applied."""
        args, kwargs = self._arguments(site, tensors)
        operation, inner = self._successor(site), self._inside.get(id(site))
        if inner is not None and not is_functional(inner.model) and not is_attention(inner.model):
            flat = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
            training = {} if kwargs.get("training") is None else {"training": kwargs["training"]}
            return operation(flat if len(flat) > 1 else flat[0], **training)
        with self._with_weights(operation) if _will_be_built(operation) else contextlib.nullcontext():
            outputs = operation(*args, **kwargs)
        if inner is not None and is_attention(inner.model):
            for old, new in zip(inner_layers(inner.model), inner_layers(operation), strict=True):
                new.name = old.name
                self._made[id(old)] = (old, new)
        return outputs

    def _input(self, structure, number):
        layer = structure.input_layers[number]
        placeholder = keras.tree.flatten(structure.inputs)[number]
        graph = self._labeled.graph
        bound = graph.bindings[id(placeholder)]
        labels, shape = self._labeled.labels[bound[0]], list(placeholder.shape)
        if not is_functional(structure.model):  # an opened layer may be called on maps of several sizes
            sizes = zip(*(graph.shapes[index] for index in bound), strict=True)
            shape = [several[0] if len(set(several)) == 1 else None for several in sizes]
        for axis, size in enumerate(labels.shape):
            if size > 1:
                shape[axis] = int(self._mask(labels).sum())
        return clone_operation(layer, layer.name, {"batch_shape": tuple(shape)})

    def _successor(self, site):
        """The successor of a layer, an operation, a sub-model or an opened layer."""
        inner = self._inside.get(id(site))
        return self._operation(site.operation) if inner is None else self.container(inner)

    def _operation(self, operation):
        if id(operation) not in self._made:
            edits = self._effect_of_operation[id(operation)].config
            changes = {key: self._value(edit) for key, edit in edits.items() if self._touched(edit)}
            new = clone_operation(operation, self._names[id(operation)], changes)
            warn_of_file(new)
            self._made[id(operation)] = (operation, new)
            self._origins[id(new)] = (operation, set())
        return self._made[id(operation)][1]

    def _with_weights(self, layer):
        """Within it a layer is built with its weights, as far as they are known by then."""
        if id(layer) not in self._origins:
            return uninitialized(layer)
        old, done = self._origins[id(layer)]
        return initialized_with(layer, old, self._masks_of(old), done)

    def _arguments(self, site, tensors):
        effect = self._effect_of_site.get(id(site))
        flat = [tensors[id(x)] if isinstance(x, keras.KerasTensor) else x for x in site.flat]
        for position, edit in (effect.arguments if effect else {}).items():
            if self._touched(edit):
                flat[position] = self._value(edit)
        return site.packed(flat)

    def _mask(self, labels):
        return self._stays[self._labeled.units(labels)]

    def _touched(self, edit):
        return not all(self._mask(labels).all() for labels in edit.labels)

    def _value(self, edit):
        return edit.new_value(*[self._mask(labels) for labels in edit.labels])

    def copy_all_weights(self):
        weights = {}
        for old, new in self._made.values():
            if isinstance(old, keras.Layer) and id(old) in self._effect_of_operation:
                masks = self._masks_of(old)
                _, done = self._origins.get(id(new), (old, ()))
                copy_weights(old, new, masks, done)
                pairs = zip(old.weights, new.weights, strict=True)
                weights.update({id(after): (before, masks.get(id(before), ())) for before, after in pairs})
        return weights

    def _masks_of(self, layer):
        """For each weight of a layer (by `id`) what is kept along each axis."""
        return {
            id(weight): tuple(None if a is None else self._mask(a) for a in axes)
            for name, axes in self._effect_of_operation[id(layer)].weights.items()
            if (weight := weight_of(layer, name)) is not None
        }

    def set_trainable_flags(self):
        """Containers first: setting one's flag sets those of all its layers."""
        layers = [(o, n) for o, n in self._made.values() if isinstance(o, keras.Layer)]
        for old, new in [*reversed(self._containers.values()), *layers]:
            if new.trainable != old.trainable:
                new.trainable = old.trainable


def _class_of(model):
    """What to make in a model's place: its class if Functional models are made like it, else a plain one."""
    is_made_so = is_functional(model) and type(model).__init__ is functional_class().__init__
    return type(model) if is_made_so else keras.Model


def _will_be_built(operation):
    return isinstance(operation, keras.Layer) and not operation.built
