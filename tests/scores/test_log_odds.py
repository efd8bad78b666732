"""The criteria `log_odds`: exact where log-odds are linear in the gates, close to the oracle elsewhere."""

import keras
import numpy as np
import pytest
from helpers import fingerprint

import keras_taylor
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.log_odds import OddsModel, shrink_to_noise

CRITERIA = ["log_odds", "log_odds_probed"]
NUM = 24

pytestmark = pytest.mark.sweep(3)


def linear(outputs, activation=None, squared=False):
    """Logits that are linear in the gates of 6 units."""
    keras.utils.set_random_seed(2)
    x = inputs = keras.Input((4,))
    x = keras.layers.Dense(6, activation="tanh", name="units")(x)
    if squared:
        x = keras.layers.Dense(5, name="bent")(x)
        x = keras.layers.Multiply()([x, x])
    return keras.Model(inputs, keras.layers.Dense(outputs, activation=activation, name="head")(x))


def images(num=NUM):
    return np.random.default_rng(0).normal(size=(num, 4)).astype("float32")


def labels(classes, num=NUM):
    return np.random.default_rng(1).integers(0, classes, num)


def compiled(model, loss):
    model.compile("sgd", loss)
    return model


CASES = {
    "sigmoid": (lambda: compiled(linear(1, "sigmoid"), "binary_crossentropy"), lambda y: y[:, None]),
    "binary logits": (
        lambda: compiled(linear(1), keras.losses.BinaryCrossentropy(from_logits=True)),
        lambda y: y[:, None],
    ),
    "softmax": (lambda: compiled(linear(2, "softmax"), "sparse_categorical_crossentropy"), lambda y: y),
    "one hot": (
        lambda: compiled(linear(2), keras.losses.CategoricalCrossentropy(from_logits=True)),
        lambda y: np.eye(2)[y],
    ),
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("case", CASES)
def test_two_classes_with_linear_logits_are_exact(case, criterion):
    make, targets = CASES[case]
    model, y = make(), targets(labels(2)).astype("float32")
    data = images(), y, np.linspace(0, 2, NUM).astype("float32")
    before = fingerprint(model)
    scores = keras_taylor.score(model, data, criterion=criterion, batch_size=7)["units"]
    assert fingerprint(model) == before
    oracle = keras_taylor.score(model, data, criterion="oracle")["units"]
    np.testing.assert_allclose(scores, oracle, rtol=2e-3, atol=2e-5)
    if criterion == "log_odds":
        second_order = keras_taylor.score(model, data, criterion="taylor2")["units"]
        assert np.abs(scores - oracle).max() < 0.1 * np.abs(second_order - oracle).max()


def test_three_classes_by_hand():
    """odds + spread, from the logits' derivatives in float64."""
    model = compiled(linear(3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = images(), labels(3)
    first, first_bias, second, second_bias = (w.astype("float64") for w in model.get_weights())
    units = np.tanh(x @ first + first_bias)
    z = units @ second + second_bias
    probabilities = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    g = units * ((probabilities - np.eye(3)[y]) @ second.T)
    p = probabilities[np.arange(NUM), y][:, None]
    q = 1 - p
    shares = np.where(np.eye(3, dtype=bool)[y], 0, probabilities) / q
    s = np.square(shares).sum(1, keepdims=True)
    expected = np.log(p + q * np.exp(-g / q)) + (1 - s) / (1 + s) * np.square(g) / q / 2
    for size in (1, 7, NUM):
        scores = keras_taylor.score(model, (x, y), criterion="log_odds", batch_size=size)["units"]
        np.testing.assert_allclose(scores, expected.mean(0), rtol=1e-4, atol=1e-6, err_msg=str(size))


def test_probes_see_curvature_that_one_pass_does_not():
    """The log-odds are a parabola in the gates: by one pass they would be a line."""
    model = compiled(linear(1, "sigmoid", squared=True), "binary_crossentropy")
    model.get_layer("head").kernel.assign(np.full((5, 1), 0.3))
    x, y = images(4000), labels(2, 4000)[:, None].astype("float32")
    found = {c: keras_taylor.score(model, (x, y), criterion=c, batch_size=256) for c in [*CRITERIA, "oracle"]}
    errors = {c: np.abs(found[c]["units"] - found["oracle"]["units"]).mean() for c in CRITERIA}
    assert errors["log_odds_probed"] < 0.5 * errors["log_odds"]


def test_every_example_is_followed_by_its_probes():
    """So a batch that is sharded over devices need not be moved between them."""
    model = compiled(linear(3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    outputs = keras.ops.convert_to_numpy(OddsModel(label_model(model), num_probes=2)(images()))
    expected = keras.ops.convert_to_numpy(model(images()))
    np.testing.assert_allclose(outputs[::3], expected, rtol=1e-5, atol=1e-6)
    assert (np.abs(outputs[1::3] - expected).max(1) > 1e-3).all()


def test_examples_of_no_weight_and_certain_predictions_do_no_harm():
    model = compiled(linear(3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    head = model.get_layer("head")
    head.kernel.assign(300 * np.array(head.kernel))  # probabilities of 0 and 1 in float32
    weight = (np.arange(NUM) % 2).astype("float32")
    for criterion in CRITERIA:
        some = keras_taylor.score(model, (images(), labels(3), weight), criterion=criterion)["units"]
        assert np.isfinite(some).all()
    half = keras_taylor.score(model, (images()[1::2], labels(3)[1::2]), criterion="log_odds")["units"]
    some = keras_taylor.score(model, (images(), labels(3), weight), criterion="log_odds")["units"]
    np.testing.assert_allclose(some, half / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_labels_drawn_from_the_model(criterion):
    model = compiled(linear(3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert np.isfinite(keras_taylor.score(model, images(), criterion=criterion)["units"]).all()


def test_compress_takes_it():
    model = compiled(linear(3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    small = keras_taylor.compress(model, (images(), labels(3)), 0.3, criterion="log_odds", verbose=0)
    assert small.count_params() <= 0.7 * model.count_params()


def sequence():
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Conv1D(4, 3)(inputs)))


def two_outputs():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(5)(inputs)
    return keras.Model(inputs, [keras.layers.Dense(3)(x), keras.layers.Dense(2)(x)])


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: linear(3), "mse"),
        (lambda: linear(3), "binary_crossentropy"),
        (sequence, "sparse_categorical_crossentropy"),
        (two_outputs, "sparse_categorical_crossentropy"),
    ],
)
def test_what_has_no_odds_is_refused(make, loss):
    model = compiled(make(), loss)
    with pytest.raises(ValueError, match=r"one class out of several.*'taylor2'.*Received: loss="):
        keras_taylor.score(model, np.zeros((4, *model.input_shape[1:])), criterion="log_odds")


def test_a_loss_with_a_weight_is_refused():
    model = linear(3)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), loss_weights=[2.0])
    with pytest.raises(ValueError, match="without a weight of its own"):
        keras_taylor.score(model, (images(), labels(3)), criterion="log_odds")
    _, info = keras_taylor.compress(model, (images(), labels(3)), epochs=0, verbose=0, return_info=True)
    assert info.criterion == "taylor"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_not_while_training(criterion):
    model = compiled(linear(3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(
        ValueError, match=rf"cannot be gathered while training.*Received: criterion='{criterion}'"
    ):
        keras_taylor.PrunableModel(model, criterion=criterion)


def test_noise_takes_a_correction_away():
    correction, size = np.array([1.0, -2.0, 3.0]), np.ones(3)
    np.testing.assert_array_equal(shrink_to_noise(correction, np.zeros(3), size), correction)
    np.testing.assert_allclose(shrink_to_noise(correction, np.full(3, 14 / 3 / 4), size), 0.75 * correction)
    np.testing.assert_array_equal(shrink_to_noise(correction, np.full(3, 100.0), size), 0 * correction)
