"""What `repair` costs on ResNet-50: time against forward passes, and memory above the models'.

`python benchmarks/repair_cost.py > benchmarks/results/repair_cost.md`
"""

import argparse
import pathlib
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

HEAD = """# What `repair` costs

ResNet-50 (random weights, {size} px), 30 % of the parameters cut by magnitude, repaired on {num} images
of noise. A forward pass is `predict` over the same images, compiled and warm; memory is what the process's
peak grows by in `repair`, the models and the images being there already.
"""


def resident(what):
    """KiB of this process's memory, now ("VmRSS") or at its peak ("VmHWM"); Linux only."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def measure(num, size):
    import keras
    import numpy as np

    import keras_taylor

    keras.utils.set_random_seed(0)
    shape = (size, size, 3)
    model = keras.applications.ResNet50(weights=None, input_shape=shape, classifier_activation=None)
    x = np.random.default_rng(0).standard_normal((num, *shape)).astype("float32")
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), 0.3)
    small = keras_taylor.prune(model, plan)
    before = resident("VmRSS")
    start = time.perf_counter()
    _, repairs = keras_taylor.repair(small, model, plan, x, num_examples=num, return_repairs=True)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        model.predict(x, batch_size=64, verbose=0)
        passes.append(time.perf_counter() - start)
    return {
        "pass": min(passes),
        "repair": seconds,
        "memory": (peak - before) / 1024,
        "layers": sum(one.ridge is not None for one in repairs),
        "alone": sum(one.ridge is None for one in repairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--size", type=int, default=96, help="pixels")
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, num=arguments.examples, size=arguments.size)
    print(HEAD.format(num=arguments.examples, size=arguments.size))
    print(machine(results), end="\n\n")
    header = ["backend", "forward pass s", "repair s", "passes", "memory MiB", "layers fitted", "left alone"]
    rows = [
        [
            *(backend, f"{r['pass']:.1f}", f"{r['repair']:.0f}", f"{r['repair'] / r['pass']:.1f}"),
            *(f"{r['memory']:,.0f}", str(r["layers"]), str(r["alone"])),
        ]
        for backend, r in results.items()
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
