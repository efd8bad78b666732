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


def digits_cnn():
    """Trained for three epochs; test images as samples."""
    import keras
    import quickstart

    x_train, x_test, y_train, _ = quickstart.digits()
    model = quickstart.small_cnn()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss)
    model.fit(x_train, y_train, epochs=3, batch_size=64, verbose=0)
    return model, x_test[:100]


def resnet20():
    """Trained weights; CIFAR-10 test images."""
    import keras
    import resnet_cifar

    images = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")[2]
    return keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False), images[:100]


def mobilenet_v2():
    """Random weights, 96 px; noise, whose statistics the normalisations get: else nothing comes through."""
    import keras
    import numpy as np

    model = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classifier_activation=None)
    momenta = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            momenta[layer], layer.momentum = layer.momentum, 0.0
    noise = np.random.default_rng(1).standard_normal((16, 96, 96, 3)).astype("float32")
    model.compile("sgd", "mse")
    model.optimizer.learning_rate = 0.0
    model.train_on_batch(noise, np.zeros((16, 1000), "float32"))
    for layer, momentum in momenta.items():
        layer.momentum = momentum
    return model, None


def two_outputs():
    """Random weights; noise."""
    import keras

    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(32, 3, strides=2, activation="relu")(inputs)
    x = keras.layers.SeparableConv2D(32, 3, activation="relu")(x)
    heads = {"map": keras.layers.Conv2D(1, 1)(x)}
    heads["class"] = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, heads), None


def conv1d():
    """Random weights; noise."""
    import keras

    model = keras.Sequential([keras.Input((128, 6))])
    for filters in (32, 64, 64):
        model.add(keras.layers.Conv1D(filters, 5, strides=2, activation="relu"))
    model.add(keras.layers.GlobalMaxPooling1D())
    model.add(keras.layers.Dense(6))
    return model, None


MODELS = {
    "digits CNN": digits_cnn,
    "ResNet-20": resnet20,
    "MobileNetV2": mobilenet_v2,
    "two outputs": two_outputs,
    "Conv1D": conv1d,
}

HEAD = """# Every format, from every backend

Each cell of a backend: the largest difference between the artefact's outputs and those of the Keras model
on that backend, relative to the output's largest value, over 100 samples, and how many predictions (argmax)
agree; "refused" is what is past the default tolerance. Size, memory and arena in KiB; latency in ms of a call
with one example, on one thread, of the artefact exported from {backend} ("Keras": on that backend, with its
own threads). LiteRT for one example a call, int8 with integers in and out. Samples and calibration are digits
and CIFAR-10 images for the two trained networks, noise for the others, whose weights are random.
"""


def measure(names):
    import keras
    import numpy as np

    results = {}
    for name in names:
        keras.utils.set_random_seed(0)
        model, x = MODELS[name]()
        if x is None:
            shape = (100, *model.inputs[0].shape[1:])
            x = np.random.default_rng(0).standard_normal(shape).astype("float32")
        for variant, options in VARIANTS.items():
            results[f"{name}|{variant}"] = exported(model, x, options)
            print(keras.backend.backend(), name, variant, file=sys.stderr, flush=True)
    return results


def exported(model, x, options):
    """What `export` found, and whether it was within the tolerance."""
    import keras_taylor
    from keras_taylor.differences import TOLERANCES, complaint

    options = dict(options)
    if options.get("quantize") == "int8":
        options["calibration"] = x
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, options.pop("path"))
        try:
            one = keras_taylor.export(model, path, samples=x, tolerance=float("inf"), **options)
        except keras_taylor.ExportError as error:
            return {"error": str(error)[:300]}
    accepted = not complaint(one, TOLERANCES[one.quantize], 0)
    return {
        "difference": one.relative_difference,
        "agreement": one.agreement,
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
    text = f"{found['difference']:.0e}"
    if found["agreement"] is not None:
        text += f", {found['agreement']:.0%}"
    return text if found["accepted"] else text + " (refused)"


def number(value, unit, form):
    return "" if value is None else format(value / unit, form)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    arguments = parser.parse_args()
    names = [n for n in MODELS if n != "ResNet-20" or (DATA / "resnet20_cifar10.keras").exists()]
    results = on_each_backend(__file__, arguments.backends, names=names)
    print(HEAD.format(backend=arguments.backends[0]))
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
