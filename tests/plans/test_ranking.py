"""Which units go: ratios of single layers, even cuts, floors against collapse, scores per cost."""

import itertools

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import case, random_scores

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans import ranking
from keras_taylor.plans.limits import Limits, ratio_limits
from keras_taylor.plans.planning import kept_units
from keras_taylor.plans.ranking import RemovalRequest, choose_kept
from keras_taylor.reading.groups import label_model

pytestmark = pytest.mark.once


def message_of(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


def stack(*widths, size=8):
    """Convolutions `conv0`, `conv1`, ... and a head."""
    x = inputs = keras.Input((size, size, 3))
    for number, width in enumerate(widths):
        x = keras.layers.Conv2D(width, 3, padding="same", activation="relu", name=f"conv{number}")(x)
    return zoo.classified(inputs, x)


def widths_left(plan, model):
    channels = label_model(model, exact=plan.exact)
    counts = CostModel(channels).units_per_group(kept_units(channels, plan))
    return dict(zip([group.name for group in channels.groups], counts.tolist(), strict=True))


def plan_for(model, goal=0.2, scores=None, **choice):
    scores = random_scores(model) if scores is None else scores
    return keras_taylor.make_plan(model, scores, goal, selection=keras_taylor.Selection(**choice))


@pytest.mark.parametrize(("ratio", "left"), [(0.5, 10), (0.0, 20), (0.26, 15), (0.99, 1)])
def test_a_ratio_fixes_what_a_layer_loses(ratio, left):
    model = stack(20, 20, 20)
    scores = random_scores(model)
    plan = plan_for(model, scores=scores, ratios={"conv1": ratio})
    assert widths_left(plan, model)["conv1"] == left
    if left < 20:
        kept = np.sort(np.argsort(scores["conv1"])[20 - left :])
        np.testing.assert_array_equal(plan.layers["conv1"].kept, kept)
    assert plan.after["params"] <= 0.8 * plan.before["params"]


def test_a_range_holds_at_both_ends():
    model = stack(20, 20, 20)
    scores = random_scores(model)
    scores["conv0"] += 10  # would lose nothing
    scores["conv2"] -= 10  # would lose all
    plan = plan_for(model, 0.4, scores, ratios={"conv.*": (0.1, 0.4)})
    assert widths_left(plan, model) == {"conv0": 18, "conv1": 15, "conv2": 12}
    assert widths_left(plan_for(model, 0.4, scores), model)["conv0"] == 20


def test_a_ratio_of_layers_is_that_of_all_that_go_with_them():
    model = case("residual").model
    layer = model.get_layer("block1_b")
    for key in ("block1_b", layer, "block._b"):
        plan = plan_for(model, 0.05, ratios={key: 0.5})
        assert len(plan.layers["stem"].kept) == len(plan.layers["block0_b"].kept) == 3
    plan = plan_for(model, 0.05, ratios={"block0_b": (0, 0.5), "stem": (0.5, 1)})
    assert len(plan.layers["block1_b"].kept) == 3


def test_ratios_are_removed_beyond_the_goal():
    model = stack(20, 20)
    plan = plan_for(model, 0.01, ratios={"conv0": 0.5})
    assert widths_left(plan, model) == {"conv0": 10, "conv1": 20}


def test_a_multiple_and_a_floor_come_before_ratios():
    model = stack(20, 20)
    choice = {"ratios": {"conv0": 0.55}}
    assert widths_left(plan_for(model, 0.01, round_to=4, **choice), model)["conv0"] == 12
    assert widths_left(plan_for(model, 0.01, min_channels=15, **choice), model)["conv0"] == 15


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1, 1.5, "0.5", None, True, (0.5,), (0.4, 0.1), (1, 1), (0, 2)])
def test_what_is_no_ratio_is_refused(ratio):
    assert message_of(plan_for, stack(4, 4), ratios={"conv0": ratio}) == (
        "A ratio is the fraction of a layer's channels to remove. Expected a number from 0 on and below 1, "
        f"or two numbers, at least and at most. Received: ratios={{'conv0': {ratio!r}}}"
    )


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (
            {"block7": 0.5},
            "`ratios` names a layer that the model does not have. Expected layer names, regular expressions "
            "that match whole names, or layers of the model; it has",
        ),
        (
            {"head": 0.5},
            "A ratio removes channels that cannot leave (head: the model's output). Expected layers with "
            "channels that can leave, or a ratio from 0 on. Received: ratios={'head': 0.5}",
        ),
        (
            {"stem": 0.5, "block0_b": (0.6, 0.9)},
            "Ratios contradict each other for the channels of 'stem', which are made by stem, block0_b, "
            "block1_b and leave together: 0.5 to 0.5 by 'stem'. Expected ranges that overlap. "
            "Received: ratios={'block0_b': (0.6, 0.9)}",
        ),
    ],
)
def test_ratios_that_cannot_be_are_refused(ratios, message):
    assert message_of(plan_for, case("residual").model, ratios=ratios).startswith(message)


