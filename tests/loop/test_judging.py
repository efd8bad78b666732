"""Which state of a round's model is kept: no training makes the result worse than repair left it."""

import keras
import numpy as np
import pytest
import zoo
from helpers import EAGER, predict, reachable, targets_of
from stripes import same, small_model, stripes

import keras_taylor

pytestmark = pytest.mark.sweep(3)

NETWORKS = (
    "chain", "residual", "concat", "inverted_residual", "two_outputs", "dictionaries", "layernorm", "conv1d",
    "lstm_tagger", "subclassed",
)  # fmt: skip
RATE = 0.01


class Recorder(keras.callbacks.Callback):
    """Weights before `fit`, and after each epoch of it; those of the last `fit`."""

    def on_train_begin(self, logs=None):
        self.states = [self.model.get_weights()]

    def on_epoch_end(self, epoch, logs=None):
        self.states.append(self.model.get_weights())


def compress(model, ds, **arguments):
    """A run of one round, and its `Round`."""
    arguments = {"increment": 1.0, "criterion": "magnitude", "verbose": 0, **arguments}
    small, info = keras_taylor.compress(model, ds, return_info=True, **arguments)
    return small, info.rounds[-1]


def of_the_zoo(name, num):
    """A compiled network, inputs, and half of the largest goal."""
    model = zoo.build(name)
    optimizer = keras.optimizers.SGD(RATE, momentum=0.9)
    model.compile(optimizer, "mse", run_eagerly=EAGER)
    return model, zoo.inputs_of(model, num), reachable(model) / 2


def check_untrained(name, y, **arguments):
    """Training moved the weights; the result has those from before it."""
    model, x, goal = of_the_zoo(name, 60)
    recorder = Recorder()
    labels = targets_of(model, x) if y == "noise" else predictions(model, x)
    small, done = compress(
        model, (x, labels), goal=goal, epochs=2, callbacks=[recorder], batch_size=20, **arguments
    )
    assert not same(recorder.states[0], recorder.states[-1])
    assert same(small.get_weights(), recorder.states[0])
    assert done.kept_epoch == 0 and done.judged["reason"]
    if y == "noise":
        assert done.judged["measure"] == "divergence"
    said = f"epoch 0 of {done.num_epochs} kept, {done.judged['reason']}: {done.judged['measure']} "
    assert done.verdict().startswith(said)


