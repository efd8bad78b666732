"""Plans as values: edited, compared, merged, saved, replayed, and refused by other models."""

import json

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import case, random_scores

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.plan import LayerPlan, Plan
from keras_taylor.plans.planning import kept_units, plan_of
from keras_taylor.reading.groups import label_model

pytestmark = pytest.mark.once


def message_of(function, *args, **kwargs):
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    return str(error.value)


def ranked_plan(model, goal=0.2, seed=0):
    return keras_taylor.make_plan(model, random_scores(model, seed), goal)


def chain(widths=(6, 8), names=("conv1", "conv2"), kernel=3, seed=0):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((8, 8, 3))
    for width, name in zip(widths, names, strict=True):
        x = keras.layers.Conv2D(width, kernel, padding="same", name=name)(x)
    return zoo.classified(inputs, x)


@pytest.mark.parametrize("name", helpers.NAMES)
def test_costs_are_the_same_without_the_model(name):
    model, exact = case(name).model, case(name).plan.exact
    channels = label_model(model, exact=exact)
    costs = CostModel(channels)
    structure = Plan.from_json(case(name).plan.to_json()).structure
    random = np.random.default_rng(0)
    for share in (0.2, 0.5, 0.8):
        kept = random.random(channels.num_units) < share
        assert structure.costs_of_mask(kept) == costs(kept)
        np.testing.assert_array_equal(structure.mask_of_channels(structure.channels_of_mask(kept)), kept)


@pytest.mark.parametrize("name", ["chain", "residual", "grouped", "zero_pad_shortcut", "siamese"])
def test_every_layer_can_keep_one_unit_less(name):
    model = case(name).model
    channels = label_model(model)
    flat = np.random.default_rng(0).random(channels.num_units)
    plan = plan_of(channels, CostModel(channels), np.ones(channels.num_units, bool), flat)
    for layer, units in plan.structure.layer_units.items():
        own = sorted({unit for unit in units if unit >= 0}, key=lambda unit: flat[unit])
        group_of = np.repeat(np.arange(len(channels.groups)), [g.num_units for g in channels.groups])
        if not own or np.bincount(group_of[own])[group_of[own[0]]] == 1:
            continue
        num = len(units) - units.count(own[0])
        edited = plan.keep(layer, num)
        expected = np.ones(channels.num_units, bool)
        expected[own[0]] = False
        np.testing.assert_array_equal(kept_units(channels, edited), expected)
        assert edited.after == CostModel(channels)(expected)
        assert len(edited.layers[layer].kept) == num
        assert keras_taylor.prune(model, edited).count_params() == edited.after["params"]


def test_the_most_important_channels_are_kept_of_all_layers_that_live_together():
    model = case("residual").model
    scores = {"stem": np.array([5, 0, 3, 1, 4, 2.0]), "block0_a": np.arange(5.0)}
    plan = keras_taylor.make_plan(model, scores, {"params": 10**6})
    assert plan.layers == {}
    edited = plan.keep("block1_b", 2)
    assert set(edited.layers) == {"stem", "block0_b", "block1_b"}
    assert {layer.kept for layer in edited.layers.values()} == {(0, 4)}
    assert plan.layers == {}, "the plan itself stays"
    assert edited.keep("stem", 3).layers["block0_b"].kept == (0, 2, 4)
    assert edited.keep("stem", 6).layers == {}
    again = edited.keep("stem", (5, 1)).keep("block0_a", np.int64(4))
    assert again.layers["block0_b"].kept == (1, 5)
    assert again.layers["block0_a"].kept == (1, 2, 3, 4)
    small = keras_taylor.prune(model, again)
    assert small.count_params() == again.after["params"]
    kernel, before = (m.get_layer("stem").get_weights()[0] for m in (small, model))
    np.testing.assert_array_equal(kernel, before[..., [1, 5]])


def test_a_plan_can_be_edited_after_it_was_saved(tmp_path):
    plan = ranked_plan(case("chain").model)
    plan.save(tmp_path / "plan.json")
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.structure == plan.structure
    assert again.keep("conv2", 3) == plan.keep("conv2", 3) != plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plans_of_older_versions_load_but_cannot_be_edited():
    plan = ranked_plan(case("chain").model)
    content = json.loads(plan.to_json())
    del content["structure"]
    old = Plan.from_json(json.dumps(content))
    assert old == plan
    assert keras_taylor.prune(case("chain").model, old).count_params() == plan.after["params"]
    assert message_of(old.keep, "conv1", 3) == (
        "The plan does not know the structure of its model: it was made by hand, or by an older version. "
        "Make it with `make_plan`, which notes the structure. Received: plan with "
        f"{len(plan.layers)} layers and structure=None"
    )


