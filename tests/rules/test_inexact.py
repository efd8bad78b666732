"""`exact=False`: channels that are normalized together leave, too. Every law holds for what is left."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import fingerprint, predict, relative_difference
from keras import layers, ops

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.cutting.surgery import copy_model
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel

BUILDERS = {
    name: zoo.BUILDERS[name] for name in ("layernorm", "causal_transformer", "mlp_mixer", "vit_parts", "swin")
}

pytestmark = pytest.mark.sweep(5)


def model(builder):
    BUILDERS[builder.__name__] = builder
    return builder


@model
def bert():
    tokens, positions = keras.Input((6,), dtype="int32", name="tokens"), keras.Input((6,), dtype="int32")
    x = layers.Embedding(zoo.VOCABULARY, 8, name="words")(tokens)
    x = x + layers.Embedding(zoo.VOCABULARY, 8, name="places")(positions)
    x = layers.LayerNormalization(name="norm0", scale=False)(x)
    for k in range(2):
        y = layers.MultiHeadAttention(2, 3, name=f"attention{k}")(x, x)
        x = layers.LayerNormalization(name=f"norm{k}_a", center=k == 0)(layers.Add()([x, y]))
        y = layers.Dense(8, name=f"down{k}")(layers.Dense(7, "gelu", name=f"up{k}")(x))
        x = layers.LayerNormalization(name=f"norm{k}_b")(layers.Add()([x, y]))
    x = layers.Dense(5, "tanh", name="pooler")(x[:, 0])
    return keras.Model([tokens, positions], layers.Dense(3, name="head")(x))


@model
def convnext():
    x = inputs = keras.Input(zoo.SIZE)
    x = layers.LayerNormalization(name="stem_norm")(layers.Conv2D(6, 2, strides=2, name="stem")(x))
    for k, width in enumerate((6, 8)):
        if k:
            x = layers.Conv2D(width, 2, strides=2, name="down")(
                layers.LayerNormalization(name="down_norm")(x)
            )
        y = layers.DepthwiseConv2D(3, padding="same", name=f"depthwise{k}")(x)
        y = layers.LayerNormalization(name=f"norm{k}")(y)
        y = layers.Dense(width, name=f"project{k}")(layers.Dense(9, "gelu", name=f"expand{k}")(y))
        x = layers.Add()([x, layers.Dropout(0.1)(y)])
    x = layers.LayerNormalization(name="head_norm")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


@model
def over_space_too():
    x = inputs = keras.Input((3, 8, 8))
    x = layers.Conv2D(6, 3, name="conv1")(layers.Permute((2, 3, 1))(x))
    x = layers.LayerNormalization(axis=[1, 2, 3], name="norm1")(x)
    x = layers.Permute((3, 1, 2))(layers.Conv2D(5, 1, activation="relu", name="conv2")(x))
    x = layers.LayerNormalization(axis=[1, 2, 3], name="norm2")(x)
    x = layers.RMSNormalization(axis=(1, 2, 3), name="norm3")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


@model
def all_kinds():
    x = inputs = keras.Input(zoo.SIZE)
    x = layers.UnitNormalization(name="unit")(layers.Conv2D(6, 3, name="conv1")(x))
    x = layers.GroupNormalization(1, name="one_group")(layers.Conv2D(7, 1, name="conv2")(x))
    x = layers.TimeDistributed(layers.LayerNormalization(), name="each_row")(
        layers.Dense(5, name="dense1")(x)
    )
    x = layers.TimeDistributed(layers.GroupNormalization(1), name="each")(layers.Dense(6, name="dense2")(x))
    x = layers.Concatenate(name="join")([x, layers.Dense(4, name="dense3")(x)])
    x = layers.RMSNormalization(name="joined", dtype="float64")(x)
    return zoo.classified(inputs, layers.Conv2D(4, 1, name="conv3", dtype="float32")(x))


@model
def shared_norm():
    x = inputs = keras.Input((5, 4))
    norm = layers.LayerNormalization(name="norm")
    x = norm(layers.Dense(8, name="stem")(x))
    x = norm(x + layers.Dense(8, name="again")(layers.Dense(6, "relu", name="hidden")(x)))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


NAMES = list(BUILDERS)


@functools.cache
def case(name):
    """Built once a run: no test may change it."""
    with zoo.without_initializers():
        network = BUILDERS[name]()
    network = zoo.randomized(network)
    network.compile(keras.optimizers.SGD(1e-3), loss="mse", run_eagerly=helpers.EAGER)
    plan = helpers.random_plan(network, exact=False)
    return helpers.Case(name, network, zoo.inputs_of(network), plan, keras_taylor.prune(network, plan))


def weights_of(network):
    return [keras.ops.convert_to_numpy(w) for w in network.weights]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_normalized_together_is_open_and_the_group_says_so(name):
    opened = keras_taylor.analyze(case(name).model, exact=False)
    closed = keras_taylor.analyze(case(name).model)
    groups = [g for g in opened.groups if g.normalized_by]
    assert groups
    if name != "mlp_mixer":  # what mixes tokens acts beside channels then, and keeps its own units
        assert opened.reachable["params"] > closed.reachable["params"]
    prunable = {p for g in closed.groups if g.prunable for p in g.producers}
    hinted = {g.name for g in closed.groups if (g.reason or "").endswith("; `exact=False` opens it")}
    for group in groups:
        assert group.prunable
        assert not prunable & set(group.producers)
        assert group.name in hinted
    assert not any(g.normalized_by for g in closed.groups)
    assert "open with exact=False" not in " ".join(str(closed).split())


def test_the_table_names_what_a_removal_changes():
    text = " ".join(str(keras_taylor.analyze(case("shared_norm").model, exact=False)).split())
    assert "exact=False" in text
    assert keras_taylor.analyze(case("bert").model, exact=False).groups[0] == dataclasses.replace(
        label_model(case("bert").model, exact=False).groups[0],
        name="words",
        producers=(
            "words",
            "places",
            "attention0/attention_output",
            "down0",
            "attention1/attention_output",
            "down1",
        ),
        normalized_by=tuple(
            f"LayerNormalization '{norm}'" for norm in ("norm0", "norm0_a", "norm0_b", "norm1_a", "norm1_b")
        ),
    )


def test_a_hint_is_given_only_where_it_helps():
    x = inputs = keras.Input((4, 8))
    y = layers.LayerNormalization()(x + layers.Dense(8, name="beside_inputs")(layers.LayerNormalization()(x)))
    y = ops.softmax(
        layers.Dense(6, name="shares")(layers.LayerNormalization()(layers.Dense(5, name="free")(y)))
    )
    locked = {g.name: g.reason for g in label_model(keras.Model(inputs, layers.Dense(2)(y))).locked_groups}
    assert not locked["beside_inputs"].endswith("opens it")
    assert locked["shares"].startswith("normalized together")
    assert not locked["shares"].endswith("opens it")
    assert locked["free"].endswith("; `exact=False` opens it")


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_plan_changes_nothing_to_the_bit(name):
    same = keras_taylor.prune(case(name).model, keras_taylor.Plan(exact=False))
    assert json.loads(same.to_json()) == json.loads(case(name).model.to_json())
    for before, after in zip(weights_of(case(name).model), weights_of(same), strict=True):
        np.testing.assert_array_equal(after, before)
    x = case(name).x
    for before, after in zip(predict(case(name).model, x), predict(same, x), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("name", NAMES)
def test_gates_at_zero_equal_the_pruned_model(name):
    network, x, plan, small = case(name).model, case(name).x, case(name).plan, case(name).small
    channels = label_model(network, exact=False)
    gated = GatedModel(channels)
    open_gates = predict(gated, x)
    assert relative_difference(open_gates, predict(network, x)) <= 2e-6
    gated.mask = kept_units(channels, plan)
    closed_gates = predict(gated, x)
    assert relative_difference(predict(small, x), closed_gates) <= 1e-5
    assert relative_difference(open_gates, closed_gates) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_costs_are_those_of_the_plan(name):
    network, plan, small = case(name).model, case(name).plan, case(name).small
    assert plan.exact is False
    assert plan.before["params"] == network.count_params()
    assert plan.after["params"] == small.count_params() < network.count_params()
    assert plan.after["flops"] == CostModel(label_model(small, exact=False))()["flops"]
    for group in label_model(network, exact=False).groups:
        if group.normalized_by:
            for producer in group.producers:
                assert len(plan.layers[producer].kept) < plan.layers[producer].width
    assert [y.shape for y in small.outputs] == [y.shape for y in network.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_pruning_twice_equals_pruning_once(name):
    network, first, small = case(name).model, case(name).plan, case(name).small
    second = helpers.random_plan(small, seed=3, fraction=0.2, exact=False)
    twice = keras_taylor.prune(small, second)
    once = keras_taylor.prune(network, first.compose(second))
    assert twice.count_params() < small.count_params()
    assert json.loads(once.to_json()) == json.loads(twice.to_json())
    for a, b in zip(weights_of(once), weights_of(twice), strict=True):
        np.testing.assert_array_equal(a, b)


LOADER = """
import sys, json, keras, numpy as np, zoo
folder = sys.argv[1]
for name in json.loads(sys.argv[2]):
    with zoo.without_initializers():
        model = keras.models.load_model(f"{folder}/{name}.keras")
    y = model.predict_on_batch(zoo.inputs_of(model))
    np.save(f"{folder}/{name}.npy", keras.ops.convert_to_numpy(y))
