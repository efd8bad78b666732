"""Turns Keras models into files of other formats, with TensorFlow's converters."""

import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self

import keras
import numpy as np

from keras_taylor.exports.formats import ExportSettings
from keras_taylor.rules.base import override_attributes
from keras_taylor.support.arrays import padded_batches, random_inputs, read_arrays, write_arrays
from keras_taylor.support.files import scratch_folder
from keras_taylor.support.keras_internals import functional_class, layers_inside, sequential_function
from keras_taylor.support.types import Array, Tensor, Tree

_NUM_RANDOM_CALIBRATION = 4
_HALF_PRECISIONS: Final = ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
# Layers of Keras that give back their input unless a model trains. Versions of Keras differ in some.
_NAMES = """
    ActivityRegularization AlphaDropout AugMix CutMix Dropout Equalization GaussianDropout GaussianNoise
    Identity MixUp RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast
    RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert
    RandomPerspective RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear
    RandomTranslation RandomZoom Solarization SpatialDropout1D SpatialDropout2D SpatialDropout3D
"""
TRAINING_LAYERS: Final = tuple(getattr(keras.layers, n) for n in _NAMES.split() if hasattr(keras.layers, n))


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
    if settings.format in ("litert", "onnx"):  # which have few operations in half precision
        _rewrite_in_float32(source)
    try:
        # the user's own model was saved a moment ago, so its lambdas are the user's own code
        model = keras.models.load_model(source, compile=False, safe_mode=False)
    except Exception as error:
        raise LoadingError(f"{type(error).__name__}: {error}") from error
    model = remove_training_layers(model)
    if settings.format == "keras":
        model.save(target)  # the optimizer was not loaded, so its state is not saved
        return
    _split_grouped_convolutions(model)
    # Keras exports `__call__`; without `training` a layer does what its `call` has as default
    with override_attributes(model, __call__=functools.partial(model.__call__, training=False)):
        if settings.format == "saved_model":
            _write_saved_model(model, target, settings.batch_size)
        elif settings.format == "onnx":
            _write_onnx(model, target, settings.batch_size)
        else:
            _write_litert(model, target, settings, calibration)


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
    with scratch_folder() as folder:
        source, examples = os.path.join(folder, "model.keras"), None
        model.save(source)
        if settings.quantize == "int8":
            examples = os.path.join(folder, "calibration.npz")
            if calibration is None:
                calibration = random_inputs(model.inputs, _NUM_RANDOM_CALIBRATION)
            write_arrays(examples, calibration)
        convert(source, str(target), settings, examples)


def _rewrite_in_float32(path: str) -> None:
    """Has the layers of a model in a `.keras` file compute in float32, with the same weights."""
    rewritten = f"{path}.float32"
    with zipfile.ZipFile(path) as source:
        before = json.loads(source.read("config.json"))
        after = _in_float32(before)
        if after == before:
            return
        with zipfile.ZipFile(rewritten, "w") as target:
            for entry in source.infolist():
                is_config = entry.filename == "config.json"
                target.writestr(entry, json.dumps(after) if is_config else source.read(entry))
    os.replace(rewritten, path)


def _in_float32(value: Any) -> Any:
    """A configuration with float32 in place of half precision: of policies, inputs, casts and constants."""
    if isinstance(value, list):
        return [_in_float32(one) for one in value]
    if not isinstance(value, dict):
        return "float32" if isinstance(value, str) and value in _HALF_PRECISIONS else value
    changed = {key: _in_float32(one) for key, one in value.items() if key not in ("name", "keras_history")}
    if value.get("class_name") == "DTypePolicy":
        changed["config"]["name"] = _in_float32(value["config"]["name"])
    return {**value, **changed}


def remove_training_layers(model: keras.Model) -> keras.Model:
    """A model of the same layers without those that do something in training only, such as augmentation.

    Within layers that are not made of a graph of layers they stay, but do nothing.
    """
    for layer in layers_inside(model):
        if type(layer) in TRAINING_LAYERS:
            # Keras' augmentation trains by default, and draws random numbers that it then does not use
            layer.call = functools.partial(_call_in_training_only, layer.call)
    return _without_training_layers(model)


def _call_in_training_only(call: Callable[..., Tree], x: Tree, *args: Any, training: Any = None) -> Tree:
    return call(x, *args, training=True) if training else x


def _without_training_layers(model: keras.Model) -> keras.Model:
    if not (_is_graph(model) and any(type(layer) in TRAINING_LAYERS for layer in layers_inside(model))):
        return model

    def open_model(layer: keras.Layer) -> keras.Layer:
        return _without_training_layers(layer) if isinstance(layer, keras.Model) else layer

    def call(layer: keras.Layer, *args: Any, **kwargs: Any) -> Tree:
        outputs = layer(*args, **kwargs)
        gives_back = type(layer) in TRAINING_LAYERS and not kwargs.get("training")
        if not gives_back or not isinstance(outputs, keras.KerasTensor):
            return outputs
        return args[0] if args[0].dtype == outputs.dtype else keras.ops.cast(args[0], outputs.dtype)

    graph = sequential_function(model) if isinstance(model, keras.Sequential) else model
    return keras.models.clone_model(graph, clone_function=open_model, call_function=call)


