"""Scores pass every kind of optimizer unharmed; its state survives a cut."""

import keras
import numpy as np
import pytest
import zoo
from helpers import BACKEND, compile_faster, needs_compiled_steps

import keras_taylor

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam

pytestmark = pytest.mark.sweep(5)


def plain_net(policy=None, filters=(5, 4), **compile_arguments):
    """No dropout, and BatchNorm frozen: scores while training are those of a scoring pass."""
    layers = [
        keras.Input((6, 6, 2)),
        keras.layers.Conv2D(filters[0], 3, activation="relu", dtype=policy, name="first"),
        keras.layers.BatchNormalization(dtype=policy, trainable=False, name="norm"),
        keras.layers.Conv2D(filters[1], 3, activation="relu", dtype=policy, name="second"),
        keras.layers.Flatten(dtype=policy),
        keras.layers.Dense(3, dtype=policy, name="head"),
        keras.layers.Activation("linear", dtype="float32"),
    ]
    model = keras.Sequential(layers)
    if policy:
        model.dtype_policy = keras.DTypePolicy(policy)
    arguments = {
        "optimizer": SGD(0.0),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    model.compile(**{**arguments, **compile_arguments})
    return model


def some_data(num=44):
    random = np.random.default_rng(1)
    return random.normal(size=(num, 6, 6, 2)).astype("float32"), random.integers(0, 3, num)


def scores_while_training(model, batch_size=8, **fit_arguments):
    prunable = keras_taylor.PrunableModel(model)
    x, y = some_data()
    prunable.fit(x, y, batch_size=batch_size, verbose=0, **fit_arguments)
    return prunable.scores


def assert_scores(received, expected, tolerance=1e-5):
    assert received.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(received[name], values, rtol=tolerance, err_msg=name)


OPTIMIZERS = {
    "plain": lambda: SGD(0.0),
    "accumulation": lambda: SGD(0.0, gradient_accumulation_steps=4),
    "average": lambda: SGD(0.0, use_ema=True, ema_momentum=0.5),
    "average written back": lambda: SGD(0.0, use_ema=True, ema_overwrite_frequency=2),
    "both": lambda: Adam(0.0, use_ema=True, gradient_accumulation_steps=2),
    "clipped": lambda: SGD(0.0, clipnorm=1e-3),
    "clipped together": lambda: SGD(0.0, global_clipnorm=1e-3),
    "decay": lambda: keras.optimizers.AdamW(0.0, weight_decay=0.5),
    "fixed loss scale": lambda: SGD(0.0, loss_scale_factor=256.0),
    "dynamic loss scale": lambda: keras.optimizers.LossScaleOptimizer(Adam(0.0), dynamic_growth_steps=2),
    "scale and accumulation": lambda: keras.optimizers.LossScaleOptimizer(
        SGD(0.0, gradient_accumulation_steps=4, use_ema=True)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scores_are_those_of_a_scoring_pass_whatever_the_optimizer(name):
    model = plain_net(optimizer=OPTIMIZERS[name]())
    expected = keras_taylor.score(model, some_data())
    assert_scores(scores_while_training(model), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 44])
def test_scores_do_not_depend_on_the_batch_size(batch_size):
    model = plain_net()
    assert_scores(scores_while_training(model, batch_size), keras_taylor.score(model, some_data()))


@pytest.mark.parametrize("reduction", ["sum", "mean", "sum_over_batch_size"])
def test_scores_do_not_depend_on_the_reduction(reduction):
    model = plain_net(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    assert_scores(scores_while_training(model), keras_taylor.score(model, some_data()))


def test_weights_of_examples_and_classes_count():
    model, (x, y) = plain_net(), some_data()
    weight = np.linspace(0.1, 2, len(y)).astype("float32")
    expected = keras_taylor.score(model, (x, y, weight))
    assert_scores(scores_while_training(model, sample_weight=weight), expected)
    classes = {0: 0.5, 1: 3.0, 2: 1.0}
    expected = keras_taylor.score(model, (x, y), class_weight=classes)
    assert_scores(scores_while_training(model, class_weight=classes), expected)


SLOW_ON_TORCH = [pytest.mark.slow] if BACKEND == "torch" else []  # torch.compile takes a minute


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"jit_compile": True}, marks=SLOW_ON_TORCH),
        {"run_eagerly": True},
        {"steps_per_execution": 3},
    ],
)
def test_scores_under_every_way_of_running(arguments, monkeypatch):
    if BACKEND == "torch" and "steps_per_execution" in arguments:
        pytest.skip("steps_per_execution is not for torch")
    if "jit_compile" in arguments:
        needs_compiled_steps()
        compile_faster(monkeypatch)
    model = plain_net(**arguments)
    assert_scores(scores_while_training(model), keras_taylor.score(model, some_data()))


def ranks(scores):
    values = np.concatenate(list(scores.values()))
    return np.argsort(np.argsort(values))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_ranks_alike(policy):
    reference = plain_net(filters=(24, 32))
    model = plain_net(policy, filters=(24, 32))
    model.set_weights(reference.get_weights())
    prunable = keras_taylor.PrunableModel(model)
    scaled = isinstance(prunable.optimizer.wrapped, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    received = ranks(scores_while_training(model))
    expected = ranks(scores_while_training(reference))
    assert np.corrcoef(received, expected)[0, 1] > 0.99


def test_a_loss_scale_that_overflows_leaves_the_scores_alone():
    """The first steps overflow in float16: their examples are left out, not counted as infinite."""
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.0), initial_scale=2.0**30)
    model = plain_net("mixed_float16", (24, 32), optimizer=optimizer)
    received = scores_while_training(model, epochs=5)
    assert all(np.isfinite(values).all() for values in received.values())
    assert np.corrcoef(ranks(received), ranks(keras_taylor.score(model, some_data())))[0, 1] > 0.98