def predictions(model, x):
    """What the model says, in the structure of its targets."""
    return keras.tree.pack_sequence_as(targets_of(model, x), predict(model, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_that_are_noise(name):
    check_untrained(name, "noise", learning_rate=RATE)


@pytest.mark.filterwarnings("ignore:.*an earlier state of its model is kept")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_a_learning_rate_that_is_a_hundred_times_too_high(name):
    check_untrained(name, "predictions", learning_rate=100 * RATE)


@pytest.mark.parametrize("name", NETWORKS)
def test_ten_examples_are_too_few_to_train_on(name):
    model, x, goal = of_the_zoo(name, 10)
    ds = x, targets_of(model, x)
    repaired, _ = compress(model, ds, goal=goal, epochs=0)
    small, done = compress(model, ds, goal=goal, epochs=2)
    assert same(small.get_weights(), repaired.get_weights())
    assert done.verdict() == "not trained, of 10 examples at most 1 can be held out"


def test_too_few_examples_are_mentioned_and_train_what_is_not_repaired(trained, capsys):
    model, _, arguments = trained
    ds = stripes(12)
    _, done = compress(model, ds, goal=0.5, verbose=2)
    assert done.step_losses == []
    line = "no fine-tuning, since nothing could tell whether it helps: of 12 examples at most 1 can be held"
    assert line in capsys.readouterr().out
    _, done = compress(model, ds, verbose=2, **arguments)
    assert len(done.step_losses) == 3 and done.verdict() == ""
    assert "no fine-tuning" not in capsys.readouterr().out


# --- which state ----------------------------------------------------------------------------


class Lesson(keras.callbacks.Callback):
    """Adds offsets to a bias of the head between epochs; 99 makes everything the first class."""

    def __init__(self, *offsets):
        super().__init__()
        self.offsets, self.weights, self.optimizers = offsets, [], []

    def on_train_begin(self, logs=None):
        self._note()

    def on_epoch_begin(self, epoch, logs=None):
        if epoch:
            self._add(-self.offsets[epoch - 1])

    def on_epoch_end(self, epoch, logs=None):
        self._add(self.offsets[epoch])
        self._note()

    def _add(self, offset):
        bias = self.model.get_layer("head").bias
        bias.assign(keras.ops.convert_to_numpy(bias) + np.array([offset, 0, 0], "float32"))

    def _note(self):
        self.weights.append(self.model.get_weights())
        self.optimizers.append(values(state_of(self.model.optimizer)))


def state_of(optimizer):
    return [v for v in optimizer.variables if v is not optimizer.learning_rate]


def values(variables):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


@pytest.fixture(scope="module")
def trained():
    """A model, and how to compress it: the cut is not repaired, so that training helps."""
    keras.utils.set_random_seed(0)
    model, (x, y) = small_model(metrics=["accuracy", first_logit]), stripes(300)
    model.fit(x, y, batch_size=100, verbose=0)  # which leaves much to learn
    return model, (x, y), {"goal": 0.5, "repair": False, "epochs": 3, "learning_rate": 0.02}


def first_logit(y, logits):
    return logits[:, 0]


def on_validation_data(ds):
    return {"validation_data": tuple(part[:30] for part in ds)}


@pytest.mark.parametrize("on", ["validation data", "held-out examples"])
@pytest.mark.parametrize(
    ("offsets", "best"), [((99, 0, 99), 2), ((0, 99, 99), 1), ((99, 99, 0), 3), ((99, 99, 99), 0)], ids=str
)
def test_the_best_epoch_is_kept_with_its_optimizer(offsets, best, on, trained):
    model, ds, arguments = trained
    lesson, data = Lesson(*offsets), on_validation_data(ds) if "data" in on else {}
    small, done = compress(model, ds, callbacks=[lesson], **arguments, **data)
    assert done.kept_epoch == best and len(done.judged["metrics"]) == 4
    assert done.judged["measure"] == "loss" and on in done.judged["examples"]
    assert same(small.get_weights(), lesson.weights[best])
    if best:
        assert same(values(state_of(small.optimizer)), lesson.optimizers[best])
    assert values([small.optimizer.learning_rate]) == values([model.optimizer.learning_rate])  # as compiled
    before, after = (done.judged_values[state] for state in ("cut", "trained"))  # there is no repair
    assert before < after if best == 0 else before > after


def test_the_metric_with_a_limit_is_what_counts(trained):
    model, ds, arguments = trained
    limit = keras_taylor.MetricLimit(100, monitor="first_logit", mode="max")
    lesson = Lesson(0, 99, 50)
    data = {"max_drop": limit, "callbacks": [lesson], **on_validation_data(ds)}
    small, info = keras_taylor.compress(
        model, ds, increment=1.0, criterion="magnitude", verbose=0, return_info=True, **arguments, **data
    )
    done = info.rounds[0]
    assert done.kept_epoch == 2 and same(small.get_weights(), lesson.weights[2])
    assert done.metrics["first_logit"] == info.metrics["after"]["first_logit"]
    assert done.judged_values["trained"] == done.metrics["first_logit"]
    found = small.evaluate(*data["validation_data"], verbose=0, return_dict=True)
    assert done.metrics == pytest.approx(found, rel=1e-4)


def same_for_all(labels, outputs):
    return keras.ops.ones_like(outputs[:, 0])


def test_where_the_metric_stays_the_same_the_loss_counts(trained):
    shared, ds, arguments = trained
    model = keras.Model(shared.inputs, shared.outputs)  # other tests use the compiled one
    model.compile(keras.optimizers.SGD(0.02), shared.loss, metrics=[same_for_all], run_eagerly=EAGER)
    limit, lesson = keras_taylor.MetricLimit(0.5, monitor="same_for_all", mode="max"), Lesson(99, 0, 50)
    small, done = compress(
        model, ds, max_drop=limit, callbacks=[lesson], **arguments, **on_validation_data(ds)
    )
    assert [one["same_for_all"] for one in done.judged["metrics"]] == [1, 1, 1, 1]
    assert done.kept_epoch == 2 and same(small.get_weights(), lesson.weights[2])


class Shift(Lesson):
    """Adds its offsets to all logits: the loss stays."""

    def _add(self, offset):
        bias = self.model.get_layer("head").bias
        bias.assign(keras.ops.convert_to_numpy(bias) + offset)


def test_with_several_limits_the_best_state_keeps_to_all_of_them(trained):
    model, ds, arguments = trained
    shift = Shift(0, 0, -99)
    limits = {"first_logit": keras_taylor.MetricLimit(50, mode="max"), "loss": 99}
    data = {"max_drop": limits, "callbacks": [shift], **on_validation_data(ds)}
    small, done = compress(model, ds, **arguments, **data)
    losses = [one["loss"] for one in done.judged["metrics"]]
    assert losses[3] < losses[2] < losses[0] and done.judged["measure"] == "loss"
    assert done.held and done.kept_epoch == 2 and same(small.get_weights(), shift.weights[2])


def test_where_no_state_keeps_to_the_limits_the_loss_counts(trained):
    model, ds, arguments = trained
    rounds = []
    for mode, sign in (
        ("min", 1),
        ("max", -1),
    ):  # the cut moves the logit in one direction; training does so, too
        limits = {"first_logit": keras_taylor.MetricLimit(0, mode=mode), "loss": 1e9}
        lesson = Lesson(99 * sign, 2 * sign, 99 * sign)
        data = {"max_drop": limits, "callbacks": [lesson], **on_validation_data(ds)}
        with np.errstate(invalid="raise"):
            rounds.append(compress(model, ds, **arguments, **data)[1])
    (done,) = [one for one in rounds if not one.held]
    losses = [one["loss"] for one in done.judged["metrics"]]
    assert done.kept_epoch == np.argmin(losses) and len(losses) == 4


def test_the_last_state_is_the_one_that_callbacks_leave(trained):
    model, ds, arguments = trained
    lesson = Lesson(0, 99, 99)
    stop = keras.callbacks.EarlyStopping("val_loss", mode="max", restore_best_weights=True)
    data = on_validation_data(ds)
    small, done = compress(model, ds, callbacks=[lesson, stop], **arguments, **data)
    assert (done.num_epochs, done.kept_epoch, done.epochs) == (2, 1, 3)
    assert done.verdict().startswith("epoch 1 of 2 kept, stopped after 2 of 3 epochs: loss ")
    assert same(small.get_weights(), lesson.weights[1])

    lesson = Lesson(99, 99, 99)
    end = keras.callbacks.LambdaCallback(on_train_end=lambda logs: lesson._add(-99))
    small, done = compress(model, ds, callbacks=[lesson, end], **arguments, **data)
    assert done.kept_epoch == 3
    assert same(small.get_weights()[:-1], lesson.weights[3][:-1])
    np.testing.assert_allclose(small.get_weights()[-1][0], lesson.weights[3][-1][0] - 99, rtol=1e-4)


def test_a_loss_that_becomes_nan_takes_nothing_away(trained):
    model, ds, arguments = trained
    lesson = Lesson(0, np.nan, 0)
    with pytest.warns(
        UserWarning, match=r"the loss became NaN at fine-tuning step 21 in round 1: an earlier"
    ):
        small, done = compress(model, ds, callbacks=[lesson], **arguments, **on_validation_data(ds))
    assert done.kept_epoch == 1 and same(small.get_weights(), lesson.weights[1])
    assert done.judged["reason"] == "the loss became NaN at fine-tuning step 21"


def test_one_argument_turns_it_off(trained):
    model, ds, arguments = trained
    lesson = Lesson(0, 99, 99)
    arguments = {**arguments, "learning_rate": keras_taylor.FineTuning(0.02, keep_best=False)}
    small, info = keras_taylor.compress(
        model, ds, increment=1.0, verbose=0, return_info=True, callbacks=[lesson], **arguments
    )
    done = info.rounds[0]
    assert done.judged is None and done.verdict() == "" and done.kept_epoch == 3
    assert same(small.get_weights(), lesson.weights[3])
    assert "learning_rate=keras_taylor.FineTuning(learning_rate=0.02, keep_best=False)" in info.command


# --- on which examples ----------------------------------------------------------------------


@pytest.mark.parametrize(("num", "held_out"), [(300, 30), (2000, 128), (3000, 150)], ids=str)
def test_a_share_of_arrays_is_held_out(num, held_out, trained):
    model, _, arguments = trained
    _, done = compress(model, stripes(num), **{**arguments, "epochs": 1, "batch_size": 100})
    assert done.judged["examples"] == f"{held_out} held-out examples"
    assert len(done.step_losses) == -(-(num - held_out) // 100)


def test_first_batches_of_a_data_set(trained):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return tuple(part[30 * index : 30 * index + 30] for part in stripes(300))

    model, _, arguments = trained
    _, done = compress(model, Batches(), **{**arguments, "epochs": 1})
    assert done.judged["examples"] == "30 examples of the first batches"
    assert len(done.step_losses) == 10


def test_weights_of_validation_examples_count_and_class_weights_do_not(trained):
    model, (x, y), arguments = trained
    x, y = x[:40], y[:40]
    weights = np.where(y == 0, 5.0, 0.1)
    for validation_data in ((x, y, weights), (x, y)):
        arguments = {
            **arguments,
            "epochs": 1,
            "increment": 1.0,
            "verbose": 0,
            "class_weight": {0: 5.0, 1: 0.1, 2: 0.1},
        }
        small, done = compress(model, trained[1], validation_data=validation_data, **arguments)
        loss = small.evaluate(
            x, y, sample_weight=weights if validation_data[2:] else None, verbose=0, return_dict=True
        )["loss"]
        assert done.judged["metrics"][done.kept_epoch]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_validation_split_is_validation_data(trained):
    model, ds, arguments = trained
    arguments = {**arguments, "epochs": 1, "increment": 1.0, "verbose": 0, "return_info": True}
    _, info = keras_taylor.compress(model, ds, validation_split=0.2, max_drop=1.0, **arguments)
    done = info.rounds[0]
    assert done.judged["examples"] == "the validation data" and len(done.step_losses) == 8
    (x, y) = (part[240:] for part in ds)
    before = model.evaluate(x, y, verbose=0, return_dict=True)
    assert info.metrics["before"] == pytest.approx(before, rel=1e-4)
    for split, data in ((0.999, ds), (0.5, Once())):
        with pytest.raises(
            ValueError, match=rf"`validation_split` is the share .*validation_split={split}, ds"
        ):
            keras_taylor.compress(model, data, validation_split=split, **arguments)


class Once(keras.utils.PyDataset):
    """One batch."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return stripes(30)


# --- what is said ---------------------------------------------------------------------------


def test_lines_and_tables_say_which_state_was_kept(trained, capsys):
    model, ds, arguments = trained
    arguments = {**arguments, "increment": 1.0, "criterion": "magnitude", "return_info": True}
    _, info = keras_taylor.compress(model, ds, callbacks=[Lesson(0, 99, 99)], verbose=2, **arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("epochs: 3, then the best state on 30 held-out examples is kept")
    assert lines[3].endswith(info.rounds[0].verdict())
    cut, after = info.rounds[0].judged_values.values()
    assert info.rounds[0].verdict() == f"epoch 1 of 3 kept: loss {cut:.4g} cut, {after:.4g} trained"
    page = info.to_html()
    for text in (
        "epoch kept",
        "loss cut",
        "loss repaired",
        "loss trained",
        "1 of 3",
        f"{cut:.4g}",
    ):
        assert text in str(info) and text in page
    assert keras_taylor.Info.from_json(info.to_json()) == info
