"""Against Torch-Pruning: the same weights, images and shares of parameters, without fine-tuning and after it.

    pip install torch-pruning==1.6.1
    KERAS_BACKEND=torch python benchmarks/peers.py --models resnet20 --goals 0.26 0.33

Models and CIFAR-10 come from the folder that KERAS_TAYLOR_DATA names.
"""

import argparse
import copy
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
repair and statistics from {repaired} of them, accuracy on 1000 test images. Torch-Pruning gets the same
network in plain PyTorch, and prunes the inner channels of the blocks (the padded shortcuts left alone); its
criteria are ranked globally, in one shot, the ratio found by bisection; Taylor and Hessian with labels. Ours
choose among all channels, without labels. "Statistics": BatchNorm re-estimated, exactly, for both. Seconds:
scores and cut; repair apart.
"""


def torch_resnet(model):
    """The Keras network as plain PyTorch modules, the weights copied."""
    import torch
    from torch import nn
    from torch.nn import functional

    def conv(layer):
        kernel = torch.tensor(layer.get_weights()[0]).permute(3, 2, 0, 1).contiguous()
        made = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, layer.strides[0], 1, bias=False)
        made.weight.data = kernel
        return made

    def normalization(layer):
        values = [torch.tensor(w) for w in layer.get_weights()]
        made = nn.BatchNorm2d(len(values[0]), eps=layer.epsilon)
        made.weight.data, made.bias.data, made.running_mean, made.running_var = values
        return made

    class Block(nn.Module):
        def __init__(self, name):
            super().__init__()
            get = model.get_layer
            self.conv1, self.bn1 = conv(get(f"{name}_conv1")), normalization(get(f"{name}_bn1"))
            self.conv2, self.bn2 = conv(get(f"{name}_conv2")), normalization(get(f"{name}_bn2"))

        def forward(self, x):
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            stride, more = self.conv1.stride[0], y.shape[1] - x.shape[1]
            if more:
                x = functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more // 2, more - more // 2))
            return functional.relu(x + y)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(model.get_layer("conv1")), normalization(model.get_layer("bn1"))
            names = [layer.name[:-6] for layer in model.layers if layer.name.endswith("_conv1")]
            self.blocks = nn.Sequential(*map(Block, names))
            kernel, bias = model.layers[-1].get_weights()
            self.head = nn.Linear(*kernel.shape)
            self.head.weight.data, self.head.bias.data = torch.tensor(kernel.T), torch.tensor(bias)

        def forward(self, x):
            x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
            return self.head(x.mean((2, 3)))

    return Network().eval()


def pruned_by_torch_pruning(network, importance, share, images, labels):
    """A copy without so many of its parameters, and the seconds that scoring and cutting took."""
    import torch
    import torch_pruning as tp

    example = images[:1]
    kept = [network.conv1, network.head, *(block.conv2 for block in network.blocks)]
    names = {id(module): name for name, module in network.named_modules()}
    wanted = (1 - share) * sum(p.numel() for p in network.parameters())

    def pruned(ratio):
        start = time.perf_counter()
        model = copy.deepcopy(network)
        modules = dict(model.named_modules())
        criterion = importance()
        pruner = tp.pruner.MetaPruner(
            *(model, example),
            importance=criterion,
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1.0,
            ignored_layers=[modules[names[id(module)]] for module in kept],
        )
        if "Taylor" in type(criterion).__name__:
            for k in range(0, len(images), 250):
                loss = torch.nn.functional.cross_entropy(model(images[k : k + 250]), labels[k : k + 250])
                loss.backward()
        elif "Hessian" in type(criterion).__name__:
            few = slice(0, 200)  # it wants the gradient of each example by itself
            losses = torch.nn.functional.cross_entropy(model(images[few]), labels[few], reduction="none")
            for loss in losses:
                model.zero_grad()
                loss.backward(retain_graph=True)
                criterion.accumulate_grad(model)
        pruner.step()
        return model, time.perf_counter() - start

    low, high = 0.0, 0.99
    for _ in range(9):
        middle = (low + high) / 2
        model, _ = pruned(middle)
        fits = sum(p.numel() for p in model.parameters()) <= wanted
        low, high = (low, middle) if fits else (middle, high)
    return pruned(high)


def renewed(network, images):
    """A copy with BatchNorm statistics of these images, layer after layer as `recalibrate` does."""
    import torch

    model = copy.deepcopy(network).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            seen = []
            handle = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                for k in range(0, len(images), 250):
                    model(images[k : k + 250])
            handle.remove()
            values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1)
            module.running_mean, module.running_var = values.mean(1), values.var(1, unbiased=False)
    return model


def theirs(model, goals, data):
    """Rows of Torch-Pruning's criteria."""
    import torch
    import torch_pruning as tp

    x, y, x_test, y_test = data
    few = slice(None, None, len(x) // NUM_SCORED)
    images, labels = torch.tensor(x[few]).permute(0, 3, 1, 2), torch.tensor(y[few]).long()
    again = torch.tensor(x[:: len(x) // NUM_REPAIRED]).permute(0, 3, 1, 2)
    test = torch.tensor(x_test).permute(0, 3, 1, 2)
    network = torch_resnet(model)
    whole = sum(p.numel() for p in network.parameters())

    def accuracy(candidate):
        with torch.no_grad():
            right = (
                torch.cat([candidate(test[k : k + 250]) for k in range(0, len(test), 250)]).argmax(1).numpy()
            )
        return (right == y_test).mean()

    print("the same network in PyTorch:", accuracy(network), file=sys.stderr)
    criteria = {
        "LAMP": tp.importance.LAMPImportance,
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "Taylor": tp.importance.GroupTaylorImportance,
        "Hessian": tp.importance.GroupHessianImportance,
    }
    for goal in goals:
        for name, importance in criteria.items():
            pruned, seconds = pruned_by_torch_pruning(network, importance, goal, images, labels)
            gone = 1 - sum(p.numel() for p in pruned.parameters()) / whole
            row = [f"Torch-Pruning, {name}", gone, accuracy(pruned), accuracy(renewed(pruned, again)), None]
            yield [*row, seconds, None]


def ours(model, goals, data):
    """Rows of our criteria."""
    import keras_taylor

    x, _, x_test, y_test = data
    again = x[:: len(x) // NUM_REPAIRED]

    def accuracy(candidate):
        return (candidate.predict(x_test, batch_size=250, verbose=0).argmax(1) == y_test).mean()

    for criterion in ("taylor", "sensitivity"):
        start = time.perf_counter()
        scores = keras_taylor.score(model, x[:: len(x) // NUM_SCORED], criterion=criterion)
        scoring = time.perf_counter() - start
        for goal in goals:
            start = time.perf_counter()
            plan = keras_taylor.make_plan(model, scores, goal)
            small = keras_taylor.prune(model, plan)
            cutting = time.perf_counter() - start
            renewed = keras_taylor.recalibrate(small, again, num_examples=NUM_REPAIRED)
            start = time.perf_counter()
            repaired = keras_taylor.repair(small, model, plan, again, num_examples=NUM_REPAIRED)
            seconds = time.perf_counter() - start
            gone = 1 - small.count_params() / model.count_params()
            accuracies = [accuracy(one) for one in (small, renewed, repaired)]
            yield [f"keras_taylor, {criterion}", gone, *accuracies, scoring + cutting, seconds]


def texts(model, row):
    name, gone, *accuracies, cut, repaired = row
    cells = ["" if a is None else f"{a:.1%}" for a in accuracies]
    return [model, name, f"{gone:.1%}", *cells, f"{cut:.1f}", "" if repaired is None else f"{repaired:.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--goals", type=float, nargs="+", default=[0.3, 0.5])
    arguments = parser.parse_args()
    import keras
    import resnet_cifar
    import torch_pruning  # noqa: F401

    if keras.backend.backend() != "torch":
        parser.error("Torch-Pruning and the torch backend share a process: set KERAS_BACKEND=torch")
    data = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    rows = []
    for name in arguments.models:
        model = keras.models.load_model(DATA / f"{name}_cifar10.keras", compile=False)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
        for found in (theirs, ours):
            for row in found(model, arguments.goals, data):
                rows.append(texts(name, row))
                print(*rows[-1], file=sys.stderr, flush=True)
    print(HEAD.format(version="1.6.1", scored=NUM_SCORED, repaired=NUM_REPAIRED))
    print(machine(["torch"]), end="\n\n")
    header = ["network", "chosen by", "parameters gone", "cut", "statistics", "repaired", "s", "repair s"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
