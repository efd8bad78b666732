"""What a model is worth on examples that it is not trained on: which state is kept, when a run ends."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import keras
import numpy as np

from keras_taylor.cutting.surgery import copy_model
from keras_taylor.loop.round_scores import share_of_trained
from keras_taylor.reports.run_record import ON_VALIDATION_DATA, JudgedRecord
from keras_taylor.scores.losses import OutputLabels, example_divergences
from keras_taylor.support.arguments import MovedArgument, format_value, larger_is_better
from keras_taylor.support.arrays import as_number
from keras_taylor.support.datasets import BATCH_SIZE, Batch, EndWatch, Feed, count_batches
from keras_taylor.support.optimizers import ModelState
from keras_taylor.support.replicas import check_batches, num_processes
from keras_taylor.support.types import Array, Data, FloatArray

# Examples that are held out where there is no validation data: share of all, least, most; and never more
# than this part of all.
_HELD_OUT, _MOST_HELD_OUT = (1 / 20, 128, 1024), 1 / 10
_MIN_HELD_OUT = 2  # one example does not tell how sure its value is
_CLEARLY = 3  # standard errors


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
    name, baseline = _metric_to_watch(limit, before), limit.baseline
    watched = WatchedMetric(limit, name, before[name] if baseline is None else float(baseline))
    if not watched.allows(before):
        raise ValueError(
            f"The model itself does not reach the baseline: its '{name}' on the validation data is "
            f"{before[name]:.4g}. Received: baseline={baseline!r}, max_drop={limit.max_drop!r}"
        )
    return watched


def _metric_to_watch(limit: MetricLimit, metrics: Mapping[str, float]) -> str:
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


class Assessment(NamedTuple):
    """What a judge finds of one state of a model.

    Attributes:
        metrics: Name -> value.
        penalties: What states are compared by, smaller is better: for each example, or one value.
    """

    metrics: dict[str, float]
    penalties: FloatArray


class Judge(Protocol):
    """Compares states of a model on examples that it is not trained on."""

    @property
    def measure(self) -> str:
        """The name of the metric that states are compared by."""

    @property
    def examples(self) -> str:
        """The examples, in words."""

    def assess(self, model: keras.Model, logs: Mapping[str, float] | None = None) -> Assessment:
        """Judges a model as it is.

        Args:
            model: The model.
            logs: What `fit` found of it at the end of an epoch; `None`: nothing.
        """

    def of_examples(self) -> "HeldOutJudge":
        """A judge of single examples, not of more than some hundred."""


class MetricJudge:
    """Compares the metric with a limit on the validation data, or else the loss.

    With several limits the loss counts as well, of states that keep to all of them.

    Args:
        validation: Evaluates models; it has data.
        given: The model before pruning, compiled.
    """

    examples = ON_VALIDATION_DATA

    def __init__(self, validation: Validation, given: keras.Model) -> None:
        self._validation, self._given = validation, given
        self.measure = "loss"

    def of_examples(self) -> "HeldOutJudge":
        """See `Judge`."""
        return self._of_examples

    @functools.cached_property
    def _of_examples(self) -> "HeldOutJudge":
        feed = self._validation.feed(self._given)
        num = min(feed.num_examples or _HELD_OUT[2], _HELD_OUT[2])
        examples = f"{num} examples of the validation data"
        return HeldOutJudge(self._given, feed.as_arrays(num), feed.batch_size or BATCH_SIZE, examples)

    def assess(self, model: keras.Model, logs: Mapping[str, float] | None = None) -> Assessment:
        """See `Judge`."""
        prefix = "val_"
        metrics = {
            name.removeprefix(prefix): as_number(value)
            for name, value in (logs or {}).items()
            if name.startswith(prefix)
        }
        if not metrics:
            metrics = self._validation.evaluate(model)
        sign, limits = -1, self._validation.limits
        if len(limits) == 1:
            self.measure = _metric_to_watch(limits[0], metrics)
            sign = limits[0].direction(self.measure)
        elif self._validation.watched.broken(metrics):
            return Assessment(metrics, np.array([math.inf]))
        return Assessment(metrics, np.array([-sign * metrics[self.measure]]))


class HeldOutJudge:
    """Compares models on held-out examples: by the loss, or by how far they are from the given model.

    The loss counts if the labels fit the given model's predictions clearly better than when they are shuffled
    among the examples. Labels for which that does not hold are noise to this model. Then, and without labels,
    the divergence from the given model's predictions counts.

    Args:
        given: The model before pruning, compiled.
        arrays: `(x, y, sample_weight)` of the examples, in the structures that `fit` takes.
        batch_size: Examples in a batch.
        examples: The examples, in words.
    """

    def __init__(self, given: keras.Model, arrays: Batch, batch_size: int, examples: str) -> None:
        x, y, weights = arrays
        self.examples = examples
        self._num_examples = num = len(keras.tree.flatten(x)[0])
        rows = np.resize(np.arange(num), -(-num // batch_size) * batch_size)  # all batches have one size
        self._x, self._batch_size = keras.tree.map_structure(lambda part: part[rows], x), batch_size
        self._wanted = self._predict(copy_model(given))
        self._labels = OutputLabels(given, y, weights, len(self._wanted))
        order = np.random.default_rng(0).permutation(num)
        shuffled = self._labels.losses([one[order] for one in self._wanted])
        growth = shuffled - self._labels.losses(self._wanted)
        self.measure = "loss" if growth.mean() > _CLEARLY * standard_error(growth) else "divergence"

    def of_examples(self) -> "HeldOutJudge":
        """See `Judge`."""
        return self

    def assess(self, model: keras.Model, logs: Mapping[str, float] | None = None) -> Assessment:
        """See `Judge`."""
        predicted = self._predict(model)
        found = {"divergence": example_divergences(model, self._wanted, predicted)}
        if self.measure == "loss":
            found["loss"] = self._labels.losses(predicted)
        return Assessment({name: float(values.mean()) for name, values in found.items()}, found[self.measure])

    def _predict(self, model: keras.Model) -> list[Array]:
        outputs = model.predict(self._x, batch_size=self._batch_size, verbose=0)
        return [y[: self._num_examples] for y in keras.tree.flatten(outputs)]


def standard_error(values: FloatArray) -> float:
    """The standard error of the mean; infinite for one value."""
    return float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.inf


class BestState(keras.callbacks.Callback):
    """Judges a model before `fit` and after each epoch, and remembers the best state.

    It has to be the last callback: the state after the last epoch is what all others leave.

    Args:
        judge: Compares states.
        model: The compiled model that is trained, perhaps inside of another one.
        reads_logs: Whether what `fit` says of the validation data is about this model.
    """

    def __init__(self, judge: Judge, model: keras.Model, reads_logs: bool = True) -> None:
        super().__init__()
        self._judge, self._network, self._reads_logs = judge, model, reads_logs
        self._found = [judge.assess(model)]
        self._best, self._state = 0, ModelState(model)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Judges the state, unless `finish` will."""
        if epoch + 1 < self.params["epochs"] and not self.model.stop_training:
            self._judge_state(logs if self._reads_logs else None)

    def finish(self, failure: str = "") -> JudgedRecord:
        """Restores the best state.

        Args:
            failure: Why the last state cannot be used; empty if it can.
        """
        if not failure:
            self._judge_state()
        if failure or self._best < len(self._found) - 1:
            self._state.restore()
        return {
            "epoch": self._best,
            "measure": self._judge.measure,
            "examples": self._judge.examples,
            "metrics": [one.metrics for one in self._found],
            "reason": failure or self._why_untrained(),
        }

    def _why_untrained(self) -> str:
        if self._best:
            return ""
        gained = self._found[-1].penalties.mean() < self._found[0].penalties.mean()
        return "no clear gain by training" if gained else "training did not help"

    def _judge_state(self, logs: Mapping[str, Any] | None = None) -> None:
        self._found.append(self._judge.assess(self._network, logs))
        if self._is_best():
            self._best, self._state = len(self._found) - 1, ModelState(self._network)

    def _is_best(self) -> bool:
        """Whether the last state is better than the best one.

        Training is to show that it helps. The state before it is the best one unless the mean gain is larger
        than half of its standard error, and than more of it where few examples could mislead.
        """
        best, last = self._found[self._best], self._found[-1]
        if np.isinf(best.penalties).all() and np.isinf(last.penalties).all():  # neither keeps to the limits
            return last.metrics[self._judge.measure] < best.metrics[self._judge.measure]
        gains = best.penalties - last.penalties
        if self._best > 0 or len(gains) == 1:
            return bool(gains.mean() > 0)
        return bool(gains.mean() > max(0.5, 4 / len(gains) ** 0.5) * standard_error(gains))