def test_what_callbacks_look_for_is_there():
    inner = keras.optimizers.LossScaleOptimizer(Adam(0.25))
    prunable = keras_taylor.PrunableModel(plain_net(optimizer=inner))
    optimizer = prunable.optimizer
    assert isinstance(optimizer, keras.optimizers.Optimizer)
    assert isinstance(optimizer.inner_optimizer, Adam)
    assert float(optimizer.learning_rate) == 0.25
    optimizer.learning_rate = 0.5
    assert float(optimizer.inner_optimizer.learning_rate) == 0.5
    prunable.fit(*some_data(), batch_size=22, verbose=0)
    assert int(optimizer.iterations) == int(optimizer.inner_optimizer.iterations) == 2


STATEFUL = {
    "momentum": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda: Adam(0.05, amsgrad=True),
    "accumulation and average": lambda: Adam(0.05, gradient_accumulation_steps=2, use_ema=True),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(Adam(0.05)),
    "schedule": lambda: Adam(keras.optimizers.schedules.CosineDecay(0.1, 20)),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.05, momentum=0.5, centered=True),
    "lion": lambda: keras.optimizers.Lion(0.01),
}


def train(model, x, y):
    """Steps of eight examples. (A second `fit` under a moving average fails on JAX, for any Keras model.)"""
    for start in range(0, len(x), 8):
        model.train_on_batch(x[start : start + 8], y[start : start + 8])


@pytest.mark.parametrize("name", STATEFUL)
def test_the_next_step_of_the_cut_model_is_that_of_the_masked_one(name):
    prunable = keras_taylor.PrunableModel(plain_net(optimizer=STATEFUL[name]()))
    x, y = some_data(40)
    train(prunable, x, y)
    assert prunable.prune(0.4) > 0
    train(prunable, x[:8], y[:8])
    small = prunable.strip()
    for model in (prunable, small):
        train(model, x[8:24], y[8:24])
    for after, expected in zip(small.get_weights(), prunable.strip().get_weights(), strict=True):
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)


def test_the_optimizer_may_be_named():
    prunable = keras_taylor.PrunableModel(plain_net(optimizer=Adam(0.05)))
    train(prunable, *some_data(16))
    small = prunable.strip(optimizer=prunable.optimizer)
    assert isinstance(small.optimizer, Adam) and int(small.optimizer.iterations) == 2


def test_without_the_state_the_next_step_would_differ():
    prunable = keras_taylor.PrunableModel(plain_net(optimizer=SGD(0.1, momentum=0.9)))
    x, y = some_data(40)
    train(prunable, x, y)
    prunable.prune(0.4)
    fresh = prunable.strip()
    fresh.compile(SGD(0.1, momentum=0.9), fresh.loss)
    for model in (prunable, fresh):
        train(model, x[:8], y[:8])
    pairs = zip(fresh.get_weights(), prunable.strip().get_weights(), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3


def test_prune_carries_the_state_of_the_model_over():
    model = plain_net(optimizer=Adam(0.05))
    x, y = some_data(40)
    model.fit(x, y, batch_size=8, verbose=0)
    scores = keras_taylor.score(model, (x, y))
    small = keras_taylor.prune(model, keras_taylor.make_plan(model, scores, 0.4))
    assert int(small.optimizer.iterations) == 5
    assert [tuple(v.shape) for v in small.optimizer.variables[2::2]] == [
        tuple(v.shape) for v in small.trainable_variables
    ]
    assert all(np.abs(keras.ops.convert_to_numpy(v)).max() > 0 for v in small.optimizer.variables[2:])


def test_state_that_is_not_shaped_like_its_weight_starts_anew():
    prunable = keras_taylor.PrunableModel(plain_net(optimizer=keras.optimizers.Adafactor(0.05)))
    x, y = some_data(40)
    prunable.fit(x, y, batch_size=8, verbose=0)
    prunable.prune(0.4)
    small = prunable.strip()
    small.fit(x, y, batch_size=8, verbose=0)
    assert int(small.optimizer.iterations) == 10


def test_the_wrapper_goes_on_where_the_optimizer_of_the_model_stands():
    model = plain_net(optimizer=Adam(0.05))
    x, y = some_data(40)
    model.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    prunable = keras_taylor.PrunableModel(model)
    assert int(prunable.optimizer.iterations) == 5
    for one in (model, prunable):
        one.fit(x, y, batch_size=8, verbose=0, shuffle=False)
    for after, expected in zip(prunable.strip().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)


def test_an_optimizer_of_another_model_is_refused():
    prunable = keras_taylor.PrunableModel(zoo.build("residual"))
    other = SGD(0.1, momentum=0.9)
    other.build(plain_net().trainable_variables)
    with pytest.raises(ValueError, match=r"state does not belong to this model.* Received: optimizer=<"):
        prunable.strip(optimizer=other)
    with pytest.raises(
        TypeError, match=r"another one cannot be cut: make a new one.* Received: optimizer='adam'"
    ):
        prunable.strip(optimizer="adam")
