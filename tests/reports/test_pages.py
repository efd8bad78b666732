"""The report of a run in all its forms: text, notebook, picture, page."""

import sys

import keras
import pytest
from stripes import small_model, stripes

import keras_taylor
from keras_taylor.exports.artifacts import Artifact

pytestmark = pytest.mark.once


def artifact(path, kib, milliseconds):
    return Artifact(
        path, "litert", "int8", 1, 1024 * kib, {}, {}, 0.1, 0.01, 0.99, 0.8, 0.9, milliseconds, milliseconds,
        1, None, 2048, 0.05, "accuracy", "judged by 'accuracy'",
    )  # fmt: skip


@pytest.fixture(scope="module")
def info():
    """A run with two goals on validation data, and files that were exported."""
    keras.utils.set_random_seed(0)
    arguments = {"increment": 0.2, "verbose": 0, "return_info": True, "validation_data": stripes()}
    _, info = keras_taylor.compress(small_model(), stripes(), [0.2, 0.4], **arguments)
    info.artifacts = {"before": [artifact("a.tflite", 20, 4.0)], "after": [artifact("b.tflite", 10, 1.0)]}
    return info


def test_files_and_metrics_are_cards_and_tables(info):
    page, text = info.to_html(), str(info)
    cards = page.split('<div class="card">')[1:]
    names = [card.split(">")[1].split("<")[0] for card in cards]
    metrics = [f"{name}, validation" for name in info.metrics["after"]]
    assert names == ["parameters", "FLOPs", *metrics, "litert int8, size", "litert int8, latency"]
    assert "10.0 KiB" in cards[-2] and "before 20.0 KiB (-50.0%)" in cards[-2]
    assert "1.000 ms" in cards[-1] and "before 4.000 ms (-75.0%)" in cards[-1]
    after, before = info.metrics["after"]["accuracy"], info.metrics["before"]["accuracy"]
    assert f"before {before:.4g} ({after - before:+.4g})" in cards[names.index("accuracy, validation")]
    for table in ("What is left at each goal", "Rounds", "Files"):
        assert f"<h2>{table}" in page
    assert "b.tflite" in text and "20.0 KiB" in text and text.count("┏") == 3
    columns, rows = info.frontier()
    assert columns[:2] == ["parameters", "FLOPs"] and len(rows) == 3


def test_a_notebook_shows_a_table_and_a_picture(info, monkeypatch):
    shown = info._repr_html_()
    assert shown.startswith("<pre") and "<svg" in shown and "#000000" not in shown
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert info._repr_html_() == shown[: shown.index("</pre>") + len("</pre>")]
    assert repr(info) == f"<Info: {info.headline()}; 2 rounds>"


def test_pictures_need_matplotlib_and_pages_jinja2(info, monkeypatch, tmp_path):
    info.plot(tmp_path / "rounds.svg")
    assert "<svg" in (tmp_path / "rounds.svg").read_text()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'needs jinja2.*pip install "keras-taylor\[report\]"'):
        info.to_html()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'Pictures need matplotlib\..*"keras-taylor\[plots\]"'):
        info.plot(tmp_path / "rounds.png")


def test_a_text_that_is_no_record_is_refused():
    with pytest.raises(ValueError, match=r"not an `Info` that `Info.to_json` wrote.*Received: text='\{\}'"):
        keras_taylor.Info.from_json("{}")
