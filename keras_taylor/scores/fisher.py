"""Units chosen together: greedy removal by the Fisher matrix of all gates (criterion `fisher`)."""

import keras
import numpy as np
from keras import ops

from keras_taylor.scores.gates import ROWS, Gates, batch_statistics
from keras_taylor.support.replicas import num_examples_before, sum_over_replicas

# Rows of derivatives that are kept, at most: one an example up to there, sums of several beyond.
_MOST_ROWS = 2048
# Numbers that the rows may hold (256 MiB in float32).
_MOST_NUMBERS = 2**26
# Steps of the greedy choice, at most: of larger networks several units go at a time.
_MOST_STEPS = 4096


class FisherGates(Gates):
    """Gates that keep the derivatives of single examples, one row each.

    More examples than there are rows are added to these with random signs (a count sketch): the
    products of two columns then still have the right mean.

    Args:
        num_units: Number of gates.
    """

    def __init__(self, num_units, **kwargs):
        self.num_rows = min(_MOST_ROWS, max(_MOST_NUMBERS // max(num_units, 1), 1))
        super().__init__(num_units, rows=ROWS + ("example",) * self.num_rows, **kwargs)
        self._seed = keras.random.SeedGenerator(0)

    def call(self, like):
        """The carrier for a batch as large as `like`."""
        batch = ops.shape(like)[0]
        mask, statistics = ops.convert_to_tensor(self.mask), ops.convert_to_tensor(self.statistics)
        signs = ops.where(keras.random.uniform((batch, 1), seed=self._seed) < 0.5, -1.0, 1.0)
        carrier = _carrier(self.num_units, self.num_rows)(mask, statistics, signs)
        return ops.concatenate([carrier, ops.ones((batch, 1), carrier.dtype)], axis=1)


def _carrier(num_units, num_rows):
    @ops.custom_gradient
    def carry(mask, statistics, signs):
        def backward(*arguments, upstream=None):
            derivative = arguments[0] if upstream is None else upstream
            batch = ops.shape(signs)[0]
            done = ops.cast(statistics[ROWS.index("examples"), 0], "int32")
            numbers = done + num_examples_before(batch) + ops.arange(batch, dtype="int32")
            places = ops.one_hot(ops.mod(numbers, num_rows), num_rows)
            rows = sum_over_replicas(ops.matmul(ops.transpose(places), signs * derivative))
            update = ops.concatenate([batch_statistics(derivative, batch, num_units), rows])
            return ops.zeros_like(mask), statistics + update, ops.zeros_like(signs)

        return ops.broadcast_to(mask, (ops.shape(signs)[0], num_units)), backward

    return carry


def removal_ranks(totals, saved):
    """When each unit goes, if the next is always the one that adds least loss for what it saves.

    To second order, with the Fisher matrix F (mean over examples of g gᵀ) in the place of the Hessian and
    without the first order, which a trained network has little of, removing the units s (a vector of
    zeros and ones) costs s F s / 2. A unit that goes after others adds half its diagonal and its row's sum
    over those; `taylor` is the diagonal alone.

    Args:
        totals: Statistics of `FisherGates`, a float64 array `(num_rows, num_units)`.
        saved: What each unit saves, `(num_units,)`.

    Returns:
        An array `(num_units,)`: 1 for the one that goes last, just above 0 for the first.
    """
    num_examples = totals[ROWS.index("examples"), 0]
    rows = (totals[len(ROWS) :] / np.sqrt(num_examples)).astype(np.float32)
    rows = rows[np.any(rows, axis=1)]
    alone = totals[ROWS.index("square")] / num_examples / 2
    together, left = np.zeros(saved.size), np.ones(saved.size, bool)
    ranks, gone = np.zeros(saved.size), 0
    at_a_time = -(-saved.size // _MOST_STEPS)
    while gone < saved.size:
        adds = alone + together
        prices = np.where(left, np.where(adds > 0, adds / saved, adds * saved), np.inf)
        units = np.argsort(prices, kind="stable")[: min(at_a_time, saved.size - gone)]
        left[units] = False
        ranks[units] = gone + 1 + np.arange(units.size)
        gone += units.size
        together += rows.T @ rows[:, units].sum(1)
    return ranks / saved.size
