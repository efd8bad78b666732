"""A small network for images of three kinds of stripes: data, model, and its state."""

import keras
import numpy as np


def small_model(frozen=False, **compile_arguments):
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(8, 3, padding="same", use_bias=False, name="first"),
        keras.layers.BatchNormalization(momentum=0.8, name="norm"),
        keras.layers.ReLU(),
        keras.layers.Conv2D(12, 3, strides=2, activation="relu", name="second"),
        keras.layers.Flatten(),
        keras.layers.Dense(3, name="head"),
    ]
    model = keras.Sequential(layers, name="small")
    model.trainable = not frozen
    arguments = {
        "optimizer": keras.optimizers.SGD(0.05, momentum=0.9),
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }
    model.compile(**{**arguments, **compile_arguments})
    return model


def stripes(num=48):
    """Images of three classes that differ in where a bright row lies."""
    random = np.random.default_rng(0)
    y = np.arange(num) % 3
    x = random.normal(0, 0.3, (num, 8, 8, 1)).astype("float32")
    for image, label in zip(x, y, strict=True):
        image[2 * label + 1] += 1
    return x, y


def state(model):
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
