"""A model's inputs as flat lists of arrays, out of any data."""

import keras
import numpy as np


def flat_inputs(feed, model, num=None):
    """Flattened inputs as arrays, with the shapes and dtypes of the model's: all, or so many.

    Args:
        feed: A `datasets.Feed`.
        model: The model whose inputs they are.
        num: How many: evenly spread over arrays, the first ones of an iterable.
    """
    parts = [_flat(x, model) for x, *_ in feed.some(num)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def inputs_and_targets(feed, model):
    """All flattened inputs as `flat_inputs` gives them, and the targets in their structure."""
    parts = [(_flat(x, model), y) for x, y, _ in feed.batches()]
    x = [np.concatenate(column) for column in zip(*(x for x, _ in parts), strict=True)]
    y = keras.tree.map_structure(
        lambda *ys: np.concatenate([keras.ops.convert_to_numpy(one) for one in ys]), *(y for _, y in parts)
    )
    return x, y


def _flat(x, model):
    """A batch as a list of arrays in the order and with the shapes and dtypes of the model's inputs."""
    names = [t.name for t in model.inputs]
    if isinstance(x, dict) and set(names) <= set(x):
        leaves = [x[name] for name in names]
    else:
        leaves = keras.tree.flatten(x)
    arrays = []
    for leaf, t in zip(leaves, model.inputs, strict=True):
        array = leaf if isinstance(leaf, np.ndarray) else keras.ops.convert_to_numpy(leaf)
        array = array.astype(keras.backend.standardize_dtype(t.dtype))
        # an axis of size 1 at the end may be missing or added, as in `fit`
        if array.ndim + 1 == len(t.shape):
            array = array[..., None]
        elif array.ndim == len(t.shape) + 1:
            array = array[..., 0]
        arrays.append(array)
    return arrays
