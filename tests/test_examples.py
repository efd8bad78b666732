"""The examples run, and do what they say.

`KERAS_BACKEND=torch python tests/test_examples.py` writes into the notebook what its code prints today.
"""

import importlib
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
from helpers import BACKEND

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NOTEBOOK, BACKEND_OF_NOTEBOOK = EXAMPLES / "compress.ipynb", "torch"
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


@pytest.mark.once
@pytest.mark.slow
def test_the_notebook_runs_and_prints_what_it_says(monkeypatch):
    pytest.importorskip("tensorflow")  # which `export` needs
    # small batches gain nothing from PyTorch's threads, and lose much where other tests run beside them
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
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
    if BACKEND == BACKEND_OF_NOTEBOOK:
        for now, before in zip(notebook.cells, stored.cells, strict=True):
            assert_alike(printed(now), printed(before))


PROGRESS = re.compile(r": step \d|which takes some seconds the first time")
CHANGING = re.compile(r"(?<=FLOPs gone).*|(?<=latency x )[\d.]+")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


def printed(cell):
    """What a cell of a notebook prints and shows as text, but for what processors and their load change.

    That is how far a run is, and in rows of rounds and files all behind sizes: metrics, times, epochs.
    """
    for line in "\n".join(map(text_of, outputs_of(cell))).splitlines():
        if line.strip(" ─━═┏┓┗┛┡┩┳╇┴┬┼└┘┌┐├┤") and not PROGRESS.search(line):
            yield "│".join(CHANGING.sub("", line).split("│")[:4])


def outputs_of(cell):
    """The outputs of a cell, without warnings of libraries."""
    return [one for one in cell.get("outputs", []) if one.get("name") != "stderr"]


def text_of(output):
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def assert_alike(now, before):
    """The same words, and numbers that differ by no more than processors do."""
    now, before = map("\n".join, (now, before))
    words, other_words = (" ".join(NUMBER.sub("", text).split()) for text in (now, before))
    assert words == other_words
    found, stored = (
        np.array([float(one.replace(",", "")) for one in NUMBER.findall(text)]) for text in (now, before)
    )
    np.testing.assert_allclose(found, stored, rtol=0.1, atol=0.1)


@pytest.mark.once
def test_outputs_are_compared():
    line = "round 1/4: 59,758 parameters left (10.1% gone)"
    cell = {
        "outputs": [{"text": f"{line}, 9% of FLOPs gone, loss 1, 2 s\nround 1/4: scoring: step 1 of 8\n"}]
    }
    assert list(printed(cell)) == [f"{line}, 9% of FLOPs gone"]
    assert_alike([line.replace("59,758", "59,700")], [line])
    for other in (line.replace("59,758", "39,758"), line.replace("gone", "left"), line.replace("1/4", "1/5")):
        with pytest.raises(AssertionError):
            assert_alike([other], [line])


def run_notebook():
    """Writes into the notebook what its code prints today."""
    import nbclient
    import nbformat

    assert BACKEND == BACKEND_OF_NOTEBOOK, f"set KERAS_BACKEND={BACKEND_OF_NOTEBOOK}"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, record_timing=False).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in outputs_of(cell) if not PROGRESS.search(text_of(one))]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    run_notebook()
