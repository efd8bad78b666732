"""`compress`: the loop, its report, its progress, and its refusals."""

import io
import json
import logging
import re
import signal
import sys

import keras
import numpy as np
import pytest
import zoo
from helpers import reachable, targets_of
from rich.console import Console
from stripes import same, small_model, state, stripes

import keras_taylor
from keras_taylor.support.console import Reporter

pytestmark = pytest.mark.sweep(3)

EVERY_ROUND = {"learning_rate": keras_taylor.FineTuning(every_round=True)}


def test_tensorflow_does_not_warn_that_each_round_has_a_new_model(caplog):
    logger = logging.getLogger("tensorflow")

    def warn(epoch, logs):
        logger.warning("5 out of the last 9 calls to %s triggered tf.function retracing.", "predict")
        logger.warning("something else")

    callback = keras.callbacks.LambdaCallback(on_epoch_end=warn)
    keras_taylor.compress(small_model(), stripes(), 0.1, increment=0.1, verbose=0, callbacks=[callback])
    assert "something else" in caplog.text and "retracing" not in caplog.text
    warn(0, {})
    assert "retracing" in caplog.text


@pytest.fixture(scope="module")
def finished():
    """One run, looked at by several tests."""
    keras.utils.set_random_seed(0)
    model, (x, y) = small_model(), stripes()
    seen = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs))
    small, info = keras_taylor.compress(
        model,
        (x, y),
        goal=0.3,
        increment=0.15,
        repair=True,
        epochs=2,
        batch_size=20,
        validation_data=(x[:9], y[:9]),
        callbacks=[callback],
        return_info=True,
        verbose=0,
        **EVERY_ROUND,
    )
    return model, small, info, seen


def test_reaches_the_goal_with_a_plain_compiled_model(finished):
    model, small, info, _ = finished
    assert type(small) is keras.Sequential
    assert small.compiled and small.count_params() <= 0.7 * model.count_params()
    largest_unit = 1 + 4 + 9 * 12, 9 * 8 + 1 + 9 * 3
    assert small.count_params() > 0.7 * model.count_params() - max(largest_unit)
    assert info.after["params"] == small.count_params()
    assert small.output_shape == model.output_shape
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]


