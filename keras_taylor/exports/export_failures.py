"""Messages of exports that failed, with advice for known causes."""

import keras

from keras_taylor.exports.artifacts import ExportError
from keras_taylor.exports.export_worker import JobError
from keras_taylor.exports.formats import ExportSettings

_MAX_ERROR_LENGTH = 1000


def conversion_failure(error: Exception, model: keras.Model, settings: ExportSettings) -> ExportError:
    """The error to raise for a model that could not be converted."""
    return ExportError(
        f"The model could not be converted. {_conversion_advice(error, settings)}Nothing was written. "
        f"Received: model={model!r}, {settings}, and from the converter: {shorten(error)}"
    )


def run_failure(error: JobError, model: keras.Model, settings: ExportSettings) -> ExportError:
    """The error to raise for an exported model that does not run."""
    return ExportError(
        f"The exported model does not run. {_run_advice(settings)}It was removed. "
        f"Received: model={model!r}, {settings}, and from its run: {shorten(error)}"
    )


def shorten(error: Exception) -> str:
    """The beginning of an error's message, on one line. TensorFlow's messages fill pages."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_ERROR_LENGTH else text[:_MAX_ERROR_LENGTH] + " ..."


def _conversion_advice(error: Exception, settings: ExportSettings) -> str:
    """Sentences that end in a blank, or nothing."""
    name = error.error_name if isinstance(error, JobError) else type(error).__name__
    if name == "crash" and settings.format == "litert" and settings.quantize == "int8":
        return (
            "If the model has recurrent layers, TensorFlow's quantizer dies of their loops: quantize the "
            "weights only (`quantize='dynamic'`), or make these layers with `unroll=True`, which writes a "
            "larger file. "
        )
    if name in ("LoadingError", "ModuleNotFoundError"):
        return (
            "It does not load in the process that converts it, where Keras runs on TensorFlow. Put your own "
            "classes in a module that can be imported, and register them "
            "(`keras.saving.register_keras_serializable`), or install `cloudpickle`, with which those of a "
            "script or notebook are sent as they are. A layer that calls functions of another backend cannot "
            "be exported to this format. "
        )
    if name != "ConverterError":
        return ""
    advice = "Expected a model that LiteRT's built-in operations cover. "
    if settings.batch_size is None:
        advice += "Recurrent layers need a fixed number of examples: try `batch_size=1`. "
    return advice


def _run_advice(settings: ExportSettings) -> str:
    """Sentences that end in a blank, or nothing."""
    if settings.format == "onnx":
        return "tf2onnx, which writes the file, lacks some operations. "
    return "Try `batch_size=1`. " if settings.batch_size is None and settings.format != "keras" else ""
