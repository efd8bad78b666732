"""Criteria that look at activations, or at distances of filters, against NumPy."""

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import EAGER
from keras import layers, ops

import keras_taylor
from keras_taylor.scores import criteria

pytestmark = pytest.mark.sweep(3)

ASKED = ("mean_activation", "mean_absolute_activation", "mean_square_activation", "zero_share")


def measured(model, ds, **arguments):
    """Every activation of every group, as a callable criterion gets them."""
    found = {}

    def ask(statistics):
        found[statistics.name] = {name: getattr(statistics, name) for name in ASKED}
        return statistics.filter_norms

    if not model.compiled:
        model.compile("sgd", "mse", run_eagerly=EAGER)
    keras_taylor.score(model, ds, criterion=ask, **arguments)
    return found


def expected(*tensors):
    """The statistics of channels, the last axis of each tensor; over tensors the mean of means."""

    def mean(values):
        return np.mean([v.astype("float64").reshape(-1, v.shape[-1]).mean(0) for v in values], 0)

    return {
        "mean_activation": mean(tensors),
        "mean_absolute_activation": mean([np.abs(t) for t in tensors]),
        "mean_square_activation": mean([np.square(t) for t in tensors]),
        "zero_share": mean([t == 0 for t in tensors]),
    }


def assert_same(found, wanted, rtol=1e-5):
    for name in ASKED:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rtol, atol=1e-7, err_msg=name)


def outputs_of(model, x, *names):
    """What layers put out, in the model itself."""
    return [
        ops.convert_to_numpy(keras.Model(model.inputs, model.get_layer(name).output)(x)) for name in names
    ]


def images(num=20, seed=0):
    return np.random.default_rng(seed).normal(size=(num, 8, 8, 3)).astype("float32")


def flattened_cnn():
    """Units are read after pooling, after Flatten (16 positions each), and without a ReLU."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="first")(x)
    x = layers.MaxPooling2D(name="pool")(layers.ReLU()(x))
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="second")(x)
    x = layers.Dense(6, name="third")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


@pytest.mark.parametrize("size", [7, 32])
def test_activations_are_what_layers_read(size):
    model, x = flattened_cnn(), images()
    found = measured(model, (x, np.zeros((20, 2))), batch_size=size)
    pooled, second, third = outputs_of(model, x, "pool", "second", "third")
    assert_same(found["first"], expected(pooled))
    assert_same(found["second"], expected(second))
    assert_same(found["third"], expected(third))
    assert found["second"]["zero_share"].max() > 0.2


def test_a_unit_that_several_layers_read():
    """The residual stream is read by two layers at the same place, and by two after another sum."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="stem")(x)
    left = layers.Conv2D(5, 3, padding="same", name="left")(x)
    right = layers.Conv2D(5, 1, padding="same", name="right")(x)
    x = layers.ReLU(name="sum")(layers.Add()([x, left, right]))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D(name="mean")(x)))
    x = images()
    found = measured(model, (x, np.zeros((20, 2))))
    stem, mean = outputs_of(model, x, "stem", "mean")
    assert set(found) == {"stem"}
    assert_same(found["stem"], expected(stem, mean))


def test_named_criteria_need_neither_labels_nor_a_loss():
    model, x = flattened_cnn(), images()
    pooled, second, third = outputs_of(model, x, "pool", "second", "third")
    scores = keras_taylor.score(model, x, criterion="activation")
    for name, values in (("first", pooled), ("second", second), ("third", third)):
        absolute = expected(values)["mean_absolute_activation"]
        np.testing.assert_allclose(scores[name], absolute / absolute.mean(), rtol=1e-5)
    scores = keras_taylor.score(model, x, criterion="apoz")
    assert set(scores) == {"first", "second"}  # nothing of "third" is ever zero
    np.testing.assert_allclose(scores["first"], 1 - expected(pooled)["zero_share"], rtol=1e-6)
    np.testing.assert_allclose(scores["second"], 1 - expected(second)["zero_share"], rtol=1e-6)
    assert not model.compiled


def test_which_examples_are_measured():
    model, x = flattened_cnn(), images()
    rows = np.linspace(0, 19, 9).round().astype(int)
    (pooled,) = outputs_of(model, x[rows], "pool")
    found = keras_taylor.score(model, x, criterion="apoz", num_examples=9)["first"]
    np.testing.assert_allclose(found, 1 - expected(pooled)["zero_share"], rtol=1e-6)
    (pooled,) = outputs_of(model, x[:9], "pool")
    batches = zoo_batches(x)
    found = keras_taylor.score(model, batches, criterion="apoz", num_examples=9)["first"]
    np.testing.assert_allclose(found, 1 - expected(pooled)["zero_share"], rtol=1e-6)


def zoo_batches(x):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return x[7 * index : 7 * index + 7], np.zeros((len(x[7 * index : 7 * index + 7]), 2))

    return Batches()


