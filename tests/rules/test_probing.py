"""Layers and functions without a rule: let through only where each channel stands for itself."""

import itertools

import keras
import numpy as np
import pytest
import zoo
from helpers import case, check_law_two
from keras import layers, ops

import keras_taylor
from keras_taylor.reading import rule_checks
from keras_taylor.reading.groups import label_model

SIZE = (4, 6)


def model_with(function):
    x = inputs = keras.Input(SIZE)
    x = function(layers.Dense(6, name="before")(x))
    return zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))


def is_let_through(function):
    channels = label_model(model_with(function))
    through = "before" in [g.name for g in channels.groups]
    assert len(channels.probed) + len(channels.unknown) == 1
    assert through == bool(channels.probed)
    return through


def custom(function, **attributes):
    class Custom(layers.Layer):
        def call(self, x):
            return function(x)

    layer = Custom(name="custom")
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.relu(x) * 3 + 1,
        lambda x: x - ops.mean(x, axis=1, keepdims=True),
        lambda x: ops.flip(x, axis=1),
        lambda x: ops.softmax(x, axis=1),
        lambda x: x / (1 + ops.abs(x)),
    ],
)
def test_what_leaves_each_channel_to_itself(function):
    assert is_let_through(layers.Lambda(function))
    for layer in (layers.Lambda(function), custom(function)):  # the custom one is opened
        model = model_with(layer)
        assert "before" in [g.name for g in label_model(model).groups]
        check_law_two(model, zoo.inputs_of(model))


COUNTER = itertools.count()
TRAPS = {
    "the other way round": lambda x: ops.flip(x, axis=-1),
    "rolled": lambda x: ops.roll(x, 1, axis=-1),
    "normalized": ops.softmax,
    "mean": lambda x: x - ops.mean(x, axis=-1, keepdims=True),
    "running sum": lambda x: ops.cumsum(x, axis=-1),
    "a factor for each place": lambda x: x * ops.convert_to_tensor(np.arange(1, 7, dtype="float32")),
    "a factor that grows": lambda x: x * ops.arange(1, x.shape[-1] + 1, dtype="float32"),
    "the number of channels": lambda x: x / x.shape[-1],
    "the number of channels, fixed": lambda x: ops.reshape(ops.reshape(x, (-1, 24)), (-1, 4, 6)),
    "one channel counts": lambda x: ops.concatenate([x[..., :1], x[..., 1:] * x[..., :1]], -1),
    "neighbors": lambda x: ops.reshape(
        ops.repeat(ops.max(ops.reshape(x, (-1, 4, 3, 2)), -1), 2, -1), (-1, 4, 6)
    ),
    "other examples": lambda x: x - ops.mean(x, axis=0, keepdims=True),
    "the largest of all": lambda x: x / ops.max(ops.abs(x)),
    "not a number": ops.log,
    "noise": lambda x: x + keras.random.normal((1,), seed=next(COUNTER)),
    "another every time": lambda x: x + next(COUNTER),
    "other size": lambda x: ops.sum(x, 1),
    "two channels": lambda x: ops.repeat(x, 2, -1),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_mixes_is_locked(trap):
    assert not is_let_through(layers.Lambda(TRAPS[trap], output_shape=None))
    if trap not in ("another every time", "noise", "not a number"):
        model = model_with(custom(TRAPS[trap]))
        if label_model(model).groups:  # opened: what it does is known, constants are cut with the channels
            check_law_two(model, zoo.inputs_of(model))


def test_what_fails_on_random_numbers_is_locked():
    symbolic = []

    def fails(x):
        if symbolic:
            raise RuntimeError("no")
        return x

    model = model_with(layers.Lambda(fails, name="fails"))
    symbolic.append(True)
    assert label_model(model).unknown == ["fails"]


def test_a_layer_with_weights_is_never_guessed(monkeypatch):
    monkeypatch.setattr(rule_checks, "is_channelwise", None)

    class Weighted(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), name="scale")

        def call(self, x):
            return x * self.scale

    model = model_with(Weighted(name="weighted"))
    assert label_model(model).unknown == ["weighted"]


def test_operations_without_a_rule():
    assert is_let_through(lambda x: ops.sort(x, axis=1))
    assert not is_let_through(lambda x: ops.sort(x, axis=-1))
    model = model_with(lambda x: ops.sort(x, axis=1))
    check_law_two(model, zoo.inputs_of(model))


@pytest.mark.parametrize(
    ("activation", "through"),
    [
        (lambda x: ops.minimum(ops.relu(x), 2.0) * 0.3, True),
        (lambda x: ops.softmax(x, axis=-1), False),
        (lambda x: x - ops.mean(x), False),
        (lambda x: x * ops.convert_to_tensor(np.arange(1, 7, dtype="float32")), False),
    ],
)
def test_activations_of_the_users(activation, through):
    for layer in (layers.Dense(6, activation=activation, name="made"), layers.Activation(activation)):
        x = inputs = keras.Input(SIZE)
        x = layer(layers.Dense(6, name="before")(x))
        model = zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(x)))
        channels = label_model(model)
        names = ["before", "made"] if isinstance(layer, layers.Dense) else ["before"]
        assert [g.name for g in channels.groups] == [
            n for n in names if through or (n, names[-1]) == ("before", "made")
        ]
        assert channels.probed == ([layer.name] if through else [])
        if channels.groups:
            check_law_two(model, zoo.inputs_of(model))


def test_the_analysis_says_what_was_probed():
    analysis = keras_taylor.analyze(case("lambda_layer").model)
    assert analysis.probed == ("again", "conv2", "doubled")
    assert analysis.unknown == ()
    assert "probed with random numbers: again, conv2, doubled" in " ".join(str(analysis).split())
    opened = keras_taylor.analyze(case("custom_elementwise").model)
    assert (opened.probed, opened.unknown) == ((), ())
    assert keras_taylor.analyze(case("unknown_layer").model).probed == ()
    assert keras_taylor.analyze(case("chain").model).probed == ()


def test_a_layer_is_probed_once(monkeypatch):
    model = model_with(layers.Lambda(lambda x: x * 2))
    before = label_model(model)
    monkeypatch.setattr(rule_checks, "is_channelwise", None)
    assert label_model(model).probed == before.probed


def test_a_lambda_survives_surgery_with_its_arguments():
    layer = layers.Lambda(lambda x, factor: x * factor, arguments={"factor": 3.0}, name="times")
    model = model_with(layer)
    small = check_law_two(model, zoo.inputs_of(model))
    times = small.get_layer("times")
    assert times is not layer
    assert times.get_config() == layer.get_config()
