"""Plans: goals, floors, rounding, JSON, composition, and what is refused."""

import json
import re

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import case, random_scores

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.plan import LayerPlan
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model

pytestmark = pytest.mark.once


def message_of(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("what", ["params", "flops"])
@pytest.mark.parametrize("goal", [0.05, 0.3, 0.6])
def test_a_goal_is_reached_and_hardly_more(what, goal):
    model = case("chain").model
    scores = random_scores(model)
    plan = keras_taylor.make_plan(model, scores, {what: goal})
    channels = label_model(model)
    costs, kept = CostModel(channels), kept_units(channels, plan)
    ceiling = (1 - goal) * plan.before[what]
    assert plan.after[what] == costs(kept)[what] <= ceiling
    flat = np.concatenate([scores[g.name] for g in channels.groups])
    kept[np.flatnonzero(~kept)[flat[~kept].argmax()]] = True
    assert costs(kept)[what] > ceiling


def test_a_number_is_a_fraction_of_the_parameters():
    model = case("chain").model
    scores = random_scores(model)
    assert keras_taylor.make_plan(model, scores, 0.3) == keras_taylor.make_plan(
        model, scores, {"params": 0.3}
    )


def test_a_whole_number_is_what_may_be_left():
    model = case("chain").model
    scores = random_scores(model)
    plan = keras_taylor.make_plan(model, scores, {"params": 100})
    assert 0 < 100 - plan.after["params"] < 100
    for left in (plan.after["params"], plan.after["params"] + 1):
        assert keras_taylor.make_plan(model, scores, {"params": left}) == plan
    assert keras_taylor.make_plan(model, scores, {"params": plan.before["params"]}).layers == {}


def test_all_parts_of_a_goal_hold():
    model = case("chain").model
    scores = random_scores(model)
    alone = {what: keras_taylor.make_plan(model, scores, {what: 0.4}) for what in ("params", "flops")}
    both = keras_taylor.make_plan(model, scores, {"params": 0.4, "flops": 0.4})
    assert both in alone.values()
    assert all(both.after[what] <= 0.6 * both.before[what] for what in alone)
    easy = {"params": 0.4, "activation_memory": both.before["activation_memory"]}
    assert keras_taylor.make_plan(model, scores, easy) == alone["params"]


def test_the_least_important_units_go():
    model = case("chain").model
    scores = {"conv1": np.arange(6.0), "conv2": 100 - np.arange(8.0)}
    plan = keras_taylor.make_plan(model, scores, 0.3)
    assert set(plan.layers) == {"conv1"}
    assert plan.layers["conv1"] == LayerPlan(6, tuple(range(6 - len(plan.layers["conv1"].kept), 6)))


def test_groups_without_scores_lose_nothing():
    plan = keras_taylor.make_plan(case("chain").model, {"conv2": np.arange(8.0)}, 0.3)
    assert set(plan.layers) == {"conv2"}


def test_all_layers_of_a_group_lose_the_same_channels():
    plan = keras_taylor.make_plan(case("residual").model, {"stem": np.arange(6.0)}, 0.3)
    assert plan.layers["stem"] == plan.layers["block0_b"] == plan.layers["block1_b"]


@pytest.mark.parametrize("floor", [1, 3, 5])
def test_every_group_keeps_the_floor(floor):
    model = case("residual").model
    scores = {"stem": np.zeros(6), "block0_a": np.full(5, 5.0), "block1_a": np.full(5, 9.0)}
    plan = keras_taylor.make_plan(model, scores, 0.1, selection=keras_taylor.Selection(min_channels=floor))
    assert min(len(layer.kept) for layer in plan.layers.values()) >= floor


@pytest.mark.parametrize("multiple", [2, 4])
def test_channels_are_kept_in_multiples(multiple):
    model = case("grouped").model
    plan = keras_taylor.make_plan(
        model, {"conv2": np.arange(6.0)}, 0.03, selection=keras_taylor.Selection(round_to=multiple)
    )
    assert len(plan.layers["conv2"].kept) % multiple == 0
    assert len(plan.layers["conv2"].kept) < 6


def test_a_multiple_that_the_width_is_none_of_never_adds_channels():
    plan = keras_taylor.make_plan(
        case("chain").model,
        random_scores(case("chain").model),
        0.2,
        selection=keras_taylor.Selection(round_to=4),
    )
    assert all(len(layer.kept) % 4 == 0 and len(layer.kept) < layer.width for layer in plan.layers.values())


def test_excluded_layers_lose_nothing():
    model = case("residual").model
    scores = random_scores(model)
    for choice in ({"exclude": "block._a"}, {"include": ["stem", "block0_b", "block1_b"]}):
        scores_left = {"stem": scores["stem"]}
        plan = keras_taylor.make_plan(model, scores_left, 0.3, **choice)
        assert set(plan.layers) == {"stem", "block0_b", "block1_b"}


@pytest.mark.parametrize(
    "goal",
    [
        *(0, 1, 1.2, -1, "30%", {"speed": 0.3}, {"params": 0.3, "flops": 1.5}, {"params": 0}, {}),
        *({"params": True}, True, None, float("nan")),
    ],
)
def test_what_is_no_goal_is_refused(goal):
    model = case("chain").model
    assert message_of(keras_taylor.make_plan, model, random_scores(model), goal) == (
        "`goal` says how much to remove. Expected a number above 0 and below 1 (0.3 removes 30 % of the "
        "parameters), or a dict of one or more of 'params', 'flops', 'activation_memory', each with such a "
        'fraction to remove, or with a whole number that may be left, as {"params": 200_000}. '
        "`keras_taylor.compress` also takes 'bytes', 'latency', or one of these with a format (saved-model, "
        "litert, litert-float16, litert-dynamic, litert-int8, onnx, keras) as in 'bytes:litert-int8'. "
        f"Received: goal={goal!r}"
    )


def test_a_goal_out_of_reach_is_refused_with_the_largest_one():
    model = case("chain").model
    channels = label_model(model)
    kept = np.zeros(14, bool)
    kept[[0, 6]] = True
    least = CostModel(channels)(kept)["params"]
    largest = f"{1 - least / model.count_params():.1%}"
    assert message_of(keras_taylor.make_plan, model, random_scores(model), 0.99) == (
        f"The goal is out of reach: at most {largest} of the {model.count_params()} params can be removed, "
        f"which leaves {least}. It is blocked by 'head' (3 channels: the model's output; 6 parameters). "
        "Lower the goal, or let more channels leave (`include`, `exclude`, `round_to`, `min_channels`). "
        "Received: goal=0.99"
    )
    held = keras_taylor.Selection(min_channels=4, round_to=2)
    assert "It is blocked by `round_to=2`; `min_channels=4`; 'head' (3 channels: " in message_of(
        keras_taylor.make_plan, model, random_scores(model), 0.9, selection=held
    )
    words = "5 is what may be left; to remove 5 % pass {'params': 0.05}. Received: goal={'params': 5}"
    assert message_of(keras_taylor.make_plan, model, random_scores(model), {"params": 5}).endswith(words)
    reached = float(largest[:-1]) / 100 - 1e-3
    assert keras_taylor.make_plan(model, random_scores(model), reached).after["params"] == least


def test_what_blocks_most_is_named_with_the_parameters_that_it_holds():
    x = inputs = keras.Input((7, 7, 3))
    for name, width in (("small", 4), ("large", 30), ("middle", 10)):
        x = keras.layers.Conv2D(width, 3, name=name)(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(keras.layers.Flatten()(x)))
    text = message_of(keras_taylor.make_plan, model, {}, 0.9, exclude=["large", "middle"])
    made, read = 3 * 3 * 30 + 30, 3 * 3 * 30 * 10  # by "large": "small" keeps its four without scores
    assert (
        f"'large' (30 channels: excluded by the caller; {made + 3 * 3 * 3 * 30 + read:,} parameters)" in text
    )
    assert text.index("'large'") < text.index("'middle'") < text.index("'head'")


def test_the_largest_goal_counts_the_floor():
    model = case("chain").model
    text = message_of(
        keras_taylor.make_plan,
        model,
        random_scores(model),
        0.9,
        selection=keras_taylor.Selection(min_channels=5),
    )
    channels = label_model(model)
    kept = np.zeros(14, bool)
    kept[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10]] = True
    least = CostModel(channels)(kept)["params"]
    assert f"at most {1 - least / model.count_params():.1%} of" in text


