"""A model that is run leaves with nothing changed, whatever its layers keep of a call."""

import keras
import numpy as np
import pytest
from helpers import fingerprint

import keras_taylor
from keras_taylor.exports.timing import time_model
from keras_taylor.reading.graph import read_model
from keras_taylor.reading.walk import run_batches

pytestmark = pytest.mark.sweep(1)

layers = keras.layers


@keras.saving.register_keras_serializable("tests")
class Counting(layers.Layer):
    """Remembers its calls in a weight and in attributes."""

    def build(self, shape):
        self.calls = 0
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, x):
        self.calls, self.last = self.calls + 1, "called"
        self.count.assign(self.count + 1)
        return x


def remembering_model(stateful=False):
    """LSTM and GRU cells keep their dropout masks, a stateful layer its states."""
    inputs = keras.Input((5, 3), batch_size=8)
    x = layers.LSTM(6, return_sequences=True, dropout=0.1, name="lstm")(inputs)
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True), name="both")(x)
    x = layers.RNN([layers.LSTMCell(4), layers.SimpleRNNCell(4)], return_sequences=True, name="stack")(x)
    x = layers.GRU(3, return_sequences=True, stateful=stateful, name="stateful")(x)
    x = layers.Dropout(0.5)(Counting(name="counting")(layers.TimeDistributed(layers.Dense(7))(x)))
    model = keras.Model(inputs, layers.Dense(2)(x))
    model.compile("sgd", "mse")
    return model


X = np.random.default_rng(0).normal(size=(16, 5, 3)).astype("float32")
Y = np.zeros((16, 5, 2), "float32")


def walked(model):
    return list(run_batches(read_model(model), [[X[:8]], [X[8:]]]))


def repaired(model):
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.1)
    return keras_taylor.repair(keras_taylor.prune(model, plan), model, plan, X)


def compressed(model):
    arguments = {"increment": 0.1, "epochs": 0, "criterion": "magnitude", "batch_size": 8, "verbose": 0}
    return keras_taylor.compress(model, (X, Y), 0.1, **arguments)


def timed(model):
    return time_model(model, 8)


def check_unchanged(model, verb):
    before = fingerprint(model), model.get_layer("counting").calls
    verb(model)
    assert before == (fingerprint(model), model.get_layer("counting").calls)


@pytest.mark.parametrize("verb", [walked, repaired, compressed, timed])
def test_what_layers_keep_of_a_call_is_as_before(verb):
    check_unchanged(remembering_model(), verb)


@pytest.mark.parametrize("verb", [walked, timed])
def test_states_are_as_before(verb):
    check_unchanged(remembering_model(stateful=True), verb)


@pytest.mark.slow
def test_an_export_changes_nothing(tmp_path):
    check_unchanged(remembering_model(), lambda model: keras_taylor.export(model, tmp_path / "model.keras"))


def blocks(*widths):
    """Convolutions with normalizations, all of other widths."""
    inputs = keras.Input((6, 6, 3))
    x = inputs
    for width in widths:
        x = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(x))
        x = layers.Activation("hard_sigmoid")(x)
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="the others compile no single operations")
def test_layers_between_linear_ones_are_one_program_and_a_second_model_needs_none():
    import jax

    compiled = []

    def count(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    model = blocks(7, 9, 11, 13, 15, 17)
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 3)).astype("float32")
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    small = keras_taylor.prune(model, plan)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        keras_taylor.repair(small, model, plan, x)
        num_first = len(compiled)
        other = keras.models.clone_model(model)
        smaller = keras_taylor.prune(other, plan)
        compiled.clear()
        keras_taylor.repair(smaller, other, plan, x)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert num_first < 4 * 2 * 7  # linear layers, and what follows them, in both models; a few for data
    assert not compiled
