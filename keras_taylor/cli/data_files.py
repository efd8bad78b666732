"""Training and test data from files, loaded safely."""

import pathlib
import zipfile
from collections.abc import Sequence
from typing import TypeAlias

import keras
import numpy as np

from keras_taylor.cli.model_files import FileError
from keras_taylor.support.types import Array

# Inputs, the examples first, and their targets.
Examples: TypeAlias = tuple[Array, Array]

_NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")


def load_data(
    source: str,
    model: keras.Model,
    validation: float = 0.2,
    divide_by: float = 1.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Examples, Examples]:
    """Training and test data for a model.

    Args:
        source: "digits" (scikit-learn's 8x8 handwritten digits), an `.npz` file with
            `x_train`, `y_train` (and `x_test`, `y_test`) or `x`, `y`, or a directory with one
            directory of images for each class.
        model: The model. Images are scaled to the size of its input.
        validation: The fraction of the examples that becomes the test data if the source has none.
        divide_by, mean, std: The inputs are divided by the first, less the second, divided
            by the third; `mean` and `std` hold one number, or one for each channel.

    Returns:
        `((x_train, y_train), (x_test, y_test))`, NumPy arrays; the inputs are float32.

    Raises:
        FileError: for data that is missing, damaged or pickled, or does not fit the model.
    """
    if source == "digits":
        train, test = _load_digits(validation)
    elif pathlib.Path(source).is_dir():
        train, test = _load_images(pathlib.Path(source), model, validation)
    elif pathlib.Path(source).exists():
        train, test = _load_npz(pathlib.Path(source), validation)
    else:
        raise FileError(
            f"There is no data '{source}'. Expected 'digits', an .npz file or a directory of images."
        )
    x_train, x_test = (_scale_inputs(x, divide_by, mean, std) for x, _ in (train, test))
    _check_shape(x_train, model, source)
    return (x_train, _labels_for(model, train[1])), (x_test, _labels_for(model, test[1]))


def _scale_inputs(
    x: Array, divide_by: float, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Array:
    channels = x.shape[-1] if x.ndim > 1 else 1
    for name, numbers in (("--mean", mean), ("--std", std)):
        if numbers is not None and len(numbers) not in (1, channels):
            raise FileError(
                f"{name} has {len(numbers)} numbers. Expected one, or one for each of {channels}."
            )
    x = x.astype("float32") / np.float32(divide_by)
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


def _load_digits(validation: float) -> tuple[Examples, Examples]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileError('The digits need scikit-learn: pip install "keras-taylor[data]"') from error
    x, y = load_digits(return_X_y=True)
    return _split(x.reshape(-1, 8, 8, 1) / 16, y, validation)


def _split(x: Array, y: Array, validation: float) -> tuple[Examples, Examples]:
    """Training and test examples, shuffled in the same way in every call."""
    if not x.ndim or x.shape[:1] != y.shape[:1]:
        raise FileError(
            f"Inputs and labels have one row for each example. These are of shapes {x.shape} and {y.shape}."
        )
    order = np.random.default_rng(0).permutation(len(x))
    test, train = np.split(order, [max(1, round(validation * len(x)))])
    return (x[train], y[train]), (x[test], y[test])


def _load_npz(path: pathlib.Path, validation: float) -> tuple[Examples, Examples]:
    if not zipfile.is_zipfile(path):
        raise FileError(
            f"'{path}' is damaged or not an .npz file. Write it with `np.savez(path, x=..., y=...)`."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if names.issuperset(_NPZ_NAMES):
                x_train, y_train, x_test, y_test = (file[name] for name in _NPZ_NAMES)
                return (x_train, y_train), (x_test, y_test)
            for x, y in (("x_train", "y_train"), ("x", "y")):
                if {x, y} <= names:
                    return _split(file[x], file[y], validation)
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


def _load_images(directory: pathlib.Path, model: keras.Model, validation: float) -> tuple[Examples, Examples]:
    """Examples from a directory with one directory of images for each class."""
    classes = sorted(p.name for p in directory.iterdir() if p.is_dir())
    if not classes:
        raise FileError(f"'{directory}' has no directories. Expected one directory of images for each class.")
    height, width, channels = model.inputs[0].shape[1:]
    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((directory / name).iterdir()):
            images.append(_load_image(file, (height, width), channels))
            labels.append(label)
    if not images:
        raise FileError(f"'{directory}' has no images in its directories {', '.join(classes)}.")
    return _split(np.stack(images), np.array(labels), validation)


def _load_image(file: pathlib.Path, size: tuple[int, int], channels: int) -> Array:
    """An image as a float32 array `(height, width, channels)`, values from 0 to 255."""
    mode = {1: "grayscale", 3: "rgb", 4: "rgba"}.get(channels)
    try:
        image = keras.utils.load_img(file, color_mode=mode, target_size=size)
    except Exception as error:  # Pillow's own, of many kinds
        raise FileError(f"'{file}' is not an image that can be read ({type(error).__name__}).") from error
    return keras.utils.img_to_array(image, data_format="channels_last", dtype="float32")
