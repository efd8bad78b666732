"""Turns a `.keras` file into other formats, with TensorFlow's converters."""

import os
import tempfile

import keras
import numpy as np


class LoadingError(Exception):
    """The `.keras` file does not load in this process."""


def convert(source, target, format, batch_size=None, quantize=None, int8_io=False, calibration=None):
    """Writes a model in another format. Keras must run on TensorFlow, but for "keras".

    Args:
        source: A `.keras` file.
        target: The file or directory to write.
        format: "saved_model", "litert", "onnx" or "keras".
        batch_size: Examples a call takes; `None`: any number.
        quantize: `None`, "float16", "dynamic" or "int8" (LiteRT).
        int8_io: Whether a fully quantized model takes and gives integers.
        calibration: An `.npz` file with examples for each of the flattened inputs ("int8").
    """
    try:
        # the file is the user's own model, saved a moment ago: its lambdas are the user's own code
        model = keras.models.load_model(source, compile=False, safe_mode=False)
    except Exception as error:
        raise LoadingError(f"{type(error).__name__}: {error}") from error
    if format == "keras":
        model.save(target)  # loaded without the optimizer, so saved without its state
    elif format == "saved_model":
        _write_saved_model(model, target, batch_size)
    elif format == "onnx":
        signature = _signature(model, batch_size)
        model.export(target, format="onnx", verbose=False, input_signature=signature)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _write_saved_model(model, folder, batch_size)
            examples = calibration and _examples(model, calibration, batch_size or 1)
            content = _to_litert(folder, quantize, int8_io, examples)
        with open(target, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _write_saved_model(model, target, batch_size):
    signature = _signature(model, batch_size)
    model.export(target, format="tf_saved_model", verbose=False, input_signature=signature)


def _signature(model, batch_size):
    """What Keras' own export takes by default, but for the batch axis: one structure, names kept."""
    # a Sequential model that was loaded has no `input`
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return [
        keras.tree.map_structure(
            lambda t: keras.InputSpec(shape=(batch_size, *t.shape[1:]), dtype=t.dtype, name=t.name), structure
        )
    ]


def _examples(model, path, rows):
    """A function that yields batches of examples, by the names of the inputs."""
    names = [t.name for t in model.inputs]
    with np.load(path) as file:
        arrays = [file[str(k)] for k in range(len(names))]
    num = len(arrays[0])

    def batches():
        for start in range(0, num, rows):
            chosen = np.arange(start, start + rows) % num  # the last batch is filled up from the front
            yield {name: array[chosen] for name, array in zip(names, arrays, strict=True)}

    return batches


def _to_litert(folder, quantize, int8_io, examples):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    if quantize is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        converter.representative_dataset = examples
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if int8_io:
            converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()
