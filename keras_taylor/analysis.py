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
        behind: For each prunable group, by name, the "params" and "flops" that go when all of its
            channels but one leave.
        unknown: Names of operations that have no rule; channels that they read stay.
        probed: Names of operations without a rule, or with an activation of the user's,
            that let channels through: run on random numbers, each channel stood for itself.
    """

    groups: tuple
    costs: Mapping[str, int | None]
    reachable: Mapping[str, float]
    unknown: tuple
    probed: tuple = ()
    behind: Mapping[str, Mapping[str, int | None]] = dataclasses.field(default_factory=dict)

    def __str__(self):
        table = Table(title=self._headline())
        for column in ("group", "channels", "parameters", "FLOPs"):
            table.add_column(column, justify="left" if column == "group" else "right", overflow="fold")
        inexact = any(group.normalised_by for group in self.groups)
        for column in ("made by", "stays because", *["open with exact=False only: changes"] * inexact):
            table.add_column(column, overflow="fold")
        for group in self.groups:
            others = len(group.producers) - 1
            makers = group.producers[0] + (f" and {others} more" if others else "")
            behind = self.behind.get(group.name, {}) if group.prunable else {}
            costs = ["" if behind.get(what) is None else f"{behind[what]:,}" for what in ("params", "flops")]
            seen = [_and_more(group.normalised_by)] * inexact
            table.add_row(group.name, str(group.num_units), *costs, makers, group.reason or "", *seen)
        return render(table)

    def _headline(self):
        can_go = ", ".join(f"{share:.1%} of {what}" for what, share in self.reachable.items())
        free = sum(group.num_units for group in self.groups if group.prunable)
        total = sum(group.num_units for group in self.groups)
        tried = f"; probed with random numbers: {', '.join(self.probed)}" if self.probed else ""
        return f"{free:,} of {total:,} channels can leave: up to {can_go}{tried}"


def analyze(model, *, include=None, exclude=(), exact=True):
    """Finds the groups of channels of a model, and how far it could shrink.

    Args:
        model: A built Keras model. It is not changed.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: only the channels that these make may leave / none of them may.
        exact: `False`: channels that LayerNormalization, RMSNormalization, UnitNormalization, or a
            GroupNormalization with one group, normalises together may leave, too: in a transformer, a
            ConvNeXt or an MLP-Mixer the residual stream, embeddings and all. The others are then
            normalised with a mean and variance of fewer channels, so that even a channel that is
            always zero does not leave without a trace.

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
    channels = read_channels(model, include, exclude, exact)
    costs = CostModel(channels)
    before, after = costs(), costs(_with_one_each(channels, channels.groups))
    alone = {group.name: costs(_with_one_each(channels, [group])) for group in channels.groups}
    return Analysis(
        groups=tuple(channels.groups + channels.locked),
        costs=before,
        reachable={what: 1 - after[what] / before[what] for what in before if before[what]},
        unknown=tuple(channels.unknown),
        probed=tuple(channels.probed),
        behind={name: _saved(before, without) for name, without in alone.items()},
    )


def _with_one_each(channels, groups):
    """The mask of kept units when these groups keep one channel each."""
    kept = np.ones(channels.num_units, bool)
    for group in groups:
        kept[group.start + 1 : group.start + group.num_units] = False
    return kept


def _and_more(names):
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{names[0]}{more}" if names else ""


def _saved(before, after):
    return {what: None if before[what] is None else before[what] - after[what] for what in before}
