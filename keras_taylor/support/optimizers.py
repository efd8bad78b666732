"""Fresh optimizers, the state that an optimizer has after a cut, and states of a model to go back to."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras

from keras_taylor.support.arrays import copy_kept, zeros_of_host
from keras_taylor.support.identity import IdentityMap, IdentitySet
from keras_taylor.support.keras_internals import (
    is_excluded_from_decay,
    learning_rate_setting,
    names_excluded_from_decay,
    variable_indices,
)
from keras_taylor.support.types import Masks

# A rate that is lower by these factors looks decayed: than what the last `fit` logged, than a class' default.
_BELOW_LOGGED, _BELOW_DEFAULT = 5, 20


class CutWeight(NamedTuple):
    """The origin of a weight of a smaller model.

    Attributes:
        source: The weight of the original.
        masks: Which entries stay along each of its axes; empty if all stay.
    """

    source: keras.Variable
    masks: Masks


def has_schedule(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the learning rate follows a schedule or a function."""
    rate = optimizer.get_config().get("learning_rate")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return has_schedule(optimizer.inner_optimizer)
    return not isinstance(rate, (int, float))


def describe_learning_rate(model: keras.Model, chosen: float | None) -> str:
    """The learning rate of a fine-tuning and where it comes from; says if the compiled one looks decayed.

    Args:
        model: The compiled model.
        chosen: The rate; `None`: as compiled.
    """
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if hasattr(inner, "optimizers"):
        return "those of the compiled optimizers"
    if has_schedule(optimizer):
        setting = learning_rate_setting(inner)
        name = getattr(setting, "__name__", type(setting).__name__)
        return f"the compiled schedule, `{name}`, from its start in each round"
    compiled = float(keras.ops.convert_to_numpy(inner.learning_rate))
    source = f"the compiled rate, {compiled:.3g}"
    if chosen is not None and chosen != compiled:
        source = f"{chosen:.3g}, {chosen / compiled:.3g} times {source}" if compiled else f"{chosen:.3g}"
    return source + _describe_decay(model, inner, compiled)


def _describe_decay(model: keras.Model, optimizer: keras.optimizers.Optimizer, rate: float) -> str:
    """Why a compiled rate looks like one that a callback has lowered, in words; empty if it does not."""
    record = getattr(getattr(model, "history", None), "history", {})
    highest = float(max(record.get("learning_rate", [0.0])))
    default = inspect.signature(type(optimizer)).parameters.get("learning_rate")
    usual = default.default if default is not None else None
    if rate <= highest / _BELOW_LOGGED:
        sign = f"the last `fit` went up to {highest:.3g}"
    elif record or not int(keras.ops.convert_to_numpy(optimizer.iterations)):  # no callback has lowered it
        return ""
    elif isinstance(usual, float) and rate <= usual / _BELOW_DEFAULT:
        sign = f"it has trained, and `{type(optimizer).__name__}` begins with {usual:.3g} by default"
    else:
        return ""
    return f", which looks decayed ({sign}): pass `learning_rate` for a higher one"


def fresh_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """A new optimizer of the same class and configuration.

    Classes of its own, of its schedule, and of optimizers that it wraps need not be registered.
    """
    makers: list[Any] = []
    for one in _with_wrapped(optimizer):
        rate = learning_rate_setting(one)
        makers += [type(one), rate if inspect.isfunction(rate) else type(rate)]
    with keras.saving.custom_object_scope({maker.__name__: maker for maker in makers}):
        return type(optimizer).from_config(optimizer.get_config())


def carry_exclusions(
    source: keras.optimizers.Optimizer,
    target: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    weights: IdentityMap[keras.Variable, CutWeight],
) -> None:
    """Excludes from weight decay what another optimizer excludes, by names or by variables.

    Args:
        source: The other optimizer.
        target: A new optimizer of the same class and configuration, not built.
        variables: The trainable variables that it will be built for.
        weights: For each new weight the weight that it was cut from.
    """
    source, target = (getattr(o, "wrapped", o) for o in (source, target))
    for old, new in zip(_with_wrapped(source), _with_wrapped(target), strict=True):
        names = names_excluded_from_decay(old)
        excluded = [v for v in variables if v in weights and is_excluded_from_decay(old, weights[v].source)]
        if names or excluded:
            new.exclude_from_weight_decay(excluded, [names] if names else None)


