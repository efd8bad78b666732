"""Whole residual branches leave: the laws, what cannot leave, and repair."""

import functools

import keras
import numpy as np
import pytest
import zoo
from helpers import EAGER, fingerprint, predict, relative_difference, targets_of
from keras import layers, ops

import keras_taylor
from keras_taylor.budget.cost_predictions import WeightBytes
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.plan import LayerPlan, Plan
from keras_taylor.plans.planning import kept_units, label_as_planned, plan_of
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel

WITH_BRANCHES = keras_taylor.Selection(branches=True)
# ResNet, MobileNetV2, nested, transformers, ViT, Swin; sub-models and opened layers that are called twice;
# closed decoders that are branches themselves
RESIDUAL = (
    "residual",
    "inverted_residual",
    "nested_sequential",
    "causal_transformer",
    "vit_parts",
    "swin",
    "composite_layers",
    "output_in_the_middle",
    "open_decoder",
)


def compiled(model):
    model.compile(keras.optimizers.SGD(1e-3), loss="mse", run_eagerly=EAGER)
    return model


@functools.cache
def residual_model(name):
    return compiled(zoo.build(name))


def random_plan(model, share_of_branches, seed=0):
    """Takes channels out of every group, and this share of the branches, at least one."""
    random = np.random.default_rng(seed)
    labeled = label_model(model, with_branches=True)
    kept = np.ones(labeled.num_units, bool)
    for group in labeled.groups:
        if not group.is_branch:
            num = min(group.num_units - 1, max(1, round(0.4 * group.num_units)))
            kept[group.start + random.choice(group.num_units, num, replace=False)] = False
    branches = [group.start for group in labeled.groups if group.is_branch]
    num = max(1, round(share_of_branches * len(branches)))
    kept[random.choice(branches, num, replace=False)] = False
    return plan_of(labeled, CostModel(labeled), kept)


def gone(plan):
    return [name for name, layer in plan.layers.items() if not layer.kept]


def groups_of(model):
    return {g.name: g for g in keras_taylor.analyze(model, branches=True).groups if g.is_branch}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", RESIDUAL)
def test_closed_gates_equal_the_model_without_branches_and_channels(name, share):
    model, x = residual_model(name), zoo.inputs_of(residual_model(name))
    plan = random_plan(model, share)
    assert gone(plan)
    labeled, small = label_as_planned(model, plan), keras_taylor.prune(model, plan)
    gated = GatedModel(labeled)
    open_gates = predict(gated, x)
    gated.mask = kept_units(labeled, plan)
    assert relative_difference(open_gates, predict(model, x)) <= 1e-6
    assert relative_difference(predict(small, x), predict(gated, x)) <= 1e-5
    assert relative_difference(open_gates, predict(gated, x)) > 1e-3
    counted = CostModel(label_model(small, with_branches=True))()
    memory, counted_memory = plan.after["activation_memory"], counted.pop("activation_memory")
    assert counted["params"] == small.count_params()
    assert {cost: plan.after[cost] for cost in counted} == counted
    assert memory >= counted_memory if name == "output_in_the_middle" else memory == counted_memory


@pytest.mark.once
@pytest.mark.parametrize("name", ["residual", "swin"])
def test_savings_of_branches_are_exact_at_any_widths(name):
    labeled = label_model(residual_model(name), with_branches=True)
    costs, random = CostModel(labeled), np.random.default_rng(0)
    counted = costs.group_costs
    is_branch = np.array([group.is_branch for group in labeled.groups])
    sizes = costs.units_per_group()
    for _ in range(3):
        widths = random.integers(np.where(is_branch, 0, 1), sizes + 1)
        for cost in ("params", "flops"):
            gradient = counted.gradient(widths, cost)
            for number in np.flatnonzero(is_branch):
                gone, there = widths.copy(), widths.copy()
                gone[number], there[number] = 0, 1
                np.testing.assert_allclose(gradient[number], counted(there)[cost] - counted(gone)[cost])
    alone = costs.with_one_group_cut()
    for number in np.flatnonzero(is_branch):
        cut = sizes.copy()
        cut[number] = 0
        assert alone[number] == counted(cut)


@pytest.mark.once
def test_the_size_of_a_file_is_predicted_without_the_branches():
    model = residual_model("residual")
    plan = random_plan(model, 0.5)
    labeled = label_as_planned(model, plan)
    left = WeightBytes(labeled, "keras")(kept_units(labeled, plan))
    assert left == 4 * keras_taylor.prune(model, plan).count_params()


