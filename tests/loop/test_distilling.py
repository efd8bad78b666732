"""Fine-tuning with the original as the teacher."""

import keras
import numpy as np
import pytest
from helpers import fingerprint
from stripes import small_model, stripes

import keras_taylor
from keras_taylor.loop.fine_tuning import imitation_loss, make_distiller

layers = keras.layers

pytestmark = pytest.mark.sweep(2)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def heads(loss):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [layers.Dense(4, name="a")(inputs), layers.Dense(4, name="b")(inputs)])
    model.compile("sgd", loss)
    return model


def test_losses_by_hand():
    """Classes from logits and from probabilities at temperature 3, numbers without one."""
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(2, 5, 4)).astype("float32")
    p, q = softmax(teacher / 3), softmax(student / 3)
    divergence = 9 * (p * np.log(p / q)).sum(-1).mean()
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = imitation_loss(heads([logits, "mse"])).compute_loss([teacher, teacher], [student, student])
    squares = np.square(teacher - student).mean()
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), divergence + squares, rtol=1e-4)
    classes = imitation_loss(heads(["categorical_crossentropy", "mse"]))
    found = classes.compute_loss([softmax(teacher), teacher], [softmax(student), teacher])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), divergence, rtol=1e-3)


def test_weights_of_outputs_count_in_the_imitation():
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(2, 5, 4)).astype("float32")
    squares = np.square(teacher - student).mean()
    model = heads(["mse", "mse"])
    for weights, factor in (([2.0, 0.5], 2.5), ({"b": 3.0, "a": 1.0}, 4.0), (None, 2.0)):
        model.compile("sgd", ["mse", "mse"] if weights is None or isinstance(weights, list) else MSE, weights)
        found = imitation_loss(model).compute_loss([teacher] * 2, [student] * 2)
        np.testing.assert_allclose(keras.ops.convert_to_numpy(found), factor * squares, rtol=1e-4)


MSE = {"a": "mse", "b": "mse"}


def test_without_labels_an_output_of_weight_zero_is_neither_imitated_nor_measured():
    inputs = keras.Input((6,))
    x, y = (layers.Dense(8, activation="relu", name=name)(inputs) for name in ("of_a", "of_b"))
    model = keras.Model(inputs, {"a": layers.Dense(3, name="a")(x), "b": layers.Dense(2, name="b")(y)})
    model.compile(keras.optimizers.SGD(0.1), MSE, loss_weights={"a": 1.0, "b": 0.0})
    data = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    before = {one.name: one.get_weights()[0] for one in model.layers[1:]}
    make_distiller(model, keras.models.clone_model(model), has_labels=False).fit(data, verbose=0)
    moved = {
        one.name for one in model.layers[1:] if not np.array_equal(before[one.name], one.get_weights()[0])
    }
    assert moved == {"of_a", "a"}
    sensitivity = keras_taylor.analyze(model, data, verbose=0).sensitivity
    assert sensitivity.measure == "divergence"
    assert not sensitivity.increase("of_b").any() and sensitivity.increase("of_a").max() > 0
    model.compile("sgd", MSE, loss_weights=[0.0, 0.0])  # then all count the same
    assert keras_taylor.analyze(model, data, verbose=0).sensitivity.increase("of_b").max() > 0


@pytest.mark.parametrize("structure", ["dict", "list"])
def test_metrics_in_a_dict_are_measured(structure):
    inputs = keras.Input((6,))
    x = layers.Dense(12, activation="relu")(inputs)
    outputs = [layers.Dense(3, activation="softmax", name="kind")(x), layers.Dense(1, name="size")(x)]
    random = np.random.default_rng(0)
    data, y = random.normal(size=(48, 6)).astype("float32"), [np.arange(48) % 3, random.normal(size=(48, 1))]
    if structure == "dict":
        outputs, y = (dict(zip(("kind", "size"), one, strict=True)) for one in (outputs, y))
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(1e-9),
        {"kind": "sparse_categorical_crossentropy", "size": "mse"},
        metrics={"kind": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")]},
        weighted_metrics={"size": ["mae"]},
    )
    small, info = keras_taylor.compress(
        model, (data, y), 0.3, increment=0.3, distill=True, validation_data=(data, y), repair=False,
        learning_rate=keras_taylor.FineTuning(1e-9, keep_best=False), verbose=0, return_info=True,
    )  # fmt: skip
    history = info.rounds[0].history
    wanted = small.evaluate(data, y, verbose=0, return_dict=True)
    names = {"kind_accuracy", "kind_top2", "size_mae"}
    assert names <= set(history) and names <= set(wanted)
    for name in names:
        np.testing.assert_allclose(history[name], [wanted[name]], rtol=1e-3)
        np.testing.assert_allclose(history[f"val_{name}"], [wanted[name]], rtol=1e-3)


