"""Scores against NumPy in float64, and what must not change them."""

import copy
import gc
import json
import operator
import pathlib
import pickle
import weakref

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import BACKEND, EAGER
from keras import layers, ops

import keras_taylor
from keras_taylor.reading.groups import label_model
from keras_taylor.scores import criteria, scoring
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.scoring import Scoring

REFERENCES = json.loads((pathlib.Path(__file__).parent / "data" / "scores.json").read_text())
NUM = 20

pytestmark = pytest.mark.sweep(3)


def name_of_loss(value):
    """A name without an address: the same in each process, so that a sample is."""
    return getattr(value, "name", None) or getattr(value, "__name__", str(value))


def dyadic(random, *shape):
    """Multiples of 1/4: sums and products of a few of them are exact in float32."""
    return random.integers(-6, 7, shape) / 4


class Net:
    """A dense network with one hidden layer, in Keras and in NumPy: five numbers in, six units."""

    def __init__(self, outputs=4, activation=None, dropout=0.0, dtype=None, seed=0):
        random = np.random.default_rng(seed)
        self.x = dyadic(random, NUM, 5)
        self.weights = [dyadic(random, *s) for s in ((5, 6), (6,), (6, outputs), (outputs,))]
        inputs = keras.Input((5,))
        h = layers.Dense(6, activation="relu", name="hidden", dtype=dtype)(inputs)
        h = layers.Dropout(dropout, dtype=dtype)(h)
        head = layers.Dense(outputs, activation=activation, name="head", dtype=dtype)
        self.model = keras.Model(inputs, head(h))
        self.model.set_weights([w.astype("float32") for w in self.weights])

    def compiled(self, loss, **arguments):
        self.model.compile("sgd", loss, run_eagerly=EAGER, **arguments)
        return self

    def score(self, y, criterion="taylor", **arguments):
        return keras_taylor.score(self.model, (self.x, y), criterion=criterion, **arguments)["hidden"]

    def gate_derivatives(self, upstream):
        """The derivative of each example's loss by each gate, from dLoss/dlogits (float64)."""
        w1, b1, w2, _ = self.weights
        hidden = np.maximum(self.x @ w1 + b1, 0)
        return hidden * (upstream(self.logits()) @ w2.T)

    def logits(self):
        w1, b1, w2, b2 = self.weights
        return np.maximum(self.x @ w1 + b1, 0) @ w2 + b2


def regression(**arguments):
    """A net with targets and its exact gate derivatives under the mean squared error."""
    net = Net(**arguments)
    y = dyadic(np.random.default_rng(9), NUM, 4)
    return net.compiled("mse"), y, net.gate_derivatives(lambda z: 2 * (z - y) / 4)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def classification(loss, y_shape=(NUM,)):
    net = Net(outputs=3, activation="softmax", seed=4)
    net.weights = [w / 2 for w in net.weights]
    net.model.set_weights([w.astype("float32") for w in net.weights])
    labels = np.random.default_rng(9).integers(0, 3, NUM)
    g = net.gate_derivatives(lambda z: softmax(z) - np.eye(3)[labels])
    return net.compiled(loss), labels.reshape(y_shape), g


FORMULAS = {
    "taylor": lambda g: np.square(g).mean(0),
    "taylor_abs": lambda g: np.abs(g).mean(0),
    "taylor2": lambda g: -g.mean(0) + np.square(g).mean(0) / 2,
    "taylor_batch": lambda g: np.mean([np.square(b.mean(0)) for b in np.split(g, [7, 14])], 0),
}


@pytest.mark.parametrize("criterion", FORMULAS)
def test_formulas_by_hand(criterion):
    net, y, g = regression()
    scores = net.score(y, criterion, batch_size=7)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, FORMULAS[criterion](g), rtol=1e-6)


@pytest.mark.parametrize("criterion", ["taylor", "taylor_abs", "taylor2"])
def test_the_batch_size_changes_nothing(criterion):
    net, y, g = regression()
    for size in (1, 7, 64):
        scores = net.score(y, criterion, batch_size=size)
        np.testing.assert_allclose(scores, FORMULAS[criterion](g), rtol=1e-5, err_msg=str(size))


