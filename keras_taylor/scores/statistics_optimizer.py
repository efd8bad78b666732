"""An optimizer that trains the weights and adds up the statistics of gates."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_taylor.scores.gates import GATE_STATISTICS
from keras_taylor.support.arrays import copy_kept
from keras_taylor.support.types import Tensor

_LOSS_POWERS = np.array([[statistic.loss_power] for statistic in GATE_STATISTICS], np.float32)


class StatisticsOptimizer(keras.optimizers.Optimizer):
    """Takes the statistics of gates out of the gradients, and hands the others to the user's optimizer.

    A plain optimizer assigns the statistics too (`overwrite_with_gradient`), but accumulation of
    gradients, moving averages and loss scales spoil them. This one subtracts the old value from the
    gradient, which leaves the batch's part, divides that by the loss scale, and adds it. A part that is
    not finite (the loss scale was too large) is left out.

    Args:
        optimizer: The optimizer that trains the weights; may be a `LossScaleOptimizer`.
        is_statistics: A function from a variable to whether it holds the gates' statistics.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, is_statistics: Callable[[keras.Variable], bool]
    ) -> None:
        super().__init__(learning_rate=0.0, name="statistics_optimizer")
        self.wrapped = optimizer
        self._is_statistics = is_statistics

    @property
    def inner_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer that was compiled, without loss scaling (where `SwapEMAWeights` looks for it)."""
        return getattr(self.wrapped, "inner_optimizer", self.wrapped)

    def build(self, variables: list[keras.Variable]) -> None:
        """Makes the variables of the wrapped optimizer, for all `variables` but the statistics."""
        super().build(variables)
        self.wrapped.build([v for v in variables if not self._is_statistics(v)])

    @property
    def variables(self) -> list[keras.Variable]:
        """Own variables (Keras wants an iteration and a rate), then those of the wrapped optimizer."""
        return self._variables + self.wrapped.variables

    def apply(
        self, grads: list[Tensor | None], trainable_variables: list[keras.Variable] | None = None
    ) -> None:
        """As `keras.optimizers.Optimizer.apply`."""
        variables = list(self._trainable_variables if trainable_variables is None else trainable_variables)
        if not self.built:
            self.build(variables)
        others = []
        for gradient, variable in zip(grads, variables, strict=True):
            if not self._is_statistics(variable):
                others.append((gradient, variable))
            elif gradient is not None:
                variable.assign(self._updated(ops.convert_to_tensor(variable), gradient))
        self.wrapped.apply([g for g, _ in others], [v for _, v in others])

    def stateless_apply(
        self, optimizer_variables: list[Tensor], grads: list[Tensor], trainable_variables: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As `keras.optimizers.Optimizer.stateless_apply`."""
        gates = [i for i, v in enumerate(self._trainable_variables) if self._is_statistics(v)]
        num_own = len(self._variables)
        own, inner = optimizer_variables[:num_own], optimizer_variables[num_own:]
        updated = {}
        with keras.StatelessScope(state_mapping=list(zip(self.wrapped.variables, inner, strict=True))):
            for i in gates:
                updated[i] = self._updated(trainable_variables[i], grads[i])
        weights, inner = self.wrapped.stateless_apply(
            inner,
            [g for i, g in enumerate(grads) if i not in gates],
            [v for i, v in enumerate(trainable_variables) if i not in gates],
        )
        rest = iter(weights)
        new = [updated[i] if i in updated else next(rest) for i in range(len(trainable_variables))]
        return new, [*own, *inner]

    def _updated(self, statistics: Tensor, gradient: Tensor) -> Tensor:
        return add_batch(statistics, gradient, self.wrapped.scale_loss(ops.ones(())))

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss as the wrapped optimizer wants it."""
        return self.wrapped.scale_loss(loss)

    def finalize_variable_values(self, var_list: list[keras.Variable]) -> None:
        """Ends training as the wrapped optimizer does (moving averages)."""
        trained = [v for v in var_list if not self._is_statistics(v)]
        self.wrapped.finalize_variable_values(trained)
        if getattr(self.inner_optimizer, "use_ema", False):
            for variable in trained:  # Keras assigned the averages' own arrays, and JAX would donate them
                variable.assign(copy_kept(variable))

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the wrapped optimizer."""
        return self.wrapped.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self.wrapped.learning_rate = value

    @property
    def iterations(self) -> keras.Variable:
        """Updates made by the wrapped optimizer."""
        return self.wrapped.iterations

    def get_config(self) -> dict[str, Any]:
        """The configuration of the wrapped optimizer."""
        return self.wrapped.get_config()


def add_batch(statistics: Tensor, gradient: Tensor, loss_scale: float | Tensor) -> Tensor:
    """The statistics after one more batch; a batch that overflowed is left out.

    Args:
        statistics: The sums so far, a float32 tensor `(len(GATE_STATISTICS), num_units)`.
        gradient: The gradient with respect to them: the sums so far plus those of the batch.
        loss_scale: By what the loss was multiplied before its gradient was taken.
    """
    scale = ops.power(ops.cast(loss_scale, statistics.dtype), _LOSS_POWERS)
    batch = (gradient - statistics) / scale
    finite = ops.all(ops.isfinite(batch))
    return statistics + ops.where(finite, batch, ops.zeros_like(batch))
