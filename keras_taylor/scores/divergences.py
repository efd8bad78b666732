"""Predictions of a model with gates, and how far they are from those that are wanted."""

import keras
import numpy as np

from keras_taylor.scores.losses import BINARY, CLASSES, ONE_HOT, kind_of, losses_by_output
from keras_taylor.support.arrays import as_float32, outputs_in_batches

_BATCH_SIZE = 128


def predictions(gated, graph, inputs, batch_size=None):
    """Flattened outputs as float32 arrays.

    Args:
        gated: The model that predicts, with the inputs of the one in `graph`.
        graph: `graph.Graph`.
        inputs: Flattened inputs, a list of arrays.
        batch_size: Examples a batch; `None`: 128.
    """
    structure = graph.root.inputs
    return outputs_in_batches(
        lambda batch: as_float32(gated.predict_on_batch(keras.tree.pack_sequence_as(structure, batch))),
        inputs,
        min(len(inputs[0]), batch_size or _BATCH_SIZE),
    )


def mean_divergence(model, wanted, ours):
    """Mean over a model's outputs of the `divergence` of flattened predictions from those that are wanted."""
    losses = losses_by_output(model, len(ours))
    return float(np.mean([divergence(*one) for one in zip(losses, wanted, ours, strict=True)]))


def divergence(loss, wanted, ours):
    """Mean over examples of how far predictions of one output are from those that are wanted.

    Args:
        loss: What the output was compiled with; `None` counts as a loss of numbers.
        wanted, ours: Outputs `(num_examples, ...)`.

    Returns:
        Kullback-Leibler divergence in nats for classes, relative squared difference for numbers.
    """
    name, from_logits = kind_of(loss) if loss is not None else ("", False)
    wanted, ours = wanted.astype(np.float64), ours.astype(np.float64)
    if name in BINARY:
        p, q = ((1 / (1 + np.exp(-y)) if from_logits else y) for y in (wanted, ours))
        return float((_relative_entropy(p, q) + _relative_entropy(1 - p, 1 - q)).mean())
    if name in CLASSES | ONE_HOT and wanted.shape[-1] > 1:
        p, q = ((_softmax(y) if from_logits else y) for y in (wanted, ours))
        return float(_relative_entropy(p, q).sum(-1).mean())
    return float(np.square(ours - wanted).mean() / max(np.square(wanted).mean(), 1e-30))


def _relative_entropy(p, q):
    return p * np.log(np.maximum(p, 1e-12) / np.maximum(q, 1e-12))


def _softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