def test_taylor_batch_depends_on_the_batch_size():
    net, y, g = regression()
    np.testing.assert_allclose(net.score(y, "taylor_batch", batch_size=1), np.square(g).mean(0), rtol=1e-6)
    np.testing.assert_allclose(net.score(y, "taylor_batch", batch_size=NUM), np.square(g.mean(0)), rtol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_deep_networks_against_differences_in_float64(name):
    model = zoo.build(name)
    model.compile("sgd", "mse", run_eagerly=EAGER)
    target = np.linspace(-1, 1, 6 * model.output_shape[-1]).reshape(6, -1).astype("float32")
    scores = keras_taylor.score(model, (zoo.inputs_of(model, num=6), target), batch_size=4)
    assert set(scores) == set(REFERENCES[name])
    for group, values in REFERENCES[name].items():
        np.testing.assert_allclose(scores[group], values, rtol=1e-5, atol=1e-5 * max(values), err_msg=group)


def test_the_order_of_examples_changes_nothing():
    net, y, _ = regression()
    before = net.score(y, batch_size=7)
    order = np.random.default_rng(3).permutation(NUM)
    net.x = net.x[order]
    np.testing.assert_allclose(net.score(y[order], batch_size=7), before, rtol=1e-6)


def test_dropout_is_off():
    net, y, g = regression(dropout=0.5)
    np.testing.assert_allclose(net.score(y), np.square(g).mean(0), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "mean", None])
def test_the_reduction_of_the_loss_changes_nothing(reduction):
    net, y, g = regression()
    net.compiled(keras.losses.MeanSquaredError(reduction=reduction))
    np.testing.assert_allclose(net.score(y, batch_size=7), np.square(g).mean(0), rtol=1e-6)


def test_sample_weights_weigh_each_example():
    net, y, g = regression()
    weight = np.arange(NUM) / 8
    scores = keras_taylor.score(net.model, (net.x, y, weight), batch_size=7)["hidden"]
    np.testing.assert_allclose(scores, np.square(weight[:, None] * g).mean(0), rtol=1e-6)


def test_class_weights_weigh_each_example():
    net, labels, g = classification("sparse_categorical_crossentropy")
    weight = np.array([0.5, 2, 3])[labels]
    scores = net.score(labels, class_weight={0: 0.5, 1: 2.0, 2: 3.0})
    np.testing.assert_allclose(scores, np.square(weight[:, None] * g).mean(0), rtol=1e-5)


def test_the_oracle_refuses_class_weights():
    net, labels, _ = classification("sparse_categorical_crossentropy")
    with pytest.raises(ValueError) as error:
        net.score(labels, "oracle", class_weight={0: 0.5, 1: 2.0, 2: 3.0})
    assert str(error.value) == (
        "The criterion 'oracle' evaluates the loss, which knows no class weights. Pass weights of the "
        "examples instead: `ds=(x, y, sample_weight)`. Received: class_weight={0: 0.5, 1: 2.0, 2: 3.0}"
    )


def per_example(y, p):
    return keras.losses.sparse_categorical_crossentropy(y, p)


def scalar_mean(y, p):
    return ops.mean(keras.losses.sparse_categorical_crossentropy(y, p))


def scalar_sum(y, p):
    return ops.sum(keras.losses.sparse_categorical_crossentropy(y, p))


@pytest.mark.parametrize(
    "loss",
    [
        "sparse_categorical_crossentropy",
        "SparseCategoricalCrossentropy",
        "crossentropy",
        "ce",
        keras.losses.SparseCategoricalCrossentropy(),
        keras.losses.sparse_categorical_crossentropy,
        per_example,
        scalar_mean,
        scalar_sum,
        ["sparse_categorical_crossentropy"],
        {"head": "sparse_categorical_crossentropy"},
    ],
    ids=name_of_loss,
)
def test_every_kind_of_loss(loss):
    net, labels, g = classification(loss)
    np.testing.assert_allclose(net.score(labels, batch_size=7), np.square(g).mean(0), rtol=1e-5)


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "crossentropy"])
def test_labels_in_a_column(loss):
    net, labels, g = classification(loss, (NUM, 1))
    np.testing.assert_allclose(net.score(labels), np.square(g).mean(0), rtol=1e-5)


@pytest.mark.parametrize("loss", ["categorical_crossentropy", "crossentropy"])
def test_one_hot_labels(loss):
    net, labels, g = classification(loss)
    np.testing.assert_allclose(net.score(np.eye(3)[labels]), np.square(g).mean(0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(NUM,), (NUM, 1)])
