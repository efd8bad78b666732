"""Attention and transformers built of parts: groups, widths and configurations by hand."""

import keras
import numpy as np
import pytest
import zoo
from helpers import BACKEND, predict, relative_difference
from keras import layers, ops

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.cutting.surgery import build_smaller
from keras_taylor.reading.groups import label_model
from keras_taylor.scores.gated_model import GatedModel

pytestmark = pytest.mark.sweep(4)


def groups_of(model):
    return {g.name: (g.num_units, set(g.producers)) for g in label_model(model).groups}


def cut(model, **kept):
    """The model with these units of its groups; the laws hold for it too."""
    zoo.randomized(model)
    channels = label_model(model)
    mask = np.ones(channels.num_units, bool)
    for group in channels.groups:
        if group.name in kept:
            units = np.arange(group.num_units)
            mask[group.start + units] = np.isin(units, list(kept[group.name]))
    small, x = build_smaller(channels, mask)[0], zoo.inputs_of(model)
    gated = GatedModel(channels)
    gated.mask = mask
    assert not mask.all()
    assert relative_difference(predict(small, x), predict(gated, x)) <= 1e-5
    assert relative_difference(predict(small, x), predict(model, x)) > 1e-3
    assert small.count_params() == CostModel(channels)(mask)["params"]
    return small


def read(x, axis):
    """Sums over one axis, whatever the others are."""
    letters = "abcdef"[: len(x.shape)]
    unit = letters[axis]
    rest = letters.replace(unit, "")
    sizes = (None,) * (len(rest) - 1) + (2,)
    return layers.EinsumDense(f"{letters},{unit}z->{rest}z", sizes, name="head")(x)


EQUATIONS = [
    # equation, shape of the input, output_shape, bias_axes, the units' axis, what is left of output_shape
    ("abc,cde->abde", (5, 8), (None, 4, 3), "de", 2, (None, 2, 3)),
    ("btd,ndh->btnh", (5, 8), (5, 4, 3), "h", 2, (5, 2, 3)),
    ("bqm,muh->bquh", (5, 8), (None, 4, 3), None, 2, (None, 2, 3)),
    ("ab,bc->ac", (8,), (6,), "c", 1, (2,)),
    ("ab,bc->ac", (8,), 6, None, 1, (2,)),
    ("abc,cd->abd", (5, 8), (None, 6), "d", 2, (None, 2)),
    ("abc,bd->adc", (5, 8), (6, 8), "d", 1, (2, 8)),
    ("abc,bd->adc", (5, 8), (6, 8), "dc", 1, (2, 8)),
    ("...x,xy->...y", (5, 8), (6,), "y", 2, (2,)),
    ("...x,xy->...y", (3, 5, 8), 6, "y", 3, (2,)),
    ("...x,xyz->...yz", (5, 8), (4, 3), "z", 2, (2, 3)),
    ("ab...,bc->ac...", (5, 8), (6,), "c", 1, (2,)),
    ("abc,bcd->abd", (5, 8), (5, 6), "bd", 2, (5, 2)),
]


@pytest.mark.parametrize(("equation", "shape", "output_shape", "bias_axes", "axis", "left"), EQUATIONS)
def test_units_of_equations(equation, shape, output_shape, bias_axes, axis, left):
    inputs = keras.Input(shape)
    layer = layers.EinsumDense(equation, output_shape, bias_axes=bias_axes, activation="relu", name="made")
    y = layer(inputs)
    model = keras.Model(inputs, read(y, axis))
    assert groups_of(model) == {"made": (y.shape[axis], {"made"})}
    small = cut(model, made=(0, y.shape[axis] - 1))
    assert small.get_layer("made").get_config()["output_shape"] == left
    assert small.get_layer("head").kernel.shape == (2, 2)