def test_without_branches_no_layer_of_them_is_left():
    model = residual_model("residual")
    plan = Plan({"block0_add": LayerPlan(1, ())}, branches=True)
    small = keras_taylor.prune(model, plan)
    left = {layer.name for layer in model.layers} - {layer.name for layer in small.layers}
    assert left == {"block0_add"} | {f"block0_{k}{s}" for k in "ab" for s in ("", "_bn")} | {"block0_a_act"}
    for layer in small.layers:
        for new, old in zip(layer.weights, model.get_layer(layer.name).weights, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (new, old)))


@pytest.mark.once
@pytest.mark.parametrize("name", ["residual", "inverted_residual", "swin"])
def test_pruning_twice_equals_pruning_once_with_branches(name):
    model = residual_model(name)
    first = random_plan(model, 0.5)
    small = keras_taylor.prune(model, first)
    later = keras_taylor.make_plan(
        small, keras_taylor.score(small, criterion="magnitude"), 0.1, selection=keras_taylor.Selection()
    )
    twice, once = keras_taylor.prune(small, later), keras_taylor.prune(model, first.compose(later))
    assert once.to_json() == twice.to_json()
    for a, b in zip(once.weights, twice.weights, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))


@pytest.mark.once
def test_an_empty_plan_with_branches_changes_nothing():
    model = residual_model("residual")
    same, x = keras_taylor.prune(model, Plan(branches=True)), zoo.inputs_of(model)
    assert same.to_json() == model.to_json()
    assert relative_difference(predict(same, x), predict(model, x)) <= 1e-6


@pytest.mark.once
def test_a_plan_with_branches_goes_through_json_and_can_be_edited():
    model = residual_model("residual")
    plan = random_plan(model, 1.0)
    assert set(gone(plan)) == {"block0_add", "block1_add"}
    assert not any(name.startswith("block0_a_") or name == "block0_a" for name in plan.layers)
    read = Plan.from_json(plan.to_json())
    assert read == plan and read.branches
    back = read.keep("block0_add", [0])
    assert gone(back) == ["block1_add"] and "block0_b" in back.layers
    assert keras_taylor.prune(model, back).count_params() == back.after["params"]
    again = back.keep("block0_add", [])
    assert again == plan
    assert (back | plan) == plan
    assert "block0_add" in str(plan) and (back - plan).layers["block0_add"].first_only == (0,)


def test_scores_and_plans_take_branches_into_account():
    model, x = residual_model("residual"), zoo.inputs_of(residual_model("residual"), 16)
    data, before = (x, targets_of(model, x)), fingerprint(model)
    scores = keras_taylor.score(model, data, branches=True)
    assert scores["block0_add"].shape == (1,) and scores["block0_add"] > 0
    assert "block0_add" not in keras_taylor.score(model, data)
    assert "block0_add" not in keras_taylor.score(model, criterion="magnitude", branches=True)
    assert fingerprint(model) == before
    oracle = keras_taylor.score(model, data, criterion="oracle", branches=True, include="block0_add")
    without = keras_taylor.prune(model, Plan({"block0_add": LayerPlan(1, ())}, branches=True))
    losses = [m.evaluate(*data, verbose=0) for m in (model, without)]
    np.testing.assert_allclose(oracle["block0_add"], losses[1] - losses[0], rtol=1e-3)
    for goal in (0.2, 0.6, 0.9):
        plan = keras_taylor.make_plan(model, scores, goal, selection=WITH_BRANCHES)
        small = keras_taylor.prune(model, plan)
        assert small.count_params() == plan.after["params"] <= (1 - goal) * model.count_params()
    assert gone(plan)


def test_a_worthless_branch_leaves_first():
    model = compiled(zoo.build("residual"))
    norm = model.get_layer("block1_b_bn")
    norm.gamma.assign(np.zeros(norm.gamma.shape))
    norm.beta.assign(np.zeros(norm.beta.shape))
    x = zoo.inputs_of(model, 16)
    scores = keras_taylor.score(model, (x, targets_of(model, x) + 0.5), branches=True)
    plan = keras_taylor.make_plan(model, scores, 0.2, selection=WITH_BRANCHES)
    assert list(plan.layers) == ["block1_add"]
    small = keras_taylor.prune(model, plan)
    assert relative_difference(predict(small, x), predict(model, x)) <= 1e-6