@pytest.mark.parametrize(
    "loss", ["binary_crossentropy", "crossentropy", keras.losses.BinaryCrossentropy()], ids=name_of_loss
)
def test_binary_labels_of_either_rank(loss, shape):
    net = Net(outputs=1, activation="sigmoid", seed=7)
    net.weights = [w / 4 for w in net.weights]
    net.model.set_weights([w.astype("float32") for w in net.weights])
    y = np.random.default_rng(9).integers(0, 2, (NUM, 1))
    g = net.gate_derivatives(lambda z: 1 / (1 + np.exp(-z)) - y)
    scores = net.compiled(loss).score(y.reshape(shape), batch_size=7)
    np.testing.assert_allclose(scores, np.square(g).mean(0), rtol=1e-5)


def two_heads(as_dict=False):
    random = np.random.default_rng(2)
    x, w = dyadic(random, NUM, 5), [dyadic(random, *s) for s in ((5, 6), (6,), (6, 2), (2,), (6, 4), (4,))]
    inputs = keras.Input((5,))
    h = layers.Dense(6, activation="relu", name="hidden")(inputs)
    outputs = {"a": layers.Dense(2, name="a")(h), "b": layers.Dense(4, name="b")(h)}
    model = keras.Model(inputs, outputs if as_dict else list(outputs.values()))
    for name, part in zip(("hidden", "a", "b"), (w[:2], w[2:4], w[4:]), strict=True):
        model.get_layer(name).set_weights([v.astype("float32") for v in part])
    y = {"a": dyadic(random, NUM, 2), "b": dyadic(random, NUM, 4)}
    hidden = np.maximum(x @ w[0] + w[1], 0)
    g = {
        "a": hidden * (2 * (hidden @ w[2] + w[3] - y["a"]) / 2 @ w[2].T),
        "b": hidden * (2 * (hidden @ w[4] + w[5] - y["b"]) / 4 @ w[4].T),
    }
    return model, x, y, g


@pytest.mark.parametrize(
    ("as_dict", "loss", "weights", "factors"),
    [
        (False, "mse", None, (1, 1)),
        (False, ["mse", keras.losses.MeanSquaredError(reduction="sum")], [0.5, 2.0], (0.5, 2)),
        (False, {"a": "mse", "b": keras.losses.mean_squared_error}, {"a": 0.5, "b": 2.0}, (0.5, 2)),
        (False, [None, "mse"], None, (0, 1)),
        (True, {"a": "mse", "b": "mse"}, None, (1, 1)),
        (True, {"a": "mse", "b": "mse"}, {"a": 0.5, "b": 2.0}, (0.5, 2)),
        (True, {"b": "mse"}, None, (0, 1)),
    ],
)
def test_losses_of_several_outputs(as_dict, loss, weights, factors):
    model, x, y, g = two_heads(as_dict)
    model.compile("sgd", loss, loss_weights=weights, run_eagerly=EAGER)
    scores = keras_taylor.score(model, (x, y if as_dict else list(y.values())), batch_size=7)["hidden"]
    expected = np.square(factors[0] * g["a"] + factors[1] * g["b"]).mean(0)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.slow
def test_many_short_steps_accumulate_in_float32():
    net = Net(dtype="mixed_bfloat16")
    y = dyadic(np.random.default_rng(9), NUM, 4)
    g = net.gate_derivatives(lambda z: 2 * (z - y) / 4)
    seen = {}

    def spy(statistics):
        seen.update(vars(statistics))
        return statistics.mean_square

    net.model.compile("sgd", "mse")  # not eager: there are many steps
    net.x, y = np.tile(net.x, (64, 1)), np.tile(y, (64, 1))
    scores = net.score(y, spy, batch_size=1)
    assert seen["num_examples"] == seen["num_batches"] == 1280
    np.testing.assert_allclose(scores, np.square(g).mean(0), rtol=3e-2)


@pytest.fixture
def policy(request):
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"], indirect=True)
def test_global_mixed_precision(policy):
    net, y, g = regression()
    before = helpers.fingerprint(net.model)
    np.testing.assert_allclose(net.score(y, batch_size=7), np.square(g).mean(0), rtol=3e-2)
    assert helpers.fingerprint(net.model) == before
    small = keras_taylor.prune(net.model, helpers.random_plan(net.model))
    assert small.get_layer("hidden").dtype_policy.name == policy
    assert type(small.optimizer) is type(net.model.optimizer)
    assert np.isfinite(small.fit(net.x, y, verbose=0).history["loss"]).all()


