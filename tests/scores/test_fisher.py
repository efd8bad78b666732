"""The criterion `fisher`: units are chosen together, not one by one."""

import keras
import numpy as np
import pytest
from helpers import fingerprint
from test_log_odds import NUM, compiled, images, labels, linear

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model
from keras_taylor.scores import fisher
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.gates import GATE_ROWS
from keras_taylor.scores.scoring_passes import gather_statistics
from keras_taylor.support.datasets import Feed

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

pytestmark = pytest.mark.sweep(2)


def derivatives(model, x, y):
    """Each example's gate derivatives of `linear(3)`, float64."""
    first, first_bias, second, second_bias = (w.astype("float64") for w in model.get_weights())
    units = np.tanh(x @ first + first_bias)
    z = units @ second + second_bias
    return units * ((np.exp(z) / np.exp(z).sum(1, keepdims=True) - np.eye(3)[y]) @ second.T)


def greedy(g, saved):
    """The order of removal, by trying every unit at every step on the sum over all that have gone."""
    gone, total = [], np.zeros(len(g))
    for _ in range(g.shape[1]):
        before = np.square(total).mean() / 2
        adds = np.square(total[:, None] + g).mean(0) / 2 - before
        prices = np.where(adds > 0, adds / saved, adds * saved)
        prices[gone] = np.inf
        gone.append(int(prices.argmin()))
        total += g[:, gone[-1]]
    return gone


@pytest.mark.parametrize("batch_size", [1, 7, NUM])
def test_the_order_is_that_of_trying_every_unit(batch_size):
    model = compiled(linear(3), CROSS_ENTROPY)
    x, y = images(), labels(3)
    before = fingerprint(model)
    scores = keras_taylor.score(model, (x, y), criterion="fisher", batch_size=batch_size)["units"]
    assert fingerprint(model) == before
    wanted = greedy(derivatives(model, x, y), np.full(6, 8.0))
    assert np.argsort(scores).tolist() == wanted
    np.testing.assert_allclose(np.sort(scores), np.arange(1, 7) / 6, rtol=1e-6)


def test_what_a_removal_makes_worthless_goes_next():
    """Unit 4 takes back what unit 1 adds: alone it is dear, without unit 1 it does harm."""
    model = compiled(linear(3), CROSS_ENTROPY)
    first, head = model.get_layer("units"), model.get_layer("head")
    kernel, bias = (np.array(w) for w in first.get_weights())
    kernel[:, 4], bias[4] = kernel[:, 1], bias[1]
    first.set_weights([kernel, bias])
    out, out_bias = (np.array(w) for w in head.get_weights())
    out[1], out[4] = 0.5 * out[1], -out[1]
    head.set_weights([out, out_bias])
    ranks = keras_taylor.score(model, (images(), labels(3)), criterion="fisher")["units"]
    alone = keras_taylor.score(model, (images(), labels(3)), criterion="taylor")["units"]
    assert ranks[4] - ranks[1] == pytest.approx(1 / 6)
    assert ((alone > alone[1]) & (alone < alone[4])).sum() >= 1


def test_more_examples_than_rows_keep_the_products_in_the_mean(monkeypatch):
    monkeypatch.setattr(fisher, "MAX_SKETCH_ROWS", 512)
    model = compiled(linear(3), CROSS_ENTROPY)
    x, y = images(4000), labels(3, 4000)
    channels = label_model(model)
    gated = GatedModel(channels, gates=fisher.FisherGates(channels.num_units, name="gates"))
    totals = gather_statistics(gated, channels, Feed((x, y), model, 100))
    assert totals.shape[0] == len(GATE_ROWS) + 512
    rows, g = totals[len(GATE_ROWS) :], derivatives(model, x, y)
    exact, ours = g.T @ g / 4000, rows.T @ rows / 4000
    assert np.abs(ours - exact).max() < 0.15 * exact.max()
    one_sign = np.stack([g[k::512].sum(0) for k in range(512)])
    assert np.abs(ours - exact).max() < 0.5 * np.abs(one_sign.T @ one_sign / 4000 - exact).max()


def test_what_is_saved_counts():
    """Of equal units in a small and a large group, parameters take the large one's, FLOPs the other's."""
    x = inputs = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 1, activation="relu", name="early")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(4, activation="relu", name="late")(x)
    model = compiled(keras.Model(inputs, keras.layers.Dense(40, name="head")(x)), CROSS_ENTROPY)
    data = np.random.default_rng(0).normal(size=(32, 8, 8, 2)).astype("float32"), labels(3, 32)
    channels, sums = label_model(model), {}
    saved = {what: CostModel(channels)()[what] for what in ("params", "flops")}
    for what in saved:
        scores = keras_taylor.score(model, data, criterion="fisher", cost=what)
        sums[what] = {name: float(np.sum(values)) for name, values in scores.items()}
    assert sums["params"]["late"] < sums["flops"]["late"]
    assert sums["params"]["early"] > sums["flops"]["early"]


@pytest.mark.slow
def test_compress_takes_it_with_and_without_labels():
    model = compiled(linear(3), CROSS_ENTROPY)
    for ds in ((images(), labels(3)), images()):
        small = keras_taylor.compress(model, ds, 0.3, criterion="fisher", epochs=0, verbose=0)
        assert small.count_params() <= 0.7 * model.count_params()


def test_a_wrapper_cannot_gather_it():
    with pytest.raises(ValueError, match="fisher"):
        keras_taylor.PrunableModel(linear(3), criterion="fisher")
