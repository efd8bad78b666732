"""What `compress` takes beside its fine-tuning alone, and where its time goes.

    python benchmarks/loop_cost.py > benchmarks/results/loop_cost.md

ResNet-20 and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import os
import pathlib
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
PHASES = ("score", "prune", "repair", "fit")

HEAD = """# The loop beside its training

`compress` of a ResNet-20 by 30 % of its parameters, over {num} CIFAR-10 images in batches of 64, {rounds},
all else by default. "Fits alone": the same models, in the states in which the run's fits found them,
compiled anew and fitted for as many epochs of as many steps, after the run and in the same process.
"Ratio": the run's seconds by theirs. "First batches": what the first batch of each of the fits alone took,
which is mostly compilation. "Fit s" of the run has what judges the states, too. "Accuracy" of the result on
1000 test images.
One run a backend.
"""


def measure(increment, num_images, batch_size=64):
    """Seconds of one run, of its phases, and of its fits alone."""
    import keras
    import resnet_cifar

    import keras_taylor

    keras.utils.set_random_seed(0)
    x, y, test_x, test_y = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    x, y = x[:num_images], y[:num_images]
    model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)

    def compiled(network):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        network.compile(keras.optimizers.SGD(0.001, momentum=0.9), loss, metrics=["accuracy"])
        return network

    class Starts(keras.callbacks.Callback):
        """What the models are at the start of each fit, and its length.

        They are made later: that would count as a part of the fit.
        """

        def __init__(self):
            super().__init__()
            self.found = []

        def on_train_begin(self, logs=None):
            length = self.params["epochs"], self.params["steps"]
            self.found.append((self.model.get_config(), self.model.get_weights(), length))

        def models(self):
            for config, weights, length in self.found:
                network = keras.Model.from_config(config)
                network.set_weights(weights)
                yield compiled(network), *length

    class FirstBatch(keras.callbacks.Callback):
        """Seconds until the first batch of a fit is done."""

        seconds = None

        def on_train_begin(self, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            if self.seconds is None:
                self.seconds = time.perf_counter() - self.start

    starts, start = Starts(), time.perf_counter()
    small, info = keras_taylor.compress(
        compiled(model),
        (x, y),
        0.3,
        increment=increment,
        batch_size=batch_size,
        callbacks=[starts],
        verbose=0,
        return_info=True,
    )
    whole = time.perf_counter() - start
    alone, first = [], []
    for network, epochs, steps in starts.models():
        batch, start = FirstBatch(), time.perf_counter()
        data = x[: steps * batch_size], y[: steps * batch_size]
        network.fit(*data, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[batch])
        alone.append(time.perf_counter() - start)
        first.append(batch.seconds)
    phases = {phase: sum(one.seconds[phase] for one in info.rounds) for phase in PHASES}
    found = {"whole": whole, "alone": sum(alone), "first": sum(first), "rounds": len(info.rounds), **phases}
    accuracy = small.evaluate(test_x, test_y, verbose=0, return_dict=True)["accuracy"]
    return {**found, "accuracy": accuracy}


def row(backend, found):
    other = found["whole"] - sum(found[phase] for phase in PHASES)
    seconds = [found["whole"], found["alone"], found["first"], *(found[phase] for phase in PHASES), other]
    ratio = f"{found['whole'] / found['alone']:.2f}"
    return [
        backend,
        str(found["rounds"]),
        ratio,
        *(f"{one:.0f}" for one in seconds),
        f"{found['accuracy']:.1%}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--increment", type=float)
    parser.add_argument("--images", type=int, default=4000)
    arguments = parser.parse_args()
    increment, num_images = arguments.increment, arguments.images
    results = on_each_backend(__file__, arguments.backends, increment=increment, num_images=num_images)
    print(
        HEAD.format(
            num=num_images, rounds=f"an increment of {increment}" if increment else "the default increment"
        )
    )
    print(machine(results), end="\n\n")
    header = ["backend", "rounds", "ratio", "compress s", "fits alone s", "first batches s"]
    print(
        markdown_table(
            [*header, *(f"{phase} s" for phase in PHASES), "other s", "accuracy"],
            [row(b, found) for b, found in results.items()],
        )
    )


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