@pytest.mark.parametrize("bias_axes", [None, "b", "d", "bd"])
@pytest.mark.parametrize(
    ("equation", "output_shape", "left"),
    [
        ("abc,cd->abd", (6, 7), (3, 7)),
        ("abc,cd->abd", (None, 7), (None, 7)),
        ("abc,bcd->abd", (6, 7), (3, 7)),
        ("abc,cd->adb", (7, 6), (7, 3)),
    ],
)
def test_channels_on_an_axis_that_stays_go_through(equation, output_shape, left, bias_axes):
    if output_shape[0] is None and bias_axes in ("b", "bd"):
        pytest.skip("Keras cannot make a bias of unknown size")
    inputs = keras.Input((4, 3))
    x = layers.Permute((2, 1))(layers.Dense(6, activation="relu", name="stem")(inputs))
    layer = layers.EinsumDense(equation, output_shape, bias_axes=bias_axes, name="beside")
    y = layer(x)
    made = equation.partition("->")[2]
    constant = np.random.default_rng(3).normal(size=(6, 2)).astype("float32")
    y = ops.einsum(f"{made},bz->{made.replace('b', '')}z", y, constant)
    model = keras.Model(inputs, y)
    assert groups_of(model) == {"stem": (6, {"stem"})}
    small = cut(model, stem=(0, 2, 5)).get_layer("beside")
    assert small.get_config()["output_shape"] == left


def test_an_axis_that_is_summed_over_alone_may_lose_channels():
    inputs = keras.Input((4, 3))
    x = layers.Permute((2, 1))(layers.Dense(6, activation="relu", name="stem")(inputs))
    layer = layers.EinsumDense("abc,cd->ad", (5,), bias_axes="d", name="summed")
    model = keras.Model(inputs, layers.Dense(2, name="head")(layer(x)))
    assert groups_of(model) == {"stem": (6, {"stem"}), "summed": (5, {"summed"})}
    assert cut(model, stem=(1, 4), summed=(3, 4)).get_layer("summed").kernel.shape == (4, 2)


@pytest.mark.parametrize("activation", ["softmax", lambda x: ops.flip(x, -1)])
def test_an_activation_that_mixes_locks(activation):
    inputs = keras.Input((5, 8))
    layer = layers.EinsumDense("abc,cd->abd", (None, 6), activation=activation, name="made")
    assert groups_of(keras.Model(inputs, read(layer(inputs), 2))) == {}


def attention(inputs, layer, **arguments):
    """The inner calls of a layer of Keras, on symbolic tensors."""
    layer.build(inputs.shape, inputs.shape)
    outputs = layer.call(inputs, inputs, **arguments)
    return keras.Model(inputs, keras.tree.flatten(outputs)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_the_inside_of_multi_head_attention(dropout, masked):
    inputs = keras.Input((5, 8))
    arguments = {"attention_mask": np.tril(np.ones((1, 5, 5), "bool"))} if masked else {}
    model = attention(inputs, layers.MultiHeadAttention(4, 3, value_dim=3, dropout=dropout), **arguments)
    assert label_model(model).unknown == []
    ((name, (num, producers)),) = groups_of(model).items()
    assert num == 4
    assert producers == {"query", "key", "value"}
    small = cut(model, **{name: (1, 2, 3)})
    for part in ("query", "key", "value"):
        assert small.get_layer(part).kernel.shape == (8, 3, 3)
        assert small.get_layer(part).bias.shape == (3, 3)
    assert small.get_layer("attention_output").kernel.shape == (3, 3, 8)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kept", [(0, 2), (1,)])
def test_the_inside_of_grouped_query_attention(dropout, kept):
    inputs = keras.Input((5, 8))
    arguments = {} if dropout else {"use_causal_mask": True}
    model = attention(inputs, layers.GroupQueryAttention(3, 6, 3, dropout=dropout), **arguments)
    assert label_model(model).unknown == []
    ((name, (num, producers)),) = groups_of(model).items()
    assert num == 3
    assert producers == {"query", "key", "value"}
    small = cut(model, **{name: kept})
    assert small.get_layer("key").kernel.shape == (8, len(kept), 3)
    assert small.get_layer("query").kernel.shape == (8, 2 * len(kept), 3)
    assert small.get_layer("attention_output").kernel.shape == (2 * len(kept), 3, 8)


def attending(layer):
    """A model whose attention layer stands between layers that make channels, without a residual sum."""
    x = inputs = keras.Input((5, 3))
    x = layers.Dense(8, activation="relu", name="stem")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(layer(x, x))))


