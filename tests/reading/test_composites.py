"""Layers that stay closed for sequences of any length, and lose units inside."""

import functools
import os
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
import zoo
from helpers import case, predict, relative_difference
from keras import layers

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.cutting.refitting import refit
from keras_taylor.cutting.surgery import build_smaller_compiled
from keras_taylor.plans.plan import LayerPlan
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.rules.attention import inner_layers
from keras_taylor.scores.gated_model import GatedModel

pytestmark = pytest.mark.sweep(4)


def around(block, length=None):
    """A model with a decoder block between an embedding and a head."""
    inputs = keras.Input((length,), dtype="int32")
    x = block(layers.Embedding(zoo.VOCABULARY, 8, name="embed")(inputs))
    model = keras.Model(inputs, layers.Dense(zoo.VOCABULARY, name="head")(x))
    return zoo.randomized(model)


def tokens(length, num=4):
    return np.random.default_rng(0).integers(0, zoo.VOCABULARY, (num, length)).astype("int32")


class Derived(zoo.Decoder):
    """The size of a head follows from their number."""

    def __init__(self, num_heads, width, **kwargs):
        kwargs.pop("num_groups", None)
        super().__init__(num_heads, 1, kwargs.pop("size", 12 // num_heads), width, **kwargs)

    def get_config(self):
        return {k: v for k, v in super().get_config().items() if k not in ("num_groups", "size")}


class Scaled(zoo.Decoder):
    """Its outputs also depend on the number of heads in another way."""

    def call(self, x, padding_mask=None):
        return super().call(x) * (1 + self.num_heads)


class Forgetful(zoo.Decoder):
    """Its `get_config` is wrong, like those of some layers of KerasHub."""

    def get_config(self):
        return {**super().get_config(), "rate": self.rate}


class Incomplete(zoo.Decoder):
    """Its `get_config` leaves out an argument that `__init__` needs."""

    def get_config(self):
        return {k: v for k, v in super().get_config().items() if k != "num_groups"}


class Rounded(zoo.Decoder):
    """Only some configuration values give its hidden layers the size that they have."""

    def __init__(self, num_heads, num_groups, size, width, **kwargs):
        super().__init__(num_heads, num_groups, size, -(-width // 8) * 8, **kwargs)


class Counting(zoo.Decoder):
    """It computes something else for each sequence length."""

    def call(self, x, padding_mask=None):
        y = super().call(x)
        for _ in range(x.shape[1] or 0):
            y = y * 0.5
        return y

    def compute_output_shape(self, shape):
        return shape


def test_the_smaller_model_has_the_same_layers_and_takes_any_length():
    model, small = case("open_decoder").model, case("open_decoder").small
    first = small.get_layer("first")
    assert type(first) is zoo.Decoder and type(small.get_layer("twice")) is zoo.Decoder
    assert first.num_heads < 3 and first.width < 20 and first.width == 2 * first.up[0].units
    assert (first.num_groups, first.size) == (1, 4)
    assert [x.shape for x in small.inputs] == [x.shape for x in model.inputs] == [(None, None)] * 2
    labeled = label_model(model)
    gated = GatedModel(labeled)
    gated.mask = kept_units(labeled, case("open_decoder").plan)
    x = {"tokens": tokens(11), "mask": np.ones((4, 11), "int32")}
    assert relative_difference(predict(small, x), predict(gated, x)) <= 1e-5


def test_gates_inside_exist_only_while_the_model_runs():
    model = case("open_decoder").model
    gated = GatedModel(label_model(model))
    x = case("open_decoder").x
    before = predict(model, x)
    gated.mask = np.zeros(gated.mask.shape)
    closed = predict(gated, x)
    copy = gated.network.copy_of(model.get_layer("first"))
    for layer in (*inner_layers(copy), *inner_layers(model.get_layer("first"))):
        assert "call" not in vars(layer) and "symbolic_call" not in vars(layer)
    np.testing.assert_array_equal(predict(model, x)[0], before[0])
    assert relative_difference(closed, before) > 0.1


def test_scores_are_the_derivatives_of_the_gates_inside():
    model = around(zoo.Decoder(3, 1, 4, 10, name="block"))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = tokens(5, num=8)
    scores = keras_taylor.score(model, (x, x), criterion=lambda s: s.mean * s.num_examples)
    labeled = label_model(model)
    gated = GatedModel(labeled)

    def loss(mask):
        gated.mask = mask
        each = keras.losses.sparse_categorical_crossentropy(x, predict(gated, x)[0], from_logits=True)
        return float(keras.ops.sum(keras.ops.mean(each, axis=-1)))

    for group in labeled.groups:
        for unit in range(group.num_units):
            mask, step = np.ones(labeled.num_units), 1e-2
            mask[group.start + unit] = 1 + step
            above = loss(mask)
            mask[group.start + unit] = 1 - step
            slope = (above - loss(mask)) / (2 * step)
            np.testing.assert_allclose(scores[group.name][unit], slope, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Derived(3, 20, name="block"), "no configuration values count these alone"),
        (Scaled(3, 1, 4, 20, name="block"), "its outputs change when it is built with fewer of these"),
        (zoo.Decoder(4, 2, 4, 20, name="block"), "units that share it would be divided differently without"),
    ],
    ids=["derived", "scaled", "shared"],
)
def test_heads_that_cannot_leave_have_a_reason(block, reason):
    groups = {group.name: group for group in keras_taylor.analyze(around(block)).groups}
    assert groups["block/up0"].prunable and groups["block/up0"].num_units == 10
    assert groups["block/query"].reason.startswith(reason)
    assert groups["block/query"].reason.endswith("('block')")


def test_layers_that_are_alike_are_understood_once_and_no_weights_are_drawn(monkeypatch):
    made = []

    def analyze(num_layers):
        class Counted(zoo.Decoder):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                made[-1] += 1

        made.append(0)
        inputs = keras.Input((None,), dtype="int32")
        x = layers.Embedding(zoo.VOCABULARY, 8)(inputs)
        for number in range(num_layers):
            x = Counted(3, 1, 4, 20, name=f"block_{number}")(x)
        model = keras.Model(inputs, layers.Dense(zoo.VOCABULARY)(x))
        with monkeypatch.context() as patch:
            patch.setattr(keras.initializers.GlorotUniform, "__call__", lambda *_, **__: pytest.fail("drawn"))
            made[-1] = 0
            groups = keras_taylor.analyze(model).groups
        assert [group.prunable for group in groups].count(True) == 2 * num_layers

    analyze(1)
    analyze(3)
    assert made[0] == made[1] > 0


@pytest.mark.parametrize("cls", [Rounded, Counting])
def test_a_layer_that_differs_when_built_again_stays_closed(cls):
    model = around(cls(1, 1, 4, 16, name="block"))
    analysis = keras_taylor.analyze(model)
    assert analysis.unknown == ("block",) and analysis.reachable["params"] == 0
    (locked,) = (group for group in analysis.groups if group.name == "embed")
    assert locked.reason.startswith(f"read by {cls.__name__}, which stays closed: ")


@pytest.mark.parametrize(("cls", "said"), [(Forgetful, "fails "), (Incomplete, "leaves out `num_groups`. ")])
def test_a_layer_with_an_incomplete_configuration_is_made_from_its_attributes(cls, said):
    model = around(cls(3, 1, 4, 20, name="block"))
    with pytest.warns(UserWarning, match=f"The `get_config` of class `{cls.__name__}` {said}"):
        small = helpers.check_law_two(model, tokens(6))
    assert small.get_layer("block").width < 20


def test_flops_are_counted_where_the_length_is_known():
    block = functools.partial(zoo.Decoder, 3, 1, 4, 20, name="block")
    assert CostModel(label_model(around(block())))()["flops"] is None
    model = around(block(), length=6)
    plan = helpers.random_plan(model)
    small = keras_taylor.prune(model, plan)
    assert plan.before["flops"] > plan.after["flops"] == CostModel(label_model(small))()["flops"] > 0
    assert small.input_shape == (None, 6)


def test_magnitudes_inside_are_those_of_the_kernels():
    model = around(zoo.Decoder(3, 1, 4, 20, name="block"))
    scores = keras_taylor.score(model, criterion="magnitude")
    block = model.get_layer("block")
    kernels = [keras.ops.convert_to_numpy(part.kernel) for part in block.up]
    expected = np.mean([np.linalg.norm(kernel, axis=0) for kernel in kernels], axis=0)
    found = scores["block/up0"]  # scaled within the group
    np.testing.assert_allclose(found / found.max(), expected / expected.max(), rtol=1e-5)


def test_a_wrapper_trains_and_prunes_inside():
    model = around(zoo.Decoder(3, 1, 4, 20, name="block"))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    prunable = keras_taylor.PrunableModel(model)
    x = tokens(6, num=16)
    prunable.fit(x, x, verbose=0)
    assert prunable.prune(0.2) > 0
    small = prunable.strip()
    assert small.count_params() <= 0.8 * model.count_params()
    assert relative_difference(predict(small, tokens(9)), predict(prunable, tokens(9))) <= 1e-5


@pytest.mark.slow
def test_compress_shrinks_a_decoder_and_its_file_loads_with_its_class(tmp_path):
    model = around(zoo.Decoder(3, 1, 4, 40, name="block"))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = tokens(6, num=64)
    small = keras_taylor.compress(model, (x, x), 0.3, epochs=1, verbose=0)
    assert small.count_params() <= 0.7 * model.count_params()
    small.save(tmp_path / "small.keras")
    np.savez(tmp_path / "data.npz", x=tokens(9), y=predict(small, tokens(9))[0])
    code = (
        "import sys, keras, numpy as np, zoo; folder = sys.argv[1]; data = np.load(folder + '/data.npz'); "
        "y = keras.models.load_model(folder + '/small.keras').predict(data['x'], verbose=0); "
        "np.testing.assert_allclose(y, data['y'], rtol=1e-5, atol=1e-5); "
        "assert 'keras_taylor' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(zoo.__file__)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)


def test_kept_units_inside_take_over_from_a_removed_unit():
    model = around(zoo.Decoder(3, 1, 4, 20, name="block"))
    block = model.get_layer("block")
    for part, factor in zip(block.up, (1, 2), strict=True):
        kernel, bias = (np.array(keras.ops.convert_to_numpy(w)) for w in part.weights)
        kernel[:, 9], bias[9] = factor * kernel[:, 0], factor * bias[0]
        part.kernel.assign(kernel)
        part.bias.assign(bias)
    x = tokens(7, num=64)
    plan = keras_taylor.Plan({"block/up0": LayerPlan(10, tuple(range(9)))})
    small = keras_taylor.prune(model, plan)
    repaired = keras_taylor.repair(small, model, plan, x)
    wanted = predict(model, x)
    assert relative_difference(predict(small, x), wanted) > 0.05
    assert relative_difference(predict(repaired, x), wanted) < 0.005
    assert [type(layer) for layer in repaired.layers] == [type(layer) for layer in model.layers]


def test_inner_projections_that_lost_heads_are_refitted():
    model = around(zoo.Decoder(3, 1, 4, 20, name="block"))
    labeled = label_model(model)
    kept = np.ones(labeled.num_units, bool)
    kept[[0, 4]] = False
    x = tokens(7, num=64)
    small = build_smaller_compiled(labeled, kept)
    repairs = {one.name: one for one in refit(labeled, kept, small, [x])}
    assert repairs["block/merge"].error_after < repairs["block/merge"].error_before
    assert repairs["block/down"].reason is None or "held-out" in repairs["block/down"].reason
