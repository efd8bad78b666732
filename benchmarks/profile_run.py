"""Where the time of `score`, `repair` and `compress` goes: seconds, compilations, forward passes, memory.

    python -m benchmarks.profile_run MobileNetV2 jax
    python -m benchmarks.profile_run quickstart tensorflow --rounds 3 --names

MODEL is "quickstart" (the network of examples/quickstart.py), "resnet20" (trained; from the folder that
KERAS_TAYLOR_DATA names) or a class of `keras.applications` with random weights. All runs on one thread.

"compiled" counts programs that XLA compiles (JAX) or functions that are traced (TensorFlow); PyTorch has
none. "compiling" is how long that took, tracing included. "passes" is the processor time, in warm `predict`
calls over the same images. "maps" are memory maps of the process, which compiled functions take.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import resource
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
ONE_XLA_THREAD = "--xla_cpu_multi_thread_eigen=false"


class Compilations:
    """Counts what a backend compiles, by the name of the function."""

    def __init__(self, backend):
        self.names, self.seconds = collections.Counter(), 0.0
        if backend == "jax":
            import jax

            jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        elif backend == "tensorflow":
            self._watch_traces()

    def _on_duration(self, event, seconds, fun_name="?", **_):
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds
            if event.endswith("backend_compile_duration"):
                self.names[fun_name] += 1

    def _watch_traces(self):
        from tensorflow.python.framework import func_graph

        trace, depth = func_graph.func_graph_from_py_func, [0]

        def count(name, *args, **kwargs):
            start, depth[0] = time.perf_counter(), depth[0] + 1
            try:
                return trace(name, *args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:  # a function that another one calls is traced within it
                    self.names[name] += 1
                    self.seconds += time.perf_counter() - start

        func_graph.func_graph_from_py_func = count


class Profile:
    """Rows of a table, one for each step that ran."""

    def __init__(self, backend, with_names):
        self.compilations, self.rows, self.pass_seconds = Compilations(backend), [], None
        self._with_names = with_names

    def step(self, name, function):
        """Runs a function, and notes what it took."""
        names, compiling = self.compilations.names.copy(), self.compilations.seconds
        memory, wall, processor = resident("VmRSS"), time.perf_counter(), time.process_time()
        reset_peak()
        result = function()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        compiling, new = self.compilations.seconds - compiling, self.compilations.names - names
        passes = "" if self.pass_seconds is None else f"{processor / self.pass_seconds:.1f}"
        growth = (resident("VmHWM") - memory) / 1024
        cells = [f"{wall:.1f}", f"{processor:.1f}", str(new.total()), f"{compiling:.1f}", passes]
        self.rows.append([name, *cells, f"{growth:,.0f}", str(num_maps())])
        print(" | ".join(self.rows[-1]), file=sys.stderr, flush=True)
        if self._with_names:
            print("   ", dict(new.most_common(12)), file=sys.stderr, flush=True)
        return result


def resident(what):
    """KiB of this process's memory, now ("VmRSS") or at its peak ("VmHWM"); Linux only."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def reset_peak():
    """Sets the peak to the present size, where the system allows it."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def num_maps():
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


def load(name, size, num):
    """A compiled model, images and labels; whether the model is trained."""
    import keras
    import numpy as np

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "quickstart":
        import quickstart

        x, _, y, _ = quickstart.digits()
        model = quickstart.small_cnn()
        model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
        return model, x, y
    if name == "resnet20":
        import resnet_cifar

        x, y, _, _ = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
        model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)
        model.compile(keras.optimizers.SGD(0.001, momentum=0.9), loss, metrics=["accuracy"])
        return model, x[:num], y[:num]
    shape = (size, size, 3)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=shape, classes=100, classifier_activation=None)
    model.compile(keras.optimizers.SGD(0.001, momentum=0.9), loss, metrics=["accuracy"])
    random = np.random.default_rng(0)
    return model, random.normal(size=(num, *shape)).astype("float32"), random.integers(0, 100, num)


def single_steps(profile, turn, model, x, y, batch_size):
    """Scores, cuts and repairs a model."""
    import keras_taylor

    scores = profile.step(f"score, {turn}", lambda: keras_taylor.score(model, (x, y), batch_size=batch_size))
    plan = keras_taylor.make_plan(model, scores, 0.2)
    small = profile.step(f"prune, {turn}", lambda: keras_taylor.prune(model, plan))
    profile.step(f"repair, {turn}", lambda: keras_taylor.repair(small, model, plan, x))


def measure(name, backend, size, num, batch_size, rounds, with_names):
    """The rows of the table for one network on one backend."""
    import keras

    import keras_taylor

    keras.utils.set_random_seed(0)
    model, x, y = load(name, size, num)
    profile, arguments = Profile(backend, with_names), {"batch_size": batch_size}
    profile.step("fit, first epoch", lambda: model.fit(x, y, verbose=0, **arguments))
    profile.step("fit, second epoch", lambda: model.fit(x, y, verbose=0, **arguments))
    model.predict(x, verbose=0, **arguments)
    start = time.process_time()
    model.predict(x, verbose=0, **arguments)
    profile.pass_seconds = time.process_time() - start
    for turn in ("first", "second"):
        single_steps(profile, turn, model, x, y, batch_size)
    if rounds:
        _, info = profile.step(
            f"compress, {rounds} rounds, epochs=0",
            lambda: keras_taylor.compress(
                *(model, (x, y), 0.3),
                increment=0.3 / rounds,
                epochs=0,
                verbose=0,
                return_info=True,
                **arguments,
            ),
        )
        for one in info.rounds:
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in one.seconds.items())
            print(f"round {one.number}: {phases}", file=sys.stderr)
    print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    return profile.rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("backend", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--size", type=int, default=96, help="pixels, for `keras.applications`")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=0, help="rounds of a `compress` without training")
    parser.add_argument("--names", action="store_true", help="what was compiled most often")
    chosen = parser.parse_args()
    os.environ.update(dict.fromkeys(THREADS, "1"), KERAS_BACKEND=chosen.backend, TF_CPP_MIN_LOG_LEVEL="3")
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_XLA_THREAD}"
    from common import machine, markdown_table

    arguments = chosen.size, chosen.examples, chosen.batch_size, chosen.rounds, chosen.names
    rows = measure(chosen.model, chosen.backend, *arguments)
    print(machine([chosen.backend]), end="\n\n")
    header = ["step", "s", "processor s", "compiled", "compiling s", "passes", "memory MiB", "maps"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