def test_a_ratio_needs_scores():
    assert message_of(plan_for, stack(4, 4), 0.2, {"conv1": np.arange(4.0)}, ratios={"conv0": 0.5}) == (
        "`ratios` ask for 2 of the 4 channels of 'conv0', which have no scores. Expected scores of each "
        "layer that must lose channels. Received: no scores of 'conv0'"
    )


def test_a_goal_that_ratios_put_out_of_reach_is_refused():
    text = message_of(plan_for, stack(20, 20), 0.5, ratios={".*": (0, 0.1)})
    assert "out of reach" in text and "(`include`, `exclude`, `ratios`, `round_to`, `min_channels`)" in text


def test_ratios_are_shares_of_the_original_in_later_rounds():
    model = stack(10, 10)
    limits = Limits(ratios=ratio_limits(label_model(model), {"conv0": 0.5, "conv1": (0, 0.3)}))
    whole = {"conv0": 10, "conv1": 10}
    assert [b.tolist() for b in limits.bounds(label_model(model), whole, 0.4)] == [[2, 0], [5, 3]]
    small = keras_taylor.prune(model, plan_for(model, 0.01, ratios={"conv0": 0.2, "conv1": 0.1}))
    assert [b.tolist() for b in limits.bounds(label_model(small), whole, 0.4)] == [[0, 0], [3, 2]]
    assert [b.tolist() for b in limits.bounds(label_model(small), whole)] == [[3, 0], [3, 2]]


@pytest.mark.parametrize("goal", [0.2, 0.5, 0.9, {"flops": 0.6}])
def test_an_even_cut_takes_the_same_share_of_every_layer(goal):
    model = stack(10, 20, 30)
    scores = {"conv0": np.arange(10.0), "conv1": 100 + np.arange(20.0), "conv2": 1000 + np.arange(30.0)}
    plan = plan_for(model, goal, scores, scope="layer")
    left = widths_left(plan, model)
    shares = [left["conv0"] / 10, left["conv1"] / 20, left["conv2"] / 30]
    assert max(shares) - min(shares) <= 1 / 10
    assert plan.layers["conv2"].kept == tuple(range(30 - left["conv2"], 30))
    (what, fraction) = next(iter(goal.items())) if isinstance(goal, dict) else ("params", goal)
    assert plan.after[what] <= (1 - fraction) * plan.before[what]


def test_an_even_cut_rounds_and_keeps_a_floor():
    plan = plan_for(stack(16, 32), 0.6, scope="layer", round_to=8)
    assert set(widths_left(plan, stack(16, 32)).values()) <= {8, 16, 24, 32}
    assert (
        min(widths_left(plan_for(stack(6, 32), 0.8, scope="layer", min_channels=4), stack(6, 32)).values())
        >= 4
    )


def test_rounds_add_up_to_an_even_cut():
    model = stack(10, 20, 30)
    scores = random_scores(model)
    whole, before = {"conv0": 10, "conv1": 20, "conv2": 30}, model.count_params()
    for goal in (0.2, 0.4, 0.6):
        channels = label_model(model)
        flat = np.concatenate([np.sort(scores[g.name])[: g.num_units] for g in channels.groups])
        ceilings = {"params": (1 - goal) * before}
        costs = CostModel(channels)
        selection = keras_taylor.Selection(scope="layer")
        request = RemovalRequest(ceilings, goal, selection=selection, original_widths=whole)
        kept = choose_kept(channels, costs, flat, request)
        model = keras_taylor.prune(model, keras_taylor.plans.planning.plan_of(channels, costs, kept))
        shares = [g.num_units / whole[g.name] for g in label_model(model).groups]
        assert max(shares) - min(shares) <= 1 / 10


@pytest.mark.parametrize("rank", ["score", "cost"])
def test_no_layer_falls_below_its_share_of_an_even_cut(rank):
    model = stack(20, 20, 20)
    scores = random_scores(model)
    scores["conv1"] /= 1e3
    bare = plan_for(model, 0.9, scores, rank=rank, balance=0)
    assert widths_left(bare, model)["conv1"] == 1, "collapsed"
    even = widths_left(plan_for(model, 0.9, scores, scope="layer"), model)
    for balance in (0.25, 0.5, 1):
        plan = plan_for(model, 0.9, scores, rank=rank, balance=balance)
        left = widths_left(plan, model)
        assert all(left[name] >= balance * even[name] for name in left)
        assert plan.after["params"] <= 0.1 * plan.before["params"]
    assert left == even


