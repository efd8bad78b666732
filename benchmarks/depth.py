"""Channels, whole residual branches, or both: accuracy and latency of ResNet-56 at the same FLOPs.

    KERAS_BACKEND=torch python benchmarks/depth.py --epochs 0 3 > benchmarks/results/depth.md

ResNet-56 and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

from common import machine, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

HEAD = """# Channels, whole residual branches, or both

`python benchmarks/depth.py {arguments}`

ResNet-56 on CIFAR-10, `compress` to {goal:.0%} fewer FLOPs, `increment={increment}`; accuracy on 1000 test
images, good to about 1.7 points. "channels": without branches; "branches": nothing else may leave; "both":
`Selection(branches=True)`. Epochs: of all rounds, on 4000 training images; 0: repaired only. Latency:
median of one call on one thread, all models in turn in one process, as a part of the original's.
"""


def load():
    """The compiled network, and images with labels of the training and of the test set."""
    import keras
    import numpy as np

    model = keras.saving.load_model(DATA / "resnet56_cifar10.keras", compile=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not _has_softmax(model))
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"])
    arrays = np.load(DATA / "cifar10_4k1k.npz")

    def part(name):
        images = (arrays[f"x_{name}"] / 255 - np.array(MEAN)) / np.array(STD)
        return images.astype("float32"), arrays[f"y_{name}"].reshape(-1).astype("int32")

    return model, part("train"), part("test")


def _has_softmax(model):
    import keras

    return getattr(model.layers[-1], "activation", None) is keras.activations.softmax


def ways(model):
    """What may leave in each of the three ways, as arguments of `compress`."""
    import keras_taylor

    groups = keras_taylor.analyze(model, branches=True).groups
    sums = [group.name for group in groups if group.is_branch and group.prunable]
    with_branches = keras_taylor.Selection(branches=True)
    return {
        "channels": {},
        "branches": {"selection": with_branches, "include": sums},
        "both": {"selection": with_branches},
    }


def compressed(model, train, test, arguments, way, epochs):
    """The smaller model and its row: what left, accuracy, and how long it took."""
    import keras_taylor

    started = time.perf_counter()
    goal = {"flops": arguments.goal}
    fit = {"epochs": max(epochs // round(arguments.goal / arguments.increment), 1) if epochs else 0}
    small, info = keras_taylor.compress(
        model, train, goal, increment=arguments.increment, return_info=True, verbose=0, **way, **fit
    )
    gone = sum(not layer.kept for layer in info.plan.layers.values())
    accuracy = small.evaluate(*test, batch_size=250, verbose=0, return_dict=True)["accuracy"]
    left = [info.after[cost] / info.before[cost] for cost in ("flops", "params")]
    row = [str(gone), *(f"{part:.2f}" for part in left), f"{accuracy:.1%}"]
    return small, row, time.perf_counter() - started


def latencies(models, batch_sizes):
    """Milliseconds of each model for each format and batch size, the models in turn."""
    import keras_taylor

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("keras", "onnx"):
            paths = [os.path.join(folder, f"{number}.{ending}") for number in range(len(models))]
            made = [
                keras_taylor.export(model, path, tolerance=float("inf"))
                for model, path in zip(models, paths, strict=True)
            ]
            for size in batch_sizes:
                measured = keras_taylor.measure_artifacts(made, batch_size=size)
                found[ending, size] = [one.latency_ms for one in measured]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--increment", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    arguments = parser.parse_args()
    import keras

    model, train, test = load()
    accuracy = model.evaluate(*test, batch_size=250, verbose=0, return_dict=True)["accuracy"]
    models, rows = [model], [["original", "", "0", "1.00", "1.00", f"{accuracy:.1%}"]]
    for epochs in arguments.epochs:
        for name, way in ways(model).items():
            keras.utils.set_random_seed(0)
            small, row, seconds = compressed(model, train, test, arguments, way, epochs)
            models.append(small)
            rows.append([name, str(epochs), *row])
            print(*rows[-1], f"{seconds:.0f} s", file=sys.stderr, flush=True)
    times = latencies(models, arguments.batch_sizes)
    header = ["what leaves", "epochs", "branches gone", "FLOPs", "parameters", "accuracy"]
    names = {"keras": f"Keras ({keras.backend.backend()})", "onnx": "ONNX Runtime"}
    for (ending, size), values in times.items():
        header.append(f"{names[ending]}, batch {size}")
        for row, value in zip(rows, values, strict=True):
            row.append(f"{value / values[0]:.2f} ({value:.1f} ms)")
    print(HEAD.format(arguments=" ".join(sys.argv[1:]), goal=arguments.goal, increment=arguments.increment))
    print(markdown_table(header, rows))
    print("\n" + machine([keras.backend.backend()]))


if __name__ == "__main__":
    main()