def test_a_model_with_nothing_to_prune_is_refused():
    model = case("unknown_layer").model
    assert message_of(keras_taylor.make_plan, model, {}, 0.3, exclude=".*").endswith("Received: goal=0.3")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("name", ["round_to", "min_channels"])
def test_numbers_of_channels_are_whole(name, value):
    assert message_of(keras_taylor.Selection, **{name: value}) == (
        f"`{name}` is a number of channels. Expected a whole number from 1 on. Received: {name}={value!r}"
    )


@pytest.mark.parametrize(
    ("scores", "end"),
    [
        (
            {"conv9": np.ones(6)},
            "'conv9'. Expected one of its groups that are prunable with these `include`, `exclude` and "
            "`exact`. Received: scores['conv9'] of shape (6,)",
        ),
        (
            {"conv1": np.ones(5)},
            "'conv1'. Expected shape (6,), no NaN. Received: scores['conv1'] of shape (5,)",
        ),
        (
            {"conv1": np.full(6, np.nan)},
            "'conv1'. Expected shape (6,), no NaN. Received: scores['conv1'] of shape (6,)",
        ),
    ],
)
def test_scores_of_another_model_are_refused(scores, end):
    text = message_of(keras_taylor.make_plan, case("chain").model, scores, 0.3)
    assert text == "The scores do not fit the model at " + end


