"""Runs exported models of every format, and measures them."""

import contextlib
import re
import sys
import time
import warnings

import keras
import numpy as np

WARM_UP, SECONDS = 5, 3.0
ROWS = 8  # examples a call where their number is free


class SavedModel:
    """A TensorFlow SavedModel, by its signature `serving_default`."""

    def __init__(self, path, names):
        import tensorflow as tf

        self._as_tensor = tf.constant
        self._model = tf.saved_model.load(path)  # the function does not keep its variables alive
        self._function = self._model.signatures["serving_default"]
        specs = self._function.structured_input_signature[1]
        self.inputs = {name: _details(specs[name]) for name in matched(names, specs)}
        outputs = self._function.structured_outputs
        self.outputs = {name: _details(outputs[name]) for name in in_order(outputs)}

    def prepare(self, arrays):
        """Arrays as the runtime wants them."""
        return dict(zip(self.inputs, map(self._as_tensor, arrays), strict=True))

    def run(self, prepared):
        """One call."""
        outputs = self._function(**prepared)
        return [outputs[name].numpy() for name in self.outputs]

    def finish(self, outputs):
        """What a call gave, as arrays of reals."""
        return outputs


class LiteRT:
    """A LiteRT (TFLite) flatbuffer in its interpreter."""

    def __init__(self, path, names, delegates=True):
        interpreter_class, resolvers = import_litert()
        resolver = resolvers.AUTO if delegates else resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        with warnings.catch_warnings():  # TensorFlow's own interpreter says that it will move
            warnings.simplefilter("ignore")
            self.interpreter = interpreter_class(
                model_path=path, num_threads=1, experimental_op_resolver_type=resolver
            )
        runner = self.interpreter.get_signature_runner()
        inputs, outputs = runner.get_input_details(), runner.get_output_details()
        self._inputs = [inputs[name] for name in matched(names, inputs)]
        self._outputs = [outputs[name] for name in in_order(outputs)]
        self.inputs = dict(zip(matched(names, inputs), map(_litert_details, self._inputs), strict=True))
        self.outputs = dict(zip(in_order(outputs), map(_litert_details, self._outputs), strict=True))
        self._shapes = None

    def prepare(self, arrays):
        """Arrays as the interpreter wants them, its tensors made for their shapes."""
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            for details, shape in zip(self._inputs, shapes, strict=True):
                if tuple(details["shape"]) != shape or self._shapes is not None:
                    self.interpreter.resize_tensor_input(details["index"], shape)
            self.interpreter.allocate_tensors()
            self._shapes = shapes
        return [_to_integers(a, d) for a, d in zip(arrays, self._inputs, strict=True)]

    def run(self, prepared):
        """One call."""
        for details, array in zip(self._inputs, prepared, strict=True):
            self.interpreter.set_tensor(details["index"], array)
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(details["index"]) for details in self._outputs]

    def finish(self, outputs):
        """What a call gave, as arrays of reals."""
        return [_to_reals(a, d) for a, d in zip(outputs, self._outputs, strict=True)]


class Onnx:
    """An ONNX model in ONNX Runtime."""

    def __init__(self, path, names):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = {one.name: one for one in self._session.get_inputs()}
        self.inputs = {name: _onnx_details(inputs[name]) for name in matched(names, inputs)}
        # in the model's order; those of a list have names that do not sort ("Identity_10:0")
        self.outputs = {one.name: _onnx_details(one) for one in self._session.get_outputs()}

    def prepare(self, arrays):
        """Arrays as the runtime wants them."""
        return dict(zip(self.inputs, arrays, strict=True))

    def run(self, prepared):
        """One call."""
        return self._session.run(list(self.outputs), prepared)

    def finish(self, outputs):
        """What a call gave, as arrays of reals."""
        return outputs


class Keras:
    """A `.keras` file, on the backend of this process."""

    def __init__(self, path, names):
        # written by `export` from the user's own model, so its lambdas are the user's own code
        model = keras.models.load_model(path, compile=False, safe_mode=False)
        self._model = keras.Model(model.inputs, model.outputs)
        self.inputs = {name: _details(t) for name, t in zip(names, model.inputs, strict=True)}
        self.outputs = {f"output_{k}": _details(t) for k, t in enumerate(model.outputs)}

    def prepare(self, arrays):
        """Arrays as the model wants them."""
        return arrays

    def run(self, prepared):
        """One call."""
        return self._model.predict_on_batch(prepared)

    def finish(self, outputs):
        """What a call gave, as arrays of reals."""
        return keras.tree.flatten(outputs)


