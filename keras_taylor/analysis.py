"""What could be removed, what stays, and why."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from keras_taylor.costs import CostModel
from keras_taylor.groups import read_channels
from keras_taylor.tables import render


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The groups of a model; `print(analysis)` shows them as a table.

    Attributes:
        groups: All `Group`s, the locked ones with their `reason`.
        costs: "params" and "flops" of the model as it is.
        reachable: The largest fraction of "params" and "flops" that can be removed
            when every group keeps one channel.
        unknown: Names of operations that have no rule; channels that they read stay.
        probed: Names of operations without a rule, or with an activation of the user's,
            that let channels through: run on random numbers, each channel stood for itself.
    """

    groups: tuple
    costs: Mapping[str, int | None]
    reachable: Mapping[str, float]
    unknown: tuple
    probed: tuple = ()

    def __str__(self):
        table = Table(title=self._headline())
        for column in ("group", "channels", "made by", "stays because"):
            table.add_column(column, justify="right" if column == "channels" else "left", overflow="fold")
        for group in self.groups:
            others = len(group.producers) - 1
            makers = group.producers[0] + (f" and {others} more" if others else "")
            table.add_row(group.name, str(group.num_units), makers, group.reason or "")
        return render(table)

    def _headline(self):
        can_go = ", ".join(f"{share:.1%} of {what}" for what, share in self.reachable.items())
        free = sum(group.num_units for group in self.groups if group.prunable)
        total = sum(group.num_units for group in self.groups)
        tried = f"; probed with random numbers: {', '.join(self.probed)}" if self.probed else ""
        return f"{free:,} of {total:,} channels can leave: up to {can_go}{tried}"


def analyze(model, *, include=None, exclude=()):
    """Finds the groups of channels of a model, and how far it could shrink.

    Args:
        model: A built Sequential or Functional model. It is not changed.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: only the channels that these make may leave / none of them may.

    Returns:
        An `Analysis`.

    Raises:
        UnsupportedModelError: for a model whose layers cannot be seen.
        ValueError: for a model that is not built, or names that it does not have.

    Example:

    >>> analysis = keras_taylor.analyze(model)
    >>> analysis.reachable["params"]
    0.99
    """
    channels = read_channels(model, include, exclude)
    costs = CostModel(channels)
    least = np.ones(channels.num_units, bool)
    for group in channels.groups:
        least[group.start + 1 : group.start + group.num_units] = False
    before, after = costs(), costs(least)
    return Analysis(
        groups=tuple(channels.groups + channels.locked),
        costs=before,
        reachable={what: 1 - after[what] / before[what] for what in before if before[what]},
        unknown=tuple(channels.unknown),
        probed=tuple(channels.probed),
    )
