"""Exports several architectures in every format from every backend: difference, size, latency, memory.

`python benchmarks/export_formats.py > benchmarks/results/export_formats.md`. ResNet-20 is
read from the folder that KERAS_TAYLOR_DATA names, and left out where that is not there.
"""

import argparse
import os
import pathlib
import sys
import tempfile

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
VARIANTS = {
    "SavedModel": {"path": "model"},
    "LiteRT": {"path": "model.tflite", "batch_size": 1},
    "LiteRT float16": {"path": "model.tflite", "quantize": "float16", "batch_size": 1},
    "LiteRT dynamic": {"path": "model.tflite", "quantize": "dynamic", "batch_size": 1},
    "LiteRT int8": {"path": "model.tflite", "quantize": "int8", "int8_io": True, "batch_size": 1},
    "ONNX": {"path": "model.onnx"},
    "Keras": {"path": "model.keras"},
}


def digits(size=8, channels=1):
    """Real handwritten digits: images and labels to train on, and to test on."""
    import keras
    import numpy as np
    import quickstart

    x_train, x_test, y_train, y_test = quickstart.digits()
    x_train, x_test = (
        np.repeat(np.asarray(keras.ops.image.resize(x, (size, size))), channels, -1)
        for x in (x_train, x_test)
    )
    return x_train, y_train, x_test, y_test


def trained(model, x, y, epochs):
    """The model, after so many epochs; its normalizations follow within them."""
    import keras

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    model.compile(keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=epochs, batch_size=64, verbose=0)
    return model


def digits_cnn():
    import quickstart

    x, y, *test = digits()
    return trained(quickstart.small_cnn(), x, y, epochs=10), x, *test


def resnet20():
    import keras
    import resnet_cifar

    x, _, *test = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    return keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False), x[::20], *test


def mobilenet_v2():
    import keras

    x, y, *test = digits(48, 3)
    model = keras.applications.MobileNetV2(
        (48, 48, 3), 0.5, weights=None, classes=10, classifier_activation=None
    )
    return trained(model, x, y, epochs=15), x, *test


def two_outputs():
    """Which digit, and whether it is odd."""
    import keras
    import numpy as np

    x, y, x_test, y_test = digits()
    inputs = keras.Input((8, 8, 1))
    z = keras.layers.Conv2D(32, 3, activation="relu")(inputs)
    z = keras.layers.SeparableConv2D(64, 3, activation="relu")(z)
    z = keras.layers.Flatten()(z)
    model = keras.Model(inputs, [keras.layers.Dense(10)(z), keras.layers.Dense(2)(z)])
    return trained(model, x, [y, y % 2], epochs=15), x, x_test, np.stack([y_test, y_test % 2], 1)


def conv1d():
    """The 64 pixels one after the other."""
    import keras

    x, y, x_test, y_test = digits()
    model = keras.Sequential([keras.Input((64, 1))])
    for filters in (32, 64, 64):
        model.add(keras.layers.Conv1D(filters, 5, strides=2, activation="relu"))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10))
    x, x_test = (a.reshape(-1, 64, 1) for a in (x, x_test))
    return trained(model, x, y, epochs=20), x, x_test, y_test


MODELS = {
    "digits CNN": digits_cnn,
    "ResNet-20": resnet20,
    "MobileNetV2": mobilenet_v2,
    "two outputs": two_outputs,
    "Conv1D": conv1d,
}

HEAD = """# Every format, from every backend

Each cell of a backend: the largest difference between the artifact's outputs and those of the Keras model
on that backend, relative to the output's largest value, over 100 test images, and the accuracy on all test
images less the Keras model's, in points; "refused" is what is past the default tolerance. Size, memory and
arena in KiB; latency in ms of a call with one example, on one thread, of the artifact exported from {backend}
("Keras": on that backend, with its own threads). LiteRT for one example a call, int8 with integers in and
out, calibrated on training images. ResNet-20: CIFAR-10, 1000 test images; the others were trained here, on
TensorFlow, for 10 to 20 epochs of handwritten digits, 450 test images (MobileNetV2: width 0.5, 48 px; "two
outputs": the mean of both accuracies). Accuracy of the models: {accuracy}.
"""


