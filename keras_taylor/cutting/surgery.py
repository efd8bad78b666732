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
from keras_taylor.reading.tracing import functional_class, is_functional, recursion_limit_raised
from keras_taylor.rules.attention import head_counts, inner_layers, is_attention
from keras_taylor.rules.base import KeptLabels, weight_of
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.optimizers import CutWeight, carry_state
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
        return build_smaller_compiled(labeled, kept_units(labeled, plan))


def build_smaller_compiled(labeled, kept, compiled_as=None, optimizer=None, carry=True):
    """The model without the units that are not kept, compiled.

    Args:
        channels: `groups.LabeledModel` of the model.
        kept: Bool array `(num_units,)`.
        compiled_as: The model whose compile settings it gets; `None`: the one that is cut.
        optimizer: Whose state the new optimizer takes over; `None`: that of the model
            that is cut.
        carry: Whether it takes it over.
    """
    small, weights = build_smaller(labeled, kept)
    model = labeled.graph.model
    settings = compile_settings(compiled_as or model)
    if settings is not None:
        small.compile(**settings)
        source = optimizer or model.optimizer
        if carry and source is not None and small.optimizer is not None:
            carry_state(source, small.optimizer, small.trainable_variables, weights)
    return small


def copy_model(model):
    """All of a model, compiled as it is."""
    labeled = label_model(model)
    return build_smaller_compiled(labeled, np.ones(labeled.num_units, bool))


def build_smaller(labeled, kept):
    """The model without the units that are not kept, not compiled.

    Returns:
        The model, and for each of its weights the weight that it was cut from.
    """
    surgeon = _Surgeon(labeled, kept)
    surgeon.check_layouts()
    small = surgeon.container(labeled.graph.root)
    weights = surgeon.copy_all_weights()
    surgeon.set_trainable_flags()
    return small, weights


