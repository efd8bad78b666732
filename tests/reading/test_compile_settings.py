"""Smaller models and wrappers train as the given model does: what was set after construction comes along."""

import keras
import numpy as np
import pytest
from helpers import BACKEND

import keras_taylor

pytestmark = pytest.mark.sweep(3)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(16, 6)).astype("float32")
Y = RANDOM.integers(0, 2, (16, 3)).astype("float32")


def network(**compile_arguments):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(12, activation="relu", name="hidden")(inputs)
    normalized = keras.layers.BatchNormalization(name="norm")(hidden)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="sigmoid", name="head")(normalized))
    model.compile(
        **{"optimizer": keras.optimizers.SGD(0.1), "loss": "binary_crossentropy", **compile_arguments}
    )
    return model


def compressed(model, **arguments):
    return keras_taylor.compress(
        model, (X, Y), 0.3, **{"increment": 0.15, "epochs": 1, "verbose": 0, **arguments}
    )


def stripped(model):
    prunable = keras_taylor.PrunableModel(model)
    prunable.fit(X, Y, verbose=0)
    prunable.prune(0.3)
    return prunable.strip()


def pruned(model):
    scores = keras_taylor.score(model, criterion="magnitude")
    return keras_taylor.prune(model, keras_taylor.make_plan(model, scores, 0.3))


WAYS = [compressed, stripped, pruned, keras_taylor.PrunableModel]


def decaying(model):
    """Names of the weights that a step changes in which the loss counts nothing: those that decay."""
    model.set_weights([np.ones(w.shape, w.dtype) for w in model.weights])
    model.train_on_batch(X, Y, sample_weight=np.zeros(len(X)))
    return {
        f"{w.path.split('/')[-2]}/{w.name}" for w in model.trainable_weights if (np.array(w) < 0.99).any()
    }


def excluding_names():
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


KERNELS = {"hidden/kernel", "head/kernel"}


@pytest.mark.parametrize("way", WAYS)
def test_names_that_do_not_decay(way):
    assert decaying(way(network(optimizer=excluding_names()))) == KERNELS


@pytest.mark.parametrize("way", WAYS)
def test_variables_that_do_not_decay(way):
    model = network()
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(
        var_list=[model.get_layer("hidden").kernel, *model.get_layer("norm").weights]
    )
    model.compile(optimizer, "binary_crossentropy")
    assert decaying(way(model)) == {"hidden/bias", "head/kernel", "head/bias"}


def test_what_does_not_decay_under_a_loss_scale():
    optimizer = keras.optimizers.LossScaleOptimizer(excluding_names())
    assert decaying(stripped(network(optimizer=optimizer))) == KERNELS


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer"
)
def test_what_does_not_decay_under_one_of_several_optimizers():
    optimizers = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    optimizers["hidden/.*"] = excluding_names()
    model = network(optimizer=keras.optimizers.MultiOptimizer(optimizers))
    assert decaying(pruned(model)) == {"hidden/kernel"}


def test_what_does_not_decay_in_a_run_that_goes_on(tmp_path):
    model = network(optimizer=excluding_names())
    compressed(model, backup_dir=tmp_path)
    assert decaying(compressed(model, backup_dir=tmp_path)) == KERNELS


def test_an_optimizer_of_the_users_own_loop_keeps_its_exclusions():
    prunable = keras_taylor.PrunableModel(network())
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[prunable.trainable_variables[0]], var_names=["bias"])
    optimizer.build(prunable.trainable_variables)
    names = {"norm/gamma", "norm/beta", "head/kernel"}
    assert decaying(prunable.strip(optimizer)) == names


@pytest.mark.parametrize("way", WAYS)
def test_single_weights_that_are_frozen_regularized_or_constrained(way):
    model = network()
    hidden, head = model.get_layer("hidden"), model.get_layer("head")
    hidden.kernel.trainable = False
    head.kernel.regularizer, head.bias.constraint = keras.regularizers.L2(0.5), keras.constraints.NonNeg()
    model.compile("sgd", "binary_crossentropy")
    new = way(model)
    layers = {layer.name: layer for layer in getattr(new, "network", new)._flatten_layers()}
    assert not layers["hidden"].kernel.trainable and layers["hidden"].bias.trainable
    assert layers["head"].kernel.regularizer.l2 == 0.5
    assert layers["head"].kernel.constraint is None
    assert isinstance(layers["head"].bias.constraint, keras.constraints.NonNeg)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_assigned_to_the_optimizer(way):
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    model = network(optimizer=optimizer)
    optimizer.learning_rate, optimizer.weight_decay, optimizer.clipnorm = 0.25, 0.125, 3.0
    new = way(model).optimizer
    new = getattr(new, "wrapped", new)
    assert float(keras.ops.convert_to_numpy(new.learning_rate)) == 0.25
    assert new.weight_decay == 0.125 and new.clipnorm == 3.0


def test_a_schedule_and_an_optimizer_that_were_assigned():
    model = network()
    model.optimizer = keras.optimizers.Adam(0.1)
    model.optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(0.25, 100)
    new = compressed(model).optimizer
    assert isinstance(new, keras.optimizers.Adam)
    assert new.get_config()["learning_rate"]["config"]["initial_learning_rate"] == 0.25


class Halved(keras.optimizers.SGD):
    """A class that nobody registered."""


