"""Labels sampled from a model's own predictions, for data that has none."""

import keras
import numpy as np

from keras_taylor.reading.cloning import losses_by_output
from keras_taylor.reading.graph import Graph
from keras_taylor.reading.walk import fixed_batch_size, run_batches
from keras_taylor.scores.losses import (
    BINARY_LOSSES,
    CLASS_LOSSES,
    ONE_HOT_LOSSES,
    REGRESSION_LOSSES,
    OutputLoss,
    kind_of,
)
from keras_taylor.support.arrays import as_float32, outputs_in_batches
from keras_taylor.support.datasets import Feed, flat_inputs
from keras_taylor.support.types import Array, FloatArray, IntArray

_PREDICTION_BATCH_SIZE = 128


def sample_labels(feed: Feed, graph: Graph, num_examples: int | None = None, seed: int = 0) -> Feed:
    """A feed of arrays with labels that are sampled from the model's own predictions.

    With such labels the mean squares of derivatives are the diagonal of the true Fisher information

        E_x E_{y ~ p(y | x)} [(d log p(y | x) / d gate)^2],

    where labels of the data would give the empirical one (Kunstner, Hennig and Balles, Limitations of the
    empirical Fisher approximation for natural gradient descent, NeurIPS 2019).

    Args:
        feed: The data; its labels are not used.
        graph: The graph of the compiled model.
        num_examples: Number of examples; `None`: all. A model of a fixed batch size gets whole batches only.
        seed: Seed of the random numbers.

    Raises:
        ValueError: for a loss that does not tell how labels are distributed; for fewer examples than the only
            batch size of a model.
    """
    model, size = graph.model, fixed_batch_size(graph)
    inputs = flat_inputs(feed, model, num_examples)
    if size is not None:
        inputs = _whole_batches(inputs, size)
    predicted = outputs_in_batches(
        lambda batch: as_float32(next(run_batches(graph, [batch]))),
        inputs,
        size or _PREDICTION_BATCH_SIZE,
        pad=False,
    )
    random = np.random.default_rng(seed)
    losses = losses_by_output(model, len(predicted))
    labels = [_sample_output(loss, y, random) for loss, y in zip(losses, predicted, strict=True)]
    x = keras.tree.pack_sequence_as(graph.root.inputs, inputs)
    y = keras.tree.pack_sequence_as(graph.root.outputs, labels)
    return Feed((x, y), model, size or feed.batch_size)


def _whole_batches(inputs: list[Array], size: int) -> list[Array]:
    """The first examples, as many as fill batches of the only size that a model takes."""
    num = len(inputs[0])
    if num < size:
        raise ValueError(
            f"The model takes batches of {size} examples only, and there are fewer. Expected {size} examples "
            f"or more, or a model that is built for any number. Received: ds with {num} examples"
        )
    return [x[: num // size * size] for x in inputs]


def _sample_output(loss: OutputLoss | None, predicted: FloatArray, random: np.random.Generator) -> Array:
    """Labels for one output, from the distribution whose negative log-likelihood the loss is."""
    name, from_logits = kind_of(loss)
    if name in BINARY_LOSSES or (name in ("crossentropy", "ce") and predicted.shape[-1] == 1):
        chances = 1 / (1 + np.exp(-predicted)) if from_logits else predicted
        return (random.random(predicted.shape) < chances).astype("float32")
    if name in CLASS_LOSSES | ONE_HOT_LOSSES:
        classes = _sample_classes(predicted, from_logits, random)
        return classes if name in CLASS_LOSSES else np.eye(predicted.shape[-1], dtype="float32")[classes]
    if name in REGRESSION_LOSSES:  # of a squared error: a normal distribution of variance 1/2
        return (predicted + random.normal(0, 0.5**0.5, predicted.shape)).astype("float32")
    if name == "poisson":
        return random.poisson(np.maximum(predicted, 0)).astype("float32")
    known = sorted(CLASS_LOSSES | ONE_HOT_LOSSES | BINARY_LOSSES | REGRESSION_LOSSES | {"poisson"})
    raise ValueError(
        f"It is not known how to draw labels for the loss '{name}'. Pass data with labels, or compile with "
        f"one of {', '.join(known)}. Received: model compiled with loss={loss!r}"
    )


def _sample_classes(predicted: FloatArray, from_logits: bool, random: np.random.Generator) -> IntArray:
    """One class for each row of probabilities or logits."""
    if from_logits:
        predicted = np.exp(predicted - predicted.max(-1, keepdims=True))
    sums = np.cumsum(predicted, -1, dtype=np.float64)
    thresholds = random.random((*predicted.shape[:-1], 1)) * sums[..., -1:]
    return np.minimum((sums < thresholds).sum(-1), predicted.shape[-1] - 1)