@pytest.mark.parametrize("output_shape", [None, 8, (2, 4)])
def test_what_attention_puts_out_and_what_it_reads_leave_apart(output_shape):
    layer = layers.MultiHeadAttention(2, 3, output_shape=output_shape, name="attention")
    model = attending(layer)
    num = 2 if output_shape == (2, 4) else 8
    groups = groups_of(model)
    assert groups["stem"] == (8, {"stem"})
    assert groups["attention/attention_output"] == (num, {"attention/attention_output"})
    small = cut(model, stem=(0, 1, 4, 5, 7), **{"attention/attention_output": (1,)}).get_layer("attention")
    assert small.get_config()["output_shape"] == ((1, 4) if num == 2 else (1,))
    assert small.output.shape == (None, 5, *((1, 4) if num == 2 else (1,)))
    assert cut(model, stem=(0, 4)).get_layer("attention").output.shape[2:] == layer.output.shape[2:]


def test_attention_that_stays_as_wide_as_its_query_keeps_the_default_output_shape():
    model = attending(layers.MultiHeadAttention(2, 3, name="attention"))
    small = cut(model, **{"stem": (0, 4), "attention/attention_output": (5, 6)})
    assert small.get_layer("attention").get_config()["output_shape"] is None


def test_attention_with_grouped_queries_stays_as_wide_as_its_query():
    model = attending(layers.GroupQueryAttention(3, 4, 2, name="attention"))
    assert groups_of(model)["stem"] == (8, {"stem", "attention/attention_output"})
    small = cut(model, stem=(0, 4, 6)).get_layer("attention")
    assert small.output.shape == (None, 5, 3)


def test_attention_with_grouped_queries_locks_what_has_to_be_as_wide_as_inputs_of_the_model():
    x, y = inputs = keras.Input((5, 8)), keras.Input((4, 3))
    y = layers.Dense(8, name="values")(y)
    x = layers.GroupQueryAttention(3, 4, 2, name="attention")(x, y)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Flatten()(x)))
    reasons = {g.name: g.reason for g in label_model(model).locked_groups}
    assert reasons["values"] == "has to be as wide as the query of 'attention'"
    assert groups_of(model).keys().isdisjoint({"values", "attention/attention_output"})


@pytest.mark.parametrize(("num_keys", "num_units"), [(1, 8), (4, 2), (8, 8)])
def test_fused_attention_shares_keys(num_keys, num_units):
    if num_keys == 1 and BACKEND == "tensorflow":
        pytest.skip("Keras on TensorFlow cannot share a single key")
    inputs = keras.Input((5, 8))
    q, k, v = (zoo.heads(inputs, n, name) for n, name in ((8, "q"), (num_keys, "k"), (num_keys, "v")))
    model = keras.Model(inputs, read(ops.dot_product_attention(q, k, v), 2))
    ((name, (num, producers)),) = groups_of(model).items()
    assert num == num_units
    assert producers == ({"q"} if num_keys == 1 else {"q", "k", "v"})
    small = cut(model, **{name: (1,)})
    assert small.get_layer("q").kernel.shape[1] == (6 if num_keys == 4 else 1)
    assert small.get_layer("k").kernel.shape[1] == (3 if num_keys == 4 else 1)