RUNNERS = {"saved_model": SavedModel, "litert": LiteRT, "onnx": Onnx, "keras": Keras}


def inspect(format, path, names, batch_size, tables, repetitions):
    """Loads an artifact, times it, runs it on examples; in a process that ran none before.

    Args:
        format: Key of `RUNNERS`.
        path: The artifact.
        names: Names of the Keras model's flattened inputs.
        batch_size: Examples a call takes; `None`: any number.
        tables: Pairs of `.npz` files: examples to read, for each of the flattened inputs, and
            outputs to write.
        repetitions: Timed calls, at most.

    Returns:
        A dict with "inputs", "outputs", "latency_ms", "latency_p90_ms", "latency_batch",
        "peak_memory" and "arena_bytes", as `Artifact` has them.
    """
    start_runtime(format)
    before = _resident("VmRSS")
    runner = RUNNERS[format](path, names)
    arrays = read_arrays(tables[0][0])
    first = [a[np.arange(batch_size or 1) % len(a)] for a in arrays]
    (seconds,) = _in_turn([runner], [first], repetitions)
    peak = _resident("VmHWM")
    for source, target in tables:
        write_arrays(target, run_rows(runner, read_arrays(source), batch_size))
    return {
        "inputs": runner.inputs,
        "outputs": runner.outputs,
        **_percentiles(seconds),
        "latency_batch": batch_size or 1,
        "peak_memory": None if before is None else max(0, peak - before),
        "arena_bytes": arena_size(path, names, first) if format == "litert" else None,
    }


def time_in_turn(artifacts, batch_size, repetitions):
    """Times artifacts in one process, one call of each in turn.

    Args:
        artifacts: Dicts with "format", "path", "inputs" and "batch_size".
        batch_size: Examples a call, where the artifact leaves it free.
        repetitions: Timed calls of each, at most.

    Returns:
        For each a dict with "latency_ms", "latency_p90_ms" and "latency_batch".
    """
    for format in {one["format"] for one in artifacts}:
        start_runtime(format)
    runners = [RUNNERS[one["format"]](one["path"], list(one["inputs"])) for one in artifacts]
    rows = [one["batch_size"] or batch_size for one in artifacts]
    arrays = [
        random_arrays([tuple(d["shape"]) for d in r.inputs.values()], _dtypes(r), n)
        for r, n in zip(runners, rows, strict=True)
    ]
    times = _in_turn(runners, arrays, repetitions)
    return [{**_percentiles(t), "latency_batch": n} for t, n in zip(times, rows, strict=True)]


def run_rows(runner, arrays, batch_size):
    """Outputs for all examples, in batches; of a fixed size the last one is filled up."""
    rows, num = batch_size or ROWS, len(arrays[0])
    parts = []
    for start in range(0, num, rows):
        stop = min(start + rows, num)
        chosen = np.arange(start, start + rows) % num if batch_size else np.arange(start, stop)
        outputs = runner.finish(runner.run(runner.prepare([a[chosen] for a in arrays])))
        parts.append([o[: stop - start] for o in outputs])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def arena_size(path, names, arrays):
    """Bytes of the largest set of tensors that a LiteRT model has alive at one time.

    A tensor lives from the operation that makes it (an input: from the start) to the last one that
    reads it (an output: to the end); sizes are rounded up to 16 bytes. Weights lie in
    the file and do not count. No memory plan can do with less; interpreters for
    microcontrollers come near, and add scratch buffers of their kernels and their own records.
    """
    runner = LiteRT(path, names, delegates=False)
    runner.run(runner.prepare(arrays))  # sizes of dynamic tensors are known after a call
    interpreter = runner.interpreter
    details = {one["index"]: one for one in interpreter.get_tensor_details()}
    operations = interpreter._get_ops_details()  # nothing public tells who reads which tensor
    first = {one["index"]: 0 for one in interpreter.get_input_details()}
    last = dict(first)
    for step, operation in enumerate(operations):
        for index in operation["outputs"]:
            first.setdefault(index, step)
            last[index] = step
        for index in operation["inputs"]:
            if index in first:
                last[index] = step
    last.update({one["index"]: len(operations) for one in interpreter.get_output_details()})
    sizes = {index: _num_bytes(details[index]) for index in first if index in details}
    steps = range(max(1, len(operations)))
    return max(sum(n for i, n in sizes.items() if first[i] <= s <= last[i]) for s in steps)


