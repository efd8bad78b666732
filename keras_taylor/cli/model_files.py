"""Models from files, loaded safely."""

import contextlib
import json
import pathlib
import warnings
import zipfile
from typing import Any

import keras
import numpy as np

from keras_taylor.cli.failures import FileError, check_model_file
from keras_taylor.support.types import Array

_MOST_FOREIGN = 3  # of foreign classes in a message


def load_model(path: str | pathlib.Path, trust: bool = False) -> keras.Model:
    """A Keras model from a `.keras` or an older `.h5` file.

    Args:
        path: The file.
        trust: Load code that the file holds (Lambda layers). Such code can do anything.

    Returns:
        The model. It is compiled if a `.keras` file says how and Keras can do it. A model from an `.h5`
        file is not compiled: Keras 3 often cannot run what compiled it.

    Raises:
        FileError: for a file that is missing or damaged, needs unknown classes, or holds code and is not
            trusted.
    """
    path = check_model_file(path)
    if path.suffix != ".keras":
        return _load_uncompiled(path, trust)
    try:
        with warnings.catch_warnings():  # of an optimizer that never trained, so has no state to lose
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            return keras.models.load_model(path, safe_mode=not trust)
    except Exception as error:
        if _is_about_compiling(error):
            return _load_uncompiled(path, trust)
        raise _loading_error(path, error) from error


def _is_about_compiling(error: Exception) -> bool:
    """Whether loading failed because of a loss, metric or optimizer, whose class may be unknown."""
    text = str(error)
    return any(word in text for word in ("optimizer", "compile", "loss", "metric", "reduction"))


def _load_uncompiled(path: pathlib.Path, trust: bool) -> keras.Model:
    try:
        return keras.models.load_model(path, compile=False, safe_mode=not trust)
    except Exception as error:
        raise _loading_error(path, error) from error


def _loading_error(path: pathlib.Path, error: Exception) -> FileError:
    """The error for a file that Keras cannot load, with what to do about it."""
    text = " ".join(str(error).split())
    if "lambda" in text.lower() and "safe" in text.lower():
        return FileError(
            f"'{path}' holds Python code (a Lambda layer), which can do anything. If you trust the source "
            "of the file, pass --trust."
        )
    foreign = _foreign_names(path)
    if foreign or "Could not locate" in text or "Unknown layer" in text or "registered" in text:
        names = ", ".join(map(repr, foreign)) or f"classes that are not registered ({text[:200]})"
        return FileError(
            f"'{path}' was refused: it needs {names}, which Keras does not have. If the model is your own, "
            "pass the module that registers its classes with --import. If it comes from somebody else, never "
            "import code that came with it: ask for a file that needs none."
        )
    return FileError(f"'{path}' cannot be loaded ({type(error).__name__}: {text[:300]}).")


def _foreign_names(path: pathlib.Path) -> list[str]:
    """The classes and functions that a `.keras` file asks for and Keras does not have."""
    names: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            module, name = value.get("module"), value.get("class_name")
            if isinstance(module, str) and isinstance(name, str) and module.split(".")[0] != "keras":
                names.append(f"{module}.{value.get('config') if name == 'function' else name}")
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(one)

    # a file may be damaged in any way, or an older one
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
        collect(json.loads(file.read("config.json")))
    return sorted(set(names))[:_MOST_FOREIGN]


def compile_for_targets(model: keras.Model, targets: Array) -> keras.Model:
    """Compiles a model for targets if it is not compiled yet.

    Args:
        model: The model that `load_model` returned.
        targets: Integer classes `(num_examples,)`, or an array like the outputs.

    Returns:
        The same model.

    Raises:
        FileError: for targets that do not say which loss is meant.
    """
    if not getattr(model, "compiled", False) or getattr(model, "loss", None) is None:
        model.compile(keras.optimizers.Adam(1e-3), _loss_for_targets(model, targets), metrics=["accuracy"])
    return model


def _loss_for_targets(model: keras.Model, targets: Array) -> keras.losses.Loss:
    """The cross-entropy that fits the targets and the model's outputs."""
    if len(model.outputs) != 1:
        raise FileError(
            "The model is not compiled and has several outputs. Compile it and save it again, so that the "
            "file says what its losses are."
        )
    shape = tuple(model.outputs[0].shape)
    if targets.ndim == len(shape) - 1 and np.issubdtype(targets.dtype, np.integer):
        return keras.losses.SparseCategoricalCrossentropy(from_logits=not _has_softmax_outputs(model))
    if targets.ndim == len(shape) and targets.shape[-1] == shape[-1]:
        return keras.losses.CategoricalCrossentropy(from_logits=not _has_softmax_outputs(model))
    raise FileError(
        f"The model is not compiled, and targets of shape {targets.shape} do not tell its loss. Compile the "
        "model and save it again."
    )


def _has_softmax_outputs(model: keras.Model) -> bool:
    """Whether the outputs on random inputs are probabilities."""
    random = np.random.default_rng(0)
    shapes = [[1 if size is None else size for size in tensor.shape[1:]] for tensor in model.inputs]
    inputs = [random.normal(size=(4, *shape)).astype("float32") for shape in shapes]
    outputs = keras.ops.convert_to_numpy(model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0))
    return bool((outputs >= 0).all() and np.allclose(outputs.sum(-1), 1, atol=1e-3))
