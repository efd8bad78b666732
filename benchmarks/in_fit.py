"""Pruning within one `fit` beside `compress` at equal epochs, and scores under mixed precision.

The digits CNN of `examples/quickstart.py`, on each backend, several seeds.
Usage: `python benchmarks/in_fit.py [--backends ...] [--seeds 3] [--goal 0.6]`.
"""

import argparse
import pathlib
import sys

from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
EPOCHS = 6
WAYS = {
    "between epochs": {},
    "every 5 steps": {"frequency": 5, "momentum": 0.9},
}


def measure(seeds=3, goal=0.6):
    """Accuracies on 450 test images, one list a way, and Spearman correlations of scores."""
    import keras
    from quickstart import digits, small_cnn

    import keras_taylor

    x_train, x_test, y_train, y_test = digits()
    fit = {"batch_size": 64, "verbose": 0}

    def accuracy(model):
        return model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]

    def trained(seed):
        keras.utils.set_random_seed(seed)
        model = small_cnn()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
        model.fit(x_train, y_train, epochs=15, **fit)
        return model

    accuracies = {name: [] for name in ("before", "compress", *WAYS)}
    for seed in range(seeds):
        model = trained(seed)
        accuracies["before"].append(accuracy(model))
        small = keras_taylor.compress(
            model, (x_train, y_train), goal, increment=goal / 3, epochs=EPOCHS // 3, **fit
        )
        accuracies["compress"].append(accuracy(small))
        for name, arguments in WAYS.items():
            prunable = keras_taylor.PrunableModel(model)
            callback = keras_taylor.TaylorPruning(goal, **arguments)
            prunable.fit(x_train, y_train, epochs=EPOCHS, callbacks=[callback], **fit)
            assert prunable.cost()["params"] <= (1 - goal) * prunable.plan.before["params"]
            accuracies[name].append(accuracy(prunable.strip()))
    return {"accuracies": accuracies, "spearman": mixed_precision(model, x_train, y_train)}


def mixed_precision(model, x, y):
    """Spearman correlation, over all units, of scores under a mixed policy with those in float32."""
    import keras
    import numpy as np
    from quickstart import small_cnn

    import keras_taylor

    def ranks(policy):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        try:
            same = small_cnn()
        finally:
            keras.config.set_dtype_policy("float32")
        same.set_weights(model.get_weights())
        same.get_layer(index=-2).rate = 0.0  # dropout: each policy draws its own
        same.compile(keras.optimizers.SGD(0.0), model.loss)
        prunable = keras_taylor.PrunableModel(same)
        prunable.fit(x, y, batch_size=64, shuffle=False, verbose=0)
        scores = np.concatenate(list(prunable.scores.values()))
        return np.argsort(np.argsort(scores))

    reference = ranks("float32")
    policies = ("mixed_bfloat16", "mixed_float16")
    return {p: float(np.corrcoef(reference, ranks(p))[0, 1]) for p in policies}


def row(backend, result):
    means = [100 * sum(values) / len(values) for values in result["accuracies"].values()]
    return [backend, *(f"{m:.1f}" for m in means), *(f"{r:.4f}" for r in result["spearman"].values())]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--goal", type=float, default=0.6)
    arguments = parser.parse_args()
    results = on_each_backend(__file__, arguments.backends, seeds=arguments.seeds, goal=arguments.goal)
    print("# Pruning within one `fit` beside `compress`, and scores under mixed precision\n")
    print(f"The digits CNN, {arguments.goal:.0%} of the parameters removed in {EPOCHS} epochs in all")
    print("(`compress`: three rounds); accuracy in % on 450 test images, mean of")
    print(f"{arguments.seeds} seeds. Spearman correlation of the scores of all units, under mixed")
    print("precision, with those in float32, from one epoch with the same weights.\n")
    print(machine(results), end="\n\n")
    header = ["backend", "before", "compress", *WAYS, "bfloat16", "float16"]
    print(markdown_table(header, [row(b, r) for b, r in results.items()]))


if __name__ == "__main__":
    if not in_process(measure, sys.argv):
        main()
