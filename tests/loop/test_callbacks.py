"""`TaylorPruning` in the user's own `fit`, beside Keras' own callbacks."""

import csv
import warnings

import keras
import numpy as np
import pytest
from helpers import predict, relative_difference
from stripes import same, small_model, state, stripes
from test_prunable import count_traces, refused

import keras_taylor
from keras_taylor.budget.schedule import removal_schedule

pytestmark = pytest.mark.sweep(3)


def wrapped(**arguments):
    keras.utils.set_random_seed(0)
    return keras_taylor.PrunableModel(small_model(**arguments))


def fit(prunable, *callbacks, epochs=4, **arguments):
    """Three steps an epoch; returns `History.history`."""
    x, y = stripes()
    arguments = {"batch_size": 16, "verbose": 0, "validation_data": (x[:12], y[:12]), **arguments}
    return prunable.fit(x, y, epochs=epochs, callbacks=list(callbacks), **arguments).history


def test_prunes_between_epochs_to_the_goal_and_logs_what_is_left():
    prunable = wrapped()
    full = prunable.cost()
    callback = keras_taylor.TaylorPruning(0.4, schedule="linear", recovery_epochs=2)
    history = fit(prunable, callback, epochs=5)
    params = history["params"]
    assert params[0] == full["params"] > params[1] > params[2] > params[3] * 0.99
    assert params[3] == params[4] == prunable.cost()["params"] <= 0.6 * full["params"]
    assert history["flops"][-1] == prunable.cost()["flops"]
    assert history["units"] == sorted(history["units"], reverse=True)
    assert history["units"][-1] == prunable.mask.sum()
    assert callback.stop_reason == "goal reached"
    assert 1 - params[1] / full["params"] == pytest.approx(0.4 / 3, abs=0.05)


def test_prunes_every_so_many_steps():
    prunable = wrapped()
    history = fit(prunable, keras_taylor.TaylorPruning(0.4, frequency=2, momentum=0.9))
    assert history["params"][0] < prunable.plan.before["params"]  # within the first epoch
    assert history["params"][2] == history["params"][3] <= 0.6 * prunable.plan.before["params"]


def test_one_epoch_is_enough_by_steps():
    prunable = wrapped()
    fit(prunable, keras_taylor.TaylorPruning(0.4, frequency=1), epochs=1)
    assert prunable.cost()["params"] <= 0.6 * prunable.plan.before["params"]