def test_a_step_moves_the_student_alone():
    teacher, student = small_model(), small_model()
    x, y = stripes()
    before, after = fingerprint(teacher)["weights"], fingerprint(student)["weights"]
    trainer = make_distiller(student, teacher)
    history = trainer.fit(x, y, epochs=2, batch_size=16, verbose=0).history
    assert fingerprint(teacher)["weights"] == before and fingerprint(student)["weights"] != after
    assert {"accuracy", "loss", "distillation_loss", "student_loss"} <= set(history)
    assert trainer.optimizer is student.optimizer
    assert int(keras.ops.convert_to_numpy(student.optimizer.iterations)) == 6


def trained():
    model, (x, y) = small_model(optimizer=keras.optimizers.Adam(0.005)), stripes()
    model.fit(x, y, epochs=20, batch_size=16, verbose=0)
    return model, x, y


def test_compress_by_distillation_alone():
    model, x, _ = trained()
    before = fingerprint(model)
    arguments = {"goal": 0.8, "increment": 0.8, "batch_size": 16, "verbose": 0, "repair": False}
    arguments["criterion"] = "magnitude"  # the same cut for both
    last = keras_taylor.FineTuning(keep_best=False)  # of so few examples a judge is not sure
    small, info = keras_taylor.compress(
        model, x, distill=True, learning_rate=last, epochs=8, return_info=True, **arguments
    )
    assert fingerprint(model) == before and type(small) is type(model)
    history = info.rounds[0].history
    assert history["loss"][-1] < history["loss"][0] and "accuracy" not in history
    cut = keras_taylor.compress(model, x, epochs=0, **arguments)
    wanted, ours, untrained = (softmax(m.predict(x, verbose=0)) for m in (model, small, cut))
    assert np.abs(ours - wanted).mean() < 0.5 * np.abs(untrained - wanted).mean()


def test_labels_and_validation_and_features():
    model, x, y = trained()
    features = keras.distillation.FeatureDistillation("mse", "head", "head")
    small, info = keras_taylor.compress(
        model, (x, y), 0.4, increment=0.4, distill=[features], epochs=2, batch_size=16,
        validation_data=(x, y), verbose=0, return_info=True,
    )  # fmt: skip
    assert {"accuracy", "student_loss", "val_loss", "val_accuracy"} <= set(info.rounds[0].history)
    assert "distill=[...]" in info.command and small.count_params() <= 0.6 * model.count_params()


@pytest.mark.slow
def test_weights_count_in_the_loss_on_labels():
    model, x, y = trained()

    def losses(data, **weights):
        _, info = keras_taylor.compress(
            model, data, 0.4, increment=0.4, distill=True, repair=False, learning_rate=1e-9, batch_size=16,
            shuffle=False, verbose=0, return_info=True, **weights,
        )  # fmt: skip
        return {name: info.rounds[0].history[name][0] for name in ("student_loss", "distillation_loss")}

    plain = losses((x, y))
    double = losses((x, y), class_weight=dict.fromkeys(range(10), 2.0))
    half = losses((x, y, np.full(len(y), 0.5, "float32")))
    none = losses((x, y), sample_weight=np.zeros(len(y), "float32"))
    expected = [plain["student_loss"] * factor for factor in (2, 0.5, 0)]
    found = [one["student_loss"] for one in (double, half, none)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert none["distillation_loss"] > 0


@pytest.mark.parametrize("kind", ["dict", "list"])
def test_the_compiled_loss_counts_as_compiled(kind):
    """Of several outputs in a dict or list, weighted, with a regularizer."""
    inputs = keras.Input((4,))
    outputs = [
        keras.layers.Dense(3, name="first", kernel_regularizer="l2")(inputs),
        keras.layers.Dense(1, name="second")(inputs),
    ]
    losses, weights = [keras.losses.SparseCategoricalCrossentropy(from_logits=True), "mse"], [1.0, 0.1]
    y = [np.arange(16) % 3, np.ones((16, 1), "float32")]
    if kind == "dict":
        outputs, losses, weights, y = (
            dict(zip("ab", each, strict=True)) for each in (outputs, losses, weights, y)
        )
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.SGD(0.0), losses, loss_weights=weights)
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    wanted = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    history = (
        make_distiller(model, keras.models.clone_model(model)).fit(x, y, batch_size=16, verbose=0).history
    )
    np.testing.assert_allclose(history["student_loss"], [wanted], rtol=1e-5)