assert "keras_taylor" not in sys.modules
"""


def test_a_saved_model_predicts_the_same_without_the_package(tmp_path):
    for name in NAMES:
        case(name).small.save(tmp_path / f"{name}.keras")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(zoo.__file__)}
    subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), json.dumps(NAMES)], env=environment, check=True
    )
    for name in NAMES:
        x = zoo.inputs_of(case(name).small)
        wanted = predict(case(name).small, x)[0]
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_all_verbs_leave_the_model_alone_and_the_pruned_one_trains(name):
    network, x = case(name).model, case(name).x
    y = helpers.targets_of(network, x)
    before = fingerprint(network)
    scores = keras_taylor.score(network, (x, y), exact=False)
    goal = 0.6 * helpers.reachable(network, exact=False)
    plan = keras_taylor.make_plan(network, scores, goal, exact=False)
    small = keras_taylor.prune(network, plan)
    assert fingerprint(network) == before
    channels = label_model(network, exact=False)
    assert set(scores) == {g.name for g in channels.groups}
    costs, kept = CostModel(channels), kept_units(channels, plan)
    ceiling = (1 - goal) * network.count_params()
    assert small.count_params() <= ceiling
    flat = np.concatenate([scores[group.name] for group in channels.groups])
    kept[np.flatnonzero(~kept)[flat[~kept].argmax()]] = True
    assert costs(kept)["params"] > ceiling
    weights = weights_of(small)
    history = small.fit(x, y, epochs=2, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert any(not np.array_equal(a, b) for a, b in zip(weights, weights_of(small), strict=True))


def normalized(x, gamma, beta, epsilon):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(np.square(x - mean).mean(-1, keepdims=True) + epsilon) * gamma + beta


def test_the_pruned_transformer_is_what_numpy_computes_from_sliced_weights():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(zoo.VOCABULARY, 8, name="words")(tokens)
    y = layers.MultiHeadAttention(2, 3, name="attention")(*[layers.LayerNormalization(name="norm1")(x)] * 2)
    x = layers.Add()([x, y])
    y = layers.Dense(7, "relu", name="up")(layers.RMSNormalization(name="norm2")(x))
    x = layers.Add()([x, layers.Dense(8, name="down")(y)])
    x = layers.LayerNormalization(name="norm3")(x)
    network = zoo.randomized(keras.Model(tokens, layers.Dense(3, name="head")(x)))
    stays, hidden = np.array([0, 2, 3, 7]), np.array([1, 2, 4, 5])
    plan = keras_taylor.Plan(
        {
            **{
                name: keras_taylor.plans.plan.LayerPlan(8, tuple(stays.tolist()))
                for name in ("words", "attention/attention_output", "down")
            },
            "up": keras_taylor.plans.plan.LayerPlan(7, tuple(hidden.tolist())),
        },
        exact=False,
    )
    small = keras_taylor.prune(network, plan)
    weights = {
        w.path.split("/", 1)[-1] if w.path.startswith("functional") else w.path: w for w in network.weights
    }
    weights = {path: keras.ops.convert_to_numpy(w) for path, w in weights.items()}

    def weight(ending):
        (found,) = [value for path, value in weights.items() if path.endswith(ending)]
        return found

    ids = zoo.inputs_of(network)
    x = weight("words/embeddings")[:, stays][ids]
    y = normalized(x, weight("norm1/gamma")[stays], weight("norm1/beta")[stays], 1e-3)
    q, k, v = (
        np.einsum("btc,chd->bthd", y, weight(f"{part}/kernel")[stays]) + weight(f"{part}/bias")
        for part in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(3))
    y = np.einsum("bhts,bshd->bthd", scores / scores.sum(-1, keepdims=True), v)
    y = np.einsum("bthd,hdc->btc", y, weight("attention_output/kernel")[..., stays])
    x = x + y + weight("attention_output/bias")[stays]
    y = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * weight("norm2/scale")[stays]
    y = np.maximum(y @ weight("up/kernel")[np.ix_(stays, hidden)] + weight("up/bias")[hidden], 0)
    x = x + y @ weight("down/kernel")[np.ix_(hidden, stays)] + weight("down/bias")[stays]
    x = normalized(x, weight("norm3/gamma")[stays], weight("norm3/beta")[stays], 1e-3)
    wanted = x @ weight("head/kernel")[stays] + weight("head/bias")
    assert relative_difference(predict(small, ids), [wanted]) <= 1e-5
    assert relative_difference(predict(network, ids), [wanted]) > 1e-2


def test_the_true_loss_change_is_that_of_the_pruned_model():
    network, x = case("layernorm").model, case("layernorm").x
    y = helpers.targets_of(network, x)
    scores = keras_taylor.score(network, (x, y), criterion="oracle", exact=False)["conv1"]
    base = np.square(predict(network, x)[0] - y).mean()
    for unit in range(6):
        kept = tuple(k for k in range(6) if k != unit)
        layer = keras_taylor.plans.plan.LayerPlan(6, kept)
        small = keras_taylor.prune(
            network, keras_taylor.Plan({"conv1": layer, "project": layer}, exact=False)
        )
        change = np.square(predict(small, x)[0] - y).mean() - base
        np.testing.assert_allclose(scores[unit], change, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["layernorm", "bert", "over_space_too", "all_kinds"])
def test_scores_are_derivatives_of_the_loss_with_the_normalizations(name):
    network, x = case(name).model, case(name).x
    y = helpers.targets_of(network, x)
    channels = label_model(network, exact=False)

    means = []

    def keep(statistics):
        means.append(statistics.mean)
        return np.abs(statistics.mean)

    keras_taylor.score(network, (x, y), criterion=keep, exact=False)
    means = np.concatenate(means)
    gated, step = GatedModel(channels), 1e-2

    def loss(mask):
        gated.mask = mask
        return np.square(predict(gated, x)[0].astype("float64") - y).mean()

    for unit in range(0, channels.num_units, 3):
        moved = step * (np.arange(channels.num_units) == unit)
        slope = (loss(1 + moved) - loss(1 - moved)) / (2 * step)
        np.testing.assert_allclose(means[unit], slope, rtol=2e-2, atol=2e-4 * np.abs(means).max())


def test_a_plan_remembers_through_json_and_composition():
    plan = case("layernorm").plan
    again = keras_taylor.Plan.from_json(plan.to_json())
    assert again == plan
    assert again.exact is False
    old = json.loads(plan.to_json())
    del old["exact"]  # as it was written before
    assert keras_taylor.Plan.from_json(json.dumps(old)).exact is True
    assert keras_taylor.Plan().compose(plan).exact is False
    assert plan.compose(keras_taylor.Plan()).exact is False
    assert keras_taylor.Plan().compose(keras_taylor.Plan()).exact is True


def test_an_exact_plan_cannot_take_what_is_normalized_together():
    plan = dataclasses.replace(case("layernorm").plan, exact=True)
    with pytest.raises(
        ValueError, match=r"that cannot leave\. Received: plan\.layers\['conv1'\], channel \d$"
    ):
        keras_taylor.prune(case("layernorm").model, plan)


def test_scores_of_groups_that_are_closed_are_refused():
    scores = helpers.random_scores(case("layernorm").model, exact=False)
    with pytest.raises(ValueError, match=r"`exact`\. Received: scores\['conv1'\] of shape \(6,\)$"):
        keras_taylor.make_plan(case("layernorm").model, scores, 0.3)


@pytest.mark.parametrize(
    ("axis", "norm"),
    [
        (2, lambda: layers.LayerNormalization(axis=[-1, 1])),
        (1, lambda: layers.RMSNormalization(axis=1)),
        (2, lambda: layers.LayerNormalization(activity_regularizer="l2")),
        (2, lambda: layers.Softmax()),
        (2, lambda: layers.Lambda(lambda x: x - ops.mean(x, -1, keepdims=True))),
    ],
)
def test_what_is_not_understood_stays(axis, norm):
    x = inputs = keras.Input((6, 3))
    x = layers.Dense(6, name="before")(x)
    x = norm()(layers.Permute((2, 1))(x) if axis == 1 else x)
    network = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    assert "before" in {g.name for g in label_model(network, exact=False).locked_groups}


@pytest.mark.skipif(helpers.BACKEND == "torch", reason="Keras on PyTorch takes the last axes only")
def test_channels_on_another_axis_than_the_last():
    x = inputs = keras.Input((3, 8, 8))
    x = layers.Permute((3, 1, 2))(layers.Conv2D(6, 3, name="conv")(layers.Permute((2, 3, 1))(x)))
    x = layers.LayerNormalization(axis=1)(layers.UnitNormalization(axis=1)(x))
    network = zoo.randomized(keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x))))
    assert len(label_model(network, exact=False).groups[0].normalized_by) == 2
    helpers.check_law_two(network, zoo.inputs_of(network), exact=False)


def test_groups_of_a_group_normalization_leave_as_a_whole():
    x = inputs = keras.Input(zoo.SIZE)
    x = layers.GroupNormalization(4, name="norm")(layers.Conv2D(12, 3, name="conv1")(x))
    network = zoo.randomized(zoo.classified(inputs, zoo.conv(x, 5, "conv2", kernel=1)))
    assert {g.name: g.num_units for g in label_model(network).groups} == {"conv1": 4, "conv2": 5}
    x = zoo.inputs_of(network)
    small = helpers.check_law_two(network, x)
    assert small.get_layer("norm").groups == 2
    assert small.get_layer("conv1").filters == 6
    assert not any(g.normalized_by for g in label_model(network, exact=False).groups)
    # of a single group that is left, channels could leave that no plan for the original can say
    assert {g.name: g.num_units for g in label_model(network, exact=False).groups} == {
        "conv1": 2,
        "conv2": 5,
    }
    locked = {(g.name, g.reason) for g in label_model(network, exact=False).locked_groups}
    assert ("conv1", "at least two groups of a group normalization stay ('norm')") in locked


@keras.saving.register_keras_serializable("inexact")
class Standardised(layers.Layer):
    """Zero mean, mean absolute deviation 1, and a scale."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        x = x - ops.mean(x, -1, keepdims=True)
        return self.scale * x / (0.1 + ops.mean(ops.abs(x), -1, keepdims=True))