SLOW_ON_TORCH = [pytest.mark.slow] if BACKEND == "torch" else []  # torch.compile takes a minute


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=SLOW_ON_TORCH) for p in ("float32", "mixed_bfloat16", "mixed_float16")],
    indirect=True,
)
def test_compiled_steps(policy, monkeypatch):
    """XLA on TensorFlow and JAX, `torch.compile` on PyTorch: exact scores, as far as the policy has them."""
    helpers.needs_compiled_steps()
    if policy != "float32":
        helpers.compile_faster(monkeypatch)
    net, y, g = regression()
    net.model.compile("sgd", "mse", jit_compile=True)
    assert net.model.jit_compile is True
    tolerance = 1e-6 if policy == "float32" else 3e-2
    np.testing.assert_allclose(net.score(y, batch_size=10), np.square(g).mean(0), rtol=tolerance)


@pytest.mark.parametrize("policy", ["mixed_bfloat16"], indirect=True)
def test_inputs_are_not_rounded_before_a_float32_layer(policy):
    x = inputs = keras.Input((4,), dtype="float32")
    x = layers.Dense(3, dtype="float32", name="hidden")(x - 1000)
    model = keras.Model(inputs, layers.Dense(2, dtype="float32", name="head")(x))
    x = np.random.default_rng(0).normal(1000, 1, (6, 4)).astype("float32")
    gated = GatedModel(label_model(model))
    assert helpers.relative_difference(helpers.predict(gated, x), helpers.predict(model, x)) < 1e-6


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(7 * index, 7 * index + 7)
        return self.x[part], self.y[part]


@pytest.mark.parametrize("wrap", [lambda x, y: (x, y), Batches], ids=["arrays", "batches"])
@pytest.mark.parametrize("shape", [(5, 1), (5,)], ids=["missing", "added"])
def test_an_axis_of_size_1_at_the_end_may_be_missing_or_added(shape, wrap):
    inputs = keras.Input(shape)
    hidden = layers.Flatten()(layers.Dense(4, activation="relu", name="hidden")(inputs))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy")
    random = np.random.default_rng(0)
    x, y = random.normal(size=(21, *shape)).astype("float32"), random.integers(0, 3, 21)
    other = x[..., 0] if shape == (5, 1) else x[..., None]
    scores = keras_taylor.score(model, wrap(other, y))
    np.testing.assert_allclose(scores["hidden"], keras_taylor.score(model, (x, y))["hidden"], rtol=1e-5)
    smaller = keras_taylor.compress(model, wrap(other, y), 0.2, increment=0.2, verbose=0)
    assert smaller.count_params() < model.count_params()


def endless(batches):
    while True:
        for k in range(len(batches)):
            yield batches[k]


def tensorflow_dataset(x, y):
    return pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices((x, y)).batch(7)


def torch_loader(x, y):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return torch.utils.data.DataLoader(data, batch_size=7)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Batches, {}),
        (lambda x, y: endless(Batches(x, y)), {"steps_per_epoch": 3}),
        (lambda x, y: (ops.convert_to_tensor(x), ops.convert_to_tensor(y)), {}),
        (lambda x, y: ([x], [y]), {}),
        pytest.param(
            tensorflow_dataset,
            {},
            marks=pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.data is tested on TensorFlow"),
        ),
        pytest.param(
            torch_loader,
            {},
            marks=pytest.mark.skipif(BACKEND != "torch", reason="its loader is tested on torch"),
        ),
    ],
    ids=["PyDataset", "generator", "tensors", "lists", "tf.data", "DataLoader"],
)
def test_whatever_fit_takes(make, arguments):
    net, y, g = regression()
    ds = make(net.x.astype("float32"), y.astype("float32"))
    scores = keras_taylor.score(net.model, ds, **arguments)["hidden"]
    np.testing.assert_allclose(scores, np.square(g).mean(0), rtol=1e-6)
    if not arguments:
        first = keras_taylor.score(
            net.model, ds, criterion=lambda s: np.full(6, s.num_examples), num_examples=9
        )
        assert first["hidden"].tolist() == [9] * 6


def test_examples_are_counted_not_batches():
    net, y, g = regression()
    scores = keras_taylor.score(net.model, Batches(net.x, y), num_examples=9)["hidden"]
    np.testing.assert_allclose(scores, np.square(g[:9]).mean(0), rtol=1e-6)


