"""Make a trained CIFAR-10 ResNet smaller, and measure the accuracy before and after.

    python examples/resnet_cifar.py --model resnet20_cifar10.keras --data cifar10_4k1k.npz

With `--while-training` the pruning happens inside one `fit` with the same number of epochs in total.

The data file holds uint8 images and labels: x_train, y_train, x_test, y_test. KERAS_BACKEND
chooses the backend.
"""

import argparse
import json
import math
import time

import keras
import numpy as np

import keras_taylor

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Augmented(keras.utils.PyDataset):
    """Batches of images, mirrored at random and shifted by up to four pixels."""

    def __init__(self, x, y, batch_size, seed=0):
        super().__init__()
        self.x = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
        self.y, self.batch_size = y, batch_size
        self.random = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.y) // self.batch_size)

    def on_epoch_end(self):
        self.order = self.random.permutation(len(self.y))

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        height, width = (size - 8 for size in self.x.shape[1:3])
        top, left = self.random.integers(0, 9, (2, len(rows)))
        images = np.stack(
            [self.x[r, t : t + height, c : c + width] for r, t, c in zip(rows, top, left, strict=True)]
        )
        mirrored = self.random.random(len(rows)) < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
        return images, self.y[rows]


def images_and_labels(path):
    with np.load(path) as data:
        arrays = [data[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    x_train, y_train, x_test, y_test = arrays
    x_train, x_test = (((x / 255 - MEAN) / STD).astype("float32") for x in (x_train, x_test))
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a .keras file of a model that outputs logits")
    parser.add_argument("--data", required=True, help="an .npz file")
    parser.add_argument("--goal", type=float, default=0.3)
    parser.add_argument("--increment", type=float, default=0.1)
    parser.add_argument("--criterion", help="default: log_odds; with --while-training: taylor")
    parser.add_argument(
        "--score-examples", type=int, help="default: an eighth of the examples that a round trains on"
    )
    parser.add_argument("--no-repair", action="store_true", help="fine-tune right after each cut")
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning in each round")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="it falls to 0 within each round")
    parser.add_argument("--while-training", action="store_true", help="prune inside one fit")
    parser.add_argument("--save", help="where to write the smaller model")
    return parser.parse_args()


def by_rounds(model, train, options):
    """Prunes round by round with `compress`."""
    small, info = keras_taylor.compress(
        model,
        train,
        goal=options.goal,
        increment=options.increment,
        criterion=keras_taylor.Scoring(options.criterion, num_examples=options.score_examples),
        repair=not options.no_repair,
        epochs=options.epochs,
        return_info=True,
    )
    print(info)
    return small


def while_training(model, train, options):
    """Prunes inside one `fit`: every 10 steps during the first three quarters of it."""
    prunable = keras_taylor.PrunableModel(model, criterion=options.criterion or "taylor")
    callback = keras_taylor.TaylorPruning(options.goal, frequency=10, momentum=0.9, verbose=1)
    prunable.fit(train, epochs=num_epochs(options), callbacks=[callback], verbose=2)
    return prunable.strip()


def num_epochs(options):
    return options.epochs * math.ceil(options.goal / options.increment - 1e-9)


def main():
    options = arguments()
    keras.utils.set_random_seed(0)
    x_train, y_train, x_test, y_test = images_and_labels(options.data)
    model = keras.models.load_model(options.model, compile=False)
    train = Augmented(x_train, y_train, batch_size=128)
    # the rate falls to zero within each round, which gets a new optimizer, or within the one fit
    epochs = num_epochs(options) if options.while_training else options.epochs
    rate = keras.optimizers.schedules.CosineDecay(options.learning_rate, max(1, epochs * len(train)))
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    before = model.evaluate(x_test, y_test, batch_size=250, verbose=0, return_dict=True)["accuracy"]

    start = time.perf_counter()
    small = (while_training if options.while_training else by_rounds)(model, train, options)
    seconds = time.perf_counter() - start
    after = small.evaluate(x_test, y_test, batch_size=250, verbose=0, return_dict=True)["accuracy"]
    costs = [keras_taylor.analyze(m).costs for m in (model, small)]
    result = {
        "backend": keras.backend.backend(),
        "criterion": options.criterion or "default",
        "accuracy": [round(before, 4), round(after, 4)],
        "reduction": {cost: round(1 - costs[1][cost] / full, 4) for cost, full in costs[0].items()},
        "seconds": round(seconds),
    }
    print(json.dumps(result))
    if options.save:
        small.save(options.save)


if __name__ == "__main__":
    main()
