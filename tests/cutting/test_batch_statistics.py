"""Moving statistics after a repair: those of what is read, and inference is the same function as before."""

import keras
import numpy as np
import pytest
from helpers import NAMES, fingerprint, predict, relative_difference
from redundant import inputs_for
from zoo import build, randomized

import keras_taylor
from keras_taylor.cutting.batch_statistics import shorter_averages
from keras_taylor.plans.plan import Plan
from keras_taylor.reading.graph import read_model
from keras_taylor.reading.walk import Walk
from keras_taylor.support.keras_internals import layers_inside

pytestmark = pytest.mark.sweep(1)

layers = keras.layers


# Training draws random numbers (dropout), or normalizes the values of each use of a layer by themselves.
DRAW = ("chain", "subclassed", "composite_layers")
SHARE = ("siamese", "shared_layer", "nested_three_deep")


def normalizations(model):
    return [one for one in layers_inside(model) if isinstance(one, layers.BatchNormalization)]


def renewed(model, x):
    """What `repair` makes of a model that lost nothing: no layer is refitted, but statistics are renewed."""
    plan = Plan({})
    return keras_taylor.repair(keras_taylor.prune(model, plan), model, plan, x, return_repairs=True)


class InTraining(keras.Model):
    """Runs a model with the statistics of the batch, at inference too."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, inputs):
        return self.model(inputs, training=True)


def predict_in_training(model, x):
    outputs = InTraining(model).predict_on_batch(x)
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(outputs)]


def statistics_of(layer):
    return [keras.ops.convert_to_numpy(one) for one in (layer.moving_mean, layer.moving_variance)]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", NAMES)
def test_inference_stays_and_training_agrees_with_it(name):
    model = build(name)
    if not normalizations(model):
        pytest.skip("no BatchNormalization")
    x = inputs_for(model, 32)
    wanted = predict(model, x)
    ours, repairs = renewed(model, x)
    assert relative_difference(predict(ours, x), wanted) < 1e-5
    assert not repairs
    if name not in DRAW + SHARE:
        assert relative_difference(predict_in_training(ours, x), wanted) < 1e-3
        if name != "frozen":
            assert relative_difference(predict_in_training(model, x), wanted) > 1e-2


def network(x, activation="relu", **arguments):
    y = layers.Conv2D(6, 3, name="conv")(x)
    y = layers.Activation(activation)(layers.BatchNormalization(name="norm", **arguments)(y))
    return layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="reader")(y))


def plain(**arguments):
    inputs = keras.Input((8, 8, 3))
    return randomized(keras.Model(inputs, network(inputs, **arguments)))


def test_renormalization_starts_from_the_same_statistics():
    model = plain(renorm=True)
    x = inputs_for(model, 32)
    ours, repairs = renewed(model, x)
    assert not repairs
    outputs = predict(model, x), predict(ours, x), predict_in_training(ours, x)
    assert relative_difference(outputs[1], outputs[0]) < 1e-5
    assert relative_difference(outputs[2], outputs[0]) < 1e-4
    norm = ours.get_layer("norm")
    spread = keras.ops.convert_to_numpy(norm.renorm_stddev)
    np.testing.assert_allclose(spread, np.sqrt(statistics_of(norm)[1] + norm.epsilon), rtol=1e-5)


def towers():
    """Normalizations without a scale, whose factor goes into all that reads them."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3)(inputs)
    x = layers.LeakyReLU()(layers.BatchNormalization(scale=False)(x))
    y = layers.Conv2D(6, 3, padding="same", groups=2)(x)
    y = layers.Activation("relu")(layers.BatchNormalization(scale=False)(y))
    y = layers.Conv2D(5, 3)(layers.Concatenate()([x, layers.Dropout(0.0)(y)]))
    y = keras.ops.relu(layers.BatchNormalization(scale=False)(y))
    z = layers.AveragePooling2D(3, 1, padding="same")(x)
    z = layers.DepthwiseConv2D(3, depth_multiplier=2)(layers.ZeroPadding2D(1)(z))
    y = [layers.GlobalMaxPooling2D()(y), layers.GlobalAveragePooling2D()(z)]
    return randomized(keras.Model(inputs, layers.Dense(4)(layers.Concatenate()(y))))