def test_scores_of_one_head_lose_dimensions_on_both_sides():
    inputs = keras.Input((5, 8))
    q, k, v = (layers.Dense(n, name=name)(inputs) for n, name in ((6, "q"), (6, "k"), (4, "v")))
    scores = ops.softmax(ops.matmul(q, ops.transpose(k, (0, 2, 1))) / 2.5)
    model = keras.Model(inputs, layers.Dense(2, name="head")(ops.matmul(scores, v)))
    groups = groups_of(model)
    assert sorted((num, *sorted(names)) for num, names in groups.values()) == [(4, "v"), (6, "k", "q")]
    (scored,) = (name for name, (num, _) in groups.items() if num == 6)
    small = cut(model, **{scored: (0, 3, 5), "v": (1, 2)})
    assert [small.get_layer(name).units for name in "qkv"] == [3, 3, 2]


def test_products_with_constants():
    random = np.random.default_rng(3)
    matrix = random.normal(size=(6, 4)).astype("float32")
    scale = random.normal(size=(6, 6)).astype("float32")
    inputs = keras.Input((5, 8))
    x = layers.Dense(6, activation="relu", name="stem")(inputs)
    x = ops.einsum("bti,ij->btj", ops.einsum("bti,ti->bti", x, scale[:5]), matrix)
    y = ops.matmul(layers.Dense(6, name="other")(inputs), matrix)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x + y))
    assert {name: num for name, (num, _) in groups_of(model).items()} == {"stem": 6, "other": 6}
    cut(model, stem=(0, 2, 5), other=(1, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.matmul(x, np.ones((6, 4), "float32")),
        lambda x: ops.repeat(x, 2, axis=1),
        lambda x: ops.repeat(x, 2, axis=-1),
        lambda x: ops.tile(x, (1, 2, 3)),
        lambda x: ops.tile(x, (2,)),
        lambda x: ops.roll(x, 2, axis=1),
        lambda x: ops.flip(x, axis=1),
        lambda x: ops.cumsum(x, axis=1),
        lambda x: ops.stack([x, 2 * x], axis=2),
        lambda x: ops.add(*ops.unstack(x, axis=1)[:2]),
        lambda x: ops.einsum("bti,bsi->btsi", x, x + 1),
        lambda x: ops.einsum("bti,bsi->bts", x, x + 1),
        lambda x: ops.einsum("...i,...i->...i", x, x),
        lambda x: ops.matmul(np.ones((7, 5), "float32"), x),
        lambda x: ops.dot(x, np.ones((6, 4), "float32")),
        lambda x: ops.where(ops.logical_not(ops.isfinite(x)), 0.0, x),
        lambda x: layers.Softmax(axis=1)(x, mask=x > 0),
        lambda x: ops.repeat(x, 2, axis=0),
        lambda x: ops.tile(x, (2, 1, 1)),
        lambda x: ops.stack([x, x], axis=0),
        lambda x: ops.einsum("bti->tbi", x),
    ],
)
def test_what_lets_channels_leave(function):
    inputs = keras.Input((5, 8))
    x = layers.Dense(6, activation="tanh", name="stem")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(function(x)))
    assert label_model(model).unknown == []
    assert groups_of(model) == {"stem": (6, {"stem"})}
    cut(model, stem=(0, 3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.repeat(x, [1, 2, 1, 1, 1, 1], axis=-1),
        lambda x: ops.roll(x, 1),
        lambda x: ops.cumsum(x, axis=-1),
        lambda x: ops.stack(ops.unstack(x, axis=-1), axis=1),
        lambda x: ops.einsum("bti,bsj->btisj", x, x),
        lambda x: ops.einsum("bii->bi", ops.pad(x, [(0, 0), (0, 1), (0, 0)])),
        lambda x: ops.tril(x),
    ],
)
def test_what_keeps_channels(function):
    inputs = keras.Input((5, 8))
    x = layers.Dense(6, activation="tanh", name="stem")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(function(x)))
    assert groups_of(model) == {}