class Rates(keras.callbacks.Callback):
    """Notes the learning rate that each epoch begins with."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.values.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))


@pytest.mark.parametrize(
    ("arguments", "rate"),
    [
        ({}, 0.005),
        ({"repair": False}, 0.05),
        ({"learning_rate": keras_taylor.FineTuning(0.02, every_round=True)}, 0.02),
        ({"distill": True}, 0.005),
    ],
    ids=str,
)
def test_what_was_repaired_is_fine_tuned_at_a_tenth_of_the_learning_rate(arguments, rate):
    rates = Rates()
    small, info = keras_taylor.compress(
        *(small_model(), stripes(), 0.3),
        **{
            "increment": 0.15,
            "callbacks": [rates],
            "verbose": 0,
            "return_info": True,
            **EVERY_ROUND,
            **arguments,
        },
    )
    assert rates.values == pytest.approx([rate] * 2)
    assert bool(info.rounds[0].repairs) == arguments.get("repair", True)
    assert float(small.optimizer.learning_rate) == pytest.approx(0.05)


AT_GOALS = keras_taylor.FineTuning(every_round=False)
VALIDATED = {"validation_data": stripes(9)}


@pytest.mark.parametrize(
    ("arguments", "trained"),
    [
        ({}, [False, True]),
        ({"goal": [0.15, 0.3]}, [True, True]),
        ({"repair": False}, [True, True]),
        ({"max_drop": 10.0, **VALIDATED}, [True, True]),
        ({"max_drop": 10.0, "learning_rate": AT_GOALS, **VALIDATED}, [False, True]),
        (EVERY_ROUND, [True, True]),
        ({"epochs": 0, **EVERY_ROUND}, [False, False]),
    ],
    ids=["default", "two goals", "no repair", "max_drop", "max_drop at goals", "every round", "no epochs"],
)  # fmt: skip
def test_which_rounds_are_trained(arguments, trained):
    arguments = {"goal": 0.3, "increment": 0.15, "verbose": 0, "return_info": True, **arguments}
    _, info = keras_taylor.compress(small_model(), stripes(), **arguments)
    assert [bool(one.history) for one in info.rounds] == trained
    assert [bool(one.step_losses) for one in info.rounds] == trained


@pytest.mark.sweep(1)
def test_a_schedule_starts_again_in_every_round_and_its_momentum_too():
    class Starts(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            optimizer = self.model.optimizer
            seen.append([np.abs(keras.ops.convert_to_numpy(v)).max() for v in optimizer.variables[2:]])
            assert int(optimizer.iterations) == 0

    seen, model = [], small_model()
    schedule = keras.optimizers.schedules.CosineDecay(0.05, 10)
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), model.loss)
    model.fit(*stripes(), verbose=0)
    arguments = {"increment": 0.15, "verbose": 0, "return_info": True, "callbacks": [Starts()]}
    _, info = keras_taylor.compress(model, stripes(), 0.3, **arguments)
    assert all(one.history for one in info.rounds) and len(seen) == len(info.rounds) == 2
    assert all(found and not any(found) for found in seen)


def test_a_round_on_the_way_is_judged_not_trained(capsys):
    arguments = {"increment": 0.15, "verbose": 2, "return_info": True, **VALIDATED}
    _, info = keras_taylor.compress(small_model(), stripes(), **arguments)
    first, last = info.rounds
    assert set(first.kept_history) == {"val_loss", "val_accuracy"} and first.judged["epoch"] == 0
    cut, repaired = first.judged["cut"]["loss"], first.judged["metrics"][0]["loss"]
    assert first.judged_values == {"cut": cut, "repaired": repaired}
    said = f"not trained on the way to a goal: loss {cut:.4g} cut, {repaired:.4g} repaired"
    assert first.verdict() == said
    assert last.num_epochs == 2  # those of both rounds
    printed = capsys.readouterr().out
    assert "then repair, then where a goal is reached fine-tuning" in printed
    line = next(line for line in printed.splitlines() if line.startswith("round 1/2: ") and "left" in line)
    assert f"val_accuracy {first.kept_history['val_accuracy']:.4g}" in line


def test_a_choice_of_rounds_that_is_none():
    with pytest.raises(
        ValueError, match=r"Expected `True`, `False` or `None`. Received: every_round='goals'"
    ):
        keras_taylor.FineTuning(every_round="goals")


@pytest.mark.parametrize(
    ("loss", "arguments", "criterion"),
    [
        ("sparse_categorical_crossentropy", {}, "log_odds"),
        ("sparse_categorical_crossentropy", {"repair": False}, "taylor"),
        ("sparse_categorical_crossentropy", {"criterion": keras_taylor.Scoring(labels="model")}, "taylor"),
        ("sparse_categorical_crossentropy", {"criterion": "magnitude"}, "magnitude"),
        ("mse", {}, "taylor"),
    ],
)
def test_the_default_criterion(loss, arguments, criterion):
    model, (x, y) = small_model(loss=loss, metrics=[]), stripes()
    y = np.eye(3)[y] if loss == "mse" else y
    _, info = keras_taylor.compress(model, (x, y), epochs=0, verbose=0, return_info=True, **arguments)
    assert info.criterion == criterion


def test_scores_from_other_data_than_the_training():
    model, (x, y) = small_model(), stripes()
    arguments = {"goal": 0.3, "epochs": 0, "repair": False, "verbose": 0, "return_info": True}
    _, other = keras_taylor.compress(
        model, (np.zeros_like(x), y), criterion=keras_taylor.Scoring(ds=(x, y)), **arguments
    )
    _, same = keras_taylor.compress(model, (x, y), **arguments)
    _, nothing = keras_taylor.compress(model, (np.zeros_like(x), y), **arguments)
    assert other.plan == same.plan != nothing.plan


@pytest.mark.parametrize("share, is_read", [(1.0, True), (0.5, False)], ids=["as many", "fewer"])
def test_repairs_read_other_data_of_the_scores_if_there_is_no_less_of_it(share, is_read):
    model, (x, y) = small_model(), stripes()
    arguments = {"goal": 0.3, "epochs": 0, "verbose": 0}
    num = int(share * len(x))
    scoring = keras_taylor.Scoring("magnitude", ds=(x[:num], y[:num]))
    other = keras_taylor.compress(model, (np.zeros_like(x), y), criterion=scoring, **arguments)
    read = x if is_read else np.zeros_like(x)
    wanted = keras_taylor.compress(model, (read, y), criterion="magnitude", **arguments)
    for found, want in zip(other.get_weights(), wanted.get_weights(), strict=True):
        np.testing.assert_array_equal(found, want)


def test_other_data_for_scores_that_do_not_fit():
    words = (
        r"^The data does not fit the model.s inputs\. .*Received: ds with x of shapes \[\(None, 5, 5, 1\)\]$"
    )
    with pytest.raises(ValueError, match=words):
        scoring = keras_taylor.Scoring(ds=(np.zeros((4, 5, 5, 1)), np.zeros(4)))
        keras_taylor.compress(small_model(), stripes(), criterion=scoring)


def test_a_learning_rate_beside_a_schedule_is_refused():
    model = small_model(optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 20)))
    with pytest.raises(ValueError, match=r"compiled with a learning rate schedule.*learning_rate=0\.01"):
        keras_taylor.compress(model, stripes(), learning_rate=0.01)


def rate_line(model, capsys, **arguments):
    keras_taylor.compress(model, stripes(), 0.2, increment=0.2, verbose=2, **arguments)
    (line,) = (one for one in capsys.readouterr().out.splitlines() if one.startswith("learning rate: "))
    return line.removeprefix("learning rate: ")


def test_the_learning_rate_is_said_and_where_it_comes_from(capsys):
    model = small_model()
    assert rate_line(model, capsys) == "0.005, 0.1 times the compiled rate, 0.05"
    assert rate_line(model, capsys, repair=False) == "the compiled rate, 0.05"
    assert rate_line(model, capsys, learning_rate=0.1) == "0.1, 2 times the compiled rate, 0.05"
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 20)
    model = small_model(optimizer=keras.optimizers.SGD(schedule))
    assert rate_line(model, capsys) == "the compiled schedule, `CosineDecay`, from its start in each round"


def test_a_learning_rate_that_a_callback_left_behind_is_said_to_look_decayed(capsys):
    model = small_model(optimizer=keras.optimizers.Adam(0.001))
    lower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 10)
    model.fit(*stripes(), epochs=3, callbacks=[lower], verbose=0)
    text = "1e-07, 0.1 times the compiled rate, 1e-06, which looks decayed (%s): pass `learning_rate` "
    text += "for a higher one"
    assert rate_line(model, capsys) == text % "the last `fit` went up to 0.0001"
    model = small_model(optimizer=keras.optimizers.Adam(1e-6))
    model.optimizer.iterations.assign(9)  # as in a model from a file, which has no record of its `fit`
    assert rate_line(model, capsys) == text % "it has trained, and `Adam` begins with 0.001 by default"


def test_a_low_learning_rate_that_no_callback_has_lowered_looks_like_none_that_is_decayed(capsys):
    model = small_model(optimizer=keras.optimizers.Adam(1e-5))
    said = "1e-06, 0.1 times the compiled rate, 1e-05"
    assert rate_line(model, capsys) == said
    model.fit(*stripes(), verbose=0)
    assert rate_line(model, capsys) == said


@pytest.mark.parametrize("rate", [0, -0.1, float("nan"), "fast", True])
def test_a_learning_rate_that_is_none(rate):
    with pytest.raises(ValueError, match=r"Expected a learning rate above 0. Received: learning_rate="):
        keras_taylor.compress(small_model(), stripes(), learning_rate=rate)


def test_info_tells_every_round(finished):
    model, small, info, _ = finished
    assert [r.number for r in info.rounds] == [1, 2]
    assert info.rounds[0].params > info.rounds[1].params == small.count_params()
    for one in info.rounds:
        assert set(one.history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert all(len(values) == 2 for values in one.history.values())
        assert len(one.step_losses) == 2 * 3  # two epochs of 20 + 20 + 8 examples
        assert set(one.seconds) == {"score", "prune", "repair", "fit"}
        assert [repair["name"] for repair in one.repairs]
        assert all(r["error_after"] <= r["error_before"] for r in one.repairs if r["ridge"])
        for epoch in (0, 1):
            steps = np.array(one.step_losses[3 * epoch : 3 * epoch + 3])
            mean = np.average(steps, weights=[20, 20, 8])
            assert mean == pytest.approx(one.history["loss"][epoch], rel=1e-4)
    widths = {"first": 8, "second": 12}
    for one in info.rounds:
        for name, (before, after) in one.layers.items():
            assert widths[name] == before > after
            widths[name] = after
    assert widths == {n: small.get_layer(n).filters for n in widths}
    assert info.reduction["params"] == pytest.approx(1 - small.count_params() / model.count_params())
    assert set(info.pruned_layers) == set(info.plan.layers) <= {"first", "second"}
    assert info.stop_reason == "goal reached"
    assert "softmax" not in str(info.locked) and info.locked["head"]["reason"] == "the model's output"


def test_info_plan_leads_from_the_original_to_the_result_in_one_cut(finished):
    model, small, info, _ = finished
    again = keras_taylor.prune(model, info.plan)
    assert [w.shape for w in again.weights] == [w.shape for w in small.weights]


def test_info_prints_and_goes_to_json(finished):
    _, _, info, _ = finished
    text = str(info)
    assert f"{info.reduction['params']:.1%} of params" in text
    assert f"{info.after['params']:,}" in text and "val_accuracy" in text
    content = json.loads(info.to_json())
    assert content["rounds"][1]["costs"]["params"] == info.after["params"]
    assert content["plan"] == json.loads(info.plan.to_json())
    assert content["reduction"]["params"] == info.reduction["params"]


def test_info_draws_a_picture(finished, tmp_path):
    pytest.importorskip("matplotlib")
    finished[2].plot(tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"Install the extra: pip install \"keras-taylor\[plots\]\"$"):
        finished[2].plot(tmp_path / "rounds.png")


def test_the_users_callbacks_reach_fit(finished):
    _, _, info, seen = finished
    assert len(seen) == 4 and all("val_loss" in logs for logs in seen)
    assert seen[-1]["loss"] == pytest.approx(info.rounds[-1].history["loss"][-1])


def test_the_given_model_is_untouched():
    model, data = small_model(), stripes()
    model.fit(*data, epochs=1, verbose=0)
    before, config = state(model), json.dumps(model.get_config(), default=str)
    keras_taylor.compress(model, data, goal=0.2, increment=0.2, verbose=0)
    assert same(state(model), before)
    assert json.dumps(model.get_config(), default=str) == config


def test_no_epochs_means_no_fine_tuning():
    model, data = small_model(), stripes()
    small, info = keras_taylor.compress(
        model, data, goal=0.2, increment=0.2, epochs=0, return_info=True, verbose=0
    )
    assert same(state(small)[:1], state(keras_taylor.prune(model, info.plan))[:1])
    assert info.rounds[0].history == {} and info.rounds[0].step_losses == []


def test_flops_goal():
    model, data = small_model(), stripes()
    small, info = keras_taylor.compress(
        model, data, goal={"flops": 0.4}, increment=0.4, return_info=True, verbose=0
    )
    assert keras_taylor.analyze(small).costs["flops"] == info.after["flops"] <= 0.6 * info.before["flops"]


def test_excluded_layers_keep_their_channels_in_every_round():
    model, data = small_model(), stripes()
    small = keras_taylor.compress(
        model, data, goal=0.3, increment=0.1, exclude=[model.get_layer("first")], verbose=0
    )
    assert small.get_layer("first").filters == 8 and small.get_layer("second").filters < 12


def test_round_to_holds_in_every_round():
    model, data = small_model(), stripes()
    selection = keras_taylor.Selection(round_to=4)
    small = keras_taylor.compress(model, data, goal=0.3, increment=0.1, selection=selection, verbose=0)
    assert small.get_layer("first").filters % 4 == small.get_layer("second").filters % 4 == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.8, 0.95])
def test_grouped_convolutions_go_down_to_one_channel_a_group_over_several_rounds(part):
    model = zoo.build("grouped")
    model.compile("sgd", "mse")
    goal, x = part * reachable(model), zoo.inputs_of(model)
    data = x, targets_of(model, x)
    arguments = {"increment": 0.1, "epochs": 0, "criterion": "magnitude", "verbose": 0, "return_info": True}
    small, info = keras_taylor.compress(model, data, goal, **arguments)
    assert len(info.rounds) > 4 and info.reduction["params"] >= goal
    layer = small.get_layer("grouped")
    assert layer.groups == 4 and layer.kernel.shape[-2] == 1
    in_one_cut = keras_taylor.prune(model, info.plan)
    assert in_one_cut.to_json() == small.to_json()


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 3, 4)])
def test_channels_that_a_reshape_divides_are_the_same_units_in_all_rounds(shape):
    x = inputs = keras.Input((5, 8))
    x = keras.layers.Reshape(shape)(keras.layers.Dense(12, activation="relu", name="divided")(x))
    x = keras.layers.Reshape((5, 12))(keras.ops.transpose(x, (0, 1, 3, 2)))
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = zoo.randomized(keras.Model(inputs, keras.layers.Dense(3, name="head")(x)))
    model.compile("sgd", "mse")
    x = zoo.inputs_of(model)
    arguments = {"increment": 0.1, "epochs": 0, "criterion": "magnitude", "verbose": 0, "return_info": True}
    small, info = keras_taylor.compress(model, (x, targets_of(model, x)), 0.7, **arguments)
    assert len(info.rounds) > 2
    # one unit is left of four
    assert small.get_layer("divided").units == 3
    assert keras_taylor.prune(model, info.plan).to_json() == small.to_json()


def test_schedule_as_a_function():
    _, info = keras_taylor.compress(
        small_model(),
        stripes(),
        goal=0.3,
        increment=lambda number: 0.2 if number == 1 else 0.3,
        return_info=True,
        verbose=0,
    )
    assert len(info.rounds) == 2 and info.rounds[0].params <= 0.8 * info.before["params"]


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that nobody registered."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1 + keras.ops.cast(step, "float32"))

    def get_config(self):
        return {"rate": self.rate}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float32", "mixed"])
def test_a_learning_rate_schedule_of_the_users_own(policy):
    optimizer = keras.optimizers.SGD(Halving(0.125))
    if policy == "mixed":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    small = keras_taylor.compress(small_model(optimizer=optimizer), stripes(), goal=0.3, verbose=0)
    assert small.optimizer is not optimizer
    inner = getattr(small.optimizer, "inner_optimizer", small.optimizer)
    assert float(inner.learning_rate) == pytest.approx(0.125 / (1 + int(inner.iterations)))


def test_criterion_as_a_function_and_its_name():
    def smallest_first(statistics):
        return np.arange(statistics.num_units)

    _, info = keras_taylor.compress(
        small_model(), stripes(), criterion=smallest_first, increment=0.3, return_info=True, verbose=0
    )
    assert info.criterion == "smallest_first"
    for layer in info.plan.layers.values():
        assert layer.kept == tuple(range(layer.width - len(layer.kept), layer.width))


def test_class_and_sample_weights_reach_scores_and_fit():
    model, (x, y) = small_model(), stripes()
    silent = np.zeros(len(y), "float32")
    _, info = keras_taylor.compress(
        model, (x, y, silent), increment=0.3, epochs=1, return_info=True, verbose=0
    )
    assert info.rounds[0].step_losses == [0.0, 0.0]
    _, info = keras_taylor.compress(
        model, (x, y), increment=0.3, class_weight=dict.fromkeys(range(3), 0.0), return_info=True, verbose=0
    )
    assert info.rounds[0].step_losses == [0.0, 0.0]


def test_endless_generator_with_steps():
    x, y = stripes()

    def endless():
        while True:
            yield x[:16], y[:16]

    _, info = keras_taylor.compress(
        small_model(), endless(), increment=0.3, steps_per_epoch=2, return_info=True, verbose=0
    )
    assert len(info.rounds[0].step_losses) == 2


def test_pydataset():
    class Data(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            x, y = stripes()
            return x[16 * index : 16 * index + 16], y[16 * index : 16 * index + 16]

    _, info = keras_taylor.compress(small_model(), Data(), increment=0.3, return_info=True, verbose=0)
    assert len(info.rounds[0].step_losses) == 3


@pytest.mark.filterwarnings("ignore:.*does not have any trainable weights")
def test_frozen_model_is_pruned_and_says_what_it_does_not_train(capsys):
    model = small_model(frozen=True)
    small = keras_taylor.compress(model, stripes(), goal=0.2, increment=0.2, verbose=2)
    assert small.count_params() <= 0.8 * model.count_params()
    assert not small.trainable_weights
    printed = capsys.readouterr().out
    assert "(0 trainable)" in printed
    assert "frozen, so pruned but not fine-tuned: 4 layers (first, norm, second, head)" in printed


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = small_model()
        small = keras_taylor.compress(model, stripes(), goal=0.2, increment=0.2, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert small.get_layer("first").dtype_policy.name == policy
    assert small.count_params() <= 0.8 * model.count_params()


def test_early_stopping_of_the_user_ends_the_round_not_the_run():
    stop = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: setattr(stop.model, "stop_training", True)
    )
    _, info = keras_taylor.compress(
        small_model(), stripes(), increment=0.15, epochs=5, callbacks=[stop], return_info=True, verbose=0,
        **EVERY_ROUND,
    )  # fmt: skip
    assert [len(r.history["loss"]) for r in info.rounds] == [1, 1]


def test_a_checkpoint_of_the_best_epoch_holds_the_smallest_model(tmp_path):
    """In each round the loss is larger than in the round before."""
    rounds = []
    worse = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: rounds.append(None),
        on_epoch_end=lambda epoch, logs: logs.update(val_accuracy=1.0 - len(rounds) / 10),
    )
    path = tmp_path / "best.keras"
    best = keras.callbacks.ModelCheckpoint(path, "val_accuracy", mode="max", save_best_only=True)
    stop = keras.callbacks.EarlyStopping("val_accuracy", mode="max", restore_best_weights=True)
    arguments = {
        "increment": 0.15,
        "epochs": 3,
        "callbacks": [worse, best, stop],
        "verbose": 0,
        **EVERY_ROUND,
    }
    small = keras_taylor.compress(small_model(), stripes(), **arguments)
    assert len(rounds) == 2 and best.best == pytest.approx(0.8)
    assert keras.models.load_model(path).count_params() == small.count_params()


@pytest.fixture
def interruptible():
    """A process that a shell started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_gives_back_the_last_complete_round():
    model, data = small_model(), stripes()
    epochs = []

    def interrupt(epoch, logs):
        epochs.append(epoch)
        if len(epochs) == 2:
            signal.raise_signal(signal.SIGINT)

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(keras_taylor.CompressionInterrupted, match="after 1 complete rounds") as caught:
        keras_taylor.compress(model, data, increment=0.1, callbacks=[callback], verbose=0, **EVERY_ROUND)
    error = caught.value
    assert isinstance(error, KeyboardInterrupt)
    assert error.model.count_params() == error.info.after["params"] == error.info.rounds[0].params
    assert error.model.predict(data[0], verbose=0).shape == (48, 3)
    assert error.info.stop_reason == "interrupted"