@pytest.mark.parametrize("make", [lambda: plain(scale=False), towers])
def test_what_reads_a_normalization_takes_over_its_factor(make):
    model = make()
    x = inputs_for(model, 32)
    ours, repairs = renewed(model, x)
    assert not repairs
    assert relative_difference(predict(ours, x), predict(model, x)) < 1e-5
    assert relative_difference(predict_in_training(ours, x), predict(model, x)) < 1e-4


def test_frozen_layers_stay():
    model = plain()
    model.get_layer("norm").trainable = False
    before = [keras.ops.convert_to_numpy(w) for w in model.get_layer("norm").weights]
    ours, repairs = renewed(model, inputs_for(model, 32))
    after = [keras.ops.convert_to_numpy(w) for w in ours.get_layer("norm").weights]
    assert not repairs and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: plain(center=False), "it has no offset"),
        (lambda: plain(scale=False, activation="relu6"), "it has no scale"),
        (lambda: plain(gamma_constraint=keras.constraints.UnitNorm(0)), "a constraint would change its new"),
        (lambda: plain(dtype="bfloat16"), "its weights have fewer digits than float32"),
    ],
)
def test_what_stays_is_said(make, reason):
    model = make()
    x = inputs_for(model, 32)
    ours, (said,) = renewed(model, x)
    assert said.name == "norm" and said.ridge is None
    assert said.reason.startswith(f"its moving statistics stay: {reason}")
    assert relative_difference(predict(ours, x), predict(model, x)) < 1e-5
    number = 1 if "scale" in said.reason else 0  # the variance, or the mean
    kept = [statistics_of(one.get_layer("norm"))[number] for one in (model, ours)]
    assert np.array_equal(*kept)


