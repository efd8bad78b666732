"""The learning rate of a round: short trials find it, and it falls to zero unless something else sets it."""

import itertools

import keras
import numpy as np
import pytest
from stripes import same, small_model, stripes

import keras_taylor

pytestmark = pytest.mark.sweep(1)


class Rates(keras.callbacks.Callback):
    """Notes the learning rate of each step, and the weights that training begins with."""

    def __init__(self):
        super().__init__()
        self.values, self.starts = [], []

    def on_train_begin(self, logs=None):
        self.starts.append(self.model.get_weights())

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))


def compress(model, ds, callbacks=(), **arguments):
    """A run of one round; the model, its `Round`, and the rates of its steps."""
    rates = Rates()
    options = {"goal": 0.3, "increment": 1.0, "criterion": "magnitude", "verbose": 0, "return_info": True}
    small, info = keras_taylor.compress(model, ds, **{**options, **arguments}, callbacks=[*callbacks, rates])
    return small, info.rounds[0], rates


def cosine(peak, num):
    return peak / 2 * (1 + np.cos(np.pi * np.arange(num) / num))


def test_the_rate_falls_to_zero_by_a_cosine():
    model = small_model()
    small, done, rates = compress(model, stripes(60), epochs=3, batch_size=18, learning_rate=0.02)
    np.testing.assert_allclose(rates.values, cosine(0.02, 9), rtol=1e-5)
    assert done.learning_rate == {"peak": 0.02, "steps": 0, "measure": "", "trials": []}
    assert float(small.optimizer.learning_rate) == float(model.optimizer.learning_rate)


def test_it_begins_where_the_epochs_begin():
    _, _, rates = compress(small_model(), stripes(60), epochs=5, initial_epoch=3, batch_size=27)
    np.testing.assert_allclose(rates.values, cosine(0.005, 4), rtol=1e-5)


def test_an_epoch_of_unknown_length_has_one_rate_until_it_is_known():
    tf = pytest.importorskip("tensorflow")
    batches = tf.data.Dataset.from_tensor_slices(stripes(60)).batch(30).filter(lambda x, y: True)
    _, _, rates = compress(small_model(), batches, epochs=2)
    np.testing.assert_allclose(rates.values, [0.005, 0.005, 0.0025, cosine(0.005, 4)[3]], rtol=1e-5)


class Twice(keras.callbacks.Callback):
    """Sets a rate in the third step."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 2:
            self.model.optimizer.learning_rate = 0.5


@pytest.mark.parametrize(
    ("callback", "wanted"),
    [
        (keras.callbacks.LearningRateScheduler(lambda epoch: 0.25), [0.25] * 4),
        (Twice(), [*cosine(0.005, 4)[:2], 0.5, 0.5]),
    ],
    ids=["schedule", "one step"],
)
def test_callbacks_of_the_user_have_the_last_word(callback, wanted):
    _, _, rates = compress(small_model(), stripes(60), [callback], epochs=1, batch_size=14)
    np.testing.assert_allclose(rates.values, wanted, rtol=1e-5)


LONG = {"epochs": 15, "batch_size": 15}  # 255 steps, or 270 where nothing is held out


@pytest.fixture(scope="module")
def trained():
    """A model with much to learn."""
    keras.utils.set_random_seed(0)
    model, ds = small_model(metrics=["accuracy"]), stripes(270)
    model.fit(*ds, batch_size=90, verbose=0)
    return model, ds


def test_trials_find_a_rate_and_leave_the_model_as_it_was(trained, capsys):
    model, ds = trained
    *_, without = compress(model, ds, learning_rate=0.005, batch_size=15)
    _, done, rates = compress(model, ds, verbose=2, **LONG)
    (first, at_first), (second, at_second) = done.learning_rate["trials"]
    assert (first, second) == pytest.approx((0.005, 0.015)) and at_second < at_first
    assert done.learning_rate["peak"] == second and done.learning_rate["steps"] == 12
    (start,) = rates.starts
    assert same(start, without.starts[0])
    assert rates.values[0] == pytest.approx(second) and len(rates.values) == 255
    printed = capsys.readouterr().out
    assert "learning rate: 0.005, 0.1 times the compiled rate, 0.05; short trials" in printed
    words = "learning rate 0.015, chosen by trials (loss after 12 steps: "
    assert f"{words}{at_first:.4g} at 0.005, {at_second:.4g} at 0.015)" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        {**LONG, "epochs": 14},
        {**LONG, "learning_rate": 0.005},
        {**LONG, "learning_rate": keras_taylor.FineTuning(keep_best=False)},
        {**LONG, "repair": False},
        {**LONG, "callbacks": [keras.callbacks.LearningRateScheduler(lambda epoch: 0.25)]},
    ],
    ids=["too few steps", "rate given", "no judge", "no repair", "scheduler"],
)
@pytest.mark.slow
def test_there_are_no_trials(trained, arguments):
    _, done, rates = compress(*trained, **arguments)
    assert done.learning_rate["trials"] == [] and len(rates.starts) == 1


@pytest.mark.slow
def test_trials_judge_by_validation_data(trained):
    model, (x, y) = trained
    _, done, _ = compress(model, (x, y), validation_data=(x[:40], (y[:40] + 1) % 3), **LONG)
    (first, at_first), (second, at_second) = done.learning_rate["trials"]  # learning harms there
    assert first == pytest.approx(0.005) and done.learning_rate["peak"] == second == first / 3
    assert at_second < at_first


def test_where_a_tenth_of_the_compiled_rate_does_harm_lower_ones_are_tried(trained):
    model, ds = trained
    hot = keras.models.clone_model(model)
    hot.set_weights(model.get_weights())
    hot.compile(keras.optimizers.SGD(200.0), model.loss)
    _, done, _ = compress(hot, ds, **{**LONG, "epochs": 40})
    rates = [rate for rate, _ in done.learning_rate["trials"]]
    assert len(rates) > 1 and all(after == before / 3 for before, after in itertools.pairwise(rates))
    assert done.learning_rate["peak"] == rates[-1] < 20


def test_rates_that_lead_nowhere_are_left_out(trained):
    model, ds = trained
    hot = keras.models.clone_model(model)
    hot.set_weights(model.get_weights())
    hot.compile(keras.optimizers.SGD(1e30), model.loss)
    with pytest.warns(UserWarning, match="an earlier state of its model is kept"):
        small, done, rates = compress(hot, ds, **LONG)
    assert done.learning_rate["trials"] == [] and done.learning_rate["peak"] == pytest.approx(1e29)
    assert done.kept_epoch == 0 and same(small.get_weights(), rates.starts[0])