@pytest.mark.parametrize("rank", ["cost", "score"])
def test_a_branch_that_saves_enough_alone_takes_no_other_units_along(rank):
    x = inputs = keras.Input((8,))
    x = layers.Dense(8, "relu", name="early")(x)
    x = layers.Dense(8, name="trunk")(x)
    x = layers.Add(name="sum")([x, layers.Dense(8, name="out")(layers.Dense(40, "relu", name="large")(x))])
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    scores = {"early": np.linspace(1, 2, 8), "sum": np.array([900.0]), "large": np.full(40, 1e6)}
    selection = keras_taylor.Selection(branches=True, rank=rank)
    plan = keras_taylor.make_plan(model, scores, 0.6, selection=selection)
    assert gone(plan) == ["sum"] == list(plan.layers)
    plan = keras_taylor.make_plan(model, scores, 0.85, selection=selection)
    early = plan.layers["early"].kept
    assert gone(plan) == ["sum"] and 1 < len(early) < 8
    assert plan.keep("early", len(early) + 1).after["params"] > 0.15 * model.count_params()


def test_branches_stay_unless_they_are_asked_for():
    model, x = residual_model("residual"), zoo.inputs_of(residual_model("residual"))
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.7)
    assert not gone(plan) and not plan.branches
    scores = keras_taylor.score(model, (x, targets_of(model, x)), branches=True)
    with pytest.raises(ValueError, match="do not fit the model at 'block0_add'"):
        keras_taylor.make_plan(model, scores, 0.3)
    with pytest.raises(TypeError, match=r"Received: branches=1"):
        keras_taylor.Selection(branches=1)


