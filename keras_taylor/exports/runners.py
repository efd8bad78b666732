"""Loads exported files of every format and calls them."""

import abc
import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import keras
import numpy as np

from keras_taylor.exports.artifacts import TensorDetails
from keras_taylor.support.arrays import outputs_in_batches, random_arrays
from keras_taylor.support.types import Array, Tensor

_FREE_BATCH_SIZE = 8  # examples a call, for files that take any number


class Runner(abc.ABC):
    """A model that is loaded in some runtime.

    A call is `finish(run(prepare(arrays)))`. Only `run` is timed.

    Attributes:
        inputs: Name -> details, in the order of the Keras model's flattened inputs.
        outputs: Name -> details, in the order of the Keras model's flattened outputs.
    """

    inputs: dict[str, TensorDetails]
    outputs: dict[str, TensorDetails]

    @abc.abstractmethod
    def prepare(self, arrays: Sequence[Array]) -> Any:
        """Converts arrays, one for each input, to the form that `run` takes."""

    @abc.abstractmethod
    def run(self, prepared: Any) -> Any:
        """Outputs of the model, in the runtime's own form."""

    def finish(self, outputs: Any) -> list[Array]:
        """Converts outputs of `run` to a list of arrays, and integers to the reals that they stand for."""
        return list(outputs)


class SavedModelRunner(Runner):
    """A TensorFlow SavedModel, called by its signature `serving_default`."""

    def __init__(self, path: str, names: Sequence[str]) -> None:
        import tensorflow as tf

        self._as_tensor = tf.constant
        self._model = tf.saved_model.load(path)  # the function alone does not keep its variables alive
        self._function = self._model.signatures["serving_default"]
        specs = self._function.structured_input_signature[1]
        self.inputs = {name: _tensor_details(specs[name]) for name in match_inputs(names, specs)}
        outputs = self._function.structured_outputs
        self.outputs = {name: _tensor_details(outputs[name]) for name in sort_outputs(outputs)}

    def prepare(self, arrays: Sequence[Array]) -> dict[str, Tensor]:
        """Arrays as tensors, by name."""
        named = zip(self.inputs.items(), arrays, strict=True)
        return {name: self._as_tensor(array, details["dtype"]) for (name, details), array in named}

    def run(self, prepared: dict[str, Tensor]) -> list[Array]:
        """One call."""
        outputs = self._function(**prepared)
        return [outputs[name].numpy() for name in self.outputs]


class LiteRTRunner(Runner):
    """A LiteRT (TFLite) file in its interpreter.

    Args:
        path: The file.
        names: Names of the Keras model's flattened inputs.
        delegates: Whether the interpreter may replace operations by those of its default delegates.

    Attributes:
        interpreter: The interpreter.
    """

    def __init__(self, path: str, names: Sequence[str], delegates: bool = True) -> None:
        runtime = import_litert()
        resolvers = runtime.resolver_types
        resolver = resolvers.AUTO if delegates else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with warnings.catch_warnings():  # TensorFlow announces that its interpreter will move
            warnings.simplefilter("ignore")
            self.interpreter = runtime.interpreter(
                model_path=path, num_threads=1, experimental_op_resolver_type=resolver
            )
        runner = self.interpreter.get_signature_runner()
        inputs, outputs = runner.get_input_details(), runner.get_output_details()
        input_names, output_names = match_inputs(names, inputs), sort_outputs(outputs)
        self._inputs = [inputs[name] for name in input_names]
        self._outputs = [outputs[name] for name in output_names]
        self.inputs = dict(zip(input_names, map(_litert_details, self._inputs), strict=True))
        self.outputs = dict(zip(output_names, map(_litert_details, self._outputs), strict=True))
        self._shapes: list[tuple[int, ...]] | None = None

    def prepare(self, arrays: Sequence[Array]) -> list[Array]:
        """Arrays with the dtypes of the inputs. The interpreter allocates tensors for their shapes."""
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            for details, shape in zip(self._inputs, shapes, strict=True):
                if tuple(details["shape"]) != shape or self._shapes is not None:
                    self.interpreter.resize_tensor_input(details["index"], shape)
            self.interpreter.allocate_tensors()
            self._shapes = shapes
        return [_quantize(array, details) for array, details in zip(arrays, self._inputs, strict=True)]

    def run(self, prepared: list[Array]) -> list[Array]:
        """One call."""
        for details, array in zip(self._inputs, prepared, strict=True):
            self.interpreter.set_tensor(details["index"], array)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(details["index"]) for details in self._outputs]

    def finish(self, outputs: list[Array]) -> list[Array]:
        """Outputs with reals in place of quantized integers."""
        return [_dequantize(array, details) for array, details in zip(outputs, self._outputs, strict=True)]