def standardized(right=True):
    """A rule for it; one that forgets the mean does not hold."""

    def gated(layer, x, gate):
        total = ops.sum(gate, -1, keepdims=True)
        x = x - ops.sum(x * gate, -1, keepdims=True) / total * right
        return layer.scale * x / (0.1 + ops.sum(ops.abs(x) * gate, -1, keepdims=True) / total)

    def rule(ctx):
        tensor = ctx.inputs[0]
        if not ctx.record_normalization(tensor.labels):
            return keras_taylor.rules.base.Effect(outputs=[ctx.fixed_labels()])
        return keras_taylor.rules.base.Effect(
            outputs=[tensor.labels], weights={"scale": (tensor.labels_along(-1),)}, call_with_gate=gated
        )

    return rule


def with_standardized():
    x = inputs = keras.Input((5, 4))
    x = Standardised(name="standardized")(layers.Dense(8, name="stem")(x))
    return zoo.randomized(keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x))))


def test_a_registered_normalization_opens_if_its_rule_holds():
    registered = keras_taylor.rules.registry.REGISTERED
    try:
        keras_taylor.register_rule(Standardised, standardized())
        network = with_standardized()
        assert label_model(network).groups == []
        (group,) = label_model(network, exact=False).groups
        assert group.normalized_by == ("Standardised 'standardized'",)
        helpers.check_law_two(network, zoo.inputs_of(network), exact=False)
        keras_taylor.register_rule(Standardised, standardized(right=False))
        with pytest.raises(
            ValueError, match=r"does not hold for layer 'standardized': .*Received: standardized="
        ):
            label_model(with_standardized(), exact=False)
    finally:
        registered.pop(Standardised, None)


