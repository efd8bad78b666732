"""A trained CIFAR-10 ResNet-20, where its file is at hand (KERAS_TAYLOR_DATA names the folder)."""

import os
import pathlib

import keras
import numpy as np
import pytest
from helpers import random_plan, relative_difference

import keras_taylor
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel

BESIDE = pathlib.Path(__file__).parents[2] / "shared" / "data"
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", BESIDE))
pytestmark = pytest.mark.skipif(
    not (DATA / "resnet20_cifar10.keras").exists(), reason="no resnet20_cifar10.keras in KERAS_TAYLOR_DATA"
)


@pytest.fixture(scope="module")
def trained():
    with np.load(DATA / "cifar10_4k1k.npz") as data:
        x, y = data["x_test"][:200], data["y_test"][:200].reshape(-1)
    x = ((x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype("float32")
    model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model, x, y


def test_all_but_the_logits_can_go(trained):
    analysis = keras_taylor.analyze(trained[0])
    assert analysis.reachable["params"] > 0.99
    assert {group.name for group in analysis.groups if not group.prunable} == {"linear"}


def test_gates_at_zero_equal_the_pruned_model(trained):
    model, x, _ = trained
    plan = random_plan(model, fraction=0.2)
    channels = label_model(model)
    gated = GatedModel(channels)
    gated.mask = kept_units(channels, plan)
    small = keras_taylor.prune(model, plan)
    outputs = [[keras.ops.convert_to_numpy(m(x[:8], training=False))] for m in (gated, small, model)]
    assert relative_difference(outputs[0], outputs[1]) <= 1e-5
    assert relative_difference(outputs[2], outputs[1]) > 1e-2


def test_taylor_keeps_more_accuracy_than_chance(trained):
    model, x, y = trained
    accuracies = {}
    for criterion in ("taylor", "random"):
        scores = keras_taylor.score(model, (x, y), criterion=criterion)
        small = keras_taylor.prune(model, keras_taylor.make_plan(model, scores, 0.2))
        accuracies[criterion] = small.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    assert accuracies["taylor"] > accuracies["random"] + 0.2


@pytest.mark.slow
def test_pruned_while_training_it_strips_to_the_same(trained):
    model, x, y = trained
    prunable = keras_taylor.PrunableModel(model)
    callback = keras_taylor.TaylorPruning(0.3, frequency=1)
    prunable.fit(x[:96], y[:96], batch_size=32, epochs=1, verbose=0, callbacks=[callback])
    small = prunable.strip()
    assert 0.69 < small.count_params() / model.count_params() <= 0.7
    outputs = [small.predict(x, verbose=0)], [prunable.predict(x, verbose=0)]
    assert relative_difference(*outputs) < 1e-5
