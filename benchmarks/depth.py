"""Channels, whole residual branches, or both: accuracy and latency at the same FLOPs, or at the same latency.

    KERAS_BACKEND=torch python benchmarks/depth.py --epochs 0 3 > benchmarks/results/depth.md
    KERAS_BACKEND=torch python benchmarks/depth.py --cost latency:litert --network FOLDER/mobile_fashion.keras

ResNet-56 and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names, other networks from `networks.py`.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time

from common import machine, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))

HEAD = """# Channels, whole residual branches, or both

`python benchmarks/depth.py {arguments}`

{network}, `compress` to {goal:.0%} less of {cost}, increment {increment}; accuracy on {tested} test
images. "channels": without branches; "branches": nothing else may leave; "both":
`Selection(branches=True)`. Epochs: of each round, on {trained} training images; 0: repaired only. Latency:
median of one call on one thread, all models in turn in one process, as a part of the original's.
"""
ENDINGS = {"keras": "Keras", "tflite": "LiteRT", "onnx": "ONNX Runtime"}


def load(path):
    """The compiled network, and images with labels of the training and of the test set."""
    import keras
    import networks
    from main_job import data_of

    model = networks.compiled(keras.saving.load_model(path, compile=False))
    train, test = data_of(path.stem)
    return model, tuple(part[:16_000] for part in train), test


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
    goal = {arguments.cost: arguments.goal}
    small, info = keras_taylor.compress(
        *(model, train, goal),
        increment=arguments.increment,
        epochs=epochs,
        return_info=True,
        verbose=0,
        **way,
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
        for ending in ENDINGS:
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
    parser.add_argument("--network", type=pathlib.Path, default=DATA / "resnet56_cifar10.keras")
    parser.add_argument("--cost", default="flops", help="what the goal is about, such as latency:litert")
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--increment", type=float, help="default: that of `compress`")
    parser.add_argument("--epochs", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    arguments = parser.parse_args()
    import keras

    model, train, test = load(arguments.network)
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
    for (ending, size), values in times.items():
        header.append(f"{ENDINGS[ending]}, batch {size}")
        for row, value in zip(rows, values, strict=True):
            row.append(f"{value / values[0]:.2f} ({value:.1f} ms)")
    named = {"network": arguments.network.stem, "cost": arguments.cost, "goal": arguments.goal}
    increment = arguments.increment or "by default"
    sizes = {"trained": len(train[1]), "tested": len(test[1])}
    print(HEAD.format(arguments=" ".join(sys.argv[1:]), increment=increment, **named, **sizes))
    print(markdown_table(header, rows))
    print("\n" + machine([keras.backend.backend()]))


if __name__ == "__main__":
    main()
