"""What validation data says of the models of a run, and what its metric may lose."""

from collections.abc import Iterator

import keras

from keras_taylor.loop.fine_tuning import evaluate
from keras_taylor.loop.metric_limit import MetricLimit
from keras_taylor.support.datasets import BATCH_SIZE
from keras_taylor.support.replicas import check_batches


class Validation:
    """Evaluates models on the validation data, and holds a metric against its limit.

    Args:
        fit_kwargs: What `fit` is called with: "validation_data", "validation_steps" and
            "validation_batch_size" count here.
        batch_size: Of the training; `None`: Keras' own.
        max_drop, monitor, baseline: As in `compress`.

    Attributes:
        limited: Whether there is a limit.

    Raises:
        ValueError: for a limit that is none, or one without data that can be read again and again.
    """

    def __init__(self, fit_kwargs, batch_size, max_drop=None, monitor=None, baseline=None):
        self._data = fit_kwargs.get("validation_data")
        if isinstance(self._data, Iterator):  # can be read only once
            self._data = None
        self._size = fit_kwargs.get("validation_batch_size") or batch_size
        self._steps = fit_kwargs.get("validation_steps")
        if isinstance(self._data, tuple) and self._steps is None:
            num_examples = len(keras.tree.flatten(self._data[0])[0])
            check_batches(num_examples, self._size or BATCH_SIZE, "validation_data")
        MetricLimit(max_drop, monitor or "")  # refuses what is none
        self._max_drop, self._monitor, self._baseline = max_drop, monitor, baseline
        self.limited = max_drop is not None
        if self.limited and self._data is None:
            raise ValueError(
                "`max_drop` is about a metric on validation data. Expected `validation_data`, in a form "
                f"that can be read more than once. Received: max_drop={max_drop!r}"
            )
        if not self.limited and (monitor, baseline) != (None, None):
            raise ValueError(
                "`monitor` and `baseline` belong to `max_drop`, which is not there. Expected a number, 0 for "
                f"a metric that may not fall. Received: monitor={monitor!r}, baseline={baseline!r}"
            )

    def metrics(self, model):
        """Loss and metrics, a dict of floats; empty without data."""
        if self._data is None:
            return {}
        return evaluate(model, self._data, self._size, self._steps)

    def watch(self, before):
        """Takes the metrics of the whole model as what others are held against.

        Returns:
            A line that says what is watched, `None` without a limit.

        Raises:
            ValueError: for a metric that is not there, or that the whole model does not reach.
        """
        if not self.limited:
            return None
        name = _watched(self._monitor, before)
        self._limit = MetricLimit(self._max_drop, name)
        self._reference = before[name] if self._baseline is None else float(self._baseline)
        if not self.holds(before):
            raise ValueError(
                f"The model itself does not reach the baseline: its '{name}' on the validation data is "
                f"{before[name]:.4g}. Received: baseline={self._baseline!r}, max_drop={self._max_drop!r}"
            )
        worst = self._reference - self._limit.sign * self._max_drop
        return f"as long as '{name}' is {worst:.4g} or better on the validation data ({before[name]:.4g} now)"

    def holds(self, metrics):
        """Whether a model with these metrics is good enough."""
        return not self.limited or self._limit.holds(metrics[self._limit.monitor], self._reference)

    def complaint(self, metrics, number):
        """Why a round was undone."""
        name = self._limit.monitor
        return (
            f"after round {number} '{name}' is {metrics[name]:.4g}, worse than "
            f"`max_drop={self._max_drop}` from {self._reference:.4g} allows: the round is undone"
        )


def _watched(monitor, metrics):
    """The name of the metric to watch: by default the first one beside the loss."""
    if monitor is None:
        return next((name for name in metrics if not name.endswith("loss")), "loss")
    name = monitor.removeprefix("val_")
    if name not in metrics:
        raise ValueError(
            f"There is no metric '{monitor}' on the validation data. Expected one of "
            f"{', '.join(map(repr, metrics))}. Received: monitor={monitor!r}"
        )
    return name
