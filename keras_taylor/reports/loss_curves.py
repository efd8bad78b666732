"""The loss as a growing share of each group is removed: the result of a sensitivity scan."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from keras_taylor.support.console import render_table
from keras_taylor.support.types import FloatArray, IntArray


@dataclasses.dataclass(frozen=True, eq=False)
class LossCurve:
    """What the removal of a share of one group costs and saves, at each fraction of the scan.

    Attributes:
        order: The group's units, an int array `(num_units,)`. The first one is removed first.
        num_gone: How many units are removed at each fraction, an int array `(num_fractions,)`: the
            rounded share of the group. One unit always stays.
        values: Name -> a float array `(num_fractions,)`: the "loss" and the compiled metrics, or the
            "divergence" (see `Sensitivity.measure`), without these units.
        saved: Cost -> an int array `(num_fractions,)`: what the removal saves in "params", "flops" (of
            one example) and "activation_memory" (bytes); `None` if it is unknown.

    Example:

    >>> sensitivity = keras_taylor.analyze(model, (x, y), fractions=(0.25, 0.5)).sensitivity
    >>> curve = next(iter(sensitivity.curves.values()))
    >>> len(curve.num_gone), len(curve.values["loss"]), len(curve.saved["params"])
    (2, 2, 2)
    """

    order: IntArray
    num_gone: IntArray
    values: Mapping[str, FloatArray]
    saved: Mapping[str, IntArray | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much each group of channels matters to the loss. `print(sensitivity)` shows a table.

    A sensitivity scan (Han et al. 2015, arXiv 1506.02626; Li et al. 2017, arXiv 1608.08710): the loss is
    measured while a growing share of one group is removed and everything else stays.

    Attributes:
        measure: "loss" for data with labels: the compiled loss without regularizers. "divergence" for
            data without labels: how far the predictions move from those of the whole model. It is the
            Kullback-Leibler divergence in nats for classes, and the relative squared difference for
            numbers.
        baseline: Name -> float: the measure and the compiled metrics of the whole model.
        fractions: The shares of each group that were removed, a tuple of floats in ascending order.
        curves: Group name -> its `LossCurve`, for each group of two units or more that the criterion
            can judge.
        num_examples: The number of examples that were measured, an int.
        criterion: The name of the criterion that ordered the units of each group.
        max_increase: The increase of the loss up to which units count as dispensable, a float: 0.05 nats
            of a cross-entropy or divergence, a tenth of any other loss.

    Example:

    >>> sensitivity = keras_taylor.analyze(model, (x, y)).sensitivity
    >>> print(sensitivity)
    >>> list(sensitivity.num_dispensable()) == list(sensitivity.curves)
    True
    """

    measure: str
    baseline: Mapping[str, float]
    fractions: tuple[float, ...]
    curves: Mapping[str, LossCurve]
    num_examples: int
    criterion: str
    max_increase: float

    def increase(self, name: str) -> FloatArray:
        """How much the loss grows without a share of one group.

        Args:
            name: The name of the group, a key of `curves`.

        Returns:
            A float array `(num_fractions,)`; negative where the loss becomes smaller.

        Example:

        >>> sensitivity = keras_taylor.analyze(model, (x, y)).sensitivity
        >>> name = next(iter(sensitivity.curves))
        >>> sensitivity.increase(name).shape
        (9,)
        """
        return self.curves[name].values[self.measure] - self.baseline[self.measure]

    def num_dispensable(self, max_increase: float | None = None) -> dict[str, int]:
        """How many units of each group can be removed before the loss grows too much.

        Args:
            max_increase: The largest increase of the loss, a float; `None`: the attribute `max_increase`.

        Returns:
            Group name -> the number of units removed at the largest fraction for which no smaller
            fraction, nor itself, increases the loss by more.

        Example:

        >>> sensitivity = keras_taylor.analyze(model, (x, y)).sensitivity
        >>> sensitivity.num_dispensable(max_increase=0.02)
        {...}
        """
        limit = self.max_increase if max_increase is None else max_increase
        dispensable = {}
        for name, curve in self.curves.items():
            within = np.append(self.increase(name) <= limit, False)
            dispensable[name] = int(np.append(0, curve.num_gone)[np.argmin(within)])
        return dispensable

    def table(self, metric: str | None = None) -> str:
        """A table of groups and fractions, as text.

        Args:
            metric: The name of a compiled metric, such as "accuracy"; `None`: the loss.

        Returns:
            The table, a string. The column "can go" shows `num_dispensable`, and "parameters" what that
            saves.

        Raises:
            ValueError: for a metric that was not measured.

        Example:

        >>> print(keras_taylor.analyze(model, (x, y)).sensitivity.table())
        """
        metric = self.resolve_metric(metric)
        table = Table(title=self._headline(metric))
        table.add_column("group", overflow="fold")
        for fraction in self.fractions:
            table.add_column(f"{100 * fraction:.3g} %", justify="right")
        for column in ("can go", "parameters"):
            table.add_column(column, justify="right")
        for name, num in self.num_dispensable().items():
            curve = self.curves[name]
            params = curve.saved["params"]
            assert params is not None, "parameters can always be counted"
            saved = np.append(0, params)[np.searchsorted(np.append(0, curve.num_gone), num)]
            values = [f"{value:.3g}" for value in curve.values[metric]]
            table.add_row(name, *values, f"{num} of {len(curve.order)}", f"{saved:,}")
        return render_table(table, width=64 + 9 * len(self.fractions))

    def resolve_metric(self, metric: str | None) -> str:
        """The name of a value that was measured.

        Args:
            metric: The name; `None`: the measure.

        Returns:
            The name, a string.

        Raises:
            ValueError: for a metric that was not measured.

        Example:

        >>> keras_taylor.analyze(model, (x, y), verbose=0).sensitivity.resolve_metric(None)
        'loss'
        """
        if metric is None:
            return self.measure
        if metric not in self.baseline:
            raise ValueError(
                f"Expected a metric that was measured: {', '.join(map(repr, self.baseline))}. "
                f"Received: metric={metric!r}"
            )
        return metric

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, with "num_dispensable" for each group.

        Example:

        >>> keras_taylor.analyze(model, (x, y), verbose=0).sensitivity.to_dict()["measure"]
        'loss'
        """
        content = {f.name: _as_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        content["curves"] = {
            name: {f.name: _as_plain(getattr(curve, f.name)) for f in dataclasses.fields(curve)}
            for name, curve in self.curves.items()
        }
        return {**content, "num_dispensable": self.num_dispensable()}

    def _headline(self, metric: str) -> str:
        return (
            f"{metric} on {self.num_examples:,} examples when a share of one group is removed, the least "
            f"important units by '{self.criterion}' first; whole model: {self.baseline[metric]:.4g}; "
            f"can go: {self.measure} grows by at most {self.max_increase:.2g}"
        )

    def __str__(self) -> str:
        return self.table()


def _as_plain(value: object) -> object:
    """Arrays as lists, at any depth of dicts."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return {k: _as_plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value
