"""What a model is worth on examples that it is not trained on, and which of its states is kept."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import keras
import numpy as np

from keras_taylor.cutting.surgery import copy_model
from keras_taylor.loop.metric_limits import Validation, metric_to_watch
from keras_taylor.loop.round_scores import share_of_trained
from keras_taylor.reports.run_record import ON_VALIDATION_DATA, JudgedRecord
from keras_taylor.scores.losses import OutputLabels, example_divergences
from keras_taylor.support.arrays import as_number
from keras_taylor.support.datasets import BATCH_SIZE, Batch, Feed
from keras_taylor.support.optimizers import ModelState
from keras_taylor.support.replicas import num_processes
from keras_taylor.support.types import Array, FloatArray

# Examples that are held out where there is no validation data: share of all, least, most; and never more
# than this part of all.
_HELD_OUT, _MOST_HELD_OUT = (1 / 20, 128, 1024), 1 / 10
_MIN_HELD_OUT = 2  # one example does not tell how sure its value is
_CLEARLY = 3  # standard errors


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
            self.measure = metric_to_watch(limits[0], metrics)
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
        if len(gains) == 1 and gains[0] == 0:  # a metric that counts is often the same: the loss decides
            return last.metrics.get("loss", math.inf) < best.metrics.get("loss", math.inf)
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
