"""`compress` with several goals, ceilings, and limits on a metric."""

import re

import keras
import numpy as np
import pytest
from stripes import same, small_model, state, stripes
from test_compress import refused

import keras_taylor
from keras_taylor.budget.goals import Goal, parse_goals
from keras_taylor.budget.measuring import Measurements
from keras_taylor.budget.schedule import schedule_rounds

pytestmark = pytest.mark.sweep(4)


def run(goal, model=None, ds=None, **arguments):
    """A run without training, unless it is asked for."""
    arguments = {"epochs": 0, "criterion": "magnitude", "verbose": 0, "return_info": True, **arguments}
    return keras_taylor.compress(model or small_model(), ds or stripes(), goal, **arguments)


def noise(num=64):
    """Images and labels that have nothing to do with each other: learnt by heart, forgotten with channels."""
    random = np.random.default_rng(1)
    return random.normal(size=(num, 8, 8, 1)).astype("float32"), random.integers(0, 3, num)


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    model = small_model()
    model.fit(*noise(), epochs=60, batch_size=16, verbose=0)
    assert model.evaluate(*noise(), verbose=0, return_dict=True)["accuracy"] > 0.95
    return model


def test_a_list_of_goals_gives_a_model_at_each():
    x, y = stripes()
    models, info = run([0.2, 0.4, {"params": 0.6}], increment=0.1, validation_data=(x, y))
    before = info.before["params"]
    assert [stop["goal"] for stop in info.stops] == [{"params": 0.2}, {"params": 0.4}, {"params": 0.6}]
    assert [stop["round"] for stop in info.stops] == [2, 4, 6] and len(info.rounds) == 6
    for model, stop, goal in zip(models, info.stops, (0.2, 0.4, 0.6), strict=True):
        assert model.count_params() == stop["costs"]["params"] <= (1 - goal) * before
        expected = model.evaluate(x, y, verbose=0, return_dict=True)
        assert stop["metrics"] == pytest.approx(expected, rel=1e-4)
    assert info.metrics["after"] == info.stops[-1]["metrics"] and info.after == info.stops[-1]["costs"]
    assert f"{models[1].count_params():,} ({models[1].count_params() / before:.1%})" in str(info)
    again = keras_taylor.Info.from_json(info.to_json())
    assert again.stops == info.stops and str(again) == str(info)


