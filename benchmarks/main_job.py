"""The call that everybody makes first, `compress(model, data, goal)`, beside what else the time could buy.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/networks.py resnet20 mobile vgg --folder FOLDER
    KERAS_BACKEND=torch python benchmarks/main_job.py FOLDER/resnet20_fashion.keras --goals params=0.5

A network's data go by its name: `..._fashion` is Fashion-MNIST, `digits` is scikit-learn's, `..._cifar10` the
4000 CIFAR-10 images in the folder that KERAS_TAYLOR_DATA names; a ResNet-8 reads them from 0 to 255.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys
import time

import networks
import numpy as np
from common import machine, markdown_table
from peers import DATA, goal_of

HEAD = """# The main job

Accuracy on test images, which were looked at only here. "Repaired only": `compress(..., epochs=0)`.
"compress": {rounds}, {epochs} epochs for each round on {num} images with flips and shifts of 4 (digits as
they are), nothing held out by hand; scores and repairs read the images as they are, as those of the
others do; all else by default. Torch-Pruning's criteria cut once as much; their networks (BatchNorm
statistics renewed) are trained by one cycle of the learning rate to {peak}, in plain PyTorch:
"steps" as many steps as `compress`, "time" as long as `compress` took with scores, repairs and judging.
"Scratch": the widths that `compress` found, trained anew in Keras for that time. Means over
{seeds} seeds, with the spread (largest less smallest) where there are several.
"""


def data_of(name):
    """Training data, and test data, by the name of a network's file."""
    import resnet_cifar

    if name.startswith("digits"):
        return networks.digits()
    if name.endswith("_fashion"):
        train, _, test = networks.fashion()
        return train, test
    x, y, x_test, y_test = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    if "resnet8" in name:
        x, x_test = (255 * (part * resnet_cifar.STD + resnet_cifar.MEAN) for part in (x, x_test))
    return (x.astype("float32"), y), (x_test.astype("float32"), y_test)


def accuracy(model, test):
    return model.evaluate(*test, batch_size=250, verbose=0, return_dict=True)["accuracy"]


def ours(model, train, what, share, options):
    """The networks that `compress` makes without training and with it; steps and seconds of the latter."""
    import keras

    import keras_taylor

    def compress(epochs):
        keras.utils.set_random_seed(options.seed)
        networks.compiled(model, options.rate)
        batches = networks.batches(options.name, *train, seed=options.seed)
        start = time.perf_counter()
        small, info = keras_taylor.compress(
            model,
            batches,
            {what: share},
            increment=options.increment,
            criterion=keras_taylor.Scoring(ds=train),
            epochs=epochs,
            return_info=True,
            verbose=0,
        )
        for number, one in enumerate(info.rounds, 1):
            print("   round", number, {k: v[-1] for k, v in one.history.items()}, file=sys.stderr)
        num_steps = sum(len(one.step_losses) for one in info.rounds)
        return small, num_steps, time.perf_counter() - start

    return compress(0)[0], *compress(options.epochs)