@pytest.mark.parametrize("scaled", [True, False])
def test_loss_scaling_is_as_it_was(scaled):
    """`compile` adds it under mixed precision unless it is told not to; its attributes can be assigned."""
    model = network()
    model.dtype_policy = "mixed_float16"
    model.compile(Halved(0.1), "mse", auto_scale_loss=scaled)
    if scaled:
        model.optimizer.dynamic_growth_steps = 7
    for way in (pruned, keras_taylor.PrunableModel):
        new = way(model).optimizer
        new = getattr(new, "wrapped", new)
        assert isinstance(new, keras.optimizers.LossScaleOptimizer) is scaled
        assert getattr(new, "dynamic_growth_steps", 7) == 7
        assert isinstance(getattr(new, "inner_optimizer", new), Halved)


@pytest.mark.parametrize("way", WAYS)
def test_what_was_assigned_to_the_model(way):
    model = network(jit_compile=False, steps_per_execution=1)
    model.run_eagerly = True
    if BACKEND != "torch":  # it runs one step at a time
        model.steps_per_execution = 2
    new = way(model)
    assert new.run_eagerly and not new.jit_compile
    assert new.steps_per_execution == model.steps_per_execution


def test_compiled_steps_that_were_asked_for_later():
    model = network(jit_compile=False)
    model.jit_compile = True
    assert pruned(model).jit_compile
    model.run_eagerly = True
    assert not pruned(model).jit_compile


def two_outputs(**compile_arguments):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(12, activation="relu")(inputs)
    outputs = [keras.layers.Dense(3, name=name)(hidden) for name in ("one", "two")]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", ["mse", "mse"], **compile_arguments)
    return model


def test_weights_of_losses():
    model = two_outputs(loss_weights=[1.0, 0.0])
    small = keras_taylor.compress(model, (X, [Y, Y]), 0.3, increment=0.3, verbose=0)
    for one in (model, small, keras_taylor.PrunableModel(model)):
        values = one.evaluate(X, [Y, Y + 1000], verbose=0, return_dict=True)
        assert values["loss"] < 100 < values["two_loss"]


# --- metrics: what `fit` takes ---------------------------------------------------------------


class Share(keras.Metric):
    """Its class says nothing about its arguments, and it has a state that no epoch resets."""

    def __init__(self, above, name="share"):
        super().__init__(name=name)
        self.above = above
        self.factor = self.add_variable((), "ones", name="factor")
        self.parts = {"mean": keras.metrics.Mean(), "others": [keras.metrics.Mean()]}
        self.update = self.count

    def count(self, y_pred):
        self.parts["mean"].update_state(keras.ops.cast(y_pred > self.above, "float32"))

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.update(y_pred)

    def result(self):
        return self.factor * self.parts["mean"].result()

    def reset_state(self):
        self.parts["mean"].reset_state()


class Extremes(keras.Metric):
    """A dict of results."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.largest = self.add_variable((), "zeros", name="largest")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(y_pred)))

    def result(self):
        return {"largest": 1 * self.largest, "twice": 2 * self.largest}


def metrics():
    share = Share(0.25)
    share.factor.assign(0.5)
    return [share, keras.metrics.F1Score(), Extremes(), keras.metrics.AUC(num_thresholds=7), "mae"]


NAMES = {"loss", "share", "f1_score", "largest", "twice", "auc", "mae"}


@pytest.mark.parametrize("way", WAYS)
def test_metrics_of_all_kinds_come_along(way):
    model = network(metrics=metrics(), weighted_metrics=[keras.metrics.BinaryAccuracy()])
    model.evaluate(X, Y, verbose=0)
    first = model.evaluate(X, Y, verbose=0, return_dict=True)
    new = way(model)
    new.set_weights(new.get_weights())
    assert new.evaluate(X, Y, verbose=0, return_dict=True).keys() == first.keys()
    assert not {id(v) for v in new.metrics_variables} & {id(v) for v in model.metrics_variables}
    unchanged = keras_taylor.PrunableModel(model).evaluate(X, Y, verbose=0, return_dict=True)
    for name, value in first.items():
        np.testing.assert_allclose(unchanged[name], value, rtol=1e-5, err_msg=name)


def test_a_run_with_metrics_of_all_kinds_and_a_limit_on_one_of_several_values():
    model = network(metrics=metrics())
    limit = keras_taylor.MetricLimit(1.0, "f1_score")
    small, info = keras_taylor.compress(
        model,
        (X, Y),
        0.3,
        increment=0.15,
        validation_data=(X, Y),
        max_drop=limit,
        verbose=0,
        return_info=True,
    )
    assert info.metrics["after"].keys() == NAMES
    assert info.rounds[0].history.keys() == NAMES | {f"val_{name}" for name in NAMES}
    assert info.metrics["after"]["f1_score"] == info.rounds[-1].history["val_f1_score"][-1]
    expected = np.mean(small.evaluate(X, Y, verbose=0, return_dict=True)["f1_score"])
    assert info.metrics["after"]["f1_score"] == pytest.approx(expected)
    assert "f1_score" in str(info) and type(info).from_json(info.to_json()) == info


def test_pruning_while_training_watches_a_metric_of_several_values():
    prunable = keras_taylor.PrunableModel(network(metrics=metrics()))
    callback = keras_taylor.TaylorPruning(0.3, max_drop=keras_taylor.MetricLimit(1.0, "val_f1_score"))
    prunable.fit(X, Y, epochs=4, validation_data=(X, Y), callbacks=[callback], verbose=0)
    assert callback.stop_reason == "goal reached"


def test_loss_curves_with_metrics_of_all_kinds():
    analysis = keras_taylor.analyze(network(metrics=metrics()), (X, Y), verbose=0)
    assert NAMES - {"loss"} <= set(analysis.sensitivity.baseline)
