"""Recurrent layers lose channels that they read, and units that they make."""

import keras
import numpy as np
import pytest
import zoo
from helpers import case, check_law_two, predict
from keras import layers, ops

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model

SEQUENCE, VIDEO = (4, 3), (3, 5, 5, 2)

pytestmark = pytest.mark.sweep(2)


def model_of(layer, shape=SEQUENCE):
    """The layer behind a dense one, and something that reads it."""
    x = inputs = keras.Input(shape)
    x = layers.Dense(6, activation="relu", name="before")(x)
    outputs = keras.tree.flatten(layer(x))
    outputs = [layers.Flatten()(y) for y in outputs]
    x = layers.Concatenate()(outputs) if len(outputs) > 1 else outputs[0]
    return zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(x)))


def recurrent_kernels(layer):
    return [w for w in layer.weights if w.name == "recurrent_kernel"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.LSTM(3), SEQUENCE),
        (lambda: layers.LSTM(3, return_state=True, return_sequences=True, use_bias=False), SEQUENCE),
        (lambda: layers.GRU(3, reset_after=False, go_backwards=True), SEQUENCE),
        (lambda: layers.GRU(3, unroll=True), SEQUENCE),
        (lambda: layers.SimpleRNN(3, return_sequences=True), SEQUENCE),
        (lambda: layers.RNN(layers.LSTMCell(3)), SEQUENCE),
        (lambda: layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="ave"), SEQUENCE),
        (lambda: layers.Bidirectional(layers.GRU(3, return_state=True), merge_mode=None), SEQUENCE),
        (
            lambda: layers.Bidirectional(
                layers.SimpleRNN(3), backward_layer=layers.LSTM(3, go_backwards=True)
            ),
            SEQUENCE,
        ),
        (lambda: layers.Bidirectional(layers.RNN(layers.GRUCell(3))), SEQUENCE),
        (lambda: layers.Bidirectional(layers.ConvLSTM1D(3, 2, return_sequences=True)), (3, 5, 2)),
        (lambda: layers.ConvLSTM1D(3, 2), (3, 5, 2)),
        (lambda: layers.ConvLSTM2D(3, 2, return_state=True, dilation_rate=2), VIDEO),
        (lambda: layers.ConvLSTM3D(2, 2, return_sequences=True), (2, 3, 3, 3, 2)),
        (lambda: layers.TimeDistributed(layers.LSTM(3)), (2, *SEQUENCE)),
        (lambda: layers.TimeDistributed(layers.Flatten()), VIDEO),
        (lambda: layers.TimeDistributed(layers.TimeDistributed(layers.Dense(4))), VIDEO),
    ],
)
def test_what_a_recurrent_layer_reads_and_makes_can_leave(layer, shape):
    layer = layer()
    model = model_of(layer, shape)
    small = check_law_two(model, zoo.inputs_of(model))
    assert small.get_layer("before").units < 6
    pairs = zip(recurrent_kernels(small), recurrent_kernels(layer), strict=True)
    assert all(new.shape[-2] < old.shape[-2] for new, old in pairs)


def test_units_are_one_with_what_they_meet():
    x = inputs = keras.Input(SEQUENCE)
    lstm = layers.LSTM(3, name="lstm", return_sequences=True)(layers.Dense(5, name="before")(x))
    met = layers.Add()([lstm, layers.Dense(3, name="met")(x)])
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(met)))
    channels = label_model(model)
    assert [(g.name, g.producers) for g in channels.groups] == [
        ("before", ("before",)),
        ("lstm", ("lstm", "met")),
    ]
    small = check_law_two(model, zoo.inputs_of(model))
    assert small.get_layer("lstm").units == small.get_layer("met").units == 2


def test_a_layer_that_is_used_twice_has_one_set_of_units():
    inputs = [keras.Input((4, 3)), keras.Input((2, 3))]
    lstm = layers.LSTM(4, return_state=True, name="lstm")
    first, *states = lstm(inputs[0])
    second, *_ = lstm(inputs[1], initial_state=states)
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2)(layers.Concatenate()([first, second]))))
    assert [(g.name, g.num_units) for g in label_model(model).groups] == [("lstm", 4)]
    assert check_law_two(model, zoo.inputs_of(model)).get_layer("lstm").units == 2


def with_states(states):
    inputs = keras.Input(SEQUENCE)
    x = layers.LSTM(3, name="lstm")(
        layers.Dense(6, name="before")(inputs), initial_state=states(inputs[:, 0])
    )
    return zoo.randomized(keras.Model(inputs, layers.Dense(2)(layers.Dense(4, name="after")(x))))