def test_flops_are_refused_where_the_size_is_unknown():
    import keras

    x = inputs = keras.Input((None, None, 3))
    model = zoo.classified(inputs, zoo.conv(x, 6, "conv1"))
    assert message_of(keras_taylor.make_plan, model, random_scores(model), {"flops": 0.3}) == (
        "FLOPs are unknown because the model's input has axes of unknown size. Expected a model made with a "
        "fixed input shape, or parameters in their place. Received: goal={'flops': 0.3}"
    )
    assert keras_taylor.make_plan(model, random_scores(model), 0.3).after["flops"] is None


@pytest.mark.parametrize("name", ["chain", "zero_pad_shortcut", "siamese"])
def test_json_round_trip(name):
    plan = case(name).plan
    again = keras_taylor.Plan.from_json(plan.to_json())
    assert again == plan
    assert str(again) == str(plan)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 9, "layers": {}}', '{"format": 1, "layers": {"a": 1}}']
)
def test_what_is_no_plan_is_refused(text):
    message = message_of(keras_taylor.Plan.from_json, text)
    assert message.startswith("The text is not a plan that `Plan.to_json` wrote (")
    assert message.endswith(f"Received: text={text!r}")


def test_a_plan_prints_as_a_table():
    plan = case("chain").plan
    text = str(plan)
    reduction = 1 - plan.after["params"] / plan.before["params"]
    assert f"params {plan.before['params']:,} -> {plan.after['params']:,} ({reduction:.1%} less)" in text
    for name, layer in plan.layers.items():
        assert re.search(rf"{name}\W+{layer.width}\W+{len(layer.kept)}\W", text)


def test_a_plan_is_frozen():
    with pytest.raises(AttributeError):
        case("chain").plan.layers = {}


def test_a_plan_can_be_edited_by_hand():
    model = case("chain").model
    content = json.loads(keras_taylor.Plan().to_json())
    content["layers"]["conv1"] = {"width": 6, "kept": [5, 0, 2]}
    small = keras_taylor.prune(model, keras_taylor.Plan.from_json(json.dumps(content)))
    kernel, before = (m.get_layer("conv1").get_weights()[0] for m in (small, model))
    np.testing.assert_array_equal(kernel, before[..., [0, 2, 5]])
    np.testing.assert_array_equal(
        small.get_layer("conv2").get_weights()[0], model.get_layer("conv2").get_weights()[0][:, :, [0, 2, 5]]
    )


def test_composed_plans_speak_of_the_original():
    first = keras_taylor.Plan({"a": LayerPlan(6, (0, 2, 5)), "b": LayerPlan(4, (1, 3))}, {"params": 100})
    second = keras_taylor.Plan(
        {"a": LayerPlan(3, (1, 2)), "c": LayerPlan(2, (0,))}, {"params": 60}, {"params": 40}
    )
    assert first.compose(second) == keras_taylor.Plan(
        {"a": LayerPlan(6, (2, 5)), "b": LayerPlan(4, (1, 3)), "c": LayerPlan(2, (0,))},
        {"params": 100},
        {"params": 40},
    )


def test_composed_plans_name_layers_in_the_order_of_the_network():
    model = zoo.chain()
    scores = keras_taylor.score(model, criterion="magnitude")
    late = keras_taylor.make_plan(model, scores, selection=keras_taylor.Selection(ratios={"conv2": 0.5}))
    small = keras_taylor.prune(model, late)
    scores = keras_taylor.score(small, criterion="magnitude")
    early = keras_taylor.make_plan(small, scores, selection=keras_taylor.Selection(ratios={"conv1": 0.5}))
    assert list(late.compose(early).layers) == ["conv1", "conv2"]


