"""The loss as a growing share of each group goes: `analyze` with data."""

import dataclasses
import itertools
import json
import os
import re

import keras
import numpy as np
import pytest
from command_line import refused
from helpers import NAMES, case, fingerprint, predict, targets_of
from stripes import stripes

import keras_taylor
from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.planning import plan_of
from keras_taylor.reading.groups import label_model
from keras_taylor.reports import plots, sensitivity_scan
from keras_taylor.reports.loss_curves import LossCurve, Sensitivity
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.losses import divergence
from keras_taylor.support.console import Reporter, describe_duration
from keras_taylor.support.datasets import Feed

pytestmark = [pytest.mark.once, pytest.mark.sweep(3)]


def pruned(model, name, units, exact=True):
    """The model without some units of one group, really cut."""
    channels = label_model(model, exact=exact)
    (group,) = [g for g in channels.groups if g.name == name]
    kept = np.ones(channels.num_units, bool)
    kept[group.start + units] = False
    return keras_taylor.prune(model, plan_of(channels, CostModel(channels), kept))


def check_against_pruned(model, data, sensitivity, exact=True):
    """Every value is what `evaluate` gives of a model that was really cut."""
    for name, curve in sensitivity.curves.items():
        for k, num in enumerate(curve.num_gone.tolist()):
            small = pruned(model, name, curve.order[:num], exact)
            assert model.count_params() - small.count_params() == curve.saved["params"][k]
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            wanted = small.evaluate(x, y, sample_weight=weight, verbose=0, return_dict=True)
            assert set(curve.values) == set(wanted)
            for what, value in wanted.items():
                np.testing.assert_allclose(curve.values[what][k], value, rtol=1e-5, atol=1e-7)


ORACLE = (
    "residual",
    "zero_pad_shortcut",
    "depthwise",
    "two_inputs",
    "two_outputs",
    "lstm_tagger",
    "transformer",
)


@pytest.mark.parametrize("name", ORACLE)
def test_losses_are_those_of_the_pruned_model(name):
    model, x = case(name).model, case(name).x
    y = targets_of(model, x)
    before = fingerprint(model)
    sensitivity = keras_taylor.analyze(model, (x, y), fractions=(0.3, 0.7), verbose=0).sensitivity
    assert fingerprint(model) == before
    assert sensitivity.measure == "loss" and len(sensitivity.curves) > 0
    first = dict(itertools.islice(sensitivity.curves.items(), 3))
    check_against_pruned(model, (x, y), dataclasses.replace(sensitivity, curves=first))


def test_losses_of_channels_that_are_normalized_together():
    model, x = case("layernorm").model, case("layernorm").x
    y = targets_of(model, x)
    sensitivity = keras_taylor.analyze(model, (x, y), exact=False, fractions=(0.5,), verbose=0).sensitivity
    assert set(sensitivity.curves) > set(keras_taylor.analyze(model, (x, y), verbose=0).sensitivity.curves)
    check_against_pruned(model, (x, y), sensitivity, exact=False)


@pytest.mark.parametrize("name", NAMES)
def test_divergence_over_the_zoo(name):
    model, x = case(name).model, case(name).x
    before = fingerprint(model)
    sensitivity = keras_taylor.analyze(
        model, x, fractions=(0.5,), criterion="magnitude", verbose=0
    ).sensitivity
    assert fingerprint(model) == before
    groups = {g.name: g for g in label_model(model).groups if g.num_units > 1}
    assert set(sensitivity.curves) == set(groups) and sensitivity.baseline == {"divergence": 0.0}
    for group, curve in sensitivity.curves.items():
        assert np.isfinite(curve.values["divergence"]).all() and (curve.values["divergence"] >= 0).all()
        assert curve.saved["params"].min() > 0
        assert sorted(curve.order) == list(range(groups[group].num_units))


def network(regularizer=None):
    inputs = keras.Input((8, 8, 1))
    z = keras.layers.Conv2D(8, 3, activation="relu", kernel_regularizer=regularizer, name="first")(inputs)
    z = keras.layers.BatchNormalization()(z)
    z = keras.layers.Conv2D(5, 3, activation="relu", name="second")(z)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(z)))


def compiled(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], weighted_metrics=["accuracy"])
    return model


