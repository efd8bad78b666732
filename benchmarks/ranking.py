"""How units are ranked: by score or by score per cost saved, with and without floors for each layer.

    KERAS_BACKEND=torch python benchmarks/ranking.py --jobs 2 > table.md
    KERAS_BACKEND=torch python benchmarks/ranking.py --solver --networks resnet20 transformer

Each network is cut once for each way, and repaired without training. Accuracy on training images that the
network, where it is trained here, did not see, is what defaults are chosen by; that on test images is
reported. Data as in `criteria.py`.
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import sys

import criteria
import numpy as np
from common import machine, markdown_table
from scipy.optimize import linprog

NETWORKS = ["residual", "vgg", "separable", "digits", "transformer", "resnet20"]
CRITERIA = ["log_odds", "taylor", "magnitude"]
GOALS = [*(("params", goal) for goal in (0.3, 0.5, 0.7, 0.9)), ("flops", 0.3), ("flops", 0.5)]
# rank, balance; "layer" is the same share of every group
WAYS = [(rank, balance) for rank in ("score", "cost") for balance in (0.0, 0.25, 0.5)] + [("layer", 1.0)]
NUM_REPAIRED = 512
# goals of the comparison with a solver
SOLVED = [
    *({"params": goal} for goal in (0.3, 0.5, 0.7)),
    *({"flops": 0.5}, {"params": 0.5, "flops": 0.5}, {"params": 0.4, "activation_memory": 0.2}),
]

HEAD = """# Ways to rank units

`KERAS_BACKEND=torch python benchmarks/ranking.py --jobs 2`

"score": units with the lowest scores go first. "cost": those with the lowest scores for what they save of
the goal's cost, counted anew on the way. The number beside it is `balance`: every group keeps at least that
share of what one ratio for all groups ("layer") would leave it. Cut once, repaired on {repaired} training
images, no training after the cut.

