"""ResNet-20, original and pruned, in each precision of LiteRT: size, accuracy, latency.

    python examples/resnet_cifar.py --model resnet20_cifar10.keras --data cifar10_4k1k.npz \\
        --goal 0.3 --increment 0.3 --epochs 2 --save pruned.keras
    python benchmarks/prune_then_quantize.py --pruned pruned.keras

The original and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import os
import pathlib
import sys
import tempfile

from common import machine, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
PRECISIONS = {"float32": None, "float16": "float16", "dynamic": "dynamic", "int8": "int8"}

HEAD = """# Pruned, then quantized

ResNet-20 on CIFAR-10; the pruned one has {params:.1%} fewer parameters and {flops:.1%} fewer FLOPs. LiteRT;
accuracy on 1000 test images; agreement with the predictions of the same network in Keras over the samples
that `export` compares (int8: the 200 training images of the calibration; else 32 test images); int8 in and
out; size and arena in KiB; latency in ms of one image on one thread, all eight in turn in one process.
"""


def artifacts(model, name, folder, calibration, test):
    """An `Artifact` for each precision, int8 with integers in and out."""
    import keras_taylor

    for precision, quantize in PRECISIONS.items():
        options = {"calibration": calibration, "int8_io": True} if quantize == "int8" else {}
        path = os.path.join(folder, f"{name}_{precision}.tflite")
        yield keras_taylor.export(
            model, path, quantize=quantize, batch_size=1, data=test, max_drop=1.0, **options
        )
        print(name, precision, file=sys.stderr, flush=True)


def keras_int8(path, test):
    """What `model.quantize("int8")` does: which layers, the file's size, the accuracy."""
    import keras

    model = keras.models.load_model(path, compile=False)
    model.quantize("int8")
    kinds = {type(layer).__name__ for layer in model.layers if layer.dtype_policy.name.startswith("int8")}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.keras")
        model.save(file)
        size = os.path.getsize(file)
    x, y = test
    right = model.predict(x, batch_size=100, verbose=0).argmax(-1) == y
    return kinds, size, right.mean()


def row(name, precision, one):
    return [
        *(name, precision, f"{one.num_bytes / 1024:.0f}", f"{one.metric:.1%}", f"{one.agreement:.1%}"),
        *(f"{one.latency_ms:.2f}", f"{one.latency_p90_ms:.2f}", f"{one.arena_bytes / 1024:.0f}"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruned", required=True, help="a .keras file")
    pruned = parser.parse_args().pruned
    import keras
    import resnet_cifar

    import keras_taylor

    x_train, _, *test = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    paths = {"original": DATA / "resnet20_cifar10.keras", "pruned": pruned}
    models = {name: keras.models.load_model(path, compile=False) for name, path in paths.items()}
    costs = {name: keras_taylor.analyze(model).costs for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        found = [
            one for n, m in models.items() for one in artifacts(m, n, folder, x_train[::20], tuple(test))
        ]
        found = keras_taylor.measure_artifacts(found, repetitions=200)
    less = {what: 1 - costs["pruned"][what] / costs["original"][what] for what in ("params", "flops")}
    print(HEAD.format(**less))
    print(machine([keras.backend.backend()]), end="\n\n")
    header = ["network", "precision", "size", "accuracy", "agreement", "median ms", "p90 ms", "arena"]
    names = [(name, precision) for name in models for precision in PRECISIONS]
    print(markdown_table(header, [row(*n, one) for n, one in zip(names, found, strict=True)]))
    print('\nKeras\' own `model.quantize("int8")`:\n')
    for name, path in paths.items():
        kinds, size, accuracy = keras_int8(path, test)
        print(
            f"- {name}: quantizes layers of the kinds {sorted(kinds)}; {size / 1024:.0f} KiB, {accuracy:.1%}"
        )


if __name__ == "__main__":
    main()
