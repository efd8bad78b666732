"""Rules of single layers that no model of the zoo has."""

import keras
import numpy as np
import pytest
import zoo
from helpers import check_law_two
from keras import layers

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model

SIZE = (5, 6, 3)


def dense(x, units, name):
    return layers.Dense(units, activation="relu", name=name)(x)


def headed(inputs, x):
    x = layers.Dense(4, name="after")(x)
    return zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))


def units_of(model):
    return {g.name: g.num_units for g in label_model(model).groups}


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: layers.Conv2D(5, 2), "filters"),
        (lambda: layers.Dense(5, activation="tanh"), "units"),
        (lambda: layers.Conv2DTranspose(5, 2), "filters"),
        (lambda: layers.DepthwiseConv2D(2), None),
    ],
)
def test_spectral_normalization_is_what_it_wraps(layer, name):
    x = inputs = keras.Input(SIZE)
    x = layers.SpectralNormalization(layer(), name="normed")(dense(x, 6, "before"))
    model = headed(inputs, x)
    small = check_law_two(model, zoo.inputs_of(model))
    normed = small.get_layer("normed")
    assert name is None or getattr(normed.layer, name) < 5
    assert tuple(normed.vector_u.shape) == (1, normed.layer.kernel.shape[-1])
    small.compile("sgd", "mse")
    small.fit(zoo.inputs_of(model), np.zeros((4, 2)), verbose=0)


@pytest.mark.parametrize(
    ("axes", "first", "second", "units"),
    [
        (2, (4, 6), (4, 6), {"first": 6}),
        ((2, 2), (4, 6), (3, 6), {"first": 6}),
        (1, (4, 6), (4, 5), {}),
        ((2, 1), (4, 6), (6, 3), {}),
        ((1, 1), (4, 6), (4,), {"first": 6}),
    ],
)
def test_dot(axes, first, second, units):
    inputs = [keras.Input(first), keras.Input(second)]
    x = dense(inputs[0], first[-1], "first")
    y = dense(inputs[1], second[-1], "second") if len(second) > 1 else inputs[1]
    if axes == (2, 1):
        y = inputs[1]
    model = headed(inputs, layers.Dot(axes)([x, y]))
    assert units_of(model) == {**units, "after": 4}
    check_law_two(model, zoo.inputs_of(model))


def test_flops_of_dot():
    inputs = [keras.Input((4, 6)), keras.Input((3, 6))]
    pairs = keras.Model(inputs, layers.Dot(2)([dense(x, 5, f"dense{k}") for k, x in enumerate(inputs)]))
    assert CostModel(label_model(pairs))()["flops"] == 2 * 6 * 5 * 7 + 2 * 4 * 3 * 5
    sums = keras.Model(inputs, layers.Dot(2)(inputs))
    assert CostModel(label_model(sums))()["flops"] == 2 * 4 * 3 * 6


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: layers.UnitNormalization(), "normalized together ('layer'); `exact=False` opens it"),
        (lambda: layers.Masking(), "decides together with other channels whether a step is masked ('layer')"),
    ],
)
def test_what_locks_says_why(layer, why):
    x = inputs = keras.Input((4, 3))
    layer = layer()
    layer.name = "layer"
    channels = label_model(headed(inputs, layer(dense(x, 5, "before"))))
    assert {g.name: g.reason for g in channels.locked_groups}["before"] == why
    assert channels.unknown == []


def test_unit_normalization_over_another_axis_lets_channels_through():
    x = inputs = keras.Input((4, 3))
    model = headed(inputs, layers.UnitNormalization(axis=1)(dense(x, 5, "before")))
    assert units_of(model) == {"before": 5, "after": 4}
    check_law_two(model, zoo.inputs_of(model))
