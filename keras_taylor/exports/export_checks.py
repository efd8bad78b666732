"""What `export` refuses before it starts."""

import os

import keras

from keras_taylor.exports.formats import QUANTIZATIONS


def check_model(model):
    """Refuses what is no built Sequential or Functional model."""
    if not isinstance(model, (keras.Sequential, keras.Function)) or not isinstance(model, keras.Model):
        raise ValueError(
            "Expected a Sequential or Functional Keras model; of a `PrunableModel` pass what `strip()` "
            f"returns. Received: model={model!r} (of type {type(model).__name__})"
        )
    if not model.built:
        raise ValueError(
            "The model is not built: its weights do not exist yet. Give it a `keras.Input`, or call it "
            f"once. Received: model={model!r}"
        )


def check_options(format, quantize, calibration, int8_io, batch_size, tolerance):
    """Refuses options that do not go together."""
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"Expected one of {list(QUANTIZATIONS)}. Received: quantize={quantize!r}")
    if quantize is not None and format != "litert":
        raise ValueError(
            "Only LiteRT files are quantized. Expected format='litert', or no `quantize`. "
            f"Received: quantize={quantize!r}, format={format!r}"
        )
    if quantize == "int8" and calibration is None:
        raise ValueError(
            "Integer activations need their ranges. Pass `calibration`, inputs as the model gets them "
            "(100 are enough); or quantize='dynamic', which needs none. "
            "Received: quantize='int8', calibration=None"
        )
    if quantize != "int8" and (calibration is not None or int8_io):
        raise ValueError(
            "`calibration` and `int8_io` are for quantize='int8' only. "
            f"Received: quantize={quantize!r}, int8_io={int8_io!r}, "
            f"calibration={'None' if calibration is None else type(calibration).__name__}"
        )
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool) and batch_size > 0
    if batch_size is not None and (not whole or format == "keras"):
        raise ValueError(
            "Expected a positive integer, or `None` for any number (the only choice for format='keras'). "
            f"Received: batch_size={batch_size!r}"
        )
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"Expected a number, zero or larger. Received: tolerance={tolerance!r}")


def check_budgets(format, max_bytes, max_arena_bytes):
    """Refuses sizes that are no numbers of bytes, and an arena where there is none."""
    for name, limit in (("max_bytes", max_bytes), ("max_arena_bytes", max_arena_bytes)):
        if limit is not None and (isinstance(limit, bool) or not limit > 0):
            raise ValueError(f"Expected a number of bytes larger than 0. Received: {name}={limit!r}")
    if max_arena_bytes is not None and format != "litert":
        raise ValueError(
            "Only LiteRT files have a tensor arena. Expected format='litert', or no `max_arena_bytes`. "
            f"Received: max_arena_bytes={max_arena_bytes!r}, format={format!r}"
        )


def check_target(target, format, overwrite):
    """Refuses a place that cannot be written to, or where something else is."""
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
            f"'{target}' is a directory, and no SavedModel that could be replaced by this one. "
            f"Remove it, or pass another path. Received: format={format!r}, overwrite=True"
        )
