"""What the benchmarks share: one process a backend, and tables."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time

BACKENDS = ["tensorflow", "jax", "torch"]
_DISTRIBUTIONS = {"tensorflow": ("tensorflow-cpu", "tensorflow"), "jax": ("jax",), "torch": ("torch",)}


def on_each_backend(script, backends, **arguments):
    """Runs a script's measuring function in a fresh process a backend; results by backend."""
    results = {}
    for backend in backends:
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, script, "--measure", json.dumps(arguments)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[backend] = json.loads(done.stdout.splitlines()[-1])
        print(f"{backend} done", file=sys.stderr, flush=True)
    return results


def in_process(measure, argv):
    """Measures and prints one line of JSON, if this is such a process."""
    if len(argv) != 3 or argv[1] != "--measure":
        return False
    print(json.dumps(measure(**json.loads(argv[2]))))
    return True


@contextlib.contextmanager
def without_initializers(layer_class, value="zeros"):
    """Within it weights are all one value: random ones take long, and only the structure is looked at."""
    add_weight = layer_class.add_weight

    def add(self, shape=None, initializer=None, **arguments):
        return add_weight(self, shape, initializer=value, **arguments)

    layer_class.add_weight = add
    try:
        yield
    finally:
        layer_class.add_weight = add_weight


def machine(backends, device=None):
    """One line: processor (or another device's name), versions, date."""
    device = device or f"{os.cpu_count()}-core CPU ({platform.machine()}), no GPU"
    versions = [f"{b} {_version(*_DISTRIBUTIONS[b])}" for b in backends]
    versions = ", ".join([f"Keras {_version('keras')}", *versions])
    return f"{device}; Python {platform.python_version()}, {versions}; {datetime.date.today().isoformat()}."


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interleaved_fits(models, x, y, batch_size, repetitions):
    """Seconds (wall, processor) a training step of each model, taking turns after a warm-up.

    Args:
        models: Compiled models by name.
        x, y: Arrays of a few batches: one `fit` over them is one measurement.
    """
    steps = -(-len(x) // batch_size)
    data = _fit_arguments(x, y, batch_size)

    def seconds_a_step(model):
        wall, processor = time.perf_counter(), time.process_time()
        model.fit(**data, verbose=0)
        return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps

    warm_up = {name: seconds_a_step(model)[0] * steps for name, model in models.items()}
    times = {name: [] for name in models}
    for _ in range(repetitions):
        for name, model in models.items():
            times[name].append(seconds_a_step(model))
    return {"first": warm_up, "times": times, "jit": str(next(iter(models.values())).jit_compile)}


def _fit_arguments(x, y, batch_size):
    """Arguments of `fit` for arrays in their order.

    On TensorFlow without tf.data's tuner: with it the end of a short epoch often waits, up to as long again
    as the epoch took.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return {"x": x, "y": y, "batch_size": batch_size, "shuffle": False}
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return {
        "x": tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).prefetch(2).with_options(options)
    }


def _version(*names):
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
