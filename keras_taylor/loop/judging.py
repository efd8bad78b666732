"""What a model is worth on validation data, and how much worse a metric may become."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_taylor.support.arguments import MovedArgument, larger_is_better
from keras_taylor.support.arrays import as_number
from keras_taylor.support.datasets import BATCH_SIZE, EndWatch, count_batches
from keras_taylor.support.replicas import check_batches
from keras_taylor.support.types import Data


@dataclasses.dataclass(frozen=True)
class MetricLimit:
    """Says how much worse a metric may become before pruning stops.

    `compress` and `TaylorPruning` take it as `max_drop`. A plain number is short for
    `MetricLimit(number)`.

    Args:
        max_drop: How much worse the metric may be than the reference, in the metric's own unit: 0.01 of
            an accuracy is one percentage point. A float of 0 or more.
        monitor: Name of the metric, such as "accuracy" or "val_accuracy". `None`: `compress` takes the
            first metric that the model is compiled with, or the loss if there is none; `TaylorPruning`
            takes "val_accuracy". Of a metric with several values, such as `F1Score()`, their mean counts.
        baseline: The reference, a float. `None`: the metric of the model before pruning.
            `MetricLimit(0, baseline=0.9)` is a floor of 0.9.
        mode: "max" if larger values are better, "min" if smaller ones are. "auto": "max" for accuracies,
            AUC, precision, recall, F-scores, IoU, Dice and R2, which it knows by their names; "min" for
            every other metric.

    Raises:
        ValueError: If `max_drop` is not a number of 0 or more, `monitor` is not a name, `baseline` is not
            a finite number, or `mode` is unknown.

    Example:

    >>> limit = keras_taylor.MetricLimit(0.01, monitor="accuracy")
    >>> limit.allows("accuracy", 0.895, reference=0.9)
    True
    >>> validation = {"max_drop": limit, "validation_data": (x_val, y_val)}
    >>> small = keras_taylor.compress(model, (x, y), goal=None, increment=0.3, **validation)
    """

    max_drop: float
    monitor: str | None = None
    baseline: float | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        if not _is_number(self.max_drop) or not self.max_drop >= 0:
            raise ValueError(f"`max_drop` is a number from 0 on. Received: max_drop={self.max_drop!r}")
        if self.monitor is not None and not (isinstance(self.monitor, str) and self.monitor):
            raise ValueError(f"`monitor` is the name of a metric. Received: monitor={self.monitor!r}")
        if self.baseline is not None and not (_is_number(self.baseline) and math.isfinite(self.baseline)):
            raise ValueError(
                "`baseline` is the value of the metric to compare with. Expected a finite number. "
                f"Received: baseline={self.baseline!r}"
            )
        if self.mode not in ("auto", "min", "max"):
            raise ValueError(f'Expected "auto", "min" or "max". Received: mode={self.mode!r}')

    def direction(self, name: str) -> int:
        """Returns which values of a metric are better.

        Args:
            name: Name of the metric. It counts only if `mode` is "auto".

        Returns:
            1 if larger values are better, -1 if smaller ones are.
        """
        if self.mode != "auto":
            return 1 if self.mode == "max" else -1
        return 1 if larger_is_better(name) else -1

    def worst_allowed(self, name: str, reference: float) -> float:
        """Returns the worst value that the limit allows.

        Args:
            name: Name of the metric.
            reference: Value of the metric to compare with.

        Returns:
            A float, `max_drop` worse than the reference.
        """
        return reference - self.direction(name) * self.max_drop

    def allows(self, name: str, value: float, reference: float) -> bool:
        """Returns whether a value is good enough.

        Args:
            name: Name of the metric.
            value: Value of the metric. NaN is never good enough.
            reference: Value of the metric to compare with.
        """
        sign = self.direction(name)
        return bool(sign * value >= sign * reference - self.max_drop)


class BestEpochs:
    """Makes callbacks forget the best epoch so far.

    Args:
        callbacks: What `fit` takes. `EarlyStopping`, `ModelCheckpoint`, `ReduceLROnPlateau` and callbacks
            with the same attributes remember a best epoch.
    """

    def __init__(self, callbacks: Any) -> None:
        flat = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))  # a `CallbackList` has a list
        self._monitoring = [one for one in flat if hasattr(one, "monitor") and hasattr(one, "best")]
        # the best value of one that never ran is a threshold of the user's
        self._thresholds = [one.best if one.params is None else None for one in self._monitoring]

    def forget(self) -> None:
        """Lets all of them begin anew."""
        for callback, threshold in zip(self._monitoring, self._thresholds, strict=True):
            begin = {"best": threshold, "best_weights": None, "wait": 0}
            for name in begin.keys() & vars(callback).keys():
                setattr(callback, name, begin[name])


def parse_metric_limit(max_drop: float | MetricLimit | None) -> MetricLimit | None:
    """Returns the `MetricLimit` that a user passes as `max_drop`, a number or a limit; `None`: no limit."""
    return max_drop if max_drop is None or isinstance(max_drop, MetricLimit) else MetricLimit(max_drop)


# Arguments of earlier versions that are fields of a `MetricLimit` now.
MOVED_TO_LIMIT = {
    field.name: MovedArgument("max_drop", MetricLimit, field.name)
    for field in dataclasses.fields(MetricLimit)[1:]
}


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
        """Returns a line about the watched metric; `before` are the metrics of the model before pruning."""
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
        ValueError: If there is a limit, but no data that can be read more than once; for endless data without
            "validation_steps".
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
        num_batches = 0 if self._steps or isinstance(self._data, tuple) else count_batches(self._data)
        if num_batches == math.inf:
            raise ValueError(
                "`validation_data` is endless, and all of it would be read. Pass `validation_steps`, or a "
                f"part of it. Received: validation_data={self._data!r}, validation_steps=None"
            )
        self._callbacks = [EndWatch(BATCH_SIZE)] if num_batches is None else []
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
        options = {"steps": self._steps, "callbacks": self._callbacks, "verbose": 0, "return_dict": True}
        values = model.evaluate(**arguments, **options)
        return {name: as_number(value) for name, value in values.items()}

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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