def test_the_goal_is_met_though_nobody_knows_how_many_steps_there_are():
    x, y = stripes()

    def batches():
        for index in range(3):
            yield x[16 * index : 16 * index + 16], y[16 * index : 16 * index + 16]

    prunable = wrapped()
    callback = keras_taylor.TaylorPruning(0.4, frequency=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Your input ran out of data")
        prunable.fit(batches(), epochs=1, verbose=0, callbacks=[callback])
    assert callback.stop_reason == "goal reached"


def test_nothing_is_traced_anew():
    prunable = wrapped()
    fit(prunable, epochs=1)
    traces = count_traces(prunable)
    prunable.train_function = prunable.test_function = None
    fit(prunable, epochs=1)
    once = len(traces)
    fit(prunable, keras_taylor.TaylorPruning(0.4, frequency=1), epochs=2)
    if keras.backend.backend() == "torch":
        assert len(traces) == 3 * once  # eager: each epoch runs Python as often
    else:
        assert len(traces) == once


@pytest.mark.parametrize("schedule", ["linear", "cubic", "exponential", lambda t: t**2])
def test_schedules_rise_to_the_goal(schedule):
    gone = removal_schedule(schedule, 0.3)
    values = [gone(t) for t in np.linspace(0, 1, 11)]
    assert values[0] == pytest.approx(0) and values[-1] == 0.3
    assert values == sorted(values)


def test_schedules_are_what_they_are_called():
    assert removal_schedule("linear", 0.4)(0.5) == pytest.approx(0.2)
    assert removal_schedule("cubic", 0.4)(0.5) == pytest.approx(0.4 * (1 - 0.5**3))
    gone = removal_schedule("exponential", 0.75)
    assert 1 - gone(0.5) == pytest.approx(0.5)  # half of it, then half of what is left
    assert removal_schedule(lambda t: t**2, 0.4)(0.5) == pytest.approx(0.1)


class Accuracies(keras.callbacks.Callback):
    """Writes a script of values into the logs, as a metric would."""

    def __init__(self, values):
        super().__init__()
        self.values = values
        self.masks = []

    def on_epoch_end(self, epoch, logs=None):
        logs["val_accuracy"] = self.values[epoch]
        self.masks.append(self.model.mask)


def run_with(values, **arguments):
    prunable, script = wrapped(), Accuracies(values)
    callback = keras_taylor.TaylorPruning(0.6, schedule="linear", max_drop=0.1, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(prunable, script, callback, epochs=len(values))
    return prunable, callback, script.masks, [str(w.message) for w in caught if "Taylor" in str(w.message)]


def test_max_drop_restores_the_smallest_state_that_held():
    prunable, callback, masks, caught = run_with([0.9, 0.85, 0.82, 0.7, 0.7, 0.7])
    assert masks[3].sum() < masks[2].sum() < masks[1].sum() < masks[0].sum()
    assert np.array_equal(masks[3], masks[5])  # paused
    assert np.array_equal(prunable.mask, masks[2])
    assert "`max_drop` on 'val_accuracy' held it back" in callback.stop_reason
    assert len(caught) == 1 and "not 60.0%" in caught[0]


def test_max_drop_goes_on_after_a_recovery():
    _, callback, masks, _ = run_with([0.9, 0.7, 0.85, 0.85, 0.85, 0.85, 0.85])
    assert np.array_equal(masks[1], masks[2])
    assert masks[3].sum() < masks[2].sum()
    assert "held it back" in callback.stop_reason  # what the pause cost is not caught up with a jump


def test_max_drop_that_is_kept_reaches_the_goal():
    prunable, callback, _, caught = run_with([0.9, 0.85, 0.85, 0.85, 0.85])
    assert callback.stop_reason == "goal reached" and not caught
    assert prunable.cost()["params"] <= 0.4 * prunable.plan.before["params"]


def test_a_loss_may_be_watched_and_a_baseline_given():
    prunable = wrapped()
    callback = keras_taylor.TaylorPruning(
        0.6, max_drop=keras_taylor.MetricLimit(0, "val_loss", baseline=1e-9)
    )
    with pytest.warns(UserWarning, match="0.0% of params removed, not 60.0%"):
        fit(prunable, callback)
    assert prunable.mask.all()


def test_best_weights_come_back_with_the_smallest_mask():
    class Remember(keras.callbacks.Callback):
        weights = None

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 3:
                self.weights = self.model.get_weights()

    prunable, script, remember = wrapped(), Accuracies([0.9, 0.88, 0.88, 0.89, 0.86]), Remember()
    callback = keras_taylor.TaylorPruning(0.5, recovery_epochs=3, max_drop=0.1)
    fit(prunable, script, callback, remember, epochs=5)
    assert same(remember.weights, prunable.get_weights())


class Scripts(keras.callbacks.Callback):
    """Writes scripts of several metrics into the logs."""

    def __init__(self, **scripts):
        super().__init__()
        self.scripts, self.masks = scripts, []

    def on_epoch_end(self, epoch, logs=None):
        logs.update({name: values[epoch] for name, values in self.scripts.items()})
        self.masks.append(self.model.mask)


def test_a_limit_for_each_metric():
    limits = {"val_digit": keras_taylor.MetricLimit(0.1, mode="max"), "val_speaker_accuracy": 0.2}
    speaker = [0.9, 0.8, 0.75, 0.6, 0.6, 0.6]
    script = Scripts(val_digit=[0.5] * 6, val_speaker_accuracy=speaker)
    prunable, callback = wrapped(), keras_taylor.TaylorPruning(0.6, schedule="linear", max_drop=limits)
    with pytest.warns(UserWarning, match="`max_drop` on 'val_speaker_accuracy' held it back"):
        fit(prunable, script, callback, epochs=6)
    assert script.masks[3].sum() < script.masks[2].sum() and np.array_equal(prunable.mask, script.masks[2])
    script = Scripts(val_digit=[0.5, 0.5, 0.2, 0.2, 0.2, 0.2], val_speaker_accuracy=[0.9] * 5 + [0.1])
    with pytest.warns(UserWarning, match="`max_drop` on 'val_digit' and 'val_speaker_accuracy' held it back"):
        fit(wrapped(), script, callback, epochs=6)


def test_of_states_with_as_many_units_the_one_with_the_smallest_loss_comes_back():
    script = Scripts(val_digit=[0.5] * 5, val_speaker=[0.5] * 5, val_loss=[1.0, 1.0, 0.5, 0.2, 0.9])
    remembered = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: remembered.append(state(prunable)))
    limits = {"val_digit": 1.0, "val_speaker": 1.0}
    prunable = wrapped()
    fit(prunable, script, note, keras_taylor.TaylorPruning(0.5, recovery_epochs=3, max_drop=limits), epochs=5)
    assert same(state(prunable), remembered[3])


def test_logs_reach_csv_and_tensorboard(tmp_path):
    prunable = wrapped()
    callbacks = [
        keras_taylor.TaylorPruning(0.4),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    if keras.backend.backend() == "tensorflow":
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "board", write_graph=False))
    history = fit(prunable, *callbacks)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["params"]) for row in rows] == history["params"]
    assert {"flops", "units", "val_accuracy"} <= rows[0].keys()
    if keras.backend.backend() == "tensorflow":
        events = b"".join(path.read_bytes() for path in (tmp_path / "board").rglob("*tfevents*"))
        assert b"epoch_params" in events and b"epoch_units" in events


