"""Every criterion against the true loss change of removing each unit, and the accuracy it leaves.

    KERAS_BACKEND=torch python benchmarks/criteria.py --jobs 2 --plot benchmarks/results/criteria.png

Fashion-MNIST comes from the folder of the Debian package dataset-fashion-mnist, ResNet-20 and CIFAR-10 from
the folder that KERAS_TAYLOR_DATA names, the digits from scikit-learn.
"""

import argparse
import dataclasses
import gzip
import multiprocessing
import os
import pathlib
import sys
import time

from common import machine, markdown_table

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
DATA = pathlib.Path(os.environ.get("KERAS_TAYLOR_DATA", ROOT.parent / "shared" / "data"))
NETWORKS = ["residual", "vgg", "digits", "resnet20"]
GOALS = [0.3, 0.5]
STAGES = {"early": 0.80, "half": 0.88}  # accuracy on training images
MIN_UNITS = 4  # of a group that counts within layers

HEAD = """# Criteria against the true loss change

`python benchmarks/criteria.py --jobs 2 --plot benchmarks/results/criteria.png`

"Oracle" is the mean loss without a unit minus the mean loss with it, unit by unit, on the images that the
criterion sees too. Networks: `residual`, five blocks with BatchNormalization, and `vgg`, five convolutions
and a dense layer without it, both trained on {trained} images of Fashion-MNIST, seen when the accuracy on
1000 of them reaches {early:.0%} and {half:.0%}, and at the end of the same training; `digits`, the network of
`examples/quickstart.py`, trained; `resnet20`, trained on CIFAR-10. Images are training images, "held out"
those that no training saw; accuracy is that on them. A harmful unit: the loss is lower without it.
`taylor_batch` has batches of 32. One training a network, OMP_NUM_THREADS=1.
"""

NOTE = """`sensitivity` is a score per parameter saved, with the layers that read a unit refitted: it is not
meant to rank as the oracle does. `random` is one draw. A dash: no group has what the criterion needs.
"""

REMOVAL = """## Accuracy after removing many units at once

A share of the parameters in one shot, by the scores above; repair on 512 training images, without labels.
"""

MEASURES = {
    "spearman": "Spearman's rank correlation with the oracle, over all units",
    "within": "Spearman's rank correlation within a layer, mean over layers (groups of 4 units or more)",
    "kendall": "Kendall's rank correlation, over all units",
    "pearson": "Pearson's correlation, over all units",
}


@dataclasses.dataclass
class Case:
    """A network in one state, and images to score its units on.

    Attributes:
        network, stage: What it is called.
        model: The compiled model.
        data: Images and labels that criteria and oracle see.
        test: Images and labels for accuracies after removal; `None`: nothing is removed.
        images: Training images, for repair after removal.
    """

    network: str
    stage: str
    model: object
    data: tuple
    test: tuple | None = None
    images: object = None

    @property
    def name(self):
        return f"{self.network} {self.stage}"


def fashion_mnist(folder):
    """Images and labels of the training and of the test set."""
    arrays = []
    for part in ("train", "t10k"):
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
            arrays.append(_idx(pathlib.Path(folder) / f"{part}-{kind}-ubyte.gz", offset))
    x_train, y_train, x_test, y_test = arrays
    x_train, x_test = (
        ((x.reshape(-1, 28, 28, 1) / 255 - 0.28) / 0.35).astype("float32") for x in (x_train, x_test)
    )
    return x_train, y_train.astype("int32"), x_test, y_test.astype("int32")


def _idx(path, offset):
    import numpy as np

    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=offset)


