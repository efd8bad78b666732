"""The laws on random models; a failure prints a script that shows it again."""

import helpers
import keras
import numpy as np
import random_graphs
import zoo
from helpers import predict, relative_difference

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel


def weights_of(model):
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


def assert_equal(first, second):
    """Two lists of arrays, to the bit."""
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def check_laws(description, folder):
    """Checks the model of a description; `folder` is for files."""
    model = random_graphs.build(description)
    x = zoo.inputs_of(model, num=3)
    model.compile(keras.optimizers.SGD(1e-3), loss="mse", run_eagerly=helpers.EAGER)
    outputs = predict(model, x)
    before = helpers.fingerprint(model)
    same = keras_taylor.prune(model, keras_taylor.Plan())
    assert_equal(predict(same, x), outputs)
    assert_equal(weights_of(same), weights_of(model))
    labeled = label_model(model)
    assert CostModel(labeled)()["params"] == model.count_params()
    if labeled.num_units > len(labeled.groups):
        small = check_plan(labeled, x, helpers.random_plan(model), folder)
        check_goal(labeled, model)
    assert helpers.fingerprint(model) == before


def check_plan(labeled, x, plan, folder):
    model = labeled.graph.model
    small = keras_taylor.prune(model, plan)
    kept = kept_units(labeled, plan)
    gated = GatedModel(labeled)
    assert relative_difference(predict(gated, x), predict(model, x)) <= 1e-6
    gated.mask = kept
    outputs = predict(small, x)
    assert relative_difference(outputs, predict(gated, x)) <= 1e-5
    assert plan.before == CostModel(labeled)()
    assert plan.after["params"] == small.count_params()
    assert plan.after == CostModel(label_model(small))()
    assert keras_taylor.Plan.from_json(plan.to_json()) == plan
    small.save(folder / "small.keras")
    loaded = keras.models.load_model(folder / "small.keras")
    for first, second in zip(predict(loaded, x), outputs, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)
    later = label_model(small, choices=labeled.size_choices)
    second = helpers.random_plan(small, seed=3, fraction=0.2, choices=labeled.size_choices)
    twice, _ = build_smaller(later, kept_units(later, second))
    once = keras_taylor.prune(model, plan.compose(second))
    assert_equal(weights_of(once), weights_of(twice))
    history = small.fit(x, helpers.targets_of(small, x), verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    return small


def check_goal(labeled, model):
    scores, goal = helpers.random_scores(model, seed=5), 0.5 * helpers.reachable(model)
    plan = keras_taylor.make_plan(model, scores, goal)
    ceiling = (1 - goal) * model.count_params()
    assert plan.after["params"] <= ceiling
    kept = kept_units(labeled, plan)
    flat = np.concatenate([scores[group.name] for group in labeled.groups])
    last = np.flatnonzero(~kept)[flat[~kept].argmax()]
    kept[last] = True
    assert CostModel(labeled)(kept)["params"] > ceiling