def data_of(network, num=64):
    x = zoo.inputs_of(network, num)
    return x, helpers.targets_of(network, x)


@pytest.mark.parametrize("epochs", [0, 1])
def test_compress_opens_tells_and_remembers(epochs):
    network = copy_model(case("convnext").model)
    x, y = data_of(network)
    small, info = keras_taylor.compress(
        network, (x, y), 0.6, increment=0.3, exact=False, epochs=epochs, return_info=True, verbose=0
    )
    assert small.count_params() <= 0.4 * network.count_params()
    assert info.plan.exact is False
    assert "stem" in info.pruned_layers
    assert info.inexact["stem"]["channels"] == 6
    assert "LayerNormalization 'stem_norm'" in info.inexact["stem"]["changes"]
    again = keras_taylor.Info.from_json(info.to_json())
    assert again.inexact == info.inexact
    assert again.plan.exact is False
    assert "their removal changes the values of" in info.to_html()
    cut = keras_taylor.prune(network, info.plan)
    assert json.loads(cut.to_json())["config"] == json.loads(small.to_json())["config"]


def test_compress_says_what_is_open_before_it_starts(capsys):
    network = copy_model(case("layernorm").model)
    keras_taylor.compress(network, data_of(network), 0.5, increment=0.5, exact=False, epochs=0, verbose=2)
    line = "open with exact=False only, as they are normalized together: 6 channel units (conv1)"
    assert line in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_killed_and_not_with_the_other_setting(tmp_path):
    network = copy_model(case("layernorm").model)
    data, arguments = data_of(network), {"increment": 0.15, "backup_dir": tmp_path, "verbose": 0}
    arguments["learning_rate"] = keras_taylor.FineTuning(every_round=True)

    def interrupt(*_):
        raise KeyboardInterrupt

    stop = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(keras_taylor.CompressionInterrupted):
        keras_taylor.compress(network, data, 0.25, exact=False, callbacks=[_AfterOne(stop)], **arguments)
    with pytest.raises(ValueError, match=r"another call: exact.*Received: backup_dir="):
        keras_taylor.compress(network, data, 0.25, **arguments)
    small, info = keras_taylor.compress(network, data, 0.25, exact=False, return_info=True, **arguments)
    assert len(info.rounds) == 2
    assert small.count_params() <= 0.75 * network.count_params()