def test_examples_of_arrays_are_spread_evenly():
    net, y, g = regression()
    rows = np.linspace(0, NUM - 1, 9).round().astype(int)
    np.testing.assert_allclose(net.score(y, num_examples=9), np.square(g[rows]).mean(0), rtol=1e-6)


def test_dictionaries_in_and_out():
    model = helpers.case("dictionaries").model
    x = zoo.inputs_of(model, num=6)
    y = helpers.targets_of(model, x)
    scores = keras_taylor.score(model, (x, y), criterion="taylor")
    reversed_x = dict(reversed(x.items()))
    again = keras_taylor.score(model, (reversed_x, y), criterion="taylor", batch_size=4)
    for name, values in scores.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-5)
        assert values.min() > 0


def test_the_oracle_is_brute_force_removal():
    model = zoo.build("residual")
    model.compile("sgd", "mse", run_eagerly=EAGER)
    x = zoo.inputs_of(model, num=6)
    y = helpers.targets_of(model, x)
    scores = keras_taylor.score(model, (x, y), criterion="oracle", include="block0_a", batch_size=4)
    assert set(scores) == {"block0_a"}
    loss = model.evaluate(x, y, verbose=0)
    for unit in range(5):
        kept = tuple(k for k in range(5) if k != unit)
        plan = keras_taylor.Plan({"block0_a": keras_taylor.plans.plan.LayerPlan(5, kept)})
        change = keras_taylor.prune(model, plan).evaluate(x, y, verbose=0) - loss
        assert scores["block0_a"][unit] == pytest.approx(change, rel=1e-3, abs=1e-5 * loss)


def test_oracle_weighs_examples_as_evaluate_does():
    net, y, _ = regression()
    weight = np.arange(NUM) / 8
    scores = keras_taylor.score(net.model, (net.x, y, weight), criterion="oracle", batch_size=7)["hidden"]
    w1, b1, w2, b2 = net.weights
    hidden = np.maximum(net.x @ w1 + b1, 0)

    def loss(mask):
        return (weight[:, None] * np.square((hidden * mask) @ w2 + b2 - y)).mean(1).mean()

    expected = [loss(1 - np.eye(6)[k]) - loss(np.ones(6)) for k in range(6)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_magnitude_by_hand():
    model = zoo.build("residual")
    norms = [
        np.sqrt(np.square(model.get_layer(name).get_weights()[0].astype("float64")).sum((0, 1, 2)))
        for name in ("stem", "block0_b", "block1_b")
    ]
    expected = np.mean(norms, 0)
    scores = keras_taylor.score(model, criterion="magnitude")
    np.testing.assert_allclose(scores["stem"], expected / expected.mean(), rtol=1e-6)
    assert set(scores) == {"stem", "block0_a", "block1_a"}


def test_magnitude_of_channels_that_only_padding_makes_is_zero():
    x = inputs = keras.Input((8, 8, 3))
    x = ops.pad(layers.Conv2D(4, 3, name="conv")(x), [(0, 0), (0, 0), (0, 0), (0, 3)])
    scores = keras_taylor.score(zoo.classified(inputs, x), criterion="magnitude")
    (padded,) = [v for name, v in scores.items() if name != "conv"]
    assert padded.tolist() == [0, 0, 0]


def test_batchnorm_by_hand_and_only_where_there_is_one():
    model = zoo.build("chain")
    scores = keras_taylor.score(model, criterion="batchnorm")
    assert set(scores) == {"conv1"}
    np.testing.assert_allclose(
        scores["conv1"], np.abs(model.get_layer("conv1_bn").get_weights()[0]), rtol=1e-6
    )


def test_random_follows_the_seed():
    model = helpers.case("chain").model
    draws = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        draws.append(keras_taylor.score(model, criterion="random")["conv2"])
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_a_callable_criterion_gets_the_statistics():
    net, y, g = regression()
    scores = net.score(y, criteria.taylor_abs_normalized)
    absolute = np.abs(g).mean(0)
    np.testing.assert_allclose(scores, absolute / np.linalg.norm(absolute), rtol=1e-6)


def test_a_callable_criterion_needs_no_data():
    model = helpers.case("chain").model
    scores = keras_taylor.score(model, criterion=lambda s: s.filter_norms if s.mean is None else None)
    assert set(scores) == {"conv1", "conv2"}


def test_include_and_exclude_choose_the_groups():
    model = helpers.case("residual").model
    assert set(keras_taylor.score(model, criterion="magnitude", exclude="block._a")) == {"stem"}
    assert set(keras_taylor.score(model, criterion="magnitude", include=["block0_a"])) == {"block0_a"}


def test_float64_arrays_and_integer_targets_are_taken():
    net, labels, g = classification("sparse_categorical_crossentropy")
    scores = net.score(labels.astype("int64"))
    np.testing.assert_allclose(scores, np.square(g).mean(0), rtol=1e-5)


# what is refused


def refused(expected, model, ds=None, **arguments):
    with pytest.raises(ValueError) as error:
        keras_taylor.score(model, ds, **arguments)
    assert str(error.value) == expected


def test_a_model_that_is_not_compiled():
    net = Net()
    refused(
        "The model is not compiled with a loss, and criterion='taylor' needs its loss. Call "
        f"`model.compile(optimizer, loss)` first. Received: model={net.model.name!r}, not compiled",
        net.model,
        (net.x, net.x),
    )


def test_a_model_compiled_without_a_loss():
    net = Net()
    net.model.compile("sgd")
    with pytest.raises(ValueError, match=r"^The model is not compiled with a loss"):
        net.score(net.x)


def test_a_model_that_is_not_built():
    model = keras.Sequential([layers.Dense(3)], name="digits")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"^Model 'digits' is not built.*built=False>$"):
        keras_taylor.score(model, (np.ones((2, 3)), np.ones((2, 3))))