def test_masked_steps_do_not_count():
    inputs = keras.Input((5, 3))
    x = layers.Masking()(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    model = randomized(keras.Model(inputs, layers.LSTM(2)(x)))
    x = inputs_for(model, 32)
    x[:, 3:] = 0
    ours, repairs = renewed(model, x)
    assert not repairs
    mean, variance = statistics_of(ours.get_layer("norm"))
    np.testing.assert_allclose(mean, x[:, :3].mean((0, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, x[:, :3].var((0, 1)), rtol=1e-5)
    assert relative_difference(predict(ours, x), predict(model, x)) < 1e-5


@pytest.mark.parametrize("verb", ["repair", "recalibrate"])
def test_layers_inside_a_closed_one_are_reached(verb):
    inputs = keras.Input((4, 6, 3))
    inner = layers.TimeDistributed(layers.BatchNormalization(), name="frames")
    model = randomized(keras.Model(inputs, layers.GlobalAveragePooling2D()(inner(inputs))))
    x = inputs_for(model, 32)
    ours = renewed(model, x)[0] if verb == "repair" else keras_taylor.recalibrate(model, x)
    mean, variance = statistics_of(ours.get_layer("frames").layer)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, x.var((0, 1, 2)), rtol=1e-4)
    if verb == "repair":
        assert relative_difference(predict(ours, x), predict(model, x)) < 1e-5


def test_recalibrated_after_a_repair_nothing_changes():
    model = build("residual")
    x = inputs_for(model, 64)
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    repaired = keras_taylor.repair(keras_taylor.prune(model, plan), model, plan, x)
    again = keras_taylor.recalibrate(repaired, x)
    assert relative_difference(predict(again, x), predict(repaired, x)) < 1e-5
    assert relative_difference(predict_in_training(repaired, x), predict(repaired, x)) < 1e-4


def test_a_pass_as_in_training_changes_no_weight():
    inputs = keras.Input((8, 8, 3))
    x = layers.SpectralNormalization(layers.Conv2D(4, 3))(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Dropout(0.5)(x)))
    model.compile("sgd", "mse")
    x, before = inputs_for(model, 4), fingerprint(model)
    walk = Walk(read_model(model), [[x]], training=True)
    for number in range(len(walk.graph.calls)):
        walk.run(number)
    assert fingerprint(model) == before
    outputs = [keras.ops.convert_to_numpy(column[0]) for column in walk.outputs()]
    assert relative_difference(outputs, predict(model, x)) > 0.1


def test_fine_tuning_starts_from_what_inference_computes():
    """A round of `compress` at a learning rate of nearly zero, with augmentation inside the model."""
    results = []
    for momentum in (1.0, 0.5):  # with 1 training does not change the statistics
        inputs = keras.Input((8, 8, 3))
        noisy = layers.GaussianNoise(1.0)(inputs)
        model = randomized(keras.Model(inputs, layers.Dense(3)(network(noisy, momentum=momentum))))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        x = inputs_for(model, 128)
        options = {"goal": 0.3, "increment": 0.3, "criterion": "magnitude", "verbose": 0}
        fit = {"epochs": 4, "batch_size": 128, "learning_rate": 1e-9}
        results.append(keras_taylor.compress(model, (x, np.arange(128) % 3), **options, **fit))
    repaired, trained = results
    variances = [statistics_of(one.get_layer("norm"))[1] for one in results]
    np.testing.assert_allclose(variances[1], variances[0], rtol=0.05)
    assert relative_difference(predict(trained, x), predict(repaired, x)) < 0.06  # 0.3 without


@pytest.mark.parametrize(("batch_size", "momentum"), [(128, 1 - 128 / 4096), (32, 0.99)])
def test_statistics_behind_a_dense_layer_average_over_enough_values(batch_size, momentum):
    inputs = keras.Input((6,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(12, name="wide")(inputs))
    model = randomized(keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x))))
    model.compile(keras.optimizers.SGD(1e-9), "mse")
    x, seen = np.random.default_rng(0).normal(size=(256, 6)), []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.get_layer("norm").momentum)

    fit = {"batch_size": batch_size, "callbacks": [Look()], "validation_data": (x, np.zeros((256, 2)))}
    options = {"goal": 0.3, "increment": 0.3, "criterion": "magnitude", "verbose": 0}
    small = keras_taylor.compress(model, (x, np.zeros((256, 2))), **options, **fit)
    assert seen == pytest.approx([momentum] * (256 // batch_size))
    assert small.get_layer("norm").momentum == 0.99


def test_statistics_of_images_of_any_size_average_over_a_few_steps():
    inputs = keras.Input((None, None, 3))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(12, 3, name="conv")(inputs))
    model = randomized(keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))))
    model.compile(keras.optimizers.SGD(1e-9), "mse")
    with shorter_averages(model, num_steps=60, batch_size=32):
        assert model.get_layer("norm").momentum == pytest.approx(1 - 1 / 6)
    assert model.get_layer("norm").momentum == 0.99


@pytest.mark.parametrize(("given", "in_rounds"), [(0.99, 0.8), (0.5, 0.5), (1.0, 1.0)])
def test_statistics_average_over_a_tenth_of_a_round(given, in_rounds):
    model = plain(momentum=given)
    model.compile(keras.optimizers.SGD(1e-9), "mse")
    x, momenta = inputs_for(model, 100), set()

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            momenta.add(round(self.model.get_layer("norm").momentum, 6))

    options = {"goal": 0.3, "increment": 0.3, "criterion": "magnitude", "verbose": 0}
    fit = {"epochs": 25, "batch_size": 50, "callbacks": [Look()], "validation_data": (x, np.zeros((100, 4)))}
    small = keras_taylor.compress(model, (x, np.zeros((100, 4))), **options, **fit)
    assert momenta == {in_rounds}  # 50 steps
    norm = small.get_layer("norm")
    assert norm.momentum == model.get_layer("norm").momentum == given
    before, _ = statistics_of(norm)
    read = keras.Model(small.inputs, small.get_layer("conv").output).predict(x, verbose=0)
    small.fit(x, np.zeros((100, 4)), batch_size=100, verbose=0)
    wanted = given * before + (1 - given) * read.mean((0, 1, 2))
    np.testing.assert_allclose(statistics_of(norm)[0], wanted, rtol=1e-3, atol=1e-5)
