"""The most memory that `prune` takes, against the original, the pruned model and the largest layer.

`python benchmarks/pruning_memory.py`; needs Linux (`/proc`, glibc). A process beside the measured one
reads its resident memory two thousand times a second.
"""

import argparse
import ctypes
import gc
import math
import os
import pathlib
import subprocess
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend, without_initializers

_MB = 2**20
_SAMPLER = """
import select, sys
statm, peak = open(f"/proc/{sys.argv[1]}/statm", "rb", buffering=0), 0
while not select.select([sys.stdin], [], [], 0.0005)[0]:
    statm.seek(0)
    peak = max(peak, int(statm.read().split()[1]) * int(sys.argv[2]))
print(peak)
"""


class Peak:
    """The most resident memory while in the context, in bytes."""

    def __enter__(self):
        command = [sys.executable, "-c", _SAMPLER, str(os.getpid()), str(os.sysconf("SC_PAGE_SIZE"))]
        self._sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        time.sleep(0.3)
        return self

    def __exit__(self, *_):
        output, _ = self._sampler.communicate("\n")
        self.bytes = int(output)


def resident():
    """Resident bytes, once what was freed has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(model_name="VGG16", goal=0.3, image_size=224):
    import keras
    import numpy as np

    import keras_taylor
    from keras_taylor.reading.groups import label_model

    small = keras.Sequential([keras.Input((4096,)), keras.layers.Dense(2048)])
    keras_taylor.prune(small, keras_taylor.Plan())  # imports what Keras imports late
    del small
    runtime = resident()
    # ones: zeros could be pages that do not exist yet, and values assigned later leave TensorFlow's
    # allocator with freed memory that it keeps
    with without_initializers(keras.layers.Layer, "ones"):
        shape = (image_size, image_size, 3)
        model = getattr(keras.applications, model_name)(weights=None, input_shape=shape)
    random = np.random.default_rng(0)
    scores = {g.name: random.random(g.num_units) for g in label_model(model).groups}
    plan = keras_taylor.make_plan(model, scores, goal)
    before = resident()
    with Peak() as peak:
        start = time.perf_counter()
        pruned = keras_taylor.prune(model, plan)
        seconds = time.perf_counter() - start
    return {
        "original": _bytes(model.weights),
        "pruned": _bytes(pruned.weights),
        "largest": max(_bytes(layer.weights) for layer in model.layers),
        "before": before - runtime,
        "peak": peak.bytes - runtime,
        "after": resident() - runtime,
        "runtime": runtime,
        "seconds": seconds,
    }


def _bytes(weights):
    return sum(4 * math.prod(weight.shape) for weight in weights)


def row(backend, r):
    bound = r["original"] + r["pruned"] + r["largest"]
    columns = (r["original"], r["pruned"], r["largest"], bound, r["before"], r["peak"], r["after"])
    return [
        backend,
        *(f"{one / _MB:.0f}" for one in columns),
        f"{r['peak'] / bound:.2f}",
        f"{r['runtime'] / _MB:.0f}",
        f"{r['seconds']:.1f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--model", default="VGG16")
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, model_name=arguments.model)
    print("# Peak memory of a cut\n")
    print(f"`prune` of {arguments.model} (224 px) by 30 % of its parameters. MB of weights; the bound is the")
    print(
        "original, the pruned model and the largest layer together. Resident memory before the cut, at most"
    )
    print("while it runs, and after it, each without what the process held before it made the model.\n")
    print(machine(results), end="\n\n")
    header = "backend, original, pruned, largest layer, bound, before, peak, after, peak / bound, runtime, s"
    print(markdown_table(header.split(", "), [row(b, r) for b, r in results.items()]))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
