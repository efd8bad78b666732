"""Rules for layers of the user's own, and that those that do not hold are refused."""

import doctest

import keras
import numpy as np
import pytest
import zoo
from helpers import check_law_two
from keras import layers, ops

import keras_taylor
from keras_taylor.reading.groups import label_model
from keras_taylor.rules import base, registry
from keras_taylor.rules.base import Effect

SIZE = (4, 6)


@pytest.fixture(autouse=True)
def only_here():
    before = dict(registry.REGISTERED)
    yield
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


def scale():
    class Scale(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

        def call(self, x):
            return ops.tanh(x * self.scale)

    return Scale


def mix(normalized=False):
    class Mix(layers.Layer):
        def __init__(self, width, **kwargs):
            super().__init__(**kwargs)
            self.width = width

        def build(self, shape):
            self.matrix = self.add_weight(shape=(shape[-1], self.width), name="matrix")
            self.shift = self.add_weight(shape=(self.width,), name="shift")

        def call(self, x):
            x = ops.relu(ops.matmul(x, self.matrix) + self.shift)
            return ops.softmax(x) if normalized else x

        def compute_output_shape(self, shape):
            return (*shape[:-1], self.width)

        def get_config(self):
            return {**super().get_config(), "width": self.width}

    return Mix


def weightless(function):
    class Weightless(layers.Layer):
        def call(self, x):
            return function(x)

    return Weightless


MIX = {"weights": {"matrix": ("inputs", "units"), "shift": ("units",)}, "config": {"width": "units"}}


def model_with(*stack):
    x = inputs = keras.Input(SIZE)
    x = layers.Dense(6, name="before")(x)
    for layer in stack:
        x = layer(x)
    x = layers.Flatten()(layers.Dense(4, name="after")(x))
    return zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(x)))


def units_of(model):
    return {g.name: g.num_units for g in label_model(model).groups}


def test_one_weight_a_channel():
    Scale = scale()
    assert keras_taylor.register_rule(Scale, weights={"scale": ("channels",)}) is Scale
    model = model_with(Scale(name="scale"))
    assert units_of(model) == {"before": 6, "after": 4}
    check_law_two(model, zoo.inputs_of(model))


def test_without_weights():
    Swish = weightless(lambda x: x * ops.sigmoid(x))
    keras_taylor.register_rule(Swish, like="elementwise")
    model = model_with(Swish(name="swish"))
    assert units_of(model) == {"before": 6, "after": 4}
    check_law_two(model, zoo.inputs_of(model))


def test_a_kernel():
    Mix = mix()
    keras_taylor.register_rule(Mix, **MIX)
    model = model_with(Mix(5, name="mix"))
    assert units_of(model) == {"before": 6, "mix": 5, "after": 4}
    small = check_law_two(model, zoo.inputs_of(model))
    assert small.get_layer("mix").width < 5
    costs = keras_taylor.analyze(model).costs
    assert costs["params"] == model.count_params()
    assert costs["flops"] == 2 * 4 * (6 * 6 + 6 * 5 + 5 * 4) + 2 * 16 * 2
    scores = keras_taylor.score(model, criterion="magnitude")
    kernel = ops.convert_to_numpy(model.get_layer("mix").matrix)
    norms = np.sqrt(np.square(kernel).sum(0))
    np.testing.assert_allclose(scores["mix"] / scores["mix"].sum(), norms / norms.sum(), rtol=1e-5)


def test_inputs_only():
    Mix = mix()
    keras_taylor.register_rule(Mix, weights={"matrix": ("inputs", None)})
    model = model_with(Mix(5))
    assert units_of(model) == {"before": 6, "after": 4}
    check_law_two(model, zoo.inputs_of(model))


def test_like_a_layer_of_keras():
    class Mine(layers.Dense):
        pass

    keras_taylor.register_rule(Mine, like=layers.Dense)
    model = model_with(Mine(5, name="mine"))
    assert units_of(model) == {"before": 6, "mine": 5, "after": 4}
    check_law_two(model, zoo.inputs_of(model))


