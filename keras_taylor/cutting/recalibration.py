"""BatchNorm statistics taken anew, exactly, from data without labels."""

import keras
import numpy as np
from keras import ops

from keras_taylor.reading import graph as graphs
from keras_taylor.reading.walk import Walk


def reestimate(model, batches):
    """Sets, in place, the moving statistics of every BatchNormalization to those of the data.

    From the input to the output: each layer's mean and variance are those of all values that it reads
    in the model at inference, the layers before it done already; no exponential average.

    Args:
        model: A Functional or Sequential model.
        batches: For each batch a list of arrays, one an input of the model.
    """
    walk = Walk(graphs.read(model), batches)
    done = set()
    for number, call in enumerate(walk.graph.calls):
        if isinstance(call.operation, keras.layers.BatchNormalization) and call.name not in done:
            _set_statistics(call.operation, walk.tensors[call.inputs[0]])
            done.add(call.name)
        walk.run(number)
        walk.forget(number)


def _set_statistics(layer, column):
    mean, variance = moments(column, layer.axis)
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(variance)


def moments(column, axis):
    """Mean and variance of each channel over all batches of a tensor, float64 arrays."""
    num, total, squares, shift = 0, 0.0, 0.0, None
    for x in column:
        rows = np.moveaxis(ops.convert_to_numpy(ops.cast(x, "float32")), axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        shift = rows.mean(0) if shift is None else shift  # so that no digits cancel
        num += len(rows)
        total = total + (rows - shift).sum(0, dtype=np.float64)
        squares = squares + np.square(rows - shift).sum(0, dtype=np.float64)
    mean = total / num
    return shift + mean, np.maximum(squares / num - np.square(mean), 0)
