"""The learning rate of each round: where it begins, how short trials raise it, and its decay to zero."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_taylor.loop.judging import Judge, standard_error
from keras_taylor.reports.run_record import RateRecord
from keras_taylor.support.datasets import BATCH_SIZE, Feed
from keras_taylor.support.optimizers import ModelState, has_schedule
from keras_taylor.support.types import FloatArray

# Learning rate of a repaired model, as a share of the compiled one.
_RATE_AFTER_REPAIR = 0.1
_FACTOR = 3  # from trial to trial
# Trials of a round: at most so many; the steps of each; their share of a round.
_MOST_TRIALS, _TRIAL_STEPS, _SHARE_OF_ROUND = 5, (12, 100), 0.1
_HOPELESS = 3  # standard errors behind the best: higher rates are not tried


@dataclasses.dataclass(frozen=True)
class RateSearch:
    """Short trials of learning rates on the same batches, from the same state.

    Attributes:
        judge: Its judge of single examples compares the models that trials lead to.
        feed: The training data.
        class_weight: As `fit` takes it.
    """

    judge: Judge
    feed: Feed
    class_weight: Mapping[int, float] | None = None

    def find(
        self, model: keras.Model, trainer: keras.Model, first: float, num_steps: int | None
    ) -> RateRecord:
        """Returns a high rate that does no harm, and what was tried.

        A trial is too short to show what a high rate gains in the long run; it shows what the rate destroys
        (as the range test of Smith, Cyclical Learning Rates for Training Neural Networks, 2017). So the
        highest rate is chosen that is not clearly worse than the best trial, or the one above the best if it
        is not clearly worse than the model before any training. Where the first rate does harm, lower ones
        are tried, until one does none.

        Args:
            model: The compiled model. Its state does not change.
            trainer: What trains it: the model, or one around it.
            first: The first rate. Each trial's is three times that of the one before, or a third of it.
            num_steps: Steps of the training that follows; `None`: unknown. A short one has no trials.
        """
        num_trials, num_steps = plan_trials(num_steps)
        if not num_trials:
            return rate_record(first)
        state, found = ModelState(model), list[_Trial]()
        judge = self.judge.of_examples()
        start = _Trial(0.0, judge.assess(model).penalties)
        batches, rate = self._batches(num_steps), first
        for _ in range(num_trials):
            self._try(trainer, rate, batches)
            trial = _Trial(rate, judge.assess(model).penalties)
            state.restore()
            if trial.is_finite:
                found.append(trial)
            if rate <= first and (not trial.is_finite or trial.is_behind(start, 1)):
                rate /= _FACTOR
            elif rate < first or not trial.is_finite or trial.is_behind(_best_of(found), _HOPELESS):
                break
            else:
                rate *= _FACTOR
        trials = [[one.rate, float(one.penalties.mean())] for one in found]
        chosen = _choose(start, found) if found else first
        return {"peak": chosen, "steps": num_steps, "measure": judge.measure, "trials": trials}

    def _batches(self, num_steps: int) -> dict[str, Any]:
        size = self.feed.batch_size or BATCH_SIZE
        if not self.feed.holds_arrays:
            data = self.feed.in_memory(num_steps * self.feed.first_size)
            return {**data.fit_arguments(), "epochs": math.ceil(num_steps / (data.num_steps or 1))}
        total = self.feed.num_examples or 1
        rows = np.resize(np.random.default_rng(0).permutation(total), num_steps * size)
        return self.feed.of_rows(rows).fit_arguments()

    def _try(self, trainer: keras.Model, rate: float, batches: Mapping[str, Any]) -> None:
        callbacks = [CosineDecay(rate), keras.callbacks.TerminateOnNaN()]
        options = {"class_weight": self.class_weight, "shuffle": False, "verbose": 0}
        trainer.fit(**batches, **options, callbacks=callbacks)


class _Trial(NamedTuple):
    rate: float
    penalties: FloatArray

    @property
    def is_finite(self) -> bool:
        """Whether it led to finite values only."""
        return bool(np.isfinite(self.penalties).all())

    def is_behind(self, other: "_Trial", num_errors: float) -> bool:
        """Whether it is worse than another one by more than so many standard errors of the difference."""
        excess = self.penalties - other.penalties
        return bool(excess.mean() > num_errors * standard_error(excess))


def _choose(start: _Trial, trials: Sequence[_Trial]) -> float:
    best = _best_of(trials)
    next_rate = best.rate * _FACTOR * 1.01  # rates are products
    return max(
        one.rate
        for one in trials
        if not one.is_behind(best, 1) or (one.rate <= next_rate and not one.is_behind(start, 1))
    )


def _best_of(trials: Sequence[_Trial]) -> _Trial:
    return min(trials, key=lambda one: one.penalties.mean())


def rate_record(rate: float) -> RateRecord:
    """The record of a rate that no trials found."""
    return {"peak": rate, "steps": 0, "measure": "", "trials": []}


def plan_trials(num_steps: int | None) -> tuple[int, int]:
    """Returns how many trials a round of so many steps has, and their steps; (0, 0): none."""
    budget = int((num_steps or 0) * _SHARE_OF_ROUND)
    least, most = _TRIAL_STEPS
    num_trials = min(budget // least, _MOST_TRIALS)
    return (num_trials, min(budget // num_trials, most)) if num_trials > 1 else (0, 0)


class CosineDecay(keras.callbacks.Callback):
    """Lets the learning rate fall to zero by a cosine, step by step, within a `fit`.

    It gives way to whatever else sets the rate in between: another callback has the last word from then on.

    Args:
        peak: The rate of the first step.
    """

    def __init__(self, peak: float) -> None:
        super().__init__()
        self._peak = peak
        self._ours: float | None = None  # the rate that this callback set last
        self._first_epoch = self._epoch = 0
        self._num_steps: int | None = None  # of an epoch, as far as it is known
        self._num_done = 0  # steps of this epoch

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Begins with the highest rate."""
        self._num_steps, self._first_epoch = self.params.get("steps"), -1
        self._set(self._peak)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch
        self._first_epoch = epoch if self._first_epoch < 0 else self._first_epoch

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Sets the rate of the step, unless another callback has set one."""
        if self._ours is None or compiled_learning_rate(self.model.optimizer) != self._ours:
            self._ours = None
            return
        done = self._epoch - self._first_epoch + (batch / self._num_steps if self._num_steps else 0.0)
        total = self.params["epochs"] - self._first_epoch
        self._set(self._peak * 0.5 * (1 + math.cos(math.pi * min(done / total, 1.0))))

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts the steps."""
        self._num_done = batch + 1

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Learns how many steps an epoch has."""
        self._num_steps = self._num_steps or self._num_done

    def _set(self, rate: float) -> None:
        optimizer = self.model.optimizer
        optimizer.learning_rate = rate
        self._ours = compiled_learning_rate(optimizer)


def choose_learning_rate(
    optimizer: keras.optimizers.Optimizer, wanted: float | None, repairs: bool
) -> float | None:
    """Returns the learning rate that every round begins with; `None` if the optimizer follows a schedule.

    Without a wish it is a tenth of the compiled rate for a repaired model, from which trials may raise it.
    Such a model needs little training, and the rate that its training began with may lead it away.

    Args:
        optimizer: The optimizer that the original is compiled with.
        wanted: What the user asks for.
        repairs: Whether models are repaired before training.

    Raises:
        ValueError: If there is a wish, and the optimizer follows a schedule.
    """
    if has_schedule(optimizer):
        if wanted is None:
            return None
        raise ValueError(
            "The model is compiled with a learning rate schedule, which each round follows. Compile it "
            f"with a number, or leave `learning_rate` out. Received: learning_rate={wanted!r}"
        )
    if wanted is not None:
        return float(wanted)
    return (_RATE_AFTER_REPAIR if repairs else 1.0) * compiled_learning_rate(optimizer)


def compiled_learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """Returns the current learning rate of an optimizer."""
    return float(ops.convert_to_numpy(optimizer.learning_rate))


@contextlib.contextmanager
def temporary_learning_rate(model: keras.Model, rate: float | None) -> Iterator[None]:
    """A context in which a compiled model trains at another learning rate; `None`: at its own."""
    if rate is None:
        yield
        return
    before = compiled_learning_rate(model.optimizer)
    model.optimizer.learning_rate = rate
    try:
        yield
    finally:
        model.optimizer.learning_rate = before
