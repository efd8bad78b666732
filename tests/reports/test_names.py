"""Names of layers and metrics with markup are shown as they are: in tables, pictures and the HTML report."""

import html
import html.parser
import re

import keras
import numpy as np
import pytest
from helpers import BACKEND

import keras_taylor

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow takes no such names of layers"),
]
NAMES = (
    "<b>fat",
    "a & b",
    "$x$",
    r"$\frac{$",
    "100% {{ y }}",
    "[bold]x",
    ":smile:",
    "_hidden",
    "<script>f()<x",
)
METRIC = "acc <b> $"


class Page(html.parser.HTMLParser):
    """Reads tags, and the texts outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def case():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((4,), name="in <i>")
    for name in NAMES:
        x = keras.layers.Dense(4, activation="relu", name=name)(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="out & $")(x), name="all <u>")
    metric = keras.metrics.MeanAbsoluteError(name=METRIC)
    model.compile("sgd", "mse", metrics=[metric])
    data = np.random.default_rng(0).normal(size=(8, 4)), np.zeros((8, 2))
    return model, data


def test_tables(case):
    model, _ = case
    text = str(keras_taylor.analyze(model))
    plan = str(keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3))
    assert all(f"│ {name} " in text for name in NAMES)
    assert "│ [bold]x " in plan and "│ :smile: " in plan


def test_a_group_in_a_model_in_the_model_takes_a_line_for_each_name(case):
    part = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="a_long_name_of_a_hidden_layer")],
        name="a_model_inside",
    )
    x = inputs = keras.Input((4,))
    x = keras.layers.Add()([part(x), keras.layers.Dense(4, name="beside")(x)])
    model = keras.Model(inputs, keras.layers.Dense(2, name="last")(x))
    lines = [
        line.split("│")[1].strip() for line in str(keras_taylor.analyze(model)).split("\n") if "│" in line
    ]
    assert lines == ["a_model_inside/", "a_long_name_of_a_hidden_layer", "with beside", "last"]


def test_pictures(case, tmp_path):
    pytest.importorskip("matplotlib")
    analysis = keras_taylor.analyze(*case, fractions=(0.5,), num_examples=8, verbose=0)
    analysis.plot(tmp_path / "scan.svg")
    texts = [
        html.unescape(text) for text in re.findall("<!-- (.*?) -->", (tmp_path / "scan.svg").read_text())
    ]
    assert {name.replace("_hidden", " _hidden") for name in NAMES} <= set(texts)
    analysis.plot(tmp_path / "metric.png", METRIC)
    few = keras_taylor.analyze(*case, fractions=(0.5,), include=["_hidden", "$x$"], num_examples=8, verbose=0)
    (axes,) = few.plot(tmp_path / "lines.png").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()][:2] == [r"\$x\$", " _hidden"]


def test_the_page(case):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    model, data = case
    options = {"increment": 0.3, "criterion": "magnitude", "exclude": ["_hidden"], "verbose": 0}
    _, info = keras_taylor.compress(model, data, 0.3, validation_data=data, return_info=True, **options)
    page = Page(info.to_html())
    texts = " ".join(page.texts)
    assert METRIC in texts and "out & $" in texts
    assert not re.search(r"acc <b>|<b>fat|<script>f|in <i>", info.to_html())
    plain = keras_taylor.Info.from_json(info.to_json())
    assert plain.to_html() == info.to_html()
