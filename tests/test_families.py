"""Backbones of KerasHub at small sizes, where it is installed (extra `hub`)."""

import pathlib
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
    **{"CSPNet": 0.9, "VGG": 0.95, "Xception": 0.9, "ViT": 0.3, "SegFormer": 0.2, "DeepLabV3": 0.5},
    **{"MiT": 0.2, "BERT": 0.5, "RoBERTa": 0.5, "DistilBERT": 0.5, "ALBERT": 0.4, "Whisper": 0.3},
    **{"GPT-2": 0.35, "Gemma": 0.55, "Llama": 0.45, "Mistral": 0.45, "Phi-3": 0.45, "Qwen": 0.5},
}


@pytest.mark.filterwarnings("ignore:The class .* does not take what its `get_config` gives")
@pytest.mark.filterwarnings("ignore:The `get_config` of class .* fails")
@pytest.mark.parametrize("name", REACHABLE)
def test_pruned_backbones_obey_the_laws(name):
    model = zoo.randomized(families.backbones()[name]())
    reachable = keras_taylor.analyze(model).reachable["params"]
    assert reachable >= REACHABLE[name]
    gone, law2, loaded, trains = families.laws(model, reachable)
    assert float(gone.rstrip("%")) / 100 >= min(families.GOAL, 0.9 * reachable) - 1e-3
    assert float(law2) <= 1e-5 and trains == "yes"
    assert loaded == "no" or float(loaded) <= 1e-5


@pytest.mark.parametrize("name", ["GPT-2", "Gemma"])
def test_decoders_take_any_length_and_keep_their_classes(name):
    model = zoo.randomized(families.backbones()[name]())
    small = keras_taylor.prune(model, helpers.random_plan(model))
    assert [type(layer) for layer in small.layers] == [type(layer) for layer in model.layers]
    assert [x.shape for x in small.inputs] == [(None, None)] * 2
    x = {tensor.name: np.ones((2, 11), "int32") for tensor in model.inputs}
    assert helpers.predict(small, x)[0].shape == (2, 11, 16)


def test_every_backbone_is_tested():
    assert set(REACHABLE) == set(families.backbones())
