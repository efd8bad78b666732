"""What `compress` takes beside its fine-tuning alone, and where its time goes.

    python benchmarks/loop_cost.py > benchmarks/results/loop_cost.md

ResNet-20 and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
PHASES = ("score", "prune", "repair", "fit")

HEAD = """# The loop beside its training

`compress` of a ResNet-20 by 30 % of its parameters, one epoch a round over 4000 CIFAR-10 images in batches of
64, default settings otherwise. "Fits alone": the same models, in the states in which each round's fit found
them, compiled anew and fitted on the same images, after the run and in the same process. "Ratio": the run's
seconds by theirs; "of a round": each round's by those of its fit alone, the median, and the least and the
largest. "First batches": what the first batch of each of the fits alone took, which is mostly compilation.
"Accuracy" of the result on 1000 test images. One run a backend.
"""


def measure(rounds, batch_size=64):
    """Seconds of one run, of its phases, and of its fits alone."""
    import keras
    import resnet_cifar

    import keras_taylor

    keras.utils.set_random_seed(0)
    x, y, test_x, test_y = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)

    def compiled(network):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        network.compile(keras.optimizers.SGD(0.001, momentum=0.9), loss, metrics=["accuracy"])
        return network

    class Starts(keras.callbacks.Callback):
        """What the models are at the start of each fit; to make them would count as a part of it."""

        def __init__(self):
            super().__init__()
            self.found = []

        def on_train_begin(self, logs=None):
            self.found.append((self.model.get_config(), self.model.get_weights()))

        def models(self):
            for config, weights in self.found:
                network = keras.Model.from_config(config)
                network.set_weights(weights)
                yield compiled(network)

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
        increment=0.3 / rounds,
        batch_size=batch_size,
        callbacks=[starts],
        verbose=0,
        return_info=True,
    )
    whole = time.perf_counter() - start
    alone, first = [], []
    for network in starts.models():
        batch, start = FirstBatch(), time.perf_counter()
        network.fit(x, y, batch_size=batch_size, verbose=0, callbacks=[batch])
        alone.append(time.perf_counter() - start)
        first.append(batch.seconds)
    phases = {phase: sum(one.seconds[phase] for one in info.rounds) for phase in PHASES}
    rounds = [sum(one.seconds.values()) / fit for one, fit in zip(info.rounds, alone, strict=True)]
    found = {"whole": whole, "alone": sum(alone), "first": sum(first), "rounds": rounds, **phases}
    accuracy = small.evaluate(test_x, test_y, verbose=0, return_dict=True)["accuracy"]
    return {**found, "accuracy": accuracy}


def row(backend, found):
    other = found["whole"] - sum(found[phase] for phase in PHASES)
    seconds = [found["whole"], found["alone"], found["first"], *(found[phase] for phase in PHASES), other]
    ratio = f"{found['whole'] / found['alone']:.2f}"
    rounds = (
        f"{statistics.median(found['rounds']):.2f} ({min(found['rounds']):.2f} to {max(found['rounds']):.2f})"
    )
    return [
        backend,
        str(len(found["rounds"])),
        ratio,
        rounds,
        *(f"{one:.0f}" for one in seconds),
        f"{found['accuracy']:.1%}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, rounds=arguments.rounds)
    print(HEAD)
    print(machine(results), end="\n\n")
    header = ["backend", "rounds", "ratio", "of a round", "compress s", "fits alone s", "first batches s"]
    print(
        markdown_table(
            [*header, *(f"{phase} s" for phase in PHASES), "other s", "accuracy"],
            [row(b, found) for b, found in results.items()],
        )
    )


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
