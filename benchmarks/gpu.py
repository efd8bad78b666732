"""Steps, memory and rounds on a GPU: a ResNet-50 in float32 and bfloat16, on JAX and PyTorch.

    python benchmarks/gpu.py > benchmarks/results/gpu.md
    python benchmarks/gpu.py --image-size 64 --batch-size 4 --steps 1 --repetitions 1 --examples 8

The second line is a trial that a CPU can do. Results are to be committed when a machine with a GPU is at
hand; those of a CPU are not. It runs on the first device of each backend, and needs the backends alone
(`pip install keras-taylor "jax[cuda12]" torch`).
"""

import argparse
import os
import statistics
import sys
import time

from common import in_process, interleaved_fits, machine, markdown_table, on_each_backend

KINDS = ("train", "score", "wrapped")
FULL_EPOCH = 1_281_167  # ImageNet's training images
MOST_SCORED = 10_000  # the default of `compress`

HEAD = """# On a GPU

`keras.applications.ResNet50` at {image_size} px, batch {batch_size}, SGD with momentum, synthetic images in
host memory, `model.fit` with Keras' default jit settings and the backend's default precision of products.
Medians of {repetitions} interleaved repetitions of {steps} steps after a warm-up; ratios are to the plain
training step, in brackets the least and the largest of the repetitions. "Score": forward and backward with
gates, as `keras_taylor.score` does it. "Wrapped": a training step of a `PrunableModel`. "GiB": the most
that a process which does nothing but this has allocated on the device (on a CPU: its resident memory), for
training, scoring and wrapped training. "Rounds": of `compress` with {examples} images, one epoch a round,
{rounds} rounds, compilation included; "ImageNet": computed from it for an epoch of 1,281,167 images a round
and 10,000 that are scored.
"""


def measure(policy, image_size, batch_size, steps, repetitions, examples, rounds, memory_of=None):
    """Times of steps and rounds; or, of one kind of step, the peak of memory alone."""
    import keras
    import numpy as np

    import keras_taylor

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)

    def images(number):
        random = np.random.default_rng(0)
        x = random.standard_normal((number, image_size, image_size, 3), np.float32)
        return x, random.integers(0, 1000, number)

    x, y = images(steps * batch_size)
    if memory_of is not None:
        _model(memory_of, image_size).fit(x, y, batch_size=batch_size, verbose=0)
        return {"memory": _peak_memory()}
    models = {kind: _model(kind, image_size) for kind in KINDS}
    found = interleaved_fits(models, x, y, batch_size, repetitions)
    del models
    start = time.perf_counter()
    _, info = keras_taylor.compress(
        _model("train", image_size),
        images(examples),
        0.05 * rounds,
        increment=0.05,
        batch_size=batch_size,
        epochs=1,
        verbose=0,
        return_info=True,
    )
    seconds = (time.perf_counter() - start) / len(info.rounds)
    return {**found, "round": seconds, "device": _device()}


def _model(kind, image_size):
    import keras

    import keras_taylor
    from keras_taylor.reading.groups import label_model
    from keras_taylor.scores.gated_model import GatedModel
    from keras_taylor.scores.scoring_passes import compile_for_scoring

    model = keras.applications.ResNet50(weights=None, input_shape=(image_size, image_size, 3))
    model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), "sparse_categorical_crossentropy")
    if kind == "wrapped":
        return keras_taylor.PrunableModel(model)
    if kind == "score":
        gated = GatedModel(label_model(model))
        compile_for_scoring(gated, model)
        return gated
    return model


def _device():
    """The name of the device, `None` for a CPU."""
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import jax

    first = jax.local_devices()[0]
    return None if first.platform == "cpu" else first.device_kind


def _peak_memory():
    """Bytes on the device, or of the process where that is a CPU."""
    if _device() is None:
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def row(backend, policy, found, peaks, batch_size, examples):
    times = {kind: [wall for wall, _ in found["times"][kind]] for kind in KINDS}
    train, score = statistics.median(times["train"]), statistics.median(times["score"])
    cells = [backend, policy, f"{1000 * train:.1f}", f"{batch_size / train:.0f}"]
    for kind in KINDS[1:]:
        ratios = [ours / plain for ours, plain in zip(times[kind], times["train"], strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    more = (FULL_EPOCH - examples) * train + max(0, MOST_SCORED - examples) * score
    full = found["round"] + more / batch_size
    memory = ", ".join(f"{peak / 2**30:.1f}" for peak in peaks)
    return [*cells, memory, f"{found['round']:.0f}", f"{3600 / found['round']:.1f}", f"{3600 / full:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["jax", "torch"], choices=["jax", "torch"])
    parser.add_argument("--policies", nargs="+", default=["float32", "mixed_bfloat16"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--examples", type=int, default=2560, help="images a round of compress")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = vars(parser.parse_args())
    backends, policies = arguments.pop("backends"), arguments.pop("policies")
    rows, device = [], None
    for backend in backends:
        for policy in policies:

            def run(backend=backend, policy=policy, **more):
                return on_each_backend(__file__, [backend], policy=policy, **arguments, **more)[backend]

            found = run()
            device = found["device"] or device
            peaks = [run(memory_of=kind)["memory"] for kind in KINDS]
            rows.append(row(backend, policy, found, peaks, arguments["batch_size"], arguments["examples"]))
    print(HEAD.format(**arguments))
    print(machine(backends, device), end="\n\n")
    header = ["backend", "policy", "train ms", "images/s", "score / train", "wrapped / train", "GiB"]
    print(markdown_table([*header, "round s", "rounds/h", "rounds/h, ImageNet"], rows))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
