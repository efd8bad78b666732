"""Widths in multiples against any widths, at the same FLOPs: measured times on LiteRT and ONNX Runtime.

`KERAS_TAYLOR_DATA=... python benchmarks/rounding.py > benchmarks/results/rounding.md`
"""

import argparse
import os
import sys
import tempfile

from common import machine, markdown_table

VARIANTS = {
    "LiteRT float32": ("{}.tflite", None),
    "LiteRT int8": ("{}-int8.tflite", "int8"),
    "ONNX": ("{}.onnx", None),
}

HEAD = """# Widths in multiples, at the same FLOPs

`make_plan` by magnitude, `prune`, `export(batch_size=1)`: first `{{"flops": {goal}}}` with the coarsest
`round_to`, then the FLOPs that this one leaves as the goal of the others. ResNet-20 for CIFAR-10, and a
network of MobileNet's blocks (96 px, widths 32 to 256, random weights: times do not depend on them). Times:
one image on one thread, all files of a network in turn in one process; the least median of {turns} such runs
of up to {repetitions} calls, in ms. "Against 1" is the time divided by that of `round_to=1`. "Chosen" is what
the table of layer times says (`LayerTimes.best_multiple`). Load of the machine while measuring: {load}.
"""


def networks():
    """A trained ResNet-20, and one of depthwise separable blocks."""
    import keras

    folder = os.environ.get("KERAS_TAYLOR_DATA")
    if folder:
        yield "ResNet-20", keras.models.load_model(os.path.join(folder, "resnet20_cifar10.keras"))
    layers = keras.layers
    x = inputs = keras.Input((96, 96, 3))
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(x)
    for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        x = layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False)(x)
        x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
        x = layers.Conv2D(width, 1, use_bias=False)(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU(6.0)(layers.BatchNormalization()(x)))
    yield "MobileNet blocks", keras.Model(inputs, layers.Dense(10)(x))


def exported(model, name, folder):
    """An `Artifact` for each format."""
    import numpy as np

    import keras_taylor

    shape = (20, *model.inputs[0].shape[1:])
    calibration = np.random.default_rng(0).standard_normal(shape).astype("float32")
    for variant, (path, quantize) in VARIANTS.items():
        yield keras_taylor.export(
            model,
            os.path.join(folder, path.format(name)),
            quantize=quantize,
            calibration=calibration if quantize else None,
            batch_size=1,
            tolerance=float("inf"),
        )
        print(name, variant, file=sys.stderr, flush=True)


def compared(name, model, arguments):
    """Rows of the table: every multiple in every format."""
    import keras_taylor

    scores = keras_taylor.score(model, criterion="magnitude")
    made, left = [], {}
    with tempfile.TemporaryDirectory() as folder:
        goal = arguments.goal
        for step in sorted(arguments.round_to, reverse=True):  # the coarsest misses the goal by most
            selection = keras_taylor.Selection(round_to=step)
            plan = keras_taylor.make_plan(model, scores, {"flops": goal}, selection=selection)
            goal = plan.after["flops"]
            left[step] = plan.after["flops"] / plan.before["flops"]
            made += exported(keras_taylor.prune(model, plan), f"{name}-{step}", folder)
        runs = [
            keras_taylor.measure_artifacts(made, repetitions=arguments.repetitions)
            for _ in range(arguments.turns)
        ]
    times = [min(one.latency_ms for one in several) for several in zip(*runs, strict=True)]
    chosen = multiples(model, arguments.cache_dir)
    for number, (step, flops) in enumerate(left.items()):
        for k, variant in enumerate(VARIANTS):
            ms, first = times[number * len(VARIANTS) + k], times[k - len(VARIANTS)]
            cells = [name, variant, str(step), f"{flops:.3f}", f"{ms:.3f}", f"{ms / first:.2f}"]
            yield [*cells, str(chosen[variant])]


def multiples(model, cache_dir):
    """The multiple that the table of layer times says is worth keeping to, by format."""
    from keras_taylor.budget.layer_times import LayerTimes
    from keras_taylor.reading.groups import label_model

    names = dict(zip(VARIANTS, ("litert", "litert-int8", "onnx"), strict=True))
    channels, found = label_model(model), {}
    for variant, name in names.items():
        print(name, "layer times", file=sys.stderr, flush=True)
        found[variant] = LayerTimes(channels, name, cache_dir=cache_dir).best_multiple()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cache-dir", help="where tables of layer times are; else Keras' own folder")
    arguments = parser.parse_args()
    import keras

    loads = [os.getloadavg()[0]]
    rows = []
    for name, model in networks():
        rows += compared(name, model, arguments)
        loads.append(os.getloadavg()[0])
    load = f"{min(loads):.1f} to {max(loads):.1f}"
    settings = {key: vars(arguments)[key] for key in ("goal", "turns", "repetitions")}
    print(HEAD.format(load=load, **settings))
    print(machine([keras.backend.backend()]), end="\n\n")
    header = ["network", "format", "round_to", "FLOPs left", "ms", "against 1", "chosen"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
