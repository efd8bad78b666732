"""Pruning inside the user's own `fit`."""

import warnings

import keras
import numpy as np

from keras_taylor.budget.goals import parse_goal
from keras_taylor.budget.schedule import removed_at
from keras_taylor.loop.metric_limit import MetricLimit
from keras_taylor.loop.wrapper import PrunableModel, check_momentum
from keras_taylor.support.console import Reporter


class TaylorPruning(keras.callbacks.Callback):
    """Prunes a `PrunableModel` while `fit` trains it.

    Scores gather while the model trains; every so often the least important units'
    gates are closed, more and more of them until the goal is met, and the last epochs
    are left for recovery. `logs` get "params", "flops" and "units" (what is left) at
    the end of every epoch, for `History` and for every callback that comes after this
    one (`CSVLogger`, `TensorBoard`): put this one first.

    Args:
        goal: Fraction of the parameters to remove, counted from the model without any
            pruning; or a dict of costs, as in `make_plan`.
        start_epoch: Epochs that pass before anything is pruned; one at least, for its
            scores, if `frequency` is "epoch".
        frequency: "epoch", to prune between epochs, or a number of training steps (the
            2019 paper, arXiv 1906.10771, prunes every 30).
        schedule: How the goal is approached, see `keras_taylor.budget.schedule.removed_at`:
            "linear", "cubic", "exponential", or a function from the part of the time
            that is over, above 0 and at most 1, to the part of the goal that is met.
        momentum: The weight that older scores keep at each pruning (the paper's code: 0.9).
        recovery_epochs: Epochs at the end without pruning; `None`: a quarter of all,
            rounded down, and at least one if `frequency` is "epoch".
        max_drop: Pruning pauses while the monitored metric is worse than its reference
            by more than this; at the end the smallest model that was not is restored.
        monitor: The metric for `max_drop`, as in `logs`.
        mode: "min", "max", or "auto": "max" for accuracies, AUC, precision, recall and
            F-scores, otherwise "min".
        baseline: The reference for `max_drop`; `None`: the metric at the end of the last
            epoch before anything was pruned.
        verbose: 1 prints a line after each pruning between epochs and at the end.

    Attributes:
        stop_reason: Why it ended as it did, a string, after training.

    Example:

    >>> prunable = keras_taylor.PrunableModel(model)
    >>> prunable.fit(ds, epochs=20, callbacks=[keras_taylor.TaylorPruning(goal=0.3)])
    >>> small = prunable.strip()
    """

    def __init__(
        self,
        goal=0.3,
        *,
        start_epoch=0,
        frequency="epoch",
        schedule="cubic",
        momentum=0.0,
        recovery_epochs=None,
        max_drop=None,
        monitor="val_accuracy",
        mode="auto",
        baseline=None,
        verbose=0,
    ):
        super().__init__()
        self._goal = parse_goal(goal)
        removed_at(schedule, 1.0)  # refuses what is none
        check_momentum(momentum)
        _check_whole("start_epoch", start_epoch, 0)
        if recovery_epochs is not None:
            _check_whole("recovery_epochs", recovery_epochs, 0)
        if frequency != "epoch":
            _check_whole("frequency", frequency, 1, ' of steps, or "epoch"')
        self._by_epoch = frequency == "epoch"
        self.goal, self.start_epoch, self.frequency, self.schedule = goal, start_epoch, frequency, schedule
        self.momentum, self.recovery_epochs, self.verbose = momentum, recovery_epochs, verbose
        limit = MetricLimit(0.0 if max_drop is None else max_drop, monitor, baseline, mode)
        self._watch = _Watch(None if max_drop is None else limit, monitor)
        self.stop_reason = ""

    def set_model(self, model):
        """Refuses a model that is not wrapped, before any work."""
        super().set_model(model)
        if not isinstance(model, PrunableModel):
            raise ValueError(
                "TaylorPruning needs gates, which a model cannot get inside `fit`. Wrap it first:\n"
                "    prunable = keras_taylor.PrunableModel(model)  # compiled as `model` is\n"
                "    prunable.fit(..., callbacks=[keras_taylor.TaylorPruning(...)])\n"
                "and take the smaller model with `prunable.strip()`. "
                f"Received: model={model.name!r} of class `{type(model).__name__}`"
            )

    def on_train_begin(self, logs=None):
        """Checks the goal, and that there is time for it."""
        model, epochs = self.model, self.params["epochs"]
        model.check_goal(self.goal)
        fractions = self._goal.fractions(model.plan.before)
        self._removed = {what: removed_at(self.schedule, part) for what, part in fractions.items() if part}
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

    def on_epoch_begin(self, epoch, logs=None):
        """Prunes, if that happens between epochs."""
        self._epoch = epoch
        if self._by_epoch and self._first <= epoch <= self._last:
            self._prune((epoch - self._first + 1) / self._window)

    def on_train_batch_end(self, batch, logs=None):
        """Prunes, if that happens every so many steps."""
        if self._by_epoch or not self._first <= self._epoch < self._last:
            return
        steps = self._steps
        ends = steps is not None and self._epoch == self._last - 1 and batch + 1 >= steps
        if ends or (batch + 1) % self.frequency == 0:
            within = min(1, (batch + 1) / steps) if steps else 0
            self._prune((self._epoch - self._first + within) / self._window)

    def on_epoch_end(self, epoch, logs=None):
        """Judges the epoch, and says in the logs what is left."""
        self._steps = self.params.get("steps") or self._steps
        if logs is not None:
            self._watch.judge(self.model, logs)
        if self._watch.broken and self._first <= epoch < self._last:
            self._paused += 1
        if not self._by_epoch and epoch == self._last - 1:
            self._prune(1.0)  # what was left because the number of steps was not known
        if logs is not None:
            logs.update(self._left())

    def on_train_end(self, logs=None):
        """Restores the best state if the limit does not hold, and says if the goal was missed."""
        restored = self._watch.finish(self.model)
        missed = self._goal.missed(self.model.plan)
        if not missed:
            self.stop_reason = "goal reached"
        else:
            held = f"`max_drop` on '{self._watch.monitor}' held it back"
            early = "training ended early, or went back to earlier weights"
            why = held if self._paused or restored else early
            self.stop_reason = f"{'; '.join(missed)}: {why}"
            warnings.warn(f"TaylorPruning: {self.stop_reason}.", stacklevel=2)
        self._say(self.stop_reason)

    def _prune(self, progress):
        """Prunes as far as the schedule says for this part of the time, less the pauses."""
        if self._watch.broken:
            return
        progress -= self._paused / self._window
        gone = {w: removed(min(progress, 1.0)) for w, removed in self._removed.items() if progress > 0}
        gone = {what: part for what, part in gone.items() if part > 0}
        if not gone:
            return
        num = self.model.prune(self.goal if progress >= 1 else gone, momentum=self.momentum)
        if num and self._by_epoch:
            left = self.model.cost()["params"]
            self._say(f"epoch {self._epoch + 1}: {num} units pruned, {left:,} parameters left")

    def _left(self):
        left = {**self.model.cost(), "units": int(self.model.mask.sum())}
        return {key: left[key] for key in ("params", "flops", "units") if left[key] is not None}

    def _say(self, text):
        Reporter(2 if self.verbose else 0).say(f"TaylorPruning: {text}")