def test_the_models_of_earlier_goals_are_left_alone():
    class Keep(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            ends.append([np.array(keras.ops.convert_to_numpy(w)) for w in self.model.weights])

    ends = []
    last = keras_taylor.FineTuning(keep_best=False)
    models, _ = run([0.2, 0.5], increment=0.5, epochs=1, callbacks=[Keep()], learning_rate=last)
    for model, then in zip(models, ends, strict=True):
        assert same(map(keras.ops.convert_to_numpy, model.weights), then)


@pytest.mark.slow
def test_goals_between_rounds_are_met_all_the_same():
    _, info = run([0.25, 0.3], increment=0.2)
    gone = [1 - one.params / info.before["params"] for one in info.rounds]
    assert len(gone) == 3 and gone[0] >= 0.2 and gone[1] >= 0.25 and gone[2] >= 0.3


def test_steps_go_straight_from_goal_to_goal():
    before = {"params": 1000, "flops": 4000}
    goals = parse_goals([{"params": 0.2, "flops": 3600}, {"params": 0.6, "flops": 0.5}])
    found = schedule_rounds(goals, before, 0.1)
    assert [step.goal_index for step in found] == [None, 0, None, None, None, 1]
    assert [step.ceilings["params"] for step in found] == pytest.approx([900, 800, 700, 600, 500, 400])
    flops = [step.ceilings["flops"] for step in found]
    assert flops == pytest.approx([3800, 3600, 3200, 2800, 2400, 2000])


@pytest.mark.parametrize(
    "goals, gone, trainings",
    [
        ([0.2], [0.2], [4]),
        ([0.3], [0.15, 0.3], [0, 6]),
        ([0.75], [0.25, 0.5, 0.75], [0, 0, 15]),
        ([0.2, 0.4], [0.2, 0.4], [4, 4]),
        ([0.1, 0.6], [0.1, 0.2, 0.4, 0.6], [2, 0, 0, 10]),
    ],
)
def test_by_default_rounds_on_the_way_are_few_and_the_training_is_as_long(goals, gone, trainings):
    found = schedule_rounds(parse_goals(goals), {"params": 1000})
    assert [1 - step.ceilings["params"] / 1000 for step in found] == pytest.approx(gone)
    assert [step.trainings for step in found] == trainings


@pytest.mark.slow
def test_a_ceiling_is_kept_to_and_said(capsys):
    model = small_model()
    small, info = run({"params": 700}, model, verbose=2)
    assert 600 < small.count_params() <= 700
    out = capsys.readouterr().out
    assert f"leave at most 700 of {model.count_params():,} parameters" in out
    assert f"params: {model.count_params():,} now, at most 700 asked for" in out
    assert info.goal == {"params": 700}


def test_a_goal_that_is_met_already_gives_a_copy():
    model = small_model()
    copy, info = run({"params": 1_000_000}, model)
    assert copy is not model and same(state(copy), state(model))
    assert info.stop_reason == "the model keeps to the goal as it is" and not info.rounds
    (first, second), _ = run([{"params": 1_000_000}, {"params": 700}], model)
    assert same(state(first), state(model)) and second.count_params() <= 700


def test_as_far_as_the_metric_allows(trained):
    x, y = noise()
    small, info = run(None, trained, increment=0.2, repair=False, max_drop=0.1, validation_data=(x, y))
    reference = trained.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    *held, last = info.rounds
    assert all(one.held and one.metrics["accuracy"] >= reference - 0.1 for one in held)
    assert not last.held and last.metrics["accuracy"] < reference - 0.1
    assert small.count_params() == held[-1].params == info.after["params"] < trained.count_params()
    assert small.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] == held[-1].metrics["accuracy"]
    assert re.match(
        rf"after round {last.number} 'accuracy' is 0\.\d+, worse than `max_drop=0.1` from", info.stop_reason
    )
    assert f"{last.number}, undone" in str(info)


def test_a_goal_that_the_metric_does_not_allow_warns(trained):
    x, y = noise()
    limit = keras_taylor.MetricLimit(0, "val_loss", baseline=0.5)
    arguments = {"increment": 0.2, "repair": False, "max_drop": limit}
    with pytest.warns(UserWarning, match=r"after round \d 'loss' is .*the round is undone"):
        models, info = run([0.2, 0.95], trained, validation_data=(x, y), **arguments)
    assert [stop["goal"] for stop in info.stops] == [{"params": 0.2}] and len(models) == len(info.stops) + (
        len([one for one in info.rounds if one.held]) > 1
    )
    assert models[-1].evaluate(x, y, verbose=0, return_dict=True)["loss"] <= 0.5


def test_nothing_is_lost_if_the_first_round_goes_too_far(trained):
    with pytest.warns(UserWarning, match="after round 1"):
        small, info = run(0.9, trained, increment=0.9, repair=False, max_drop=0.01, validation_data=noise())
    assert same(state(small), state(trained)) and info.after == info.before
    assert info.metrics["after"] == info.metrics["before"]


