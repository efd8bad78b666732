"""Analysis, scoring, planning and surgery of large networks, against Keras' own construction."""

import argparse
import statistics
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

_MODELS = ("DenseNet201", "EfficientNetB7", "NASNetLarge", "EfficientNetV2L", "ConvNeXtXLarge")
_STEPS = ("build", "analyze", "score", "plan", "prune")

HEAD = """# Large networks

{size} px, random weights: wall seconds to build the model, and for `analyze`, `score` by magnitude,
`make_plan` and `prune` by 30 %, medians of {repetitions} repetitions; these four together against building,
by the wall and in processor time, with the least and the largest; MB of weights, and the most resident MB
beyond what the process held before the first model.
"""


def measure(models, image_size, repetitions):
    """Parameters, layers, for each repetition seconds (wall, processor) of each step, most MB, by model."""
    import keras
    from pruning_memory import Peak, resident

    import keras_taylor

    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    keras_taylor.prune(small, keras_taylor.Plan())  # imports what Keras imports late
    results, runtime = {}, resident()
    for name in models:
        laps, memory = [], None
        for _ in range(repetitions):
            times, clock = {}, _Clock()
            model = getattr(keras.applications, name)(weights=None, input_shape=(image_size, image_size, 3))
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
            laps.append(times)
            memory = memory or (peak.bytes - runtime) / 2**20  # of the first, before memory is in pieces
            results[name] = [model.count_params(), len(model.layers), laps, memory]
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
    params, layers, laps, memory = result
    return [
        *(backend, name, f"{params / 1e6:.1f}", str(layers)),
        *(f"{statistics.median(times[step][0] for times in laps):.1f}" for step in _STEPS),
        *(_spread([_ratio(times, kind) for times in laps]) for kind in (0, 1)),
        f"{params * 4 / 2**20:.0f}",
        f"{memory:.0f}",
    ]


def _ratio(times, kind):
    """Of all steps to building, by the wall (0) or in processor time (1)."""
    build, *others = (times[step][kind] for step in _STEPS)
    return sum(others) / build


def _spread(ratios):
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--models", nargs="+", default=_MODELS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    options = {"models": list(arguments.models), "image_size": arguments.image_size}
    results = on_each_backend(__file__, arguments.backends, repetitions=arguments.repetitions, **options)
    print(HEAD.format(size=arguments.image_size, repetitions=arguments.repetitions))
    print(machine(results), end="\n\n")
    header = ["backend", "model", "M parameters", "layers", *(f"{step} s" for step in _STEPS)]
    header += ["all four / build", "in processor time", "weights MB", "peak MB"]
    print(markdown_table(header, [row(b, *item) for b, r in results.items() for item in r.items()]))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
