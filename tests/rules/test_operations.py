"""Operations of `keras.ops` between layers: their groups, their units, and law 2."""

import keras
import numpy as np
import pytest
import zoo
from helpers import BACKEND, check_law_two
from keras import layers, ops

from keras_taylor.reading.groups import label_model

BLUR = np.ones((2, 2), "float32")[..., None, None]


def norms(x):
    return x / (1 + ops.norm(x, axis=(1, 2), keepdims=True))


def standardized(x):
    mean, variance = ops.moments(x, axes=(1, 2), keepdims=True)
    return (x - mean) / ops.sqrt(1 + variance)


def positions(x):
    return ops.cast(ops.argmax(x, axis=1, keepdims=True), "float32") * x


ALL = {"before": 8}
PAIRS = {"before": 4}
# What happens to 8 channels on the last axis, and the units that are left.
CASES = {
    "resized": (lambda x: ops.image.resize(x, (9, 9)), ALL),
    "resized to the nearest": (lambda x: ops.image.resize(x, (3, 9), interpolation="nearest"), ALL),
    "pooled": (lambda x: ops.max_pool(x, 2, 2), ALL),
    "averaged": (lambda x: ops.average_pool(x, 2, 2, padding="same"), ALL),
    "padded behind": (lambda x: ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, 3]]), {"before": 8, "pad": 3}),
    "padded": (lambda x: ops.image.pad_images(x, 1, 1, target_height=9, target_width=8), ALL),
    "cropped": (lambda x: ops.image.crop_images(x, 1, 1, target_height=3, target_width=4), ALL),
    "blurred": (ops.image.gaussian_blur, ALL),
    "blurred by a constant": (lambda x: ops.depthwise_conv(x, np.tile(BLUR, (1, 1, 8, 1))), ALL),
    "blurred twice by a constant": (lambda x: ops.depthwise_conv(x, np.tile(BLUR, (1, 1, 8, 2))), ALL),
    "read by a constant": (lambda x: ops.conv(x, np.tile(BLUR, (1, 1, 8, 3))), ALL),
    "summed by a constant": (lambda x: ops.tensordot(x, np.ones((8, 3), "float32"), 1), ALL),
    "inner product": (lambda x: ops.inner(x, np.ones((3, 8), "float32")), ALL),
    "axes moved": (lambda x: ops.moveaxis(ops.moveaxis(x, -1, 1), [1, 2], [3, 1]), ALL),
    "norms": (norms, ALL),
    "standardized": (standardized, ALL),
    "positions": (positions, ALL),
    "medians": (lambda x: x - ops.median(x, axis=1, keepdims=True), ALL),
    "inverse": (lambda x: ops.arcsinh(ops.erfinv(ops.tanh(x))), ALL),
    "lengths": (lambda x: ops.hypot(x, ops.fmax(x, ops.roll(x, 1, 1))), ALL),
    "normalized over space": (lambda x: ops.normalize(x, axis=1), ALL),
    "differences": (lambda x: ops.diff(ops.sort(x, axis=1), axis=2), ALL),
    "rows": (lambda x: ops.take(x, [0, 3, 3], axis=1), ALL),
    "a row": (lambda x: ops.take(x, 2, axis=1)[:, None], ALL),
    "picked": (lambda x: ops.take(x, [6, 2, -3], axis=-1), {"before": 5, "before#2": 3}),
    "picked by an array": (
        lambda x: ops.take(x, np.array([1, 0, 1]), axis=-1),
        {"before": 1, "before#2": 1, "before#3": 6},
    ),
    "one": (lambda x: ops.take(x, 2, axis=-1)[..., None] * x, {"before": 7}),
    "one by its index": (lambda x: x[..., -2][..., None] * x, {"before": 7}),
    "every second": (lambda x: x[..., ::2], PAIRS),
    "every second, from the first to the sixth": (lambda x: x[..., 1:6:2], {"before": 3, "before#2": 2}),
    "both halves of pairs": (lambda x: x[..., ::2] * x[..., 1::2], PAIRS),
    "every third": (lambda x: x[..., 2::3], {"before": 2, "before#2": 2}),
    "flipped": (lambda x: ops.flip(x, (1, 3)), ALL),
    "flipped and added": (lambda x: ops.flip(x, -1) + x, PAIRS),
    "rolled": (lambda x: ops.roll(x, 3, -1), ALL),
    "rolled back and forth": (lambda x: ops.roll(ops.roll(x, -3, -1), 3, -1) + x, ALL),
    "split evenly": (lambda x: ops.concatenate(ops.array_split(x, 2, -1)[::-1], -1), PAIRS),
    "split unevenly": (lambda x: ops.concatenate(ops.array_split(x, 3, -1), -1), {}),
    "split by columns": (
        lambda x: ops.transpose(ops.dstack(ops.dsplit(ops.transpose(x, (0, 1, 3, 2)), [3])), (0, 1, 3, 2)),
        {"before": 3, "before#2": 5},
    ),
    "split in front": (lambda x: ops.hstack(ops.hsplit(x, 2)[::-1]), ALL),
    "appended": (lambda x: ops.append(x, ops.relu(x), axis=-1), ALL),
    "gated": (ops.glu, PAIRS),
    "gated over space": (lambda x: ops.glu(x, axis=2), ALL),
    "pixels from channels": (lambda x: ops.depth_to_space(x, 2), {"before": 2}),
    "channels from pixels": (lambda x: ops.space_to_depth(x, 3), ALL),
    "patches": (lambda x: ops.image.extract_patches(x, 3), ALL),
    "quantiles": (lambda x: ops.nanpercentile(x[:, :, :1], 30, axis=1, keepdims=True), ALL),  # slow on TF
    "spectrum": (lambda x: ops.rfft(ops.transpose(x, (0, 1, 3, 2)))[0][:, :, None, :, 0], ALL),
    "a mapped function": (lambda x: ops.vectorized_map(ops.relu, x), ALL),
    "bounded alike": (lambda x: ops.clip(x, 0, 1), ALL),
    "bounded each": (lambda x: ops.clip(x, np.zeros(8), np.arange(8.0)), {}),
    "mixed": (lambda x: ops.sort(x, axis=-1), {}),
    "a transform": (lambda x: ops.image.affine_transform(x, ops.mean(x, (1, 2))), {}),
}
if BACKEND != "torch":  # it has no negative steps
    CASES["backward"] = (lambda x: x[..., ::-1], ALL)
    CASES["every third, backward"] = (lambda x: x[..., ::-3], {"before": 2, "before#2": 1})
if BACKEND == "jax":
    del CASES["quantiles"]  # Keras cannot run them there


def model_with(function, size=(6, 6, 3)):
    x = inputs = keras.Input(size)
    x = function(layers.Dense(8, name="before")(x))
    x = layers.Dense(4, activation="relu", name="after")(x)
    return zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(ops.mean(x, (1, 2)))))


def units_of(model):
    units = {group.name: group.num_units for group in label_model(model).groups}
    assert units.pop("after") == 4
    return units


@pytest.mark.parametrize("case", CASES)
def test_groups_and_units(case):
    function, units = CASES[case]
    assert units_of(model_with(function)) == units


@pytest.mark.sweep(8)
@pytest.mark.parametrize("case", CASES)
def test_gates_at_zero_equal_the_pruned_model(case):
    model = model_with(CASES[case][0])
    check_law_two(model, zoo.inputs_of(model))
