"""Analysis, scoring, planning and surgery of large networks, against Keras' own construction."""

import argparse
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

_MODELS = ("DenseNet201", "EfficientNetB7", "NASNetLarge", "EfficientNetV2L", "ConvNeXtXLarge")
_STEPS = ("build", "analyze", "score", "plan", "prune")


def measure(models, image_size):
    """Parameters, layers, seconds (wall, processor) of each step and the most MB, by model."""
    import keras
    from pruning_memory import Peak, resident

    import keras_taylor

    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    keras_taylor.prune(small, keras_taylor.Plan())  # imports what Keras imports late
    results, runtime = {}, resident()
    for name in models:
        shape, times, clock = (image_size, image_size, 3), {}, _Clock()
        try:
            model = getattr(keras.applications, name)(weights=None, input_shape=shape)
        except Exception as error:
            results[name] = str(error).splitlines()[0]
            continue
        times["build"] = clock.lap()
        with Peak() as peak:
            clock.lap()
            keras_taylor.analyze(model)
            times["analyze"] = clock.lap()
            scores = keras_taylor.score(model, criterion="magnitude")
            times["score"] = clock.lap()
            plan = keras_taylor.make_plan(model, scores, 0.3)
            times["plan"] = clock.lap()
            keras_taylor.prune(model, plan)
            times["prune"] = clock.lap()
        results[name] = [model.count_params(), len(model.layers), times, (peak.bytes - runtime) / 2**20]
        del model, scores, plan
        keras.backend.clear_session()
    return results


class _Clock:
    def __init__(self):
        self._last = self._now()

    def lap(self):
        now, before = self._now(), self._last
        self._last = now
        return [a - b for a, b in zip(now, before, strict=True)]

    @staticmethod
    def _now():
        return time.perf_counter(), time.process_time()


def row(backend, name, result):
    if isinstance(result, str):
        return [backend, name, *[""] * 10, f"not built: {result[:60]}"]
    params, layers, times, memory = result
    build, *others = (times[step] for step in _STEPS)
    ours = [sum(column) for column in zip(*others, strict=True)]
    return [
        *(backend, name, f"{params / 1e6:.1f}", str(layers)),
        *(f"{times[step][0]:.1f}" for step in _STEPS),
        f"{ours[0] / build[0]:.2f}",
        f"{ours[1] / build[1]:.2f}",
        f"{params * 4 / 2**20:.0f}",
        f"{memory:.0f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--models", nargs="+", default=_MODELS)
    parser.add_argument("--image-size", type=int, default=224)
    arguments = parser.parse_args()
    options = {"models": list(arguments.models), "image_size": arguments.image_size}
    results = on_each_backend(__file__, arguments.backends, **options)
    print("# Large networks\n")
    print(f"{arguments.image_size} px, random weights: wall seconds to build the model, and for `analyze`,")
    print(
        "`score` by magnitude, `make_plan` and `prune` by 30 %; these four together against building, by the"
    )
    print(
        "wall and in processor time; MB of weights, and the most resident MB beyond what the process held.\n"
    )
    print(machine(results), end="\n\n")
    header = ["backend", "model", "M parameters", "layers", *(f"{step} s" for step in _STEPS)]
    header += ["all four / build", "in processor time", "weights MB", "peak MB"]
    print(markdown_table(header, [row(b, *item) for b, r in results.items() for item in r.items()]))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
