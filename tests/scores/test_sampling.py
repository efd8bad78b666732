"""Labels drawn from the model's own predictions."""

import keras
import numpy as np
import pytest
from stripes import small_model, stripes

import keras_taylor
from keras_taylor.reading.graph import read_model
from keras_taylor.scores.sampling import sample_labels
from keras_taylor.support.datasets import Feed

layers = keras.layers

pytestmark = pytest.mark.sweep(2)


def constant_outputs(biases, activation=None, loss="mse"):
    """A model that puts out the same for every input."""
    inputs = keras.Input((2,))
    x = layers.Dense(len(biases), activation=activation, kernel_initializer="zeros", name="head")(inputs)
    model = keras.Model(inputs, x)
    model.get_layer("head").bias.assign(biases)
    model.compile("sgd", loss)
    return model


def drawn(model, num=4000):
    feed = Feed(np.zeros((num, 2), "float32"), model, targets=False)
    return sample_labels(feed, read_model(model)).fit_arguments()["y"]


CHANCES = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("loss", "activation", "biases"),
    [
        ("sparse_categorical_crossentropy", "softmax", np.log(CHANCES)),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), None, np.log(CHANCES) + 3),
        ("crossentropy", "softmax", np.log(CHANCES)),
    ],
    ids=["softmax", "logits", "crossentropy"],
)
def test_classes_come_as_often_as_they_are_predicted(loss, activation, biases):
    y = drawn(constant_outputs(biases, activation, loss))
    assert y.shape == (4000,) and np.issubdtype(y.dtype, np.integer)
    np.testing.assert_allclose(np.bincount(y, minlength=3) / 4000, CHANCES, atol=0.03)


def test_one_hot_and_binary_and_counts():
    y = drawn(constant_outputs(np.log(CHANCES), "softmax", "categorical_crossentropy"))
    assert y.shape == (4000, 3) and (y.sum(1) == 1).all()
    np.testing.assert_allclose(y.mean(0), CHANCES, atol=0.03)
    y = drawn(constant_outputs([2.0, -1.0], None, keras.losses.BinaryCrossentropy(from_logits=True)))
    np.testing.assert_allclose(y.mean(0), 1 / (1 + np.exp([-2.0, 1.0])), atol=0.03)
    y = drawn(constant_outputs([3.0], None, "poisson"))
    np.testing.assert_allclose([y.mean(), y.var()], [3, 3], rtol=0.1)


def test_reals_are_normal_around_the_prediction():
    y = drawn(constant_outputs([5.0, -2.0]))
    np.testing.assert_allclose(y.mean(0), [5, -2], atol=0.05)
    np.testing.assert_allclose(y.var(0), 0.5, rtol=0.1)