def test_states_that_are_given_leave_with_the_units_whose_past_they_are():
    model = with_states(lambda x: [layers.Dense(3, name=name)(x) for name in ("h", "c")])
    assert [(g.name, g.producers) for g in label_model(model).groups] == [
        ("before", ("before",)),
        ("h", ("h", "c", "lstm")),
        ("after", ("after",)),
    ]
    small = check_law_two(model, zoo.inputs_of(model))
    assert [small.get_layer(name).units for name in ("h", "c", "lstm")] == [2, 2, 2]


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        (lambda x: [layers.Dense(3)(x), x], "meets values in 'lstm' that stay whole"),
        (lambda x: [np.ones((4, 3), "float32")] * 2, "its initial state is not made of channels ('lstm')"),
    ],
)
def test_units_stay_where_their_first_past_does(states, reason):
    model = with_states(states)
    channels = label_model(model)
    assert [g.name for g in channels.groups] == ["before", "after"]
    assert [g.reason for g in channels.locked_groups if g.num_units == 3] == [reason]
    check_law_two(model, zoo.inputs_of(model))


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: layers.LSTM(3, activation="softmax"), "goes through an activation that may mix channels"),
        (lambda: layers.GRU(3, recurrent_activation=ops.softmax), "goes through an activation that may mix"),
        (
            lambda: layers.Bidirectional(
                layers.GRU(3), merge_mode=None, backward_layer=layers.GRU(4, go_backwards=True)
            ),
            "the two directions have different numbers of units",
        ),
    ],
)
def test_units_that_stay_say_why(layer, reason):
    inputs = keras.Input(SEQUENCE)
    x = keras.tree.flatten(layer()(layers.Dense(6, name="before")(inputs)))[0]
    channels = label_model(keras.Model(inputs, layers.Dense(2)(x)))
    assert [g.name for g in channels.groups] == ["before"]
    assert channels.locked_groups[0].reason.startswith(reason)


def test_a_stateful_layer_stays_as_it_is():
    inputs = keras.Input(batch_shape=(4, *SEQUENCE))
    x = layers.LSTM(3, stateful=True, name="lstm")(layers.Dense(6, name="before")(inputs))
    channels = label_model(keras.Model(inputs, layers.Dense(2)(layers.Dense(4, name="after")(x))))
    assert [g.name for g in channels.groups] == ["after"]
    assert channels.unknown == ["lstm"]


def test_a_time_axis_of_unknown_length():
    x = inputs = keras.Input((None, 3))
    x = layers.LSTM(3)(layers.Dense(5)(x))
    model = zoo.randomized(keras.Model(inputs, layers.Dense(2)(x)))
    assert CostModel(label_model(model))()["flops"] is None
    check_law_two(model, np.random.default_rng(0).normal(size=(4, 7, 3)).astype("float32"))


def test_flops():
    x = inputs = keras.Input(SEQUENCE)
    model = keras.Model(inputs, layers.LSTM(5)(x))
    assert CostModel(label_model(model))()["flops"] == 4 * 2 * (3 + 5) * 4 * 5
    x = inputs = keras.Input(VIDEO)
    model = keras.Model(inputs, layers.ConvLSTM2D(5, 2, return_sequences=True)(x))
    assert CostModel(label_model(model))()["flops"] == 3 * 16 * 2 * 4 * (2 + 5) * 4 * 5


def test_masks_survive():
    """Steps that are masked have no part in the result, before and after."""
    for name in ("masking", "embedding"):
        if name == "masking":
            x = inputs = keras.Input((None, 3))
            x = layers.Masking()(x)
            data = np.random.default_rng(0).normal(size=(4, *SEQUENCE)).astype("float32")
            data[:, 2:] = 0
        else:
            x = inputs = keras.Input((None,), dtype="int32")
            x = layers.Embedding(7, 5, mask_zero=True)(x)
            data = np.array([[1, 2, 0, 0], [3, 6, 0, 0], [5, 5, 0, 0], [1, 6, 0, 0]], "int32")
        x = layers.Dropout(0.1)(layers.Dense(6, use_bias=True)(x))
        x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
        x = layers.TimeDistributed(layers.Dense(4))(x)
        model = zoo.randomized(keras.Model(inputs, layers.Dense(2)(layers.GRU(3)(x))))
        small = check_law_two(model, data)
        (whole,), (short,) = predict(small, data), predict(small, np.ascontiguousarray(data[:, :2]))
        np.testing.assert_allclose(whole, short, rtol=1e-4, atol=1e-6)


def test_channels_that_a_masking_layer_looks_at_stay():
    x = inputs = keras.Input(SEQUENCE)
    x = layers.Masking()(layers.Dense(5, activation="relu", name="looked_at")(x))
    channels = label_model(keras.Model(inputs, layers.Dense(2)(layers.LSTM(3, name="lstm")(x))))
    assert [g.name for g in channels.groups] == ["lstm"]


def test_what_a_wrapper_wraps_keeps_its_rule_and_its_name():
    channels = label_model(case("conv_lstm").model)
    assert [(g.name, g.num_units) for g in channels.groups] == [
        *(("frames", 5), ("video", 3), ("again", 4), ("last", 4), ("conv", 5))
    ]
    x = inputs = keras.Input(VIDEO)
    x = layers.TimeDistributed(layers.Lambda(lambda x: ops.flip(x, -1)), name="wrapped")(layers.Dense(4)(x))
    channels = label_model(keras.Model(inputs, layers.Dense(2)(x)))
    assert channels.unknown == ["wrapped"]