def _is_graph(model: keras.Model) -> bool:
    """Whether a model does no more than call its layers as they are connected."""
    kinds = keras.Sequential, functional_class()
    return any(isinstance(model, kind) and type(model).call is kind.call for kind in kinds)


def _split_grouped_convolutions(model: keras.Model) -> None:
    """Has each group of a 3-D convolution computed alone: only XLA knows those of several groups."""
    for layer in layers_inside(model):
        if isinstance(layer, keras.layers.Conv3D) and layer.groups > 1:
            layer.convolution_op = functools.partial(_convolve_groups, layer, layer.convolution_op)


def _convolve_groups(
    layer: keras.layers.Conv3D, convolve: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, kernel: Tensor
) -> Tensor:
    axis = -1 if layer.data_format == "channels_last" else 1
    groups = zip(
        keras.ops.split(inputs, layer.groups, axis), keras.ops.split(kernel, layer.groups, -1), strict=True
    )
    return keras.ops.concatenate([convolve(x, weights) for x, weights in groups], axis)


def _write_saved_model(model: keras.Model, target: str, batch_size: int | None) -> None:
    signature = _input_signature(model, batch_size)
    model.export(target, format="tf_saved_model", verbose=False, input_signature=signature)


def _write_onnx(model: keras.Model, target: str, batch_size: int | None) -> None:
    import tensorflow as tf
    import tf2onnx

    convert = functools.partial(_convert_to_onnx, tf2onnx.convert.from_function)
    tf.config.run_functions_eagerly(True)  # else grouped convolutions are functions for XLA
    try:
        with override_attributes(tf2onnx.convert, from_function=convert):
            signature = _input_signature(model, batch_size)
            model.export(target, format="onnx", verbose=False, input_signature=signature)
    finally:
        tf.config.run_functions_eagerly(False)


def _convert_to_onnx(
    convert: Callable[..., Any], function: Any, signature: Sequence[Any], **options: Any
) -> Any:
    """`tf2onnx.convert.from_function`, but constants become no inputs, and `Erfc` (exact GELU) is known."""
    concrete = _FunctionOfInputs(function.get_concrete_function(*signature))
    handlers: dict[str, tuple[Any, list[Any]]] = {"Erfc": (_write_erfc, [])}
    return convert(concrete, signature, custom_op_handlers=handlers, **options)


class _FunctionOfInputs:
    """A concrete function whose `inputs` are those of the model only, without tensors that it captured."""

    def __init__(self, concrete: Any) -> None:
        captured = {tensor.name for _, tensor in concrete.graph.captures}
        self._concrete = concrete
        self.inputs = [tensor for tensor in concrete.inputs if tensor.name not in captured]

    def get_concrete_function(self, *signature: Any) -> Self:
        """Itself."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._concrete, name)


def _write_erfc(graph: Any, node: Any, name: str, arguments: Any) -> None:
    """Writes TensorFlow's `Erfc(x)` as `1 - Erf(x)`."""
    from tf2onnx.utils import make_name, map_onnx_to_numpy_type

    (erf,) = node.output
    one = np.ones((), map_onnx_to_numpy_type(graph.get_dtype(erf)))
    node.type = "Erf"
    difference = graph.insert_new_node_on_output("Sub", erf, name=make_name(name))
    graph.replace_inputs(difference, [graph.make_const(make_name("one"), one).output[0], erf])


def _input_signature(model: keras.Model, batch_size: int | None) -> list[Any]:
    """The signature that Keras' own export uses, with this batch size: one structure, names kept."""
    # a Sequential model that was loaded has no `input`
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return [
        keras.tree.map_structure(
            lambda t: keras.InputSpec(shape=(batch_size, *t.shape[1:]), dtype=t.dtype, name=t.name), structure
        )
    ]


def _write_litert(model: keras.Model, target: str, settings: ExportSettings, calibration: str | None) -> None:
    with scratch_folder() as folder:
        _write_saved_model(model, folder, settings.batch_size)
        content = _convert_to_litert(folder, settings, model.inputs, calibration)
    with open(target, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _convert_to_litert(
    folder: str, settings: ExportSettings, inputs: Sequence[keras.KerasTensor], calibration: str | None
) -> bytes:
    """The content of a LiteRT file for the SavedModel in `folder`, which has these inputs."""
    import tensorflow as tf

    def representative_dataset() -> Iterator[dict[str, Array]]:
        if calibration is None:
            raise ValueError("Expected examples to calibrate on. Received: calibration=None")
        for batch in padded_batches(read_arrays(calibration), settings.batch_size or 1):
            named = zip(inputs, batch, strict=True)
            yield {tensor.name: array.astype(tensor.dtype) for tensor, array in named}

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
