"""Reading, choosing by magnitude and cutting a ResNet-50, against Torch-Pruning on PyTorch."""

import argparse
import copy
import statistics
import sys
import time

from common import in_process, machine, markdown_table, on_each_backend


def measure(repetitions):
    """Seconds (wall, processor) by what was done; a first repetition is not counted."""
    import keras

    import keras_taylor

    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None, input_shape=(224, 224, 3))
    network = torch_resnet50()
    counts = {}

    def ours(scope, analyze=False):
        if analyze:
            keras_taylor.analyze(model)
        scores = keras_taylor.score(model, criterion="magnitude")
        selection = keras_taylor.Selection(scope=scope)
        small = keras_taylor.prune(model, keras_taylor.make_plan(model, scores, 0.3, selection=selection))
        return small.count_params()

    def peer(ratio, **how):
        mine, start = copy.deepcopy(network), _now()
        cut_by_peer(mine, ratio, **how)
        return _since(start), sum(p.numel() for p in mine.parameters())

    def timed(function):
        start = _now()
        params = function()
        return _since(start), params

    functions = {
        "keras_taylor, one ranking of all": lambda: timed(lambda: ours("global")),
        "keras_taylor, each group alike": lambda: timed(lambda: ours("layer")),
        "keras_taylor, and `analyze` before": lambda: timed(lambda: ours("global", analyze=True)),
        "Keras, `clone_model` alone": lambda: timed(lambda: keras.models.clone_model(model).count_params()),
        "Torch-Pruning, one ranking of all": lambda: peer(0.2, global_pruning=True),
        "Torch-Pruning, each group alike": lambda: peer(0.16, global_pruning=False),
    }
    times = {name: [] for name in functions}
    for number in range(repetitions + 1):
        for name, function in functions.items():
            seconds, counts[name] = function()
            if number:
                times[name].append(seconds)
    return {"times": times, "params": counts, "whole": model.count_params()}


def cut_by_peer(network, ratio, **how):
    import torch
    import torch_pruning as tp

    pruner = tp.pruner.BasePruner(
        *(network, torch.zeros(1, 3, 224, 224)),
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=[network[-1]],
        **how,
    )
    pruner.step()


def torch_resnet50():
    """The bottleneck network of He et al. (2015) in plain PyTorch."""
    import torch
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self, num_inputs, width, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(num_inputs, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            projection = [nn.Conv2d(num_inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)]
            self.shortcut = nn.Sequential(*(projection if num_inputs != 4 * width else []))

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)))
            return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))

    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    num_inputs = 64
    for width, number, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(number):
            layers.append(Bottleneck(num_inputs, width, stride if k == 0 else 1))
            num_inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


def _now():
    return time.perf_counter(), time.process_time()


def _since(start):
    return [now - then for now, then in zip(_now(), start, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    results = on_each_backend(__file__, ["torch"], repetitions=arguments.repetitions)
    times, params = results["torch"]["times"], results["torch"]["params"]
    medians = {}
    for name, pairs in times.items():
        wall, processor = zip(*pairs, strict=True)
        medians[name] = statistics.median(wall), min(wall), statistics.median(processor)
    best = [min(m[k] for name, m in medians.items() if name.startswith("Torch")) for k in range(3)]
    print("# Reading and cutting a ResNet-50 against Torch-Pruning\n")
    print(
        "224 px, on PyTorch: `score` by magnitude, `make_plan` and `prune` against `BasePruner` and `step` of"
    )
    print(
        "Torch-Pruning 1.6.1 by group magnitude, from a fresh copy of the network, which is not counted (it"
    )
    print(f"cuts in place; `prune` makes a model beside the given one). Medians of {arguments.repetitions}")
    print("interleaved repetitions; ratios to the faster run of Torch-Pruning. `clone_model` is what Keras")
    print("itself needs to make those layers once more.\n")
    print(machine(results), end="\n\n")
    rows = [
        [
            name,
            *(f"{one:.2f}" for one in medians[name]),
            *(f"{one / least:.2f}" for one, least in zip(medians[name], best, strict=True)),
            f"{1 - params[name] / results['torch']['whole']:.0%}",
        ]
        for name in medians
    ]
    header = (
        "what, wall s, least wall s, processor s, ratio, of the least, of processor time, parameters removed"
    )
    print(markdown_table([column.strip() for column in header.split(",")], rows))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
