"""Arguments that mean nothing are refused in one sentence, before any work; what `fit` takes is taken."""

import keras
import numpy as np
import pytest

import keras_taylor

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def model():
    layers = [keras.layers.Dense(8, activation="relu", name="first"), keras.layers.Dense(4, name="last")]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Softmax()])
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


random = np.random.default_rng(0)
x, y = random.normal(size=(32, 6)).astype("float32"), random.integers(0, 4, 32)
one_hot = np.eye(4, dtype="float32")[y]


def compress(model, ds=(x, y), **arguments):
    options = {"goal": 0.3, "increment": 0.3, "epochs": 0, "verbose": 0, **arguments}
    return keras_taylor.compress(model, ds, **options)


class CountsEpochs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.num = 0

    def on_epoch_end(self, epoch, logs=None):
        self.num += 1


def loss_of_distilling():
    return keras.distillation.LogitsDistillation()


WRONG = {
    "negative epochs": ({"epochs": -1}, "whole number from 0 on. Received: epochs=-1"),
    "half an epoch": ({"epochs": 1.5}, "Received: epochs=1.5"),
    "epochs as text": ({"epochs": "2"}, "Received: epochs='2'"),
    "no batch": ({"batch_size": 0}, "whole number from 1 on, or `None` for 32 .* Received: batch_size=0"),
    "half a batch": ({"batch_size": 2.5}, "Received: batch_size=2.5"),
    "no steps": ({"steps_per_epoch": 0}, "Received: steps_per_epoch=0"),
    "no epochs left": ({"epochs": 1, "initial_epoch": 1}, "none would be left.*initial_epoch=1, epochs=1"),
    "before the first epoch": ({"initial_epoch": -1}, "Received: initial_epoch=-1"),
    "validation in no epoch": ({"validation_freq": 0}, "Received: validation_freq=0"),
    "all for validation": ({"validation_split": 1.0}, "share from 0 on and below 1"),
    "less than none for validation": ({"validation_split": -0.1}, "Received: validation_split=-0.1"),
    "class weights in a list": ({"class_weight": [1, 2, 3, 4]}, "dict from classes to weights"),
    "no callback": ({"callbacks": [1]}, "`keras.callbacks.Callback` objects. Received: callbacks with 1"),
    "a class": ({"callbacks": [CountsEpochs]}, "callbacks with <class"),
    "no learning rate": ({"learning_rate": 0}, "Received: learning_rate=0"),
    "what to imitate": ({"distill": "logits"}, "Received: distill='logits'"),
    "a text for a flag": ({"repair": "no"}, "Expected `True` or `False`. Received: repair='no'"),
    "no regular expression": ({"exclude": "["}, "neither the name of a layer nor a regular expression"),
    "a number for a layer": ({"include": 5}, "`include` names a layer that the model does not have"),
    "an unknown cost": (
        {"goal": {"parms": 0.3}},
        "'params', 'flops', 'activation_memory'.*'bytes', 'latency'",
    ),
    "one-hot targets": ({"ds": (x, one_hot)}, "takes the number of a class.*`y.argmax"),
    "labels beyond the classes": ({"ds": (x, y + 1)}, "beyond the 4 classes.*from 0 to 3.*and 4 in it"),
    "labels below zero": ({"ds": (x, y - 1)}, "beyond the 4 classes.*and -1 in it"),
    "texts": ({"ds": (x, y.astype(str))}, "The targets are no numbers"),
    "other labels": ({"validation_data": (x, y + 1)}, "beyond.*Received: validation_data with y"),
    "labels for scores": ({"criterion": keras_taylor.Scoring(ds=(x, y + 1))}, "Received: criterion with y"),
    "nested lists": ({"ds": (x.tolist(), y)}, "Python numbers or texts.*x of type list with a float in it"),
    "a list of labels": ({"ds": (x, y.tolist())}, "Received: y of type list with a int in it"),
    "a text for data": ({"ds": "digits"}, "Expected what `model.fit` takes"),
    "a path": ({"model": "m.keras"}, r"Load the file first: `keras.models.load_model\('m.keras'\)`"),
    "a layer": ({"model": keras.layers.Dense(1)}, "Expected a `keras.Model`.*of type Dense"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(model, what):
    arguments, words = WRONG[what]
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        compress(**{"model": model, **arguments})
    assert type(caught.value) in (ValueError, TypeError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("num", [0, -4, 2.5])
def test_numbers_of_examples(model, num):
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    small = keras_taylor.prune(model, plan)
    for call in (
        lambda: keras_taylor.Scoring(num_examples=num),
        lambda: keras_taylor.score(model, (x, y), num_examples=num),
        lambda: keras_taylor.analyze(model, (x, y), num_examples=num, verbose=0),
        lambda: keras_taylor.repair(small, model, plan, x, num_examples=num),
        lambda: keras_taylor.recalibrate(model, x, num_examples=num),
    ):
        with pytest.raises((ValueError, TypeError), match=f"whole number from 1 on.*num_examples={num}"):
            call()


def test_the_other_verbs_refuse_the_same(model):
    for call, words in (
        (lambda: keras_taylor.score(model, (x, y + 1)), "beyond the 4 classes"),
        (lambda: keras_taylor.analyze(model, (x, one_hot), verbose=0), "takes the number of a class"),
        (lambda: keras_taylor.prune(model, None), "Expected a `keras_taylor.Plan`.*Received: plan=None"),
        (lambda: keras_taylor.repair(model, model, {}, x), "Expected a `keras_taylor.Plan`"),
        (lambda: keras_taylor.make_plan(model, None), "Expected what `score` returns.*scores=None"),
        (lambda: keras_taylor.recalibrate("m.keras", x), "Load the file first"),
        (lambda: keras_taylor.PrunableModel("m.keras"), "Load the file first"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()


def test_data_in_two_arguments(model):
    for call in (
        lambda: keras_taylor.compress(model, x, y, goal=0.3),
        lambda: keras_taylor.compress(model, x, y, 0.3),
        lambda: keras_taylor.compress(model, x=x, y=y),
        lambda: keras_taylor.score(model, x, y),
        lambda: keras_taylor.analyze(model, x, y),
    ):
        with pytest.raises(TypeError, match=r"inputs and targets as one argument: .*\(model, \(x, y\), "):
            call()


def test_a_categorical_loss_wants_one_hot_targets():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r"one number for each of 4 classes.*`keras.utils.to_categorical"):
        compress(model)
    assert compress(model, (x, one_hot)).count_params() < model.count_params()


def test_labels_that_do_not_count_may_be_anything():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(4)])
    void = np.where(np.arange(32) < 4, 255, y)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255))
    keras_taylor.score(model, (x, void))
    with pytest.raises(ValueError, match=r"beyond the 4 classes.*and 254 in it"):
        keras_taylor.score(model, (x, np.where(void == 255, 254, void)))


def test_callbacks_in_every_form_that_fit_takes(model):
    for pack in (lambda one: one, lambda one: [[one]], lambda one: keras.callbacks.CallbackList([one])):
        one = CountsEpochs()
        compress(model, epochs=2, callbacks=pack(one))
        assert one.num == 2


def test_no_exclusion_is_none(model):
    assert compress(model, exclude=None).count_params() == compress(model, exclude=()).count_params()
