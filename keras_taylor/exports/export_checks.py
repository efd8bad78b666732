"""Refusals of `export` before it starts: models, limits and places that it cannot work with."""

import os
import pathlib

import keras

from keras_taylor.exports.formats import ExportSettings
from keras_taylor.support.types import Data


def check_model(model: keras.Model) -> None:
    """Raises a ValueError unless the model is a built Sequential or Functional one."""
    if not isinstance(model, (keras.Sequential, keras.Function)) or not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a Sequential or Functional Keras model. For a `PrunableModel`, pass what `strip()` "
            f"returns. Received: model={model!r} (of type {type(model).__name__})"
        )
    if not model.built:
        raise ValueError(
            "The model is not built, so its weights do not exist yet. Give it a `keras.Input`, or call it "
            f"once. Received: model={model!r}"
        )


def check_calibration(settings: ExportSettings, calibration: Data) -> None:
    """Raises a ValueError if "int8" lacks calibration data, or if another precision has options for it."""
    if settings.quantize == "int8":
        if calibration is None:
            raise ValueError(
                "The ranges of integer activations must be measured. Pass `calibration`, inputs as the model "
                "gets them (100 are enough), or quantize='dynamic', which needs none. "
                "Received: quantize='int8', calibration=None"
            )
    elif calibration is not None or settings.int8_io:
        raise ValueError(
            "`calibration` and `int8_io` are for quantize='int8' only. "
            f"Received: quantize={settings.quantize!r}, int8_io={settings.int8_io!r}, "
            f"calibration={'None' if calibration is None else type(calibration).__name__}"
        )


def check_limits(
    format: str, tolerance: float | None, max_bytes: float | None, max_arena_bytes: float | None
) -> None:
    """Raises a ValueError for limits that no file keeps to, or that have no meaning for the format."""
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"Expected a number, zero or larger. Received: tolerance={tolerance!r}")
    for name, limit in (("max_bytes", max_bytes), ("max_arena_bytes", max_arena_bytes)):
        if limit is not None and (isinstance(limit, bool) or not limit > 0):
            raise ValueError(f"Expected a number of bytes larger than 0. Received: {name}={limit!r}")
    if max_arena_bytes is not None and format != "litert":
        raise ValueError(
            "Only LiteRT files have a tensor arena. Expected format='litert', or no `max_arena_bytes`. "
            f"Received: max_arena_bytes={max_arena_bytes!r}, format={format!r}"
        )


def check_target(target: pathlib.Path, format: str, overwrite: bool) -> None:
    """Raises a ValueError if nothing can be written there, or if something else would be lost."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"The directory '{parent}' does not exist. Make it first. Received: path='{target}'")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"The directory '{parent}' cannot be written to. Received: path='{target}'")
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise ValueError(
            f"'{target}' exists. Pass overwrite=True to replace it, or another path. "
            "Received: overwrite=False"
        )
    is_model = (target / "saved_model.pb").is_file()
    if target.is_dir() and not (format == "saved_model" and is_model):
        raise ValueError(
            f"'{target}' is a directory, but not a SavedModel that the new one could replace. "
            f"Remove it, or pass another path. Received: format={format!r}, overwrite=True"
        )