def measure(names, folder, train=False):
    """Trains the models into a folder, or exports what lies there."""
    import keras
    import numpy as np

    results = {}
    for name in names:
        file = pathlib.Path(folder, name)
        if train:
            keras.utils.set_random_seed(0)
            model, calibration, x, y = MODELS[name]()
            model.save(f"{file}.keras")
            np.savez(f"{file}.npz", calibration=calibration, x=x, y=y)
            print("trained", name, file=sys.stderr, flush=True)
            continue
        model = keras.models.load_model(f"{file}.keras", compile=False)
        data = dict(np.load(f"{file}.npz"))
        for variant, options in VARIANTS.items():
            results[f"{name}|{variant}"] = exported(model, data, options)
            print(keras.backend.backend(), name, variant, file=sys.stderr, flush=True)
    return results


def mean_accuracy(y, outputs):
    """Of all outputs."""
    outputs = outputs if isinstance(outputs, list) else [outputs]
    columns = y.reshape(len(y), -1).T
    return sum((o.argmax(-1) == c).mean() for o, c in zip(outputs, columns, strict=True)) / len(outputs)


def exported(model, data, options):
    """What `export` found, and whether it was within the tolerance."""
    import keras_taylor
    from keras_taylor.exports.export_parity import TOLERANCES, tolerance_violation

    options = dict(options)
    if options.get("quantize") == "int8":
        options["calibration"] = data["calibration"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, options.pop("path"))
        targets = list(data["y"].T) if data["y"].ndim > 1 else data["y"]
        try:
            one = keras_taylor.export(
                *(model, path),
                samples=data["x"][:100],
                data=(data["x"], targets),
                metric=lambda _, outputs: mean_accuracy(data["y"], outputs),
                tolerance=float("inf"),
                max_drop=1.0,
                **options,
            )
        except keras_taylor.ExportError as error:
            return {"error": str(error)[:300]}
    accepted = not tolerance_violation(one, TOLERANCES[one.quantize], 0.02)
    return {
        "difference": one.relative_difference,
        "points": 100 * (one.metric - one.model_metric),
        "accuracy": one.model_metric,
        "accepted": accepted,
        "size": one.num_bytes,
        "latency": one.latency_ms,
        "p90": one.latency_p90_ms,
        "memory": one.peak_memory,
        "arena": one.arena_bytes,
    }


def row(key, results):
    """The first backend's sizes and times: LiteRT, ONNX and SavedModel run without Keras."""
    name, variant = key.split("|")
    found = {backend: result[key] for backend, result in results.items()}
    shown = next((f for f in found.values() if "error" not in f), {})
    return [
        *(name, variant, *map(difference, found.values())),
        *(number(shown.get(what), 1024, ",.0f") for what in ("size", "memory", "arena")),
        *(number(shown.get(what), 1, ".2f") for what in ("latency", "p90")),
    ]


def difference(found):
    if "error" in found:
        return "failed"
    text = f"{found['difference']:.0e}, {found['points']:+.1f}"
    return text if found["accepted"] else text + " (refused)"


def number(value, unit, variant):
    return "" if value is None else format(value / unit, variant)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    arguments = parser.parse_args()
    names = [n for n in MODELS if n != "ResNet-20" or (DATA / "resnet20_cifar10.keras").exists()]
    with tempfile.TemporaryDirectory() as folder:
        on_each_backend(__file__, ["tensorflow"], names=names, folder=folder, train=True)
        results = on_each_backend(__file__, arguments.backends, names=names, folder=folder)
    first = results[arguments.backends[0]]
    accuracy = ", ".join(f"{name} {first[f'{name}|Keras']['accuracy']:.1%}" for name in names)
    print(HEAD.format(backend=arguments.backends[0], accuracy=accuracy))
    if "ResNet-20" not in names:
        print("ResNet-20 was left out: its file was not there.\n")
    print(machine(results), end="\n\n")
    header = ["model", "format", *results, "size", "memory", "arena", "median ms", "p90 ms"]
    print(markdown_table(header, [row(key, results) for key in next(iter(results.values()))]))
    errors = {
        f"{key.replace('|', ', ')}: {f['error']}"
        for r in results.values()
        for key, f in r.items()
        if "error" in f
    }
    if errors:
        print("\n" + "\n".join(f"- {text}" for text in sorted(errors)))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