def trained():
    """A classifier with a regularizer and two metrics, and 48 examples with weights."""
    keras.utils.set_random_seed(0)
    model, (x, y) = compiled(network("l2")), stripes()
    model.fit(x, y, epochs=2, batch_size=16, verbose=0)
    return model, (x, y, np.linspace(0.5, 1.5, len(y)).astype("float32"))


def test_weights_of_examples_and_metrics_count_and_regularizers_do_not():
    model, data = trained()
    sensitivity = keras_taylor.analyze(model, data, fractions=(0.4, 0.8), verbose=0).sensitivity
    assert set(sensitivity.baseline) == {"loss", "accuracy", "weighted_accuracy"}
    plain = compiled(network())
    plain.set_weights(model.get_weights())
    check_against_pruned(plain, data, sensitivity)
    assert sensitivity.max_increase == 0.05 and sensitivity.num_examples == len(data[0])


def test_a_divergence_by_hand():
    model, (x, _, _) = trained()
    sensitivity = keras_taylor.analyze(model, x, fractions=(0.4, 0.8), verbose=0).sensitivity
    assert sensitivity.measure == "divergence" and sensitivity.criterion == "taylor"
    for name, curve in sensitivity.curves.items():
        for value, num in zip(curve.values["divergence"], curve.num_gone.tolist(), strict=True):
            (ours,) = predict(pruned(model, name, curve.order[:num]), x)
            assert value == pytest.approx(divergence(model.loss, predict(model, x)[0], ours).mean(), rel=1e-4)


def test_the_least_important_go_first():
    model, data = trained()
    scores = keras_taylor.score(model, data)
    for name, curve in keras_taylor.analyze(model, data, verbose=0).sensitivity.curves.items():
        assert curve.order.tolist() == np.argsort(scores[name]).tolist()


def test_fractions_are_rounded_and_one_channel_stays():
    model, data = trained()
    curves = keras_taylor.analyze(model, data, fractions=(0.99, 0.05, 0.5, 0.5), verbose=0).sensitivity.curves
    assert curves["first"].num_gone.tolist() == [0, 4, 7]
    assert curves["second"].num_gone.tolist() == [0, 2, 4]


def test_the_time_is_announced_before_the_work_and_nothing_is_measured_twice(monkeypatch):
    """Ten fractions of five channels come to four counts."""
    model, data = trained()
    events, evaluate = [], GatedModel.evaluate
    monkeypatch.setattr(
        GatedModel, "evaluate", lambda *a, **k: events.append("measured") or evaluate(*a, **k)
    )
    monkeypatch.setattr(Reporter, "say", lambda self, text: events.append(text))
    score_channels = sensitivity_scan.score_channels
    monkeypatch.setattr(
        sensitivity_scan, "score_channels", lambda *a, **k: events.append("scored") or score_channels(*a, **k)
    )
    keras_taylor.analyze(model, data, include=["second"], fractions=np.linspace(0.05, 0.95, 10))
    assert events[:2] == ["measured"] * 2 and events[3:-1] == ["scored"] + ["measured"] * 4
    announced = r"sensitivity: groups: 1, evaluations: 4 on 48 examples \([\d.e-]+ s each\), about \d+ s"
    assert re.fullmatch(announced + ", with the scores by 'taylor'", events[2])
    assert re.fullmatch(r"sensitivity: measured in \d+\.\d s", events[-1])


def test_times_in_words():
    words = [describe_duration(seconds) for seconds in (0.01, 45.4, 119, 120, 5000, 9000)]
    assert words == ["about 1 s", "about 45 s", "about 119 s", "about 2 min", "about 83 min", "about 2.5 h"]


def test_verbose_0_prints_nothing(capsys):
    model, data = trained()
    keras_taylor.analyze(model, data, fractions=(0.5,), verbose=0)
    assert capsys.readouterr().out == ""
    keras_taylor.analyze(model, verbose=2)
    assert capsys.readouterr().out == ""


def endless(x, y, size):
    for k in itertools.cycle(range(0, len(x), size)):
        yield x[k : k + size], y[k : k + size]