Networks: `residual`, `vgg` and `separable` (depthwise separable convolutions), trained on 10,000 images of
Fashion-MNIST; `digits` and `transformer` (`exact=False`), trained on 1,047 digits; `resnet20`, trained on
CIFAR-10. "Held out": 2,000 further training images of Fashion-MNIST, 300 of the digits, and of CIFAR-10
1,000 training images that neither scores nor repair saw, but the network's training. "Test": 4,000, 450
and 1,000 images.
One training a network, OMP_NUM_THREADS=1.
"""


@dataclasses.dataclass
class Case:
    """A trained network and its images.

    Attributes:
        model: The compiled model.
        scored: Images and labels for scores.
        images: Images for repair.
        held_out, test: Images and labels for accuracies.
        exact: As in `make_plan`.
    """

    model: object
    scored: tuple
    images: object
    held_out: tuple
    test: tuple
    exact: bool = True


def separable_net():
    """Six depthwise separable convolutions with BatchNormalization; 304 units."""
    import keras
    from keras import layers

    def normalized(layer, x):
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(layer(x)))

    inputs = keras.Input((28, 28, 1))
    x = normalized(layers.Conv2D(16, 3, 2, padding="same", use_bias=False), inputs)
    for filters, strides in [(32, 1), (48, 2), (48, 1), (64, 1), (64, 1), (32, 1)]:
        x = normalized(layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False), x)
        x = normalized(layers.Conv2D(filters, 1, use_bias=False), x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)), name="separable")


def fashion_case(network, folder):
    import keras

    x, y, x_test, y_test = criteria.fashion_mnist(folder)
    seen, held_out = slice(10000), slice(20000, 22000)
    keras.utils.set_random_seed(0)
    makers = {"residual": criteria.residual_net, "vgg": criteria.vgg_net, "separable": separable_net}
    model, rate = makers[network](), 2e-3 if network == "vgg" else 4e-3
    model.set_weights(criteria.stages_of(model, x[seen], y[seen], 12, rate)["trained"])
    few = slice(1000)
    return Case(
        model, (x[few], y[few]), x[seen], (x[held_out], y[held_out]), (x_test[-4000:], y_test[-4000:])
    )


def digits_case(network):
    import inexact
    import keras
    import quickstart

    keras.utils.set_random_seed(0)
    x, x_test, y, y_test = quickstart.digits()
    held_out, (x, y) = (x[:300], y[:300]), (x[300:], y[300:])
    model = quickstart.small_cnn() if network == "digits" else inexact.transformer()
    criteria.compile_with(model, keras.optimizers.Adam(2e-3))
    model.fit(x, y, epochs=15, batch_size=64, verbose=0)
    return Case(model, (x, y), x, held_out, (x_test, y_test), exact=network == "digits")


def resnet20_case():
    import keras
    import resnet_cifar

    x, y, x_test, y_test = resnet_cifar.images_and_labels(criteria.DATA / "cifar10_4k1k.npz")
    model = keras.models.load_model(criteria.DATA / "resnet20_cifar10.keras", compile=False)
    criteria.compile_with(model, "sgd")
    held_out = x[3000:], y[3000:]
    return Case(model, (x[:1000], y[:1000]), x[1000:3000], held_out, (x_test, y_test))


def case_of(network, folder):
    if network == "resnet20":
        return resnet20_case()
    return digits_case(network) if network in ("digits", "transformer") else fashion_case(network, folder)


def measured(network, arguments):
    """Rows: network, criterion, cost, goal, rank, balance, layer widths, accuracies."""
    import keras_taylor

    case = case_of(network, arguments.fashion)
    before = [criteria.accuracy_of(case.model, *data) for data in (case.held_out, case.test)]
    rows = [[network, "", "", 0, "", 0, 0, *before]]
    report(rows[0])
    for criterion in arguments.criteria:
        scores = keras_taylor.score(
            case.model, case.scored, criterion=criterion, exact=case.exact, batch_size=125
        )
        for what, goal in arguments.goals:
            known = {}
            for rank, balance in WAYS:
                way = {"scope": "layer"} if rank == "layer" else {"rank": rank, "balance": balance}
                selection = keras_taylor.Selection(**way)
                plan = keras_taylor.make_plan(
                    case.model, scores, {what: goal}, selection=selection, exact=case.exact
                )
                key = plan.to_json().partition('"structure"')[0]
                known[key] = known.get(key) or accuracies(case, plan)
                narrowest = min(len(layer.kept) / layer.width for layer in plan.layers.values())
                rows.append([network, criterion, what, goal, rank, balance, narrowest, *known[key]])
                report(rows[-1])
    return rows


def accuracies(case, plan):
    """On held-out and on test images, repaired."""
    import keras_taylor

    small = keras_taylor.prune(case.model, plan)
    repaired = keras_taylor.repair(small, case.model, plan, case.images, num_examples=NUM_REPAIRED)
    return [criteria.accuracy_of(repaired, *data) for data in (case.held_out, case.test)]


def sums_of_scores(network, arguments):
    """Rows: criterion, goal, and the share of all scores that goes with each way to choose, nothing cut."""
    import keras_taylor
    from keras_taylor.budget.costs import CostModel
    from keras_taylor.plans.planning import kept_units
    from keras_taylor.plans.ranking import flatten_scores
    from keras_taylor.reading.groups import label_model

    case = case_of(network, arguments.fashion)
    channels = label_model(case.model, exact=case.exact)
    costs = CostModel(channels)
    for criterion in arguments.criteria:
        scores = keras_taylor.score(
            case.model, case.scored, criterion=criterion, exact=case.exact, batch_size=125
        )
        flat = np.maximum(flatten_scores(channels, scores), 0)
        for goal in SOLVED:
            ceilings = {what: (1 - share) * costs()[what] for what, share in goal.items()}
            lost = []
            for rank in ("score", "cost"):
                selection = keras_taylor.Selection(rank=rank, balance=0)
                plan = keras_taylor.make_plan(case.model, scores, goal, selection=selection, exact=case.exact)
                lost.append(flat[~kept_units(channels, plan)].sum() / flat.sum())
            lost.append(_solved(costs, flat, ceilings) / flat.sum())
            name = " and ".join(f"{what} {share:.0%}" for what, share in goal.items())
            yield [
                network,
                f"`{criterion}`",
                name,
                *("-" if np.isinf(share) else f"{share:.2%}" for share in lost),
            ]


def _solved(costs, flat, ceilings):
    """The least sum of scores by linear programs, each around the solution before; units may go in part."""
    sizes = costs.units_per_group()
    group_of = np.repeat(np.arange(sizes.size), sizes)
    counts, best = sizes.astype(float), np.inf
    for _ in range(30):
        now = costs.group_costs(counts)
        slopes = np.array([costs.group_costs.gradient(counts, what) for what in ceilings])
        excess = [now[what] - most for what, most in ceilings.items()] + slopes @ (sizes - counts)
        found = linprog(flat / flat.mean(), -slopes[:, group_of], -excess, bounds=(0, 1), method="highs")
        if found.status != 0:
            break
        solution = np.maximum(sizes - np.bincount(group_of, found.x), 1)
        if all(costs.group_costs(solution)[what] <= 1.002 * most for what, most in ceilings.items()):
            best = min(best, flat @ found.x)
        counts = (counts + solution) / 2
    return best


def report(row):
    print(json.dumps(row), file=sys.stderr, flush=True)


def tables(rows):
    """Markdown: means over networks, then every accuracy."""
    befores = {row[0]: row[7:] for row in rows if not row[1]}
    cut = [row for row in rows if row[1]]
    names = [f"{rank} {balance:g}" for rank, balance in WAYS]
    parts = []
    for number, title in enumerate(("held-out", "test")):
        lines = []
        for criterion in dict.fromkeys(row[1] for row in cut):
            for goal in dict.fromkeys((row[2], row[3]) for row in cut):
                means = []
                for way in WAYS:
                    found = [
                        row[7 + number] - befores[row[0]][number]
                        for row in cut
                        if row[1] == criterion and (row[2], row[3]) == goal and (row[4], row[5]) == way
                    ]
                    means.append(f"{100 * sum(found) / len(found):.1f}")
                lines.append([f"`{criterion}`", f"{goal[0]} {goal[1]:.0%}", *means])
        parts += [
            f"## Change of accuracy in points, mean over the networks, {title} images",
            markdown_table(["criterion", "goal", *names], lines),
        ]
    parts.append("## Accuracy on test images")
    for network, before in befores.items():
        lines = []
        for criterion in dict.fromkeys(row[1] for row in cut):
            for goal in dict.fromkeys((row[2], row[3]) for row in cut):
                own = [r for r in cut if (r[0], r[1], (r[2], r[3])) == (network, criterion, goal)]
                cells = [f"{row[8]:.1%}" for row in own]
                lines.append([f"`{criterion}`", f"{goal[0]} {goal[1]:.0%}", *cells])
        parts += [
            f"### {network}: {before[1]:.1%} before",
            markdown_table(["criterion", "goal", *names], lines),
        ]
    return "\n\n".join(parts)


def goal_of(text):
    """("params", 0.3) of "params=0.3"."""
    what, _, share = text.partition("=")
    return what, float(share)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--goals", type=goal_of, nargs="+", default=GOALS)
    parser.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist", help="folder of idx files")
    parser.add_argument("--jobs", type=int, default=1, help="networks measured at a time, a process each")
    parser.add_argument("--solver", action="store_true", help="compare sums of scores only, cut nothing")
    parser.add_argument("--rows", nargs="+", help="files of rows as on standard error, in place of measuring")
    arguments = parser.parse_args()
    if arguments.solver:
        rows = [row for network in arguments.networks for row in sums_of_scores(network, arguments)]
        header = ["network", "criterion", "goal", "by score", "by cost", "linear programs"]
        print(markdown_table(header, rows))
        return
    if arguments.rows:
        lines = [line for path in arguments.rows for line in pathlib.Path(path).read_text().splitlines()]
        rows = [json.loads(line) for line in lines if line.startswith("[")]
    else:
        tasks = [(network, arguments) for network in arguments.networks]
        with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
            rows = [row for part in pool.starmap(measured, tasks, chunksize=1) for row in part]
    print(HEAD.format(repaired=NUM_REPAIRED))
    print(machine(["torch"]), end="\n\n")
    print(tables([[*row[:4], row[4], row[5], *row[6:]] for row in rows]))


if __name__ == "__main__":
    main()
