"""How near goals are met, and FLOPs against TensorFlow's profiler, on networks of `keras.applications`.

KERAS_BACKEND=tensorflow python benchmarks/goals.py > benchmarks/results/goals.md
"""

import os
import pathlib
import sys
import time

from common import machine, markdown_table

NETWORKS = [
    *("ResNet50", "VGG16", "MobileNetV2", "MobileNetV3Small", "DenseNet121", "EfficientNetB0"),
    *("Xception", "InceptionV3", "NASNetMobile", "ConvNeXtTiny"),
]
GOALS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
SIZE = 96

HEAD = """# Goals

`KERAS_BACKEND=tensorflow python benchmarks/goals.py`: random weights and scores, {size} x {size} pixels.

What `make_plan` removes, of parameters and of FLOPs, at goals from 10 to 80 %. "Within a unit": at each
of them the goal would be missed with the last unit back; and what is removed grows with the goal.
Seconds: reading the network and sixteen plans. FLOPs: ours to those that TensorFlow's profiler counts in
the frozen graph (convolutions, dense layers, normalizations, activations, pooling), the whole network
and the one pruned by half of its FLOPs.
"""


def profiled(model):
    """FLOPs by TensorFlow's profiler."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    signature = tf.TensorSpec((1, *model.input_shape[1:]))
    function = tf.function(lambda x: model(x, training=False)).get_concrete_function(signature)
    graph = convert_variables_to_constants_v2(function).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    return tf.compat.v1.profiler.profile(graph=graph, options=options).total_float_ops


def plans_of(model):
    """What is removed at each goal, of each cost; whether within a unit; and a plan by half of FLOPs."""
    import numpy as np

    import keras_taylor
    from keras_taylor.budget.costs import CostModel
    from keras_taylor.plans.planning import kept_units
    from keras_taylor.reading.groups import label_model

    channels = label_model(model)
    costs = CostModel(channels)
    random = np.random.default_rng(0)
    scores = {group.name: random.random(group.num_units) for group in channels.groups}
    flat = np.concatenate([scores[group.name] for group in channels.groups])
    removed, within, half = {}, True, None
    for what in ("params", "flops"):
        removed[what] = []
        for goal in GOALS:
            plan = keras_taylor.make_plan(model, scores, {what: goal})
            kept = kept_units(channels, plan)
            ceiling = plan.before[what] * (1 - goal)
            reached = plan.after[what] <= ceiling
            kept[np.flatnonzero(~kept)[flat[~kept].argmax()]] = True
            within &= reached and costs(kept)[what] > ceiling
            removed[what].append(1 - plan.after[what] / plan.before[what])
            half = plan if (what, goal) == ("flops", 0.5) else half
    rises = all((np.diff(values) > 0).all() for values in removed.values())
    return removed, within and rises, half


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    import keras

    import keras_taylor

    if keras.backend.backend() != "tensorflow":
        raise SystemExit("The profiler is TensorFlow's: set KERAS_BACKEND=tensorflow")
    rows = []
    for name in NETWORKS:
        make = getattr(keras.applications, name)
        model = make(weights=None, input_shape=(SIZE, SIZE, 3), include_top=False)
        start = time.perf_counter()
        removed, within, half = plans_of(model)
        seconds = time.perf_counter() - start
        small = keras_taylor.prune(model, half)
        ratios = [costs["flops"] / profiled(m) for costs, m in ((half.before, model), (half.after, small))]
        texts = [", ".join(f"{value:.2%}" for value in values) for values in removed.values()]
        rows.append(
            [name, *texts, "yes" if within else "no", f"{seconds:.1f}", *(f"{r:.4f}" for r in ratios)]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
        keras.backend.clear_session()
    print(HEAD.format(size=SIZE))
    print(machine(["tensorflow"]), end="\n\n")
    header = ["network", "parameters removed", "FLOPs removed", "within a unit", "s", "FLOPs", "FLOPs, half"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
