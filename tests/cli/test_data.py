"""The data that the command line reads, how it splits them, and what it says of them."""

import re

import keras
import numpy as np
import pytest
from command_line import COMPRESS
from stripes import small_model

from keras_taylor.cli import data_files

pytestmark = pytest.mark.once


def test_folders_of_images(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(5):
            image = random.integers(0, 256, (10, 12, 1)).astype("uint8")
            keras.utils.save_img(tmp_path / name / f"{number}.png", image, scale=False)
    for name in (".DS_Store", "cat/.DS_Store", "dog/Thumbs.db"):  # what systems leave in folders
        (tmp_path / name).write_text("no image")
    (tmp_path / ".cache").mkdir()
    split = data_files.load_data(str(tmp_path), small_model(), scaling=data_files.Scaling(255))
    (x, y), (_, y_validation), (x_test, y_test) = split.train, split.validation, split.test
    assert x.shape == (7, 8, 8, 1) and x_test.shape == (2, 8, 8, 1) and x.dtype == np.float32
    assert x.min() >= 0 and 0.5 < x.max() <= 1 and {*y, *y_validation, *y_test} == {0, 1}
    assert split.description == (
        f"data: 7 examples to train, 1 to validate, 2 to test; 2 classes; inputs from {x.min():g} to "
        f"{x.max():g}; classes in the order of their names: cat, dog; images resized to 8 x 8; "
        "split off with seed 0: test and validation"
    )


def test_inputs_are_scaled_channel_by_channel(tmp_path):
    x = np.full((4, 8, 8, 1), 100, "uint8")
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(4)[:, None])
    path = str(tmp_path / "data.npz")
    x, y = data_files.load_data(path, small_model(), scaling=data_files.Scaling(200, [0.25], [0.5])).train
    assert np.allclose(x, 0.5) and y.ndim == 1


@pytest.mark.parametrize("loss", ["categorical_crossentropy", keras.losses.CategoricalCrossentropy()])
def test_labels_are_as_the_compiled_loss_wants_them(tmp_path, loss):
    np.savez(tmp_path / "data.npz", x=np.zeros((5, 8, 8, 1)), y=np.array([0, 1, 2, 0, 1]))
    split = data_files.load_data(str(tmp_path / "data.npz"), small_model(loss=loss))
    y, y_test = split.train[1], split.test[1]
    assert y.shape == (3, 3) and y_test.shape == (1, 3) and (y.sum(1) == 1).all()


def test_parts_that_a_file_has_are_not_split_off(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(9, 8, 8, 1)), np.arange(9) % 3
    parts = {"train": 5, "val": 3, "test": 1}
    arrays = {
        f"{kind}_{part}": values[:num] for part, num in parts.items() for kind, values in (("x", x), ("y", y))
    }
    np.savez(tmp_path / "data.npz", **arrays)
    split = data_files.load_data(str(tmp_path / "data.npz"), small_model())
    assert [len(part[1]) for part in (split.train, split.validation, split.test)] == [5, 3, 1]
    assert "split off" not in split.description


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--test", "1"], "--test is a fraction of the examples, above 0 and below 1. Received: 1"),
        (
            ["--validation", "0"],
            "--validation is a fraction of the examples, above 0 and below 1. Received: 0",
        ),
        (["--test", "0.999"], "--test 0.999 of 60 examples leaves none to train on."),
    ],
)
def test_shares_that_leave_nothing_are_refused(run, tmp_path, options, says):
    np.savez("all.npz", x=np.zeros((60, 8, 8, 1)), y=np.arange(60) % 3)
    code, _, err = run("compress", "model.keras", "--data", "all.npz", "-o", "small.keras", *options)
    assert code == 1 and says in err


def test_compress_says_what_data_it_took_and_what_the_test_part_says(run):
    code, out, _ = run(*COMPRESS, "--epochs", "0")
    assert code == 0
    lines = out.splitlines()
    assert re.match(
        r"data: \d+ examples to train, \d+ to validate, \d+ to test; \d+ classes; inputs from ", lines[0]
    )
    measured = [line for line in lines if line.startswith("on the ")]
    assert len(measured) == 1 and re.match(r"on the \d+ test examples: .*loss \S+ -> \S+", measured[0])


def test_a_model_that_is_no_better_than_chance_is_noted(run):
    """The labels are what the model says. Of inputs that are nearly zero it says the same for all."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(6, activation="relu"),
            keras.layers.Dense(3),
        ]
    )
    picks = np.eye(64, 3, dtype="float32")  # logits are the first pixels, and 1 more for class 0
    both = np.concatenate([np.eye(3), -np.eye(3)]).astype("float32")
    model.set_weights([np.hstack([picks, -picks]), np.zeros(6), both, np.array([1, 0, 0])])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    model.save("picks.keras")
    x = np.random.default_rng(0).normal(size=(300, 8, 8, 1))
    np.savez("labels.npz", x=x, y=model.predict(x, verbose=0).argmax(-1))
    command = (
        "compress",
        "picks.keras",
        "--data",
        "labels.npz",
        "-o",
        "s.keras",
        "--epochs",
        "0",
        "--goal",
        "0.1",
    )
    for divide_by, is_noted in (("1", False), ("1e9", True)):
        code, out, _ = run(*command, "--divide-by", divide_by, "--force")
        assert code == 0 and ("Are the inputs scaled as in its training" in out) == is_noted


def test_a_model_that_knows_the_held_out_part_is_noted(run):
    """The model is not trained at all, so its loss is the same everywhere."""
    x = np.tile(np.random.default_rng(0).normal(size=(1, 8, 8, 1)), (60, 1, 1, 1))
    np.savez("all.npz", x=x, y=np.zeros(60, int))
    _, out, _ = run(
        "compress", "model.keras", "--data", "all.npz", "-o", "s.keras", "--epochs", "0", "--goal", "0.2"
    )
    assert re.search(
        r"loss on the validation part, \S+, and on the test part, \S+, is no larger than on the", out
    )