def test_lines_in_a_pipe(capsys):
    keras_taylor.compress(small_model(), stripes(), increment=0.15)
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"remove 30 % of 1,\d{3} parameters \(1,\d{3} trainable\); rounds: 2; ", lines[0])
    assert re.match(r"learning rate: 0\.005, 0\.1 times", lines[1])
    assert re.match(
        r"params: 1,\d{3} now, at most \d+ asked for, \d+ \(\d\d\.\d% less\) can be reached", lines[2]
    )
    assert [line.split(":")[0] for line in lines[3:]] == ["round 1/2", "round 2/2"]
    assert all("\x1b" not in line and "\r" not in line for line in lines)


def test_the_first_row_of_the_table_is_the_given_model(capsys):
    model, data = small_model(), stripes()
    before = model.evaluate(*data, verbose=0, return_dict=True)
    _, info = keras_taylor.compress(
        model, data, increment=0.3, validation_data=data, verbose=0, return_info=True
    )
    first, *_ = re.findall(r"^│ +([01]) (.*)", str(info), re.M)
    assert first[0] == "0" and {f"{before['loss']:.4g}", f"{before['accuracy']:.4g}"} <= set(first[1].split())


@pytest.mark.parametrize(("exclude", "says"), [("conv.*", True), ("hidden", False)])
def test_a_goal_that_leaves_the_flops_says_so(capsys, exclude, says):
    layers = [
        *(keras.layers.Conv2D(6, 3, padding="same", name=f"conv{k}") for k in range(3)),
        *(keras.layers.Flatten(), keras.layers.Dense(12, name="hidden"), keras.layers.Dense(3)),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    _, info = keras_taylor.compress(
        model, stripes(), 0.4, increment=0.4, epochs=0, exclude=exclude, return_info=True
    )
    params, flops = info.reduction["params"], info.reduction["flops"]
    line = (
        f"{params:.1%} of the parameters are gone, and {flops:.1%} of the FLOPs. If it is speed that counts: "
        f'goal={{"flops": {params:.2g}}}'
    )
    assert (line in capsys.readouterr().out.splitlines()) == says == (2 * flops < params)


def test_first_line_says_where_scores_come_from(capsys):
    keras_taylor.compress(small_model(), stripes(), increment=0.3, criterion="magnitude", epochs=0)
    assert "in each: 'magnitude' scores without data, then" in capsys.readouterr().out
    scoring = keras_taylor.Scoring(num_examples=32)
    keras_taylor.compress(small_model(), stripes(), increment=0.3, criterion=scoring, epochs=0)
    assert "in each: 'log_odds' scores from at most 32 examples, then" in capsys.readouterr().out


def test_silence(capfd):
    keras_taylor.compress(small_model(), stripes(), increment=0.3, verbose=0)
    assert capfd.readouterr().out == ""


def test_without_a_terminal_a_line_every_15_seconds_says_how_far_it_is(capsys, monkeypatch):
    """Time goes by as the clock says: 7 seconds a step."""
    seconds = iter(range(0, 10**6, 7))
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    keras_taylor.compress(small_model(), stripes(), increment=0.3, batch_size=8)
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if ": step " in line]
    for phase in ("scoring", "repair", "fine-tuning"):
        assert any(
            re.fullmatch(rf"round 1/1: {phase}: step \d+ of \d+, about \d+ s left", line) for line in said
        )
    keras_taylor.compress(small_model(), stripes(), increment=0.3, batch_size=8, verbose=0)
    assert capsys.readouterr().out == ""


