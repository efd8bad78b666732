"""Models and data out of files, safely."""

import pathlib
import zipfile

import keras
import numpy as np


class FileError(ValueError):
    """A file that cannot be used, in one line that says what to do."""


def load_model(path, trust=False):
    """A Keras model out of a `.keras` or an old `.h5` file.

    Args:
        path: The file.
        trust: Load code that the file holds (Lambda layers), which may do anything.

    Returns:
        A `keras.Model`, compiled if a .keras file says how and it can be done; what
        compiled an old .h5 file, Keras 3 often cannot run.

    Raises:
        FileError: for a file that is missing, damaged, needs classes that are not known
            here, or holds code and is not trusted.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileError(f"There is no file '{path}'. Check the name.")
    if path.suffix not in (".keras", ".h5", ".hdf5"):
        raise FileError(f"'{path}' is no model file. Expected a .keras or .h5 file.")
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        raise FileError(f"'{path}' is damaged or no .keras file. Save the model again with `model.save`.")
    if path.suffix != ".keras":
        return _load_uncompiled(path, trust)
    try:
        return keras.models.load_model(path, safe_mode=not trust)
    except Exception as error:
        if _is_about_compiling(error):
            return _load_uncompiled(path, trust)
        raise _loading_error(path, error) from error


def _is_about_compiling(error):
    """Losses, metrics and optimizers may be of classes that are not known here."""
    text = str(error)
    return any(word in text for word in ("optimizer", "compile", "loss", "metric", "reduction"))


def _load_uncompiled(path, trust):
    try:
        return keras.models.load_model(path, compile=False, safe_mode=not trust)
    except Exception as error:
        raise _loading_error(path, error) from error


def _loading_error(path, error):
    text = " ".join(str(error).split())
    if "lambda" in text.lower() and "safe" in text.lower():
        return FileError(
            f"'{path}' holds Python code (a Lambda layer), which could do anything. If you know where the "
            "file is from, pass --trust."
        )
    if "Could not locate" in text or "Unknown layer" in text or "registered" in text:
        return FileError(
            f"'{path}' needs classes that are not known here: {text[:200]}. Register them with "
            "`keras.saving.register_keras_serializable` in a module, and pass it with --import."
        )
    return FileError(f"'{path}' cannot be loaded ({type(error).__name__}: {text[:300]}).")


def load_data(source, model, validation=0.2, divide_by=1.0, mean=None, std=None):
    """Training and validation data for a model.

    Args:
        source: "digits" (scikit-learn's 8x8 handwritten digits), an `.npz` file with
            `x_train`, `y_train` (and `x_test`, `y_test`) or `x`, `y`, or a folder with one
            folder of images for each class.
        model: The model that they are for; it tells the size of images.
        validation: The part that is held out where the source does not say.
        divide_by, mean, std: Inputs are divided by the first, less the second, divided
            by the third (one number, or one a channel).

    Returns:
        `((x_train, y_train), (x_test, y_test))`, NumPy arrays, inputs float32.

    Raises:
        FileError: for data that is missing, damaged, pickled, or does not fit.
    """
    if source == "digits":
        arrays = _digits(model, validation)
    elif pathlib.Path(source).is_dir():
        arrays = _images(pathlib.Path(source), model, validation)
    elif pathlib.Path(source).exists():
        arrays = _arrays(pathlib.Path(source), validation)
    else:
        raise FileError(
            f"There is no data '{source}'. Expected 'digits', an .npz file or a folder of images."
        )
    x_train, y_train, x_test, y_test = arrays
    x_train, x_test = (_scaled(x, divide_by, mean, std) for x in (x_train, x_test))
    _check_fits(x_train, model, source)
    return (x_train, _labels(y_train, model)), (x_test, _labels(y_test, model))


def _scaled(x, divide_by, mean, std):
    x = x.astype("float32") / np.float32(divide_by)
    if mean is not None:
        x -= np.asarray(mean, "float32")
    if std is not None:
        x /= np.asarray(std, "float32")
    return x


def _labels(y, model):
    """Classes as the compiled loss wants them: one row of zeros and a one each, or a number."""
    y = y.reshape(-1) if y.ndim == 2 and y.shape[1] == 1 else y
    loss = keras.losses.get(getattr(model, "loss", None))
    name = getattr(loss, "name", None) or getattr(loss, "__name__", "")
    if y.ndim == 1 and name == "categorical_crossentropy":
        return keras.utils.to_categorical(y, model.outputs[0].shape[-1])
    return y


def _check_fits(x, model, source):
    expected = tuple(model.inputs[0].shape[1:])
    shape = x.shape[1:]
    if len(shape) != len(expected) or any(e not in (None, s) for s, e in zip(shape, expected, strict=True)):
        raise FileError(
            f"The data of '{source}' does not fit the model: it has shape {shape}, expected {expected} "
            "(without the batch)."
        )


def _digits(model, validation):
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise FileError('The digits need scikit-learn: pip install "keras-taylor[data]"') from error
    x, y = load_digits(return_X_y=True)
    return _split(x.reshape(-1, 8, 8, 1) / 16, y, validation)


def _split(x, y, validation):
    """Evenly mixed, the same at every call."""
    order = np.random.default_rng(0).permutation(len(x))
    held_out, rest = np.split(order, [max(1, round(validation * len(x)))])
    return x[rest], y[rest], x[held_out], y[held_out]


def _arrays(path, validation):
    try:
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
            if {"x_train", "y_train", "x_test", "y_test"} <= names:
                return tuple(file[n] for n in ("x_train", "y_train", "x_test", "y_test"))
            for x, y in (("x_train", "y_train"), ("x", "y")):
                if {x, y} <= names:
                    return _split(file[x], file[y], validation)
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        if "pickle" in str(error):
            raise FileError(
                f"'{path}' holds pickled objects, which could run any code. Save plain arrays: "
                "`np.savez(path, x_train=..., y_train=...)` with numeric dtypes."
            ) from error
        raise FileError(f"'{path}' is damaged or no .npz file ({error}).") from error
    raise FileError(
        f"'{path}' has no arrays x_train and y_train, or x and y. It has: {', '.join(sorted(names))}."
    )


def _images(folder, model, validation):
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if not classes:
        raise FileError(f"'{folder}' has no folders. Expected one folder of images for each class.")
    height, width, channels = model.inputs[0].shape[1:]
    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).iterdir()):
            images.append(_image(file, (height, width), channels))
            labels.append(label)
    if not images:
        raise FileError(f"'{folder}' has no images in its folders {', '.join(classes)}.")
    return _split(np.stack(images), np.array(labels), validation)


def _image(file, size, channels):
    mode = {1: "grayscale", 3: "rgb", 4: "rgba"}.get(channels)
    try:
        image = keras.utils.load_img(file, color_mode=mode, target_size=size)
    except Exception as error:
        raise FileError(f"'{file}' is no image that can be read ({error}).") from error
    return keras.utils.img_to_array(image, data_format="channels_last", dtype="float32")


def compiled_for(model, targets):
    """The model, compiled for targets if it is not yet.

    Args:
        model: The model that `load_model` gave.
        targets: Integer classes `(num_examples,)`, or arrays like the outputs.

    Returns:
        The same model.

    Raises:
        FileError: for targets that tell no loss.
    """
    if not getattr(model, "compiled", False) or getattr(model, "loss", None) is None:
        model.compile(keras.optimizers.Adam(1e-3), _loss_for(model, targets), metrics=["accuracy"])
    return model


def _loss_for(model, targets):
    if len(model.outputs) != 1:
        raise FileError(
            "The model is not compiled and has several outputs: compile it, and save it again, so that the "
            "file says what its losses are."
        )
    shape = tuple(model.outputs[0].shape)
    if targets.ndim == len(shape) - 1 and np.issubdtype(targets.dtype, np.integer):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=not _ends_in_softmax(model))
    if targets.ndim == len(shape) and targets.shape[-1] == shape[-1]:
        return keras.losses.CategoricalCrossentropy(from_logits=not _ends_in_softmax(model))
    raise FileError(
        f"The model is not compiled, and targets of shape {targets.shape} do not tell its loss. Compile it, "
        "and save it again."
    )


def _ends_in_softmax(model):
    """Whether outputs on random inputs are probabilities."""
    random = np.random.default_rng(0)
    shapes = [[1 if s is None else s for s in t.shape[1:]] for t in model.inputs]
    inputs = [random.normal(size=(4, *shape)).astype("float32") for shape in shapes]
    outputs = keras.ops.convert_to_numpy(model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0))
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(-1), 1, atol=1e-3))
