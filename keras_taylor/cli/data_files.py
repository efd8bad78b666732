"""Training, validation and test data from files, loaded safely."""

import dataclasses
import pathlib
import zipfile
from collections.abc import Sequence
from typing import TypeAlias

import keras
import numpy as np

from keras_taylor.cli.failures import FileError, check_source
from keras_taylor.support.types import Array

# Inputs, the examples first, and their targets.
Examples: TypeAlias = tuple[Array, Array]
# The parts of a source by name, "train" and perhaps "validation" and "test", and what to say of it.
_Source: TypeAlias = tuple[dict[str, Examples], list[str]]

SPLIT_SEED = 0
_SUFFIXES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_NUM_NAMED = 10  # classes


@dataclasses.dataclass(frozen=True)
class DataSplit:
    """What was loaded, in three parts.

    Attributes:
        train: What the model is fine-tuned on, and scored on.
        validation: What rounds are judged by.
        test: What is measured at the end only.
        description: One line: how many examples and classes, the range of the inputs, how they were split.
    """

    train: Examples
    validation: Examples
    test: Examples
    description: str


@dataclasses.dataclass(frozen=True)
class Scaling:
    """The inputs are divided by a number, less `mean`, divided by `std`: one number, or one a channel."""

    divide_by: float = 1.0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def load_data(
    source: str,
    model: keras.Model,
    validation: float = 0.1,
    test: float = 0.2,
    scaling: Scaling = Scaling(),
) -> DataSplit:
    """Training, validation and test data for a model.

    Args:
        source: "digits" (scikit-learn's 8x8 handwritten digits), an `.npz` file with
            `x_train`, `y_train` (perhaps `x_val`, `y_val`, `x_test`, `y_test`) or `x`, `y`, or a directory
            with one directory of images for each class.
        model: The model. Images are scaled to the size of its input.
        validation: The fraction of the training examples that becomes the validation data if the source has
            none.
        test: The fraction of all examples that becomes the test data if the source has none.
        scaling: How the inputs are scaled.

    Returns:
        The parts, NumPy arrays; the inputs are float32.

    Raises:
        FileError: for data that is missing, damaged or pickled, or does not fit the model.
    """
    if check_source(source) == "digits":
        parts, said = _load_digits()
    elif pathlib.Path(source).is_dir():
        parts, said = _load_images(pathlib.Path(source), model)
    else:
        parts, said = _load_npz(pathlib.Path(source))
    split_off = []
    for name, share in (("test", test), ("validation", validation)):
        if name not in parts:
            parts["train"], parts[name] = _split(parts["train"], share, f"--{name}")
            split_off.append(name)
    train, validation_part, test_part = (
        (_scale_inputs(x, scaling), _labels_for(model, y))
        for x, y in (parts[name] for name in ("train", "validation", "test"))
    )
    _check_shape(train[0], model, source)
    sizes = [len(y) for _, y in (train, validation_part, test_part)]
    about = [
        f"{sizes[0]} examples to train, {sizes[1]} to validate, {sizes[2]} to test",
        *_about_labels(parts["train"][1]),
        f"inputs from {train[0].min():g} to {train[0].max():g}",
        *said,
        *([f"split off with seed {SPLIT_SEED}: {' and '.join(split_off)}"] if split_off else []),
    ]
    return DataSplit(train, validation_part, test_part, f"data: {'; '.join(about)}")


def _about_labels(y: Array) -> list[str]:
    """How many classes there are, if the targets are labels."""
    is_label = y.dtype.kind in "iub" and y.size == len(y)
    return [f"{len(np.unique(y))} classes"] if is_label else []


def _scale_inputs(x: Array, scaling: Scaling) -> Array:
    mean, std = scaling.mean, scaling.std
    channels = x.shape[-1] if x.ndim > 1 else 1
    for name, numbers in (("--mean", mean), ("--std", std)):
        if numbers is not None and len(numbers) not in (1, channels):
            raise FileError(
                f"{name} has {len(numbers)} numbers. Expected one, or one for each of {channels}."
            )
    x = x.astype("float32") / np.float32(scaling.divide_by)
    if mean is not None:
        x -= np.asarray(mean, "float32")
    if std is not None:
        x /= np.asarray(std, "float32")
    return x


def _labels_for(model: keras.Model, y: Array) -> Array:
    """Classes in the form that the compiled loss takes: one-hot rows, or integers."""
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    loss = keras.losses.get(getattr(model, "loss", None))
    name = getattr(loss, "name", None) or getattr(loss, "__name__", "")
    if y.ndim == 1 and name == "categorical_crossentropy":
        num_classes = model.outputs[0].shape[-1]
        if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= num_classes:
            raise FileError(
                f"The labels are no whole numbers from 0 to {num_classes - 1}, one for each class of the "
                f"model's output. They are of type {y.dtype}, from {y.min()} to {y.max()}."
            )
        return keras.utils.to_categorical(y, num_classes)
    return y


