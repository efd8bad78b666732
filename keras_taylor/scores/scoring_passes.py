"""Passes of the data through a model with gates."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.reading.groups import LabeledModel
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.support.datasets import Feed
from keras_taylor.support.keras_internals import compile_arguments
from keras_taylor.support.types import FloatArray

# Steps between two transfers of the float32 statistics to float64 on the host.
_STEPS_PER_TRANSFER = 256


def gather_statistics(
    gated: GatedModel,
    labeled: LabeledModel,
    feed: Feed,
    num_examples: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> FloatArray:
    """Sums over one pass of the data, under plain `fit`; a model that had a pass is not compiled again.

    Returns:
        A float64 array `(num_rows, num_units)`, rows as in `gates.GATE_ROWS` and perhaps more, such as
        those of `log_odds.ODDS_ROWS`.
    """
    if not gated.compiled:
        compile_for_scoring(gated, labeled.graph.model)
    transfer = _StatisticsTransfer(gated)
    arguments = feed.fit_arguments(num_examples)
    with warnings.catch_warnings():
        # Keras warns of every iterable that ends before it says how long it is
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        history = gated.fit(
            **arguments,
            class_weight=class_weight,
            epochs=1,
            verbose=0,
            shuffle=False,
            callbacks=[transfer, *callbacks],
        )
    if not (np.isfinite(transfer.totals).all() and np.isfinite(history.history["loss"]).all()):
        raise ValueError(explain_nonfinite(gated, feed))
    return transfer.totals


def compile_for_scoring(gated: GatedModel, model: keras.Model, mean: bool = False) -> None:
    """Compiles so that `fit` collects statistics: each example's own loss, a step that moves nothing.

    With `mean`, `evaluate` gives the mean loss of the examples.
    """
    gated.compile(
        keras.optimizers.SGD(0.0),
        loss=gated.example_losses(model.loss, mean),
        loss_weights=compile_arguments(model).get("loss_weights"),
        jit_compile=model.jit_compile,
        run_eagerly=model.run_eagerly,
        auto_scale_loss=False,
    )


class _StatisticsTransfer(keras.callbacks.Callback):
    """Moves the float32 statistics into float64 after every 256 steps."""

    def __init__(self, gated: GatedModel) -> None:
        super().__init__()
        self.totals = np.zeros(gated.statistics.shape)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch % _STEPS_PER_TRANSFER == _STEPS_PER_TRANSFER - 1:
            self.totals += self.model.pop_statistics()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.totals += self.model.pop_statistics()


def refuse_class_weight(class_weight: Mapping[int, float] | None) -> None:
    """Refuses class weights for the measured loss change."""
    if class_weight is not None:
        raise ValueError(
            "The criterion 'oracle' evaluates the loss, which knows no class weights. Pass weights of the "
            f"examples instead: `ds=(x, y, sample_weight)`. Received: class_weight={class_weight!r}"
        )


def measure_loss_changes(
    gated: GatedModel, labeled: LabeledModel, feed: Feed, num_examples: int | None
) -> FloatArray:
    """Change of the mean loss when one unit's gate is closed, measured unit by unit, `(num_units,)`."""
    compile_for_scoring(gated, labeled.graph.model, mean=True)

    def loss_with(mask: FloatArray) -> float:
        gated.mask = mask
        arguments = feed.fit_arguments(num_examples)
        if "steps_per_epoch" in arguments:
            arguments["steps"] = arguments.pop("steps_per_epoch")
        return gated.evaluate(**arguments, verbose=0, return_dict=True)["loss"]

    all_open = np.ones(labeled.num_units)
    base = loss_with(all_open)
    if not np.isfinite(base):
        raise ValueError(explain_nonfinite(gated, feed))
    changes = np.zeros(labeled.num_units)
    for unit in range(labeled.num_units):
        mask = all_open.copy()
        mask[unit] = 0
        changes[unit] = loss_with(mask) - base
    return changes


def explain_nonfinite(gated: GatedModel, feed: Feed) -> str:
    """The message for a loss on the data that is NaN or infinite: it names the batch or the layer."""
    for number, (x, _, _) in enumerate(feed.batches()):
        for part in keras.tree.flatten(x):
            if not np.isfinite(keras.ops.convert_to_numpy(part)).all():
                return f"The data holds NaN or infinity. Received: ds with the first in batch {number}"
        layer = gated.network.find_nonfinite(x)
        if layer is not None:
            return (
                f"The output of layer '{layer}' is NaN or infinite: its weights are, or its values "
                "overflow. The model was not changed. "
                f"Received: ds, whose batch {number} shows it first"
            )
    return (
        "The loss or its gradient is NaN or infinite although every layer's output is finite: the "
        "targets do not suit the loss. The model was not changed. Received: ds"
    )
