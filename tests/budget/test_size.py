"""What grows with a network grows with it in line: calls, recursion, copies of weights."""

import cProfile
import inspect
import pstats
import sys

import keras
import numpy as np
import pytest

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model
from keras_taylor.support import arrays

pytestmark = pytest.mark.sweep(3)


def residual_net(blocks):
    x = inputs = keras.Input((2, 2, 3))
    x = keras.layers.Conv2D(4, 1)(x)
    for _ in range(blocks):
        y = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 1, use_bias=False)(x))
        x = keras.layers.Add()([keras.layers.Conv2D(4, 1)(keras.layers.ReLU()(y)), x])
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


def concatenating_net():
    x = inputs = keras.Input((4, 4, 3))
    for width in (5, 4, 3):
        x = keras.layers.Concatenate()([x, keras.layers.Conv2D(width, 3, padding="same")(x)])
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))


def cut(model):
    keras_taylor.analyze(model)
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    return keras_taylor.prune(model, plan), plan


@pytest.fixture
def recursion_limit():
    """Sets how many more frames than now there may be."""
    before = sys.getrecursionlimit()
    yield lambda more: sys.setrecursionlimit(len(inspect.stack(0)) + more)
    sys.setrecursionlimit(before)


def test_depth_needs_no_recursion(recursion_limit):
    cut(residual_net(1))  # imports what is imported late
    model = residual_net(80)
    recursion_limit(200)
    limit = sys.getrecursionlimit()
    with pytest.raises(RecursionError):  # Keras itself
        keras.Model(model.inputs, model.outputs)
    small, plan = cut(model)
    assert sys.getrecursionlimit() == limit
    assert small.count_params() == plan.after["params"]


def test_a_deep_sequential_model_needs_no_recursion(recursion_limit):
    layers = [keras.layers.Dense(4) for _ in range(300)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    cut(keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)]))
    recursion_limit(200)
    small, plan = cut(model)
    assert small.count_params() == plan.after["params"]


def num_calls(function):
    with cProfile.Profile() as profile:
        function()
    return pstats.Stats(profile).total_calls


def test_calls_grow_in_line_with_depth():
    models = [residual_net(blocks) for blocks in (10, 20, 40)]
    scores = [keras_taylor.score(model, criterion="magnitude") for model in models]
    steps = {
        "analyze": lambda model, _: keras_taylor.analyze(model),
        "score": lambda model, _: keras_taylor.score(model, criterion="magnitude"),
        "plan": lambda model, scores: keras_taylor.make_plan(model, scores, 0.3),
        "prune": lambda model, scores: keras_taylor.prune(model, keras_taylor.make_plan(model, scores, 0.3)),
    }
    for name, step in steps.items():
        step(models[0], scores[0])
        few, some, many = (
            num_calls(lambda m=m, s=s, step=step: step(m, s)) for m, s in zip(models, scores, strict=True)
        )
        assert many - some <= 2.1 * (some - few), name


@pytest.mark.parametrize("make", [lambda: residual_net(3), concatenating_net])
def test_costs_of_each_group_alone(make):
    channels = label_model(make())
    costs = CostModel(channels)
    for number, alone in zip(
        (1, None), (costs.with_one_group_cut(num_removed=1), costs.with_one_group_cut()), strict=True
    ):
        for group, found in zip(channels.groups, alone, strict=True):
            kept = np.ones(channels.num_units, bool)
            stop = group.start + (group.num_units if number is None else 1 + number)
            kept[group.start + 1 : stop] = False
            assert found == costs(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_copies_in_blocks(monkeypatch, dtype):
    monkeypatch.setattr(arrays, "BLOCK_BYTES", 64)
    random, taken = np.random.default_rng(0), []
    convert = arrays.ops.convert_to_numpy
    monkeypatch.setattr(arrays.ops, "convert_to_numpy", lambda x: taken.append(x.shape) or convert(x))
    for shape in [(3, 3, 40, 30), (700, 3), (3, 700), (2, 3)]:
        values = random.integers(-100, 100, shape)
        variable = keras.Variable(values, dtype=dtype, trainable=False)
        some = [random.random(size) < 0.6 for size in shape]
        none = np.zeros(shape[0], bool)
        for masks in [(), (None, some[1]), tuple(some), (none, *some[1:])]:
            expected = values
            for axis, mask in enumerate(masks):
                expected = expected if mask is None else np.compress(mask, expected, axis)
            taken.clear()
            found = arrays.copy_kept(variable, masks)
            sizes = [np.prod(s) for s in taken]
            assert np.array_equal(np.asarray(convert(found), np.float32), expected)
            assert len(sizes) == 1 or max(sizes) <= max(64 // 4, np.prod(shape) // max(shape))


def test_what_a_layer_assigns_when_built_is_not_kept():
    class Doubling(keras.layers.Dense):
        def build(self, shape):
            super().build(shape)
            self.kernel.assign(keras.ops.ones(self.kernel.shape))

    keras_taylor.register_rule(Doubling, like=keras.layers.Dense)
    model = keras.Sequential([keras.Input((3,)), Doubling(4, name="first"), keras.layers.Dense(2)])
    kernel = np.arange(12, dtype="float32").reshape(3, 4)
    model.get_layer("first").kernel.assign(kernel)
    small = keras_taylor.prune(model, keras_taylor.Plan())
    assert np.array_equal(keras.ops.convert_to_numpy(small.get_layer("first").kernel), kernel)
