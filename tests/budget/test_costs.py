"""Parameters and FLOPs against counts by hand."""

import keras
import numpy as np
import pytest
import zoo
from helpers import NAMES, case
from keras import layers, ops

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model

pytestmark = [pytest.mark.once, pytest.mark.sweep(4)]


def costs_of(model, kept=None):
    return CostModel(label_model(model))(kept)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_count_params(name):
    model = case(name).model
    costs = costs_of(model)
    assert costs["params"] == model.count_params()
    if name == "open_decoder":  # of any length
        assert costs["flops"] is None
    else:
        assert costs["flops"] > 0


def flops_of(*stack, shape=(8, 8, 3)):
    x = inputs = keras.Input(shape)
    for layer in stack:
        x = layer(x)
    return costs_of(keras.Model(inputs, x))["flops"]


@pytest.mark.parametrize(
    ("flops", "stack"),
    [
        (2 * 6 * 6 * 3 * 3 * 3 * 5, [layers.Conv2D(5, 3)]),
        (2 * 4 * 4 * 3 * 3 * 3 * 5, [layers.Conv2D(5, 3, strides=2, padding="same")]),
        (2 * 4 * 4 * 3 * 3 * 3 * 5, [layers.Conv2D(5, 3, dilation_rate=2)]),
        (2 * 8 * 8 * 1 * 1 * 1 * 6, [layers.Conv2D(6, 1, groups=3)]),
        (2 * 6 * 6 * 3 * 3 * 3 * 2, [layers.DepthwiseConv2D(3, depth_multiplier=2)]),
        (2 * 6 * 6 * (3 * 3 * 3 * 2 + 6 * 5), [layers.SeparableConv2D(5, 3, depth_multiplier=2)]),
        (2 * 8 * 8 * 2 * 2 * 3 * 5, [layers.Conv2DTranspose(5, 2, strides=2)]),
        (2 * 8 * 8 * 3 * 5, [layers.Dense(5)]),
        (2 * 192 * 5, [layers.Flatten(), layers.Dense(5)]),
        (2 * 8 * 8 * 3, [layers.BatchNormalization()]),
        (8 * 8 * 3, [layers.ReLU()]),
        (8 * 8 * 3, [layers.GlobalAveragePooling2D()]),
        (4 * 4 * 3 * 4, [layers.MaxPooling2D(2)]),
        (0, [layers.Dropout(0.5)]),
        (0, [layers.Reshape((64, 3))]),
        (0, [layers.ZeroPadding2D(1)]),
        (0, [layers.Cropping2D(1)]),
    ],
)
def test_flops_of_one_layer(flops, stack):
    assert flops_of(*stack) == flops


def test_flops_of_a_layer_used_twice_count_twice():
    shared = layers.Dense(3)
    assert flops_of(shared, shared, shape=(3,)) == 2 * 2 * 3 * 3


def stepwise(x):
    return layers.TimeDistributed(layers.Dense(6))(x)


def fused(x):
    """Heads and positions in each other's place: channels lie where the positions belong."""
    x = ops.transpose(layers.Reshape((4, 5, 1))(x), (0, 2, 1, 3))
    return ops.dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("flops", "operation"),
    [
        (4 * 5, lambda x: ops.mean(x, axis=1)),
        (2 * 4 * 5 * 6, stepwise),
        (2 * 2 * 4 * 4 * 5, lambda x: layers.Attention()([x, x])),
        (2 * 4 * 4 * 5, lambda x: layers.Dot((2, 2))([x, x])),
        (2 * 2 * 4 * 5 * 5, fused),
        (2 * 4 * 5 * 11, lambda x: layers.ReversibleEmbedding(11, 5)(x, reverse=True)),
        (0, layers.Lambda(zoo.doubled)),
    ],
)
@pytest.mark.parametrize("has_channels", [False, True])
def test_flops_do_not_depend_on_whether_channels_are_locked(flops, operation, has_channels):
    x = inputs = keras.Input((5, 4))
    before = 5 * 4
    if has_channels:
        x = layers.Dense(4)(x)
        before = 2 * 5 * 4 * 4
    else:
        x = ops.relu(x)
    assert costs_of(keras.Model(inputs, operation(layers.Permute((2, 1))(x))))["flops"] == before + flops


def test_masks_that_nothing_reads_cost_nothing():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 4, mask_zero=True)(tokens)
    inner = keras.Input((6, 4))
    nested = keras.Model(inner, layers.Flatten()(ops.relu(inner)))
    costs = costs_of(keras.Model(tokens, nested(x)))
    assert (costs["flops"], costs["activation_memory"]) == (6 * 4, 4 * (6 + 6 * 4))


def test_flops_of_a_whole_network():
    model = case("chain").model
    conv1, norm, activation, down = 2 * 64 * 27 * 6, 2 * 64 * 6, 64 * 6, 64 * 6
    conv2, pool, head = 2 * 4 * 54 * 8, 4 * 8, 2 * 8 * 3
    assert costs_of(model)["flops"] == conv1 + norm + activation + down + conv2 + pool + head


def test_costs_without_some_units():
    model = case("chain").model
    kept = np.ones(14, bool)
    kept[[0, 1, 6]] = False  # two channels of conv1, one of conv2
    costs = costs_of(model, kept)
    assert costs["params"] == 27 * 4 + 4 * 4 + 9 * 4 * 7 + 7 + 7 * 3 + 3
    conv1, norm, activation, down = 2 * 64 * 27 * 4, 2 * 64 * 4, 64 * 4, 64 * 4
    conv2, pool, head = 2 * 4 * 36 * 7, 4 * 7, 2 * 7 * 3
    assert costs["flops"] == conv1 + norm + activation + down + conv2 + pool + head


def test_flops_are_unknown_where_the_size_is():
    x = inputs = keras.Input((None, None, 3))
    model = zoo.classified(inputs, layers.Conv2D(4, 3)(x))
    costs = costs_of(model)
    assert costs["flops"] is None
    assert costs["params"] == model.count_params()


def activation_memory_of(outputs, inputs):
    return costs_of(keras.Model(inputs, outputs))["activation_memory"]


def test_activation_memory_is_what_is_alive_at_the_worst_point():
    inputs = keras.Input((8, 8, 3))
    wide = layers.Conv2D(5, 1)(inputs)
    assert activation_memory_of(wide, inputs) == 4 * 64 * (3 + 5)
    fused = layers.ReLU()(layers.BatchNormalization()(wide))
    assert activation_memory_of(fused, inputs) == 4 * 64 * (3 + 5)
    assert activation_memory_of(layers.Conv2D(7, 1)(fused), inputs) == 4 * 64 * (5 + 7)
    assert activation_memory_of(layers.Add()([wide, layers.Conv2D(5, 1)(fused)]), inputs) == 4 * 64 * 15
    assert activation_memory_of(layers.DepthwiseConv2D(3, padding="same")(wide), inputs) == 4 * 64 * 10
    assert activation_memory_of([wide, layers.ReLU()(wide)], inputs) == 4 * 64 * 10
    flat = layers.Dense(2)(layers.Flatten()(wide))
    assert activation_memory_of(flat, inputs) == 4 * 64 * (3 + 5)


def test_activation_memory_is_unknown_with_sizes_that_are():
    inputs = keras.Input((None, 8, 3))
    assert activation_memory_of(layers.Conv2D(5, 1)(inputs), inputs) is None