def two_outputs(losses):
    inputs = keras.Input((2,))
    outputs = {"label": layers.Dense(3, name="label")(inputs), "age": layers.Dense(1, name="age")(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", losses)
    return model


def test_every_output_gets_its_own_kind():
    losses = {"label": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "age": "mse"}
    y = drawn(two_outputs(losses), 50)
    assert y["label"].shape == (50,) and y["age"].shape == (50, 1)


def test_scores_are_the_true_fisher():
    """Of a Dense unit's gate under a squared error: the mean over drawn labels is known exactly."""
    random = np.random.default_rng(0)
    inputs = keras.Input((3,))
    x = layers.Dense(4, activation="tanh", name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    model.compile("sgd", "mse")
    for weight in model.weights:
        weight.assign(random.normal(size=weight.shape))
    x = random.normal(size=(20_000, 3)).astype("float32")
    scores = keras_taylor.score(model, x, num_examples=10_000)["hidden"]
    kernel, bias, out = (keras.ops.convert_to_numpy(w) for w in model.weights[:3])
    hidden = np.tanh(x @ kernel + bias)
    # loss: mean over 2 outputs of squared error e; d/dgate = sum_j -e_j h w_j; E[e e'] = 1/2
    fisher = np.square(hidden).mean(0) * np.square(out).sum(1) / 2
    np.testing.assert_allclose(scores, fisher, rtol=0.1)


def test_labels_of_the_data_can_be_left_aside():
    model, (x, y) = small_model(), stripes()
    wrong = (y + 1) % 3
    one = keras_taylor.score(model, (x, y), labels="model")
    other = keras_taylor.score(model, (x, wrong), labels="model")
    data = keras_taylor.score(model, (x, wrong))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5)
        assert not np.allclose(one[name], data[name], rtol=1e-2)


def fixed_and_free(size):
    """The same network for batches of one size only, which a reshape holds it to, and for any."""
    models = []
    for batch in (size, None):
        x = inputs = keras.Input((6, 6, 1), batch_size=batch)
        x = layers.Conv2D(8, 3, activation="relu", name="conv")(x)
        x = layers.Flatten()(x) if batch is None else keras.ops.reshape(x, (batch, 128))
        model = keras.Model(inputs, layers.Dense(3, activation="softmax", name="head")(x))
        model.compile("sgd", "sparse_categorical_crossentropy")
        models.append(model)
    fixed, free = models
    fixed.set_weights(free.get_weights())
    return fixed, free


@pytest.mark.sweep(1)
def test_a_model_of_a_fixed_batch_size_is_scored_on_whole_batches():
    fixed, free = fixed_and_free(8)
    x = np.random.default_rng(0).normal(size=(21, 6, 6, 1)).astype("float32")
    ours, wanted = keras_taylor.score(fixed, x), keras_taylor.score(free, x[:16], batch_size=8)
    np.testing.assert_allclose(ours["conv"], wanted["conv"], rtol=1e-4)
    small = keras_taylor.compress(fixed, x, 0.3, increment=0.3, epochs=0, batch_size=8, verbose=0)
    assert small.count_params() <= 0.7 * fixed.count_params()
    words = "takes batches of 8 examples only.*Expected 8 examples or more.*Received: ds with 5 examples"
    with pytest.raises(ValueError, match=words):
        keras_taylor.score(fixed, x[:5])
    ours, wanted = (
        keras_taylor.analyze(model, x, criterion="magnitude", verbose=0).sensitivity
        for model in (fixed, free)
    )  # every example counts where nothing is added up over a batch
    np.testing.assert_allclose(ours.increase("conv"), wanted.increase("conv"), rtol=1e-3, atol=1e-6)


def test_compress_without_labels(capsys):
    model, (x, y) = small_model(), stripes()
    model.fit(x, y, epochs=8, batch_size=16, verbose=0)
    small, info = keras_taylor.compress(model, x, 0.4, increment=0.2, epochs=0, return_info=True)
    assert small.count_params() <= 0.6 * model.count_params()
    said = capsys.readouterr().out
    assert "labels drawn from the model's own predictions" in said and "repair" in said
    assert info.rounds[0].history == {} and len(info.rounds) == 2
    assert {one["name"] for one in info.rounds[-1].repairs} <= {"second", "head"}
    plain = keras_taylor.compress(model, x, 0.4, increment=0.2, epochs=0, repair=False, verbose=0)
    wanted, ours, cut = (m.predict(x, verbose=0) for m in (model, small, plain))
    assert np.square(ours - wanted).mean() < 0.7 * np.square(cut - wanted).mean()


def test_refusals():
    model, (x, y) = small_model(), stripes()
    with pytest.raises(ValueError, match=r"^Expected \"data\" \(those of `ds`\).*labels='mine'$"):
        keras_taylor.score(model, (x, y), labels="mine")
    with pytest.raises(ValueError, match=r"The data set yields no targets.*y=None$"):
        keras_taylor.score(model, x, labels="data")
    with pytest.raises(ValueError, match=r"no labels to fine-tune with.*`epochs=0`.*epochs=1$"):
        keras_taylor.compress(model, x)
    with pytest.raises(ValueError, match=r"not known how to draw labels for the loss 'cosine_similarity'"):
        drawn(constant_outputs([1.0], loss="cosine_similarity"))