def test_a_callable_may_ask_for_both_kinds():
    model, x = flattened_cnn(), images()
    model.compile("sgd", "mse", run_eagerly=EAGER)
    data = x, np.random.default_rng(1).normal(size=(20, 2)).astype("float32")
    taylor = keras_taylor.score(model, data)
    zeros = {name: values["zero_share"] for name, values in measured(model, data).items()}
    both = keras_taylor.score(model, data, criterion=lambda s: s.mean_square * (1 - s.zero_share))
    for name, values in taylor.items():
        np.testing.assert_allclose(both[name], values * (1 - zeros[name]), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["activation", "apoz", "fpgm", lambda s: s.mean_absolute_activation])
def test_a_run_by_activations(criterion):
    model, x = flattened_cnn(), images()
    model.compile("sgd", "mse", run_eagerly=EAGER)
    small, info = keras_taylor.compress(
        model, (x, np.zeros((20, 2))), 0.3, epochs=0, increment=0.15, criterion=criterion, return_info=True
    )
    assert small.count_params() <= 0.7 * model.count_params()
    assert len(info.rounds) == 2
    if criterion == "apoz":  # images alone are enough, and no label is drawn
        other = keras_taylor.compress(model, x, 0.3, epochs=0, increment=0.15, criterion=criterion)
        for a, b in zip(other.get_weights(), small.get_weights(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_sensitivity_scan_in_the_order_of_activations():
    model, x = flattened_cnn(), images()
    curves = keras_taylor.analyze(model, x, criterion="activation", fractions=(0.5,), verbose=0).sensitivity
    assert curves.criterion == "activation" and set(curves.curves) == {"first", "second", "third"}


def test_units_inside_of_a_closed_layer():
    """Hidden units and heads of a layer that keeps its class are seen where its inner layers read them."""
    model = zoo.build("open_decoder")
    x = zoo.inputs_of(model)
    found = measured(model, (x, helpers.targets_of(model, x)))
    hidden = []
    down = model.get_layer("first").down
    call = down.call

    def spy(values):
        hidden.append(ops.convert_to_numpy(values))
        return call(values)

    down.call = spy
    model(x)
    del down.call
    assert_same(found["first/up0"], expected(*hidden))
    assert np.isfinite(found["first/query"]["mean_square_activation"]).all()
    assert set(keras_taylor.score(model, x, criterion="activation")) == set(found)


@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_every_unit_is_found_where_it_is_read(name):
    """By a layer, inside of a closed layer, or as a query, key or state."""
    model = zoo.build(name)
    scores = keras_taylor.score(model, zoo.inputs_of(model), criterion="activation")
    silent = {group for group, values in scores.items() if not values.any()}
    assert silent == ({"conv1#3"} if name == "split_and_slice" else set())  # a slice leaves that one out
    assert set(scores) == set(keras_taylor.score(model, criterion="magnitude"))


def test_activations_without_data_are_refused():
    model = flattened_cnn()
    with pytest.raises(ValueError, match=r"criterion 'apoz' needs data.*fpgm, random. Received: ds=None$"):
        keras_taylor.score(model, criterion="apoz")
    with pytest.raises(ValueError, match=r"were not gathered.*group 'first' without them$"):
        keras_taylor.score(model, criterion=criteria.activation)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"gathered while training.*Received: criterion='apoz'$"):
        keras_taylor.PrunableModel(model, criterion="apoz")


def test_nan_is_named_by_its_layer():
    model, x = flattened_cnn(), images()
    layer = model.get_layer("second")
    layer.set_weights([np.full(w.shape, np.nan) for w in layer.get_weights()])
    with pytest.raises(ValueError, match=r"^The output of layer 'second' is NaN or infinite"):
        keras_taylor.score(model, x, criterion="apoz")


def mean_distances(kernel):
    """Mean distance of each filter, along the last axis, from all of them."""
    filters = kernel.astype("float64").reshape(-1, kernel.shape[-1]).T
    return np.array([np.mean([np.linalg.norm(a - b) for b in filters]) for a in filters])


def test_fpgm_by_hand():
    model = zoo.build("residual")
    means = [mean_distances(model.get_layer(n).get_weights()[0]) for n in ("stem", "block0_b", "block1_b")]
    wanted = np.mean(means, 0)
    scores = keras_taylor.score(model, criterion="fpgm")
    np.testing.assert_allclose(scores["stem"], wanted / wanted.mean(), rtol=1e-6)
    assert set(scores) == {"stem", "block0_a", "block1_a"}
    prunable = keras_taylor.PrunableModel(model, criterion="fpgm")
    np.testing.assert_allclose(prunable.scores["stem"], scores["stem"], rtol=1e-6)


def test_fpgm_removes_what_others_can_replace():
    """Of a filter and its copies, all but the ones far from the others go first."""
    x = inputs = keras.Input((4,))
    x = layers.Dense(5, name="hidden")(x)
    model = keras.Model(inputs, layers.Dense(2)(x))
    center = np.full((4, 1), 3.0)
    kernel = np.concatenate(
        [center, center + 0.01, center - 5, center + 5, center * [[1], [-1], [1], [-1]]], 1
    )
    model.get_layer("hidden").kernel.assign(kernel)
    scores = keras_taylor.score(model, criterion="fpgm")["hidden"]
    assert sorted(np.argsort(scores)[:2]) == [0, 1]  # which have the same norm as the last one, and more
    np.testing.assert_allclose(scores * mean_distances(kernel).mean(), mean_distances(kernel), rtol=1e-6)
