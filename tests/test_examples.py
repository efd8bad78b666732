"""The examples run, and do what they say."""

import importlib
import pathlib
import sys

import keras
import pytest
from helpers import BACKEND

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("sklearn")


@pytest.mark.slow
@pytest.mark.parametrize("name", [f"loop_{BACKEND}", "custom_train_step", "prune_while_training"])
def test_pruned_while_training_on_digits(name, capsys):
    small, accuracy = importlib.import_module(name).main(epochs=5)
    assert accuracy > 0.95
    assert 0.65 < small.count_params() / 66_474 <= 0.7
    assert f"{small.count_params():,} parameters" in capsys.readouterr().out
    assert type(small) is keras.Sequential


def test_a_loop_for_every_backend():
    assert {p.stem for p in EXAMPLES.glob("loop_*.py")} == {"loop_jax", "loop_tensorflow", "loop_torch"}


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    pytest.importorskip("tensorflow")  # which `export` needs
    # small batches gain nothing from PyTorch's threads, and lose much where other tests run beside them
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    notebook = nbformat.read(EXAMPLES / "compress.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=900).execute()  # what a cell raises, this raises
    cells = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    pages = [o.data["text/html"] for o in cells["compress"] if "text/html" in o.get("data", {})]
    live = [page for page in pages if "<svg" in page]
    assert len(live) == 1 and "round" in live[0]  # one view, which was drawn anew after each round
    assert "conv2d_2" in cells["analyze"][0].text and "\x1b" not in cells["analyze"][0].text
    pages = [o.data["text/html"] for o in cells["export"] if "text/html" in o.get("data", {})]
    (shown,) = [page for page in pages if "<svg" in page]  # beside lines that say what `export` does
    assert "after.tflite" in shown
    kept = ["after.tflite", "before.tflite", "report.html", "small.keras"]
    assert cells["keep"][0].data["text/plain"] == repr(kept)
