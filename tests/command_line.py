"""Types a command line in a directory of its own."""

import os
import re
import sys

import keras
import numpy as np
import pytest
from stripes import small_model, stripes

from keras_taylor.cli import commands

COMPRESS = ("compress", "model.keras", "--data", "data.npz", "-o", "small.keras", "--goal", "0.4")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Types a command in an empty directory with a model and data; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    model, (x, y) = small_model(), stripes()
    model.fit(x, y, epochs=2, batch_size=16, verbose=0)
    model.save("model.keras")
    np.savez("data.npz", x_train=x, y_train=y, x_test=x[:12], y_test=y[:12])

    def typed(*words):
        monkeypatch.setattr(sys, "argv", ["keras-taylor", *words])
        with pytest.raises(SystemExit) as stopped:
            commands.main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return typed


def refused(typed, *words, code=1):
    """The one line that a command fails with."""
    before = sorted(os.listdir())
    received, out, err = typed(*words)
    assert received == code and re.fullmatch(r"(data: .*\n)?", out)
    assert err.startswith("keras-taylor: ") and err.count("\n") == 1, err
    assert sorted(os.listdir()) == before  # nothing half-written
    return err


TRAPS = ("keras", "numpy", "jinja2", "matplotlib", "PIL", "sklearn", "tensorflow", "tf2onnx", "onnxruntime")


@pytest.fixture
def trapped_folder(tmp_path, monkeypatch):
    """The working directory, with files that are called like libraries and leave a trace when they run."""
    monkeypatch.chdir(tmp_path)
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(f"open('ran-{name}', 'w').close(); raise SystemExit(7)")
    yield tmp_path
    assert list(tmp_path.glob("ran-*")) == []