def residual_net():
    """Five residual blocks on maps of 14 x 14 and 7 x 7, with BatchNormalization; 160 units."""
    import keras
    from keras import layers

    def normalized(x, filters, kernel=3, strides=1):
        x = layers.Conv2D(filters, kernel, strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    inputs = keras.Input((28, 28, 1))
    x = layers.ReLU()(normalized(inputs, 16, strides=2))
    for inner, outer, strides in [(16, 16, 1), (16, 16, 1), (32, 32, 2), (32, 32, 1), (16, 32, 1)]:
        shortcut = x if strides == 1 else normalized(x, outer, 1, strides)
        h = layers.ReLU()(normalized(x, inner, strides=strides))
        x = layers.ReLU()(layers.Add()([shortcut, normalized(h, outer)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x), name="residual")


def vgg_net():
    """Five convolutions and a dense layer, without BatchNormalization; 160 units."""
    import keras
    from keras import layers

    stack = [keras.Input((28, 28, 1))]
    for number, filters in enumerate((16, 16, 32, 32, 32)):
        strides = 2 if number == 0 else 1
        arguments = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
        stack.append(layers.Conv2D(filters, 3, strides, **arguments))
        if number in (1, 3):
            stack.append(layers.MaxPooling2D())
    stack += [layers.Flatten(), layers.Dense(32, "relu"), layers.Dense(10)]
    return keras.Sequential(stack, name="vgg")


def stages_of(model, x, y, epochs, rate):
    """Trains; weights when the training accuracy first reaches that of each stage, and at the end."""
    import keras

    found = {}

    def look(batch, logs=None):
        waited_for = [stage for stage in STAGES if stage not in found]
        if waited_for and batch % 20 == 19:
            accuracy = accuracy_of(model, x[:1000], y[:1000])
            for stage in waited_for:
                if accuracy >= STAGES[stage]:
                    found[stage] = model.get_weights()

    steps = epochs * -(-len(x) // 64)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 25, int(0.8 * steps), warmup_target=rate, warmup_steps=int(0.2 * steps)
    )
    compile_with(model, keras.optimizers.AdamW(schedule, weight_decay=1e-2))
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=[callback])
    found["trained"] = model.get_weights()
    return found


def compile_with(model, optimizer):
    import keras

    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def accuracy_of(model, x, y):
    import keras

    logits = [model(x[k : k + 250], training=False) for k in range(0, len(x), 250)]
    guesses = [keras.ops.convert_to_numpy(part).argmax(1) for part in logits]
    return sum((guess == y[250 * k : 250 * (k + 1)]).sum() for k, guess in enumerate(guesses)) / len(x)


def fashion_cases(network, data, num_trained, num_scored, epochs):
    """The stages of one training, on training images and, for the residual network, on others."""
    import keras

    x, y, x_test, y_test = data
    x, y = x[:num_trained], y[:num_trained]
    train, held_out = (x[:num_scored], y[:num_scored]), (x_test[:num_scored], y_test[:num_scored])
    keras.utils.set_random_seed(0)
    model, rate = (residual_net(), 4e-3) if network == "residual" else (vgg_net(), 2e-3)
    stages = stages_of(model, x, y, epochs, rate)
    for stage, weights in stages.items():
        model.set_weights(weights)
        report(f"{network} {stage}: train {accuracy_of(model, x, y):.4f}")
        if network == "residual":
            test = (x_test[-4000:], y_test[-4000:]) if stage == "trained" else None
            yield Case(network, stage, model, train, test, x)
            yield Case(network, f"{stage}, held out", model, held_out)
        elif stage != "early":
            yield Case(network, stage, model, train)


def digits_case():
    import keras
    import quickstart

    keras.utils.set_random_seed(0)
    x, x_test, y, y_test = quickstart.digits()
    model = quickstart.small_cnn()
    compile_with(model, keras.optimizers.Adam(2e-3))
    model.fit(x, y, epochs=15, batch_size=64, verbose=0)
    return Case("digits", "trained", model, (x, y), (x_test, y_test), x)


def resnet20_case(num_scored):
    import keras
    import resnet_cifar

    x, y, x_test, y_test = resnet_cifar.images_and_labels(DATA / "cifar10_4k1k.npz")
    model = keras.models.load_model(DATA / "resnet20_cifar10.keras", compile=False)
    compile_with(model, "sgd")
    few = slice(None, None, len(x) // num_scored)
    return Case("resnet20", "trained", model, (x[few], y[few]), (x_test, y_test), x)


def cases(network, arguments):
    """All cases of a network; the model of a case holds its weights until the next one is asked for."""
    num_trained, num_scored, epochs, num_cifar = sizes(arguments.quick)
    if network == "digits":
        return [digits_case()]
    if network == "resnet20":
        return [resnet20_case(num_cifar)]
    return fashion_cases(network, fashion_mnist(arguments.fashion), num_trained, num_scored, epochs)


def sizes(quick):
    """Images trained on, images scored on, epochs, images of CIFAR-10 scored on."""
    return (2000, 100, 10, 20) if quick else (10000, 1000, 12, 250)


def all_criteria():
    """Criteria by name, all but the oracle."""
    from keras_taylor.scores import criteria

    named = {
        name: name
        for name in criteria.LOSS_CRITERIA | criteria.ACTIVATION_CRITERIA | criteria.DATA_FREE_CRITERIA
        if name != "oracle"
    }
    return named | {"taylor_abs_normalized": criteria.taylor_abs_normalized}


def compute_scores(case):
    """Scores and seconds by criterion, the oracle first."""
    import keras

    import keras_taylor

    scores, seconds = {}, {}
    for name, criterion in {"oracle": "oracle", **all_criteria()}.items():
        keras.utils.set_random_seed(0)
        start = time.perf_counter()
        batch_size = 32 if name == "taylor_batch" else 250
        scores[name] = keras_taylor.score(case.model, case.data, criterion=criterion, batch_size=batch_size)
        seconds[name] = time.perf_counter() - start
        report(f"{case.name}: {name}, {seconds[name]:.1f} s")
    return scores, seconds


def correlations(scores, oracle):
    """The four measures of MEASURES; `None` where no group has scores."""
    import numpy as np
    from scipy import stats

    if not scores:
        return dict.fromkeys(MEASURES)
    groups = [(scores[name], oracle[name]) for name in scores]
    both = [np.concatenate(side) for side in zip(*groups, strict=True)]
    within = [stats.spearmanr(*pair).statistic for pair in groups if len(pair[0]) >= MIN_UNITS]
    return {
        "spearman": stats.spearmanr(*both).statistic,
        "within": np.mean(within),
        "kendall": stats.kendalltau(*both).statistic,
        "pearson": stats.pearsonr(*both).statistic,
    }


def removals(case, scores):
    """Accuracies by criterion: for each goal of the cut model, then repaired."""
    import keras_taylor

    found = {}
    for name, some in scores.items():
        if not some:
            continue
        found[name] = []
        for goal in GOALS:
            selection = keras_taylor.Selection(rank="score", balance=0)
            plan = keras_taylor.make_plan(case.model, some, goal, selection=selection)
            small = keras_taylor.prune(case.model, plan)
            repaired = keras_taylor.repair(small, case.model, plan, case.images, num_examples=512)
            found[name] += [accuracy_of(one, *case.test) for one in (small, repaired)]
        report(f"{case.name}: removed by {name}: " + " ".join(f"{a:.1%}" for a in found[name]))
    return found


def described(case, scores, seconds):
    """A row about the case: images, accuracy on them, units, those that harm, seconds."""
    import numpy as np

    changes = np.concatenate(list(scores["oracle"].values()))
    accuracy = accuracy_of(case.model, *case.data)
    numbers = len(case.data[0]), f"{accuracy:.1%}", changes.size, (changes < 0).sum()
    return [case.name, *map(str, numbers), f"{seconds['oracle']:.0f}"]


def correlation_table(found, measure):
    """Rows: criteria; columns: cases."""
    names = list(next(iter(found.values())))
    rows = [[f"`{name}`", *(_number(one[name][measure]) for one in found.values())] for name in names]
    return markdown_table(["criterion", *found], rows)


def _number(value):
    return "-" if value is None else f"{value:.3f}"


def seconds_table(seconds):
    """Rows: criteria; columns: cases."""
    names = list(next(iter(seconds.values())))
    rows = [[f"`{name}`", *(f"{one[name]:.1f}" for one in seconds.values())] for name in names]
    return markdown_table(["criterion", *seconds], rows)


def removal_table(found):
    """Rows: criteria; columns: goals, cut and repaired."""
    header = ["criterion", *(f"{goal:.0%} {state}" for goal in GOALS for state in ("cut", "repaired"))]
    rows = [[f"`{name}`", *(f"{a:.1%}" for a in accuracies)] for name, accuracies in found.items()]
    return markdown_table(header, rows)


def plot(found, path):
    """Dots: Spearman's correlation of each criterion, one column a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(next(iter(found.values())))
    colors = plt.get_cmap("viridis")
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for number, (case, values) in enumerate(found.items()):
        shift = 0.7 * (number / max(len(found) - 1, 1) - 0.5)
        dots = [(k + shift, values[n]["spearman"]) for k, n in enumerate(names)]
        dots = [dot for dot in dots if dot[1] is not None]
        marker = "o" if "held out" not in case else "^"
        color = colors(number / len(found))
        axes.plot(*zip(*dots, strict=True), marker, color=color, label=case, markersize=5)
    for edge in range(1, len(names)):
        axes.axvline(edge - 0.5, color="0.85", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel("Spearman's correlation with the true loss change")
    axes.grid(axis="y", color="0.9")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100)


def report(line):
    print(line, file=sys.stderr, flush=True)


def measured(network, arguments):
    """What is known of a network's cases: rows about them; by case correlations, seconds, accuracies."""
    about, found, seconds, removed = [], {}, {}, {}
    for case in cases(network, arguments):
        scores, took = compute_scores(case)
        oracle = scores["oracle"]
        about.append(described(case, scores, took))
        found[case.name] = {n: correlations(s, oracle) for n, s in scores.items() if n != "oracle"}
        for name, numbers in found[case.name].items():
            report(f"{case.name}: {name}: " + " ".join(map(_number, numbers.values())))
        if case.test is not None:
            seconds[case.name] = took
            before = accuracy_of(case.model, *case.test)
            title = f"{case.name}: accuracy on {len(case.test[0])} test images, {before:.1%} before"
            removed[title] = removals(case, scores)
    return about, found, seconds, removed


def of_all(arguments):
    """`measured` of all networks, joined."""
    tasks = [(network, arguments) for network in arguments.networks]
    if arguments.jobs == 1:
        parts = [measured(*task) for task in tasks]
    else:
        with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
            parts = pool.starmap(measured, tasks, chunksize=1)
    abouts, *tables = zip(*parts, strict=True)
    joined = [{name: row for table in several for name, row in table.items()} for several in tables]
    return [row for about in abouts for row in about], *joined


def document(arguments, about, found, seconds, removed):
    """The Markdown document."""
    import keras

    parts = [
        HEAD.format(trained=sizes(arguments.quick)[0], **STAGES),
        machine([keras.backend.backend()]),
        markdown_table(["case", "images", "accuracy", "units", "harmful units", "oracle s"], about),
    ]
    for measure, title in MEASURES.items():
        parts += [f"## {title}", correlation_table(found, measure)]
    parts += [NOTE, "## Seconds of a score", seconds_table(seconds), REMOVAL]
    for title, accuracies in removed.items():
        parts += [f"### {title}", removal_table(accuracies)]
    return "\n\n".join(part.strip() for part in parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist", help="folder of idx files")
    parser.add_argument("--jobs", type=int, default=1, help="networks measured at a time, a process each")
    parser.add_argument("--plot", help="where to write the plot, PNG")
    parser.add_argument("--quick", action="store_true", help="few images, to try the script")
    arguments = parser.parse_args()
    results = of_all(arguments)
    print(document(arguments, *results))
    if arguments.plot:
        plot(results[1], arguments.plot)


if __name__ == "__main__":
    main()