def test_the_first_step_which_compiles_does_not_count_for_the_time_that_is_left(capsys, monkeypatch):
    now = [0.0]

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            now[0] += 1.0 if now[0] else 60.0

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Reporter(2) as reporter:
        (callback,) = reporter.callback("fine-tuning")
        x, y = stripes()
        small_model().fit(x[:40], y[:40], batch_size=1, verbose=0, callbacks=[Clock(), callback])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "fine-tuning: step 1 of 40"
    assert second.endswith("step 16 of 40, about 24 s left") and third.endswith(
        "step 31 of 40, about 9 s left"
    )


def test_live_bar_in_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Reporter("auto", console) as reporter:
        (callback,) = reporter.callback("round 1/1: scoring")
        small_model().fit(*stripes(), verbose=0, callbacks=[callback])
        reporter.say("done")
    assert "scoring" in console.file.getvalue() and "done" in console.file.getvalue()


def called(command, monkeypatch, **names):
    """The arguments that the text of a call passes to `compress`, beside the model and the data."""
    calls = []
    monkeypatch.setattr(keras_taylor, "compress", lambda model, ds, **arguments: calls.append(arguments))
    eval(command, {"keras_taylor": keras_taylor, "model": None, "ds": None, **names})
    return calls[0]


def test_the_command_repeats_the_run(monkeypatch):
    model, (x, y) = small_model(), stripes()
    arguments = {
        "goal": [0.1, {"params": 0.2}],
        "increment": 0.2,
        "exclude": ["first"],
        "selection": keras_taylor.Selection(scope="layer", ratios={"sec.*": (0.1, 0.5)}, round_to=2),
        "learning_rate": 0.01,
        "max_drop": keras_taylor.MetricLimit(1.0, "accuracy"),
        "epochs": 1,
        "class_weight": {0: 1.0, 1: 2.0, 2: 0.5},
    }
    _, info = keras_taylor.compress(
        model,
        (x, y),
        criterion=keras_taylor.Scoring("taylor", num_examples=16),
        validation_data=(x, y),
        callbacks=[keras.callbacks.TerminateOnNaN()],
        verbose=0,
        return_info=True,
        **arguments,
    )
    repeated = called(info.command, monkeypatch)
    scoring = repeated.pop("criterion")
    assert isinstance(scoring, keras_taylor.Scoring)
    assert (scoring.criterion, scoring.ds, scoring.num_examples, scoring.labels) == ("taylor", None, 16, None)
    assert (repeated.pop("validation_data"), repeated.pop("callbacks")) == ((..., ...), [...])
    assert info.command.endswith(")  # ... in validation_data, callbacks: not shown")
    assert repeated == arguments


