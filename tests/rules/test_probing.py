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

pytestmark = pytest.mark.sweep(1)

SIZE = (4, 6)


def model_with(function):
    x = inputs = keras.Input(SIZE)
    x = function(layers.Dense(6, name="before")(x))
    return zoo.randomized(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))


def is_let_through(function):
    channels = label_model(model_with(function))
    assert len(channels.probed) + len(channels.unknown) == 1
    assert bool(units_of(channels)) == bool(channels.probed)
    return bool(channels.probed)


def units_of(channels):
    return {g.name: g.num_units for g in channels.groups if g.name.startswith("before")}


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
    "in the batch": lambda x: ops.reshape(x, (-1, x.shape[-1])),
    "complex numbers": lambda x: ops.view_as_complex(ops.stack([x, x], axis=-1)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_mixes_is_locked(trap):
    assert not is_let_through(layers.Lambda(TRAPS[trap], output_shape=None))
    if trap not in ("another every time", "noise", "not a number", "complex numbers"):
        model = model_with(custom(TRAPS[trap]))
        if label_model(model).groups:  # opened: what it does is known, constants are cut with the channels
            check_law_two(model, zoo.inputs_of(model))


MAPS = {
    "another size": (lambda x: x[:, :, 1:], 8),
    "resized": (lambda x: ops.image.resize(x, (3, 9)), 8),
    "fewer axes": (lambda x: ops.max(x, (1, 2)), 8),
    "reversed": (lambda x: ops.flip(x, axis=-1), 8),
    "each twice": (lambda x: ops.repeat(x, 2, -1), 8),
    "all twice": (lambda x: ops.concatenate([x, -x], -1), 8),
    "every second": (lambda x: x[..., ::2], 4),
    "the first half": (lambda x: x[..., : x.shape[-1] // 2], 4),
    "two by two": (lambda x: x[..., ::2] * x[..., 1::2], 4),
    "halves": (ops.glu, 4),
    "several outputs": (lambda x: list(ops.moments(x, (1, 2))), 8),
    "several outputs of several axes": (lambda x: [ops.max(x, 1), ops.glu(x)], 4),
    "pixels": (lambda x: ops.depth_to_space(x, 2), 2),
    "channels": (lambda x: ops.space_to_depth(x, 2), 8),
    "numbers": (lambda x: ops.argmax(x, 1), 8),
    "truth": (lambda x: x > 0, 8),
}


def image_model(function, size, num_inputs=1):
    """A model with the function between 8 channels, twice if it gets two tensors, and the head."""
    inputs = keras.Input(size)
    x = [layers.Dense(8, name=f"before{k}")(inputs) for k in range(num_inputs)]
    outputs = keras.tree.flatten(function(*x))
    pooled = [
        layers.Dense(2)(
            ops.cast(ops.mean(y, tuple(range(1, len(y.shape) - 1))) if len(y.shape) > 2 else y, "float32")
        )
        for y in outputs
    ]
    return zoo.randomized(keras.Model(inputs, pooled))


@pytest.mark.parametrize("size", [(6, 6, 3), (None, None, 3)], ids=["known", "unknown"])
@pytest.mark.parametrize("case", MAPS)
def test_where_channels_go(case, size):
    function, num_units = MAPS[case]
    if case == "channels" and None in size:
        pytest.skip("Keras cannot tell the shape")
    model = image_model(layers.Lambda(function), size)
    channels = label_model(model)
    assert channels.probed == [model.layers[2].name]
    assert units_of(channels) == {"before0": num_units}
    if None not in size:
        check_law_two(model, zoo.inputs_of(model))


def test_channels_of_several_tensors_are_one_unit():
    model = image_model(lambda x, y: ops.fft2((x, y)), (6, 6, 3), 2)
    assert label_model(model).unknown == ["fft2"]

    def spectrum(x, y):
        x, y = ops.fft2([ops.transpose(z, (0, 3, 1, 2)) for z in (x, y)])
        return [ops.transpose(z, (0, 2, 3, 1)) for z in (x, y)]

    model = image_model(spectrum, (6, 6, 3), 2)
    assert units_of(label_model(model)) == {"before1": 8}
    check_law_two(model, zoo.inputs_of(model), tolerance=1e-4)


@keras.saving.register_keras_serializable("probing")
class PixelShuffle(layers.Layer):
    """As people write it, for images of any size."""

    def call(self, x):
        batch, height, width = ops.shape(x)[:3]
        channels = x.shape[-1] // 4
        x = ops.transpose(ops.reshape(x, (batch, height, width, 2, 2, channels)), (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (batch, 2 * height, 2 * width, channels))


@pytest.mark.parametrize("size", [(6, 6, 3), (None, None, 3), (None, 6, 3)], ids=str)
@pytest.mark.parametrize(
    "shuffle", [PixelShuffle(), lambda x: ops.depth_to_space(x, 2)], ids=["layer", "ops"]
)
def test_pixel_shuffle_at_any_size(shuffle, size):
    model = image_model(shuffle, size)
    assert units_of(label_model(model)) == {"before0": 2}
    check_law_two(model, zoo.inputs_of(model))


def test_channels_on_another_axis():
    turn = layers.Lambda(lambda x: ops.transpose(x, (0, 3, 2, 1)), name="turn")
    model = image_model(lambda x: ops.transpose(turn(x), (0, 2, 3, 1)), (6, 6, 3))
    assert label_model(model).probed == ["turn"]
    assert units_of(label_model(model)) == {"before0": 8}
    check_law_two(model, zoo.inputs_of(model))


def test_what_needs_large_images_is_tried_on_large_ones():
    model = image_model(layers.Lambda(lambda x: x[:, 20:40, 20:]), (None, None, 3))
    assert units_of(label_model(model)) == {"before0": 8}


def test_an_operation_whose_shape_keras_does_not_know_is_locked():
    turned = image_model(lambda x: ops.slogdet(ops.transpose(x, (0, 3, 1, 2)))[1], (6, 6, 3))
    assert label_model(turned).unknown == ["slogdet"]


def test_an_operation_that_takes_a_function():
    model = image_model(lambda x: ops.vectorized_map(ops.relu, x), (6, 6, 3))
    assert units_of(label_model(model)) == {"before0": 8}
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
    monkeypatch.setattr(rule_checks, "find_channel_map", None)

    class Weighted(layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), name="scale")

        def call(self, x):
            return x * self.scale

    model = model_with(Weighted(name="weighted"))
    assert label_model(model).unknown == ["weighted"]


def test_operations_without_a_rule():
    assert is_let_through(lambda x: ops.average(x, axis=1))
    assert not is_let_through(lambda x: ops.average(x, axis=-1))
    model = model_with(lambda x: ops.average(x, axis=1))
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
    monkeypatch.setattr(rule_checks, "find_channel_map", None)
    assert label_model(model).probed == before.probed


def test_a_lambda_survives_surgery_with_its_arguments():
    layer = layers.Lambda(lambda x, factor: x * factor, arguments={"factor": 3.0}, name="times")
    model = model_with(layer)
    small = check_law_two(model, zoo.inputs_of(model))
    times = small.get_layer("times")
    assert times is not layer
    assert times.get_config() == layer.get_config()