def test_a_latency_out_of_reach_shows_how_branches_leave(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    model, x = residual_model("residual"), zoo.inputs_of(residual_model("residual"))
    hint = r"Whole residual branches leave with `selection=Selection\(branches=True\)`"
    with pytest.raises(ValueError, match=hint):
        keras_taylor.compress(model, (x, targets_of(model, x)), {"latency": 0.9999}, epochs=0, verbose=0)
    with pytest.raises(ValueError, match="out of reach") as error:
        keras_taylor.compress(model, (x, targets_of(model, x)), 0.9999, epochs=0, verbose=0)
    assert "branches" not in str(error.value)


def test_exclude_and_include_name_branches_by_their_sums():
    model, x = residual_model("residual"), zoo.inputs_of(residual_model("residual"))
    data = (x, targets_of(model, x))
    scores = keras_taylor.score(model, data, branches=True, exclude="block0_add")
    assert "block0_add" not in scores and "block1_add" in scores
    only = keras_taylor.score(model, data, branches=True, include=["block0_add", "block1_add"])
    assert list(only) == ["block0_add", "block1_add"]
    plan = keras_taylor.make_plan(
        model, only, 0.3, selection=WITH_BRANCHES, include=["block0_add", "block1_add"]
    )
    assert len(plan.layers) == 1 and gone(plan)


@pytest.mark.once
def test_a_block_that_changes_the_shape_is_named():
    analysis = keras_taylor.analyze(zoo.build("bottleneck"), branches=True)
    (group,) = [one for one in analysis.groups if one.is_branch]
    assert not group.prunable and "a block changes the shape" in group.reason
    text = " ".join(str(analysis).split())
    assert "0 of 1 residual branches" in text and "a residual branch" in text


@keras.saving.register_keras_serializable("test_branches")
class Closed(layers.Layer):
    """Stays closed, since it has a weight of its own: `x + factor * dense(x)`, or without its input."""

    def __init__(self, adds, **kwargs):
        super().__init__(**kwargs)
        self.adds = adds

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")
        self.dense = layers.Dense(shape[-1], name="dense")
        self.dense.build(shape)

    def call(self, x):
        y = self.factor * self.dense(x)
        return x + y if self.adds else y

    def get_config(self):
        return {**super().get_config(), "adds": self.adds}


def closed_layers(kind):
    """Three closed layers, of which the second one does not add to its input."""
    parts = [Closed(name != "plain", name=name) for name in ("first", "plain", "last")]
    if kind == "sequential":
        return keras.Sequential([keras.Input((8,)), *parts, layers.Dense(3, name="head")])
    x = inputs = keras.Input((8,))
    for part in parts:
        x = part(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_a_closed_layer_that_adds_to_its_input_leaves_as_a_whole_and_no_other(kind):
    model = compiled(zoo.randomized(closed_layers(kind)))
    assert {name: group.prunable for name, group in groups_of(model).items()} == {"first": True, "last": True}
    data = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    for weight in model.get_layer("last").weights:
        weight.assign(np.zeros(weight.shape))
    scores = keras_taylor.score(model, (data, targets_of(model, data)), branches=True)
    assert scores["last"] == 0 < scores["first"]
    plan = keras_taylor.make_plan(model, scores, 0.2, selection=WITH_BRANCHES)
    assert gone(plan) == ["last"]
    small = keras_taylor.prune(model, plan)
    assert [layer.name for layer in small.layers if layer.weights] == ["first", "plain", "head"]
    assert type(small) is type(model)
    assert relative_difference(predict(small, data), predict(model, data)) <= 1e-6


def branch_in(kind):
    """A model whose only branch cannot leave although the shapes are equal."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(10, 8, mask_zero=kind != "output", name="embed")(inputs)
    if kind == "mask of a sum":
        x = layers.Add(name="branch")([x, layers.Conv1D(8, 3, padding="same", name="conv")(x)])
    else:
        x = Closed(True, name="branch")(x)
    if kind == "output":
        return keras.Model(inputs, [x, layers.Dense(3)(x)])
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(5)(x)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mask of a closed layer", "what follows its sum gets another mask from the trunk"),
        ("mask of a sum", "what follows its sum gets another mask from the trunk"),
        ("output", "it is an output of the model, which bears its name"),
    ],
)
def test_a_branch_stays_where_the_trunk_is_no_replacement(kind, reason):
    (group,) = groups_of(branch_in(kind)).values()
    assert (group.name, group.reason) == ("branch", reason)


def test_a_branch_stays_where_its_sum_has_another_precision():
    inputs = keras.Input((8,))
    x = layers.Dense(8, dtype="mixed_bfloat16", name="half")(inputs)
    x = Closed(True, dtype="float32", name="branch")(x)
    (group,) = groups_of(keras.Model(inputs, layers.Dense(3, dtype="float32")(x))).values()
    assert group.reason == "its sum has another precision than the trunk"


@pytest.mark.once
def test_what_two_sums_add_stays():
    x = inputs = keras.Input((8,))
    y = layers.Dense(8, name="shared")(x)
    first = layers.Add(name="first")([x, y])
    second = layers.Add(name="second")([first, y])
    third = layers.Add(name="third")([second, layers.Dense(8, name="own")(second)])
    found = groups_of(keras.Model(inputs, layers.Dense(2)(third)))
    assert found["first"].reason == "'shared' serves other branches, too, so one of them has to stay"
    assert found["second"].reason == "what it adds is read elsewhere, too" and found["third"].prunable


def test_a_call_that_two_branches_read_keeps_one_of_them():
    x = inputs = keras.Input((8,))
    side = layers.Dense(8, name="side")(inputs)
    for name in "ab":
        y = layers.Dense(8, name=f"{name}_dense")(layers.Multiply()([x, side]))
        x = layers.Add(name=f"{name}_sum")([x, y])
    model = keras.Model(inputs, layers.Dense(2)(x))
    found = groups_of(model)
    assert found["a_sum"].reason == "'side' serves other branches, too, so one of them has to stay"
    assert found["b_sum"].prunable
    plan = Plan({"b_sum": LayerPlan(1, ())}, branches=True)
    assert keras_taylor.prune(model, plan).get_layer("side") is not None


@pytest.mark.once
def test_a_part_of_a_branch_outside_of_the_submodel_of_its_sum_keeps_it():
    first, second = keras.Input((8,)), keras.Input((8,))
    adding = keras.Model([first, second], layers.Add(name="sum")([first, second]), name="adding")
    inputs = keras.Input((8,))
    x = adding([inputs, layers.Dense(8, name="outer")(inputs)])
    (group,) = groups_of(keras.Model(inputs, layers.Dense(2)(x))).values()
    assert group.reason == "'outer' is a part of it, and outside of 'adding', where the sum is"


@pytest.mark.once
def test_parallel_branches_of_one_trunk_can_leave_alone_and_together():
    x = inputs = keras.Input((6, 8))
    y = layers.LayerNormalization(name="norm")(x)
    x = layers.Add(name="one")([x, layers.Dense(8, name="a")(layers.Dense(5, "gelu", name="a_in")(y))])
    x = layers.Add(name="two")([x, layers.Dense(8, name="b")(inputs)])
    model = keras.Model(inputs, layers.Dense(3)(ops.mean(x, axis=1)))
    zoo.randomized(model)
    assert all(group.prunable for group in groups_of(model).values())
    data = zoo.inputs_of(model)
    for names in (["one"], ["two"], ["one", "two"]):
        plan = Plan({name: LayerPlan(1, ()) for name in names}, branches=True)
        labeled = label_as_planned(model, plan)
        gated = GatedModel(labeled)
        gated.mask = kept_units(labeled, plan)
        small = keras_taylor.prune(model, plan)
        assert relative_difference(predict(small, data), predict(gated, data)) <= 1e-5
        counted = plan_of(labeled, CostModel(labeled), kept_units(labeled, plan))
        assert counted.after["params"] == small.count_params()
    assert [layer.name for layer in small.layers if layer.weights] == [model.layers[-1].name]


@pytest.mark.parametrize("thorough", [True, False])
def test_repair_makes_later_layers_take_over(thorough):
    """A branch is a linear map of the trunk here, so the next layer can do its work."""
    x = inputs = keras.Input((12,))
    x = layers.Dense(8, name="stem")(x)
    x = layers.Add(name="sum")([x, layers.Dense(8, name="out")(layers.Dense(8, name="in")(x))])
    model = compiled(keras.Model(inputs, layers.Dense(3, name="head")(layers.BatchNormalization()(x))))
    zoo.randomized(model)
    x = np.random.default_rng(0).normal(size=(256, 12)).astype("float32")
    plan = Plan({"sum": LayerPlan(1, ())}, branches=True)
    small = keras_taylor.prune(model, plan)
    repaired, repairs = keras_taylor.repair(small, model, plan, x, return_repairs=True)
    assert relative_difference(predict(small, x), predict(model, x)) > 0.1
    assert relative_difference(predict(repaired, x), predict(model, x)) < 1e-3
    assert "head" in [one.name for one in repairs if one.ridge is not None]
    goal, selection = {"params": 0.4}, {"selection": WITH_BRANCHES, "include": ["sum"]}
    if not thorough:
        y = predict(model, x)[0]
        done = keras_taylor.compress(model, (x, y), goal, increment=1.0, epochs=0, verbose=0, **selection)
        assert relative_difference(predict(done, x), predict(model, x)) < 1e-3


@pytest.mark.once
def test_repair_refuses_a_model_that_lost_other_branches():
    model = residual_model("residual")
    plans = [Plan({f"block{k}_add": LayerPlan(1, ())}, branches=True) for k in range(2)]
    with pytest.raises(ValueError, match="whose first other layer is: block1_a"):
        keras_taylor.repair(keras_taylor.prune(model, plans[0]), model, plans[1], zoo.inputs_of(model))


def test_compress_takes_branches_in_several_rounds(tmp_path):
    x = inputs = keras.Input((4, 8))
    for k in range(3):
        y = layers.Dense(6, "relu", name=f"in{k}")(layers.LayerNormalization(name=f"norm{k}")(x))
        x = layers.Add(name=f"sum{k}")([x, layers.Dense(8, name=f"out{k}")(y)])
    model = compiled(zoo.randomized(keras.Model(inputs, layers.Dense(3)(ops.mean(x, axis=1)))))
    data = (zoo.inputs_of(model, 32), np.ones((32, 3), "float32"))
    sums = [f"sum{k}" for k in range(3)]
    small, info = keras_taylor.compress(
        *(model, data, {"flops": 0.6}),
        increment=0.3,
        epochs=0,
        verbose=0,
        selection=WITH_BRANCHES,
        include=sums,  # one leaves in the first round, with its name
        return_info=True,
        backup_dir=tmp_path,
    )
    assert len(gone(info.plan)) == 2 == len(info.plan.layers)
    assert info.after["params"] == small.count_params()
    assert keras_taylor.prune(model, info.plan).count_params() == small.count_params()
    assert keras_taylor.Info.from_json(info.to_json()).plan == info.plan
    again = keras_taylor.compress(
        *(model, data, {"flops": 0.6}),
        increment=0.3,
        epochs=0,
        verbose=0,
        selection=WITH_BRANCHES,
        include=sums,
        backup_dir=tmp_path,
    )
    np.testing.assert_array_equal(*(predict(m, data[0])[0] for m in (again, small)))


def test_a_wrapper_closes_whole_branches_and_strips_them():
    model = residual_model("residual")
    x = zoo.inputs_of(model, 16)
    y = targets_of(model, x)
    wrapper = keras_taylor.PrunableModel(model, selection=WITH_BRANCHES)
    wrapper.fit(x, y, verbose=0, batch_size=8)
    wrapper.prune(0.8)
    small = wrapper.strip()
    assert small.count_params() <= 0.2 * model.count_params()
    assert relative_difference(predict(small, x), predict(wrapper, x)) <= 1e-5