def smallest_first(statistics):
    return np.arange(statistics.num_units)


def test_the_command_names_functions_and_layers(monkeypatch):
    model = small_model()
    _, info = keras_taylor.compress(
        model, stripes(), 0.2, increment=lambda number: 0.2, criterion=smallest_first,
        exclude=[model.get_layer("first")], epochs=0, return_info=True, verbose=0,
    )  # fmt: skip
    repeated = called(info.command, monkeypatch, smallest_first=smallest_first)
    assert repeated == {
        "goal": 0.2,
        "increment": ...,
        "criterion": smallest_first,
        "exclude": ["first"],
        "epochs": 0,
    }
    assert info.command.endswith("  # ... in increment: not shown")


# --- refusals: before any work, by their words ---------------------------------------------


def refused(error, words, model=None, ds=None, **arguments):
    model = model or small_model()
    with pytest.raises(error, match=words):
        keras_taylor.compress(model, stripes() if ds is None else ds, verbose=0, **arguments)


@pytest.mark.parametrize("goal", [0, 1, 1.2, -1, "30%", {"speed": 0.3}, {"params": 2.0}, True, float("nan")])
def test_goals_that_are_none(goal):
    words = r"`goal` says how much to remove\. .*Received: goal=" + re.escape(repr(goal)) + "$"
    refused(ValueError, words, goal=goal)