def carry_state(
    source: keras.optimizers.Optimizer,
    target: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    weights: IdentityMap[keras.Variable, CutWeight],
) -> bool:
    """Builds an optimizer with the state of another one, cut as the weights were.

    It copies the step count, the loss scale and the slots (momentum, second moments, averages, accumulated
    gradients) of the channels that stay; not the learning rate. State that is not shaped like its weight
    (Adafactor's factors) starts again where its shape changed.

    Args:
        source: The optimizer with the state; built for the weights before the cut.
        target: A new optimizer of the same class and configuration.
        variables: The trainable variables to build it for.
        weights: For each new weight the weight that it was cut from.

    Returns:
        Whether there was a state to carry over.
    """
    references = _build(target, variables)
    source, target = (getattr(o, "wrapped", o) for o in (source, target))
    if not source.built or len(source.variables) != len(target.variables):
        return False
    counterparts = _counterparts(source, target, variables, weights, references)
    for old, new in zip(counterparts, target.variables, strict=True):
        masks: Masks = ()
        reference = references.get(new)
        if reference is not None:
            before, masks = weights[reference]
            if tuple(old.shape) != tuple(before.shape):
                continue
        value = copy_kept(old, masks)
        if tuple(value.shape) == tuple(new.shape) and new.name != "learning_rate":
            new.assign(value)
    return True


def _counterparts(
    source: keras.optimizers.Optimizer,
    target: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
    weights: IdentityMap[keras.Variable, CutWeight],
    references: IdentityMap[keras.Variable, keras.Variable],
) -> list[keras.Variable]:
    """The variable of `source` for each of `target`, in whichever order that was built for its weights."""
    cut = [variable for variable in variables if variable in weights]  # a wrapper has gates beside these
    slots: IdentityMap[keras.Variable, list[int]] = IdentityMap((variable, []) for variable in cut)
    for position, variable in enumerate(target.variables):
        if variable in references and references[variable] in slots:
            slots[references[variable]].append(position)
    found = list(source.variables)
    sources = [weights[variable].source for variable in cut]
    orders = [variable_indices(one, sources) for one in _with_wrapped(source)]
    order = next((one for one in orders if one is not None), list(range(len(cut))))
    for variable, number in zip(cut, order, strict=True):
        if len(slots[variable]) == len(slots[cut[number]]):
            for position, other in zip(slots[variable], slots[cut[number]], strict=True):
                found[position] = source.variables[other]
    return found


def _build(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> IdentityMap[keras.Variable, keras.Variable]:
    """Builds an optimizer; returns the weight that each of its slots was made for."""
    references: IdentityMap[keras.Variable, keras.Variable] = IdentityMap()
    with contextlib.ExitStack() as stack:
        for one in _with_wrapped(optimizer):
            stack.enter_context(_record_references(one, references))
        optimizer.build(variables)
    return references


@contextlib.contextmanager
def _record_references(
    optimizer: keras.optimizers.Optimizer, references: IdentityMap[keras.Variable, keras.Variable]
) -> Iterator[None]:
    """A context in which `references` gets an entry for each slot that the optimizer makes."""
    make = optimizer.add_variable_from_reference

    def record(
        reference_variable: keras.Variable, name: str | None = None, initializer: Any = "zeros"
    ) -> keras.Variable:
        slot = make(reference_variable, name, zeros_of_host if initializer == "zeros" else initializer)
        references[slot] = reference_variable
        return slot

    vars(optimizer)["add_variable_from_reference"] = record
    try:
        yield
    finally:
        vars(optimizer).pop("add_variable_from_reference")


def _with_wrapped(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """An optimizer, then those that it wraps."""
    inner = [getattr(optimizer, name, None) for name in ("wrapped", "inner_optimizer")]
    inner += list(getattr(optimizer, "optimizers", None) or [])
    found: dict[keras.optimizers.Optimizer, None] = {optimizer: None}
    for one in inner:
        if one is not None and one not in found:
            found.update(dict.fromkeys(_with_wrapped(one)))
    return list(found)


def persistent_variables(model: keras.Model) -> list[keras.Variable]:
    """Weights and the seeds of random layers, without the variables of metrics."""
    of_metrics = IdentitySet(model.metrics_variables)
    return [variable for variable in model.variables if variable not in of_metrics]


class ModelState:
    """The present values of a compiled model's variables, and of its optimizer's.

    Args:
        model: The model. Its optimizer is built, if it is not yet.
    """

    def __init__(self, model: keras.Model) -> None:
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._variables = [*persistent_variables(model), *model.optimizer.variables]
        self._values = [copy_kept(variable) for variable in self._variables]

    def restore(self) -> None:
        """Gives the variables these values again."""
        for variable, value in zip(self._variables, self._values, strict=True):
            variable.assign(value)