def peer(model, train, criterion, goal, budget, options):
    """What Torch-Pruning leaves, trained for as many steps as `compress`, and for so many seconds."""
    import copy

    import torch
    import torch_peer

    x, y = train
    images = torch.tensor(x[:: max(len(x) // 2000, 1)]).permute(0, 3, 1, 2)
    is_given = any(type(layer).__name__ == "Pad" for layer in model.operations)  # shortcuts padded with zeros
    network = torch_peer.torch_resnet(model) if is_given else networks.torch_twin(model)
    start = time.perf_counter()
    found = torch_peer.Peer(network, criterion, images, y[:: max(len(x) // 2000, 1)])
    small = torch_peer.renewed(found.pruned(*goal), images[::2])
    num_steps, seconds = budget
    left = seconds - (time.perf_counter() - start)
    other = copy.deepcopy(small)
    fit(small, train, options, num_steps=num_steps)
    fit(other, train, options, seconds=left)
    return small, other


def fit(network, train, options, num_steps=math.inf, seconds=math.inf):
    """Trains a PyTorch module by one cycle of the learning rate for so many steps, or seconds."""
    import torch

    torch.manual_seed(options.seed)
    batches = networks.batches(options.name, *train, seed=options.seed)
    weights = [w for w in network.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(weights, options.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    start, k = time.perf_counter(), 0
    network.train()
    while (gone := max((time.perf_counter() - start) / seconds, k / num_steps)) < 1:
        share = gone / 0.3 if gone < 0.3 else 0.5 * (1 + np.cos(np.pi * (gone - 0.3) / 0.7))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * share
        x, y = batches[k % len(batches)]
        optimizer.zero_grad()
        logits = network(torch.tensor(x).permute(0, 3, 1, 2))
        torch.nn.functional.cross_entropy(logits, torch.tensor(y).long()).backward()
        optimizer.step()
        k += 1
        if k % len(batches) == 0:
            batches.on_epoch_end()
    print(f"   {k} steps in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def torch_accuracy(network, test):
    import torch

    x, y = test
    network.eval()
    with torch.no_grad():
        parts = [torch.tensor(x[k : k + 250]).permute(0, 3, 1, 2) for k in range(0, len(x), 250)]
        logits = torch.cat([network(part) for part in parts])
    return float((logits.argmax(1).numpy() == y).mean())


def from_scratch(small, train, seconds, options):
    """The same widths with new weights, trained for so many seconds."""
    import keras

    keras.utils.set_random_seed(options.seed)
    model = networks.compiled(keras.models.clone_model(small), 0.1)
    batches = networks.batches(options.name, *train, seed=options.seed)
    start = time.perf_counter()

    class Cycle(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            gone = min((time.perf_counter() - start) / seconds, 1)
            share = gone / 0.3 if gone < 0.3 else 0.5 * (1 + np.cos(np.pi * (gone - 0.3) / 0.7))
            self.model.optimizer.learning_rate = 0.1 * share

        def on_train_batch_end(self, batch, logs=None):
            if time.perf_counter() - start >= seconds:
                self.model.stop_training = True

    model.fit(batches, epochs=1000, callbacks=[Cycle()], verbose=0)
    return model


def measure(path, what, share, options):
    """One seed: accuracies by name, and seconds and shares that are gone."""
    import keras

    import keras_taylor

    options.name = path.stem
    train, test = data_of(options.name)
    train = tuple(part[: options.images] for part in train)
    model = networks.compiled(keras.models.load_model(path, compile=False), options.rate)
    repaired, small, num_steps, seconds = ours(model, train, what, share, options)
    before, after = keras_taylor.analyze(model).costs, keras_taylor.analyze(small).costs
    found = {
        "parameters gone": 1 - after["params"] / before["params"],
        "FLOPs gone": 1 - after["flops"] / before["flops"],
        "steps": num_steps,
        "s": seconds,
        "untouched": accuracy(model, test),
        "repaired only": accuracy(networks.compiled(repaired), test),
        "compress": accuracy(small, test),
    }
    for criterion in options.theirs:
        found_networks = peer(model, train, criterion, (what, share), (num_steps, seconds), options)
        for budget, network in zip(("steps", "time"), found_networks, strict=True):
            found[f"{criterion}, {budget}"] = torch_accuracy(network, test)
    if options.scratch:
        found["scratch"] = accuracy(from_scratch(small, train, seconds, options), test)
    return found


def cell(name, values):
    if name in ("steps", "s"):
        return f"{statistics.mean(values):.0f}"
    spread = f" ± {100 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", type=pathlib.Path, nargs="+", help="files of trained networks")
    parser.add_argument("--goals", type=goal_of, nargs="+", default=[("params", 0.3), ("params", 0.5)])
    parser.add_argument("--epochs", type=int, default=1, help="of `compress`, for each round")
    parser.add_argument("--increment", type=float, help="of `compress`")
    parser.add_argument("--images", type=int, help="to train on; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rate", type=float, default=0.02, help="compiled, and the peak of the others' cycle"
    )
    parser.add_argument("--theirs", nargs="*", default=["LAMP", "magnitude", "Taylor", "Hessian"])
    parser.add_argument("--scratch", action="store_true", help="train the widths anew, too")
    options = parser.parse_args()
    import keras

    if options.theirs and keras.backend.backend() != "torch":
        parser.error("Torch-Pruning and the torch backend share a process: set KERAS_BACKEND=torch")
    rows, header = [], []
    for path in options.networks:
        for what, share in options.goals:
            found = []
            for seed in range(options.seeds):
                options.seed = seed
                found.append(measure(path, what, share, options))
                print(path.stem, what, share, json.dumps(found[-1]), file=sys.stderr, flush=True)
            header = ["network", "goal", *found[0]]
            cells = [cell(name, [one[name] for one in found]) for name in found[0]]
            rows.append([path.stem, f"{what} {share:.0%}", *cells])
    num = options.images or "all"
    rounds = "the default increment" if options.increment is None else f"increment {options.increment}"
    print(HEAD.format(rounds=rounds, epochs=options.epochs, seeds=options.seeds, num=num, peak=options.rate))
    print(machine([keras.backend.backend()]), end="\n\n")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
