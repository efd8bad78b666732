"""Backbones of KerasHub at small sizes, where it is installed (extra `hub`)."""

import os
import pathlib
import subprocess
import sys

import helpers
import numpy as np
import pytest
import zoo

import keras_taylor

pytest.importorskip("keras_hub")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import families

# The share of the parameters that can go, at least.
REACHABLE = {
    **{"ResNet": 0.95, "ResNet, bottleneck": 0.95, "EfficientNet": 0.95, "MobileNet": 0.9, "DenseNet": 0.9},
    **{"CSPNet": 0.9, "VGG": 0.95, "Xception": 0.9, "ViT": 0.3, "SegFormer": 0.5, "DeepLabV3": 0.5},
    **{"MiT": 0.5, "BERT": 0.5, "RoBERTa": 0.5, "DistilBERT": 0.5, "ALBERT": 0.4, "Whisper": 0.3},
    **{"GPT-2": 0.35, "Gemma": 0.55, "Llama": 0.45, "Mistral": 0.45, "Phi-3": 0.45, "Qwen": 0.5},
}


@pytest.mark.sweep(6)
@pytest.mark.filterwarnings("ignore:The `get_config` of class")
@pytest.mark.parametrize("name", REACHABLE)
def test_pruned_backbones_obey_the_laws(name):
    model = zoo.randomized(families.free(families.backbones()[name]()))
    reachable = keras_taylor.analyze(model).reachable["params"]
    assert reachable >= REACHABLE[name]
    gone, law2, loaded, trains = families.laws(model, reachable)
    assert float(gone.rstrip("%")) / 100 >= min(families.GOAL, 0.9 * reachable) - 1e-3
    assert float(law2) <= 1e-5 and trains == "yes"
    assert float(loaded) <= 1e-5


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:The `get_config` of class")
@pytest.mark.slow
def test_what_holds_layers_that_do_not_say_what_they_are_made_from_loads_without_this_package(tmp_path):
    data = {}
    for name in ("ViT", "MiT", "Llama"):
        model = zoo.randomized(families.free(families.backbones()[name]()))
        small = keras_taylor.prune(model, helpers.random_plan(model))
        small.save(tmp_path / f"{name}.keras")
        x = families.random_inputs(model)
        data |= {f"{name} {key}": value for key, value in (x if isinstance(x, dict) else {"": x}).items()}
        data[f"{name} wanted"] = families.predicted(small, x)[0]
    np.savez(tmp_path / "data.npz", **data)
    code = (
        "import sys, keras, keras_hub, numpy as np; folder = sys.argv[1]\n"
        "for name in ('ViT', 'MiT', 'Llama'):\n"
        "    model = keras.models.load_model(f'{folder}/{name}.keras')\n"
        "    data = np.load(folder + '/data.npz').items()\n"
        "    x = {key.partition(' ')[2]: value for key, value in data if key.startswith(name)}\n"
        "    wanted = x.pop('wanted')\n"
        "    y = keras.tree.flatten(model(x.get('', x), training=False))[0]\n"
        "    y = keras.ops.convert_to_numpy(y)\n"
        "    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)\n"
        "assert 'keras_taylor' not in sys.modules"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)


@pytest.mark.once
@pytest.mark.parametrize("name", ["GPT-2", "Gemma"])
def test_decoders_take_any_length_and_keep_their_classes(name):
    model = zoo.randomized(families.free(families.backbones()[name]()))
    small = keras_taylor.prune(model, helpers.random_plan(model))
    assert [type(layer) for layer in small.layers] == [type(layer) for layer in model.layers]
    assert [x.shape for x in small.inputs] == [(None, None)] * 2
    x = {tensor.name: np.ones((2, 11), "int32") for tensor in model.inputs}
    assert helpers.predict(small, x)[0].shape == (2, 11, 16)


def test_every_backbone_is_tested():
    assert set(REACHABLE) == set(families.backbones())