def test_beside_a_checkpoint_that_saves_the_whole_model(tmp_path):
    prunable = wrapped()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit(prunable, keras_taylor.TaylorPruning(0.4), checkpoint, epochs=3)
    middle, last = (keras.models.load_model(tmp_path / f"{epoch}.keras") for epoch in (2, 3))
    assert same(state(last), state(prunable))
    assert prunable.mask.sum() < middle.mask.sum() < middle.mask.size
    assert last.strip().count_params() == prunable.cost()["params"]


def test_beside_checkpoints_of_weights(tmp_path):
    prunable = wrapped()
    path = tmp_path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    fit(prunable, keras_taylor.TaylorPruning(0.4), checkpoint)
    again = wrapped()
    again.load_weights(path)
    assert np.array_equal(again.mask, prunable.mask)
    assert same(again.get_weights(), prunable.get_weights())


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise RuntimeError("killed")


def test_beside_backup_and_restore(tmp_path):
    killed = wrapped()
    with pytest.raises(RuntimeError, match="killed"):
        fit(killed, keras_taylor.TaylorPruning(0.4), keras.callbacks.BackupAndRestore(tmp_path), Stop())
    prunable = wrapped()
    seen = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    fit(prunable, keras.callbacks.BackupAndRestore(tmp_path), keras_taylor.TaylorPruning(0.4), look)
    assert seen == [2, 3]
    check_pruned(prunable)
    full = wrapped()
    fit(full, keras_taylor.TaylorPruning(0.4))
    assert prunable.mask.sum() == full.mask.sum()