@pytest.mark.parametrize(
    ("name", "layer", "channels", "message"),
    [
        (
            *("chain", "conv3", 2),
            "The plan's model has no such layer that makes channels. Expected one of conv1, conv2, head. "
            "Received: layer='conv3'",
        ),
        *(
            (
                *("chain", "conv1", number),
                "Expected the number of channels that layer 'conv1' keeps, from 1 to 6, or their indices. "
                f"Received: channels={number!r}",
            )
            for number in (0, 7, -1, 2.0, True, "3", None)
        ),
        *(
            (
                *("chain", "conv1", [0, index]),
                "Layer 'conv1' has channels from 0 to 5. Expected such indices. "
                f"Received: {index!r} among the channels",
            )
            for index in (6, -1, 1.5, True)
        ),
        (
            *("chain", "conv1", []),
            "No channel of 'conv1' would be left. Expected at least one. Received: channels=[]",
        ),
        (
            *("chain", "head", [0, 1]),
            "Channel 2 of layer 'head' cannot leave, or leaves only together with a channel that is kept. "
            "Expected it among the channels. Received: channels=[0, 1]",
        ),
        (
            *("chain", "head", 2),
            "None of the 3 channels of layer 'head' can leave. `print(keras_taylor.analyze(model))` says "
            "why. Received: channels=2",
        ),
    ],
)
def test_edits_that_make_no_sense_are_refused(name, layer, channels, message):
    assert message_of(ranked_plan(case(name).model).keep, layer, channels) == message


def test_channels_that_leave_together_are_kept_together():
    plan = ranked_plan(case("grouped").model, 0.02)
    assert plan.structure.layer_units["conv1"] == (0, 1, 2, 3) * 4
    assert message_of(plan.keep, "conv1", 10) == (
        "Layer 'conv1' of 16 channels cannot keep 10: its channels leave in whole units, and one unit of "
        "each group stays. Expected 8 or 12, for example. Received: channels=10"
    )
    assert len(plan.keep("conv1", 8).layers["conv1"].kept) == 8
    assert "Channel 4 of layer 'conv1' cannot leave, or" in message_of(plan.keep, "conv1", [0, 8, 12])
    assert plan.keep("conv1", [0, 4, 8, 12]).layers["conv1"].kept == (0, 4, 8, 12)


def test_a_layer_of_several_groups_keeps_one_unit_of_each():
    plan = ranked_plan(case("split_and_slice").model, 0.05)
    assert plan.structure.layer_units["conv1"] == (0, 1, 2, 0, 1, 2, 3, 4, 5)
    assert list(plan.structure.group_sizes.values())[:3] == [3, 2, 1]
    kept = plan.keep("conv1", 4).layers["conv1"].kept
    assert [sum(one in part for one in kept) for part in (range(6), (6, 7), (8,))] == [2, 1, 1]
    assert "No channel of 'conv1#2' would be left" in message_of(plan.keep, "conv1", range(6))


def test_a_number_needs_scores_and_indices_do_not():
    plan = keras_taylor.make_plan(case("chain").model, {"conv2": np.arange(8.0)}, 0.2)
    assert message_of(plan.keep, "conv1", 3) == (
        "The plan does not know which channels of layer 'conv1' matter most: they had no scores. Expected "
        "indices instead of a number. Received: channels=3"
    )
    assert plan.keep("conv1", range(3)).layers["conv1"] == LayerPlan(6, (0, 1, 2))


def test_a_difference_tells_channels_and_costs():
    model = case("chain").model
    plan = keras_taylor.make_plan(model, random_scores(model), {"params": 10**6})
    first, second = plan.keep("conv1", [0, 1, 2, 3]), plan.keep("conv1", [1, 2, 5]).keep("conv2", range(7))
    difference = first - second
    assert difference.layers["conv1"].first_only == (0, 3)
    assert difference.layers["conv1"].second_only == (5,)
    assert (difference.layers["conv1"].first, difference.layers["conv1"].second) == (4, 3)
    assert (difference.layers["conv2"].first, difference.layers["conv2"].second) == (8, 7)
    params = first.after["params"] - second.after["params"]
    assert params > 0
    assert difference.costs["params"] == params
    text = str(difference)
    assert text.startswith(f"first - second: params {params:+,}, flops +")
    assert "│ conv1 │ 6        │           4 │            3 │ 0, 3       │ 5           │" in text
    assert "│ conv2 │ 8        │           8 │            7 │ 7          │             │" in text
    assert difference and not first - first
    assert str(first - first) == "The plans keep the same channels."