def test_a_picture_shows_the_curve(trained, tmp_path):
    pytest.importorskip("matplotlib")
    figure = pytest.importorskip("matplotlib.figure")
    _, info = run(None, trained, increment=0.2, repair=False, max_drop=0.1, validation_data=noise())
    seen = []
    original = figure.Figure.savefig

    def savefig(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    figure.Figure.savefig = savefig
    try:
        info.plot(tmp_path / "rounds.png")
    finally:
        figure.Figure.savefig = original
    panel = seen[0].axes[-1]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("parameters", "validation accuracy")
    held = [info.before["params"]] + [one.params for one in info.rounds if one.held]
    assert panel.lines[0].get_xdata().tolist() == held
    assert panel.lines[-1].get_marker() == "x"


def test_a_run_with_several_goals_goes_on(tmp_path):
    class Stop(Exception):
        pass

    def stop(epoch, logs):
        calls.append(epoch)
        if len(calls) == 3:
            raise Stop

    calls, model = [], small_model()
    arguments = {"increment": 0.2, "epochs": 1, "backup_dir": tmp_path / "there"}
    with pytest.raises(Stop):
        run([0.2, 0.4, 0.6], model, callbacks=[keras.callbacks.LambdaCallback(stop)], **arguments)
    resumed, info = run([0.2, 0.4, 0.6], model, **arguments)
    assert [one.number for one in info.rounds] == [1, 2, 3] and len(info.stops) == 3
    assert [one.count_params() for one in resumed] == [stop["costs"]["params"] for stop in info.stops]
    again, _ = run([0.2, 0.4, 0.6], model, **arguments)
    for first, second in zip(resumed, again, strict=True):
        assert same(state(first), state(second))


BOTH_LIMITS = {"accuracy": 1.0, "loss": 0.2}


@pytest.mark.parametrize(
    ("max_drop", "names"),
    [
        (BOTH_LIMITS, ["loss"]),
        ({"val_accuracy": 0.1, "loss": 1e9}, ["accuracy"]),
        ({"accuracy": keras_taylor.MetricLimit(0, baseline=0.9), "loss": 0}, ["accuracy", "loss"]),
    ],
)
def test_each_metric_has_its_own_limit(max_drop, names, trained, capsys):
    data = noise()
    arguments = {"increment": 0.2, "repair": False, "validation_data": data, "verbose": 2}
    if len(names) > 1:
        arguments["increment"] = 0.9
    small, info = run(None, trained, max_drop=max_drop, **arguments)
    *held, last = info.rounds
    before = info.metrics["before"]
    for one in held:
        assert one.held and all(is_within(max_drop, one.metrics, before).values())
    within = is_within(max_drop, last.metrics, before)
    assert not last.held and [name for name in within if not within[name]] == names
    assert [name for name in ("accuracy", "loss") if f"'{name}' is" in info.stop_reason] == names
    assert info.stop_reason.startswith(f"after round {last.number} '{names[0]}' is ")
    worst = "0.9" if names[1:] else f"{before['accuracy'] - max_drop.get('accuracy', 0.1):.4g}"
    assert f"on the validation data, as long as 'accuracy' is {worst} or better" in capsys.readouterr().out
    assert small.count_params() == info.after["params"]
    assert keras_taylor.Info.from_json(info.to_json()) == info and "max_drop={" in info.command


def is_within(max_drop, metrics, before):
    """Name -> whether a metric keeps to its limit."""
    found = {}
    for name, limit in max_drop.items():
        name = name.removeprefix("val_")
        if isinstance(limit, keras_taylor.MetricLimit):
            found[name] = metrics[name] >= limit.baseline
        else:
            worse = metrics[name] - before[name] if name == "loss" else before[name] - metrics[name]
            found[name] = worse <= limit
    return found


def test_a_run_with_limits_on_several_metrics_goes_on(trained, tmp_path):
    arguments = {"increment": 0.2, "repair": False, "validation_data": noise(), "backup_dir": tmp_path}
    small, info = run(None, trained, max_drop=BOTH_LIMITS, **arguments)
    again, then = run(None, trained, max_drop=dict(BOTH_LIMITS), **arguments)
    assert same(state(small), state(again)) and then.stop_reason == info.stop_reason
    words = r"max_drop: \{'accuracy': 1.0, 'loss': 0.2\} there, \{'accuracy': 1.0, 'loss': 0.3\} here"
    with pytest.raises(ValueError, match=words):
        run(None, trained, max_drop={**BOTH_LIMITS, "loss": 0.3}, **arguments)


@pytest.mark.slow
def test_a_run_that_its_metric_ended_is_over(trained, tmp_path):
    arguments = {"increment": 0.2, "repair": False, "max_drop": 0.1, "validation_data": noise()}
    arguments["backup_dir"] = tmp_path
    small, info = run(None, trained, **arguments)
    again, then = run(None, trained, **arguments)
    assert same(state(small), state(again)) and then.stop_reason == info.stop_reason
    assert [one.number for one in then.rounds] == [one.number for one in info.rounds]
    with pytest.raises(ValueError, match=r"max_drop: 0\.1 there, 0\.2 here"):
        run(None, trained, **{**arguments, "max_drop": 0.2})


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (r"Expected one or more, about the same costs\..*\[\]", {"goal": []}),
        (r"about the same costs\..*flops", {"goal": [0.2, {"flops": 0.3}]}),
        (r"Expected each to ask for more than the one before it\.", {"goal": [0.4, 0.2]}),
        (r"Expected each to ask for more than the one before it\.", {"goal": [0.4, 0.4]}),
        (r"`goal` says how much to remove.*Received: goal=None", {"goal": None}),
        (r"Expected `validation_data`, in a form.*max_drop=0.1", {"max_drop": 0.1}),
        (r"`max_drop` is a number from 0 on.*-1", {"max_drop": -1, "validation_data": stripes()}),
        (
            r"There is no metric 'f1'.*'accuracy'.*monitor='f1'",
            {"max_drop": keras_taylor.MetricLimit(0, "f1"), "validation_data": stripes()},
        ),
        (
            r"The model itself does not reach the baseline: its 'accuracy' .*baseline=0.99",
            {"max_drop": keras_taylor.MetricLimit(0, baseline=0.99), "validation_data": stripes()},
        ),
        (
            r"Expected `validation_data`.*max_drop=\{'loss': 1, 'accuracy': 0.1\}",
            {"max_drop": {"loss": 1, "accuracy": 0.1}},
        ),
        (
            r"`max_drop` sets no limit\. Expected one metric or more, such as .*max_drop=\{\}",
            {"max_drop": {}},
        ),
        (r"`max_drop` is a number from 0 on.*max_drop=-1", {"max_drop": {"accuracy": -1}}),
        (
            r"There is no metric 'f1'.*Expected one of '(accuracy|loss)', '(accuracy|loss)'\. "
            r"Received: max_drop=keras_taylor.MetricLimit\(max_drop=0.2, monitor='f1'\)",
            {"max_drop": {"accuracy": 0.1, "f1": 0.2}, "validation_data": stripes()},
        ),
        (
            r"a limit under 'loss' that is about another metric\. Expected a limit without `monitor`, or "
            r"with the same name\. Received: max_drop=\{'loss': MetricLimit\(.*monitor='accuracy'",
            {"max_drop": {"loss": keras_taylor.MetricLimit(0, "accuracy")}},
        ),
    ],
)
def test_refusals(words, arguments):
    refused(ValueError, words, **{"epochs": 0, **arguments})


