"""Scores of a run's rounds: through the mask of one model, from as many examples as pay."""

import helpers
import keras
import numpy as np
import pytest
import zoo

import keras_taylor
from keras_taylor.loop import round_scores
from keras_taylor.loop.round_scores import share_of_trained
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.scores import scoring_passes
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.log_odds import ODDS_ROWS
from keras_taylor.scores.scoring import make_gated_model
from keras_taylor.scores.scoring_passes import RepeatedPasses, gather_statistics
from keras_taylor.support.datasets import Feed

NAMES = [
    *("residual", "zero_pad_shortcut", "dense_block", "separable", "grouped", "channel_shuffle", "siamese"),
    *("two_inputs", "nested_backbone", "flatten_dense", "lstm_tagger", "attention_parts", "attending"),
    *("composite_layers", "prelu", "transposed_unet"),
]

pytestmark = pytest.mark.sweep(5)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_scores_the_smaller_model_that_was_trained_since(name):
    model = zoo.build(name)
    x, plan = zoo.inputs_of(model), helpers.random_plan(model)
    model.compile("sgd", "mse", run_eagerly=helpers.EAGER)
    small = keras_taylor.prune(model, plan)
    random = np.random.default_rng(0)
    for weight in small.trainable_weights:
        value = keras.ops.convert_to_numpy(weight)
        weight.assign(value * random.uniform(0.8, 1.2, value.shape).astype(value.dtype))
    channels, feed = label_model(small), Feed((x, helpers.targets_of(small, x)), small)
    wanted = gather_statistics(GatedModel(channels), channels, feed)
    whole = label_model(model)
    passes = RepeatedPasses(whole, GatedModel(whole))
    first = passes.statistics(whole, np.ones(whole.num_units, bool), feed)
    found = passes.statistics(channels, kept_units(whole, plan), feed)
    assert first.shape[1] > found.shape[1] == channels.num_units
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def small_model():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(24, activation="relu", name="first")(inputs)
    x = keras.layers.Dense(24, activation="relu", name="second")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data(num=64):
    random = np.random.default_rng(0)
    return random.normal(size=(num, 6)).astype("float32"), random.integers(0, 3, num)


def test_rounds_compile_anew_only_where_the_model_has_become_much_smaller(monkeypatch):
    compiled = []

    def compile_for_scoring(gated, model, mean=False):
        compiled.append(gated.network.gates.num_units)
        original(gated, model, mean)

    original = scoring_passes.compile_for_scoring
    monkeypatch.setattr(scoring_passes, "compile_for_scoring", compile_for_scoring)
    _, info = keras_taylor.compress(
        small_model(), data(), 0.6, increment=0.1, verbose=0, return_info=True, criterion="taylor"
    )
    assert len(info.rounds) == 6
    left = [1.0] + [done.flops / info.before["flops"] for done in info.rounds[:-1]]
    cut = next(share for share in left if share < 0.7)  # the first round that scores a model by itself
    assert [share < 0.7 * cut for share in left].count(True) == 0
    assert len(compiled) == 2 and compiled[0] == 48 > compiled[1]


@pytest.mark.slow
def test_a_run_takes_the_units_that_it_would_take_without_masks(monkeypatch):
    plans = []
    for at in (0.7, 2.0):  # with 2.0 every round has a scoring model of its own
        monkeypatch.setattr(round_scores, "NEW_SCORER_AT", at)
        keras.utils.set_random_seed(0)
        _, info = keras_taylor.compress(
            small_model(), data(), 0.5, increment=0.1, verbose=0, return_info=True, shuffle=False
        )
        plans.append(info.plan)
    assert plans[0].layers == plans[1].layers


@pytest.mark.parametrize(
    "trained, examples",
    [(None, 10_000), (800, 512), (4000, 512), (8000, 1000), (1_000_000, 10_000)],
)
def test_scores_take_an_eighth_of_what_is_trained_on(trained, examples):
    assert share_of_trained(trained, 1 / 8, 512, 10_000) == examples


@pytest.mark.parametrize(
    "epochs, options, scored",
    [
        (1, {}, 512),
        (5, {}, 928),  # 128 of them are held out
        (1, {"criterion": keras_taylor.Scoring(num_examples=700)}, 700),
        (0, {}, 1600),
        (50, {"batch_size": 1472}, 1472),
    ],
)
def test_how_many_examples_are_scored(capsys, epochs, options, scored):
    keras_taylor.compress(small_model(), data(1600), 0.1, increment=0.1, epochs=epochs, verbose=2, **options)
    assert f"from at most {scored:,} examples" in capsys.readouterr().out


def test_fewer_rounds_score_more_examples_each(capsys):
    keras_taylor.compress(small_model(), data(3200), 0.3, verbose=2)
    # two rounds for six trainings with 3040 examples each: a twentieth is held out, batches are whole
    assert "rounds: 2; in each: 'log_odds' scores from at most 1,152 examples" in capsys.readouterr().out


def test_a_pass_draws_the_same_probes_whatever_passes_came_before():
    model, (x, y) = small_model(), data()
    channels = label_model(model)
    passes = RepeatedPasses(channels, make_gated_model(channels, "log_odds_probed"))
    everything = np.ones(channels.num_units, bool)
    first, second = (passes.statistics(channels, everything, Feed((x, y), model)) for _ in range(2))
    probes = ODDS_ROWS["probe"]
    assert np.ptp(first[probes]) > 0
    np.testing.assert_array_equal(first, second)
