"""JSON that other languages read, also of runs whose numbers are not finite."""

import dataclasses
import json
import math

import keras
import numpy as np
import pytest
from stripes import small_model, stripes

import keras_taylor
from keras_taylor.support.files import to_json_text

NAN, INF = math.nan, math.inf


def strictly(text):
    """What other languages read: no NaN, no infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run whose training diverges: its `Info`, the directory of its states, the given model."""
    folder = tmp_path_factory.mktemp("states")
    keras.utils.set_random_seed(0)
    model = small_model()
    with pytest.warns(UserWarning, match="an earlier state of its model is kept"):
        _, info = keras_taylor.compress(
            model, stripes(), 0.3, increment=0.3, learning_rate=1e30, epochs=2, verbose=0,
            validation_data=stripes(), return_info=True, backup_dir=folder,
        )  # fmt: skip
    return info, folder, model


def test_a_run_that_diverged_is_written_as_json_and_read_as_nan(diverged):
    info, *_ = diverged
    losses = info.rounds[0].step_losses
    assert not np.isfinite(losses).all()
    content = strictly(info.to_json())
    assert {None, "Infinity"} & set(content["rounds"][0]["step_losses"])
    again = keras_taylor.Info.from_json(info.to_json())
    np.testing.assert_array_equal(again.rounds[0].step_losses, losses)
    for name, values in info.rounds[0].history.items():
        np.testing.assert_array_equal(again.rounds[0].history[name], values)
    assert again.to_json() == info.to_json()
    assert str(again) == str(info) and again.to_html()


def test_a_layer_that_was_repaired_with_an_infinite_ridge_is_not_one_that_was_left(diverged):
    """`ridge` is `None` where a layer was left alone, and infinite where only its bias was fitted."""
    info, *_ = diverged
    repairs = [{**info.rounds[0].repairs[0], "ridge": ridge} for ridge in (INF, None, 0.1)]
    rounds = [dataclasses.replace(info.rounds[0], repairs=repairs)]
    text = dataclasses.replace(info, rounds=rounds).to_json()
    strictly(text)
    assert [one["ridge"] for one in keras_taylor.Info.from_json(text).rounds[0].repairs] == [INF, None, 0.1]


def test_its_state_on_disk_is_json_and_goes_on(diverged):
    info, folder, model = diverged
    (path,) = folder.glob("round-*.npz")
    with np.load(path) as entries:
        about = strictly(entries["about"].tobytes())
    assert {None, "Infinity"} & set(about["info"]["rounds"][0]["step_losses"])
    _, again = keras_taylor.compress(
        model, stripes(), 0.3, increment=0.3, learning_rate=1e30, epochs=2, verbose=0,
        validation_data=stripes(), return_info=True, backup_dir=folder,
    )  # fmt: skip
    assert again.to_json() == info.to_json()


@pytest.mark.once
def test_what_is_none_stays_none(diverged):
    info, *_ = diverged
    info = keras_taylor.Info.from_json(info.to_json())
    one = info.rounds[0]
    one.costs["flops"], one.learning_rate = None, None
    one.repairs[0].update(error_before=None, reason="left alone")
    one.metrics, one.judged["metrics"][0]["loss"] = {"loss": -INF}, NAN
    info.metrics = {"after": {"loss": NAN, "accuracy": 0.5}}
    again = keras_taylor.Info.from_json(info.to_json())
    assert again.rounds[0].costs["flops"] is None and again.rounds[0].learning_rate is None
    assert again.rounds[0].repairs[0]["error_before"] is None
    assert again.rounds[0].metrics["loss"] == -INF and math.isnan(again.metrics["after"]["loss"])
    assert math.isnan(again.rounds[0].judged["metrics"][0]["loss"])
    assert again.metrics["after"]["accuracy"] == 0.5


@pytest.mark.once
@pytest.mark.parametrize("metric_name", [None, "accuracy"])
def test_an_artifact_whose_numbers_are_not_finite(metric_name):
    made = keras_taylor.Artifact(
        "a.tflite", "litert", None, None, 10, {}, {}, NAN, INF, None, None if metric_name is None else NAN,
        None if metric_name is None else 0.5, 1.0, 1.0, 1, None, None, metric_name=metric_name,
    )  # fmt: skip
    content = strictly(made.to_json())
    assert content["difference"] is content["metric"] is None
    assert content["relative_difference"] == "Infinity"
    read = keras_taylor.Artifact.from_json(made.to_json())
    assert math.isnan(read.difference) and read.relative_difference == INF
    assert read.agreement is read.arena_bytes is None
    assert (read.metric is None) if metric_name is None else math.isnan(read.metric)
    assert read.model_metric == made.model_metric and read.to_json() == made.to_json()
    assert str(read)


@pytest.mark.once
def test_a_value_that_json_cannot_hold_is_refused_or_made_a_text():
    with pytest.raises(TypeError):
        to_json_text({"x": object})
    assert strictly(to_json_text({"x": (1, NAN, [INF])}, default=str)) == {"x": [1, None, ["Infinity"]]}
    assert strictly(to_json_text([range(2)], default=str)) == ["range(0, 2)"]
