"""What float32 sums of scores over steps and replicas lose, up to 1,024 replicas: a simulation.

    python benchmarks/score_reduction.py > benchmarks/results/score_reduction.md

Numbers are drawn, nothing is trained; NumPy alone.
"""

import argparse
import sys
import time

import numpy as np
from common import machine, markdown_table

FOLD = 256  # steps between two transfers to float64, as in `keras_taylor.scores.scoring_passes`
# In which order replicas are added, how often that is done, whether sums move to float64, and in what.
WAYS = {
    "sequential": ("sequential", "step", True, "float32"),
    "ring": ("ring", "step", True, "float32"),
    "tree": ("tree", "step", True, "float32"),
    "tree, every 256 steps": ("tree", "fold", True, "float32"),
    "ring, never float64": ("ring", "step", False, "float32"),
    "ring in bfloat16": ("ring", "step", True, "bfloat16"),
}
ALONE = ["sequential", "ring, never float64"]  # what differs where there is one replica

HEAD = """# Sums of scores over replicas

A simulation. {units} units, {steps} steps; a summand is what one replica's batch adds to a unit's
statistic, a float32 number. "Squares": positive and heavy-tailed, exp(N(0, 1.5)), times the unit's scale
exp(N(0, 1)). "Signed": sums that cancel, N(0, 1) exp(N(0, 1)) with a mean of 0.01 N(0, 1), times the unit's
scale. Replicas are added up in each step (unless the table says "every 256 steps"), steps in float32, and
every 256 steps the sum moves to float64. The reference is the float64 sum of the same summands. Errors: of
a unit's sum, relative to itself (in brackets: to the sum of the summands' absolute values). "Cut": how many
of the {cut} units that a cut of 30 % by the absolute sum takes are others than those by the reference.
"Halves": how many are others if float64 sums of the even steps decide instead of those of the odd ones:
what chance in the data does.
"""


def draw(kind, scales, means, replicas, random):
    """Summands of one step: float32, `(replicas, units)`."""
    shape = (replicas, len(scales))
    normal = random.standard_normal(shape, np.float32)
    if kind == "squares":
        return np.exp(np.float32(1.5) * normal) * scales
    return (normal * np.exp(random.standard_normal(shape, np.float32)) + means) * scales


def add_up(x, order, dtype="float32"):
    """The sum over the first axis, rounded after every addition."""
    rounded = to_bfloat16 if dtype == "bfloat16" else lambda a: a
    x = rounded(x)
    replicas, units = x.shape
    if order == "tree":
        while len(x) > 1:
            rest = x[len(x) // 2 * 2 :]
            x = np.concatenate([rounded(x[: len(x) // 2 * 2 : 2] + x[1::2]), rest])
        return x[0]
    # a ring: the vector lies in as many chunks as replicas, each starts at the next one
    start = np.arange(units) * replicas // units if order == "ring" else np.zeros(units, int)
    columns = np.arange(units)
    total = x[start, columns]
    for k in range(1, replicas):
        row = x[(start + k) % replicas, columns] if order == "ring" else x[k]
        total = rounded(total + row)
    return total


def to_bfloat16(x):
    """float32 numbers rounded to the next ones with eight bits of precision."""
    bits = x.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


class Sum:
    """A sum over steps in one of the `WAYS`."""

    def __init__(self, way, replicas, units):
        self.order, self.when, self.folds, self.dtype = WAYS[way]
        self.total = np.zeros(units)
        rows = replicas if self.when == "fold" else 1
        self.running = np.zeros((rows, units), np.float32)

    def add(self, x, step):
        """Adds the summands of a step."""
        self.running += x if self.when == "fold" else add_up(x, self.order, self.dtype)
        if self.folds and step % FOLD == FOLD - 1:
            self.fold()

    def fold(self):
        """Moves the float32 sum into float64."""
        self.total += add_up(self.running, self.order, self.dtype)
        self.running[:] = 0


def simulated(kind, replicas, units, steps):
    """Rows of the table for a kind of summand and a number of replicas."""
    random = np.random.default_rng([replicas, kind == "signed"])
    scales = np.exp(random.standard_normal(units)).astype(np.float32)
    means = (0.01 * random.standard_normal(units)).astype(np.float32)
    sums = {way: Sum(way, replicas, units) for way in (WAYS if replicas > 1 else ALONE)}
    halves, absolute = np.zeros((2, units)), np.zeros(units)
    for step in range(steps):
        x = draw(kind, scales, means, replicas, random)
        halves[step % 2] += x.sum(0, dtype=np.float64)
        absolute += np.abs(x).sum(0, dtype=np.float64)
        for one in sums.values():
            one.add(x, step)
    exact = halves.sum(0)
    chance = otherwise(*halves)
    for way, one in sums.items():
        one.fold()
        error = np.abs(one.total - exact)
        cells = [f"{np.median(error / np.abs(exact)):.0e}", f"{(error / np.abs(exact)).max():.0e}"]
        if kind == "signed":
            cells[1] += f" ({(error / absolute).max():.0e})"
        name = "one device" + (", never float64" if "never" in way else "") if replicas == 1 else way
        less = 1 - spearman(one.total, exact)
        yield [
            kind,
            str(replicas),
            name,
            *cells,
            f"{less:.0e}",
            str(otherwise(one.total, exact)),
            str(chance),
        ]


def ranks(values):
    return np.argsort(np.argsort(np.abs(values)))


def spearman(first, second):
    """Rank correlation; exact integers, so that hardly different orders show."""
    first, second = ranks(first), ranks(second)
    n = len(first)
    return 1 - 6 * int(np.square(first - second).sum()) / (n * (n * n - 1))


def otherwise(first, second, part=0.3):
    """How many units one cut takes and the other does not."""
    number = int(part * len(first))
    return int(((ranks(first) < number) & (ranks(second) >= number)).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 64, 1024])
    parser.add_argument("--units", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=512)
    arguments = parser.parse_args()
    units, rows = arguments.units, []
    for kind in ("squares", "signed"):
        for replicas in arguments.replicas:
            start = time.perf_counter()
            rows += simulated(kind, replicas, units, arguments.steps)
            print(kind, replicas, f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(HEAD.format(units=units, steps=arguments.steps, cut=int(0.3 * units)))
    print(machine([]), end="\n\n")
    header = [
        "summands",
        "replicas",
        "order",
        "median error",
        "largest error",
        "1 - Spearman",
        "cut",
        "halves",
    ]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