def test_no_data():
    net, _, _ = regression()
    refused(
        "The criterion 'taylor' needs data. Pass `ds`, or one of the criteria without data: magnitude, "
        "batchnorm, fpgm, random. Received: ds=None",
        net.model,
    )


def test_empty_data():
    net, y, _ = regression()
    refused(
        "The data set is empty. Expected at least one example. Received: ds with 0 examples",
        net.model,
        (net.x[:0], y[:0]),
    )
    refused(
        "The data set is empty. Expected at least one batch. Received: ds with 0 batches",
        net.model,
        iter([]),
        steps_per_epoch=1,
    )


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: (x, None)])
def test_data_without_targets_gets_labels_from_the_model(make):
    net, y, _ = regression()
    drawn = keras_taylor.score(net.model, make(net.x))
    for name, values in keras_taylor.score(net.model, (net.x, y), labels="model").items():
        np.testing.assert_allclose(drawn[name], values, rtol=1e-5)


def test_data_of_another_shape():
    net, y, _ = regression()
    refused(
        "The data does not fit the model's inputs. Expected shapes [(None, 5)] (batch first). Received: ds "
        "with x of shapes [(None, 4)]",
        net.model,
        (net.x[:, :4], y),
    )


def test_arrays_of_different_lengths():
    net, y, _ = regression()
    refused(
        "The arrays of the data set differ in their number of examples. Received: ds with examples: 20 of x, "
        "19 of y",
        net.model,
        (net.x, y[:19]),
    )


def test_tuples_of_four():
    net, y, _ = regression()
    refused(
        "A tuple of data holds `(x, y)` or `(x, y, sample_weight)`. Received: ds of 4 entries",
        net.model,
        (net.x, y, y, y),
    )


def test_what_is_no_data():
    net, _, _ = regression()
    with pytest.raises(
        ValueError, match=r"^Expected what `model.fit` takes: .* Received: ds=3 \(of type int\)$"
    ):
        keras_taylor.score(net.model, 3)


def test_a_generator_without_steps():
    net, y, _ = regression()
    ds = (batch for batch in [(net.x, y)])
    with pytest.raises(
        ValueError, match=r"^A generator can be read only once, .* Received: ds=<generator .*>$"
    ):
        keras_taylor.score(net.model, ds)


def test_nan_in_the_data_is_named_by_its_index():
    net, y, _ = regression()
    x = net.x.copy()
    x[[13, 17], 2] = np.nan
    refused(
        "The data holds NaN or infinity in 2 of 20 examples. Remove them. Received: x with the first such "
        "example at index 13",
        net.model,
        (x, y),
    )
    y[3] = np.inf
    refused(
        "The data holds NaN or infinity in 1 of 20 examples. Remove them. Received: y with the first such "
        "example at index 3",
        net.model,
        (net.x, y),
    )