def test_embedding_loses_dimensions_and_keeps_its_mask():
    model = zoo.build("embedding")
    assert groups_of(model) == {"tokens": (8, {"tokens", "project"}), "expand": (5, {"expand"})}
    small = cut(model, tokens=(0, 1, 7), expand=(2, 3))
    tokens = small.get_layer("tokens")
    assert (tokens.output_dim, tokens.mask_zero) == (3, True)
    assert tokens.embeddings.shape == (zoo.VOCABULARY, 3)
    assert small.get_layer("pool").supports_masking


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_read_what_they_make(tied):
    inputs = keras.Input((6,), dtype="int32")
    table = layers.ReversibleEmbedding(zoo.VOCABULARY, 8, tie_weights=tied, name="table")
    x = table(inputs)
    x = x + layers.Dense(8, name="project")(layers.Dense(5, "relu", name="expand")(x))
    model = keras.Model(inputs, table(x, reverse=True))
    assert groups_of(model) == {"table": (8, {"table", "project"}), "expand": (5, {"expand"})}
    small = cut(model, table=(0, 4, 7))
    assert small.get_layer("table").output_dim == 3
    assert [w.shape for w in small.get_layer("table").weights][1:] == ([] if tied else [(3, zoo.VOCABULARY)])


def test_magnitudes_of_heads_and_embeddings():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(zoo.VOCABULARY, 8, name="tokens")(inputs)
    model = zoo.randomized(keras.Model(inputs, read(zoo.heads(x, 4, "query"), 2)))
    scores = keras_taylor.score(model, criterion="magnitude")
    for name, axis in (("tokens", 1), ("query", 1)):
        kernel = keras.ops.convert_to_numpy(model.get_layer(name).weights[0])
        norms = np.sqrt(np.square(np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)).sum(1))
        np.testing.assert_allclose(scores[name], norms / norms.mean(), rtol=1e-5)


def test_flops_of_attention():
    projections = 3 * 2 * 5 * 8 * 12 + 2 * 5 * 12 * 8
    products = 2 * (2 * 4 * 5 * 5 * 3) + 60 + 3 * 100  # scores and values, the scale, softmax
    rest = 40 + 8 * 40 + 2 * (2 * 5 * 8 * 7) + 40 + 2 * 8 * 3
    assert CostModel(label_model(zoo.build("attention_parts")))()["flops"] == projections + products + rest


def test_flops_of_fused_attention_are_those_of_its_parts():
    inputs = keras.Input((5, 8))
    q, k, v = (zoo.heads(inputs, num, name) for num, name in ((8, "q"), (4, "k"), (4, "v")))
    channels = label_model(keras.Model(inputs, read(ops.dot_product_attention(q, k, v), 2)))
    costs = CostModel(channels)
    head = 2 * 8 * 5 * 3 * 2
    assert costs()["flops"] == 2 * 5 * 8 * (24 + 12 + 12) + 2 * 8 * 5 * 5 * (3 + 3) + head
    assert costs(np.array([True, False]))["flops"] == costs()["flops"] * 3 / 4


@pytest.mark.parametrize("name", ["attending", "transformer"])
def test_gate_derivatives_are_those_of_the_loss(name):
    """Tensors that are query, key and value at once are counted once for each."""
    model = zoo.build(name)
    model.compile("sgd", ["mse"] * len(model.outputs))
    x = zoo.inputs_of(model, 8)
    targets = [np.zeros(y.shape, "float32") for y in predict(model, x)]
    scores = keras_taylor.score(model, (x, targets), criterion=lambda statistics: statistics.mean)
    channels = label_model(model)
    gated = GatedModel(channels)

    def loss(unit, value):
        mask = np.ones(channels.num_units)
        mask[unit] = value
        gated.mask = mask
        return sum(np.square(y, dtype=np.float64).mean() for y in predict(gated, x))

    step = 0.02
    for group in channels.groups:
        units = range(group.start, group.start + group.num_units)
        wanted = [(loss(unit, 1 + step) - loss(unit, 1 - step)) / (2 * step) for unit in units]
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(scores[group.name] / scale, wanted / scale, atol=3e-3, err_msg=group.name)
