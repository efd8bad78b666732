"""Trains the pruned model of a round, and notices when training diverges."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_taylor.cutting.batch_statistics import shorter_averages
from keras_taylor.cutting.surgery import copy_model
from keras_taylor.loop.judging import BestEpochs, BestState, Judge
from keras_taylor.loop.learning_rates import (
    CosineDecay,
    RateSearch,
    compiled_learning_rate,
    rate_record,
    temporary_learning_rate,
)
from keras_taylor.reading.cloning import compile_settings, losses_by_output, output_names
from keras_taylor.reports.run_record import JudgedRecord, RateRecord
from keras_taylor.scores.losses import BINARY_LOSSES, CLASS_LOSSES, ONE_HOT_LOSSES, kind_of, loss_factors
from keras_taylor.support.arguments import check_whole_number, format_value
from keras_taylor.support.arrays import as_number
from keras_taylor.support.datasets import Feed
from keras_taylor.support.keras_internals import output_structure
from keras_taylor.support.types import Tensor, Tree

TEMPERATURE = 3.0
# Weight of the compiled loss if there are labels; the teacher's loss has the rest.
_STUDENT_LOSS_WEIGHT = 0.5

# Whether, and how, a model learns from a teacher: the argument `distill` of `compress`.
Distill: TypeAlias = (
    "bool | keras.distillation.DistillationLoss | Sequence[keras.distillation.DistillationLoss]"
)


# Arguments of `fit` that are whole numbers: the smallest one, and what `None` means.
_WHOLE_NUMBERS = (
    ("epochs", 0, ""),
    ("initial_epoch", 0, ""),
    ("batch_size", 1, "32 (of arrays)"),
    ("steps_per_epoch", 1, "all batches"),
    ("validation_batch_size", 1, "`batch_size`"),
    ("validation_steps", 1, "all batches"),
    ("validation_freq", 1, ""),
)


class DivergenceError(Exception):
    """Fine-tuning led to a loss or to weights that are not finite."""


class FitResult(NamedTuple):
    """What happened in a training.

    Attributes:
        history: Metrics by epoch, as `History.history`.
        step_losses: The loss of every step.
        judged: Which state was kept; `None` if states were not compared.
        rate: The learning rate, and how it was found; `None`: a schedule of the optimizer.
        failure: Why the last state could not be used, in words; empty if it could.
        epochs: For how many epochs it was to train; callbacks may have stopped it before.
    """

    history: dict[str, list[float]]
    step_losses: list[float]
    judged: JudgedRecord | None = None
    rate: RateRecord | None = None
    failure: str = ""
    epochs: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuner:
    """Trains the models of all rounds in the same way.

    Attributes:
        original: The model before pruning. It is the teacher if `distill` is set.
        feed: The training data.
        fit_kwargs: Arguments of `fit`, those of the data left out.
        distill: As in `compress`.
        learning_rate: Learning rate that each round, or its trials, begin with; `None`: the optimizer follows
            a schedule.
        search: Finds a higher one; `None`: there are no trials.
        judge: Says which state of a model is kept; `None`: the last one.
        obstacle: Why models are not trained after all, in words; empty if they are.

    Raises:
        ValueError: If `fit` cannot train with this data.
    """

    original: keras.Model
    feed: Feed
    fit_kwargs: Mapping[str, Any]
    distill: Distill = False
    learning_rate: float | None = None
    search: RateSearch | None = None
    judge: Judge | None = None
    obstacle: str = ""

    def __post_init__(self) -> None:
        if self.trains:
            _check_trainable(self.feed, self.fit_kwargs, bool(self.distill))

    @property
    def epochs(self) -> int:
        """Epochs of a round."""
        return self.fit_kwargs.get("epochs", 1)

    def num_epochs(self, num_rounds: int) -> int:
        """Epochs of a training that takes those of several rounds."""
        return num_rounds * (self.epochs - self.fit_kwargs.get("initial_epoch", 0))

    def num_steps(self, num_rounds: int) -> int | None:
        """Steps of a training that takes the epochs of several rounds; `None`: unknown."""
        steps = self.feed.num_steps
        return None if steps is None else steps * self.num_epochs(num_rounds)

    @property
    def trains(self) -> bool:
        """Whether there is any fine-tuning."""
        return self.epochs != 0 and not self.obstacle

    @property
    def current_rate(self) -> float:
        """The learning rate that training begins with."""
        return self.learning_rate or compiled_learning_rate(self.original.optimizer)

    @functools.cached_property
    def _best_epochs(self) -> BestEpochs:
        return BestEpochs(self.fit_kwargs.get("callbacks"))

    @functools.cached_property
    def _teacher(self) -> keras.Model:
        return copy_model(self.original)

    def train(
        self,
        model: keras.Model,
        origin: keras.Model,
        callbacks: Sequence[keras.callbacks.Callback],
        num_rounds: int = 1,
    ) -> FitResult:
        """Trains a model.

        Args:
            model: The model, compiled.
            origin: The model that it was cut from. Training is not to blame for weights that are not
                finite there.
            callbacks: Callbacks besides those of the user.
            num_rounds: How many rounds' epochs it takes.

        Raises:
            DivergenceError: If the loss or a weight became NaN or infinite and there is no judge, who
                would keep a state before that. Training stops at the first such loss.
        """
        if not self.trains:
            return FitResult({}, [], self._untrained_record())
        self._best_epochs.forget()  # of larger models
        losses, of_user = _StepLosses(), flat_callbacks(self.fit_kwargs.get("callbacks"))
        callbacks = [*of_user, *callbacks, losses, *self.feed.callbacks()]
        trainer, rate = self._trainer_of(model), self._start_rate
        best = None
        if self.judge is not None:
            # with a teacher, `fit` validates another loss; callbacks may change weights after that
            best = BestState(self.judge, model, reads_logs=not (self.distill or of_user))
            callbacks.append(best)
        arguments = {**self.feed.fit_arguments(), **self.fit_kwargs, "verbose": 0, "callbacks": callbacks}
        num_epochs = self.num_epochs(num_rounds)
        arguments["epochs"] = self.fit_kwargs.get("initial_epoch", 0) + num_epochs
        num_steps = self.num_steps(num_rounds)
        with (
            temporary_learning_rate(model, self.learning_rate),
            shorter_averages(model, num_steps, self.feed.batch_size or self.feed.first_size),
        ):
            if rate is not None:
                if self.search is not None:
                    rate = self.search.find(model, trainer, rate["peak"], num_steps)
                callbacks.insert(0, CosineDecay(rate["peak"]))  # those of the user have the last word
            history = trainer.fit(**arguments).history
            failure = losses.failure() or _describe_weights_not_finite(model, origin)
            judged = best and best.finish(failure)  # restores the optimizer, too: not after its own rate
        if failure and best is None:
            raise DivergenceError(failure)
        numbers = {name: [as_number(value) for value in values] for name, values in history.items()}
        return FitResult(numbers, losses.values, judged, rate, failure, num_epochs)

    def assess(self, model: keras.Model) -> FitResult:
        """Judges a model that is not trained, if there is a judge."""
        if self.judge is None or not self.trains:
            return FitResult({}, [], self._untrained_record())
        found = self.judge.assess(model)
        reason = "not trained on the way to a goal"
        return FitResult({}, [], self._record_of([found.metrics], reason))

    def assess_cut(self, model: keras.Model) -> dict[str, float]:
        """The metrics of a model that will be repaired, for the record; empty if there is no judge."""
        return {} if self.judge is None or not self.trains else self.judge.assess(model).metrics

    @property
    def _start_rate(self) -> RateRecord | None:
        if self.learning_rate is None:
            return None
        return rate_record(self.learning_rate)

    def _trainer_of(self, model: keras.Model) -> keras.Model:
        if not self.distill:
            return model
        return make_distiller(model, self._teacher, self.distill, self.feed.has_targets)

    def _untrained_record(self) -> JudgedRecord | None:
        return self._record_of([], f"not trained, {self.obstacle}") if self.obstacle else None

    def _record_of(self, metrics: list[dict[str, float]], reason: str) -> JudgedRecord:
        judge = self.judge if metrics else None
        return {
            "epoch": 0,
            "measure": judge.measure if judge is not None else "",
            "examples": judge.examples if judge is not None else "",
            "metrics": metrics,
            "reason": reason,
        }


def check_fit_arguments(fit_kwargs: Mapping[str, Any]) -> None:
    """Refuses arguments that neither `compress` nor `fit` has, and values that mean nothing to `fit`."""
    known = set(inspect.signature(keras.Model.fit).parameters) - {"self", "x", "y"}
    unknown = sorted(set(fit_kwargs) - known)
    if unknown:
        raise TypeError(
            f"`compress` has no argument {unknown[0]!r}, nor has `model.fit`. Expected arguments of "
            f"`compress`, or of `fit`: {', '.join(sorted(known))}. "
            f"Received: {unknown[0]}={format_value(fit_kwargs[unknown[0]])}"
        )
    for name, least, or_none in _WHOLE_NUMBERS:
        if name in fit_kwargs:
            check_whole_number(name, fit_kwargs[name], least, or_none)
    epochs, begin = fit_kwargs.get("epochs", 1), fit_kwargs.get("initial_epoch", 0)
    if begin and begin >= epochs > 0:
        raise ValueError(
            "A round trains from `initial_epoch` up to `epochs`, so none would be left. Expected a smaller "
            f"`initial_epoch`. Received: initial_epoch={begin}, epochs={epochs}"
        )
    split = fit_kwargs.get("validation_split")
    if split is not None and not (isinstance(split, (int, float, np.floating)) and 0 <= split < 1):
        raise ValueError(f"Expected a share from 0 on and below 1. Received: validation_split={split!r}")
    weights = fit_kwargs.get("class_weight")
    if weights is not None and not isinstance(weights, Mapping):
        raise TypeError(f"Expected a dict from classes to weights. Received: class_weight={weights!r}")
    flat_callbacks(fit_kwargs.get("callbacks"))


def flat_callbacks(callbacks: Any) -> list[keras.callbacks.Callback]:
    """Callbacks in the forms that `fit` takes: `None`, one, a nested list, a `CallbackList`."""
    flat = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
    flat = [one for one in flat if one is not None]
    wrong = [one for one in flat if not isinstance(one, keras.callbacks.Callback)]
    if wrong:
        raise TypeError(
            "Expected a list of `keras.callbacks.Callback` objects. "
            f"Received: callbacks with {wrong[0]!r} (of type {type(wrong[0]).__name__})"
        )
    return flat


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Says how each round of `compress` is fine-tuned.

    `compress` takes it as `learning_rate`. A plain number is short for `FineTuning(number)`.

    Args:
        learning_rate: The learning rate that a round begins with, a float above 0. `None` (the default): as
            in `compress`.
        keep_best: Whether a round keeps the best state of its model, the one before training among them, as
            `compress` says. `False`: it keeps the last one, and all examples are trained on. Default `True`.
        every_round: Whether every round is trained. `False`: only rounds that reach a goal, with the epochs
            of all rounds that led to it; those on the way are cut and repaired. `None` (the default): every
            round if `repair` is off, if there is a `max_drop`, since a round is judged by what training makes
            of it then, and if the optimizer follows a schedule, which counts the steps of a round; else
            `False`.

    Raises:
        ValueError: If `learning_rate` is not a number above 0, or `every_round` not a truth value or `None`.

    Example:

    >>> tuning = keras_taylor.FineTuning(0.01, keep_best=False)
    >>> small = keras_taylor.compress(model, (x, y), goal=0.3, learning_rate=tuning)
    """

    learning_rate: float | None = None
    keep_best: bool = True
    every_round: bool | None = None

    def __post_init__(self) -> None:
        rate = self.learning_rate
        is_number = isinstance(rate, (int, float, np.floating)) and not isinstance(rate, bool)
        if rate is not None and not (is_number and 0 < rate < np.inf):
            raise ValueError(f"Expected a learning rate above 0. Received: learning_rate={rate!r}")
        if self.every_round not in (True, False, None):
            raise ValueError(
                f"Expected `True`, `False` or `None`. Received: every_round={self.every_round!r}"
            )