class _Surgeon:
    def __init__(self, labeled, kept):
        self._labeled = labeled
        self._kept_labels = KeptLabels(lambda labels: labeled.kept_mask(labels, kept))
        self._submodels = labeled.graph.submodels
        calls = labeled.graph.calls
        pairs = list(zip(calls, labeled.effects, strict=True))
        self._names = {c.operation: c.name for c in calls}
        self._effect_of_operation = {c.operation: e for c, e in reversed(pairs)}
        self._effect_of_site = {c.site: e for c, e in reversed(pairs)}
        self._made = {}  # operation -> its successor
        self._origins = {}  # successor -> (what it succeeds, names of weights that have their values)
        self._containers = {}  # `SubmodelGraph` -> its successor

    def check_layouts(self):
        """Refuses widths that weights which are spread over devices cannot have."""
        for call, effect in zip(self._labeled.graph.calls, self._labeled.effects, strict=True):
            for name, axes in effect.weights.items():
                weight = weight_of(call.operation, name)
                if weight is not None:
                    shape = [
                        size if labels is None else int(self._kept_labels.mask(labels).sum())
                        for size, labels in zip(weight.shape, axes, strict=True)
                    ]
                    check_layout(weight, shape, f"{call.name}/{name}")

    def container(self, structure):
        """The successor of a model, sub-model or opened layer, made once however often it is used."""
        if structure not in self._containers:
            model = structure.model
            if is_attention(model):
                new = self._attention(model)
            else:
                sequential = isinstance(model, keras.Sequential)
                new = self._sequential(structure) if sequential else self._functional(structure)
                if new.dtype_policy != model.dtype_policy:
                    new.dtype_policy = model.dtype_policy
            self._containers[structure] = new
        return self._containers[structure]

    def _attention(self, layer):
        """An attention layer with as many heads as are kept; its inner layers succeed the old ones'."""
        if layer not in self._made:
            kept = {name: self._num_heads(part) for name, part in head_counts(layer).items()}
            new = clone_operation(layer, layer.name, kept)
            self._made[layer] = new
        return self._made[layer]

    def _num_heads(self, projection):
        axes = self._effect_of_operation[projection].weights.get("kernel")
        heads = axes and axes[1]
        return projection.kernel.shape[1] if heads is None else int(self._kept_labels.mask(heads).sum())

    def _sequential(self, structure):
        layers = [self._input(structure, 0), *(self._successor(site) for site in structure.sites)]
        with contextlib.ExitStack() as stack:
            for layer in filter(_will_be_built, layers):
                stack.enter_context(self._with_weights(layer))
            stack.enter_context(recursion_limit_raised(len(layers)))
            return keras.Sequential(layers, name=structure.model.name)

    def _functional(self, structure):
        placeholders = keras.tree.flatten(structure.inputs)
        tensors = IdentityMap((t, self._input(structure, k).output) for k, t in enumerate(placeholders))
        for site in structure.sites:
            outputs = self._applied(site, tensors)
            tensors.update(zip(site.outputs, keras.tree.flatten(outputs), strict=True))
        inputs, outputs = keras.tree.map_structure(
            lambda t: tensors[t], (structure.inputs, structure.outputs)
        )
        with recursion_limit_raised(len(structure.sites)):
            return _class_of(structure.model)(inputs=inputs, outputs=outputs, name=structure.model.name)

    def _applied(self, site, tensors):
        """What comes out when the successor of what a site applies is applied."""
        args, kwargs = self._arguments(site, tensors)
        operation, inner = self._successor(site), self._submodels.get(site)
        if inner is not None and not is_functional(inner.model) and not is_attention(inner.model):
            flat = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
            training = {} if kwargs.get("training") is None else {"training": kwargs["training"]}
            return operation(flat if len(flat) > 1 else flat[0], **training)
        with self._with_weights(operation) if _will_be_built(operation) else contextlib.nullcontext():
            outputs = operation(*args, **kwargs)
        if inner is not None and is_attention(inner.model):
            for old, new in zip(inner_layers(inner.model), inner_layers(operation), strict=True):
                new.name = old.name
                self._made[old] = new
        return outputs

    def _input(self, structure, number):
        layer = structure.input_layers[number]
        placeholder = keras.tree.flatten(structure.inputs)[number]
        graph = self._labeled.graph
        bound = graph.bindings[placeholder]
        labels, shape = self._labeled.labels[bound[0]], list(placeholder.shape)
        if not is_functional(structure.model):  # an opened layer may be called on maps of several sizes
            sizes = zip(*(graph.shapes[index] for index in bound), strict=True)
            shape = [several[0] if len(set(several)) == 1 else None for several in sizes]
        for axis, size in enumerate(labels.shape):
            if size > 1:
                shape[axis] = int(self._kept_labels.mask(labels).sum())
        return clone_operation(layer, layer.name, {"batch_shape": tuple(shape)})

    def _successor(self, site):
        """The successor of a layer, an operation, a sub-model or an opened layer."""
        inner = self._submodels.get(site)
        return self._operation(site.operation) if inner is None else self.container(inner)

    def _operation(self, operation):
        if operation not in self._made:
            changes = self._kept_labels.changes(self._effect_of_operation[operation].config)
            new = clone_operation(operation, self._names[operation], changes)
            warn_of_file(new)
            self._made[operation] = new
            self._origins[new] = (operation, set())
        return self._made[operation]

    def _with_weights(self, layer):
        """Within it a layer is built with its weights, as far as they are known by then."""
        if layer not in self._origins:
            return uninitialized(layer)
        old, done = self._origins[layer]
        return initialized_with(layer, old, self._masks_of(old), done)

    def _arguments(self, site, tensors):
        effect = self._effect_of_site.get(site)
        flat = [tensors[x] if isinstance(x, keras.KerasTensor) else x for x in site.flat]
        if effect:
            for position, value in self._kept_labels.changes(effect.arguments).items():
                flat[position] = value
        return site.packed(flat)

    def copy_all_weights(self):
        weights = IdentityMap()
        for old, new in self._made.items():
            if isinstance(old, keras.Layer) and old in self._effect_of_operation:
                masks = self._masks_of(old)
                _, done = self._origins.get(new, (old, ()))
                copy_weights(old, new, masks, done)
                for number, (before, after) in enumerate(zip(old.weights, new.weights, strict=True)):
                    weights[after] = CutWeight(before, masks.get(number, ()))
        return weights

    def _masks_of(self, layer):
        return self._kept_labels.weight_masks(layer, self._effect_of_operation[layer])

    def set_trainable_flags(self):
        """Containers first: setting one's flag sets those of all its layers."""
        containers = [(structure.model, new) for structure, new in self._containers.items()]
        layers = [(o, n) for o, n in self._made.items() if isinstance(o, keras.Layer)]
        for old, new in [*reversed(containers), *layers]:
            if new.trainable != old.trainable:
                new.trainable = old.trainable


def _class_of(model):
    """What to make in a model's place: its class if Functional models are made like it, else a plain one."""
    is_made_so = is_functional(model) and type(model).__init__ is functional_class().__init__
    return type(model) if is_made_so else keras.Model


def _will_be_built(operation):
    return isinstance(operation, keras.Layer) and not operation.built
