"""Pruning inside the user's own `fit`."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_taylor.budget.goals import parse_goal
from keras_taylor.budget.schedule import removal_schedule
from keras_taylor.loop.metric_limits import (
    MOVED_TO_LIMIT,
    MaxDrop,
    MetricLimit,
    describe_limits,
    parse_metric_limits,
)
from keras_taylor.loop.wrapper import PrunableModel, check_momentum
from keras_taylor.support.arguments import refuse_moved_arguments
from keras_taylor.support.arrays import as_number
from keras_taylor.support.console import Reporter
from keras_taylor.support.types import Array

Logs: TypeAlias = dict[str, Any]
Schedule: TypeAlias = str | Callable[[float], float]


class TaylorPruning(keras.callbacks.Callback):
    """Prunes a `PrunableModel` while `fit` trains it.

    Scores gather while the model trains. Between epochs, or every few steps, the callback closes the gates
    of the least important units, until the goal is met. The last epochs are left for recovery. At the end
    of each epoch, `logs` get "params", "flops" and "units" (what is left), for `History` and for all
    callbacks that come later, such as `CSVLogger` and `TensorBoard`. So put this callback first.

    Whenever units leave, callbacks that remember the best epoch (`EarlyStopping`, `ModelCheckpoint`,
    `ReduceLROnPlateau`) begin their comparison anew, so that no epoch with more units is the best one.
    `EarlyStopping` can still end the training before the goal: `start_from_epoch` lets it wait.

    Args:
        goal: A float: the fraction of the parameters to remove, counted from the model before any pruning,
            0.3 by default. Or a dict of costs, as in `make_plan`.
        start_epoch: Number of epochs before the first pruning, 0 by default. With `frequency="epoch"` at
            least one epoch passes, since scores come from it.
        frequency: "epoch" (the default) prunes between epochs. An int prunes every so many training steps;
            Molchanov et al. (CVPR 2019, arXiv 1906.10771) prune every 30.
        schedule: How the goal is approached: "linear", "cubic" (the default; Zhu and Gupta, arXiv
            1710.01878), "exponential", or a function from the part of the time that is over (above 0, at
            most 1) to the part of the goal that is met by then.
        momentum: The weight that older statistics keep at each pruning, from 0 (the default) to below 1.
            The code of the 2019 paper uses 0.9.
        recovery_epochs: Number of epochs at the end without pruning. `None` (the default): a quarter of
            all epochs, rounded down, and at least one with `frequency="epoch"`.
        max_drop: How much worse a metric may become, a float or a `keras_taylor.MetricLimit`; a float
            watches "val_accuracy". A dict sets a limit for each metric that it names: `{"val_digit_accuracy":
            0.01, "val_loss": 0.1}`. Pruning pauses while a metric is worse. At the end the smallest state
            that kept to the limits is restored. The reference is the metric at the end of the last epoch
            before anything was pruned, unless the limit has a `baseline`. `None` (the default): no limit.
        verbose: 1 prints a line after each pruning between epochs and at the end, 0 (the default) none.

    Attributes:
        stop_reason: After training: why it ended as it did, a string.

    Raises:
        ValueError: if an argument is not one of the above.
        TypeError: if `monitor`, `mode` or `baseline` is passed by itself; they are part of a `MetricLimit`.

    Example:

    >>> prunable = keras_taylor.PrunableModel(model)
    >>> callback = keras_taylor.TaylorPruning(goal=0.3)
    >>> history = prunable.fit(x, y, epochs=4, callbacks=[callback], verbose=0)
    >>> small = prunable.strip()
    """

    def __init__(
        self,
        goal: float | Mapping[str, float | int] = 0.3,
        *,
        start_epoch: int = 0,
        frequency: int | str = "epoch",
        schedule: Schedule = "cubic",
        momentum: float = 0.0,
        recovery_epochs: int | None = None,
        max_drop: MaxDrop | None = None,
        verbose: int = 0,
        **others: Any,
    ) -> None:
        super().__init__()
        refuse_moved_arguments("TaylorPruning", others, MOVED_TO_LIMIT, {"max_drop": max_drop})
        self._goal = parse_goal(goal)
        removal_schedule(schedule, 1.0)  # refuses an unknown schedule
        check_momentum(momentum)
        _check_whole_number("start_epoch", start_epoch, 0)
        if recovery_epochs is not None:
            _check_whole_number("recovery_epochs", recovery_epochs, 0)
        if frequency != "epoch":
            _check_whole_number("frequency", frequency, 1, ' of steps, or "epoch"')
        self._by_epoch = frequency == "epoch"
        self.goal, self.start_epoch, self.frequency, self.schedule = goal, start_epoch, frequency, schedule
        self.momentum, self.recovery_epochs, self.verbose = momentum, recovery_epochs, verbose
        self._watch = _LimitWatch(parse_metric_limits(max_drop))
        self.stop_reason = ""

    def set_model(self, model: keras.Model) -> None:
        """Refuses a model without gates before any work."""
        super().set_model(model)
        if not isinstance(model, PrunableModel):
            raise ValueError(
                "TaylorPruning needs gates, which a model cannot get inside `fit`. Wrap it first:\n"
                "    prunable = keras_taylor.PrunableModel(model)  # compiled as `model` is\n"
                "    prunable.fit(..., callbacks=[keras_taylor.TaylorPruning(...)])\n"
                "and take the smaller model with `prunable.strip()`. "
                f"Received: model={model.name!r} of class `{type(model).__name__}`"
            )

    def on_train_begin(self, logs: Logs | None = None) -> None:
        """Checks the goal, and that there is time for it."""
        model, epochs = self.model, self.params["epochs"]
        model.check_goal(self.goal)
        fractions = self._goal.fractions_to_remove(model.plan.before)
        self._removed = {
            cost: removal_schedule(self.schedule, part) for cost, part in fractions.items() if part
        }
        recovery = self.recovery_epochs
        if recovery is None:
            recovery = max(epochs // 4, int(self._by_epoch))
        self._first = max(self.start_epoch, int(self._by_epoch))
        self._last = epochs - recovery  # the first epoch of recovery
        self._window = self._last - self._first + int(self._by_epoch)  # in epochs
        if self._window < 1:
            raise ValueError(
                f"There is no time to prune: of {epochs} epochs the first {self._first} pass before "
                f"anything is pruned, and the last {recovery} are for recovery. Train for more epochs, "
                'or prune every so many steps (`frequency=30`) instead of "epoch". Received: '
                f"start_epoch={self.start_epoch}, recovery_epochs={self.recovery_epochs}, "
                f"frequency={self.frequency!r}"
            )
        self._watch.start(self._first)
        self._paused = 0  # epochs
        self._steps = self.params.get("steps")
        self.stop_reason = ""

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        """Prunes between epochs."""
        self._epoch = epoch
        if self._by_epoch and self._first <= epoch <= self._last:
            self._prune((epoch - self._first + 1) / self._window)

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        """Prunes every `frequency` steps."""
        if isinstance(self.frequency, str) or not self._first <= self._epoch < self._last:
            return
        steps = self._steps
        ends = steps is not None and self._epoch == self._last - 1 and batch + 1 >= steps
        if ends or (batch + 1) % self.frequency == 0:
            part_of_epoch = min(1, (batch + 1) / steps) if steps else 0
            self._prune((self._epoch - self._first + part_of_epoch) / self._window)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        """Compares the metric with its limit, and writes what is left into the logs."""
        self._steps = self.params.get("steps") or self._steps
        if logs is not None:
            self._watch.judge(self.model, logs)
        if self._watch.broken and self._first <= epoch < self._last:
            self._paused += 1
        if not self._by_epoch and epoch == self._last - 1:
            self._prune(1.0)  # the rest, if the number of steps was not known
        if logs is not None:
            logs.update(self._left())

    def on_train_end(self, logs: Logs | None = None) -> None:
        """Restores the best state that kept to the limit, and warns if the goal was missed."""
        restored = self._watch.finish(self.model)
        missed = self._goal.describe_misses(self.model.plan.after, self.model.plan.before)
        if not missed:
            self.stop_reason = "goal reached"
        else:
            limited = f"`max_drop` on {self._watch.held_back_by()} held it back"
            last = self._last + int(self._by_epoch)  # the last epoch that prunes, counted from 1
            early = (
                f"training ended early, after epoch {self._epoch + 1}, and pruning goes on until epoch "
                f"{last}; `EarlyStopping(..., start_from_epoch={self._last})` waits for it"
            )
            why = limited if self._paused or restored else early
            self.stop_reason = f"{'; '.join(missed)}: {why}"
            warnings.warn(f"TaylorPruning: {self.stop_reason}.", stacklevel=2)
        self._say(self.stop_reason)

    def _prune(self, progress: float) -> None:
        """Prunes as far as the schedule asks at this part of the time, pauses left out."""
        if self._watch.broken:
            return
        progress -= self._paused / self._window
        gone = {cost: removed(min(progress, 1.0)) for cost, removed in self._removed.items() if progress > 0}
        gone = {cost: part for cost, part in gone.items() if part > 0}
        if not gone:
            return
        num = self.model.prune(self.goal if progress >= 1 else gone, momentum=self.momentum)
        if num and self._by_epoch:
            left = self.model.cost()["params"]
            self._say(f"epoch {self._epoch + 1}: {num} units pruned, {left:,} parameters left")

    def _left(self) -> dict[str, int]:
        left = {**self.model.cost(), "units": int(self.model.mask.sum())}
        return {key: left[key] for key in ("params", "flops", "units") if left[key] is not None}

    def _say(self, text: str) -> None:
        Reporter(2 if self.verbose else 0).say(f"TaylorPruning: {text}")


@dataclasses.dataclass(frozen=True)
class _GoodState:
    """Weights of a model that kept to the limit.

    Attributes:
        rank: Minus the number of units, and the metric, or the loss, with the sign that makes larger values
            better.
        mask: The gates that are open.
        weights: Values of all weights.
    """

    rank: tuple[int, float]
    mask: Array
    weights: list[Array]


class _MetricWatch:
    """Compares one metric of the logs with its limit.

    Attributes:
        monitor: Name of the metric.
        limit: How much worse it may become.
        needs_reference: Whether the value to compare with comes from an epoch without pruning.
        broken: Whether the limit did not hold after the last epoch.
        ever_broken: Whether it did not after any epoch.
    """

    def __init__(self, limit: MetricLimit) -> None:
        self.monitor, self.limit = limit.monitor or "val_accuracy", limit
        self.needs_reference = limit.baseline is None
        self.begin()

    def begin(self) -> None:
        """Begins a run."""
        self.broken = self.ever_broken = False
        self._reference = self.limit.baseline

    def judge(self, value: float, is_whole: bool) -> None:
        """Compares the value of an epoch with the reference; `is_whole`: nothing is pruned yet."""
        if self._reference is None or (self.needs_reference and is_whole):
            self._reference = value
        self.broken = not self.limit.allows(self.monitor, value, self._reference)
        self.ever_broken |= self.broken


class _LimitWatch:
    """Compares metrics with their limits, and remembers the smallest state that kept to all of them."""

    def __init__(self, limits: Sequence[MetricLimit]) -> None:
        self._limits, self._watches = limits, [_MetricWatch(limit) for limit in limits]
        self._best: _GoodState | None = None

    @property
    def broken(self) -> bool:
        """Whether a limit did not hold after the last epoch."""
        return any(one.broken for one in self._watches)

    def held_back_by(self) -> str:
        """The metrics whose limit did not hold after some epoch, or else all, in words."""
        broken = [one for one in self._watches if one.ever_broken] or self._watches
        return " and ".join(f"'{one.monitor}'" for one in broken)

    def start(self, unpruned_epochs: int) -> None:
        """Begins a run; `unpruned_epochs` epochs pass before anything is pruned."""
        lacking = [one.monitor for one in self._watches if one.needs_reference]
        if lacking and not unpruned_epochs:
            raise ValueError(
                f"`max_drop` compares with '{lacking[0]}' at the end of an epoch without pruning, and "
                "there is none. Pass `start_epoch=1` or more, or a `MetricLimit` with a `baseline`. "
                f"Received: max_drop={describe_limits(self._limits)['max_drop']}, start_epoch=0, "
                "baseline=None"
            )
        for one in self._watches:
            one.begin()
        self._best = None

    def judge(self, model: PrunableModel, logs: Logs) -> None:
        """Compares the metrics of an epoch with the references, and remembers a state that keeps to them."""
        missing = [one.monitor for one in self._watches if one.monitor not in logs]
        if missing:
            warnings.warn(
                f"TaylorPruning: `max_drop` watches '{missing[0]}', which is not in the logs; there "
                f"are {', '.join(logs)}.",
                stacklevel=2,
            )
        if missing or not self._watches:
            return
        units = int(model.mask.sum())
        for one in self._watches:
            one.judge(as_number(logs[one.monitor]), is_whole=units == model.mask.size)
        rank = -units, self._value(logs)
        if not self.broken and (self._best is None or rank >= self._best.rank):
            self._best = _GoodState(rank, model.mask, model.get_weights())

    def _value(self, logs: Logs) -> float:
        """What an epoch is worth beside others with as many units: its metric, or minus its loss."""
        if len(self._watches) == 1:
            (one,) = self._watches
            return one.limit.direction(one.monitor) * as_number(logs[one.monitor])
        return -as_number(logs.get("val_loss", logs.get("loss", 0.0)))

    def finish(self, model: PrunableModel) -> bool:
        """Restores the best of the smallest states that kept to the limits; returns whether there is one."""
        if self._best is None:
            return False
        model.mask = self._best.mask  # opens gates, which weights alone do not
        model.set_weights(self._best.weights)
        return True


def _check_whole_number(name: str, value: object, least: int, alternative: str = "") -> None:
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < least:  # type: ignore[operator]  # it is a number here
        raise ValueError(
            f"`{name}` is a whole number from {least} on{alternative}. Received: {name}={value!r}"
        )