def parse_fine_tuning(learning_rate: float | FineTuning | None) -> FineTuning:
    """Returns the `FineTuning` that a user passes as `learning_rate`, a number or a whole one."""
    return learning_rate if isinstance(learning_rate, FineTuning) else FineTuning(learning_rate)


def check_distill(distill: Distill) -> None:
    """Refuses what says nothing about what a model is to imitate."""
    losses = keras.tree.flatten(distill)
    if not all(isinstance(one, keras.distillation.DistillationLoss) for one in losses) and distill not in (
        True,
        False,
    ):
        raise TypeError(
            "Expected `True`, `False`, a `keras.distillation.DistillationLoss` or a list of them. "
            f"Received: distill={distill!r}"
        )


def make_distiller(
    student: keras.Model, teacher: keras.Model, distill: Distill = True, has_labels: bool = True
) -> keras.Model:
    """Returns a `keras.distillation.Distiller`, compiled as the student is: its `fit` trains the student.

    Args:
        student: The compiled model to train; its optimizer is used.
        teacher: The model to imitate. It becomes untrainable.
        distill: `True`: the student imitates the outputs (Hinton et al., Distilling the Knowledge in a
            Neural Network, 2015, at temperature 3 for classes; squared differences for numbers). Else a
            `keras.distillation.DistillationLoss`, or a list of them.
        has_labels: Whether there are labels: half of the loss is the compiled one then.
    """
    settings = compile_settings(student) or {}
    model = _Distiller(
        teacher,
        student,
        imitation_loss(student) if distill is True else distill,
        student_loss_weight=_STUDENT_LOSS_WEIGHT if has_labels else 0.0,
    )
    model.compile(
        optimizer=student.optimizer,
        loss=settings["loss"],
        metrics=settings["metrics"] if has_labels else None,
        weighted_metrics=settings["weighted_metrics"] if has_labels else None,
        run_eagerly=student.run_eagerly,
        jit_compile=student.jit_compile,
    )
    return model