def test_ceilings_are_exact_at_the_end():
    goal = Goal({"params": 333, "flops": 0.1})
    assert goal.ceilings({"params": 1000, "flops": 10}) == {"params": 333, "flops": 9.0}
    assert np.isclose(goal.fractions_to_remove({"params": 1000, "flops": 10})["params"], 0.667)


@pytest.mark.slow
def test_a_file_is_under_its_size(tmp_path, capsys):
    model = small_model()
    whole = keras_taylor.export(model, tmp_path / "whole.tflite").num_bytes
    ceiling = round(0.8 * whole)
    small, info = run({"bytes": ceiling, "params": 0.2}, model, increment=0.3, verbose=2)
    written = keras_taylor.export(small, tmp_path / "small.tflite").num_bytes
    assert 0.9 * ceiling < written <= ceiling and small.count_params() <= 0.8 * model.count_params()
    assert (
        info.before["bytes"] == whole and info.after["bytes"] == written == info.stops[-1]["costs"]["bytes"]
    )
    assert info.goal == {"bytes": ceiling, "params": 0.2} and f"{written:,}" in str(info)
    out = capsys.readouterr().out
    assert f"leave at most {ceiling:,} of {whole:,} bytes and remove 20 % of" in out
    assert f"bytes: {whole:,} now, at most {ceiling:,} asked for" in out
    assert keras_taylor.Info.from_json(info.to_json()).reduction == info.reduction


def test_a_file_that_cannot_be_so_small_is_refused():
    refused(
        ValueError, r"The goal is out of reach: at most \d+\.\d% of the [\d,]+ bytes can", goal={"bytes": 100}
    )


