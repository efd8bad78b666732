"""Writes `scores.json`: mean squared gate derivatives by central differences in float64.

Nothing here uses a gradient: one unit's gate at a time is moved by 2^-20 either
way, and the loss of each example is computed in NumPy. It runs on TensorFlow: JAX
has no float64 unless asked for, and on PyTorch the mean goes through float32.
`KERAS_BACKEND=tensorflow python tests/data/make_references.py`
"""

import json
import pathlib
import sys

import keras
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import zoo  # noqa: E402

from keras_taylor.reading.groups import label_model  # noqa: E402
from keras_taylor.scores.gated_model import GatedModel  # noqa: E402

MODELS = ["chain", "residual", "zero_pad_shortcut", "nested_three_deep", "siamese", "shared_layer"]
STEP = 2.0**-20


def example_losses(gated, x, target):
    y = keras.ops.convert_to_numpy(gated(x))
    assert y.dtype == np.float64
    return np.square(y - target).mean(-1)


def mean_squares(name):
    model = zoo.build(name)
    x = keras.tree.map_structure(lambda a: a.astype("float64"), zoo.inputs_of(model, num=6))
    target = np.linspace(-1, 1, 6 * model.output_shape[-1]).reshape(6, -1).astype("float32")
    channels = label_model(model)
    gated = GatedModel(channels)
    scores = np.zeros(channels.num_units)
    for unit in range(channels.num_units):
        losses = []
        for sign in (1, -1):
            mask = np.ones(channels.num_units)
            mask[unit] += sign * STEP
            gated.mask = mask
            losses.append(example_losses(gated, x, target))
        scores[unit] = np.square((losses[0] - losses[1]) / (2 * STEP)).mean()
    return {g.name: scores[g.start : g.start + g.num_units].tolist() for g in channels.groups}


if __name__ == "__main__":
    keras.config.set_floatx("float64")
    references = {name: mean_squares(name) for name in MODELS}
    (HERE / "scores.json").write_text(json.dumps(references, indent=1) + "\n")