class _AfterOne(keras.callbacks.Callback):
    """Hands the second training to another callback."""

    def __init__(self, other):
        super().__init__()
        self._other, self._trainings = other, 0

    def on_train_begin(self, logs=None):
        self._trainings += 1
        if self._trainings > 1:
            self._other.on_epoch_begin(0)


def test_repair_brings_the_outputs_nearer_on_data_that_it_has_not_seen():
    network = case("convnext").model
    x = zoo.inputs_of(network, 256)
    held_out = zoo.inputs_of(network, 64, seed=9)
    plan = helpers.random_plan(network, fraction=0.2, exact=False)
    cut = keras_taylor.prune(network, plan)
    repaired, repairs = keras_taylor.repair(cut, network, plan, x, return_repairs=True)
    wanted = predict(network, held_out)[0]
    before, after = (np.square(predict(m, held_out)[0] - wanted).mean() for m in (cut, repaired))
    assert after < 0.8 * before
    assert {one.name for one in repairs if one.ridge is not None}


def test_repair_leaves_alone_what_it_cannot_help():
    network = case("convnext").model
    plan = helpers.random_plan(network, fraction=0.2, exact=False)
    cut = keras_taylor.prune(network, plan)
    one = [zoo.inputs_of(network, 1)[0]] * 8  # of a single example nothing is learnt
    noise = np.stack(one).astype("float32")
    repaired, repairs = keras_taylor.repair(cut, network, plan, noise, return_repairs=True)
    wanted = predict(network, noise)[0]
    before, after = (np.square(predict(m, noise)[0] - wanted).mean() for m in (cut, repaired))
    assert after <= before
    assert all(one.reason or one.error_after <= one.error_before for one in repairs)


