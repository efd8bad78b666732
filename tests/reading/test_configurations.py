"""Layers whose `get_config` does not suffice to copy them: copies, files, and warnings."""

import os
import re
import subprocess
import sys
import warnings

import faulty_layers as faulty
import keras
import numpy as np
import pytest
import zoo
from helpers import predict
from keras import layers, ops

import keras_taylor
from keras_taylor.reading.cloning import clone_operation
from keras_taylor.reading.configurations import configuration_of

X = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
LOADS = "The smaller model is saved with the values that the layer was made from, so that its file loads. "

FAULTY = {
    "fails": (
        lambda: faulty.Failing(3.0, "tanh", "zeros"),
        r"`Failing` fails \(AttributeError: 'Failing' object has no attribute 'rate'\)\. ",
    ),
    "fails, as Llama's": (lambda: faulty.Failing(3.0, ops.silu), r"`Failing` fails \(.*\)\. "),
    "says too much and too little": (
        lambda: faulty.Telling(3.0, 0.5),
        "`Telling` gives `half`, which `__init__` does not take and leaves out `shift`. ",
    ),
    "leaves out a function": (
        lambda: faulty.Silent(3.0, keras.activations.tanh),
        "`Silent` leaves out `activation`. ",
    ),
    "says what it sets itself": (
        lambda: faulty.Narrowed(3.0),
        "`Narrowed` gives `shift`, which `__init__` does not take. ",
    ),
    "takes no name": (
        lambda: faulty.Bare(3.0, 0.5),
        "`Bare` gives `dtype`, `trainable`, which `__init__` does not take. ",
    ),
}

pytestmark = pytest.mark.sweep(2)


def around(layer):
    inputs = keras.Input((4,))
    x = layers.Dense(8, "relu", name="hidden")(inputs)
    x = layer(layers.Dense(6, name="read")(x))
    return zoo.randomized(keras.Model(inputs, layers.Dense(3, name="head")(x)))


def without_half(model):
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    return keras_taylor.prune(model, plan)


@pytest.mark.parametrize("case", FAULTY)
def test_a_copy_from_completed_values_is_the_same_and_warns(case):
    make, fault = FAULTY[case]
    model = around(make())
    with pytest.warns(UserWarning, match=f"The `get_config` of class {fault}{LOADS}"):
        same = keras_taylor.prune(model, keras_taylor.Plan())
    np.testing.assert_array_equal(predict(same, X)[0], predict(model, X)[0])


@pytest.mark.filterwarnings("ignore:The `get_config` of class")
def test_the_file_loads_without_this_package_and_can_be_saved_after_an_empty_plan(tmp_path):
    wanted = {}
    for number, (make, _) in enumerate(FAULTY.values()):
        small = without_half(around(make()))
        wanted[str(number)] = predict(small, X)[0]
        small.save(tmp_path / f"{number}.keras")
    np.savez(tmp_path / "wanted.npz", x=X, **wanted)
    code = (
        "import sys, keras, faulty_layers, numpy as np; folder = sys.argv[1]\n"
        "data = np.load(folder + '/wanted.npz')\n"
        "for number in sorted(set(data.files) - {'x'}):\n"
        "    model = keras.models.load_model(f'{folder}/{number}.keras')\n"
        "    y = model.predict(data['x'], verbose=0)\n"
        "    np.testing.assert_allclose(y, data[number], rtol=1e-5, atol=1e-6)\n"
        "assert 'keras_taylor' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(zoo.__file__)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for number, found in wanted.items():
        again = keras_taylor.prune(keras.models.load_model(tmp_path / f"{number}.keras"), keras_taylor.Plan())
        again.save(tmp_path / "again.keras")
        loaded = keras.models.load_model(tmp_path / "again.keras")
        np.testing.assert_allclose(predict(loaded, X)[0], found, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The `get_config` of class")
def test_a_smaller_model_of_a_smaller_one_keeps_the_configuration():
    small = without_half(without_half(around(faulty.Telling(3.0, 0.5, name="telling"))))
    config = small.get_layer("telling").get_config()
    assert (config["factor"], config["shift"], config["name"]) == (3.0, 0.5, "telling")
    assert "half" not in config
    small.get_layer("telling").trainable = False
    assert small.get_layer("telling").get_config()["trainable"] is False


def test_a_layer_that_cannot_be_loaded_says_why():
    model = around(faulty.Holding(3.0, lambda x: 2 * x))
    with pytest.warns(UserWarning) as caught:
        same = keras_taylor.prune(model, keras_taylor.Plan())
    (text,) = {str(one.message) for one in caught if "`get_config`" in str(one.message)}
    assert re.fullmatch(
        r"The `get_config` of class `Holding` fails \(AttributeError: .*\)\. The smaller model can be used "
        r"and trained, but not loaded from a file: `function` would be \{.*\}\. Give the class a "
        r"`get_config` that returns all arguments of `__init__`, as values that a file can hold\.",
        text,
    )
    np.testing.assert_array_equal(predict(same, X)[0], predict(model, X)[0])


def test_a_layer_inside_is_not_shared_with_the_copy():
    model = around(faulty.Wrapping(layers.Dense(6), name="wrapping"))
    with pytest.raises(keras_taylor.UnsupportedModelError) as error:
        keras_taylor.prune(model, keras_taylor.Plan())
    text = str(error.value)
    assert text.startswith(
        "Layer 'wrapping' cannot be made again from its configuration (NotImplementedError"
    )
    assert text.endswith("Received: wrapping=<Wrapping name=wrapping, built=True>")


@pytest.mark.parametrize(
    "layer",
    [
        faulty.Parsing(3.0, 0.5),
        faulty.Silent(3.0, ops.relu),
        zoo.Block(4),
    ],
    ids=["own from_config", "function of two names", "sound"],
)
def test_a_correct_configuration_is_not_changed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        clone = clone_operation(layer, layer.name)
    assert configuration_of(layer) == layer.get_config() == clone.get_config()
    assert "get_config" not in vars(clone)
