"""The laws on random models; a failure prints a script that shows it again."""

import pprint
import tempfile
import warnings
import zlib

import helpers
import hypothesis
import keras
import numpy as np
import random_graphs
import zoo
from helpers import predict, relative_difference
from hypothesis import strategies

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel

# what runs models: JAX compiles each of them, so there each random model is put to one of these
PARTS = ("nothing removed", "gates", "file", "fit", "score")
SCRIPT = """A script that shows it again, to be run in the folder `tests`:

KERAS_BACKEND={backend} python - <<'PYTHON'
import random_graphs, test_random_graphs
description = {description}
random_graphs.build(description).summary()
test_random_graphs.check_laws(description, {parts})
PYTHON"""


def num_models(config):
    """Thirty in the short run; CI has 300 on its three backends, most of them on the one that is fastest."""
    if not config.getoption("--all"):
        return 30
    return 50 if config.getoption("--sample") else 200


def test_the_laws_hold_on_random_models(pytestconfig):
    seed = pytestconfig.getoption("--graphs") or helpers.BACKEND

    @hypothesis.settings(
        max_examples=num_models(pytestconfig),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(zlib.crc32(seed.encode()))
    @hypothesis.given(random_graphs.descriptions(), strategies.sampled_from(PARTS))
    def check(description, part):
        parts = PARTS if helpers.EAGER else (part,)
        try:
            check_laws(description, parts)
        except Exception as error:
            text = pprint.pformat(description, width=100)
            error.add_note(SCRIPT.format(backend=helpers.BACKEND, description=text, parts=parts))
            raise

    check()


def weights_of(model):
    return [keras.ops.convert_to_numpy(weight) for weight in model.weights]


def assert_equal(first, second):
    """Two lists of arrays, to the bit."""
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def check_laws(description, parts=PARTS):
    """Checks the model of a description; what runs it as far as `parts` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of masks that end, of softmax over one number
        model = random_graphs.build(description)
        x = zoo.inputs_of(model, num=3)
        model.compile(keras.optimizers.SGD(1e-3), loss="mse", run_eagerly=helpers.EAGER)
        outputs = predict(model, x) if {"nothing removed", "gates", "score"}.intersection(parts) else None
        before = helpers.fingerprint(model)
        check_empty_plan(model, x, outputs, parts)
        labeled = label_model(model)
        if labeled.num_units > len(labeled.groups):
            plan = helpers.random_plan(model)
            small = keras_taylor.prune(model, plan)
            check_costs(labeled, plan, small)
            check_pruning_twice(labeled, plan, small)
            check_small(labeled, plan, small, x, outputs, parts)
            check_goal(labeled)
        if "score" in parts and labeled.num_units:
            check_scores(labeled, x)
        assert helpers.fingerprint(model) == before


def check_empty_plan(model, x, outputs, parts):
    same = keras_taylor.prune(model, keras_taylor.Plan())
    assert_equal(weights_of(same), weights_of(model))
    if "nothing removed" in parts:
        assert_equal(predict(same, x), outputs)


def check_costs(labeled, plan, small):
    assert plan.before == CostModel(labeled)()
    assert plan.before["params"] == labeled.graph.model.count_params()
    assert plan.after["params"] == small.count_params()
    assert plan.after == CostModel(label_model(small))()
    assert keras_taylor.Plan.from_json(plan.to_json()) == plan


def check_small(labeled, plan, small, x, outputs, parts):
    if "gates" in parts:
        gated = GatedModel(labeled)
        assert relative_difference(predict(gated, x), outputs) <= 1e-6
        gated.mask = kept_units(labeled, plan)
        assert relative_difference(predict(small, x), predict(gated, x)) <= 1e-5
    if "file" in parts:
        with tempfile.TemporaryDirectory() as folder:
            small.save(f"{folder}/small.keras")
            with zoo.without_initializers():
                loaded = keras.models.load_model(f"{folder}/small.keras")
        for first, second in zip(predict(loaded, x), predict(small, x), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-6, atol=1e-6)
    if "fit" in parts:
        history = small.fit(x, helpers.targets_of(small, x), verbose=0)
        assert np.isfinite(history.history["loss"]).all()


def check_pruning_twice(labeled, plan, small):
    choices = labeled.size_choices
    later = label_model(small, choices=choices)
    second = helpers.random_plan(small, seed=3, fraction=0.2, choices=choices)
    twice, _ = build_smaller(later, kept_units(later, second))
    once = keras_taylor.prune(labeled.graph.model, plan.compose(second))
    assert_equal(weights_of(once), weights_of(twice))


def check_scores(labeled, x):
    model = labeled.graph.model
    scores = keras_taylor.score(model, (x, helpers.targets_of(model, x)), batch_size=3)
    assert {g.name: (g.num_units,) for g in labeled.groups} == {n: s.shape for n, s in scores.items()}
    assert all(np.isfinite(values).all() for values in scores.values())


def check_goal(labeled):
    model = labeled.graph.model
    scores, goal = helpers.random_scores(model, seed=5), 0.5 * helpers.reachable(model)
    plan = keras_taylor.make_plan(model, scores, goal, selection=keras_taylor.Selection(rank="score"))
    ceiling = (1 - goal) * model.count_params()
    assert plan.after["params"] <= ceiling
    kept = kept_units(labeled, plan)
    flat = np.concatenate([scores[group.name] for group in labeled.groups])
    last = np.flatnonzero(~kept)[flat[~kept].argmax()]
    kept[last] = True
    assert CostModel(labeled)(kept)["params"] > ceiling
