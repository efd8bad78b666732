"""Training after a repair, with the statistics of the original and with those of what layers read.

    KERAS_BACKEND=torch python benchmarks/batch_statistics.py > benchmarks/results/batch_statistics.md

ResNet-20 and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import statistics
import sys

from common import machine, markdown_table
from peers import DATA

import keras_taylor
from keras_taylor.cutting.batch_statistics import renew_statistics
from keras_taylor.cutting.refitting import refit
from keras_taylor.cutting.surgery import build_smaller_compiled
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.graph import read_model
from keras_taylor.reading.groups import label_model
from keras_taylor.reading.walk import split_into_batches

BATCH_SIZE, NUM_REPAIRED = 32, 512
HEAD = """# Statistics after a repair

ResNet-20 of CIFAR-10 with {goal:.0%} of its parameters gone (log_odds on 2000 training images), repaired on
{num} of the 4000 training images. Then an epoch at a learning rate of zero, in which only moving statistics
change (momentum 0.99), or two epochs of SGD with Nesterov momentum, cosine from 0.005, weight decay 5e-4;
batches of {batch} with flips and shifts of 4. "Original's": moving statistics as the repair found them.
"Plain", "augmented": those of {num} training images as they are, or flipped and shifted as in training; scale
and offset make up for them. Accuracy on 1000 test images: means over {seeds} seeds of the training, with the
spread (largest less smallest).
"""


def trained(model, data, epochs, rate, seed):
    """The model after some epochs on augmented images; the rate falls to zero."""
    import keras
    import resnet_cifar

    keras.utils.set_random_seed(seed)
    batches = resnet_cifar.Augmented(*data, BATCH_SIZE, seed=seed)
    cosine = keras.optimizers.schedules.CosineDecay(rate, epochs * len(batches))
    decay = 5e-4 if rate else None
    optimizer = keras.optimizers.SGD(cosine, momentum=0.9, nesterov=True, weight_decay=decay)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batches, epochs=epochs, verbose=0)
    return model


def accuracy(model, x, y):
    return float((model.predict(x, batch_size=250, verbose=0).argmax(-1) == y).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    import keras
    import resnet_cifar

    *data, x_test, y_test = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    scores = keras_taylor.score(model, (data[0][::2], data[1][::2]), criterion="log_odds")
    plan = keras_taylor.make_plan(model, scores, arguments.goal)
    labeled = label_model(model)
    kept = kept_units(labeled, plan)
    few = data[0][:: len(data[0]) // NUM_REPAIRED][:NUM_REPAIRED]
    augmented, _ = resnet_cifar.Augmented(*data, NUM_REPAIRED, seed=100)[0]

    def repaired(images):
        small = build_smaller_compiled(labeled, kept)
        refit(labeled, kept, small, [few])
        if images is not None:
            renew_statistics(read_model(small), split_into_batches([images]))
        return small

    rows = []
    for name, images in (("original's", None), ("plain", few), ("augmented", augmented)):
        row = [name, f"{accuracy(repaired(images), x_test, y_test):.1%}"]
        for epochs, rate in ((1, 0.0), (2, 0.005)):
            found = [
                accuracy(trained(repaired(images), data, epochs, rate, seed), x_test, y_test)
                for seed in range(arguments.seeds)
            ]
            print(name, epochs, rate, found, file=sys.stderr, flush=True)
            row.append(f"{statistics.mean(found):.1%} ({max(found) - min(found):.1%})")
        rows.append(row)
    settings = {"goal": arguments.goal, "num": NUM_REPAIRED, "batch": BATCH_SIZE, "seeds": arguments.seeds}
    print(HEAD.format(**settings))
    print(machine(["torch"]), end="\n\n")
    header = ["statistics", "repaired", "one epoch at rate zero", "two epochs, cosine from 0.005"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