@pytest.mark.parametrize(
    "arguments",
    [{"scope": "layer"}, {"rank": "cost"}, {"ratios": {"first": (0, 0.25)}}],
)
def test_choices_reach_every_round(arguments):
    model = small_model()
    selection = keras_taylor.Selection(**arguments)
    _, info = run({"params": 0.5}, model, increment=0.25, selection=selection)
    scores = keras_taylor.score(model, criterion="magnitude")
    plan = keras_taylor.make_plan(model, scores, {"params": 0.5}, selection=selection)
    assert {n: len(p.kept) for n, p in info.plan.layers.items()} == {
        n: len(p.kept) for n, p in plan.layers.items()
    }


def test_what_is_measured_is_measured_after_the_checks(monkeypatch):
    def measure(*args, **kwargs):
        raise AssertionError("measured before the data was looked at")

    monkeypatch.setattr("keras_taylor.loop.preparation.Measurements", measure)
    refused(ValueError, "Received: max_drop=0.1", goal={"bytes": 5000}, max_drop=0.1)
    refused(ValueError, "Unknown criterion", goal={"bytes": 5000}, criterion="best")


class BusyMachine(Measurements):
    """A byte for each parameter; finished models are twice as large the first times they are measured."""

    busy_for = 0

    def measure(self, model):
        factor = 1
        if model.compiled and self.before and self.busy_for:
            factor, type(self).busy_for = 2, self.busy_for - 1
        return dict.fromkeys(self.keys, factor * model.count_params())


def dense():
    """A model that takes little time on every backend, and data."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(30), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model, (np.zeros((8, 4)), np.zeros((8, 3)))


def test_a_measurement_that_exceeds_the_goal_is_repeated(monkeypatch):
    monkeypatch.setattr("keras_taylor.loop.preparation.Measurements", BusyMachine)
    monkeypatch.setattr(BusyMachine, "busy_for", 2)
    small, info = run({"bytes:keras": 0.3}, *dense(), repair=False, increment=0.3)
    assert info.stop_reason == "goal reached" and info.stops[-1]["missed"] == []
    assert info.after["bytes:keras"] == small.count_params()


def test_a_goal_that_does_not_hold_when_it_is_measured_again_is_missed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("keras_taylor.loop.preparation.Measurements", BusyMachine)
    monkeypatch.setattr(BusyMachine, "busy_for", 5)
    model, data = dense()
    goals = [{"bytes:keras": 0.15}, {"bytes:keras": 0.3}]
    arguments = {"increment": 0.15, "repair": False, "backup_dir": tmp_path}
    with pytest.warns(UserWarning, match="the goal does not hold after round 1: .* asked"):
        models, info = run(goals, model, data, verbose=2, **arguments)
    whole, asked = model.count_params(), [round((1 - part) * model.count_params()) for part in (0.15, 0.3)]
    texts = []
    for stop, ceiling in zip(info.stops, asked, strict=True):
        found = stop["costs"]["bytes:keras"]
        texts.append(f"{found:,} bytes:keras were measured, at most {ceiling:,} bytes:keras asked ")
    first, second = info.stops
    assert first["missed"] == [texts[0] + f"({2 * models[0].count_params() / (0.85 * whole) - 1:.1%} more)"]
    assert second["missed"] == [] and len(models) == 2  # it was not as busy any more
    assert info.stop_reason == f"the goal does not hold after round 1: {first['missed'][0]}"
    assert f"stopped: {info.stop_reason}" in capsys.readouterr().out and first["missed"][0] in str(
        info.to_json()
    )
    with pytest.warns(UserWarning, match="the goal does not hold after round 1"):
        _, again = run(goals, model, data, **arguments)
    assert again.stop_reason == info.stop_reason


def test_criteria_that_count_costs_take_what_stands_for_the_measured_one():
    small, info = run({"bytes:keras": 0.1}, criterion="fisher", increment=0.2)
    assert info.after["bytes:keras"] <= 0.9 * info.before["bytes:keras"]
    assert small.count_params() < info.before["params"]


def test_an_interrupt_keeps_the_models_of_earlier_goals():
    def stop(epoch, logs):
        calls.append(epoch)
        if len(calls) == 2:
            raise KeyboardInterrupt

    calls = []
    with pytest.raises(keras_taylor.CompressionInterrupted) as error:
        run([0.2, 0.4], increment=0.2, epochs=1, callbacks=[keras.callbacks.LambdaCallback(stop)])
    (model,) = error.value.models
    assert model is error.value.model and model.count_params() == error.value.info.after["params"]
