"""Read, plan and cut a model against cloning it with its weights, on each backend.

`python benchmarks/surgery.py` for the ratio, `--all` for the time that reading takes
for every model of `keras.applications` (structure only, weights zero), `--tasks` for
`analyze` of tasks of KerasHub against their construction.
"""

import argparse
import statistics
import sys
import time

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend, without_initializers


def measure(what, **arguments):
    return {"ratio": measure_ratio, "all": measure_all, "task": measure_task}[what](**arguments)


def measure_ratio(repetitions=5, image_size=224, model_name="ResNet50"):
    """Seconds (wall, processor) of cloning and of pruning, one of each a repetition; the first apart."""
    import keras
    import numpy as np

    import keras_taylor
    from keras_taylor.reading.groups import label_model

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, model_name)(weights=None, input_shape=(image_size, image_size, 3))
    random = np.random.default_rng(0)
    scores = {g.name: random.random(g.num_units) for g in label_model(model).groups}

    def clone():
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())

    def prune():
        keras_taylor.prune(model, keras_taylor.make_plan(model, scores, 0.3))

    functions = {"clone": clone, "prune": prune}
    first = {name: _seconds(function) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            times[name].append(_seconds(function))
    return {"first": first, "times": times}


def measure_all(image_size=96):
    """Calls, parameters and seconds to read and to count, for every model."""
    import keras

    from keras_taylor.budget.costs import CostModel
    from keras_taylor.reading.groups import label_model

    results = {}
    for name in [name for name, member in vars(keras.applications).items() if callable(member)]:
        with without_initializers(keras.layers.Layer):
            model = getattr(keras.applications, name)(weights=None, input_shape=(image_size, image_size, 3))
        start = time.perf_counter()
        channels = label_model(model)
        params = CostModel(channels)()["params"]
        seconds = time.perf_counter() - start
        results[name] = [len(channels.graph.calls), len(channels.groups), channels.num_units, params, seconds]
        del model, channels
        keras.backend.clear_session()
    return results


GPT2 = {
    "GPT-2, 2 layers of 32": {
        **{"vocabulary_size": 50, "num_layers": 2, "num_heads": 2, "hidden_dim": 32},
        **{"intermediate_dim": 64, "max_sequence_length": 12},
    },
    "GPT-2 base": {
        **{"vocabulary_size": 50257, "num_layers": 12, "num_heads": 12, "hidden_dim": 768},
        **{"intermediate_dim": 3072, "max_sequence_length": 1024},
    },
}


def measure_task(name):
    """Seconds (wall, processor) to build a task and to analyze it, twice each; MB added, MB of weights."""
    import hub
    import keras
    from keras_hub import models
    from pruning_memory import Peak, resident

    import keras_taylor

    keras_taylor.analyze(keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(2)]))

    def build():
        if name in GPT2:
            return models.GPT2CausalLM(models.GPT2Backbone(**GPT2[name]))
        return hub.tasks()[name]()[0]

    made = []
    first = _seconds(lambda: made.append(build()))
    (task,) = made
    before = resident()
    with Peak() as peak:
        analyze = _seconds(lambda: keras_taylor.analyze(task))
    again = _seconds(lambda: keras_taylor.analyze(task))
    weights = 4 * task.count_params()
    memory = (peak.bytes - before) / 2**20
    return [first, _seconds(build), analyze, again, memory, weights / 2**20]


def _seconds(function):
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def row(backend, result):
    medians = {
        name: [statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, pairs in result["times"].items()
    }
    (clone, clone_cpu), (prune, prune_cpu) = medians["clone"], medians["prune"]
    return [
        backend,
        f"{clone:.2f}",
        f"{prune:.2f}",
        f"{prune / clone:.2f}",
        f"{prune_cpu / clone_cpu:.2f}",
        f"{result['first']['clone'][0]:.1f}",
        f"{result['first']['prune'][0]:.1f}",
    ]


def print_ratio(backends, repetitions):
    results = on_each_backend(__file__, backends, what="ratio", repetitions=repetitions)
    print("# Read, plan and cut against clone and copy\n")
    print("ResNet-50 (224 px): `make_plan` and `prune` by 30 % of the parameters against `clone_model`")
    print(f"and `set_weights(get_weights())`; medians of {repetitions} interleaved repetitions.\n")
    print(machine(results), end="\n\n")
    header = "backend, clone s, prune s, ratio, ratio in processor time, first clone s, first prune s"
    print(markdown_table(header.split(", "), [row(b, r) for b, r in results.items()]))


def print_all(backend):
    results = on_each_backend(__file__, [backend], what="all")[backend]
    slowest = max(results, key=lambda name: results[name][-1])
    print("# Reading every model of `keras.applications`\n")
    print(f"Graph, groups and costs of all {len(results)} models at 96 px, weights zero, on {backend}.")
    print(f"{sum(r[-1] for r in results.values()):.1f} s in all; the slowest is {slowest}.\n")
    print(machine([backend]), end="\n\n")
    rows = [
        [name, str(calls), str(groups), str(units), f"{params:,}", f"{seconds:.2f}"]
        for name, (calls, groups, units, params, seconds) in results.items()
    ]
    print(markdown_table(["model", "operations", "groups", "units", "parameters", "s"], rows))


def print_tasks(backends):
    print("## Tasks of KerasHub\n")
    print(
        "Processor seconds (wall) to build a task, and to build it once more; of the first `analyze` and of a"
    )
    print("second one; the most resident MB that the first one added, and those of the weights.\n")
    print(machine(backends), end="\n\n")
    rows = []
    for name in (*GPT2, "MobileNetImageClassifier"):
        results = on_each_backend(__file__, backends, what="task", name=name)
        for backend, (*seconds, memory, weights) in results.items():
            times = [f"{processor:.2f} ({wall:.1f})" for wall, processor in seconds]
            rows.append([name, backend, *times, f"{memory:.0f}", f"{weights:.0f}"])
    header = "task, backend, build s, again s, analyze s, again s, added MB, weights MB"
    print(markdown_table(header.split(", "), rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tasks", action="store_true")
    arguments = parser.parse_args()
    if arguments.tasks:
        print_tasks(arguments.backends)
    elif arguments.all:
        print_all(arguments.backends[0])
    else:
        print_ratio(arguments.backends, arguments.repetitions)


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
