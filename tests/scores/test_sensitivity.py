"""Sensitivity: what predictions lose when a share of a group goes, its readers refitted."""

import keras
import numpy as np
import pytest
from helpers import NAMES, case, fingerprint, predict, targets_of
from redundant import inputs_for, redundant

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.losses import divergence
from keras_taylor.scores.sensitivity import SensitivityCurve, measure_sensitivity
from keras_taylor.support.datasets import Feed
from keras_taylor.support.least_squares import Moments

ORDERS = np.array([3, 0, 2, 1])

pytestmark = pytest.mark.sweep(8)


def test_slopes_follow_the_lower_convex_hull():
    curve = SensitivityCurve(
        ORDERS, np.array([0, 1, 2, 3]), np.array([0.0, 0.3, 0.4, 1.4]), np.array([0, 10, 20, 30])
    )
    slopes = curve.slopes()
    np.testing.assert_allclose(slopes[[3, 0]], 0.02, rtol=2e-3)  # 0.4 for 20: the first step alone is dearer
    np.testing.assert_allclose(slopes[2], 0.1, rtol=2e-3)
    assert np.argsort(slopes).tolist() == ORDERS.tolist() and slopes[1] > 0.5


def test_what_costs_nothing_still_goes_in_order():
    curve = SensitivityCurve(ORDERS, np.array([0, 2, 3]), np.zeros(3), np.array([0, 5, 9]))
    assert np.argsort(curve.slopes()).tolist() == ORDERS.tolist()


def test_divergences_by_hand():
    p, q = np.array([[0.5, 0.5], [0.9, 0.1]]), np.array([[0.25, 0.75], [0.9, 0.1]])
    wanted = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2
    assert divergence("sparse_categorical_crossentropy", p, q).mean() == pytest.approx(wanted)
    logits = keras.losses.CategoricalCrossentropy(from_logits=True)
    assert divergence(logits, np.log(p) + 3, np.log(q) - 1).mean() == pytest.approx(wanted)
    both = (0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)) / 1
    assert divergence("binary_crossentropy", np.array([[0.5]]), np.array([[0.2]])).mean() == pytest.approx(
        both
    )
    assert divergence("mse", np.array([[3.0, 4.0]]), np.array([[3.0, 3.0]])).mean() == pytest.approx(1 / 25)


@pytest.mark.parametrize("centered", [True, False])
def test_a_restricted_matrix_is_the_least_squares_solution(centered):
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 6)) @ random.normal(size=(6, 6)) + 2
    matrix, columns = random.normal(size=(6, 3)), np.array([1, 1, 0, 1, 0, 1], bool)
    moments = Moments(6)
    for part in np.array_split(x, 7):
        moments.add(part)
    ours = moments.restricted(matrix, columns, 1e-9, centered)
    rows = x - x.mean(0) if centered else x
    theirs = np.linalg.lstsq(rows[:, columns], rows @ matrix, rcond=None)[0]
    np.testing.assert_allclose(ours[columns], theirs, rtol=1e-4)
    assert not ours[~columns].any()
    np.testing.assert_allclose(moments.mean, x.mean(0))


def test_redundant_units_cost_nothing_once_their_readers_are_refitted():
    """Two of eight filters are mixtures of the others: plain removal shows, refitted it does not."""
    model = redundant()
    model.compile("sgd", "mse")
    x = inputs_for(model, 400)
    channels = label_model(model)
    (group,) = [g for g in channels.groups if g.name == "conv1"]
    gated = GatedModel(channels)
    before, weights = predict(gated, x[:8]), fingerprint(model)["weights"]
    curve = measure_sensitivity(channels, gated, Feed(x, model, targets=False), dict)["conv1"]
    at_two = curve.divergence[curve.num_gone.tolist().index(2)]
    assert at_two < 1e-6 < curve.divergence[curve.num_gone.tolist().index(4)]
    mask = np.ones(channels.num_units)
    mask[group.start + curve.order[:2]] = 0
    for ours, theirs in zip(predict(gated, x[:8]), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # the copies were put back
    gated.mask = mask
    assert divergence("mse", before[0], predict(gated, x[:8])[0]).mean() > 1e-4
    assert fingerprint(model)["weights"] == weights


def test_elimination_tells_the_growth_of_the_squared_error():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 8)) @ random.normal(size=(8, 8))
    matrix, weights = random.normal(size=(8, 3)), np.array([1.0, 4.0, 0.25])
    moments = Moments(8)
    moments.add(x)
    blocks = np.array([[0, 4], [1, 5], [2, 6], [3, 7]])
    elimination = moments.elimination(matrix, blocks, 1e-12, False, weights)
    wanted = x @ matrix

    def error(columns):
        found = np.linalg.lstsq(x[:, columns], wanted, rcond=None)[0]
        return (np.square(wanted - x[:, columns] @ found) @ weights).sum() / (
            np.square(wanted) @ weights
        ).sum()

    alone = [error([c for c in range(8) if c not in block]) for block in blocks.tolist()]
    np.testing.assert_allclose(elimination.costs(), alone, rtol=1e-6)
    elimination.remove(2)
    for other in (0, 1, 3):
        both = error([c for c in range(8) if c not in (2, 6, *blocks[other])])
        np.testing.assert_allclose(elimination.costs()[other], both - alone[2], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_scores_over_the_zoo(name):
    model, x = case(name).model, case(name).x
    y = targets_of(model, x)
    before = fingerprint(model)
    scores = keras_taylor.score(model, (x, y), criterion="sensitivity")
    assert fingerprint(model) == before
    assert set(scores) == {g.name for g in label_model(model).groups}
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in scores.values())
    keras_taylor.make_plan(model, scores, 0.1)


def test_scores_for_flops_are_slopes_for_flops():
    """The first convolution works on a map four times as large as the second, and is worth less a FLOP."""
    inputs = keras.Input((8, 8, 4))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="early")(inputs)
    x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="late")(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")
    params = keras_taylor.score(model, x, criterion="sensitivity")
    flops = keras_taylor.score(model, x, criterion="sensitivity", cost="flops")
    costs = CostModel(label_model(model))
    for group in label_model(model).groups:
        kept = np.arange(costs.num_units) != group.start
        whole, less = costs(), costs(kept)
        ratio = (whole["params"] - less["params"]) / (whole["flops"] - less["flops"])
        np.testing.assert_allclose(flops[group.name], params[group.name] * ratio, rtol=1e-2)


def test_a_cost_that_is_none():
    with pytest.raises(ValueError, match=r"what the removal of units saves\. Received: cost='bytes'"):
        keras_taylor.score(redundant(), criterion="magnitude", cost="bytes")