class OnnxRunner(Runner):
    """An ONNX model in ONNX Runtime."""

    def __init__(self, path: str, names: Sequence[str]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {argument.name: argument for argument in self._session.get_inputs()}
        self.inputs = {name: _onnx_details(inputs[name]) for name in match_inputs(names, inputs)}
        # these are in the model's order; the names of a list do not sort ("Identity_10:0")
        self.outputs = {argument.name: _onnx_details(argument) for argument in self._session.get_outputs()}

    def prepare(self, arrays: Sequence[Array]) -> dict[str, Array]:
        """Arrays with the dtypes of the inputs, by name."""
        named = zip(self.inputs.items(), arrays, strict=True)
        return {name: array.astype(details["dtype"]) for (name, details), array in named}

    def run(self, prepared: dict[str, Array]) -> list[Array]:
        """One call."""
        outputs: list[Array] = self._session.run(list(self.outputs), prepared)
        return outputs


class KerasRunner(Runner):
    """A Keras model on the backend of this process, called by `predict_on_batch`."""

    def __init__(self, model: keras.Model) -> None:
        # a model of the same layers: the given one gains no predict function
        self._model = keras.Model(model.inputs, model.outputs)
        self.inputs = {tensor.name: _tensor_details(tensor) for tensor in model.inputs}
        self.outputs = {f"output_{k}": _tensor_details(tensor) for k, tensor in enumerate(model.outputs)}

    @classmethod
    def load(cls, path: str, names: Sequence[str]) -> Self:
        """Loads a `.keras` file, and gives its inputs these names."""
        # `export` wrote the file from the user's own model, so its lambdas are the user's own code
        runner = cls(keras.models.load_model(path, compile=False, safe_mode=False))
        runner.inputs = dict(zip(names, runner.inputs.values(), strict=True))
        return runner

    def prepare(self, arrays: Sequence[Array]) -> Sequence[Array]:
        """The arrays."""
        return arrays

    def run(self, prepared: Sequence[Array]) -> Any:
        """One call."""
        return self._model.predict_on_batch(prepared)

    def finish(self, outputs: Any) -> list[Array]:
        """Outputs as a flat list."""
        return list(keras.tree.flatten(outputs))


_LOADERS: Final[Mapping[str, Callable[[str, Sequence[str]], Runner]]] = {
    "saved_model": SavedModelRunner,
    "litert": LiteRTRunner,
    "onnx": OnnxRunner,
    "keras": KerasRunner.load,
}


def load_runner(format: str, path: str, names: Sequence[str]) -> Runner:
    """Loads an exported file in the runtime of its format.

    Args:
        format: Key of `formats.SUFFIXES`.
        path: The file, or the directory of a SavedModel.
        names: Names of the Keras model's flattened inputs.
    """
    start_runtime(format)
    return _LOADERS[format](path, names)


def run_examples(runner: Runner, arrays: Sequence[Array], batch_size: int | None) -> list[Array]:
    """Outputs of a model for all examples.

    Args:
        runner: The model.
        arrays: Examples for each of the flattened inputs.
        batch_size: Number of examples that a call takes; `None` for any number.
    """
    return outputs_in_batches(
        lambda batch: runner.finish(runner.run(runner.prepare(batch))),
        arrays,
        batch_size or _FREE_BATCH_SIZE,
        pad=batch_size is not None,
    )


def random_examples(runner: Runner, num: int) -> list[Array]:
    """Random examples for each input of a model, see `arrays.random_arrays`."""
    details = runner.inputs.values()
    dtypes = ["float32" if "scale" in each else each["dtype"] for each in details]
    return random_arrays([tuple(each["shape"]) for each in details], dtypes, num)


def start_runtime(format: str) -> None:
    """Imports the runtime of a format, and limits it to one thread if that is decided here."""
    if format == "litert":
        import_litert()
    elif format == "onnx":
        import onnxruntime  # noqa: F401
    elif format == "saved_model":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # too late if TensorFlow has already run something
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)


