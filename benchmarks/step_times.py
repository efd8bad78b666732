"""A scoring step, and a training step that gathers scores, against a training step of the plain model.

All run in `model.fit`, take turns, and are timed per step after a warm-up.

    python benchmarks/step_times.py > benchmarks/results/step_times.md
    python benchmarks/step_times.py --models ResNet50 --policies float32 mixed_bfloat16 --jit auto true
    python benchmarks/step_times.py --backends jax --models ResNet50 --repetitions 7
"""

import argparse
import itertools
import statistics
import sys

from common import BACKENDS, in_process, interleaved_fits, machine, markdown_table, on_each_backend

MODELS = ["ResNet50", "MobileNetV2", "EfficientNetB0"]

HEAD = """# Steps that score against plain training steps

`keras.applications` models at 96 px, batch 16, SGD with momentum, `model.fit`; medians of {repetitions}
interleaved repetitions of 2 steps, after a warm-up. "Jit": what `jit_compile` came out as; "auto" is Keras'
default, "True" is XLA on TensorFlow and JAX, `torch.compile` on PyTorch. "Score": forward and backward with
gates, without the gradients of weights, as `keras_taylor.score` does it. "Wrapped": a training step of a
`PrunableModel`, which gathers scores along the way. Ratios are to the plain training step, wall time; in
brackets the least and the largest of the repetitions, then the ratio of processor times. "First": the first
two steps, compilation included.
"""


def measure(model_name, policy, jit, image_size=96, batch_size=16, steps=2, repetitions=5):
    """Seconds (wall, processor) a step of each kind, one of each a repetition."""
    import keras
    import numpy as np

    import keras_taylor
    from keras_taylor.reading.groups import label_model
    from keras_taylor.scores.gated_model import GatedModel
    from keras_taylor.scores.scoring_passes import compile_for_scoring

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = getattr(keras.applications, model_name)(weights=None, input_shape=(image_size, image_size, 3))
    optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit)
    gated = GatedModel(label_model(model))
    compile_for_scoring(gated, model)
    models = {"train": model, "score": gated, "wrapped": keras_taylor.PrunableModel(model)}
    random = np.random.default_rng(0)
    x = random.normal(size=(steps * batch_size, image_size, image_size, 3)).astype("float32")
    y = random.integers(0, 1000, len(x))
    return interleaved_fits(models, x, y, batch_size, repetitions)


def row(name, backend, policy, result):
    times = result["times"]
    cells = [name, backend, policy, result["jit"], f"{statistics.median(w for w, _ in times['train']):.2f}"]
    for kind in ("score", "wrapped"):
        pairs = list(zip(times[kind], times["train"], strict=True))
        walls = [ours[0] / plain[0] for ours, plain in pairs]
        processor = statistics.median(ours[1] for ours, _ in pairs) / statistics.median(
            p[1] for _, p in pairs
        )
        median = statistics.median(ours[0] for ours, _ in pairs) / statistics.median(p[0] for _, p in pairs)
        cells.append(f"{median:.2f} ({min(walls):.2f} to {max(walls):.2f}), {processor:.2f}")
    return [*cells, *(f"{result['first'][kind]:.0f}" for kind in times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--policies", nargs="+", default=["float32"])
    parser.add_argument("--jit", nargs="+", default=["auto"], choices=["auto", "true", "false"])
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    print(HEAD.format(repetitions=arguments.repetitions))
    print(machine(arguments.backends), end="\n\n")
    header = ["model", "backend", "policy", "jit", "train s", "score / train", "wrapped / train"]
    header += ["first train s", "first score s", "first wrapped s"]
    print(markdown_table(header, []), flush=True)
    for name, policy, jit, backend in itertools.product(
        arguments.models, arguments.policies, arguments.jit, arguments.backends
    ):
        if backend == "jax" and jit == "true" and "auto" in arguments.jit:
            continue  # it is the default there
        options = {"model_name": name, "policy": policy, "jit": {"true": True, "false": False}.get(jit, jit)}
        found = on_each_backend(__file__, [backend], repetitions=arguments.repetitions, **options)
        print("| " + " | ".join(row(name, backend, policy, found[backend])) + " |", flush=True)


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
