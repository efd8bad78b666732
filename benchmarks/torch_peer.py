"""Torch-Pruning's side of `peers.py`: a Keras CIFAR ResNet in plain PyTorch, pruned by its criteria."""

import copy
import time

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

NAMES = {
    "LAMP": tp.importance.LAMPImportance,
    "magnitude": tp.importance.GroupMagnitudeImportance,
    "Taylor": tp.importance.GroupTaylorImportance,
    "Hessian": tp.importance.GroupHessianImportance,
}
_NUM_HESSIAN = 200


class _Block(nn.Module):
    def __init__(self, get, name):
        super().__init__()
        self.conv1, self.bn1 = _conv(get(f"{name}_conv1")), _normalization(get(f"{name}_bn1"))
        self.conv2, self.bn2 = _conv(get(f"{name}_conv2")), _normalization(get(f"{name}_bn2"))

    def forward(self, x):
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        stride, more = self.conv1.stride[0], y.shape[1] - x.shape[1]
        if more:
            x = functional.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, more // 2, more - more // 2))
        return functional.relu(x + y)


class _Network(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.image_size, get = model.inputs[0].shape[1], model.get_layer
        self.conv1, self.bn1 = _conv(get("conv1")), _normalization(get("bn1"))
        names = [layer.name[:-6] for layer in model.layers if layer.name.endswith("_conv1")]
        self.blocks = nn.Sequential(*(_Block(get, name) for name in names))
        kernel, bias = model.layers[-1].get_weights()
        self.head = nn.Linear(*kernel.shape)
        self.head.weight.data, self.head.bias.data = torch.tensor(kernel.T), torch.tensor(bias)

    def forward(self, x):
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        return self.head(x.mean((2, 3)))


def torch_resnet(model):
    """The Keras network as plain PyTorch modules, the weights copied."""
    return _Network(model).eval()


class Peer:
    """One criterion of Torch-Pruning, its gradients taken once.

    Attributes:
        seconds: What the gradients took.
    """

    def __init__(self, network, name, images, labels):
        self._network, self._name = network, name
        start = time.perf_counter()
        self._gradients = self._gather(images, torch.tensor(labels).long())
        self.seconds = time.perf_counter() - start

    def pruned(self, what, share):
        """A copy without so much of its parameters or FLOPs, in one shot, the ratio found by bisection."""
        low, high, place = 0.0, 0.99, ["params", "flops"].index(what)
        for _ in range(10):
            middle = (low + high) / 2
            enough = reductions(self._network, self._at(middle))[place] >= share
            low, high = (low, middle) if enough else (middle, high)
        return self._at(high)

    def _gather(self, images, labels):
        model = copy.deepcopy(self._network)
        if self._name == "Taylor":
            for k in range(0, len(images), 250):
                functional.cross_entropy(model(images[k : k + 250]), labels[k : k + 250]).backward()
            return {n: p.grad for n, p in model.named_parameters()}
        if self._name == "Hessian":
            squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
            for k in range(_NUM_HESSIAN):
                model.zero_grad()
                functional.cross_entropy(model(images[k : k + 1]), labels[k : k + 1]).backward()
                for n, p in model.named_parameters():
                    squares[n] += p.grad.square() / _NUM_HESSIAN
            return squares
        return {}

    def _at(self, ratio):
        model = copy.deepcopy(self._network)
        for name, parameter in model.named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].clone()
        pruner = tp.pruner.MetaPruner(
            *(model, _example(model)),
            importance=NAMES[self._name](),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1.0,
            ignored_layers=_kept_layers(model),
        )
        pruner.step()
        model.zero_grad()
        return model


def reductions(network, small):
    """Shares of parameters, and of FLOPs of convolutions and dense layers, that are gone."""
    before, after = (_costs(one) for one in (network, small))
    return [1 - a / b for a, b in zip(after, before, strict=True)]


def renewed(network, images):
    """A copy with BatchNorm statistics of these images, layer after layer as `recalibrate` does."""
    model = copy.deepcopy(network).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            seen = []
            handle = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                for k in range(0, len(images), 250):
                    model(images[k : k + 250])
            handle.remove()
            values = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1)
            module.running_mean, module.running_var = values.mean(1), values.var(1, unbiased=False)
    return model


def _costs(network):
    flops = []

    def count(module, inputs, output):
        positions = output[0, 0].numel() if output.ndim == 4 else 1
        flops.append(2 * module.weight.numel() * positions)

    mixing = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(count) for m in mixing]
    with torch.no_grad():
        network(_example(network))
    for handle in handles:
        handle.remove()
    return sum(p.numel() for p in network.parameters()), sum(flops)


def _example(network):
    """One image, as the first convolution reads it."""
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    return torch.zeros(1, first.in_channels, network.image_size, network.image_size)


def _kept_layers(network):
    """The head, and what a padded shortcut adds to."""
    if isinstance(network, _Network):
        return [network.conv1, network.head, *(block.conv2 for block in network.blocks)]
    return [m for m in network.modules() if isinstance(m, nn.Linear)][-1:]


def _conv(layer):
    kernel = torch.tensor(layer.get_weights()[0]).permute(3, 2, 0, 1).contiguous()
    made = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, layer.strides[0], 1, bias=False)
    made.weight.data = kernel
    return made


def _normalization(layer):
    values = [torch.tensor(w) for w in layer.get_weights()]
    made = nn.BatchNorm2d(len(values[0]), eps=layer.epsilon)
    made.weight.data, made.bias.data, made.running_mean, made.running_var = values
    return made
