"""The smaller model that a plan describes, with copied weights (`prune`)."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_taylor.cutting.backend_faults import avoid_faults
from keras_taylor.cutting.remade_tasks import as_task
from keras_taylor.plans.plan import Plan, check_plan_class
from keras_taylor.plans.planning import kept_units, label_as_planned
from keras_taylor.reading.cloning import (
    clone_operation,
    compile_settings,
    copy_weights,
    initialized_from,
    zero_initialized,
)
from keras_taylor.reading.configurations import warn_about_saving
from keras_taylor.reading.graph import Site, SubmodelGraph
from keras_taylor.reading.groups import LabeledModel, label_model
from keras_taylor.reading.tracing import (
    Origin,
    is_functional,
    make_model,
    origin_of,
    recursion_limit_raised,
    set_origin,
)
from keras_taylor.rules.attention import attention_config, inner_layers, is_attention
from keras_taylor.rules.base import Effect, weight_of
from keras_taylor.support.identity import IdentityMap, IdentitySet
from keras_taylor.support.keras_internals import functional_class, layers_inside
from keras_taylor.support.optimizers import CutWeight, carry_exclusions, carry_state
from keras_taylor.support.replicas import check_layout, strategy_scope
from keras_taylor.support.types import BoolArray, Masks


def prune(model: keras.Model, plan: Plan) -> keras.Model:
    """Builds the smaller model that a plan describes, without any training.

    Channels are removed as in "Pruning Filters for Efficient ConvNets" (Li et al., 2017,
    https://arxiv.org/abs/1608.08710): with a channel, everything that reads it goes, too.

    Args:
        model: The model that the plan was made for. It is not changed.
        plan: Which channels of which layers stay, and which residual branches, from `make_plan`.

    Returns:
        A plain Keras model of the same kind and structure; of a task or backbone of KerasHub one of the same
        class with the same preprocessor, made from its configuration with smaller numbers, or with a warning
        a Functional one if no numbers say what the plan leaves. It has the same layer names, trainable flags,
        regularizers, dtype policies, shared layers and sub-models, and the kept weights. It is compiled as
        `model` is, with an optimizer of its own that continues where the optimizer of `model` stands: it has
        the same step count, and momentum and moments of the kept weights. It is not compiled if `model` is
        not.

    Raises:
        ValueError: if the plan was made for another model.
        UnsupportedModelError: if a layer cannot be made again from its configuration.

    Example:
        >>> scores = keras_taylor.score(model, criterion="magnitude")
        >>> plan = keras_taylor.make_plan(model, scores, 0.3)
        >>> small = keras_taylor.prune(model, plan)
        >>> small.count_params() <= 0.7 * model.count_params()
        True
    """
    check_plan_class(plan)
    with strategy_scope(model):
        labeled = label_as_planned(model, plan)
        return as_task(build_smaller_compiled(labeled, kept_units(labeled, plan)))


def copy_model(model: keras.Model) -> keras.Model:
    """A copy of a model with weights of its own, compiled as the model is."""
    labeled = label_model(model)
    return build_smaller_compiled(labeled, np.ones(labeled.num_units, bool))


def build_smaller_compiled(
    labeled: LabeledModel,
    kept: BoolArray,
    compiled_as: keras.Model | None = None,
    optimizer: keras.optimizers.Optimizer | None = None,
    carry: bool = True,
) -> keras.Model:
    """The model without the units that leave, compiled.

    Args:
        labeled: The model that gets smaller.
        kept: Bool array `(num_units,)`.
        compiled_as: The model whose compile settings the result gets; by default the one that gets smaller.
        optimizer: The optimizer whose state is carried over; by default that of the model that gets smaller.
        carry: Whether the new optimizer takes over a state.
    """
    small, weights = build_smaller(labeled, kept)
    model = labeled.graph.model
    settings = compile_settings(compiled_as or model)
    if settings is not None:
        small.compile(**settings)
        source = optimizer or model.optimizer
        if source is not None and small.optimizer is not None:
            carry_exclusions(source, small.optimizer, small.trainable_variables, weights)
            if carry:
                carry_state(source, small.optimizer, small.trainable_variables, weights)
    return small


def build_smaller(
    labeled: LabeledModel, kept: BoolArray
) -> tuple[keras.Model, IdentityMap[keras.Variable, CutWeight]]:
    """The model without the units that leave, not compiled.

    Args:
        labeled: The model that gets smaller.
        kept: Bool array `(num_units,)`.

    Returns:
        The smaller model, and for each of its weights the weight that it was cut from.
    """
    check_layouts(labeled, kept)
    builder = _SmallerModelBuilder(labeled, kept)
    small = builder.build_model(labeled.graph.root)
    weights = builder.copy_all_weights()
    builder.set_trainable_flags()
    copy_attributes(weights)
    avoid_faults(layers_inside(small))
    _pass_origin_on(labeled.graph.model, small, weights, bool(labeled.bypassed_sums(kept)))
    return small, weights


def _pass_origin_on(
    model: keras.Model,
    small: keras.Model,
    weights: IdentityMap[keras.Variable, CutWeight],
    lacks_branches: bool,
) -> None:
    """Notes that a smaller model stands for the same task as the model that it was cut from, if that does."""
    origin = origin_of(model)
    if origin is not None:
        of = origin.positions
        positions = IdentityMap((new, of[cut.source]) for new, cut in weights.items() if cut.source in of)
        set_origin(small, Origin(origin.model, positions, origin.lacks_branches or lacks_branches))


def copy_attributes(weights: IdentityMap[keras.Variable, CutWeight]) -> None:
    """Copies what can be assigned to a single weight, which its layer's configuration leaves out."""
    for new, (old, _) in weights.items():
        for name in ("trainable", "regularizer", "constraint"):
            if getattr(new, name) is not getattr(old, name):
                setattr(new, name, getattr(old, name))


def check_layouts(labeled: LabeledModel, kept: BoolArray) -> None:
    """Refuses widths that weights which are divided among devices cannot have."""
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for name, axes in effect.weights.items():
            weight = weight_of(call.operation, name)
            if weight is not None:
                shape = [
                    size if labels is None else int(labeled.kept_mask(labels, kept).sum())
                    for size, labels in zip(weight.shape, axes, strict=True)
                ]
                check_layout(weight, shape, f"{call.name}/{name}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Origin:
    """What a new layer was cloned from.

    Attributes:
        source: The original layer.
        done: Names of weights that got their values when the new layer was built.
    """

    source: keras.Operation
    done: set[str] = dataclasses.field(default_factory=set)


class _SmallerModelBuilder:
    """Builds the models and layers of a smaller model, each once however often it is used."""

    def __init__(self, labeled: LabeledModel, kept: BoolArray) -> None:
        self._labeled, self._kept_labels = labeled, labeled.kept_labels(kept)
        self._bypassed = labeled.bypassed_sums(kept)
        self._names: dict[keras.Operation, str] = {}
        self._effect_of_operation: dict[keras.Operation, Effect] = {}
        self._effect_of_site: dict[Site, Effect] = {}
        for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
            self._names[call.operation] = call.name
            self._effect_of_operation.setdefault(call.operation, effect)
            self._effect_of_site.setdefault(call.site, effect)
        self._new_operations: dict[keras.Operation, keras.Operation] = {}  # by the original
        self._new_models: dict[SubmodelGraph, keras.Layer] = {}  # for models and opened layers
        self._origins: dict[keras.Operation, _Origin] = {}  # of new operations

    def build_model(self, submodel: SubmodelGraph) -> keras.Layer:
        """The smaller version of a model, sub-model or opened layer."""
        if submodel not in self._new_models:
            model = submodel.model
            if is_attention(model):
                new = self._build_attention(model)
            else:
                is_sequential = isinstance(model, keras.Sequential)
                new = self._build_sequential(submodel) if is_sequential else self._build_functional(submodel)
                if new.dtype_policy != model.dtype_policy:
                    new.dtype_policy = model.dtype_policy
            self._new_models[submodel] = new
        return self._new_models[submodel]

    def _build_attention(self, layer: keras.Layer) -> keras.Layer:
        """An attention layer with the heads and output channels that are kept."""
        if layer not in self._new_operations:
            config = attention_config(layer, self._kernel_shape)
            self._new_operations[layer] = clone_operation(layer, layer.name, config)
        return self._new_operations[layer]

    def _kernel_shape(self, layer: keras.Layer) -> tuple[int, ...]:
        """The shape that the kernel of a layer keeps."""
        shape = tuple(layer.kernel.shape)
        axes = self._effect_of_operation[layer].weights.get("kernel", (None,) * len(shape))
        return tuple(
            size if labels is None else int(self._kept_labels.mask(labels).sum())
            for size, labels in zip(shape, axes, strict=True)
        )

    def _build_sequential(self, submodel: SubmodelGraph) -> keras.Sequential:
        sites = [site for site in submodel.sites if site not in self._bypassed]
        layers = [self._build_input(submodel, 0), *map(self._build_site, sites)]
        with contextlib.ExitStack() as stack:
            for layer in filter(_needs_build, layers):
                stack.enter_context(self._weights_initialized(layer))
            stack.enter_context(recursion_limit_raised(len(layers)))
            return keras.Sequential(layers, name=submodel.model.name)

    def _build_functional(self, submodel: SubmodelGraph) -> keras.Model:
        tensors: IdentityMap[keras.KerasTensor, keras.KerasTensor] = IdentityMap(
            (placeholder, self._build_input(submodel, number).output)
            for number, placeholder in enumerate(keras.tree.flatten(submodel.inputs))
        )
        for site in self._sites_left(submodel):
            if site in self._bypassed:
                outputs = tensors[self._trunk(site)]
            else:
                outputs = self._apply_site(site, tensors)
            tensors.update(zip(site.outputs, keras.tree.flatten(outputs), strict=True))
        inputs, outputs = keras.tree.map_structure(lambda t: tensors[t], (submodel.inputs, submodel.outputs))
        with recursion_limit_raised(len(submodel.sites)):
            return make_model(inputs, outputs, _class_for(submodel.model), name=submodel.model.name)

    def _trunk(self, site: Site) -> keras.KerasTensor:
        """The tensor that takes the place of a sum whose branch leaves."""
        trunk: keras.KerasTensor = _symbolic_inputs(site)[self._bypassed[site]]
        return trunk

    def _sites_left(self, submodel: SubmodelGraph) -> list[Site]:
        """The sites on which an output depends when branches have left."""
        if self._bypassed.keys().isdisjoint(submodel.sites):
            return list(submodel.sites)
        needed: IdentitySet = IdentitySet(keras.tree.flatten(submodel.outputs))
        sites = []
        for site in reversed(submodel.sites):
            if any(tensor in needed for tensor in site.outputs):
                sites.append(site)
                for tensor in [self._trunk(site)] if site in self._bypassed else _symbolic_inputs(site):
                    needed.add(tensor)
        return sites[::-1]

    def _apply_site(self, site: Site, tensors: IdentityMap[keras.KerasTensor, keras.KerasTensor]) -> Any:
        """Calls the smaller version of what is applied at a site; returns the symbolic outputs."""
        args, kwargs = self._arguments(site, tensors)
        operation, inner = self._build_site(site), self._labeled.graph.submodels.get(site)
        if inner is not None and not is_functional(inner.model) and not is_attention(inner.model):
            flat = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
            training = {} if kwargs.get("training") is None else {"training": kwargs["training"]}
            return operation(flat if len(flat) > 1 else flat[0], **training)
        with self._weights_initialized(operation) if _needs_build(operation) else contextlib.nullcontext():
            outputs = operation(*args, **kwargs)
        if inner is not None and is_attention(inner.model):
            for old, new in zip(inner_layers(inner.model), inner_layers(operation), strict=True):
                new.name = old.name
                self._new_operations[old] = new
        return outputs

    def _arguments(
        self, site: Site, tensors: IdentityMap[keras.KerasTensor, keras.KerasTensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call arguments of a site, with new tensors and the values that follow from kept channels."""
        flat = [tensors[x] if isinstance(x, keras.KerasTensor) else x for x in site.flat]
        if site in self._effect_of_site:
            changes = self._kept_labels.changes(self._effect_of_site[site].arguments)
            for position, value in changes.items():
                flat[position] = value
        return site.packed(flat)

    def _build_input(self, submodel: SubmodelGraph, number: int) -> keras.layers.InputLayer:
        layer = submodel.input_layers[number]
        placeholder = keras.tree.flatten(submodel.inputs)[number]
        graph = self._labeled.graph
        tensors = graph.bindings[placeholder]
        labels, shape = self._labeled.labels[tensors[0]], list(placeholder.shape)
        if not is_functional(submodel.model):  # an opened layer may be called on maps of several sizes
            sizes = zip(*(graph.shapes[index] for index in tensors), strict=True)
            shape = [several[0] if len(set(several)) == 1 else None for several in sizes]
        for axis, size in enumerate(labels.shape):
            if size > 1:
                shape[axis] = int(self._kept_labels.mask(labels).sum())
        return clone_operation(layer, layer.name, {"batch_shape": tuple(shape)})

    def _build_site(self, site: Site) -> keras.Operation:
        """The smaller version of the layer, operation, sub-model or opened layer at a site."""
        inner = self._labeled.graph.submodels.get(site)
        return self._build_operation(site.operation) if inner is None else self.build_model(inner)

    def _build_operation(self, operation: keras.Operation) -> keras.Operation:
        if operation not in self._new_operations:
            changes = self._kept_labels.changes(self._effect_of_operation[operation].config)
            new = clone_operation(operation, self._names[operation], changes)
            if origin_of(self._labeled.graph.model) is None:  # else it is made again in a task
                warn_about_saving(new)
            self._new_operations[operation] = new
            self._origins[new] = _Origin(operation)
        return self._new_operations[operation]

    @contextlib.contextmanager
    def _weights_initialized(self, layer: keras.Layer) -> Iterator[None]:
        """Within it, the weights of a new layer get the kept values as soon as they are made."""
        origin = self._origins.get(layer)
        if origin is None:
            with zero_initialized(layer):
                yield
        else:
            masks = self._masks_of(origin.source)
            with initialized_from(layer, origin.source, masks, origin.done):
                yield

    def _masks_of(self, layer: keras.Layer) -> dict[int, Masks]:
        """What stays of an original layer's weights, by their positions."""
        return self._kept_labels.weight_masks(layer, self._effect_of_operation[layer])

    def copy_all_weights(self) -> IdentityMap[keras.Variable, CutWeight]:
        """Copies the weights that have no values yet; returns what each new weight was cut from."""
        weights: IdentityMap[keras.Variable, CutWeight] = IdentityMap()
        for old, new in self._new_operations.items():
            if isinstance(old, keras.Layer) and old in self._effect_of_operation:
                masks = self._masks_of(old)
                copy_weights(old, new, masks, self._origins[new].done if new in self._origins else ())
                for number, (before, after) in enumerate(zip(old.weights, new.weights, strict=True)):
                    weights[after] = CutWeight(before, masks.get(number, ()))
        return weights

    def set_trainable_flags(self) -> None:
        """Sets the flags of models first, since a model's flag sets those of all its layers."""
        models = [(submodel.model, new) for submodel, new in self._new_models.items()]
        layers = [(o, n) for o, n in self._new_operations.items() if isinstance(o, keras.Layer)]
        for old, new in [*reversed(models), *layers]:
            if new.trainable != old.trainable:
                new.trainable = old.trainable


def _symbolic_inputs(site: Site) -> list[keras.KerasTensor]:
    """The tensors among the arguments of a site."""
    return [x for x in site.flat if isinstance(x, keras.KerasTensor)]


def _class_for(model: keras.Layer) -> type[keras.Model]:
    """The class of the smaller version of a model: the model's own if it is made like a Functional one."""
    is_made_alike = is_functional(model) and type(model).__init__ is functional_class().__init__
    return type(model) if is_made_alike else keras.Model


def _needs_build(operation: keras.Operation) -> bool:
    return isinstance(operation, keras.Layer) and not operation.built
