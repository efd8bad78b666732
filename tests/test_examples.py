"""The examples run, and do what they say."""

import importlib
import pathlib
import sys

import keras
import pytest

BACKEND = keras.backend.backend()
EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", [f"loop_{BACKEND}", "custom_train_step", "prune_while_training"])
def test_pruned_while_training_on_digits(name, capsys):
    small, accuracy = importlib.import_module(name).main(epochs=5)
    assert accuracy > 0.95
    assert 0.65 < small.count_params() / 66_474 <= 0.7
    assert f"{small.count_params():,} parameters" in capsys.readouterr().out
    assert type(small) is keras.Sequential


def test_a_loop_for_every_backend():
    assert {p.stem for p in EXAMPLES.glob("loop_*.py")} == {"loop_jax", "loop_tensorflow", "loop_torch"}
