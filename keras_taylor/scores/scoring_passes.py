"""Passes of the data through gates."""

import warnings

import keras
import numpy as np

from keras_taylor.reading.tracing import compile_arguments

# Steps between two transfers of the float32 statistics to float64 on the host.
_FOLD_EVERY = 256


def gate_statistics(gated, labeled, feed, num_examples=None, class_weight=None, callbacks=()):
    """Sums over one pass of the data, under plain `fit`; a model that has had a pass is not compiled anew.

    Returns:
        A float64 array `(num_rows, num_units)`, rows as in `gates.ROWS` and perhaps `log_odds.ODDS_ROWS`.
    """
    if not gated.compiled:
        compile_for_scoring(gated, labeled.graph.model)
    fold = _Fold(gated)
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
            callbacks=[fold, *callbacks],
        )
    if not (np.isfinite(fold.totals).all() and np.isfinite(history.history["loss"]).all()):
        raise ValueError(explain_nonfinite(gated, feed))
    return fold.totals


def compile_for_scoring(gated, model, mean=False):
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


class _Fold(keras.callbacks.Callback):
    """Moves the float32 statistics into float64 every so many steps."""

    def __init__(self, gated):
        super().__init__()
        self.totals = np.zeros(gated.statistics.shape)

    def on_train_batch_end(self, batch, logs=None):
        if batch % _FOLD_EVERY == _FOLD_EVERY - 1:
            self.totals += self.model.pop_statistics()

    def on_train_end(self, logs=None):
        self.totals += self.model.pop_statistics()


def refuse_class_weight(class_weight):
    """Refuses class weights for the true loss change."""
    if class_weight is not None:
        raise ValueError(
            "The criterion 'oracle' evaluates the loss, which knows no class weights. Pass weights of the "
            f"examples instead: `ds=(x, y, sample_weight)`. Received: class_weight={class_weight!r}"
        )


def loss_changes(gated, labeled, feed, num_examples):
    """True change of the mean loss when one unit's gate is closed, unit by unit."""
    compile_for_scoring(gated, labeled.graph.model, mean=True)

    def loss_with(mask):
        gated.mask = mask
        arguments = feed.fit_arguments(num_examples)
        if "steps_per_epoch" in arguments:
            arguments["steps"] = arguments.pop("steps_per_epoch")
        return gated.evaluate(**arguments, verbose=0, return_dict=True)["loss"]

    everything = np.ones(labeled.num_units)
    base = loss_with(everything)
    if not np.isfinite(base):
        raise ValueError(explain_nonfinite(gated, feed))
    changes = np.zeros(labeled.num_units)
    for unit in range(labeled.num_units):
        mask = everything.copy()
        mask[unit] = 0
        changes[unit] = loss_with(mask) - base
    return changes


def explain_nonfinite(gated, feed):
    """What to tell the user where the loss on a `datasets.Feed` is not finite."""
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