@pytest.mark.parametrize("name", ["bert", "convnext", "all_kinds"])
def test_a_wrapped_model_prunes_strips_and_survives_a_file(name, tmp_path):
    network, (x, y) = case(name).model, data_of(case(name).model, 16)
    prunable = keras_taylor.PrunableModel(network, exact=False)
    assert relative_difference(predict(prunable, x), predict(network, x)) <= 2e-6
    prunable.fit(x, y, epochs=1, verbose=0)
    prunable.prune(0.6 * helpers.reachable(network, exact=False))
    assert any(
        prunable.plan.layers[n] for g in label_model(network, exact=False).groups[:1] for n in g.producers
    )
    assert prunable.plan.exact is False
    prunable.fit(x, y, epochs=1, verbose=0)
    small = prunable.strip()
    assert small.count_params() == prunable.cost()["params"]
    assert relative_difference(predict(small, x), predict(prunable, x)) <= 1e-5
    prunable.save(tmp_path / "prunable.keras")
    again = keras.models.load_model(tmp_path / "prunable.keras")
    assert again.plan == prunable.plan
    assert relative_difference(predict(again, x), predict(prunable, x)) <= 1e-6


def test_the_next_step_of_the_stripped_model_is_that_of_the_wrapped_one():
    network, (x, y) = case("layernorm").model, data_of(case("layernorm").model, 16)
    prunable = keras_taylor.PrunableModel(network, exact=False)
    prunable.fit(x, y, verbose=0, shuffle=False)
    prunable.prune(5)
    small = prunable.strip()
    for one in (prunable, small):
        one.fit(x, y, epochs=2, verbose=0, shuffle=False)
    assert relative_difference(predict(small, x), predict(prunable, x)) <= 1e-5