def test_goal_out_of_reach():
    words = (
        r"The goal is out of reach: at most \d\d\.\d% of the 1,\d+ params can be removed, which leaves \d+\. "
        r"It is blocked by 'head' \(3 channels: the model's output; \d+ parameters\)\. "
        r"Lower the goal.*Received: goal=0\.999$"
    )
    refused(ValueError, words, goal=0.999)


def test_no_prunable_layer():
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    words = (
        r"The goal is out of reach: at most 0\.0% of the 195 params can be removed, which leaves 195\. It is "
        r"blocked by 'dense' .*Received: goal=0\.3$"
    )
    refused(ValueError, words, model=model)


def test_model_that_is_not_compiled():
    model = keras.Sequential(small_model().layers, name="plain")
    words = r"The model is not compiled with a loss, .*Received: model='plain', not compiled$"
    refused(ValueError, words, model=model)


def test_model_that_is_not_built():
    model = keras.Sequential([keras.layers.Conv2D(4, 3), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    refused(ValueError, r"is not built: its weights do not exist yet\. .*Received: model=", model=model)


def test_names_that_match_nothing():
    words = r"`exclude` names a layer that the model does not have\. .*Received: exclude='third'$"
    refused(ValueError, words, exclude=["third"])
    words = r"`include` names a layer that the model does not have\. .*Received: include='third'$"
    refused(ValueError, words, include=["third"])


def test_unknown_keyword():
    words = r"`compress` has no argument 'epoch', nor has `model\.fit`\. .*Received: epoch=3$"
    refused(TypeError, words, epoch=3)
    words = r"has no argument 'val_data'.*Received: val_data=\(\.\.\., \.\.\.\)$"  # no pages of numbers
    refused(TypeError, words, val_data=(np.zeros((3, 2)), np.zeros(3)))


@pytest.mark.parametrize(
    ("arguments", "spelling"),
    [
        ({"round_to": 8, "scope": "layer"}, "selection=keras_taylor.Selection(round_to=8, scope='layer')"),
        ({"score_examples": 64}, "criterion=keras_taylor.Scoring(num_examples=64)"),
        (
            {"criterion": "taylor", "score_ds": np.zeros(3), "labels": "model"},
            "criterion=keras_taylor.Scoring(criterion='taylor', ds=..., labels='model')",
        ),
        (
            {"max_drop": 0.02, "monitor": "accuracy", "rank": "cost"},
            "max_drop=keras_taylor.MetricLimit(max_drop=0.02, monitor='accuracy'), "
            "selection=keras_taylor.Selection(rank='cost')",
        ),
        ({"max_drop": 0, "baseline": 0.9}, "keras_taylor.MetricLimit(max_drop=0, baseline=0.9)"),
    ],
)
def test_arguments_that_moved_are_refused_with_their_new_spelling(arguments, spelling):
    words = r"part of `.*` now: keras_taylor\.compress\(\.\.\., .*"
    refused(TypeError, words + re.escape(spelling) + r"\)$", **arguments)


def test_a_selection_of_another_type_is_refused():
    words = r"Expected a `keras_taylor\.Selection`\. Received: selection=\{'scope': 'layer'\}$"
    refused(TypeError, words, selection={"scope": "layer"})


def test_unknown_criterion():
    refused(ValueError, r"Unknown criterion\. .*Received: criterion='tailor'$", criterion="tailor")


@pytest.mark.parametrize("increment", [0, -0.1, 1.5, "a"])
def test_increments_that_are_none(increment):
    words = r"`increment` is the fraction .*Received: increment=" + re.escape(repr(increment)) + "$"
    refused(ValueError, words, increment=increment)


def test_schedule_that_does_not_rise():
    refused(
        ValueError, r"The schedule does not rise at round 2: .*Received: increment=", increment=lambda n: 0.1
    )


def test_rounding_to_nothing():
    with pytest.raises(ValueError, match=r"`round_to` is a number of channels\. .*Received: round_to=0$"):
        keras_taylor.Selection(round_to=0)


def test_data_without_examples():
    words = r"The data set is empty\. .*Received: ds with 0 examples$"
    refused(ValueError, words, ds=(np.zeros((0, 8, 8, 1)), np.zeros(0)))


def test_data_without_targets():
    refused(ValueError, r"The data set yields no labels to fine-tune with.*epochs=1$", ds=stripes()[0])


def test_data_of_another_shape():
    words = (
        r"The data does not fit the model's inputs\. .*Received: ds with x of shapes \[\(None, 8, 9, 1\)\]$"
    )
    refused(ValueError, words, ds=(np.zeros((4, 8, 9, 1)), np.zeros(4)))


def test_data_with_nan():
    x, y = stripes()
    x[7, 0, 0, 0] = np.nan
    words = r"NaN or infinity in 1 of 48 examples\. .*Received: x with the first such example at index 7$"
    refused(ValueError, words, ds=(x, y))


def test_weights_with_nan():
    model = small_model()
    layer = model.get_layer("second")
    layer.kernel.assign(np.full(layer.kernel.shape, np.nan))
    refused(
        ValueError,
        r"The output of layer 'second' is NaN or infinite: .*Received: ds, whose batch 0",
        model=model,
    )


def test_verbosity_that_is_none():
    with pytest.raises(ValueError, match=r"`verbose` is 0, 1, 2 or \"auto\"\. Received: verbose=3$"):
        keras_taylor.compress(small_model(), stripes(), verbose=3)


def test_metrics_before_and_after_are_those_of_evaluate():
    model, (x, y) = small_model(), stripes()
    arguments = {
        "goal": 0.2,
        "increment": 0.2,
        "epochs": 1,
        "batch_size": 16,
        "verbose": 0,
        "return_info": True,
    }
    small, info = keras_taylor.compress(model, (x, y), validation_data=(x[:20], y[:20]), **arguments)
    for when, one in (("before", model), ("after", small)):
        expected = one.evaluate(x[:20], y[:20], verbose=0, return_dict=True)
        assert info.metrics[when] == pytest.approx(expected, rel=1e-4)
    assert info.layers == {"first": 8, "second": 12, "head": 3} and info.name == "small"
    assert "goal=0.2" in info.command and "epochs=1" in info.command
    assert info.environment["keras"] == keras.__version__


def test_validation_data_without_end_is_not_read_to_its_end():
    model, (x, y) = small_model(), stripes()

    def endless():
        while True:
            yield x[:16], y[:16]

    _, info = keras_taylor.compress(
        model, (x, y), 0.2, increment=0.2, validation_data=endless(), validation_steps=2, return_info=True
    )
    assert info.metrics == {} and len(info.rounds[0].history["val_loss"]) == 1


@pytest.mark.once
def test_frozen_layers_of_a_model_in_the_model_are_named(capsys):
    base = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")]
    )
    base.name = "base"
    base.get_layer("a").trainable = False
    model = keras.Sequential([keras.Input((6,)), base, keras.layers.Dense(2, name="head")])
    model.compile("adam", "mse")
    data = np.zeros((32, 6), "float32"), np.zeros((32, 2), "float32")
    keras_taylor.compress(model, data, 0.3, increment=0.3, verbose=2)
    assert "frozen, so pruned but not fine-tuned: 1 layer (base/a)\n" in capsys.readouterr().out
    base.trainable = False
    model.compile("adam", "mse")
    keras_taylor.compress(model, data, 0.3, increment=0.3, verbose=2)
    assert "frozen, so pruned but not fine-tuned: 1 layer (base)\n" in capsys.readouterr().out


@pytest.mark.once
def test_the_line_of_a_round_has_room_for_two_outputs(capsys):
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(8, activation="relu")(inputs)
    names = {"left": ["mae"], "right": ["mae"]}
    model = keras.Model(inputs, {name: keras.layers.Dense(1, name=name)(hidden) for name in names})
    model.compile("adam", {"left": "mse", "right": "mse"}, metrics=names)
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    y = dict.fromkeys(names, x[:, :1])
    options = {"increment": 0.2, "validation_data": (x, y), "return_info": True, "verbose": 2}
    _, info = keras_taylor.compress(model, (x, y), 0.4, **options)
    assert [len(one.history) for one in info.rounds] == [0, 10]  # all are kept
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match("round ./2: .* left", line)]
    for line in lines:
        shown = [part.split()[0] for part in line.partition(" s;")[0].split(", ")]
        assert {name for name in shown if "_" in name} == {"val_left_mae", "val_loss", "val_right_mae"}
    assert len(lines) == 2