class _Watch:
    """What `max_drop` allows, and the smallest state that kept to it."""

    def __init__(self, limit, monitor):
        self.monitor, self._limit = monitor, limit
        self._given = None if limit is None else limit.baseline

    def start(self, unpruned_epochs):
        """Begins a run, of which so many epochs pass before anything is pruned."""
        if self._limit is not None and self._given is None and not unpruned_epochs:
            raise ValueError(
                f"`max_drop` compares with '{self.monitor}' at the end of an epoch without pruning, and "
                "there is none. Pass `start_epoch=1` or more, or the value as `baseline`. "
                f"Received: max_drop={self._limit.max_drop}, start_epoch=0, baseline=None"
            )
        self.broken = False
        self._reference, self._best = self._given, None

    def judge(self, model, logs):
        """Compares an epoch's metric with the reference, and keeps its state if it holds."""
        if self._limit is None:
            return
        if self.monitor not in logs:
            warnings.warn(
                f"TaylorPruning: `max_drop` watches '{self.monitor}', which is not in the logs; there "
                f"are {', '.join(logs)}.",
                stacklevel=2,
            )
            return
        value, units = float(logs[self.monitor]), int(model.mask.sum())
        if self._given is None and (units == model.mask.size or self._reference is None):
            self._reference = value
        self.broken = not self._limit.allows(self.monitor, value, self._reference)
        rank = -units, self._limit.direction(self.monitor) * value
        if not self.broken and (self._best is None or rank >= self._best[0]):
            self._best = rank, model.get_weights()

    def finish(self, model):
        """Restores the best of the smallest states that held; returns whether it did."""
        if self._limit is None or self._best is None:
            return False
        model.set_weights(self._best[1])
        return True


def _check_whole(name, value, least, otherwise=""):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` is a whole number from {least} on{otherwise}. Received: {name}={value!r}")
