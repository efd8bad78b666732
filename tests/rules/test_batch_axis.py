"""Windows, time steps and patches that are folded into the batch axis: gates follow their examples there."""

import re

import helpers
import keras
import numpy as np
import pytest
import zoo
from keras import layers, ops

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.budget.layer_grids import CallKey, find_kernel_calls
from keras_taylor.reading.groups import label_model
from keras_taylor.rules.registry import REGISTERED

# What is done to features of shape (batch, 4, 6), and how it is undone.
FOLDS = {
    "steps": (lambda x: ops.reshape(x, (-1, 6)), lambda y: ops.reshape(y, (-1, 4, 5))),
    "pairs": (lambda x: ops.reshape(x, (-1, 2, 6)), lambda y: ops.reshape(y, (-1, 4, 5))),
    "pairs apart": (
        lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 2, 2, 6)), (0, 2, 1, 3)), (-1, 2, 6)),
        lambda y: ops.reshape(ops.transpose(ops.reshape(y, (-1, 2, 2, 5)), (0, 2, 1, 3)), (-1, 4, 5)),
    ),
    "time first": (lambda x: ops.transpose(x, (1, 0, 2)), lambda y: ops.swapaxes(y, 0, 1)),
    "channels first": (
        lambda x: ops.transpose(ops.transpose(x, (2, 1, 0)), (1, 2, 0)),
        lambda y: ops.transpose(y, (1, 0, 2)),
    ),
    "time outside": (
        lambda x: ops.reshape(ops.transpose(x, (1, 0, 2)), (-1, 6)),
        lambda y: ops.transpose(ops.reshape(y, (4, -1, 5)), (1, 0, 2)),
    ),
    "outside and inside": (
        lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 2, 2, 6)), (1, 0, 2, 3)), (-1, 6)),
        lambda y: ops.reshape(ops.transpose(ops.reshape(y, (2, -1, 2, 5)), (1, 0, 2, 3)), (-1, 4, 5)),
    ),
    "listed and stacked": (
        lambda x: ops.stack(ops.unstack(x, axis=1), axis=0),
        lambda y: ops.stack([y[k] for k in range(4)], axis=1),
    ),
    "new axis": (lambda x: x[None, ...], lambda y: ops.squeeze(y, 0)),
    "joined": (
        lambda x: ops.concatenate([x[:, :1], x[:, 1:2], x[:, 2:3], x[:, 3:]], axis=0),
        lambda y: ops.concatenate(ops.split(y, 4, axis=0), axis=1),
    ),
    "tiled": (lambda x: ops.tile(x, (3, 1, 1)), lambda y: ops.split(y, 3, axis=0)[1]),
    "repeated": (
        lambda x: ops.repeat(x, 2, axis=0),
        lambda y: ops.mean(ops.reshape(y, (-1, 2, 4, 5)), axis=1),
    ),
    "lambdas": (
        layers.Lambda(lambda x: ops.reshape(ops.transpose(x, (1, 0, 2)), (-1, 6)), output_shape=(6,)),
        layers.Lambda(lambda y: ops.transpose(ops.reshape(y, (4, -1, 5)), (1, 0, 2)), output_shape=(4, 5)),
    ),
}


def network(fold, unfold):
    inputs = keras.Input((4, 3))
    x = layers.Dense(6, "relu", name="first")(inputs)
    second, third = layers.Dense(7, "tanh", name="second"), layers.Dense(5, "relu", name="third")
    x = unfold(third(second(fold(x))))
    return compiled(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))


def compiled(inputs, outputs):
    model = zoo.randomized(keras.Model(inputs, outputs))
    model.compile("sgd", loss="mse", run_eagerly=helpers.EAGER)
    return model