@pytest.mark.parametrize("criterion", ["taylor", "oracle"])
def test_nan_in_a_stream_is_named_by_its_batch(criterion):
    net, y, _ = regression()
    x = net.x.copy()
    x[17, 2] = np.nan
    refused(
        "The data holds NaN or infinity. Received: ds with the first in batch 2",
        net.model,
        Batches(x, y),
        criterion=criterion,
    )


@pytest.mark.parametrize("criterion", ["taylor", "oracle"])
def test_nan_in_the_weights_is_named_by_its_layer(criterion):
    model = zoo.build("residual")
    model.compile("sgd", "mse", run_eagerly=EAGER)
    layer = model.get_layer("block0_b")
    layer.set_weights([np.full(w.shape, np.nan) for w in layer.get_weights()])
    x = zoo.inputs_of(model)
    before = helpers.fingerprint(model)
    refused(
        "The output of layer 'block0_b' is NaN or infinite: its weights are, or its values overflow. The "
        "model was not changed. Received: ds, whose batch 0 shows it first",
        model,
        (x, np.zeros((4, 3), "float32")),
        criterion=criterion,
    )
    assert helpers.fingerprint(model) == before


def test_targets_that_do_not_suit_the_loss():
    net = Net().compiled(lambda y, p: ops.log(p - 1e9))
    refused(
        "The loss or its gradient is NaN or infinite although every layer's output is finite: the targets do "
        "not suit the loss. The model was not changed. Received: ds",
        net.model,
        (net.x, np.zeros((NUM, 4))),
    )


@pytest.mark.parametrize("criterion", ["tailor", {}])
def test_an_unknown_criterion(criterion):
    names = {*criteria.LOSS_CRITERIA, *criteria.ACTIVATION_CRITERIA, *criteria.DATA_FREE_CRITERIA}
    assert {"taylor", "log_odds", "magnitude"} <= names
    refused(
        f"Unknown criterion. Expected one of {', '.join(sorted(names))}, or a callable that takes a "
        f"`GroupStatistics` and returns an array `(num_units,)`. Received: criterion={criterion!r}",
        Net().model,
        criterion=criterion,
    )


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'critirion'"):
        keras_taylor.score(Net().model, critirion="taylor")


def test_a_criterion_of_the_wrong_shape():
    def wrong(statistics):
        return np.ones(3)

    refused(
        "The criterion gave no finite score for each unit of group 'hidden'. Expected a finite array of "
        f"shape (6,). Received: criterion={wrong!r}, which returned array([1., 1., 1.], dtype=float32)",
        Net().model,
        criterion=wrong,
    )


COPIES = {
    "copy": lambda scores: scores.copy(),
    "or": lambda scores: scores | {},
    "or from the right": lambda scores: {} | scores,
    "in place": lambda scores: operator.ior(scores.copy(), {}),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scores: pickle.loads(pickle.dumps(scores)),
}