def separable():
    x = inputs = keras.Input((8, 8, 3))
    for number, width in enumerate((16, 32, 32)):
        x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
        x = keras.layers.Conv2D(width, 1, use_bias=False, name=f"point{number}")(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return zoo.classified(inputs, x)


def residual():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(16, 3, padding="same", name="stem")(inputs)
    for number in range(2):
        y = keras.layers.Conv2D(16, 3, padding="same", activation="relu", name=f"inner{number}")(x)
        x = keras.layers.Add()([x, keras.layers.Conv2D(16, 3, padding="same", name=f"outer{number}")(y)])
    return zoo.classified(inputs, x)


def test_of_units_whose_loss_helps_those_that_save_most_leave_first():
    model = stack(8, 8)  # a unit of the first layer is 100 parameters, one of the second is fewer
    scores = {"conv0": np.full(8, -1.0), "conv1": np.full(8, -1.0)}
    plan = plan_for(model, 0.1, scores, rank="cost", balance=0)
    assert widths_left(plan, model) == {"conv0": 7, "conv1": 8}


@pytest.mark.parametrize("build", [lambda: stack(16, 32, 32, 32), separable, residual])
@pytest.mark.parametrize("criterion", ["log_odds", "taylor", "magnitude"])
@pytest.mark.slow
def test_a_tenth_of_a_network_has_all_its_layers_and_trains(build, criterion):
    keras.utils.set_random_seed(0)
    model, x = build(), np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    y = np.arange(32, dtype="int32") % 2
    x[y == 1] += 0.5  # brighter images
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=5, verbose=0)
    scores = keras_taylor.score(model, (x, y), criterion=criterion)
    plan = keras_taylor.make_plan(model, scores, 0.9)
    even = widths_left(
        keras_taylor.make_plan(model, scores, 0.9, selection=keras_taylor.Selection(scope="layer")), model
    )
    assert all(num >= even[name] / 2 for name, num in widths_left(plan, model).items())
    small = keras_taylor.prune(model, plan)
    small.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = small.fit(x, y, epochs=15, batch_size=32, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "zero_pad_shortcut", "separable"])
@pytest.mark.parametrize(("rank", "balance"), [("score", 0.5), ("cost", 0), ("cost", 1)])
def test_what_can_be_reached_stays_in_reach(name, rank, balance):
    model = case(name).model
    goal = helpers.reachable(model) - 1e-6
    plan = plan_for(model, goal, rank=rank, balance=balance)
    assert plan.after["params"] <= (1 - goal) * plan.before["params"]


