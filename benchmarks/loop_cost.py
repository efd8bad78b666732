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

`compress` of a ResNet-20 by 30 % of its parameters, one epoch a round over 4000 CIFAR-10 images in batches of
64, default settings otherwise. "Fits alone": the same models, in the states in which each round's fit found
them, compiled anew and fitted on the same images, after the run and in the same process. "Ratio": the run's
seconds by theirs. "First batches": what the first batch of each of the fits alone took, which is mostly
compilation. One run a backend.
"""


def measure(rounds, batch_size=64):
    """Seconds of one run, of its phases, and of its fits alone."""
    import keras
    import resnet_cifar

    import keras_taylor

    keras.utils.set_random_seed(0)
    x, y = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")[:2]
    model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)

    def compiled(network):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        network.compile(keras.optimizers.SGD(0.001, momentum=0.9), loss, metrics=["accuracy"])
        return network

    class Starts(keras.callbacks.Callback):
        """The models at the start of each fit."""

        def __init__(self):
            super().__init__()
            self.models = []

        def on_train_begin(self, logs=None):
            copy = keras.models.clone_model(self.model)
            copy.set_weights(self.model.get_weights())
            self.models.append(copy)

    class FirstBatch(keras.callbacks.Callback):
        """Seconds until the first batch of a fit is done."""

        seconds = None

        def on_train_begin(self, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            if self.seconds is None:
                self.seconds = time.perf_counter() - self.start

    starts, start = Starts(), time.perf_counter()
    _, info = keras_taylor.compress(
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
    for network in starts.models:
        batch, start = FirstBatch(), time.perf_counter()
        compiled(network).fit(x, y, batch_size=batch_size, verbose=0, callbacks=[batch])
        alone.append(time.perf_counter() - start)
        first.append(batch.seconds)
    phases = {phase: sum(one.seconds[phase] for one in info.rounds) for phase in PHASES}
    return {"whole": whole, "alone": sum(alone), "first": sum(first), "rounds": len(info.rounds), **phases}


def row(backend, found):
    other = found["whole"] - sum(found[phase] for phase in PHASES)
    seconds = [found["whole"], found["alone"], found["first"], *(found[phase] for phase in PHASES), other]
    ratio = f"{found['whole'] / found['alone']:.2f}"
    return [backend, str(found["rounds"]), ratio, *(f"{one:.0f}" for one in seconds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, rounds=arguments.rounds)
    print(HEAD)
    print(machine(results), end="\n\n")
    header = ["backend", "rounds", "ratio", "compress s", "fits alone s", "first batches s"]
    print(
        markdown_table(
            [*header, *(f"{phase} s" for phase in PHASES), "other s"],
            [row(b, found) for b, found in results.items()],
        )
    )


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