def test_a_function_of_ones_own():
    Flipped = weightless(lambda x: ops.flip(x, axis=-1))

    @keras_taylor.register_rule(Flipped)
    def flipped(ctx):
        return Effect(outputs=[ctx.output_labels(ctx.inputs[0].labels_along(-1)[::-1], -1)])

    model = model_with(Flipped())
    assert units_of(model) == {"before": 6, "after": 4}
    check_law_two(model, zoo.inputs_of(model))


def test_a_subclass_does_not_inherit_a_rule():
    Mix = mix()
    keras_taylor.register_rule(Mix, **MIX)

    class Other(Mix):
        pass

    assert units_of(model_with(Other(5))) == {"after": 4}


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: ops.flip(x, axis=-1), "without some channels, those that stay come out otherwise"),
        (ops.softmax, "without some channels, those that stay come out otherwise"),
        (lambda x: x * np.arange(6, dtype="float32"), "without some channels the layer failed"),
        (lambda x: ops.sum(x, -1), "it says (1, 1, 6) of an output with the shape (2, 4)"),
    ],
)
def test_a_rule_that_does_not_hold_is_refused(function, found):
    Wrong = weightless(function)
    keras_taylor.register_rule(Wrong, like="elementwise")
    x = inputs = keras.Input(SIZE)
    x = Wrong(name="wrong")(layers.Dense(6)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    with pytest.raises(
        ValueError, match="registered for `Weightless` does not hold for layer 'wrong'"
    ) as error:
        keras_taylor.analyze(model)
    assert found in str(error.value)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_rule_within_a_wrapper_is_tried_too(wrong):
    Mix = mix(normalized=wrong)
    keras_taylor.register_rule(Mix, **MIX)
    model = model_with(layers.TimeDistributed(Mix(5), name="mix"))
    with keras.saving.custom_object_scope({"Mix": Mix}):
        if wrong:
            with pytest.raises(ValueError, match="registered for `Mix` does not hold for layer 'mix'"):
                label_model(model)
        else:
            assert units_of(model) == {"before": 6, "mix": 5, "after": 4}
            check_law_two(model, zoo.inputs_of(model))


def test_a_mixing_layer_that_normalizes_its_units_is_refused():
    Mix = mix(normalized=True)
    keras_taylor.register_rule(Mix, **MIX)
    with pytest.raises(ValueError, match=r"they differ by \d"):
        keras_taylor.score(model_with(Mix(5)), criterion="magnitude")


def test_a_forgotten_weight_is_refused():
    Mix = mix()
    keras_taylor.register_rule(Mix, weights={"matrix": ("inputs", "units")}, config={"width": "units"})
    with pytest.raises(ValueError, match="without some channels the layer failed"):
        keras_taylor.analyze(model_with(Mix(5)))


def test_what_has_passed_is_not_tried_again(monkeypatch):
    Scale, calls = scale(), []
    keras_taylor.register_rule(Scale, weights={"scale": ("channels",)})
    model, call = model_with(Scale()), Scale.call
    monkeypatch.setattr(Scale, "call", lambda self, x: calls.append(x) or call(self, x))
    keras_taylor.analyze(model)
    first = len(calls)
    keras_taylor.analyze(model)
    assert first > len(calls) - first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_class": layers.Dense}, "for a layer class of your own"),
        ({"layer_class": 3}, "Received: layer_class=3"),
        ({"like": "dense"}, "Received: like='dense'"),
        ({"like": layers.Lambda}, "has no rule itself"),
        ({"like": "elementwise", "weights": {"a": ("channels",)}}, "Received: like, weights"),
        ({"like": "elementwise", "config": {"a": "channels"}}, "Received: like, config"),
        ({"rule": 3}, "Received: rule=3"),
        ({"weights": {"a": ("channel",)}}, "Received: 'channel'"),
        ({"weights": {"a": ("channels", "inputs")}}, "Expected either"),
        ({"weights": {"a": ("inputs",)}, "config": {"n": "channels"}}, "Expected either"),
        ({"weights": {"a": ("inputs", "units")}}, "Received: config=None"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        keras_taylor.register_rule(**{"layer_class": mix(), **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(("place", "least"), [(keras_taylor.register_rule, 12), (base, 6)])
def test_the_examples_run(place, least):
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(recurse=False).find(place, "example"):
        runner.run(test)
    assert runner.summarize().attempted >= least
    assert runner.summarize().failed == 0
