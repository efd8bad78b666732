"""Fine-tunes a model that was cut, and sees when that goes wrong."""

import contextlib
import inspect

import keras
import numpy as np

from keras_taylor.support.optimizers import has_schedule

# Learning rate after a repair, as a share of the compiled one.
_REPAIRED = 0.1


class Diverged(Exception):
    """Fine-tuning led to a loss, or to weights, that are not finite.

    Attributes:
        what: What became what, "the loss became NaN".
        where: "at fine-tuning step 17" (the first is 1), or "by the end of fine-tuning".
    """

    def __init__(self, what, where):
        super().__init__(f"{what} {where}")
        self.what, self.where = what, where


def fine_tune(model, origin, arguments, callbacks, trainer=None):
    """Trains a model with `fit`, and stops at the first loss that is not finite.

    Args:
        model: The model to train, compiled.
        origin: The model that it was cut from: what is not finite there already is no
            fault of the training.
        arguments: What `fit` is called with.
        callbacks: Callbacks besides those in `arguments`.
        trainer: The model whose `fit` trains `model`, if that is another one (a distiller).

    Returns:
        A tuple of metrics by epoch (as `History.history`, floats), and the loss of every step.

    Raises:
        Diverged: if the loss or a weight became NaN or infinite.
    """
    losses = _StepLosses()
    callbacks = [*(arguments.get("callbacks") or []), *callbacks, losses]
    history = (trainer or model).fit(**{**arguments, "callbacks": callbacks, "verbose": 0}).history
    if losses.bad is not None:
        raise Diverged(f"the loss became {_named(losses.bad)}", f"at fine-tuning step {len(losses.values)}")
    for new, old in zip(model.weights, origin.weights, strict=False):
        bad = _not_finite(new)
        if bad is not None and _not_finite(old) is None:
            raise Diverged(f"the weights '{new.path}' became {_named(bad)}", "by the end of fine-tuning")
    return {key: [float(v) for v in values] for key, values in history.items()}, losses.values


def check_fit_arguments(fit_kwargs):
    """Refuses arguments of `compress` that neither it nor `fit` has."""
    known = set(inspect.signature(keras.Model.fit).parameters) - {"self", "x", "y", "verbose"}
    unknown = sorted(set(fit_kwargs) - known)
    if unknown:
        raise TypeError(
            f"`compress` has no argument {unknown[0]!r}, nor has `model.fit`. Expected arguments of "
            f"`compress`, or of `fit`: {', '.join(sorted(known))}. "
            f"Received: {unknown[0]}={fit_kwargs[unknown[0]]!r}"
        )


def fine_tuning_rate(optimizer, wanted, repaired):
    """The learning rate of every round: what is wanted; else of a repaired model's a tenth of the compiled.

    A model that was repaired is nearly trained, and the rate that its training began with leads it away.

    Returns:
        A float; `None` where the optimizer keeps its own rate or schedule.
    """
    if wanted is not None:
        number = isinstance(wanted, (int, float, np.floating)) and not isinstance(wanted, bool)
        if not number or not 0 < wanted < np.inf:
            raise ValueError(f"Expected a learning rate above 0. Received: learning_rate={wanted!r}")
        if has_schedule(optimizer):
            raise ValueError(
                "The model is compiled with a learning rate schedule, which each round follows. Compile it "
                f"with a number, or leave `learning_rate` out. Received: learning_rate={wanted!r}"
            )
        return float(wanted)
    if not repaired or has_schedule(optimizer):
        return None
    return _REPAIRED * float(keras.ops.convert_to_numpy(optimizer.learning_rate))


@contextlib.contextmanager
def learning_rate_of(model, rate):
    """A context in which a compiled model trains at another learning rate; `None`: its own."""
    if rate is None:
        yield
        return
    before = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    model.optimizer.learning_rate = rate
    try:
        yield
    finally:
        model.optimizer.learning_rate = before


class _StepLosses(keras.callbacks.Callback):
    """The loss of every training step, out of the running mean that Keras keeps.

    Attributes:
        values: The losses.
        bad: The first sum of losses that is not finite, with which training stops; or `None`.
    """

    def __init__(self):
        super().__init__()
        self.values, self.bad = [], None

    def on_epoch_begin(self, epoch, logs=None):
        self._total = self._count = 0.0

    def on_train_batch_end(self, batch, logs=None):
        tracker = self.model.metrics[0]
        total, count = (float(keras.ops.convert_to_numpy(v)) for v in (tracker.total, tracker.count))
        steps = count - self._count
        self.values.append((total - self._total) / steps if steps else float("nan"))
        self._total, self._count = total, count
        if self.bad is None and not np.isfinite(total):
            self.bad = total
            self.model.stop_training = True


def _not_finite(variable):
    """A value of a variable that is NaN or infinite, `None` where there is none."""
    values = keras.ops.convert_to_numpy(variable.value)
    bad = values[~np.isfinite(values)]
    return bad[0] if bad.size else None


def _named(value):
    return "NaN" if np.isnan(value) else "infinite"
