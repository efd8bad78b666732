"""The gate layer, and the statistics that it gathers from the derivatives of its gates."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_taylor.support.replicas import num_replicas, sum_over_replicas
from keras_taylor.support.types import Tensor


@dataclasses.dataclass(frozen=True)
class GateStatistic:
    """One row of the statistics: a sum of a function of g, the derivative of an example's loss by a gate.

    Attributes:
        name: Its name.
        loss_power: A loss that is S times as large makes the row S ** loss_power times as large.
    """

    name: str
    loss_power: int


GATE_STATISTICS = (
    GateStatistic("sum", 1),  # over examples, of g
    GateStatistic("absolute", 1),  # over examples, of abs(g)
    GateStatistic("square", 2),  # over examples, of g^2
    GateStatistic("batch_square", 2),  # over batches, of (mean of g over the batch)^2
    GateStatistic("examples", 0),  # how many examples
    GateStatistic("batches", 0),  # how many batches
)
# The row of each statistic, by name.
GATE_ROWS = {statistic.name: row for row, statistic in enumerate(GATE_STATISTICS)}


class Gates(keras.layers.Layer):
    """One gate for each channel unit, and the statistics of its derivatives.

    Called on a tensor whose first axis is the batch, it returns the carrier: the mask, one row an
    example, shape `(batch, num_units + 1)`, float32. The last column is 1, for channels without a gate.
    In the backward pass the carrier receives each example's derivative by each gate. The gradient of
    `statistics` is its old value plus this batch's rows; a Keras optimizer assigns it to the variable.

    Subclasses gather more: they override `draw`, `carrier_values` and `batch_rows`.

    Args:
        num_units: Number of gates.
        num_rows: Number of rows of the statistics, those of `GATE_STATISTICS` first.

    Attributes:
        averaged: Whether the loss is the mean over the batch. What arrives is then each example's
            derivative divided by their number. Read when a step is traced.
    """

    def __init__(self, num_units: int, num_rows: int = len(GATE_STATISTICS), **kwargs: Any) -> None:
        super().__init__(dtype="float32", **kwargs)
        self.num_units = num_units
        self.averaged = False
        self.mask = self.add_weight(
            shape=(num_units,), initializer="ones", trainable=False, autocast=False, name="mask"
        )
        self.statistics = self.add_weight(
            shape=(num_rows, num_units),
            initializer="zeros",
            autocast=False,
            overwrite_with_gradient=True,
            aggregation="only_first_replica",  # the same in all: `batch_statistics` adds up
            name="statistics",
        )
        self.built = True

    def call(self, like: Tensor) -> Tensor:
        """The carrier for a batch as large as `like`."""
        batch_size = ops.shape(like)[0]
        mask, statistics = ops.convert_to_tensor(self.mask), ops.convert_to_tensor(self.statistics)

        @ops.custom_gradient
        def carry(mask: Tensor, statistics: Tensor, *draws: Tensor) -> Any:
            def backward(*arguments: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
                derivative = arguments[0] if upstream is None else upstream
                updated = statistics + self.batch_rows(derivative, statistics, *draws)
                return ops.zeros_like(mask), updated, *(ops.zeros_like(draw) for draw in draws)

            return self.carrier_values(mask, batch_size, *draws), backward

        carrier = carry(mask, statistics, *self.draw(batch_size))
        return ops.concatenate([carrier, ops.ones((batch_size, 1), carrier.dtype)], axis=1)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads mask and statistics from a file; gates that are closed stay closed."""
        with self.closed_gates_kept():
            super().load_own_variables(store)

    @contextlib.contextmanager
    def closed_gates_kept(self) -> Iterator[None]:
        """A context in which weights may be restored: the gates that are closed stay closed.

        Restored weights hold the mask of the time when they were saved. Only an assignment to
        `GatedModel.mask` opens gates.
        """
        closed = ops.convert_to_numpy(self.mask) == 0
        yield
        mask = ops.convert_to_numpy(self.mask)
        num_opened = int((mask[closed] != 0).sum())
        if num_opened:
            self.mask.assign(np.where(closed, 0, mask))
            warnings.warn(
                f"The restored weights are from before {num_opened} of the pruned units left. These units "
                "stay pruned, and the weights were not trained without them: train on, or evaluate first. "
                "To have the units back, assign to `mask`.",
                stacklevel=4,
            )

    def draw(self, batch_size: int | Tensor) -> tuple[Tensor, ...]:
        """Random tensors for one batch, which `carrier_values` and `batch_rows` receive: none here."""
        return ()

    def carrier_values(self, mask: Tensor, batch_size: int | Tensor, *draws: Tensor) -> Tensor:
        """The carrier without its last column, shape `(batch, num_units)`."""
        return ops.broadcast_to(mask, (batch_size, self.num_units))

    def batch_rows(self, derivative: Tensor, statistics: Tensor, *draws: Tensor) -> Tensor:
        """All rows for one batch, from the derivatives that arrived at the carrier."""
        if self.averaged:
            num_examples = ops.shape(derivative)[0] * num_replicas()
            derivative = derivative * ops.cast(num_examples, derivative.dtype)
        return batch_statistics(derivative, self.num_units)


def batch_statistics(derivative: Tensor, num_units: int) -> Tensor:
    """The rows of `GATE_STATISTICS` for one batch, on all replicas together.

    Args:
        derivative: Each example's derivative by each gate, `(batch, num_units)`.
        num_units: Number of gates.
    """
    ones = ops.ones((num_units,), derivative.dtype)
    sums = {
        "sum": ops.sum(derivative, 0),
        "absolute": ops.sum(ops.abs(derivative), 0),
        "square": ops.sum(ops.square(derivative), 0),
        "examples": ones * ops.cast(ops.shape(derivative)[0], derivative.dtype),
    }
    totals = ops.unstack(sum_over_replicas(ops.stack(list(sums.values()))), len(sums))
    rows = dict(zip(sums, totals, strict=True))
    rows["batch_square"] = ops.square(rows["sum"] / rows["examples"])
    rows["batches"] = ones
    return ops.stack([rows[statistic.name] for statistic in GATE_STATISTICS])