def data(num=5):
    random = np.random.default_rng(0)
    return random.normal(size=(num, 4, 3)).astype("float32"), random.normal(size=(num, 3)).astype("float32")


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", FOLDS)
def test_a_fold_changes_neither_scores_nor_costs_nor_what_a_plan_leaves(name):
    plain, model = network(lambda x: x, lambda y: y), network(*FOLDS[name])
    model.set_weights(plain.get_weights())
    helpers.check_law_two(model, data()[0])
    # a Lambda mixes channels, as far as anybody can see
    names = ["second"] if name == "lambdas" else ["first", "second", "third"]
    assert [group.name for group in label_model(model).groups] == names
    found, expected = (keras_taylor.score(m, data(), batch_size=2) for m in (model, plain))
    for group in names:
        np.testing.assert_allclose(found[group], expected[group], rtol=1e-4)
    if name not in ("tiled", "repeated", "lambdas"):  # which compute other numbers, too
        costs, same = (CostModel(label_model(each)) for each in (model, plain))
        assert costs()["flops"] - same()["flops"] in (0, 20)  # 20: the sum of a mean
        alone = [each.with_one_group_cut()[1] for each in (costs, same)]
        assert costs()["flops"] - alone[0]["flops"] == same()["flops"] - alone[1]["flops"]


def attend(x):
    query, value = layers.Dense(5, name="query")(x), layers.Dense(6, name="value")(x)
    return layers.Attention(use_scale=True, name="scores")([query, value, layers.Dense(5, name="key")(x)])


MIDDLES = {
    "convolutions": lambda x: layers.SeparableConv1D(5, 3, padding="same", name="last")(
        layers.BatchNormalization(name="norm")(layers.Conv1D(7, 3, padding="same", name="middle")(x))
    ),
    "recurrent": lambda x: layers.LSTM(5, return_sequences=True, name="last")(
        layers.Bidirectional(layers.GRU(7, return_sequences=True), name="middle")(x)
    ),
    "heads": lambda x: layers.MultiHeadAttention(3, 2, name="middle")(x, x),
    "attention": attend,
    "normalized": lambda x: layers.RMSNormalization(name="last")(
        layers.Dense(7, name="middle")(layers.LayerNormalization(name="norm")(x))
    ),
    "time distributed": lambda x: layers.TimeDistributed(layers.Dense(5), name="last")(
        layers.EinsumDense("abc,cd->abd", (2, 7), name="middle")(x)
    ),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_every_kind_of_layer_behind_a_fold(name):
    inputs = keras.Input((4, 3))
    x = ops.reshape(layers.Dense(6, "relu", name="first")(inputs), (-1, 2, 6))
    x = MIDDLES[name](x)
    x = ops.reshape(x, (-1, 4, x.shape[-1]))
    model = compiled(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))
    exact = name != "normalized"
    for group in keras_taylor.analyze(model, exact=exact).groups:
        assert group.prunable or group.name == "head", group.reason
    helpers.check_law_two(model, data()[0], exact=exact)
    scores = keras_taylor.score(model, data(), exact=exact)
    assert all(np.isfinite(values).all() and values.any() for values in scores.values())


def test_compress_and_a_wrapper_around_folds():
    x, y = data(16)
    model = network(*FOLDS["time outside"])
    small = keras_taylor.compress(model, (x, y), 0.4, increment=0.4, epochs=1, batch_size=8, verbose=0)
    assert small.count_params() <= 0.6 * model.count_params()
    prunable = keras_taylor.PrunableModel(model)
    prunable.fit(x, y, batch_size=8, verbose=0)
    prunable.prune(0.4)
    expected = prunable.predict(x, verbose=0)
    np.testing.assert_allclose(prunable.strip().predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)


def test_memory_counts_all_rows_of_an_example():
    plain, model = network(lambda x: x, lambda y: y), network(*FOLDS["pairs"])
    costs, same = (CostModel(label_model(each))() for each in (model, plain))
    assert costs == same