class LiteRTRuntime(NamedTuple):
    """LiteRT's interpreter class, and the enumeration of its operation resolvers."""

    interpreter: Any
    resolver_types: Any


def import_litert() -> LiteRTRuntime:
    """LiteRT from its own package if that is installed, else from TensorFlow."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        import tensorflow as tf

        return LiteRTRuntime(tf.lite.Interpreter, tf.lite.experimental.OpResolverType)
    return LiteRTRuntime(Interpreter, OpResolverType)


def match_inputs(names: Sequence[str], artifact_names: Iterable[str]) -> list[str]:
    """The artifact's names of the Keras model's inputs, in the model's order.

    Args:
        names: Names of the Keras model's flattened inputs.
        artifact_names: Names in the artifact, in any order.

    Raises:
        ValueError: if the artifact has other inputs.
    """
    found = list(artifact_names)
    by_identifier = {_as_identifier(name): name for name in found}
    wanted = [_as_identifier(name) for name in names]
    if len(found) == len(names) and set(by_identifier) == set(wanted):
        return [by_identifier[name] for name in wanted]
    if len(found) == len(names) == 1:
        return found
    raise ValueError(f"The artifact's inputs {sorted(found)} are not the model's {sorted(names)}")


def _as_identifier(name: str) -> str:
    """The name of a function's argument that TensorFlow makes of an input's name."""
    name = re.sub(r"[\W_]", "_", name)
    return name if name[:1].isalpha() else f"arg_{name}"


def sort_outputs(names: Iterable[str]) -> list[str]:
    """Output names in the order of the Keras model's flattened outputs.

    They are numbered ("output_2") for a list of outputs, and sort like the keys of a dict otherwise.
    """
    names = list(names)
    if all(re.fullmatch(r"output_\d+", name) for name in names):
        return sorted(names, key=lambda name: int(name.removeprefix("output_")))
    return sorted(names)


def _quantize(array: Array, details: Mapping[str, Any]) -> Array:
    """An array with the dtype of a LiteRT input, reals as quantized integers where it takes these."""
    scale, zero_point = details["quantization"]
    dtype = np.dtype(details["dtype"])
    if not scale or dtype.kind != "i":
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantize(array: Array, details: Mapping[str, Any]) -> Array:
    """An array of reals, out of quantized integers where a LiteRT output gives these."""
    scale, zero_point = details["quantization"]
    return (array.astype("float32") - zero_point) * scale if scale else array


def _tensor_details(tensor: Any) -> TensorDetails:
    """Details of a symbolic tensor or a TensorSpec."""
    dtype = tensor.dtype if isinstance(tensor.dtype, str) else tensor.dtype.name
    return {"shape": list(tensor.shape), "dtype": dtype}


def _litert_details(details: Mapping[str, Any]) -> TensorDetails:
    shape = [None if size < 0 else int(size) for size in details["shape_signature"]]
    found: TensorDetails = {"shape": shape, "dtype": np.dtype(details["dtype"]).name}
    scale, zero_point = details["quantization"]
    return {**found, "scale": float(scale), "zero_point": int(zero_point)} if scale else found


def _onnx_details(argument: Any) -> TensorDetails:
    shape = [size if isinstance(size, int) else None for size in argument.shape]
    names = {"float": "float32", "double": "float64"}
    dtype = argument.type.removeprefix("tensor(").removesuffix(")")
    return {"shape": shape, "dtype": names.get(dtype, dtype)}