class _Distiller(keras.distillation.Distiller):
    """Takes the student's loss and metrics as they are compiled: with weights, in any structure, regularized.

    Keras' own adds up losses without weights, of examples too, and on PyTorch it takes no dicts or lists of
    them; of metrics it takes lists only. Weights of examples and classes are about labels: the imitation of
    the teacher has none.
    """

    @property
    def output_names(self) -> list[str]:
        """By which Keras finds the metrics of an output, and names them."""
        return output_names(self.student)

    def compile(
        self,
        optimizer: keras.optimizers.Optimizer,
        loss: Tree,
        metrics: Tree = None,
        weighted_metrics: Tree = None,
        **options: Any,
    ) -> None:
        super().compile(optimizer, loss, **options)
        keras.Model.compile(self, optimizer, metrics=metrics, weighted_metrics=weighted_metrics, **options)

    def compute_loss(
        self,
        x: Tree = None,
        y: Tree = None,
        y_pred: Tree = None,
        sample_weight: Tree = None,
        training: bool = True,
    ) -> Tensor:
        imitation = super().compute_loss(x, None, y_pred, training=training)
        if y is None or not self.student_loss_weight:
            return imitation
        loss = self.student.compute_loss(y=y, y_pred=y_pred, sample_weight=sample_weight)
        total = imitation + self.student_loss_weight * loss
        # these are means that have a value without the student's loss already
        self.student_loss_tracker.update_state(2 * loss)
        self.total_loss_tracker.update_state(2 * total - imitation)
        return total


