"""Train a small network on real handwritten digits, make it 30 % smaller, and compare the two.

Run with `python examples/quickstart.py`. The digits need scikit-learn. KERAS_BACKEND
chooses the backend; the default is TensorFlow.
"""

import os
import tempfile
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_taylor
from keras_taylor.cli.demo import small_network as small_cnn


def digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype("float32")
    return train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)


def measure(model, x, y):
    """Accuracy, parameters, FLOPs and file size, as texts."""
    accuracy = model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        keras.Model(model.inputs, model.outputs).save(path)  # without the state of the optimizer
        size = os.path.getsize(path)
    costs = keras_taylor.analyze(model).costs
    return [f"{accuracy:.2%}", f"{costs['params']:,}", f"{costs['flops']:,}", f"{size / 1024:.0f} KiB"]


def measure_latencies(models, x, repetitions=30):
    """Median time of `predict_on_batch` for each model. The models take turns."""
    times = np.zeros((len(models), repetitions))
    for repetition in range(-3, repetitions):
        for number, model in enumerate(models):
            start = time.perf_counter()
            model.predict_on_batch(x)
            times[number, repetition] = time.perf_counter() - start
    return [f"{1000 * t:.2f} ms" for t in np.median(times, axis=1)]


def main():
    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = digits()
    model = small_cnn()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=15, batch_size=64, verbose=0)

    small, info = keras_taylor.compress(
        model, (x_train, y_train), goal=0.3, epochs=2, batch_size=64, return_info=True
    )
    print(info)

    rows = [measure(m, x_test, y_test) for m in (model, small)]
    for row, latency in zip(rows, measure_latencies((model, small), x_test[:64]), strict=True):
        row.append(latency)
    table = Table(title="digits, 450 test images")
    names = ("", "accuracy", "parameters", "FLOPs", "file", "64 images")
    for column in names:
        table.add_column(column, justify="right")
    for name, row in zip(("before", "after"), rows, strict=True):
        table.add_row(name, *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
