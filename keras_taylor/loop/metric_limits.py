"""How much worse metrics may become: limits, and the validation data on which they hold."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_taylor.support.arguments import MovedArgument, format_value, larger_is_better
from keras_taylor.support.arrays import as_number
from keras_taylor.support.datasets import BATCH_SIZE, EndWatch, Feed, count_batches
from keras_taylor.support.replicas import check_batches
from keras_taylor.support.types import Data


@dataclasses.dataclass(frozen=True)
class MetricLimit:
    """Says how much worse a metric may become before pruning stops.

    `compress` and `TaylorPruning` take it as `max_drop`. A plain number is short for
    `MetricLimit(number)`, and a dict of numbers or limits, by the names of metrics, sets several.

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


# How much worse metrics may become: the argument `max_drop`.
MaxDrop: TypeAlias = float | MetricLimit | Mapping[str, float | MetricLimit]


def parse_metric_limits(max_drop: MaxDrop | None) -> tuple[MetricLimit, ...]:
    """Returns the limits that a user passes as `max_drop`; none for `None`.

    Raises:
        ValueError: For a dict that names no metric, or a limit in it that is about another metric.
    """
    if max_drop is None:
        return ()
    if not isinstance(max_drop, Mapping):
        return (max_drop if isinstance(max_drop, MetricLimit) else MetricLimit(max_drop),)
    if not max_drop:
        raise ValueError(
            "`max_drop` sets no limit. Expected one metric or more, such as `{'accuracy': 0.01}`, or `None`. "
            f"Received: max_drop={max_drop!r}"
        )
    return tuple(_limit_on(name, limit) for name, limit in max_drop.items())


def _limit_on(name: str, limit: float | MetricLimit) -> MetricLimit:
    """The limit on one metric of a dict."""
    if not isinstance(limit, MetricLimit):
        return MetricLimit(limit, name)
    if limit.monitor not in (None, name):
        raise ValueError(
            f"`max_drop` has a limit under {name!r} that is about another metric. Expected a limit without "
            f"`monitor`, or with the same name. Received: max_drop={{{name!r}: {limit!r}}}"
        )
    return dataclasses.replace(limit, monitor=name)


def describe_limits(limits: Sequence[MetricLimit]) -> dict[str, Any]:
    """Returns each field of the limits: its value, or a dict of values by metric if there are several."""
    names = [field.name for field in dataclasses.fields(MetricLimit)]
    if len(limits) < 2:
        return {name: getattr(limits[0], name) if limits else None for name in names}
    return {name: {one.monitor: getattr(one, name) for one in limits} for name in names}


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
        """Returns the worst value allowed; `before` are the metrics of the model before pruning."""
        worst = self.limit.worst_allowed(self.name, self.reference)
        return f"'{self.name}' is {worst:.4g} or better ({before[self.name]:.4g} now)"

    def describe_excess(self, metrics: Mapping[str, float]) -> str:
        """Returns by how much a model with these metrics is not good enough."""
        return (
            f"'{self.name}' is {metrics[self.name]:.4g}, worse than `max_drop={self.limit.max_drop}` "
            f"from {self.reference:.4g} allows"
        )


@dataclasses.dataclass(frozen=True)
class WatchedMetrics:
    """All metrics with a limit; without any, every model is good enough.

    Attributes:
        metrics: Each metric with its limit.
    """

    metrics: tuple[WatchedMetric, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.metrics)

    def broken(self, metrics: Mapping[str, float]) -> list[WatchedMetric]:
        """Returns those whose limit a model with these metrics does not keep to."""
        return [one for one in self.metrics if not one.allows(metrics)]

    def describe(self, before: Mapping[str, float]) -> str:
        """Returns a line about the limits; `before` are the metrics of the model before pruning."""
        limits = " and ".join(one.describe(before) for one in self.metrics)
        return f"on the validation data, as long as {limits}"

    def explain_undo(self, metrics: Mapping[str, float], number: int) -> str:
        """Returns why round `number` was undone, which led to these metrics."""
        excess = ", and ".join(one.describe_excess(metrics) for one in self.broken(metrics))
        return f"after round {number} {excess}: the round is undone"


class Validation:
    """Evaluates models on the validation data, and compares metrics with their limits.

    Args:
        fit_kwargs: Arguments of `fit`: "validation_data", "validation_steps" and
            "validation_batch_size" count here.
        batch_size: Examples a batch of the training; `None`: Keras' own.
        limits: How much worse metrics may become; none: any amount.

    Attributes:
        limits: As passed.
        watched: The metrics that are compared with them, once `watch` has found them.

    Raises:
        ValueError: If there is a limit, but no data that can be read more than once; for endless data without
            "validation_steps".
    """

    def __init__(
        self, fit_kwargs: Mapping[str, Any], batch_size: int | None, limits: Sequence[MetricLimit] = ()
    ) -> None:
        self.limits, self.watched = tuple(limits), WatchedMetrics()
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
        if limits and self._data is None:
            raise ValueError(
                "`max_drop` is about a metric on validation data. Expected `validation_data`, in a form "
                f"that can be read more than once. Received: max_drop={describe_limits(limits)['max_drop']!r}"
            )

    @property
    def has_data(self) -> bool:
        """Whether there is data that can be read more than once."""
        return self._data is not None

    def feed(self, model: keras.Model) -> Feed:
        """The data, as `fit` takes it."""
        return Feed(self._data, model, self._batch_size, self._steps, targets=False)

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

    def watch(self, before: Mapping[str, float]) -> WatchedMetrics:
        """Returns the metrics that are compared with their limits.

        Args:
            before: Loss and metrics of the model before pruning.

        Raises:
            ValueError: If a metric does not exist, or the model itself does not reach a baseline.
        """
        self.watched = WatchedMetrics(tuple(_watch(limit, before) for limit in self.limits))
        return self.watched


def _watch(limit: MetricLimit, before: Mapping[str, float]) -> WatchedMetric:
    """A metric with its limit; `before` are the metrics of the model before pruning."""
    name, baseline = metric_to_watch(limit, before), limit.baseline
    watched = WatchedMetric(limit, name, before[name] if baseline is None else float(baseline))
    if not watched.allows(before):
        raise ValueError(
            f"The model itself does not reach the baseline: its '{name}' on the validation data is "
            f"{before[name]:.4g}. Received: baseline={baseline!r}, max_drop={limit.max_drop!r}"
        )
    return watched


def metric_to_watch(limit: MetricLimit, metrics: Mapping[str, float]) -> str:
    """Returns the name of the metric to watch; without `monitor` the first one that is not a loss."""
    if limit.monitor is None:
        return next((name for name in metrics if not name.endswith("loss")), "loss")
    name = limit.monitor.removeprefix("val_")
    if name not in metrics:
        raise ValueError(
            f"There is no metric '{limit.monitor}' on the validation data. Expected one of "
            f"{', '.join(map(repr, metrics))}. Received: max_drop={format_value(limit)}"
        )
    return name


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