class JudgedTraining(NamedTuple):
    """How training is judged, and on what it trains then.

    Attributes:
        feed: The training data, without the examples that are held out.
        judge: Compares states; `None`: nobody does.
        obstacle: Why nobody can, in words, so that training had better not be; empty if there is no such
            reason.
    """

    feed: Feed
    judge: Judge | None
    obstacle: str = ""


def judge_training(given: keras.Model, feed: Feed, validation: Validation) -> JudgedTraining:
    """Returns how training is judged: by a metric on the validation data, or on examples that are held out.

    Of arrays random rows are held out, always the same ones for the same data: a twentieth of all, but at
    least 128, at most 1024, and never more than a tenth. Of data sets the judge gets copies of as many
    examples of the first batches, which stay in the training data.

    Args:
        given: The model before pruning.
        feed: The training data.
        validation: Evaluates models on the validation data, if there is any.
    """
    if validation.has_data:
        return JudgedTraining(feed, MetricJudge(validation, given))
    if num_processes() > 1:
        return JudgedTraining(feed, None)  # each would hold out examples of its own
    num, total = share_of_trained(feed.num_examples, *_HELD_OUT), feed.num_examples
    if total is not None:
        num = min(num, int(total * _MOST_HELD_OUT))
    if num < _MIN_HELD_OUT:
        return JudgedTraining(feed, None, f"of {total} examples at most {num} can be held out")
    size = feed.batch_size or BATCH_SIZE
    if not feed.holds_arrays or total is None:
        arrays, examples = feed.as_arrays(num), f"{num} examples of the first batches"
        return JudgedTraining(feed, HeldOutJudge(given, arrays, size, examples))
    while num > _MIN_HELD_OUT and not _can_be_shared(feed, total - num):
        num -= 1
    rest, held_out = feed.split(np.random.default_rng(0).permutation(total)[:num])
    judge = HeldOutJudge(given, held_out.as_arrays(), size, f"{num} held-out examples")
    return JudgedTraining(rest, judge)


def _can_be_shared(feed: Feed, num_examples: int) -> bool:
    """Whether the devices can share batches of this number of examples."""
    try:
        feed.check_devices(num_examples)
    except ValueError:
        return False
    return True