def lopsided():
    """A network in which units of "dear" save far more than those of "cheap" and "large"."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, name="cheap")(x)
    x = keras.layers.Conv2D(8, 1, name="dear")(x)  # its units are read by a large layer
    x = keras.layers.Dense(200, name="large")(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def test_a_unit_that_saves_much_goes_before_one_that_saves_little():
    model = lopsided()
    scores = {"cheap": np.full(8, 1.0), "dear": np.full(8, 1.5), "large": np.full(200, 50.0)}
    by_score, by_cost = (plan_for(model, 0.2, scores, rank=rank, balance=0) for rank in ("score", "cost"))
    assert len(by_score.layers["cheap"].kept) == 1
    assert set(by_cost.layers) == {"dear"}
    assert by_cost.after["params"] <= 0.8 * by_cost.before["params"]


@pytest.mark.parametrize(
    ("criterion", "rank"),
    [
        *(
            (name, "cost")
            for name in ("taylor", "taylor_batch", "taylor_abs", "taylor2", "log_odds", "oracle")
        ),
        *((name, "score") for name in ("magnitude", "random", "fisher", "sensitivity")),
        (keras_taylor.scores.criteria.magnitude, "score"),
    ],
)
def test_scores_know_how_they_are_ranked(criterion, rank):
    model = lopsided()
    values = {"cheap": np.full(8, 1.0), "dear": np.full(8, 1.5), "large": np.full(200, 50.0)}
    plans = {how: plan_for(model, 0.2, values, rank=how) for how in ("score", "cost")}
    assert plans["score"] != plans["cost"]
    assert plan_for(model, 0.2, keras_taylor.scores.criteria.Scores(values, criterion)) == plans[rank]
    assert plan_for(model, 0.2, values) == plans["score"]


def test_scores_know_their_criterion():
    for criterion in ("magnitude", keras_taylor.scores.criteria.magnitude):
        assert keras_taylor.score(stack(4, 4), criterion=criterion).criterion == criterion


def best_sum(model, scores, goal):
    """The least sum of scores that meets a goal, by trying how many units go of each group."""
    channels = label_model(model)
    costs = CostModel(channels)
    ceilings = {what: (1 - share) * costs()[what] for what, share in goal.items()}
    ranked = [np.sort(scores[group.name]) for group in channels.groups]
    found = []
    for gone in itertools.product(*(range(group.num_units) for group in channels.groups)):
        left = costs.group_costs(costs.units_per_group() - np.array(gone))
        if all(left[what] <= ceiling for what, ceiling in ceilings.items()):
            found.append(sum(values[:num].sum() for values, num in zip(ranked, gone, strict=True)))
    return min(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("goal", [{"params": 0.5}, {"flops": 0.4}, {"params": 0.5, "flops": 0.5}])
def test_ranking_by_cost_loses_little_more_than_the_best_choice(goal, seed):
    model = stack(9, 12, 7)
    scores = random_scores(model, seed)
    plan = plan_for(model, goal, scores, rank="cost")
    channels = label_model(model)
    flat = np.concatenate([scores[g.name] for g in channels.groups])
    lost = flat[~kept_units(channels, plan)].sum()
    assert all(plan.after[what] <= (1 - share) * plan.before[what] for what, share in goal.items())
    assert best_sum(model, scores, goal) <= lost <= 1.25 * best_sum(model, scores, goal)


def test_few_units_stand_for_many_in_the_linear_program(monkeypatch):
    model, goal = stack(9, 12, 7), {"params": 0.5, "flops": 0.5}
    scores = random_scores(model)
    monkeypatch.setattr(ranking, "MOST_VARIABLES", 7)
    plan = plan_for(model, goal, scores, rank="cost")
    channels = label_model(model)
    lost = np.concatenate([scores[g.name] for g in channels.groups])[~kept_units(channels, plan)].sum()
    assert lost <= 1.25 * best_sum(model, scores, goal)


def test_units_that_harm_go_first_whatever_they_save():
    model = stack(8, 8)
    scores = {"conv0": np.linspace(0.1, 1, 8), "conv1": np.r_[np.full(2, -1.0), np.full(6, 50.0)]}
    plan = plan_for(model, 0.4, scores, rank="cost")
    assert set(range(8)) - set(plan.layers["conv1"].kept) == {0, 1}


def test_memory_is_saved_where_the_most_is_alive():
    x = inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", name="wide")(x)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="narrow")(x)
    model = zoo.classified(inputs, x)
    scores = {"wide": np.full(8, 2.0), "narrow": np.full(8, 1.0)}
    goal = {"activation_memory": 0.2}
    assert set(plan_for(model, goal, scores, rank="cost").layers) == {"wide"}


@pytest.mark.parametrize("what", ["params", "flops", "activation_memory"])
@pytest.mark.parametrize("name", ["chain", "residual", "vit_parts"])
def test_the_gradient_is_the_derivative_of_the_cost(name, what):
    model = case(name).model
    costs = CostModel(label_model(model))
    counts = costs.units_per_group().astype(float)
    step = 1e-3
    for group, slope in enumerate(costs.group_costs.gradient(counts, what)):
        less = counts - step * (np.arange(counts.size) == group)
        difference = _exact(costs, counts, what) - _exact(costs, less, what)
        assert slope == pytest.approx(difference / step, rel=1e-2, abs=1e-6)


def _exact(costs, counts, what):
    """Costs of broken numbers of channels, scaled so that rounding does not show."""
    scaled = costs.group_costs
    if what == "activation_memory":
        memory = tuple(b._replace(bytes_per_channel=1e6 * b.bytes_per_channel) for b in scaled.memory)
        return type(scaled)(scaled.widths, {}, memory, scaled.num_groups)(counts)[what] / 1e6
    terms = {what: tuple(term._replace(factor=1e6 * term.factor) for term in scaled.terms[what])}
    return type(scaled)(scaled.widths, terms, scaled.memory, scaled.num_groups)(counts)[what] / 1e6


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"scope": "block"}, "Expected one of 'global', 'layer'. Received: scope='block'"),
        ({"rank": "price"}, "Expected one of 'score', 'cost'. Received: rank='price'"),
        *(
            (
                {"balance": value},
                "`balance` is the share of an even cut's channels that every group keeps. Expected a number "
                f"from 0 to 1. Received: balance={value!r}",
            )
            for value in (-0.1, 1.1, True, "0.5", None)
        ),
    ],
)
def test_choices_that_are_none_are_refused(choice, message):
    assert message_of(plan_for, stack(4, 4), **choice) == message