def _num_bytes(details):
    raw = int(np.prod(details["shape"])) * np.dtype(details["dtype"]).itemsize
    return -(-raw // 16) * 16


def start_runtime(format):
    """Imports what runs a format, and keeps it to one thread where it can be told to."""
    if format == "litert":
        import_litert()
    elif format == "onnx":
        import onnxruntime  # noqa: F401
    elif format == "saved_model":
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # it has run something already
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)


def import_litert():
    """LiteRT's interpreter and its resolvers: of the package of its own, else of TensorFlow."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        import tensorflow as tf

        return tf.lite.Interpreter, tf.lite.experimental.OpResolverType
    return Interpreter, OpResolverType


def random_arrays(shapes, dtypes, rows, seed=0):
    """Standard normal reals; integers 0 and 1, which every table of embeddings has.

    Args:
        shapes: Shapes, batch first; an axis of unknown size gets 32.
        dtypes: Their dtypes, as strings.
        rows: Examples.
    """
    random = np.random.default_rng(seed)
    arrays = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        full = (rows, *(size or 32 for size in shape[1:]))
        real = np.dtype(dtype).kind == "f"
        values = random.standard_normal(full) if real else random.integers(0, 2, full)
        arrays.append(values.astype(dtype))
    return arrays


def read_arrays(path):
    """The flat list of arrays of an `.npz` file."""
    with np.load(path) as file:
        return [file[str(k)] for k in range(len(file.files))]


def write_arrays(path, arrays):
    """A flat list of arrays as an `.npz` file."""
    np.savez(path, **{str(k): array for k, array in enumerate(arrays)})


def matched(names, found):
    """The artifact's names of the Keras model's inputs, in the model's order."""
    plain = {_plain(name): name for name in found}
    wanted = [_plain(name) for name in names]
    if len(found) == len(names) and set(plain) == set(wanted):
        return [plain[name] for name in wanted]
    if len(found) == len(names) == 1:
        return list(found)
    raise ValueError(f"The artifact's inputs {sorted(found)} are not the model's {sorted(names)}")


def _plain(name):
    """What TensorFlow makes of an argument's name."""
    name = re.sub(r"[\W_]", "_", name)
    return name if name[:1].isalpha() else f"arg_{name}"


def in_order(names):
    """Output names in the order of the model's flattened outputs: numbered ones, or sorted keys of a dict."""
    numbered = all(re.fullmatch(r"output_\d+", name) for name in names)
    return sorted(names, key=lambda name: int(name[len("output_") :]) if numbered else name)


def _in_turn(runners, arrays, repetitions):
    """Seconds of each call of each runner."""
    prepared = [runner.prepare(a) for runner, a in zip(runners, arrays, strict=True)]
    times = [[] for _ in runners]
    end = None
    for repetition in range(-WARM_UP, repetitions):
        for runner, inputs, seconds in zip(runners, prepared, times, strict=True):
            start = time.perf_counter()
            runner.run(inputs)
            if repetition >= 0:
                seconds.append(time.perf_counter() - start)
        end = end or time.perf_counter() + SECONDS * len(runners)
        if time.perf_counter() > end and repetition >= 0:
            break
    return times


def _percentiles(seconds):
    median, p90 = np.percentile(seconds, (50, 90)) * 1000
    return {"latency_ms": float(median), "latency_p90_ms": float(p90)}


def _resident(field):
    """Bytes of this process's memory, now ("VmRSS") or at most so far ("VmHWM")."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def _to_integers(array, details):
    scale, zero_point = details["quantization"]
    dtype = np.dtype(details["dtype"])
    if not scale or dtype.kind != "i":
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.round(array / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _to_reals(array, details):
    scale, zero_point = details["quantization"]
    return (array.astype("float32") - zero_point) * scale if scale else array


def _details(tensor):
    dtype = tensor.dtype if isinstance(tensor.dtype, str) else tensor.dtype.name
    return {"shape": list(tensor.shape), "dtype": dtype}


def _litert_details(details):
    shape = [None if size < 0 else int(size) for size in details["shape_signature"]]
    found = {"shape": shape, "dtype": np.dtype(details["dtype"]).name}
    scale, zero_point = details["quantization"]
    return {**found, "scale": float(scale), "zero_point": int(zero_point)} if scale else found


def _onnx_details(one):
    shape = [size if isinstance(size, int) else None for size in one.shape]
    names = {"float": "float32", "double": "float64"}
    dtype = one.type.removeprefix("tensor(").removesuffix(")")
    return {"shape": shape, "dtype": names.get(dtype, dtype)}


def _dtypes(runner):
    return ["float32" if "scale" in d else d["dtype"] for d in runner.inputs.values()]
