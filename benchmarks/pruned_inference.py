"""How much faster a ResNet-50 with half of its FLOPs runs: three backends, LiteRT and ONNX Runtime.

python benchmarks/pruned_inference.py > benchmarks/results/pruned_inference.md
python benchmarks/pruned_inference.py --runtimes jax onnx --size 96 --batches 1 --parts whole
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

from common import in_process, machine, markdown_table, on_each_backend

# A name in the table, the backend of the process, `jit_compile`; of a file: the format.
RUNTIMES = {
    "jax": ("jax", "auto"),
    "tensorflow": ("tensorflow", "auto"),
    "torch": ("torch", "auto"),
    "LiteRT": ("tensorflow", "litert"),
    "ONNX Runtime": ("tensorflow", "onnx"),
    "tensorflow XLA": ("tensorflow", True),
    "torch.compile": ("torch", True),
}
# From one layer's output (the model's input) to that of another.
PARTS = {
    "whole": (None, None),
    "stem": (None, "pool1_pool"),
    "conv2": ("pool1_pool", "conv2_block3_out"),
    "conv3": ("conv2_block3_out", "conv3_block4_out"),
    "conv4": ("conv3_block4_out", "conv4_block6_out"),
    "conv5": ("conv4_block6_out", "conv5_block3_out"),
}
ENDINGS = {"litert": ".tflite", "onnx": ".onnx"}

HEAD = """# What half of the FLOPs is worth in time

`keras.applications.ResNet50` at {size} px, random weights (what is measured does not depend on them), cut
by `make_plan(goal={{"flops": {goal}}}, selection=Selection(round_to={round_to}))` with magnitude
scores: {params:.2f} of the
parameters and {flops:.2f} of the FLOPs are left. Keras models run by `predict_on_batch` ("XLA", ".compile":
with `jit_compile=True`), files made by `export` in their runtimes. Every process has {cores} core(s), and a
file's runtime as many threads. Original and pruned take turns in one process: {repetitions} repetitions
after a warm-up, each the medians of 3 to 50 calls. "FLOPs", "time" and "processor" are pruned / original;
of the times the median over the repetitions, in brackets the least and the largest of the wall times. The
speed-up is the inverse of the processor times' ratio. A part of the network ("conv2": the first stage of
blocks) runs as a model of its own.
"""


def measure(runtime, size, batches, parts, goal, round_to, cores, repetitions):
    """For each batch size and part: ratio of FLOPs, and pairs of seconds (original, pruned)."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # before a backend counts them
    import keras

    import keras_taylor

    keras.utils.set_random_seed(0)
    options = {"weights": None, "input_shape": (size, size, 3), "classifier_activation": None}
    model = keras.applications.ResNet50(**options)
    scores = keras_taylor.score(model, criterion="magnitude")
    selection = keras_taylor.Selection(round_to=round_to)
    plan = keras_taylor.make_plan(model, scores, {"flops": goal}, selection=selection)
    both = model, keras_taylor.prune(model, plan)
    costs = keras_taylor.analyze(model).costs
    found = {"left": {what: value / costs[what] for what, value in plan.after.items()}, "rows": []}
    how = RUNTIMES[runtime][1]
    for part in ["whole"] if how is True else parts:  # what compiles for minutes
        cuts = [_part(one, part) for one in both]
        flops = [keras_taylor.analyze(one).costs["flops"] for one in cuts]
        for batch in batches if part == "whole" and how is not True else batches[:1]:
            pairs = _pairs(_calls(how, cuts, batch, cores), repetitions)
            found["rows"].append([part, batch, flops[1] / flops[0], pairs])
            print(runtime, part, batch, file=sys.stderr, flush=True)
    return found


def _part(model, name):
    import keras

    start, stop = PARTS[name]
    inputs = model.inputs if start is None else model.get_layer(start).output
    outputs = model.outputs if stop is None else model.get_layer(stop).output
    return keras.Model(inputs, outputs)


def _calls(how, models, batch, threads):
    """Two functions without arguments: the original and the pruned model."""
    import numpy as np

    random = np.random.default_rng(0)
    xs = [random.normal(size=(batch, *m.inputs[0].shape[1:])).astype("float32") for m in models]
    if how not in ENDINGS:
        for model in models:
            model.compile(jit_compile=how)
        return [lambda m=m, x=x: m.predict_on_batch(x) for m, x in zip(models, xs, strict=True)]
    import keras_taylor

    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{k}{ENDINGS[how]}") for k in range(2)]
        for model, path in zip(models, paths, strict=True):
            keras_taylor.export(model, path, batch_size=batch, tolerance=float("inf"))
        run = _litert if how == "litert" else _onnx
        return [run(path, x, threads) for path, x in zip(paths, xs, strict=True)]


def _litert(path, x, threads):
    from keras_taylor.exports.runners import import_litert

    interpreter = import_litert().interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    index = interpreter.get_input_details()[0]["index"]

    def run():
        interpreter.set_tensor(index, x)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return run


def _onnx(path, x, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def _pairs(calls, repetitions, seconds=0.3):
    """Seconds (wall, processor) of one call of each: the medians of several calls, which take turns."""

    def timed(call):
        wall, processor = time.perf_counter(), time.process_time()
        call()
        return time.perf_counter() - wall, time.process_time() - processor

    for call in calls:  # compiles
        call()
    turns = min(50, max(3, round(seconds / sum(timed(call)[0] for call in calls))))
    pairs = []
    for _ in range(repetitions):
        rounds = [[timed(call) for call in calls] for _ in range(turns)]
        both = zip(*rounds, strict=True)
        pairs.append([[statistics.median(column) for column in zip(*times, strict=True)] for times in both])
    return pairs


def table_row(runtime, part, batch, flops, pairs):
    walls, processors = ([new[k] / old[k] for old, new in pairs] for k in range(2))
    ratio = statistics.median(processors)
    times = [1000 * statistics.median(pair[k][1] for pair in pairs) for k in range(2)]
    return [
        *(runtime, part, str(batch), f"{flops:.2f}"),
        f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})",
        *(f"{ratio:.2f}", f"{1 / ratio:.2f}", *(f"{one:.1f}" for one in times)),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--goal", type=float, default=0.5)
    parser.add_argument("--round-to", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = vars(parser.parse_args())
    runtimes = arguments.pop("runtimes")
    header = ["runtime", "part", "batch", "FLOPs", "time", "processor", "speed-up", "ms before", "ms after"]
    for runtime in runtimes:
        backend = RUNTIMES[runtime][0]
        found = on_each_backend(__file__, [backend], runtime=runtime, **arguments)[backend]
        if runtime == runtimes[0]:
            print(HEAD.format(**arguments, **found["left"]))
            print(machine(["tensorflow", "jax", "torch"]), end="\n\n")
            print(markdown_table(header, []), flush=True)
        for row in found["rows"]:
            print("| " + " | ".join(table_row(runtime, *row)) + " |", flush=True)


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
