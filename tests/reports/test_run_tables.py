"""The tables that a run prints: all that matters, and no wider than a terminal."""

import keras
import numpy as np
import pytest

import keras_taylor

WIDTH = 100


def network(*names):
    """An output of classes for each name, with two metrics each."""
    inputs = keras.Input((8,))
    features = keras.layers.Dense(12, activation="relu")(inputs)
    outputs = {name: keras.layers.Dense(4, activation="softmax", name=name)(features) for name in names}
    model = keras.Model(inputs, outputs)
    top = keras.metrics.SparseTopKCategoricalAccuracy
    model.compile(
        "sgd",
        dict.fromkeys(names, "sparse_categorical_crossentropy"),
        metrics={name: ["accuracy", top(2, name="top2")] for name in names},
    )
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 8)).astype("float32")
    return model, (x, {name: random.integers(0, 4, 40) for name in names})


def run(*names, validate=True):
    model, ds = network(*names)
    data = {"validation_data": ds} if validate else {"learning_rate": keras_taylor.FineTuning(0.1, False)}
    goals = {"goal": [0.2, 0.4], "increment": 0.2, "verbose": 0, "return_info": True}
    return keras_taylor.compress(model, ds, **goals, **data)[1]


@pytest.mark.once
def test_two_outputs_do_not_make_200_columns():
    info = run("digit", "speaker")
    info.rounds[-1].held = False
    for one in (info.before, *(one.costs for one in info.rounds)):
        one["params"] += 10_000  # a name in the first column and numbers of some width
    text = str(info)
    assert "undone" in text
    assert max(map(len, text.splitlines())) <= WIDTH and "…" not in text
    assert text.count("Metrics on the validation data") == 1 and "Metrics in training" not in text
    for name in ("digit", "speaker"):
        for metric in ("accuracy", "top2"):
            values = [info.metrics["before"], *(one.metrics for one in info.rounds)]
            for one in values:
                assert f"{one[f'{name}_{metric}']:.4g}" in text
    for part in ("epoch kept", "trained", "seconds", "speaker_", "top2", f"{info.rounds[0].params:,}"):
        assert part in text
    assert f"{info.rounds[-1].judged_values['trained']:.4g}" in text


@pytest.mark.once
@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.slow
def test_more_metrics_take_more_tables(validate):
    info = run(*(f"output_number_{k}_of_the_network" for k in range(5)), validate=validate)
    text = str(info).split("What is left at each goal")[0]
    assert max(map(len, text.splitlines())) <= WIDTH and "…" not in text
    title = "Metrics on the validation data" if validate else "Metrics in training"
    assert text.count(title) > 1
    last = info.rounds[-1].kept_history
    prefix = "val_" if validate else ""
    for k in range(5):
        for metric in ("accuracy", "top2", "loss"):
            assert f"{last[f'{prefix}output_number_{k}_of_the_network_{metric}']:.4g}" in text


def test_one_output_has_one_table():
    model, (x, y) = network("digit")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    arguments = {"verbose": 0, "return_info": True, "validation_data": (x, y["digit"])}
    _, info = keras_taylor.compress(model, (x, y["digit"]), 0.3, increment=0.3, **arguments)
    text = str(info)
    assert text.count("┏") == 1 and " val_loss ┃ loss cut ┃ loss repaired ┃ loss trained ┃ " in text


def test_what_a_limit_judges_is_shown_without_training(capsys):
    model, (x, y) = network("digit")
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    data = (x, y["digit"])
    _, info = keras_taylor.compress(
        *(model, data, 0.3),
        increment=0.3,
        epochs=0,
        max_drop={"accuracy": 1.0},
        validation_data=data,
        verbose=2,
        return_info=True,
    )
    found = f"{info.rounds[0].metrics['accuracy']:.4g}"
    line = next(line for line in capsys.readouterr().out.splitlines() if "parameters left" in line)
    assert f"val_accuracy {found}" in line and "val_accuracy" in str(info) and found in str(info)
    assert "Asked for: 30% less of params. Ended: goal reached." in info.to_html()
