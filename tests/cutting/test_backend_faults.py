"""Layers keep out of what would end the process."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND
from keras import layers

import keras_taylor
from keras_taylor.plans.plan import LayerPlan

# Without the guard this ends in "double free or corruption" or a segmentation fault, with AVX2 for sure.
SCRIPT = """
import keras, numpy as np, torch, keras_taylor
from keras import layers
from keras_taylor.plans.plan import LayerPlan
torch.set_num_threads(1)
inputs = keras.Input((16, 16, 3))
x = layers.Conv2D(16, 1, activation="relu", name="stem")(inputs)
y = layers.Conv2D(8, 3, strides=2, padding="same", name="main")(x)
x = layers.Add()([y, layers.Conv2D(8, 1, strides=2, name="shortcut")(x)])
model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
model.compile("sgd", "mse")
small = keras_taylor.prune(model, keras_taylor.Plan({"stem": LayerPlan(16, tuple(range(5)))}))
data = np.random.randn(16, 16, 16, 3).astype("float32"), np.zeros((16, 2))
small.fit(*data, batch_size=8, epochs=4, verbose=0)
prunable = keras_taylor.PrunableModel(small)
prunable.compile("sgd", "mse")
prunable.fit(*data, batch_size=8, epochs=4, verbose=0)
print("done")
"""


@pytest.mark.skipif(BACKEND != "torch", reason="a fault of oneDNN in PyTorch")
def test_narrow_strided_convolutions_train():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("strides", [2, (1, 3)])
def test_values_are_the_same(data_format, strides):
    if data_format == "channels_first" and BACKEND == "tensorflow":
        pytest.skip("TensorFlow has no such convolution on a CPU")
    inputs = keras.Input((9, 9, 9))
    x = layers.Conv2D(6, 1, strides=strides, data_format=data_format, activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, x)
    same = keras_taylor.prune(model, keras_taylor.Plan())
    data = np.random.default_rng(0).normal(size=(4, 9, 9, 9)).astype("float32")
    np.testing.assert_allclose(
        same.predict(data, verbose=0), model.predict(data, verbose=0), rtol=1e-6, atol=1e-6
    )
    assert same.get_layer("conv").get_config() == model.get_layer("conv").get_config()


@pytest.mark.parametrize(("num_kept", "is_wrong"), [(4, True), (3, False)])
def test_a_bias_that_keras_adds_along_another_axis_is_warned_of(num_kept, is_wrong, recwarn):
    """The warning is right: with as many units as the last axis has, the values differ from the sum's."""
    inputs = keras.Input((6, 4))
    x = layers.EinsumDense("abc,bd->adc", (5, 4), bias_axes="d", name="mix")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    model.get_layer("mix").bias.assign(np.arange(5.0)[:, None])
    plan = keras_taylor.Plan({"mix": LayerPlan(5, tuple(range(num_kept)))})
    small = keras_taylor.prune(model, plan)
    mix = small.get_layer("mix")
    data = np.ones((1, 6, 4), "float32")
    kernel, bias = (keras.ops.convert_to_numpy(w) for w in (mix.kernel, mix.bias))
    expected = np.einsum("abc,bd->adc", data, kernel) + bias
    differs = np.abs(keras.ops.convert_to_numpy(mix(data)) - expected).max() > 0.5
    said = [str(w.message) for w in recwarn if "along the last axis" in str(w.message)]
    assert differs == bool(said) == (is_wrong and BACKEND == "tensorflow")
