"""A scoring step against a training step of the same model and batch, on each backend.

Both run in `model.fit` with Keras' own jit settings, take turns, and are timed per
step after a warm-up. Usage: `python benchmarks/scoring_step.py [--backends ...]`.
"""

import argparse
import sys

from common import BACKENDS, comparison, in_process, interleaved_fits, machine, on_each_backend


def measure(image_size=96, batch_size=16, steps=2, repetitions=7, model_name="ResNet50"):
    """Seconds (wall, processor) a step of training and of scoring, one of each a repetition."""
    import keras
    import numpy as np

    from keras_taylor.gates import GatedModel
    from keras_taylor.groups import read_channels
    from keras_taylor.passes import compile_for_scoring

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, model_name)(weights=None, input_shape=(image_size, image_size, 3))
    model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), "sparse_categorical_crossentropy")
    gated = GatedModel(read_channels(model))
    compile_for_scoring(gated, model)
    random = np.random.default_rng(0)
    x = random.normal(size=(steps * batch_size, image_size, image_size, 3)).astype("float32")
    y = random.integers(0, 1000, len(x))

    return interleaved_fits({"train": model, "score": gated}, x, y, batch_size, repetitions)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, repetitions=arguments.repetitions)
    print("# A scoring step against a training step\n")
    print("ResNet-50 at 96 px, batch 16, SGD with momentum, `model.fit`, Keras' default jit settings;")
    print(f"medians of {arguments.repetitions} interleaved repetitions of 2 steps, after a warm-up.\n")
    print(machine(results), end="\n\n")
    print(comparison(results))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
