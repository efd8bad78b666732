"""Turns Keras models into files of other formats, with TensorFlow's converters."""

import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_taylor.exports.formats import ExportSettings
from keras_taylor.support.arrays import padded_batches, random_inputs, read_arrays, write_arrays
from keras_taylor.support.types import Array

_NUM_RANDOM_CALIBRATION = 4


class LoadingError(Exception):
    """The `.keras` file does not load in this process."""


def convert_file(source: str, target: str, settings: ExportSettings, calibration: str | None = None) -> None:
    """Converts a `.keras` file. Keras must run on TensorFlow, except for the format "keras".

    Args:
        source: The `.keras` file.
        target: The file or directory to write.
        settings: The format and its options.
        calibration: An `.npz` file with examples for each of the flattened inputs, for "int8".

    Raises:
        LoadingError: if the file does not load. Converters raise errors of their own.
    """
    try:
        # the user's own model was saved a moment ago, so its lambdas are the user's own code
        model = keras.models.load_model(source, compile=False, safe_mode=False)
    except Exception as error:
        raise LoadingError(f"{type(error).__name__}: {error}") from error
    if settings.format == "keras":
        model.save(target)  # the optimizer was not loaded, so its state is not saved
    elif settings.format == "saved_model":
        _write_saved_model(model, target, settings.batch_size)
    elif settings.format == "onnx":
        signature = _input_signature(model, settings.batch_size)
        model.export(target, format="onnx", verbose=False, input_signature=signature)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write_saved_model(model, folder, settings.batch_size)
            content = _convert_to_litert(folder, settings, [t.name for t in model.inputs], calibration)
        with open(target, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def save_and_convert(
    model: keras.Model,
    target: str | pathlib.Path,
    settings: ExportSettings,
    calibration: Sequence[Array] | None = None,
    convert: Callable[[str, str, ExportSettings, str | None], None] = convert_file,
) -> None:
    """Writes a file of a model by way of a `.keras` file in a temporary directory.

    Args:
        model: A built Sequential or Functional model.
        target: The file or directory to write.
        settings: The format and its options.
        calibration: Examples for each of the flattened inputs, for "int8"; `None` for four random ones.
            That is enough to measure size and speed, which do not depend on the ranges of activations.
        convert: `convert_file`, or a function that has another process call it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, examples = os.path.join(folder, "model.keras"), None
        model.save(source)
        if settings.quantize == "int8":
            examples = os.path.join(folder, "calibration.npz")
            if calibration is None:
                calibration = random_inputs(model.inputs, _NUM_RANDOM_CALIBRATION)
            write_arrays(examples, calibration)
        convert(source, str(target), settings, examples)


def _write_saved_model(model: keras.Model, target: str, batch_size: int | None) -> None:
    signature = _input_signature(model, batch_size)
    model.export(target, format="tf_saved_model", verbose=False, input_signature=signature)


def _input_signature(model: keras.Model, batch_size: int | None) -> list[Any]:
    """The signature that Keras' own export uses, with this batch size: one structure, names kept."""
    # a Sequential model that was loaded has no `input`
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return [
        keras.tree.map_structure(
            lambda t: keras.InputSpec(shape=(batch_size, *t.shape[1:]), dtype=t.dtype, name=t.name), structure
        )
    ]


def _convert_to_litert(
    folder: str, settings: ExportSettings, names: Sequence[str], calibration: str | None
) -> bytes:
    """The content of a LiteRT file for the SavedModel in `folder`, whose inputs have these names."""
    import tensorflow as tf

    def representative_dataset() -> Iterator[dict[str, Array]]:
        if calibration is None:
            raise ValueError("Expected examples to calibrate on. Received: calibration=None")
        for batch in padded_batches(read_arrays(calibration), settings.batch_size or 1):
            yield dict(zip(names, batch, strict=True))

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    if settings.quantize is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if settings.quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if settings.quantize == "int8":
        converter.representative_dataset = representative_dataset
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if settings.int8_io:
            converter.inference_input_type = converter.inference_output_type = tf.int8
    content: bytes = converter.convert()
    return content
