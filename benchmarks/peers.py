"""Against Torch-Pruning: the same weights, images and reductions, without fine-tuning and after it.

    pip install torch-pruning==1.6.1
    KERAS_BACKEND=torch python benchmarks/peers.py --goals params=0.3 flops=0.5
    KERAS_BACKEND=torch python benchmarks/peers.py --models resnet20 --goals params=0.3 --epochs 10

Models and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import math
import os
import pathlib
import sys
import time

from common import machine, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
NUM_SCORED, NUM_REPAIRED = 2000, 1000

HEAD = """# Against Torch-Pruning {version}

The same trained weights and the same images: scores from {scored} of the 4000 CIFAR-10 training images,
repair and statistics from {repaired} of them, accuracy on 1000 test images, {epochs} epochs of fine-
tuning. Torch-Pruning gets the same network in plain PyTorch and prunes the inner channels of the blocks
(the padded shortcuts left alone); its criteria are ranked globally, in one shot, the ratio found by
bisection; Taylor and Hessian with labels (Hessian with the mean of the squared gradients of 200
examples: its own accumulation keeps the last example only). Ours choose among all channels, with labels too;
repair and statistics need none. "Statistics": BatchNorm re-estimated, exactly, for both. "Fine-tuned":
SGD with Nesterov momentum on the 4000 images, one cycle to 0.02, weight decay 5e-4, flips and shifts of
4, by one and the same loop; ours after repair, theirs from the cut model. Seconds: scores; repair. FLOPs
are those of convolutions and dense layers.
"""


class Judge:
    """Accuracies of networks of either kind, all of them PyTorch modules, and their fine-tuning.

    Args:
        data: Training images and labels, test images and labels; images `(n, h, w, c)`.
        epochs: Epochs of fine-tuning; 0: none.
    """

    def __init__(self, data, epochs):
        self._data, self._epochs = data, epochs

    def accuracy(self, network, layout="nhwc"):
        import torch

        x, y = self._data[2:]
        network.eval()
        with torch.no_grad():
            logits = [network(_images(x[k : k + 250], layout)) for k in range(0, len(x), 250)]
        return (torch.cat(logits).argmax(1).numpy() == y).mean()

    def fine_tuned(self, network, layout="nhwc"):
        """Accuracy after fine-tuning the network, in place; `None` without epochs."""
        import keras
        import resnet_cifar
        import torch

        if not self._epochs:
            return None
        keras.utils.set_random_seed(0)
        batches = resnet_cifar.Augmented(*self._data[:2], batch_size=128)
        weights = [w for w in network.parameters() if w.requires_grad]
        optimizer = torch.optim.SGD(weights, 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
        total = self._epochs * len(batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=total, cycle_momentum=False)
        for _ in range(self._epochs):
            network.train()
            for k in range(len(batches)):
                x, y = batches[k]
                optimizer.zero_grad()
                images = _images(x, layout)
                logits = network(images, training=True) if layout == "nhwc" else network(images)
                torch.nn.functional.cross_entropy(logits, torch.tensor(y).long()).backward()
                optimizer.step()
                cycle.step()
            batches.on_epoch_end()
        return self.accuracy(network, layout)


def _images(x, layout):
    import torch

    images = torch.tensor(x)
    return images if layout == "nhwc" else images.permute(0, 3, 1, 2)


def theirs(model, options, data, judge):
    """Rows of Torch-Pruning's criteria."""
    import torch_peer

    x, y = data[0], data[1]
    few, again = (slice(None, None, len(x) // n) for n in (NUM_SCORED, NUM_REPAIRED))
    network = torch_peer.torch_resnet(model)
    print("the same network in PyTorch:", judge.accuracy(network, "nchw"), file=sys.stderr)
    peers = {name: torch_peer.Peer(network, name, _images(x[few], "nchw"), y[few]) for name in options.theirs}
    for what, share in options.goals:
        for name, peer in peers.items():
            small = peer.pruned(what, share)
            renewed = torch_peer.renewed(small, _images(x[again], "nchw"))
            accuracies = [judge.accuracy(one, "nchw") for one in (small, renewed)]
            gone = torch_peer.reductions(network, small)
            fine_tuned = judge.fine_tuned(small, "nchw")
            yield [what, f"Torch-Pruning, {name}", *gone, *accuracies, None, fine_tuned, peer.seconds, None]


def ours(model, options, data, judge):
    """Rows of our criteria."""
    import keras_taylor

    x, y = data[:2]
    few = (x[:: len(x) // NUM_SCORED], y[:: len(x) // NUM_SCORED])
    again = x[:: len(x) // NUM_REPAIRED]
    before = keras_taylor.analyze(model).costs
    for what, share in options.goals:
        for criterion in options.ours:
            start = time.perf_counter()
            scores = keras_taylor.score(model, few, criterion=criterion, cost=what)
            scoring = time.perf_counter() - start
            plan = keras_taylor.make_plan(model, scores, {what: share})
            small = keras_taylor.prune(model, plan)
            renewed = keras_taylor.recalibrate(small, again, num_examples=NUM_REPAIRED)
            start = time.perf_counter()
            repaired = keras_taylor.repair(small, model, plan, again, num_examples=NUM_REPAIRED)
            repairing = time.perf_counter() - start
            after = keras_taylor.analyze(small).costs
            gone = [1 - after[cost] / before[cost] for cost in ("params", "flops")]
            accuracies = [judge.accuracy(one) for one in (small, renewed, repaired)]
            fine_tuned = judge.fine_tuned(repaired)
            yield [what, f"keras_taylor, {criterion}", *gone, *accuracies, fine_tuned, scoring, repairing]


def texts(model, row):
    what, name, *shares, scoring, repairing = row
    cells = ["" if share is None else f"{share:.1%}" for share in shares]
    return [model, what, name, *cells, f"{scoring:.0f}", "" if repairing is None else f"{repairing:.0f}"]


def goal_of(text):
    """("params", 0.3) of "params=0.3"."""
    what, _, share = text.partition("=")
    if what not in ("params", "flops") or not 0 < float(share) < 1 or math.isnan(float(share)):
        raise ValueError(text)
    return what, float(share)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--goals", type=goal_of, nargs="+", default=[("params", 0.3), ("params", 0.5)])
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--theirs", nargs="*", default=["LAMP", "magnitude", "Taylor", "Hessian"])
    parser.add_argument("--ours", nargs="*", default=["taylor", "log_odds", "fisher", "sensitivity"])
    arguments = parser.parse_args()
    import keras
    import resnet_cifar

    if keras.backend.backend() != "torch":
        parser.error("Torch-Pruning and the torch backend share a process: set KERAS_BACKEND=torch")
    data = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    judge = Judge(data, arguments.epochs)
    rows = []
    for name in arguments.models:
        model = keras.models.load_model(DATA / f"{name}_cifar10.keras", compile=False)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        for found in (theirs, ours):
            for row in found(model, arguments, data, judge):
                rows.append(texts(name, row))
                print(*rows[-1], file=sys.stderr, flush=True)
    epochs = arguments.epochs or "no"
    print(HEAD.format(version="1.6.1", scored=NUM_SCORED, repaired=NUM_REPAIRED, epochs=epochs))
    print(machine(["torch"]), end="\n\n")
    header = [
        *("network", "goal", "chosen by", "parameters gone", "FLOPs gone"),
        *("cut", "statistics", "repaired", "fine-tuned", "s", "repair s"),
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