class Falling(keras.callbacks.Callback):
    """Writes an accuracy into the logs that falls from epoch to epoch, and remembers the masks."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def on_epoch_end(self, epoch, logs=None):
        logs["val_accuracy"] = 0.9 - 0.1 * epoch
        self.masks.append(self.model.mask)


def check_pruned(prunable, goal=0.4):
    """The goal is kept in the mask, in what is stripped, and in what is predicted."""
    params = prunable.cost()["params"]
    assert params <= (1 - goal) * prunable.plan.before["params"]
    small, (x, _) = prunable.strip(), stripes()
    assert small.count_params() == params
    assert relative_difference(predict(small, x), predict(prunable, x)) < 1e-5


def test_beside_early_stopping_that_restores_the_best_weights():
    prunable, falling = wrapped(), Falling()
    stopping = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=1, restore_best_weights=True
    )
    callback = keras_taylor.TaylorPruning(0.4, schedule="linear", recovery_epochs=4)
    with warnings.catch_warnings(action="error", category=UserWarning):
        history = fit(prunable, callback, falling, stopping, epochs=7)
    assert callback.stop_reason == "goal reached"
    # every epoch was worse than the one before, and each of the first ones had more units
    assert len(history["loss"]) == 5 and stopping.best_epoch == 3
    assert falling.masks[2].sum() > falling.masks[3].sum() == falling.masks[4].sum()
    assert history["params"][-1] == prunable.cost()["params"]
    check_pruned(prunable)


def test_early_stopping_before_the_goal_and_how_to_make_it_wait():
    prunable, callback = wrapped(), keras_taylor.TaylorPruning(0.4, start_epoch=3)
    arguments = {"monitor": "val_accuracy", "mode": "max", "patience": 1}
    words = r"after epoch 2, and pruning goes on until epoch 5; `EarlyStopping\(\.\.\., start_from_epoch=4\)`"
    with pytest.warns(UserWarning, match=words):
        fit(prunable, callback, Falling(), keras.callbacks.EarlyStopping(**arguments), epochs=5)
    assert prunable.mask.all()
    fit(
        prunable,
        callback,
        Falling(),
        keras.callbacks.EarlyStopping(**arguments, start_from_epoch=4),
        epochs=5,
    )
    assert callback.stop_reason == "goal reached"


@pytest.mark.parametrize("weights_only", [True, False])
def test_beside_a_checkpoint_of_the_best_epoch(tmp_path, weights_only):
    prunable, path = wrapped(), tmp_path / ("best.weights.h5" if weights_only else "best.keras")
    arguments = {"mode": "max", "save_best_only": True, "save_weights_only": weights_only}
    checkpoint = keras.callbacks.ModelCheckpoint(path, "val_accuracy", **arguments)
    pruning = keras_taylor.TaylorPruning(0.4, schedule="linear", recovery_epochs=2)
    fit(prunable, pruning, Falling(), checkpoint, epochs=5)
    assert checkpoint.best == pytest.approx(0.6)  # of the fourth epoch, the first one at the goal
    again = wrapped() if weights_only else keras.models.load_model(path)
    if weights_only:
        again.load_weights(path)
    assert np.array_equal(again.mask, prunable.mask)
    check_pruned(again)


def test_a_threshold_of_a_checkpoint_holds_after_each_pruning(tmp_path):
    arguments = {"mode": "max", "save_best_only": True, "initial_value_threshold": 0.95}
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "val_accuracy", **arguments)
    fit(wrapped(), keras_taylor.TaylorPruning(0.4), Falling(), checkpoint)
    assert checkpoint.best == 0.95 and not list(tmp_path.iterdir())


def test_the_smallest_state_that_held_is_not_taken_back_by_early_stopping():
    prunable, script = wrapped(), Accuracies([0.9, 0.85, 0.82, 0.7, 0.75, 0.75])
    callback = keras_taylor.TaylorPruning(0.6, schedule="linear", max_drop=0.1)
    stopping = keras.callbacks.EarlyStopping(
        "val_accuracy", mode="max", patience=9, restore_best_weights=True
    )
    with pytest.warns(UserWarning, match="held it back"):
        fit(prunable, script, callback, stopping, epochs=6)
    assert np.array_equal(prunable.mask, script.masks[2])


def restore_by_list(prunable, tmp_path):
    weights = prunable.get_weights()
    return lambda: prunable.set_weights(weights)


def restore_from_file(prunable, tmp_path):
    prunable.save_weights(tmp_path / "all.weights.h5")
    return lambda: keras.saving.load_weights(prunable, tmp_path / "all.weights.h5")


def restore_state_tree(prunable, tmp_path):
    tree = prunable.get_state_tree("numpy_array")
    return lambda: prunable.set_state_tree(tree)


@pytest.mark.parametrize("restoring", [restore_by_list, restore_from_file, restore_state_tree])
def test_what_was_pruned_stays_so_whatever_restores_weights(tmp_path, restoring):
    prunable = wrapped()
    fit(prunable, epochs=1)
    kernel = prunable.get_weights()[0]
    restore = restoring(prunable, tmp_path)
    prunable.prune(0.4)
    mask, gone = prunable.mask, int((prunable.mask == 0).sum())
    fit(prunable, epochs=1)
    with pytest.warns(UserWarning, match=f"from before {gone} of the pruned units left.*assign to `mask`"):
        restore()
    assert np.array_equal(prunable.get_weights()[0], kernel)  # the weights did come back
    assert np.array_equal(prunable.mask, mask)
    check_pruned(prunable)
    prunable.mask = np.ones_like(mask)
    assert prunable.strip().count_params() == prunable.plan.before["params"]


def test_a_smaller_mask_is_restored_without_a_word():
    prunable = wrapped()
    fit(prunable, epochs=1)
    prunable.prune(0.4)
    again = wrapped()
    with warnings.catch_warnings(action="error", category=UserWarning):
        again.set_weights(prunable.get_weights())
        again.set_weights(prunable.get_weights())
    assert np.array_equal(again.mask, prunable.mask)


def test_beside_reduce_lr_on_plateau():
    prunable = wrapped()
    plateau = keras.callbacks.ReduceLROnPlateau("loss", mode="max", factor=0.5, patience=1, min_delta=10)
    history = fit(prunable, keras_taylor.TaylorPruning(0.4), plateau)
    rate = float(keras.ops.convert_to_numpy(prunable.optimizer.learning_rate))
    assert rate < 0.05 and len(history["learning_rate"]) == 4
    assert float(keras.ops.convert_to_numpy(prunable.strip().optimizer.learning_rate)) == pytest.approx(rate)


@pytest.mark.parametrize("swap_on_epoch", [True, False])
def test_beside_swap_ema_weights(swap_on_epoch):
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True, ema_momentum=0.5)
    prunable = wrapped(optimizer=optimizer)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    history = fit(prunable, keras_taylor.TaylorPruning(0.4), swap)
    check_pruned(prunable)
    assert history["params"][-1] <= 0.6 * prunable.plan.before["params"]
    x, y = stripes()
    small = prunable.strip()
    assert small.evaluate(x, y, verbose=0) == pytest.approx(prunable.evaluate(x, y, verbose=0), rel=1e-4)
    assert np.isfinite(history["loss"]).all()
    prunable.fit(x, y, verbose=0)  # no array is shared: JAX would have donated it


def test_a_plain_model_is_shown_the_way():
    model, (x, y) = small_model(), stripes()
    before = state(model)
    refused(
        r"prunable = keras_taylor.PrunableModel\(model\).*prunable.fit\(.*prunable.strip\(\).*Received: "
        "model='small' of class `Sequential`$",
        model.fit, x, y, verbose=0, callbacks=[keras_taylor.TaylorPruning(0.4)],
    )  # fmt: skip
    assert same(before, state(model))


def test_refusals():
    new = keras_taylor.TaylorPruning
    refused("fraction to remove.*Received: goal=3$", new, 3)
    refused("Unknown schedule.*Received: schedule='quick'$", new, schedule="quick")
    refused('of steps, or "epoch". Received: frequency=0$', new, frequency=0)
    refused("from 0 on. Received: start_epoch=-1$", new, start_epoch=-1)
    refused("from 0 on. Received: recovery_epochs=0.5$", new, recovery_epochs=0.5)
    refused("from 0 on. Received: max_drop=-1$", new, max_drop=-1)
    refused(
        r"`monitor`, `mode` are part of `max_drop` now.*TaylorPruning\(..., "
        r"max_drop=keras_taylor.MetricLimit\(max_drop=0.1, monitor='val_f1', mode='max'\)\)$",
        new, max_drop=0.1, monitor="val_f1", mode="max", error=TypeError,
    )  # fmt: skip
    refused("unexpected keyword argument 'epochs'$", new, epochs=3, error=TypeError)
    refused("below 1. Received: momentum=1$", new, momentum=1)
    prunable = wrapped()
    before = state(prunable)
    refused("no time to prune.*Received: start_epoch=0,.*$", fit, prunable, new(0.3), epochs=1)
    refused("no time to prune.*Received: start_epoch=4,.*$", fit, prunable, new(0.3, start_epoch=4))
    refused("out of reach.*Received: goal=0.9999$", fit, prunable, new(0.9999))
    refused("without pruning.*baseline=None$", fit, prunable, new(0.3, frequency=2, max_drop=0.1))
    limits = {"val_f1": keras_taylor.MetricLimit(0, baseline=0.5), "loss": 0.1}
    words = "compares with 'loss'.*without pruning.*max_drop={'val_f1': 0, 'loss': 0.1}.*baseline=None$"
    refused(words, fit, prunable, new(0.3, frequency=2, max_drop=limits))
    assert same(before, state(prunable))


def test_a_metric_that_is_not_there_is_named():
    with pytest.warns(UserWarning, match="'val_f1', which is not in the logs; there are .*val_loss"):
        fit(wrapped(), keras_taylor.TaylorPruning(0.3, max_drop=keras_taylor.MetricLimit(0.1, "val_f1")))