def lopsided_scores():
    """A model, and scores by `taylor` for which the two ranks lead to different plans."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 1, name="dear")(layers.Conv2D(8, 3, name="cheap")(inputs))
    x = layers.Dense(200, name="large")(layers.Flatten()(x))  # units of "dear" save far more than others
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    values = {"cheap": np.full(8, 1.0), "large": np.full(200, 50.0), "dear": np.full(8, 1.5)}
    return model, criteria.Scores(values, "taylor")


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_scores_leads_to_the_same_plan(name, recwarn):
    model, scores = lopsided_scores()
    copied = COPIES[name](scores)
    assert copied.criterion == "taylor" and copied.keys() == scores.keys()
    assert keras_taylor.make_plan(model, copied, 0.2) == keras_taylor.make_plan(model, scores, 0.2)
    assert not [w for w in recwarn if "criterion" in str(w.message)]


@pytest.mark.parametrize("plain", [dict, lambda scores: {**scores}])
def test_a_plain_dict_is_ranked_by_score_and_says_so(plain, recwarn):
    model, scores = lopsided_scores()
    with pytest.warns(UserWarning, match=r"do not say which criterion.*type dict, rank=None$") as found:
        plan = keras_taylor.make_plan(model, plain(scores), 0.2)
    assert found[0].filename == __file__
    plans = {}
    for rank in ("score", "cost"):
        selection = keras_taylor.Selection(rank=rank)
        plans[rank] = keras_taylor.make_plan(model, plain(scores), 0.2, selection=selection)
    evenly = keras_taylor.Selection(scope="layer")
    keras_taylor.make_plan(model, plain(scores), 0.2, selection=evenly)
    assert plan == plans["score"] != plans["cost"] == keras_taylor.make_plan(model, scores, 0.2)
    assert not [w for w in recwarn if "criterion" in str(w.message)]


def test_scoring_checks_itself():
    assert Scoring().criterion is None
    assert Scoring(criteria.taylor, num_examples=1, labels="model").labels == "model"
    for arguments, received in (
        ({"criterion": "tailor"}, "criterion='tailor'"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"labels": "mine"}, "labels='mine'"),
    ):
        with pytest.raises(ValueError, match=rf"Received: {received}$"):
            Scoring(**arguments)


def test_a_criterion_whose_statistics_were_not_gathered():
    net, y, _ = regression()
    with pytest.raises(ValueError, match=r"were not gathered.*by its name.*group 'hidden' without them$"):
        net.score(y, criteria.fisher)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "magnitude", "oracle"])
def test_a_model_from_which_nothing_can_leave_has_no_scores(criterion):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    data = np.ones((8, 4), "float32"), np.zeros((8, 2), "float32")
    assert keras_taylor.score(model, data, criterion=criterion) == {}


CATEGORICAL = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def scores_in_turn(net, y, criterion, **arguments):
    """Scores of a network as it is, and those of a new one with its weights."""
    fresh = Net().compiled(net.model.loss)
    fresh.model.set_weights(net.model.get_weights())
    return [one.score(y, criterion, **arguments) for one in (net, fresh)]


@pytest.mark.parametrize("criterion", ["taylor", "log_odds_probed", "taylor_batch"])
def test_a_second_call_knows_new_weights_data_and_losses(criterion):
    net, y = Net().compiled(CATEGORICAL), np.arange(NUM) % 4
    first = net.score(y, criterion)
    np.testing.assert_array_equal(net.score(y, criterion), first)
    net.model.set_weights([w[::-1] * 0.5 for w in net.model.get_weights()])
    second, expected = scores_in_turn(net, (y + 1) % 4, criterion, batch_size=4)
    np.testing.assert_allclose(second, expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(second, first)
    net.compiled(keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0))
    third, expected = scores_in_turn(net, y, criterion)
    np.testing.assert_allclose(third, expected, rtol=1e-5, atol=1e-7)


def test_a_second_call_knows_new_choices_of_layers_and_functions():
    net, y = Net().compiled(CATEGORICAL), np.arange(NUM) % 4
    net.score(y)
    assert not keras_taylor.score(net.model, (net.x, y), exclude="hidden")
    net.model.get_layer("hidden").activation = keras.activations.tanh
    changed = Net().compiled(CATEGORICAL)
    changed.model.get_layer("hidden").activation = keras.activations.tanh
    np.testing.assert_allclose(net.score(y), changed.score(y), rtol=1e-5)


def test_a_second_call_knows_what_a_layer_was_adapted_to():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(32, 6)).astype("float32"), np.arange(32) % 3

    def adapted(values):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Normalization(),
                keras.layers.Dense(5, activation="relu", name="hidden"),
                keras.layers.Dense(3),
            ]
        )
        model.compile("sgd", CATEGORICAL)
        model.layers[0].adapt(values)
        return model

    model = adapted(x)
    first = keras_taylor.score(model, (x, y))
    model.layers[0].adapt(x * 3 + 1)
    again = keras_taylor.score(model, (x, y))
    expected = keras_taylor.score(adapted(x * 3 + 1), (x, y))
    for name, values in expected.items():
        np.testing.assert_allclose(again[name], values, rtol=1e-5, atol=1e-8)
        assert not np.allclose(again[name], first[name])


def test_a_model_that_was_scored_is_garbage_when_nobody_holds_it():
    net = Net().compiled(CATEGORICAL)
    net.score(np.arange(NUM) % 4)
    held = weakref.ref(net.model)
    del net
    gc.collect()
    assert held() is None


@pytest.mark.parametrize(("limit", "num_models"), [(10**6, 1), (10, 0)])
def test_weights_of_a_large_model_are_not_held_twice(limit, num_models, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_WEIGHTS_KEPT", limit)
    gc.collect()
    before = sum(isinstance(one, GatedModel) for one in gc.get_objects())
    net = Net().compiled(CATEGORICAL)
    scores = [net.score(np.arange(NUM) % 4) for _ in range(2)]
    gc.collect()
    assert sum(isinstance(one, GatedModel) for one in gc.get_objects()) == before + num_models
    np.testing.assert_array_equal(*scores)