class Noisy(keras.utils.PyDataset):
    """Images that are never the same twice."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.random = x, y, np.random.default_rng(0)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(16 * index, 16 * index + 16)
        noise = self.random.normal(size=self.x[rows].shape).astype("float32")
        return self.x[rows] + noise, self.y[rows]


def test_each_evaluation_sees_the_same_examples():
    model, (x, y, _) = trained()
    arguments = {"fractions": (0.05, 0.5), "verbose": 0}
    wanted = keras_taylor.analyze(model, (x[:32], y[:32]), **arguments).sensitivity
    ours = keras_taylor.analyze(model, endless(x, y, 16), steps_per_epoch=2, **arguments).sensitivity
    assert ours.num_examples == wanted.num_examples == 32
    for name, curve in wanted.curves.items():
        np.testing.assert_allclose(ours.curves[name].values["loss"], curve.values["loss"], rtol=1e-5)
    noisy = keras_taylor.analyze(model, Noisy(x, y), num_examples=40, **arguments).sensitivity
    assert noisy.num_examples == 40
    feed = Feed(Noisy(x, y), model).in_memory(40)
    first, second = ([x for x, *_ in feed.batches()] for _ in range(2))
    assert [len(part) for part in first] == [16, 16, 8]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_what_a_criterion_cannot_judge_is_left_out():
    model, data = trained()
    curves = keras_taylor.analyze(model, data, criterion="batchnorm", verbose=0).sensitivity.curves
    assert list(curves) == ["first"]


def test_a_model_that_is_not_compiled():
    model, (x, y, _) = trained()
    model = network()
    sensitivity = keras_taylor.analyze(model, x, fractions=(0.5,), verbose=0).sensitivity
    assert sensitivity.criterion == "magnitude" and not model.compiled
    (ours,) = predict(pruned(model, "first", sensitivity.curves["first"].order[:4]), x)
    wanted = divergence(None, predict(model, x)[0], ours).mean()
    assert sensitivity.curves["first"].values["divergence"][0] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match=r"`analyze` on data with labels needs its loss. Call"):
        keras_taylor.analyze(model, (x, y))
    with pytest.raises(ValueError, match=r"criterion='taylor' needs its loss. Call"):
        keras_taylor.analyze(model, x, criterion="taylor")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fractions": (0.5, 1.0)}, r"above 0 and below 1, .* Received: fractions=\(0.5, 1.0\)"),
        ({"fractions": ()}, r"Received: fractions=\(\)"),
        ({"fractions": (float("nan"),)}, r"Received: fractions=\(nan,\)"),
        ({"num_examples": 0}, "a whole number from 1 on, or `None` for all. Received: num_examples=0"),
        ({"criterion": "best"}, "Unknown criterion.* Received: criterion='best'"),
        ({"verbose": 3}, "Received: verbose=3"),
    ],
)
def test_arguments_that_are_refused(arguments, words):
    model, data = trained()
    with pytest.raises(ValueError, match=words):
        keras_taylor.analyze(model, data, **arguments)


def test_data_that_is_refused():
    model, (x, y, _) = trained()
    with pytest.raises(ValueError, match="does not fit the model's inputs"):
        keras_taylor.analyze(model, (x[:, :5], y))
    with pytest.raises(ValueError, match="A generator can be read only once"):
        keras_taylor.analyze(model, endless(x, y, 16))
    # not before a ReLU: TensorFlow fuses it on some processors, and makes zeros of NaN there
    model.get_layer("head").bias.assign(np.full(3, np.nan))
    for data in ((x, y), x):
        with pytest.raises(ValueError, match="The output of layer 'head' is NaN or infinite"):
            keras_taylor.analyze(model, data, verbose=0)


def example_sensitivity(num_groups=3, losses=(0.31, 0.2, 0.36, np.nan), measure="loss"):
    """Curves of ten units each, four fractions; the loss of the whole model is 0.3."""
    curve = LossCurve(
        order=np.arange(10),
        num_gone=np.array([1, 3, 5, 7]),
        values={measure: np.array(losses), "accuracy": np.array([0.9, 0.8, 0.7, 0.6])},
        saved={"params": np.array([100, 3000, 5000, 7000]), "flops": None},
    )
    curves = {f"layer{k}": curve for k in range(num_groups)}
    whole = {measure: 0.3, "accuracy": 0.95}
    return Sensitivity(measure, whole, (0.1, 0.3, 0.5, 0.7), curves, 64, "taylor", 0.05)


def test_what_can_go_costs_little_at_every_smaller_fraction_too():
    assert example_sensitivity(1).num_dispensable() == {"layer0": 3}
    assert example_sensitivity(1).num_dispensable(0.1) == {"layer0": 5}
    assert example_sensitivity(1).num_dispensable(0.001) == {"layer0": 0}
    assert example_sensitivity(1, losses=(0.3, 0.3, 0.3, 0.3)).num_dispensable() == {"layer0": 7}
    np.testing.assert_allclose(example_sensitivity(1).increase("layer0")[:3], [0.01, -0.1, 0.06])


def test_the_table():
    text = " ".join(str(example_sensitivity()).split())
    assert "loss on 64 examples when a share of one group is removed" in text
    assert "the least important units by 'taylor' first" in text
    assert "whole model: 0.3; can go: loss grows by at most 0.05" in text
    assert "│ layer1 │ 0.31 │ 0.2 │ 0.36 │ nan │ 3 of 10 │ 3,000 │" in text
    assert "│ layer1 │ 0.9 │ 0.8 │ 0.7 │ 0.6 │ 3 of 10 │ 3,000 │" in " ".join(
        example_sensitivity().table("accuracy").split()
    )
    with pytest.raises(ValueError, match=r"'loss', 'accuracy'. Received: metric='auc'"):
        example_sensitivity().table("auc")


def test_the_table_is_a_part_of_the_analysis():
    model, data = trained()
    analysis = keras_taylor.analyze(model, data, fractions=(0.25, 0.5), verbose=0)
    assert str(analysis.sensitivity) in str(analysis) and "25 %" in str(analysis)
    assert keras_taylor.analyze(model).sensitivity is None
    with pytest.raises(ValueError, match=r"Pass data, `analyze\(model, ds\)`. Received: an analysis with"):
        keras_taylor.analyze(model).plot("picture.png")


def test_a_line_for_each_of_few_groups():
    pytest.importorskip("matplotlib")
    (axes,) = plots.plot_sensitivity(example_sensitivity(3)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        *("layer0", "layer1", "layer2"),
        "an increase of 0.05",
    ]
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(x, [0, 0.1, 0.3, 0.5, 0.7])
    np.testing.assert_allclose(y, [0, 0.01, -0.1, 0.06, np.nan], atol=1e-12)
    assert axes.get_ylim()[0] < -0.1 and axes.get_yscale() == "symlog"
    (axes,) = plots.plot_sensitivity(example_sensitivity(3), metric="accuracy").axes
    np.testing.assert_allclose(axes.lines[0].get_data()[1], [0.95, 0.9, 0.8, 0.7, 0.6])


def test_a_heat_map_of_many_groups(tmp_path):
    pytest.importorskip("matplotlib")
    figure = plots.plot_sensitivity(example_sensitivity(60), tmp_path / "many.png")
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (60, 4)
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"layer{k}" for k in range(60)]
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5] * 60  # after the second fraction
    assert figure.get_size_inches()[1] > 12 and (tmp_path / "many.png").stat().st_size > 10_000
    plots.plot_sensitivity(example_sensitivity(60), metric="accuracy")


def test_on_the_command_line(run):
    words = ("analyze", "model.keras", "--data", "data.npz", "--num-examples", "20")
    code, out, _ = run(*words, "--plot", "picture.png")
    assert code == 0 and os.path.getsize("picture.png") > 10_000
    assert out.index("about") < out.index("channels can leave") < out.index("can go: loss")
    assert out.rstrip().endswith("written: picture.png")
    assert "already exists" in refused(run, *words, "--plot", "picture.png")
    code, out, _ = run(*words, "--json", "--criterion", "magnitude")
    content = json.loads(out)["sensitivity"]
    assert content["num_examples"] == 20 and content["criterion"] == "magnitude"
    assert len(content["curves"]["first"]["values"]["loss"]) == len(content["fractions"]) == 9
    assert content["num_dispensable"].keys() == content["curves"].keys()
    code, out, _ = run("analyze", "model.keras", "--json")
    assert json.loads(out)["sensitivity"] is None
    assert "pass --data as well" in refused(run, "analyze", "model.keras", "--plot", "picture.png")
    assert "one of .eps" in refused(run, *words, "--plot", "picture.docx")
