"""Units chosen together: greedy removal by the Fisher matrix of all gates (criterion `fisher`)."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_taylor.scores.gates import GATE_ROWS, Gates, batch_statistics
from keras_taylor.support.replicas import num_examples_before, sum_over_replicas
from keras_taylor.support.types import FloatArray, Tensor

# Rows of derivatives that are kept, at most: one an example up to there, sums of several beyond.
MAX_SKETCH_ROWS = 2048
# Numbers that these rows may hold (256 MiB in float32).
_MAX_SKETCH_SIZE = 2**26
# Steps of the greedy choice, at most: in larger networks several units go at a time.
_MAX_GREEDY_STEPS = 4096


class FisherGates(Gates):
    """Gates that keep the derivatives of single examples, one row each.

    If there are more examples than rows, each row holds the sum of several examples, with random signs (a
    count sketch; Charikar, Chen and Farach-Colton, Finding frequent items in data streams, 2002). The
    products of two columns then still have the right mean.

    Args:
        num_units: Number of gates.
    """

    def __init__(self, num_units: int, **kwargs: Any) -> None:
        num_sketch_rows = min(MAX_SKETCH_ROWS, max(_MAX_SKETCH_SIZE // max(num_units, 1), 1))
        super().__init__(num_units, num_rows=len(GATE_ROWS) + num_sketch_rows, **kwargs)
        self._num_sketch_rows = num_sketch_rows
        self._seed = keras.random.SeedGenerator(0)

    def draw(self, batch_size: int | Tensor) -> tuple[Tensor, ...]:
        """A random sign for each example, `(batch, 1)`."""
        return (ops.where(keras.random.uniform((batch_size, 1), seed=self._seed) < 0.5, -1.0, 1.0),)

    def batch_rows(self, derivative: Tensor, statistics: Tensor, *draws: Tensor) -> Tensor:
        """The rows of `GATE_STATISTICS`, then the derivatives of the examples, each in its row."""
        (signs,) = draws
        batch = ops.shape(signs)[0]
        num_done = ops.cast(statistics[GATE_ROWS["examples"], 0], "int32")
        numbers = num_done + num_examples_before(batch) + ops.arange(batch, dtype="int32")
        places = ops.one_hot(ops.mod(numbers, self._num_sketch_rows), self._num_sketch_rows)
        rows = sum_over_replicas(ops.matmul(ops.transpose(places), signs * derivative))
        return ops.concatenate([batch_statistics(derivative, self.num_units), rows])


def removal_ranks(totals: FloatArray, saved: FloatArray) -> FloatArray:
    """The order of a greedy removal: the next unit is always the one that adds least loss for what it saves.

    To second order, with the Fisher matrix F = mean over examples of g gᵀ in place of the Hessian (Martens,
    New insights and perspectives on the natural gradient method, 2020) and without the first order, which is
    small in a trained network, the removal of the units s (a vector of zeros and ones) costs

        sᵀ F s / 2.

    After the units s, unit i therefore adds F[i, i] / 2 + (F s)[i]; `taylor` is the diagonal F[i, i] alone.

    Args:
        totals: Statistics of `FisherGates`, float64 `(num_rows, num_units)`.
        saved: What each unit saves, `(num_units,)`.

    Returns:
        An array `(num_units,)`: 1 for the unit that goes last, just above 0 for the first.
    """
    num_units, num_examples = saved.size, totals[GATE_ROWS["examples"], 0]
    rows = (totals[len(GATE_ROWS) :] / np.sqrt(num_examples)).astype(np.float32)
    rows = rows[np.any(rows, axis=1)]
    half_diagonal = totals[GATE_ROWS["square"]] / num_examples / 2
    products = np.zeros(num_units)  # F s, s being the units that have gone
    is_left, ranks = np.ones(num_units, bool), np.zeros(num_units)
    units_a_step, num_gone = -(-num_units // _MAX_GREEDY_STEPS), 0
    while num_gone < num_units:
        added = half_diagonal + products
        prices = np.where(is_left, np.where(added > 0, added / saved, added * saved), np.inf)
        units = np.argsort(prices, kind="stable")[: min(units_a_step, num_units - num_gone)]
        is_left[units] = False
        ranks[units] = num_gone + 1 + np.arange(units.size)
        num_gone += units.size
        products += rows.T @ rows[:, units].sum(1)
    return ranks / num_units
