"""From analysis to surgery of residual nets of growing depth, against Keras' own construction."""

import argparse
import gc
import resource
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

_STEPS = ("build", "analyze", "score", "plan", "prune")


def measure(depths):
    """Processor seconds of each step by number of layers, and resident MB after it."""
    import keras

    import keras_taylor

    sys.setrecursionlimit(100_000)  # Keras makes a model by recursion, a frame a layer

    def steps(blocks):
        model = residual_net(keras, blocks)
        yield model
        yield keras_taylor.analyze(model)
        scores = keras_taylor.score(model, criterion="magnitude")
        yield scores
        plan = keras_taylor.make_plan(model, scores, 0.3)
        yield plan
        yield keras_taylor.prune(model, plan)

    results = []
    for depth in [50, *depths]:  # the first imports what Keras imports late
        seconds, held = [], []
        start = time.process_time()
        for value in steps(depth // 5):
            seconds.append(time.process_time() - start)
            held.append(value)
            start = time.process_time()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        results.append([len(held[0].layers), seconds, memory])
        del held
        gc.collect()
    return {"rows": results[1:]}


def residual_net(keras, blocks):
    x = inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(4, 1)(x)
    for _ in range(blocks):
        y = keras.layers.Conv2D(4, 1, use_bias=False)(x)
        y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
        x = keras.layers.Add()([x, keras.layers.Conv2D(4, 1)(y)])
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


def rows(backend, result):
    for layers, seconds, memory in result["rows"]:
        build = seconds[0]
        yield [
            backend,
            str(layers),
            *(f"{one:.1f} ({1000 * one / layers:.2f})" for one in seconds),
            *(f"{one / build:.2f}" for one in seconds[1:]),
            f"{memory:.0f}",
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--depths", nargs="+", type=int, default=[500, 1000, 2000, 5000])
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, depths=arguments.depths)
    print("# Nets of growing depth\n")
    print(
        "Residual nets of small layers: processor seconds, and in brackets milliseconds a layer, for Keras to"
    )
    print(
        "build the model, and for `analyze`, `score` by magnitude, `make_plan` and `prune` by 30 %; ratios to"
    )
    print("building; the most MB that the process has held so far.\n")
    print(machine(results), end="\n\n")
    header = ["backend", "layers", *(f"{step} s (ms)" for step in _STEPS)]
    header += [*(f"{step} / build" for step in _STEPS[1:]), "MB"]
    print(markdown_table(header, [row for b, r in results.items() for row in rows(b, r)]))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