def test_the_callback_prunes_what_is_normalized_together():
    network, (x, y) = case("layernorm").model, data_of(case("layernorm").model, 16)
    prunable = keras_taylor.PrunableModel(network, exact=False)
    goal = 0.9 * helpers.reachable(network, exact=False)
    prunable.fit(x, y, epochs=4, verbose=0, callbacks=[keras_taylor.TaylorPruning(goal)])
    small = prunable.strip()
    assert small.count_params() <= (1 - goal) * network.count_params()
    assert small.get_layer("conv1").filters < 6


def test_half_precision_stays_finite_with_one_channel_left():
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, name="before", dtype="mixed_float16")(x)
    x = layers.LayerNormalization(epsilon=1e-12, dtype="mixed_float16")(x)
    network = zoo.randomized(keras.Model(inputs, layers.Dense(2, dtype="float32")(x)))
    gated = GatedModel(label_model(network, exact=False))
    gated.mask = np.arange(6) == 2
    assert np.isfinite(predict(gated, zoo.inputs_of(network))[0]).all()


@keras.saving.register_keras_serializable("inexact")
class PatchEncoder(layers.Layer):
    """Patches and where they are, as in Keras' own examples."""

    def __init__(self, num_patches=5, width=8, **kwargs):
        super().__init__(**kwargs)
        self.num_patches, self.width = num_patches, width
        self.projection = layers.Dense(width, name="projection")
        self.places = layers.Embedding(num_patches, width, name="places")

    def build(self, shape):
        self.projection.build(shape)
        self.places.build((1, self.num_patches))

    def call(self, x):
        return self.projection(x) + self.places(ops.expand_dims(ops.arange(self.num_patches), 0))

    def get_config(self):
        return {**super().get_config(), "num_patches": self.num_patches, "width": self.width}


def with_patches():
    x = inputs = keras.Input((5, 4))
    x = layers.LayerNormalization(name="norm")(PatchEncoder(name="patches")(x))
    return zoo.randomized(keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x))))


def test_positions_are_no_constants():
    network = with_patches()
    channels = label_model(network, exact=False)
    assert channels.groups == []
    assert channels.unknown == ["patches"]
    call = next(call for call in channels.graph.calls if call.name == "patches")
    assert call.closed_reason == "it calls 'places' on values that do not come from its inputs"
    same = keras_taylor.prune(network, keras_taylor.Plan(exact=False))
    assert same.count_params() == network.count_params()


def test_an_encoder_of_patches_opens_by_a_rule_for_what_is_in_it():
    keras_taylor.register_rule(
        PatchEncoder,
        weights={
            "projection.kernel": ("inputs", "units"),
            "projection.bias": ("units",),
            "places.embeddings": (None, "units"),
        },
        config={"width": "units"},
    )
    try:
        network = with_patches()
        (group,) = label_model(network, exact=False).groups
        assert (group.name, group.num_units) == ("patches", 8)
        small = helpers.check_law_two(network, zoo.inputs_of(network), exact=False)
        assert small.get_layer("patches").places.output_dim == small.get_layer("patches").width < 8
        (work,) = [e.work for e in label_model(network).effects if "places.embeddings" in e.weights]
        assert [one.factor for one in work] == [2.0 * 5]  # a multiplication and an addition at every patch
    finally:
        keras_taylor.rules.registry.REGISTERED.pop(PatchEncoder)