def test_many_channels_are_shortened_in_a_difference():
    model = chain((30, 4))
    plan = keras_taylor.make_plan(model, random_scores(model), {"params": 10**6})
    text = str(plan - plan.keep("conv1", range(20, 30)))
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in " ".join(text.replace("│", " ").split())


def test_a_merged_plan_removes_what_either_removes():
    model = case("chain").model
    plan = keras_taylor.make_plan(model, random_scores(model), {"params": 10**6})
    first, second = plan.keep("conv1", [0, 1, 2, 3]), plan.keep("conv1", [1, 2, 5]).keep("conv2", [0, 6])
    merged = first | second
    assert merged.layers == {"conv1": LayerPlan(6, (1, 2)), "conv2": LayerPlan(8, (0, 6))}
    assert merged == second | first == plan.keep("conv1", [1, 2]).keep("conv2", [0, 6])
    assert keras_taylor.prune(model, merged).count_params() == merged.after["params"]
    by_hand = Plan({"conv1": LayerPlan(6, (4, 5))}) | Plan({"conv1": LayerPlan(6, (0, 5))})
    assert by_hand == Plan({"conv1": LayerPlan(6, (5,))})


def test_plans_that_leave_nothing_together_are_refused():
    first, second = (Plan({"conv1": LayerPlan(6, kept)}) for kept in ((0, 1), (2,)))
    assert message_of(lambda: first | second) == (
        "Together the plans leave no channel of layer 'conv1'. Expected plans that both keep at least one "
        "channel. Received: LayerPlan(width=6, kept=(0, 1)) | LayerPlan(width=6, kept=(2,))"
    )


@pytest.mark.parametrize("operation", ["__or__", "__sub__"])
def test_plans_of_different_models_do_not_go_together(operation):
    first, second = (Plan({"conv1": LayerPlan(width, (0, 1))}) for width in (6, 7))
    assert message_of(getattr(first, operation), second) == (
        "The plans are for different models. Expected layers of the same size; 'conv1' has 6 channels in the "
        "first and 7 in the second. Received: plans with 1 and 1 layers"
    )
    assert getattr(first, operation)(3) is NotImplemented


def test_a_plan_replays_on_other_weights_of_the_same_architecture():
    plan, other = ranked_plan(chain()), chain(seed=1)
    small = keras_taylor.prune(other, Plan.from_json(plan.to_json()))
    kept = list(plan.layers["conv1"].kept)
    np.testing.assert_array_equal(
        small.get_layer("conv1").get_weights()[0], other.get_layer("conv1").get_weights()[0][..., kept]
    )


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            {"widths": (6, 9)},
            "Expected as layer 2 of those that make channels: 'conv2' with 8 channels; the model has: "
            "'conv2' with 9 channels",
        ),
        (
            {"widths": (8, 6), "names": ("conv2", "conv1")},
            "Expected as layer 1 of those that make channels: 'conv1' with 6 channels; the model has: "
            "'conv2' with 8 channels",
        ),
        (
            {"widths": (6,), "names": ("conv1",)},
            "Expected as layer 2 of those that make channels: 'conv2' with 8 channels; the model has: "
            "'head' with 3 channels",
        ),
        (
            {"widths": (6, 8, 2), "names": ("conv1", "conv2", "conv3")},
            "Expected as layer 3 of those that make channels: 'head' with 3 channels; the model has: "
            "'conv3' with 2 channels",
        ),
        ({"kernel": 1}, "Expected 635 parameters in layers of these widths; the model has: 107"),
    ],
)
def test_another_architecture_is_refused_with_the_first_difference(other, difference):
    plan = ranked_plan(chain())
    assert message_of(keras_taylor.prune, chain(**other), plan) == (
        f"The plan was made for another model. {difference}. "
        f"Received: plan=<Plan of {len(plan.layers)} layers>"
    )


def test_composed_plans_can_be_edited():
    model = case("chain").model
    first = ranked_plan(model, 0.2)
    small = keras_taylor.prune(model, first)
    second = ranked_plan(small, 0.2, seed=1)
    plan = Plan().compose(first).compose(second)
    channels = label_model(model)
    assert plan.structure.layer_units == first.structure.layer_units
    assert sorted(plan.structure.removal_order) == list(range(channels.num_units))
    left = kept_units(channels, plan)
    gone = [unit for unit in plan.structure.removal_order if not left[unit]]
    assert gone == list(plan.structure.removal_order[: len(gone)]), "what went is what goes first"
    for layer, width in (("conv1", 6), ("conv2", 8)):
        kept = len(plan.layers[layer].kept) if layer in plan.layers else width
        assert plan.keep(layer, kept) == plan
        assert plan.keep(layer, width).layers.get(layer) is None
