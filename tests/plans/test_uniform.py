"""Groups that are tied in number lose equally many units."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_taylor


def blocks(widths=(12, 12, 12), others=10):
    """Blocks with hidden layers, and a layer of another role."""
    x = inputs = keras.Input((6,))
    x = layers.Dense(others, activation="relu", name="first")(x)
    for number, width in enumerate(widths):
        hidden = layers.Dense(width, activation="relu", name=f"block{number}_hidden")(x)
        x = layers.Dense(7, activation="relu", name=f"out_{number}")(hidden)
    model = keras.Model(inputs, layers.Dense(2, name="end")(x))
    random = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(random.normal(size=weight.shape))
    return model


def plan_for(model, goal=0.4, **selection):
    scores = keras_taylor.score(model, criterion="magnitude")
    return keras_taylor.make_plan(model, scores, goal, selection=keras_taylor.Selection(**selection))


def widths(model, names):
    return [model.get_layer(name).units for name in names]


HIDDEN = [f"block{number}_hidden" for number in range(3)]


@pytest.mark.parametrize("rank", ["score", "cost"])
@pytest.mark.parametrize("uniform", [True, ".*_hidden", [".*_hidden", "out_.*"]], ids=str)
def test_tied_groups_stay_equally_wide_and_the_goal_holds(uniform, rank):
    model = blocks()
    free = keras_taylor.prune(model, plan_for(model, uniform=False, rank=rank))
    assert len(set(widths(free, HIDDEN))) > 1
    plan = plan_for(model, uniform=uniform, rank=rank)
    small = keras_taylor.prune(model, plan)
    assert len(set(widths(small, HIDDEN))) == 1 and widths(small, HIDDEN)[0] < 12
    if uniform != ".*_hidden":
        assert len(set(widths(small, ["out_0", "out_1", "out_2"]))) == 1
    assert plan.after["params"] == small.count_params() <= 0.6 * model.count_params()
    assert small.count_params() > 0.4 * model.count_params()  # one step more at most


def test_the_least_important_units_of_each_group_leave():
    model = blocks()
    scores = keras_taylor.score(model, criterion="magnitude")
    plan = keras_taylor.make_plan(model, scores, 0.4, selection=keras_taylor.Selection(uniform=True))
    for name in HIDDEN:
        num = len(plan.layers[name].kept)
        assert set(plan.layers[name].kept) == set(np.argsort(-scores[name])[:num].tolist())


def test_a_uniform_plan_survives_files_and_composition(tmp_path):
    model = blocks()
    first = plan_for(model, 0.2, uniform=True)
    first.save(tmp_path / "plan.json")
    assert keras_taylor.Plan.load(tmp_path / "plan.json") == first
    small = keras_taylor.prune(model, first)
    second = plan_for(small, 0.2, uniform=True)
    both = keras_taylor.prune(model, first.compose(second))
    assert widths(both, HIDDEN) == widths(keras_taylor.prune(small, second), HIDDEN)
    assert len(set(widths(both, HIDDEN))) == 1


def test_an_edited_plan_keeps_to_ties(tmp_path):
    model = blocks()
    plan_for(model, 0.2, uniform=True).save(tmp_path / "plan.json")
    plan = keras_taylor.Plan.load(tmp_path / "plan.json")
    for edited in (plan.keep("block0_hidden", 5), plan.keep("block1_hidden", range(5))):
        small = keras_taylor.prune(model, edited)
        assert widths(small, HIDDEN) == [5, 5, 5] and small.count_params() == edited.after["params"]
    assert plan.keep("block1_hidden", range(5)).layers["block1_hidden"].kept == (0, 1, 2, 3, 4)
    assert plan.keep("block0_hidden", 12).layers.keys().isdisjoint(HIDDEN)
    free = plan_for(model, 0.2).keep("block0_hidden", 5)
    assert len(free.layers["block0_hidden"].kept) == 5 != len(free.layers["block1_hidden"].kept)


def test_an_edit_that_would_empty_a_tied_layer_is_refused():
    plan = plan_for(blocks((12, 6, 12)), 0.1, uniform=".*_hidden")
    with pytest.raises(ValueError, match=r"The 6 units of 'block1_hidden' .* has to stay.* 7 of these"):
        plan.keep("block0_hidden", 5)


def test_rounds_and_wrappers_keep_to_ties():
    model = blocks()
    model.compile("adam", "mse")
    data = np.random.default_rng(1).normal(size=(64, 6)), np.zeros((64, 2))
    selection = keras_taylor.Selection(uniform=True)
    arguments = {"increment": 0.2, "epochs": 0, "selection": selection, "verbose": 0, "return_info": True}
    small, info = keras_taylor.compress(model, data, 0.4, **arguments)
    assert len(set(widths(small, HIDDEN))) == 1
    edited = keras_taylor.prune(model, info.plan.keep("block1_hidden", 3))
    assert widths(edited, HIDDEN) == [3, 3, 3]
    prunable = keras_taylor.PrunableModel(model, criterion="magnitude", selection=selection)
    prunable.prune(0.2)
    prunable.prune(0.4)
    assert len(set(widths(prunable.strip(), HIDDEN))) == 1


def test_groups_of_unequal_width_lose_equally_many():
    model = blocks((12, 9, 12))
    small = keras_taylor.prune(model, plan_for(model, 0.3, uniform=".*_hidden"))
    assert len({w - now for w, now in zip((12, 9, 12), widths(small, HIDDEN), strict=True)}) == 1


def test_floors_and_ratios_hold_for_all_of_a_tie():
    model = blocks()
    ratios = {"block1_hidden": (0.0, 0.25)}
    small = keras_taylor.prune(model, plan_for(model, 0.2, uniform=True, ratios=ratios))
    assert min(widths(small, HIDDEN)) >= 9 and len(set(widths(small, HIDDEN))) == 1
    least = {"block1_hidden": (0.5, 1.0)}
    small = keras_taylor.prune(model, plan_for(model, 0.05, uniform=True, ratios=least))
    assert max(widths(small, HIDDEN)) <= 6 and len(set(widths(small, HIDDEN))) == 1


def test_ratios_that_contradict_ties_are_refused():
    ratios = {"block0_hidden": 0.5, "block1_hidden": (0.0, 0.25)}
    with pytest.raises(ValueError) as error:
        plan_for(blocks(), 0.2, uniform=True, ratios=ratios)
    assert str(error.value) == (
        "`ratios` contradict `uniform`: 'block0_hidden' and 'block1_hidden' lose equally many units, but at "
        "least 6 of the first and at most 3 of the second may leave. Expected ratios that overlap, or "
        f"`uniform=False`. Received: uniform=True, ratios={ratios!r}"
    )


@pytest.mark.parametrize("uniform", [1, [], [3], {"a": 1}], ids=str)
def test_other_values_are_refused(uniform):
    with pytest.raises(ValueError) as error:
        keras_taylor.Selection(uniform=uniform)
    assert "`uniform` says which groups lose equally many units. Expected `True`, `False`" in str(error.value)
    assert str(error.value).endswith(f"Received: uniform={uniform!r}")


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="`uniform` names a layer that the model does not have"):
        plan_for(blocks(), uniform="nothing")