def _check_shape(x: Array, model: keras.Model, source: str) -> None:
    """Refuses inputs of another shape than the model's input."""
    expected = tuple(model.inputs[0].shape[1:])
    shape = x.shape[1:]
    if len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True)):
        raise FileError(
            f"The data of '{source}' does not fit the model: it has shape {shape}, expected {expected} "
            "(without the batch)."
        )


def _load_digits() -> _Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileError('The digits need scikit-learn: pip install "keras-taylor[data]"') from error
    x, y = load_digits(return_X_y=True)
    return {"train": (x.reshape(-1, 8, 8, 1) / 16, y)}, []


def _split(examples: Examples, share: float, option: str) -> tuple[Examples, Examples]:
    """All but a share of the examples, and the share, shuffled in the same way in every call."""
    x, y = examples
    if not x.ndim or x.shape[:1] != y.shape[:1]:
        raise FileError(
            f"Inputs and labels have one row for each example. These are of shapes {x.shape} and {y.shape}."
        )
    num = max(1, round(share * len(x)))
    if num >= len(x):
        raise FileError(f"{option} {share:g} of {len(x)} examples leaves none to train on.")
    order = np.random.default_rng(SPLIT_SEED).permutation(len(x))
    part, rest = np.split(order, [num])
    return (x[rest], y[rest]), (x[part], y[part])


def _load_npz(path: pathlib.Path) -> _Source:
    if not zipfile.is_zipfile(path):
        raise FileError(
            f"'{path}' is damaged or not an .npz file. Write it with `np.savez(path, x=..., y=...)`."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            parts = {
                part: (file[f"x_{suffix}"], file[f"y_{suffix}"])
                for suffix, part in _SUFFIXES.items()
                if {f"x_{suffix}", f"y_{suffix}"} <= names
            }
            if "train" not in parts and {"x", "y"} <= names:
                parts["train"] = file["x"], file["y"]
            if not all(isinstance(array, np.ndarray) for pair in parts.values() for array in pair):
                raise FileError(f"'{path}' holds something else than arrays. Write it with `np.savez`.")
            if "train" in parts:
                return parts, []
    except FileError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        if "pickle" in str(error):
            raise FileError(
                f"'{path}' holds pickled objects, which could run any code. Save plain arrays: "
                "`np.savez(path, x_train=..., y_train=...)` with numeric dtypes."
            ) from error
        raise FileError(f"'{path}' is damaged or not an .npz file ({error}).") from error
    raise FileError(
        f"'{path}' has no arrays x_train and y_train, or x and y. It has: {', '.join(sorted(names))}."
    )


def _load_images(directory: pathlib.Path, model: keras.Model) -> _Source:
    classes = sorted(p.name for p in directory.iterdir() if p.is_dir() and not _is_hidden(p))
    if not classes:
        raise FileError(f"'{directory}' has no directories. Expected one directory of images for each class.")
    height, width, channels = model.inputs[0].shape[1:]
    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted(p for p in (directory / name).iterdir() if not _is_hidden(p)):
            if file.is_dir():
                raise FileError(
                    f"'{directory / name}' holds directories. Expected one directory of images for each "
                    f"class: is '{directory / name}' the one that you mean?"
                )
            images.append(_load_image(file, (height, width), channels))
            labels.append(label)
    if not images:
        raise FileError(f"'{directory}' has no images in its directories {', '.join(classes)}.")
    named = ", ".join(classes[:_NUM_NAMED]) + (", ..." if len(classes) > _NUM_NAMED else "")
    said = [f"classes in the order of their names: {named}", f"images resized to {height} x {width}"]
    return {"train": (np.stack(images), np.array(labels))}, said


def _is_hidden(path: pathlib.Path) -> bool:
    """Whether a system or program made a file for itself (`.DS_Store`, `.git`, `Thumbs.db`)."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")


def _load_image(file: pathlib.Path, size: tuple[int, int], channels: int) -> Array:
    """An image as a float32 array `(height, width, channels)`, values from 0 to 255."""
    mode = {1: "grayscale", 3: "rgb", 4: "rgba"}.get(channels)
    try:
        image = keras.utils.load_img(file, color_mode=mode, target_size=size)
    except Exception as error:  # Pillow's own, of many kinds
        raise FileError(f"'{file}' is not an image that can be read ({type(error).__name__}).") from error
    return keras.utils.img_to_array(image, data_format="channels_last", dtype="float32")