def test_layers_are_timed_with_all_rows_of_an_example():
    labeled = label_model(network(*FOLDS["pairs"]))
    call = find_kernel_calls(labeled)[CallKey("second", 1)]
    isolated = call.isolate(np.ones(labeled.num_units, bool))
    assert isolated["shape"] == [2, 6]
    assert isolated["num_rows"] == 2


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: ops.flip(x, axis=0),
        lambda x: ops.concatenate([x[:, 0], ops.reshape(x, (-1, 6))], axis=0),
        lambda x: ops.pad(x, [(1, 0), (0, 0), (0, 0)]),
        lambda x: ops.sum(x, axis=0),
    ],
    ids=["flip", "concatenate", "pad", "sum"],
)
def test_units_behind_what_mixes_examples_stay_and_say_so(mix):
    inputs = keras.Input((4, 3))
    y = mix(layers.Dense(6, name="first")(inputs))
    y = layers.Dense(7, "relu", name="second")(y)
    x = layers.Dense(5, "relu", name="other")(layers.Flatten()(inputs))
    x = layers.Dense(3, name="head")(x) + ops.mean(layers.Dense(3, name="third")(y))
    model = compiled(inputs, x)
    analysis = keras_taylor.analyze(model)
    reasons = {group.name: group.reason or "" for group in analysis.groups}
    assert reasons["first"].startswith("read by an operation on the batch axis ('")
    assert re.fullmatch(r"behind '\w+', where a gate cannot follow its example", reasons["second"])
    assert keras_taylor.score(model, data())["other"].size == 5
    helpers.check_law_two(model, data()[0])


@keras.saving.register_keras_serializable("test")
class Folding(layers.Layer):
    """Stays closed, since it has a weight of its own; its rows are windows, one behind the other."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return ops.reshape(x * self.scale, (-1, 2, x.shape[-1]))


@keras.saving.register_keras_serializable("test")
class Shuffling(Folding):
    def call(self, x):
        return ops.reshape(ops.roll(x * self.scale, 1, axis=0), (-1, 2, x.shape[-1]))


@pytest.mark.parametrize(("layer", "reason"), [(Folding, None), (Shuffling, "behind 'fold', where a gate")])
def test_a_closed_layer_that_folds_is_run_to_see_where_examples_go(layer, reason):
    inputs = keras.Input((4, 3))
    x = layer(name="fold")(layers.Dense(6, name="first")(inputs))
    x = layers.Dense(5, "relu", name="third")(layers.Dense(7, "relu", name="second")(x))
    model = compiled(inputs, layers.Dense(3, name="head")(ops.reshape(x, (-1, 20))))
    groups = {group.name: group.reason for group in keras_taylor.analyze(model).groups}
    assert "stays closed" in groups["first"]
    assert groups["second"] is None if reason is None else groups["second"].startswith(reason)
    if reason is None:
        assert keras_taylor.score(model, data())["third"].size == 5
        helpers.check_law_two(model, data()[0])


@keras.saving.register_keras_serializable("test")
class Averaging(layers.Layer):
    """Stays closed; it undoes a fold, and so runs on whole examples only."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return ops.mean(ops.reshape(x, (-1, 4, x.shape[-1])), axis=1) * self.scale

    def compute_output_shape(self, shape):
        return shape


def test_layers_of_the_user_get_whole_examples_when_they_are_tried():
    inputs = keras.Input((4, 3))
    x = layers.Dense(6, "relu", name="first")(ops.reshape(inputs, (-1, 3)))
    x = layers.Dense(5, "relu", name="second")(Averaging(name="average")(x))
    model = compiled(inputs, layers.Dense(3, name="head")(x))
    assert [group.name for group in label_model(model).groups] == ["second"]
    keras_taylor.register_rule(Averaging, weights={"scale": ("channels",)})
    try:
        assert [group.name for group in label_model(model).groups] == ["first", "second"]
        helpers.check_law_two(model, data()[0])
    finally:
        REGISTERED.clear()


def test_repair_samples_all_rows():
    model = network(*FOLDS["steps"])
    x, _ = data(40)
    plan = helpers.random_plan(model)
    small = keras_taylor.prune(model, plan)
    repaired = keras_taylor.repair(small, model, plan, x)
    errors = [
        np.square(m.predict(x, verbose=0) - model.predict(x, verbose=0)).mean() for m in (small, repaired)
    ]
    assert errors[1] < 0.5 * errors[0]