def imitation_loss(
    model: keras.Model, temperature: float = TEMPERATURE
) -> keras.distillation.DistillationLoss:
    """Returns a distillation loss that fits the loss of each output of a compiled model, and its weight."""
    structure = output_structure(model)
    outputs = model.outputs[0] if structure is None else structure
    flat = keras.tree.flatten(outputs)
    compiled = zip(losses_by_output(model, len(flat)), loss_factors(model, len(flat)), strict=True)
    losses = [_OutputImitation(loss, factor, temperature) for loss, factor in compiled]
    return keras.distillation.LogitsDistillation(temperature, keras.tree.pack_sequence_as(outputs, losses))


class _OutputImitation(keras.losses.Loss):
    """How far one output is from the teacher's, times a factor; both come divided by the temperature."""

    def __init__(self, loss: Any, factor: float, temperature: float) -> None:
        super().__init__(name="imitation")
        self._kind: str
        self._from_logits: bool
        self._kind, self._from_logits = kind_of(loss) if loss is not None else ("", False)
        self._temperature, self._factor = temperature, factor

    def call(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Returns a loss of shape `(batch, ...)`."""
        return self._factor * self._distance(teacher, student)

    def _distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        t = self._temperature
        if self._kind in CLASS_LOSSES | ONE_HOT_LOSSES and student.shape[-1] > 1:
            if not self._from_logits:
                teacher, student = (ops.log(ops.clip(y * t, 1e-7, 1.0)) / t for y in (teacher, student))
            wanted = ops.log_softmax(teacher)
            return t**2 * ops.sum(ops.exp(wanted) * (wanted - ops.log_softmax(student)), -1)
        if self._kind in BINARY_LOSSES | {"crossentropy", "ce"}:
            return ops.mean(ops.binary_crossentropy(teacher * t, student * t, self._from_logits), -1)
        return t**2 * ops.mean(ops.square(teacher - student), -1)


class _StepLosses(keras.callbacks.Callback):
    """Records the loss of every training step, from the running mean that Keras keeps.

    Attributes:
        values: The losses.
        first_not_finite: The first sum of losses that is not finite. Training stops with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.first_not_finite: float | None = None
        self._total = self._count = 0.0

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._total = self._count = 0.0

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        tracker = self.model.metrics[0]
        total, count = (float(ops.convert_to_numpy(v)) for v in (tracker.total, tracker.count))
        steps = count - self._count
        self.values.append((total - self._total) / steps if steps else float("nan"))
        self._total, self._count = total, count
        if self.first_not_finite is None and not np.isfinite(total):
            self.first_not_finite = total
            self.model.stop_training = True

    def failure(self) -> str:
        """At which step the loss became NaN or infinite, in words; empty if it did not."""
        if self.first_not_finite is None:
            return ""
        name = _name_not_finite(self.first_not_finite)
        return f"the loss became {name} at fine-tuning step {len(self.values)}"


def _check_trainable(feed: Feed, fit_kwargs: Mapping[str, Any], distills: bool) -> None:
    """Refuses data without labels if there is no teacher."""
    feed.check_end()
    feed.check_devices()
    if not (feed.has_targets or distills):
        raise ValueError(
            "The data set yields no labels to fine-tune with. Expected `(x, y)` pairs, `distill=True` (the "
            "given model is the teacher), or `epochs=0` (no fine-tuning). "
            f"Received: ds without labels, epochs={fit_kwargs.get('epochs', 1)}"
        )


def _describe_weights_not_finite(model: keras.Model, origin: keras.Model) -> str:
    """Which weights are not finite that were finite before training, in words; empty if there are none."""
    for new, old in zip(model.weights, origin.weights, strict=False):
        value = _find_not_finite(new)
        if value is not None and _find_not_finite(old) is None:
            return f"the weights '{new.path}' became {_name_not_finite(value)} by the end of fine-tuning"
    return ""


def _find_not_finite(variable: keras.Variable) -> float | None:
    """Returns a value of a variable that is NaN or infinite; `None` if all are finite."""
    values = ops.convert_to_numpy(variable.value)
    not_finite = values[~np.isfinite(values)]
    return float(not_finite[0]) if not_finite.size else None


def _name_not_finite(value: float) -> str:
    return "NaN" if np.isnan(value) else "infinite"
