"""Repair on networks of different kinds: held-out loss before the cut, after it, and repaired.

`python benchmarks/repair_kinds.py > benchmarks/results/repair_kinds.md`
"""

import argparse
import pathlib
import sys

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

HEAD = """# Repair on networks of different kinds

Small networks trained on the digits of scikit-learn, once, with TensorFlow; 40 % of the parameters
cut by magnitude, then repaired on 512 training images without labels, by each backend from the same
weights. Cross-entropy and accuracy on 450 test images. "Apart": the largest difference of a
repaired model's logits from those of TensorFlow's, relative to their largest value.
"""


def plain(x, layers):
    for filters in (16, 32, 32):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
    return layers.Flatten()(layers.MaxPooling2D()(x))


def normalized(x, layers):
    for filters in (16, 32, 32):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return layers.GlobalAveragePooling2D()(x)


def depthwise(x, layers):
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(x)
    for _ in range(3):
        y = layers.Conv2D(48, 1, use_bias=False)(x)
        y = layers.ReLU(6)(layers.BatchNormalization(momentum=0.9)(y))
        y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
        y = layers.ReLU(6)(layers.BatchNormalization(momentum=0.9)(y))
        y = layers.BatchNormalization(momentum=0.9)(layers.Conv2D(16, 1, use_bias=False)(y))
        x = layers.Add()([x, y])
    return layers.GlobalAveragePooling2D()(x)


def attention(x, layers):
    x = layers.Dense(32)(layers.Reshape((8, 8))(x))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 16)(y, y)])
        y = layers.Dense(64, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(32)(y)])
    return layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))


def conv1d(x, layers):
    x = layers.Reshape((64, 1))(x)
    for filters, strides in ((16, 2), (32, 2), (32, 2)):
        x = layers.Conv1D(
            filters, 5, strides, padding="causal" if strides == 1 else "same", activation="relu"
        )(x)
    return layers.Flatten()(x)


KINDS = {
    "without BatchNorm": plain,
    "BatchNorm": normalized,
    "depthwise": depthwise,
    "attention": attention,
    "Conv1D": conv1d,
}


def train(folder):
    """Trains all networks and saves them."""
    import keras
    import quickstart

    x, _, y, _ = quickstart.digits()
    for kind, body in KINDS.items():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8, 8, 1))
        outputs = keras.layers.Dense(10)(body(inputs, keras.layers))
        model = keras.Model(inputs, outputs)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
        model.fit(x, y, epochs=15, batch_size=64, verbose=0)
        model.save(pathlib.Path(folder) / f"{kind}.keras")
    return {}


def measure(folder, task="repair"):
    import keras
    import numpy as np
    import quickstart

    import keras_taylor

    if task == "train":
        return train(folder)
    x, x_test, _, y_test = quickstart.digits()
    found = {}
    for kind in KINDS:
        model = keras.models.load_model(pathlib.Path(folder) / f"{kind}.keras")
        plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.4)
        small = keras_taylor.prune(model, plan)
        repaired, repairs = keras_taylor.repair(small, model, plan, x, return_repairs=True)
        numbers = [one.evaluate(x_test, y_test, verbose=0) for one in (model, small, repaired)]
        logits = repaired.predict(x_test, verbose=0)
        np.save(pathlib.Path(folder) / f"{kind} {keras.backend.backend()}.npy", logits)
        found[kind] = {
            "numbers": numbers,
            "fitted": sum(one.ridge is not None for one in repairs),
            "alone": [one.reason for one in repairs if one.ridge is None],
        }
    return found


def apart(folder, kind, backend):
    """How far a backend's repaired model is from TensorFlow's."""
    import numpy as np

    ours, theirs = (np.load(pathlib.Path(folder) / f"{kind} {name}.npy") for name in (backend, "tensorflow"))
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def main():
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        on_each_backend(__file__, ["tensorflow"], folder=folder, task="train")
        results = on_each_backend(__file__, BACKENDS, folder=folder)
        for kind in KINDS:
            for backend, found in results.items():
                one = found[kind]
                numbers = [f"{loss:.3f}, {accuracy:.1%}" for loss, accuracy in one["numbers"]]
                counts = [str(one["fitted"]), str(len(one["alone"]))]
                rows.append([kind, backend, *numbers, *counts, f"{apart(folder, kind, backend):.0e}"])
    print(HEAD)
    print(machine(results), end="\n\n")
    print(
        markdown_table(
            ["network", "backend", "before", "cut", "repaired", "fitted", "left alone", "apart"], rows
        )
    )


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
