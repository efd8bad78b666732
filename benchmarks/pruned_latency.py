"""What a FLOPs cut is worth in files and milliseconds: ratios of pruned to original, side by side.

`python benchmarks/pruned_latency.py > benchmarks/results/pruned_latency.md`
"""

import argparse
import os
import sys
import tempfile

from common import machine, markdown_table

FORMATS = {
    "LiteRT float32": {"path": "{}.tflite", "batch_size": 1},
    "LiteRT int8": {"path": "{}-int8.tflite", "quantize": "int8", "int8_io": True, "batch_size": 1},
    "ONNX": {"path": "{}.onnx", "batch_size": 1},
    "Keras": {"path": "{}.keras"},
}

HEAD = """# What a FLOPs cut is worth

`make_plan(goal={{"flops": {goal}}}, selection=Selection(round_to=...))` by magnitude, `prune`,
`export`; {size} px; random
weights: what is measured does not depend on them. Ratios pruned / original; latency: median of one image on
one thread, all files of a network in turn in one process, in ms before and after. "Off by" is the file's
ratio less that of the parameters, in points.
"""


def networks(size):
    """ResNet-50 and MobileNetV2, as `keras.applications` makes them."""
    import keras

    options = {"weights": None, "input_shape": (size, size, 3), "classifier_activation": None}
    return {
        "ResNet-50": keras.applications.ResNet50(**options),
        "MobileNetV2": keras.applications.MobileNetV2(**options),
    }


def exported(model, name, folder, calibration):
    """An `Artifact` for each format; how exact they are is no question here."""
    import keras_taylor

    for variant, options in FORMATS.items():
        options = {**options, "path": os.path.join(folder, options["path"].format(name))}
        if options.get("quantize") == "int8":
            options["calibration"] = calibration
        yield keras_taylor.export(model, tolerance=float("inf"), **options)
        print(name, variant, file=sys.stderr, flush=True)


def compared(name, model, goal, steps, repetitions):
    """Rows of the table: every format at every `round_to`."""
    import numpy as np

    import keras_taylor

    shape = (20, *model.inputs[0].shape[1:])
    calibration = np.random.default_rng(0).standard_normal(shape).astype("float32")
    scores = keras_taylor.score(model, criterion="magnitude")
    before = keras_taylor.analyze(model).costs
    made, costs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        made += exported(model, name, folder, calibration)
        for step in steps:
            selection = keras_taylor.Selection(round_to=step)
            plan = keras_taylor.make_plan(model, scores, {"flops": goal}, selection=selection)
            small = keras_taylor.prune(model, plan)
            costs[step] = {what: value / before[what] for what, value in plan.after.items()}
            made += exported(small, f"{name}-{step}", folder, calibration)
        made = keras_taylor.measure_artifacts(made, repetitions=repetitions)
    originals, *others = [made[k : k + len(FORMATS)] for k in range(0, len(made), len(FORMATS))]
    for (step, cost), pruned in zip(costs.items(), others, strict=True):
        for variant, old, new in zip(FORMATS, originals, pruned, strict=True):
            bytes_ratio = new.num_bytes / old.num_bytes
            yield [
                *(name, str(step), variant, f"{cost['params']:.2f}", f"{bytes_ratio:.2f}"),
                *(f"{100 * (bytes_ratio - cost['params']):+.1f}", f"{cost['flops']:.2f}"),
                f"{new.latency_ms / old.latency_ms:.2f}",
                *(f"{one.latency_ms:.2f}" for one in (old, new)),
                f"{new.peak_memory / old.peak_memory:.2f}",
            ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=100)
    arguments = parser.parse_args()
    import keras

    rows = [
        row
        for name, model in networks(arguments.size).items()
        for row in compared(name, model, arguments.goal, arguments.round_to, arguments.repetitions)
    ]
    print(HEAD.format(goal=arguments.goal, size=arguments.size))
    print(machine([keras.backend.backend()]), end="\n\n")
    header = ["network", "round_to", "format", "parameters", "file", "off by", "FLOPs", "latency"]
    print(markdown_table([*header, "ms before", "ms after", "memory"], rows))


if __name__ == "__main__":
    main()
