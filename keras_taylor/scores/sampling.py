"""Labels drawn from a model's own predictions, for data that has none."""

import keras
import numpy as np
from keras import ops

from keras_taylor.reading.walk import run_batches
from keras_taylor.scores.losses import BINARY, CLASSES, ONE_HOT, REAL, kind_of, losses_by_output
from keras_taylor.support.datasets import Feed, flat_inputs

_ROWS = 128


def with_drawn_labels(feed, graph, num_examples=None, seed=0):
    """A feed of arrays whose labels are drawn from what the model itself predicts.

    With such labels the mean squares of derivatives are the diagonal of the true Fisher
    information: the label is averaged out over what the model believes, not taken from data
    (Kunstner et al., Limitations of the empirical Fisher approximation, NeurIPS 2019).

    Args:
        feed: `datasets.Feed`; labels in it are not used.
        graph: `graph.Graph` of the compiled model.
        num_examples: So many examples; `None`: all.
        seed: Of the draws.

    Returns:
        Another `Feed`.

    Raises:
        ValueError: for a loss of which it is not known what it believes about labels.
    """
    model = graph.model
    inputs = flat_inputs(feed, model, num_examples)
    batches = ([x[k : k + _ROWS] for x in inputs] for k in range(0, len(inputs[0]), _ROWS))
    parts = [[_array(y) for y in outputs] for outputs in run_batches(graph, batches)]
    random = np.random.default_rng(seed)
    flat = [np.concatenate(column) for column in zip(*parts, strict=True)]
    drawn = [
        _drawn(loss, y, random) for loss, y in zip(losses_by_output(model, len(flat)), flat, strict=True)
    ]
    structures = graph.root
    x = keras.tree.pack_sequence_as(structures.inputs, inputs)
    y = keras.tree.pack_sequence_as(structures.outputs, drawn)
    return Feed((x, y), model, feed.batch_size)


def _drawn(loss, predicted, random):
    """Labels for one output."""
    name, from_logits = kind_of(loss)
    if name in BINARY or (name in ("crossentropy", "ce") and predicted.shape[-1] == 1):
        chances = 1 / (1 + np.exp(-predicted)) if from_logits else predicted
        return (random.random(predicted.shape) < chances).astype("float32")
    if name in CLASSES | ONE_HOT:
        classes = _classes(predicted, from_logits, random)
        return classes if name in CLASSES else np.eye(predicted.shape[-1], dtype="float32")[classes]
    if name in REAL:  # of a squared error: a normal distribution of variance 1/2
        return (predicted + random.normal(0, 0.5**0.5, predicted.shape)).astype("float32")
    if name == "poisson":
        return random.poisson(np.maximum(predicted, 0)).astype("float32")
    raise ValueError(
        f"It is not known how to draw labels for the loss '{name}'. Pass data with labels, or compile with "
        f"one of {', '.join(sorted(CLASSES | ONE_HOT | BINARY | REAL | {'poisson'}))}. "
        f"Received: model compiled with loss={loss!r}"
    )


def _classes(predicted, from_logits, random):
    if from_logits:
        predicted = np.exp(predicted - predicted.max(-1, keepdims=True))
    sums = np.cumsum(predicted, -1, dtype=np.float64)
    chosen = random.random((*predicted.shape[:-1], 1)) * sums[..., -1:]
    return np.minimum((sums < chosen).sum(-1), predicted.shape[-1] - 1)


def _array(y):
    return np.array(ops.convert_to_numpy(ops.cast(y, "float32")))
