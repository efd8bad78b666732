"""Judges the models of a run on validation data."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_taylor.loop.metric_limit import MetricLimit
from keras_taylor.support.datasets import BATCH_SIZE
from keras_taylor.support.replicas import check_batches
from keras_taylor.support.types import Data


@dataclasses.dataclass(frozen=True)
class WatchedMetric:
    """A metric on the validation data, the limit that it must keep to, and the value to compare with.

    Attributes:
        limit: How much worse the metric may become.
        name: Name of the metric, as `evaluate` returns it.
        reference: Value of the metric to compare with.
    """

    limit: MetricLimit
    name: str
    reference: float

    def allows(self, metrics: Mapping[str, float]) -> bool:
        """Returns whether a model with these metrics is good enough."""
        return self.limit.allows(self.name, metrics[self.name], self.reference)

    def describe(self, before: Mapping[str, float]) -> str:
        """Returns a line that says what is watched; `before` are the metrics of the model before pruning."""
        worst = self.limit.worst_allowed(self.name, self.reference)
        return (
            f"as long as '{self.name}' is {worst:.4g} or better on the validation data "
            f"({before[self.name]:.4g} now)"
        )

    def explain_undo(self, metrics: Mapping[str, float], number: int) -> str:
        """Returns why round `number` was undone, which led to these metrics."""
        return (
            f"after round {number} '{self.name}' is {metrics[self.name]:.4g}, worse than "
            f"`max_drop={self.limit.max_drop}` from {self.reference:.4g} allows: the round is undone"
        )


class Validation:
    """Evaluates models on the validation data, and compares a metric with its limit.

    Args:
        fit_kwargs: Arguments of `fit`: "validation_data", "validation_steps" and
            "validation_batch_size" count here.
        batch_size: Examples a batch of the training; `None`: Keras' own.
        limit: How much worse a metric may become; `None`: any amount.

    Attributes:
        limit: As passed.

    Raises:
        ValueError: If there is a limit, but no data that can be read more than once.
    """

    def __init__(
        self, fit_kwargs: Mapping[str, Any], batch_size: int | None, limit: MetricLimit | None = None
    ) -> None:
        self.limit = limit
        self._data: Data = fit_kwargs.get("validation_data")
        if isinstance(self._data, Iterator):  # can be read only once
            self._data = None
        self._batch_size = fit_kwargs.get("validation_batch_size") or batch_size
        self._steps = fit_kwargs.get("validation_steps")
        if isinstance(self._data, tuple) and self._steps is None:
            num_examples = len(keras.tree.flatten(self._data[0])[0])
            check_batches(num_examples, self._batch_size or BATCH_SIZE, "validation_data")
        if limit is not None and self._data is None:
            raise ValueError(
                "`max_drop` is about a metric on validation data. Expected `validation_data`, in a form "
                f"that can be read more than once. Received: max_drop={limit.max_drop!r}"
            )

    def evaluate(self, model: keras.Model) -> dict[str, float]:
        """Returns the loss and the metrics of a model; empty without data."""
        if self._data is None:
            return {}
        if isinstance(self._data, tuple):
            x, y, weight = keras.utils.unpack_x_y_sample_weight(self._data)
            arguments = {"x": x, "y": y, "sample_weight": weight, "batch_size": self._batch_size}
        else:
            arguments = {"x": self._data}
        values = model.evaluate(**arguments, steps=self._steps, verbose=0, return_dict=True)
        return {name: float(value) for name, value in values.items()}

    def watch(self, before: Mapping[str, float]) -> WatchedMetric | None:
        """Returns the metric that is compared with its limit; `None` without a limit.

        Args:
            before: Loss and metrics of the model before pruning.

        Raises:
            ValueError: If the metric does not exist, or the model itself does not reach the baseline.
        """
        if self.limit is None:
            return None
        name = _metric_to_watch(self.limit.monitor, before)
        baseline = self.limit.baseline
        watched = WatchedMetric(self.limit, name, before[name] if baseline is None else float(baseline))
        if not watched.allows(before):
            raise ValueError(
                f"The model itself does not reach the baseline: its '{name}' on the validation data is "
                f"{before[name]:.4g}. Received: baseline={baseline!r}, max_drop={self.limit.max_drop!r}"
            )
        return watched


def _metric_to_watch(monitor: str | None, metrics: Mapping[str, float]) -> str:
    """Returns the name of the metric to watch; without `monitor` the first one that is not a loss."""
    if monitor is None:
        return next((name for name in metrics if not name.endswith("loss")), "loss")
    name = monitor.removeprefix("val_")
    if name not in metrics:
        raise ValueError(
            f"There is no metric '{monitor}' on the validation data. Expected one of "
            f"{', '.join(map(repr, metrics))}. Received: monitor={monitor!r}"
        )
    return name