def test_plans_that_do_not_follow_each_other_are_refused():
    first = keras_taylor.Plan({"a": LayerPlan(6, (0, 2, 5))})
    second = keras_taylor.Plan({"a": LayerPlan(6, (0,))})
    assert message_of(first.compose, second) == (
        "The plans do not follow each other at layer 'a': the first keeps 3 channels, the second was made "
        "for 6. Received: later=LayerPlan(width=6, kept=(0,))"
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"conv9": LayerPlan(6, (0,))},
            "The plan was made for another model. Expected at layer 'conv9': 6 channels; the model has: no "
            "such layer. Received: plan.layers['conv9']",
        ),
        (
            {"stem": LayerPlan(7, (0,))},
            "The plan was made for another model. Expected at layer 'stem': 7 channels; the model has: 6. "
            "Received: plan.layers['stem']",
        ),
        (
            {"head": LayerPlan(3, (0, 2))},
            "The plan removes channels of layer 'head' that cannot leave. Received: plan.layers['head'], "
            "channel 1",
        ),
        (
            {"stem": LayerPlan(6, (0, 2, 3, 4, 5))},
            "The plan is not consistent: channel 1 of layer 'block0_b' leaves only together with channels of "
            "other layers, and the plan treats them differently. Received: plan.layers['block0_b']",
        ),
        (
            {"block0_a": LayerPlan(5, ())},
            "The plan keeps no channel of layer 'block0_a'. Received: plan.layers['block0_a']",
        ),
        (
            {"block0_a": LayerPlan(5, (0, 7))},
            "The plan keeps a channel that layer 'block0_a' does not have. Expected indices from 0 to 4. "
            "Received: plan.layers['block0_a'] with kept index 7",
        ),
        (
            {"block0_a": LayerPlan(5, (0, -1))},
            "The plan keeps a channel that layer 'block0_a' does not have. Expected indices from 0 to 4. "
            "Received: plan.layers['block0_a'] with kept index -1",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(layers, message):
    assert message_of(keras_taylor.prune, case("residual").model, keras_taylor.Plan(layers)) == message


def test_a_plan_keeps_what_it_was_made_of():
    plan = helpers.random_plan(case("chain").model)
    assert set(plan.before) == set(plan.after) == {"params", "flops", "activation_memory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"round_to": 8},
            "`round_to` is part of `selection` now: "
            "keras_taylor.make_plan(..., selection=keras_taylor.Selection(round_to=8))",
        ),
        (
            {
                "ratios": {"conv1": (0.1, 0.5)},
                "scope": "layer",
                "rank": None,
                "balance": 0,
                "min_channels": 2,
            },
            "`ratios`, `scope`, `rank`, `balance`, `min_channels` are part of `selection` now: "
            "keras_taylor.make_plan(..., selection=keras_taylor.Selection(ratios={'conv1': (0.1, 0.5)}, "
            "scope='layer', rank=None, balance=0, min_channels=2))",
        ),
        ({"speed": 2}, "make_plan() got an unexpected keyword argument 'speed'"),
    ],
)
def test_arguments_that_moved_into_the_selection_are_refused(arguments, message):
    model = case("chain").model
    with pytest.raises(TypeError) as error:
        keras_taylor.make_plan(model, random_scores(model), 0.2, **arguments)
    assert str(error.value) == message


def test_a_selection_of_another_type_is_refused():
    model = case("chain").model
    with pytest.raises(TypeError) as error:
        keras_taylor.make_plan(model, random_scores(model), 0.2, selection={"round_to": 8})
    assert str(error.value) == (
        "`selection` says how channels are selected. Expected a `keras_taylor.Selection`. "
        "Received: selection={'round_to': 8}"
    )


def test_auto_needs_times():
    selection = keras_taylor.Selection(round_to="auto")
    model = case("chain").model
    text = message_of(keras_taylor.make_plan, model, random_scores(model), 0.2, selection=selection)
    assert text == (
        "`round_to` is found by timing layers, which only `compress` with a goal for a latency does. "
        "Expected a whole number from 1 on. Received: round_to='auto'"
    )


@pytest.mark.parametrize("ratios", [0.5, ["conv1"], "conv1"])
def test_ratios_are_a_dict(ratios):
    assert message_of(keras_taylor.Selection, ratios=ratios) == (
        "`ratios` says how much of single layers leaves. Expected a dict from layer names to fractions. "
        f"Received: ratios={ratios!r}"
    )
