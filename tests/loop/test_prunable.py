"""`PrunableModel`: as the model that it wraps, with scores, masks, and a way back."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND, NAMES, case, fingerprint, predict, random_scores, reachable, relative_difference
from stripes import small_model, stripes

import keras_taylor
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model

pytestmark = pytest.mark.sweep(3)


@pytest.mark.parametrize("name", NAMES)
def test_masked_as_a_plan_says_it_is_the_pruned_model(name):
    known = case(name)
    before = fingerprint(known.model)
    prunable = keras_taylor.PrunableModel(known.model)
    prunable.mask = kept_units(label_model(known.model), known.plan)
    assert relative_difference(predict(prunable, known.x), predict(known.small, known.x)) < 1e-5
    small = prunable.strip()
    assert small.to_json() == known.small.to_json()
    assert all(
        np.array_equal(a, b) for a, b in zip(small.get_weights(), known.small.get_weights(), strict=True)
    )
    assert prunable.plan == known.plan
    assert prunable.cost() == dict(known.plan.after)
    assert fingerprint(known.model) == before


@pytest.mark.parametrize(
    "name", ["siamese", "two_outputs", "dictionaries", "nested_three_deep", "mixed_dtype"]
)
def test_unpruned_it_is_the_model(name):
    known = case(name)
    outputs = predict(keras_taylor.PrunableModel(known.model), known.x)
    assert relative_difference(outputs, predict(known.model, known.x)) < 1e-6


@pytest.fixture(scope="module")
def trained():
    """A wrapped model that was trained, pruned and trained again."""
    keras.utils.set_random_seed(0)
    x, y = stripes()
    prunable = keras_taylor.PrunableModel(small_model())
    traces = count_traces(prunable)
    prunable.fit(x, y, epochs=2, batch_size=16, verbose=0)
    first = len(traces)
    gone = prunable.prune(0.3)
    prunable.fit(x, y, epochs=2, batch_size=16, verbose=0)
    prunable.prune(2)
    prunable.fit(x, y, batch_size=16, verbose=0)
    return prunable, gone, first, len(traces)


def count_traces(model):
    """A list that gets an entry whenever Python runs the forward pass: once a trace, if compiled."""
    traces, call = [], model.network.call

    def counted(*args, **kwargs):
        traces.append(kwargs)
        return call(*args, **kwargs)

    vars(model.network)["call"] = counted
    return traces


def test_nothing_is_traced_anew_between_prunings(trained):
    _, _, first, last = trained
    if keras.backend.backend() == "torch":
        assert last - first == 9  # eager: every one of the nine steps runs Python
    else:
        assert last == first


def test_pruned_to_the_goal_and_two_units_more(trained):
    prunable, gone, _, _ = trained
    assert gone > 0 and (prunable.mask == 0).sum() == gone + 2
    plan = prunable.plan
    assert plan.after["params"] <= 0.7 * plan.before["params"]
    assert prunable.cost() == keras_taylor.analyze(prunable.strip()).costs
    assert prunable.prunable == prunable.mask.sum() - 2  # each of the two groups keeps one


def test_stripped_it_predicts_the_same(trained):
    prunable = trained[0]
    x, y = stripes()
    small = prunable.strip()
    assert not isinstance(small, keras_taylor.PrunableModel) and type(small) is keras.Sequential
    assert relative_difference(predict(small, x), predict(prunable, x)) < 1e-5
    assert small.evaluate(x, y, verbose=0) == pytest.approx(prunable.evaluate(x, y, verbose=0), rel=1e-4)
    assert [m.name for m in small.metrics] == [m.name for m in prunable.metrics]


def test_scores_of_what_has_gone_are_zero_and_others_go_on(trained):
    prunable = trained[0]
    scores = np.concatenate(list(prunable.scores.values()))
    assert ((scores == 0) == (prunable.mask == 0)).all()


SAVED = """
import sys, keras, numpy as np, keras_taylor
prunable = keras.models.load_model(sys.argv[1])
arrays = {"mask": prunable.mask, "statistics": prunable.statistics}
arrays["y"] = keras.ops.convert_to_numpy(prunable(np.load(sys.argv[2]), training=False))
arrays["optimizer"] = keras.ops.convert_to_numpy(prunable.optimizer.wrapped.variables[-1])
prunable.prune(1)
prunable.fit(np.load(sys.argv[2]), np.zeros(48), epochs=1, verbose=0)
np.savez(sys.argv[3], **arrays)
"""


@pytest.mark.slow
def test_saved_in_mid_run_it_goes_on_in_another_process(trained, tmp_path):
    prunable, (x, _) = trained[0], stripes()
    prunable.save(tmp_path / "run.keras")
    np.save(tmp_path / "x.npy", x)
    names = [str(tmp_path / name) for name in ("run.keras", "x.npy", "out.npz")]
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", SAVED, *names], check=True)
    with np.load(names[2]) as loaded:
        assert np.array_equal(loaded["mask"], prunable.mask)
        assert np.array_equal(loaded["statistics"], prunable.statistics)
        last = keras.ops.convert_to_numpy(prunable.optimizer.wrapped.variables[-1])
        assert np.array_equal(loaded["optimizer"], last)
        expected = keras.ops.convert_to_numpy(prunable(x, training=False))
        np.testing.assert_allclose(loaded["y"], expected, rtol=1e-5, atol=1e-6)


def test_saves_its_arguments(tmp_path):
    model = small_model()
    arguments = {"criterion": "taylor_abs", "exclude": [model.layers[0]]}
    arguments["selection"] = keras_taylor.Selection(
        rank="score", balance=0.25, round_to=4, min_channels=3, ratios={model.layers[1]: (0, 0.9)}
    )
    prunable = keras_taylor.PrunableModel(model, **arguments, loss_reduction="sum", name="mine")
    prunable.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.name == "mine" and again.get_config()["criterion"] == "taylor_abs"
    assert again.get_config() == prunable.get_config() and again.get_config()["selection"]["balance"] == 0.25
    assert again.prunable == prunable.prunable == 8  # of 12, multiples of four
    assert again.network.gates.averaged is False


def test_an_uncompiled_model_stays_uncompiled():
    model = small_model()
    plain = keras.Model(model.inputs, model.outputs)
    prunable = keras_taylor.PrunableModel(plain)
    assert not prunable.compiled and not prunable.strip().compiled


def test_momentum_keeps_a_part_of_what_was_gathered():
    prunable = keras_taylor.PrunableModel(small_model())
    prunable.fit(*stripes(), batch_size=16, verbose=0)
    before = prunable.statistics
    prunable.prune(1, momentum=0.25)
    np.testing.assert_allclose(prunable.statistics, before / 4, rtol=1e-6)
    for _ in range(4):  # less than one example is left
        before = prunable.scores
        prunable.prune(1, momentum=0.25)
        after = prunable.scores
    for name in before:
        left = after[name] > 0
        np.testing.assert_allclose(after[name][left], before[name][left], rtol=1e-5)
    prunable.prune(1)
    assert not prunable.statistics.any()


def test_a_met_goal_takes_nothing_and_what_went_stays_gone():
    prunable = keras_taylor.PrunableModel(small_model(), selection=keras_taylor.Selection(round_to=2))
    prunable.fit(*stripes(), batch_size=16, verbose=0)
    prunable.prune(0.5)
    mask = prunable.mask
    assert prunable.prune(0.3) == 0 and prunable.prune({"flops": 0.01}) == 0
    assert np.array_equal(prunable.mask, mask)
    prunable.fit(*stripes(), batch_size=16, verbose=0)
    prunable.prune(0.7)
    assert (prunable.mask <= mask).all() and prunable.mask.sum() < mask.sum()


class Shaken(keras_taylor.PrunableModel):
    """Scores that are others each time."""

    random = np.random.default_rng(0)

    @property
    def scores(self):
        return {g.name: self.random.random(g.num_units) for g in self._pruning.labeled.groups}


@pytest.mark.parametrize("rank", ["score", "cost"])
@pytest.mark.parametrize(
    "name", ["residual", "concat", "shared_layer", "depthwise", "siamese", "transformer"]
)
def test_whatever_the_goals_what_went_stays_gone_and_no_layer_collapses(name, rank):
    model = case(name).model
    prunable = Shaken(model, selection=keras_taylor.Selection(rank=rank, balance=0.5))
    most = reachable(model)
    steps = [0.2 * most, {"flops": 0.3 * most}, 2, 0.5 * most, {"flops": 0.01}, 0.7 * most]
    for goal in steps:
        before = prunable.mask
        num = prunable.prune(goal)
        assert (prunable.mask <= before).all() and num == (before - prunable.mask).sum()
    assert prunable.cost()["params"] <= (1 - 0.7 * most) * prunable.plan.before["params"]
    fresh = Shaken(model, selection=keras_taylor.Selection(rank=rank, balance=0.5))
    fresh.prune(0.7 * most)
    kept = {name: len(layer.kept) for name, layer in fresh.plan.layers.items()}
    selection = keras_taylor.Selection(scope="layer")
    evenly = keras_taylor.make_plan(model, random_scores(model), 0.7 * most, selection=selection).layers
    assert all(width >= len(evenly[layer].kept) // 2 for layer, width in kept.items() if layer in evenly)


class Fixed(keras_taylor.PrunableModel):
    """The channels of the first layer are the least important ones."""

    @property
    def scores(self):
        return {"first": np.arange(8.0), "second": np.arange(10.0, 22.0)}


def test_a_floor_of_a_later_goal_opens_nothing_again():
    """Seven of eight channels of a layer went by number; half of what an even cut leaves is more than one."""
    prunable = Fixed(small_model())
    assert prunable.prune(7) == 7 and len(prunable.plan.layers["first"].kept) == 1
    mask = prunable.mask
    gone = 1 - prunable.cost()["params"] / prunable.plan.before["params"]
    assert prunable.prune(gone + 0.05) > 0
    assert (prunable.mask <= mask).all()


def test_more_than_can_go_takes_all_that_can():
    prunable = keras_taylor.PrunableModel(small_model(), selection=keras_taylor.Selection(min_channels=2))
    prunable.fit(*stripes(), batch_size=16, verbose=0)
    assert prunable.prune(1000) == 16 and prunable.prunable == 0
    assert prunable.strip().layers[0].filters == 2


def test_label_free_criteria_need_no_training():
    prunable = keras_taylor.PrunableModel(small_model(), criterion="magnitude")
    assert prunable.scores.keys() == {"first", "second"}
    assert prunable.prune(0.3) > 0


def test_regularizers_and_constraints_work_as_in_the_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, kernel_regularizer="l2", kernel_constraint="non_neg"),
            keras.layers.Dense(2, activity_regularizer="l1"),
        ]
    )
    model.compile("sgd", "mse")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    prunable = keras_taylor.PrunableModel(model)
    assert prunable.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-6)
    for one in (model, prunable):
        one.train_on_batch(x, y)
    for after, expected in zip(prunable.strip().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-7)


class Doubled(keras_taylor.PrunableModel):
    """Its loss is twice the compiled one."""

    def compute_loss(self, *args, **kwargs):
        return 2 * super().compute_loss(*args, **kwargs)


def test_a_custom_loss_counts():
    model, (x, y) = small_model(optimizer=keras.optimizers.SGD(0.0)), stripes()
    model.get_layer("norm").trainable = False
    plain, doubled = keras_taylor.PrunableModel(model), Doubled(model)
    for one in (plain, doubled):
        one.fit(x, y, batch_size=16, verbose=0)
    for name, values in plain.scores.items():
        np.testing.assert_allclose(doubled.scores[name], 4 * values, rtol=1e-5)


class OwnStep(keras.Model):
    def train_step(self, *args, **kwargs):
        return super().train_step(*args, **kwargs)


def refused(match, function, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match="(?s)" + match):
        function(*args, **kwargs)


def test_scores_can_be_updated_by_hand():
    """What a loop does whose optimizer knows nothing of Keras, under a loss scale of 4."""
    prunable = keras_taylor.PrunableModel(small_model())
    batch = np.abs(np.random.default_rng(0).normal(size=prunable.statistics.shape))
    powers = np.array([1, 1, 2, 2, 0, 0])[:, None]  # rows of first and second degree, and counts
    for number in (1, 2):
        gradient = prunable.statistics + batch * 4.0**powers
        prunable.update_scores(keras.ops.convert_to_tensor(gradient, "float32"), loss_scale=4.0)
        np.testing.assert_allclose(prunable.statistics, number * batch, rtol=1e-5)
    prunable.update_scores(keras.ops.full(batch.shape, np.inf))
    np.testing.assert_allclose(prunable.statistics, 2 * batch, rtol=1e-5)
    assert prunable.trainable_variables[-1] is prunable.score_variable


def test_refusals():
    model = small_model()
    wrap = keras_taylor.PrunableModel
    prunable = wrap(model)
    refused("no scores yet.*Received: model='prunable_small'$", prunable.prune, 0.3)
    refused("no scores yet.*Received: model='prunable_small'$", lambda: prunable.scores)
    refused("no gradient of the scores.*Received: gradient=None$", prunable.update_scores)
    refused("whole number.*Received: goal=0$", prunable.prune, 0)
    refused("fraction to remove.*Received: goal=1.5$", prunable.prune, 1.5)
    refused("out of reach.*Received: goal=0.9999$", prunable.prune, 0.9999)
    refused("below 1. Received: momentum=1$", prunable.prune, 0.3, momentum=1)
    refused("gathered while training.*Received: criterion='oracle'$", wrap, model, criterion="oracle")
    refused("Unknown criterion.*Received: criterion='best'$", wrap, model, criterion="best")
    refused("Received: loss_reduction='none'$", wrap, model, loss_reduction="none")
    refused("wrapped already. Received: model='prunable_small', a PrunableModel$", wrap, prunable)
    refused(
        r"part of `selection` now.*PrunableModel\(..., selection=keras_taylor.Selection\(round_to=8\)\)$",
        wrap, model, round_to=8, error=TypeError,
    )  # fmt: skip
    refused("unexpected keyword argument 'goal'$", wrap, model, goal=0.3, error=TypeError)
    refused("Received: exclude='nowhere'$", wrap, model, exclude="nowhere")
    own = OwnStep(model.inputs, model.outputs, name="own")
    refused(
        re.escape("overrides `train_step`") + r".*train_step = OwnStep\.train_step.*Received: model='own'",
        wrap,
        own,
    )


def test_losses_of_different_reductions_are_refused():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4)(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(1)(hidden), keras.layers.Dense(1)(hidden)])
    losses = [keras.losses.MeanSquaredError(), keras.losses.MeanSquaredError(reduction="sum")]
    model.compile("sgd", losses)
    refused("add up.*others average.*Received: loss=", keras_taylor.PrunableModel, model)
    prunable = keras_taylor.PrunableModel(model, loss_reduction="mean")
    prunable.fit(np.ones((4, 3)), [np.ones((4, 1)), np.ones((4, 1))], verbose=0)
    assert prunable.prune(1) == 1


@pytest.mark.skipif(BACKEND != "torch", reason="other optimizers than Keras' take PyTorch's parameters")
def test_an_optimizer_that_trains_the_scores_like_a_weight_is_noticed():
    import torch

    prunable = keras_taylor.PrunableModel(small_model())
    x, y = stripes(16)
    for make in (torch.optim.SGD, torch.optim.Adam):
        optimizer = make(prunable.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            keras.losses.sparse_categorical_crossentropy(y, prunable(x, training=True)).mean().backward()
            optimizer.step()
        with pytest.raises(
            ValueError, match=r"trained `score_variable` as if it was a weight.*call `update_scores"
        ):
            prunable.prune(2)
