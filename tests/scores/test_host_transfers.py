"""What is copied to the host within a step, which would make a GPU wait: no more than in a plain `fit`."""

import contextlib
import importlib
from unittest import mock

import keras
import numpy as np
import pytest
from helpers import BACKEND
from keras import layers

import keras_taylor

BATCH_SIZE, NUM_FEW, NUM_MANY = 4, 16, 64


def copying_methods():
    """What holds the functions that copy a tensor's values to the host, and their names."""
    if BACKEND == "torch":
        import torch

        return torch.Tensor, ["item", "numpy", "tolist", "cpu", "__array__"]
    if (
        BACKEND == "jax"
    ):  # whose arrays lend their memory where no method is called: Keras' function is counted
        return importlib.import_module("keras.src.backend"), ["convert_to_numpy"]
    import tensorflow

    base = next(cls for cls in type(tensorflow.constant(1.0)).__mro__ if "_numpy" in vars(cls))
    return base, ["_numpy"]


def num_copies(function):
    """How often a function copies values to the host."""
    copies, (cls, names) = [], copying_methods()

    def counted(method):
        def call(tensor, *args, **kwargs):
            copies.append(None)
            return method(tensor, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(cls, name, counted(getattr(cls, name))))
        function()
    return len(copies)


@pytest.mark.parametrize("step", ["score", "wrapped"])
def test_a_step_copies_no_more_than_that_of_a_plain_fit(step):
    def compiled(model):
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    model = compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 3),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Conv2D(4, 3),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
    )
    x, y = (
        np.random.default_rng(0).normal(size=(NUM_MANY, 8, 8, 1)).astype("float32"),
        np.arange(NUM_MANY) % 3,
    )
    wrapped = compiled(keras_taylor.PrunableModel(model))
    steps = {
        "plain": lambda *data: model.fit(*data, batch_size=BATCH_SIZE, verbose=0),
        "score": lambda *data: keras_taylor.score(model, data, batch_size=BATCH_SIZE),
        "wrapped": lambda *data: wrapped.fit(*data, batch_size=BATCH_SIZE, verbose=0),
    }

    def copies_of_more_steps(run):
        run(x[:NUM_FEW], y[:NUM_FEW])  # compiles
        few, many = (num_copies(lambda num=num: run(x[:num], y[:num])) for num in (NUM_FEW, NUM_MANY))
        return many - few

    plain = copies_of_more_steps(steps["plain"])
    assert plain > 0, "Keras reads the loss of each batch: nothing was counted"
    assert copies_of_more_steps(steps[step]) <= plain
