"""Optimizers that leave gate statistics alone, and their state across a cut."""

import contextlib
import inspect
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_taylor.support.copies import copy_kept
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.types import Masks

# What becomes of each row of `gates.ROWS` when the loss is scaled by S: it is S^power times as large.
_POWERS = np.array([1, 1, 2, 2, 0, 0], np.float32)


class CutWeight(NamedTuple):
    """What a weight of a smaller model was made from.

    Attributes:
        source: The weight of the original.
        masks: What stays along each of its axes; empty where all does.
    """

    source: keras.Variable
    masks: Masks


class StatisticsOptimizer(keras.optimizers.Optimizer):
    """Takes the gates' pair out of the gradients, and hands the others to the user's optimizer.

    A plain optimizer assigns the statistics too (`overwrite_with_gradient`), but
    accumulation of gradients, moving averages and loss scales spoil them on the
    way. Here the batch's part is found by subtraction, divided by the loss scale,
    left out where it is not finite (the loss scale was too large), and added.

    Args:
        optimizer: The optimizer that trains the weights; may be a `LossScaleOptimizer`.
        is_statistics: Function from a variable to whether it is the gates' statistics.
    """

    def __init__(self, optimizer, is_statistics):
        super().__init__(learning_rate=0.0, name="statistics_optimizer")
        self.wrapped = optimizer
        self._is_statistics = is_statistics

    @property
    def inner_optimizer(self):
        """The optimizer that was compiled, without loss scaling (where `SwapEMAWeights` looks for it)."""
        return getattr(self.wrapped, "inner_optimizer", self.wrapped)

    def build(self, variables):
        """Makes the variables of the wrapped optimizer, for all `variables` but the statistics."""
        super().build(variables)
        self.wrapped.build([v for v in variables if not self._is_statistics(v)])

    @property
    def variables(self):
        """Own variables (Keras wants an iteration and a rate), then those of the wrapped optimizer."""
        return self._variables + self.wrapped.variables

    def apply(self, grads, trainable_variables=None):
        """As `keras.optimizers.Optimizer.apply`."""
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if not self.built:
            self.build(variables)
        others = []
        for gradient, variable in zip(grads, variables, strict=True):
            if not self._is_statistics(variable):
                others.append((gradient, variable))
            elif gradient is not None:
                variable.assign(self._added(ops.convert_to_tensor(variable), gradient))
        self.wrapped.apply([g for g, _ in others], [v for _, v in others])

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        """As `keras.optimizers.Optimizer.stateless_apply`."""
        gates = [i for i, v in enumerate(self._trainable_variables) if self._is_statistics(v)]
        own, inner = (
            optimizer_variables[: len(self._variables)],
            optimizer_variables[len(self._variables) :],
        )
        added = {}
        with keras.StatelessScope(state_mapping=list(zip(self.wrapped.variables, inner, strict=True))):
            for i in gates:
                added[i] = self._added(trainable_variables[i], grads[i])
        weights, inner = self.wrapped.stateless_apply(
            inner,
            [g for i, g in enumerate(grads) if i not in gates],
            [v for i, v in enumerate(trainable_variables) if i not in gates],
        )
        rest = iter(weights)
        new = [added[i] if i in added else next(rest) for i in range(len(trainable_variables))]
        return new, [*own, *inner]

    def _added(self, statistics, gradient):
        return with_batch(statistics, gradient, self.wrapped.scale_loss(ops.ones(())))

    def scale_loss(self, loss):
        """The loss as the wrapped optimizer wants it."""
        return self.wrapped.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        """What the wrapped optimizer does at the end of training (moving averages)."""
        self.wrapped.finalize_variable_values([v for v in var_list if not self._is_statistics(v)])

    @property
    def learning_rate(self):
        """The learning rate of the wrapped optimizer."""
        return self.wrapped.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        self.wrapped.learning_rate = value

    @property
    def iterations(self):
        """Updates made by the wrapped optimizer."""
        return self.wrapped.iterations

    def get_config(self):
        """The configuration of the wrapped optimizer."""
        return self.wrapped.get_config()


def with_batch(statistics, gradient, loss_scale):
    """Statistics with the part of a batch whose gates saw the loss times `loss_scale`.

    Args:
        statistics: The sums so far, a float32 tensor `(len(gates.ROWS), num_units)`.
        gradient: The sums so far plus those of the batch.
        loss_scale: A number. A batch that overflowed is left out.
    """
    scale = ops.power(ops.cast(loss_scale, statistics.dtype), _POWERS[:, None])
    batch = (gradient - statistics) / scale
    finite = ops.all(ops.isfinite(batch))
    return statistics + ops.where(finite, batch, ops.zeros_like(batch))


def has_schedule(optimizer):
    """Whether the learning rate follows a schedule or a function."""
    rate = optimizer.get_config().get("learning_rate")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return has_schedule(optimizer.inner_optimizer)
    return not isinstance(rate, (int, float))


def fresh_optimizer(optimizer):
    """A new optimizer of the same class and configuration; its schedule's class need not be registered."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    rate = getattr(inner, "_learning_rate", None)  # the public property gives its value now
    maker = rate if inspect.isfunction(rate) else type(rate)
    with keras.saving.custom_object_scope({maker.__name__: maker}):
        return type(optimizer).from_config(optimizer.get_config())


def carry_state(source, target, variables, weights):
    """Builds an optimizer with the state of another one, cut as the weights were.

    Slots (momentum, second moments, averages, accumulated gradients) of what
    survives, the step count and the loss scale are copied; the learning rate is not.
    State that is not shaped like its weight (Adafactor's factors) starts anew where
    its shape changed.

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
    for old, new in zip(source.variables, target.variables, strict=True):
        reference, masks = references.get(new), ()
        if reference is not None:
            before, masks = weights[reference]
            if tuple(old.shape) != tuple(before.shape):
                continue
        value = copy_kept(old, masks)
        if tuple(value.shape) == tuple(new.shape) and new.name != "learning_rate":
            new.assign(value)
    return True


def _build(optimizer, variables):
    """Builds an optimizer; returns the weight that each of its slots was made for."""
    references = IdentityMap()
    with contextlib.ExitStack() as stack:
        for one in _all_optimizers(optimizer):
            stack.enter_context(_recording(one, references))
        optimizer.build(variables)
    return references


@contextlib.contextmanager
def _recording(optimizer, references):
    make = optimizer.add_variable_from_reference

    def record(reference_variable, *args, **kwargs):
        slot = make(reference_variable, *args, **kwargs)
        references[slot] = reference_variable
        return slot

    vars(optimizer)["add_variable_from_reference"] = record
    try:
        yield
    finally:
        vars(optimizer).pop("add_variable_from_reference")


def _all_optimizers(optimizer):
    """An optimizer with those that it wraps."""
    inner = [getattr(optimizer, name, None) for name in ("wrapped", "inner_optimizer")]
    inner += list(getattr(optimizer, "optimizers", None) or [])
    found = {optimizer: None}
    for one in inner:
        if one is not None and one not in found:
            found.update(dict.fromkeys(_all_optimizers(one)))
    return list(found)
