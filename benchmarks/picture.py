"""Draws README's picture, accuracy against parameters, from the table that `peers.py` measured.

python benchmarks/picture.py
"""

import pathlib
import re

import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parents[1]
UNTOUCHED = 91.5  # % of the 1000 test images
SHOWN = {
    "keras_taylor, log_odds": ("keras_taylor, repaired", "repaired", "o"),
    "Torch-Pruning, LAMP": ("Torch-Pruning, LAMP, statistics renewed", "statistics", "s"),
    "Torch-Pruning, magnitude": ("Torch-Pruning, magnitude, statistics renewed", "statistics", "^"),
}


def rows_of(text):
    """The rows of the first table of a page, as dicts."""
    lines = [line for line in text.splitlines() if re.match(r"\|.*\|$", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells if row[0] == "resnet20"]


def main():
    rows = rows_of((ROOT / "benchmarks/results/peers.md").read_text("utf-8"))
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for chosen_by, (label, column, marker) in SHOWN.items():
        points = {
            float(row["parameters gone"].rstrip("%")): float(row[column].rstrip("%"))
            for row in rows
            if row["chosen by"] == chosen_by
            and row["goal"] == "params"
            and row[column]
            and not row["fine-tuned"]
        }
        x = [0.0, *sorted(points)]
        axes.plot(x, [UNTOUCHED, *(points[share] for share in x[1:])], marker=marker, label=label)
    axes.set(xlabel="parameters gone, %", ylabel="accuracy, %", xlim=(0, 55), ylim=(0, 100))
    axes.set_title("ResNet-20, CIFAR-10: cut once, no training step", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize=8)
    figure.savefig(ROOT / "docs/assets/accuracy.png", dpi=110)


if __name__ == "__main__":
    main()
