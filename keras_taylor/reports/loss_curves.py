"""The loss as a growing share of each group goes: what a sensitivity scan has measured."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from keras_taylor.support.console import render_table


@dataclasses.dataclass(frozen=True, eq=False)
class LossCurve:
    """What one group costs and saves, at each of the scan's fractions.

    Attributes:
        order: The group's units, an int array `(num_units,)`: the first goes first.
        num_gone: How many of them are gone, an int array `(num_fractions,)`: the fraction, rounded; one
            unit always stays.
        values: Arrays `(num_fractions,)` by name: the "loss" and the compiled metrics, or the
            "divergence".
        saved: Arrays `(num_fractions,)`: the "params" and the "flops" that are saved; `None` for FLOPs
            that are unknown.
    """

    order: np.ndarray
    num_gone: np.ndarray
    values: Mapping[str, np.ndarray]
    saved: Mapping[str, np.ndarray | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """Which layers, and how much of them: a curve for each group; `print(sensitivity)` is a table.

    Attributes:
        measure: "loss", the compiled one on labels, without regularizers; or "divergence", where there
            are no labels: of the predictions from the whole model's, in nats for classes, the relative
            squared difference for numbers.
        whole: The values of the whole model, by name.
        fractions: The shares of each group that were taken out.
        curves: For each group of two units or more, by name, its `LossCurve`.
        num_examples: On how many examples it was measured.
        criterion: What ordered the units of each group: the least important go first.
        max_increase: The increase of the loss up to which units count as dispensable: 0.05 of a
            cross-entropy or divergence, a tenth of any other loss.
    """

    measure: str
    whole: Mapping[str, float]
    fractions: tuple
    curves: Mapping[str, LossCurve]
    num_examples: int
    criterion: str
    max_increase: float

    def increase(self, name):
        """By how much the loss of a group grows at each fraction, an array `(num_fractions,)`."""
        return self.curves[name].values[self.measure] - self.whole[self.measure]

    def num_dispensable(self, max_increase=None):
        """How many units of each group can go while the loss grows by no more than that.

        Args:
            max_increase: The largest increase of the loss; `None`: the attribute's.

        Returns:
            A dict: group name -> the units gone at the largest fraction up to which none costs more.
        """
        most = self.max_increase if max_increase is None else max_increase
        found = {}
        for name, curve in self.curves.items():
            within = np.append(self.increase(name) <= most, False)
            found[name] = int(np.append(0, curve.num_gone)[np.argmin(within)])
        return found

    def table(self, what=None):
        """A table of groups and fractions, as text.

        Args:
            what: The loss, or the name of a compiled metric, such as "accuracy"; `None`: the loss.

        Raises:
            ValueError: for a metric that was not measured.
        """
        what = self.checked(what)
        table = Table(title=self._headline(what))
        table.add_column("group", overflow="fold")
        for fraction in self.fractions:
            table.add_column(f"{100 * fraction:.3g} %", justify="right")
        for column in ("can go", "parameters"):
            table.add_column(column, justify="right")
        for name, num in self.num_dispensable().items():
            curve = self.curves[name]
            saved = np.append(0, curve.saved["params"])[np.searchsorted(np.append(0, curve.num_gone), num)]
            values = [f"{value:.3g}" for value in curve.values[what]]
            table.add_row(name, *values, f"{num} of {len(curve.order)}", f"{saved:,}")
        return render_table(table, width=64 + 9 * len(self.fractions))

    def checked(self, what):
        """The name of a value that was measured, the loss for `None`; refuses others."""
        if what is None:
            return self.measure
        if what not in self.whole:
            raise ValueError(
                f"Expected what was measured: {', '.join(map(repr, self.whole))}. Received: what={what!r}"
            )
        return what

    def to_dict(self):
        """Everything as numbers, strings, lists and dicts."""

        def plain(value):
            if isinstance(value, np.ndarray):
                return value.tolist()
            return {k: plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value

        content = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        content["curves"] = {
            name: {f.name: plain(getattr(curve, f.name)) for f in dataclasses.fields(curve)}
            for name, curve in self.curves.items()
        }
        return {**content, "num_dispensable": self.num_dispensable()}

    def _headline(self, what):
        return (
            f"{what} on {self.num_examples:,} examples without a share of one group, units in the order of "
            f"'{self.criterion}'; whole: {self.whole[what]:.4g}; can go: {self.measure} at most "
            f"{self.max_increase:.2g} larger"
        )

    def __str__(self):
        return self.table()
