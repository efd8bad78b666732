"""What could be removed, what stays, and why."""

from __future__ import annotations  # matplotlib is optional

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np
from rich.table import Table

from keras_taylor.budget.costs import CostModel
from keras_taylor.plans.limits import Limits
from keras_taylor.plans.ranking import RemovalOrder
from keras_taylor.plans.selection import Selection
from keras_taylor.reading.groups import Group, label_model
from keras_taylor.reports import plots
from keras_taylor.reports.loss_curves import Sensitivity
from keras_taylor.reports.sensitivity_scan import (
    NUM_SCAN_EXAMPLES,
    SCAN_FRACTIONS,
    ScanSettings,
    SensitivityScan,
    cost_savings,
)
from keras_taylor.scores.criteria import Criterion
from keras_taylor.support.arguments import takes_data_as_one
from keras_taylor.support.console import Reporter, Verbose, render_table
from keras_taylor.support.hub_tasks import preprocessed
from keras_taylor.support.types import Costs, Data, LayerPatterns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NAME_CHARACTERS = 32  # of a name on one line


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The groups of channels of a model. `print(analysis)` shows them as a table.

    Attributes:
        groups: A tuple of `Group`s. Groups that cannot leave say so in their `reason`.
        costs: The costs of the model: "params", "flops" (of one example's forward pass) and
            "activation_memory" (bytes) -> an int, `None` if an input has an unknown size.
        reachable: Cost -> the largest fraction of it that can be removed, a float: every group keeps one
            channel.
        unknown: Names of the operations that have no rule, a tuple. The channels that they read stay, and
            their FLOPs are not counted.
        probed: Names of the operations without a rule, or with an activation function of your own, that
            let channels through, a tuple. Each was run on random numbers, and every channel was found to
            be independent of the others.
        savings: Group name -> the costs that are saved if all channels of the group but one leave, for
            each prunable group.
        sensitivity: The loss as a growing share of each group is removed, a `Sensitivity`; `None` if
            `analyze` got no data.

    Example:

    >>> analysis = keras_taylor.analyze(model)
    >>> print(analysis)
    >>> analysis.savings[analysis.groups[0].name]["params"] > 0
    True
    """

    groups: tuple[Group, ...]
    costs: Costs
    reachable: Mapping[str, float]
    unknown: tuple[str, ...]
    probed: tuple[str, ...] = ()
    savings: Mapping[str, Costs] = dataclasses.field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    def plot(self, path: str | os.PathLike[str] | None = None, metric: str | None = None) -> Figure:
        """Draws the loss against the fraction that is removed: a line for each group, or a heat map of many.

        Args:
            path: The file name. Its ending chooses the format (`.png`, `.svg`, `.pdf`). `None`: no file.
            metric: The name of a compiled metric, such as "accuracy"; `None`: the loss.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: without matplotlib (`pip install "keras-taylor[plots]"`).
            ValueError: for an analysis without data, or a metric that was not measured.

        Example:

        >>> figure = keras_taylor.analyze(model, (x, y)).plot("sensitivity.png")
        """
        if self.sensitivity is None:
            raise ValueError(
                "There is nothing to draw: the loss was not measured. Pass data, `analyze(model, ds)`. "
                "Received: an analysis with sensitivity=None"
            )
        return plots.plot_sensitivity(self.sensitivity, path, metric)

    def __str__(self) -> str:
        table = Table(title=self._headline())
        names = [_describe_makers(group) for group in self.groups]
        longest = max((len(line) for name in names for line in name.split("\n")), default=0)
        table.add_column("group", overflow="fold", no_wrap=longest <= _MAX_NAME_CHARACTERS)
        for column in ("channels", "parameters", "FLOPs"):
            table.add_column(column, justify="right", overflow="fold")
        has_inexact = any(group.normalized_by for group in self.groups)
        for column in ("stays because", *["open with exact=False only: changes"] * has_inexact):
            table.add_column(column, overflow="fold")
        for group, name in zip(self.groups, names, strict=True):
            savings = self.savings.get(group.name, {}) if group.prunable else {}
            amounts = [savings.get(cost) for cost in ("params", "flops")]
            table.add_row(
                name,
                str(group.num_units),
                *("" if amount is None else f"{amount:,}" for amount in amounts),
                group.reason or "",
                *[_shorten_names(group.normalized_by)] * has_inexact,
            )
        text = render_table(table)
        return text if self.sensitivity is None else f"{text}\n{self.sensitivity}"

    def _headline(self) -> str:
        shares = ", ".join(f"{share:.1%} of {cost}" for cost, share in self.reachable.items())
        channels = [group for group in self.groups if not group.is_branch]
        branches = [group for group in self.groups if group.is_branch]
        prunable = sum(group.num_units for group in channels if group.prunable)
        total = sum(group.num_units for group in channels)
        free = sum(group.prunable for group in branches)
        whole = f" and {free} of {len(branches)} residual branches" if branches else ""
        probed = f"; probed with random numbers: {_shorten_names(self.probed, 3)}" if self.probed else ""
        has_flops = self.costs.get("flops") is not None
        uncounted = "" if has_flops else "; FLOPs unknown, since an input has axes of unknown size"
        if self.unknown:
            uncounted += f"; {'FLOPs not counted, ' * has_flops}no rule: {_shorten_names(self.unknown)}"
        return f"{prunable:,} of {total:,} channels{whole} can leave: up to {shares}{probed}{uncounted}"


@takes_data_as_one
def analyze(
    model: keras.Model,
    ds: Data | None = None,
    *,
    include: LayerPatterns | None = None,
    exclude: LayerPatterns = (),
    exact: bool = True,
    fractions: Sequence[float] = SCAN_FRACTIONS,
    criterion: Criterion | None = None,
    num_examples: int | None = NUM_SCAN_EXAMPLES,
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    verbose: Verbose = "auto",
    branches: bool = False,
) -> Analysis:
    """Finds the groups of channels of a model, how far it can shrink and, with data, what that costs.

    With data, the loss is measured while a growing share of one group after the other is removed and
    everything else stays. This is a sensitivity scan (Han et al. 2015, arXiv 1506.02626; Li et al. 2017,
    arXiv 1608.08710). Nothing is repaired or fine-tuned. So the scan shows which layers are sensitive,
    and not how good a network becomes after more training. The channels of a group are removed in the
    order of their scores, the least important first.

    Args:
        model: A built Keras model. Data with labels needs a compiled one. It is not changed.
        ds: Data as for `model.fit`, to measure the loss on. Without labels, the divergence from the
            predictions of the whole model is measured. `None` (the default): nothing is measured.
        include: Layer names, regular expressions that match whole names, or layers: only the channels
            that these make may leave. `None` (the default): those of all layers.
        exclude: The same: the channels that these make stay. Default: none.
        exact: `False` also opens the channels that LayerNormalization, RMSNormalization,
            UnitNormalization, or a GroupNormalization with one group normalizes together: in a
            transformer, a ConvNeXt or an MLP-Mixer the residual stream with its embeddings. The channels
            that stay are then normalized with the mean and variance of fewer channels. So even the
            removal of a channel that is always zero changes the outputs. Default: `True`.
        fractions: The shares of each group to remove, floats above 0 and below 1. Default: 0.1 to 0.9 in
            steps of 0.1.
        criterion: What orders the channels of a group: a name or a function, as in `score`. `None` (the
            default): "taylor" for a compiled model, on labels that are drawn from the model's own
            predictions if the data has none; "magnitude" for a model that is not compiled.
        num_examples: How many examples to measure on, an int. They are evenly spread over arrays, and
            the first ones of an iterable, and are kept in memory. `None`: all. Default: 512.
        batch_size: Examples in a batch, for arrays, an int. `None` (the default): 32.
        steps_per_epoch: Batches in a pass over an endless data set, an int. Default: `None`.
        verbose: 0 is silent, 1 a live bar, 2 lines only, "auto" (the default) whichever suits the
            output. It says how long the measurement will take before it starts.
        branches: Whether to list residual branches as well, each as a group of one unit that bears the
            name of its sum. One that cannot leave says why, as where a block changes the shape. Default:
            `False`.

    Returns:
        An `Analysis`.

    Raises:
        UnsupportedModelError: for a model whose layers cannot be seen.
        ValueError: for a model that is not built, or names that it does not have; for data that is
            empty or does not fit, has labels for which there is no compiled loss, or leads to NaN.

    Example:

    >>> analysis = keras_taylor.analyze(model)
    >>> 0 < analysis.reachable["params"] < 1
    True
    >>> analysis = keras_taylor.analyze(model, (x, y))
    >>> analysis.sensitivity.num_dispensable()
    {...}
    >>> figure = analysis.plot("sensitivity.png")
    """
    settings, reporter = ScanSettings(fractions, criterion, num_examples), Reporter(verbose)
    ds = preprocessed(model, ds, batch_size)
    labeled = label_model(model, include, exclude, exact, with_branches=branches)
    scan = None if ds is None else SensitivityScan(labeled, ds, batch_size, steps_per_epoch, settings)
    cost_model = CostModel(labeled)
    limits = Limits.from_selection(Selection(), labeled)
    smallest = RemovalOrder(labeled, cost_model, np.zeros(labeled.num_units), limits).smallest_mask()
    before, after = cost_model(), cost_model(smallest)
    alone = cost_model.with_one_group_cut()
    locked = limits.ties.locked
    groups = [dataclasses.replace(group, reason=locked.get(group.name)) for group in labeled.groups]
    groups.sort(key=lambda group: not group.prunable)
    return Analysis(
        groups=tuple(groups + labeled.locked_groups),
        costs=before,
        reachable={
            cost: saved / amount
            for cost, saved in cost_savings(before, after).items()
            if saved is not None and (amount := before[cost])
        },
        unknown=tuple(labeled.unknown),
        probed=tuple(labeled.probed),
        savings={
            group.name: cost_savings(before, amount)
            for group, amount in zip(labeled.groups, alone, strict=True)
            if group.name not in locked
        },
        sensitivity=None if scan is None else scan.run(reporter),
    )


def _describe_makers(group: Group) -> str:
    """The name of a group, on several lines if it is long, and the other layers that make its channels."""
    name = group.name
    lines = [name.replace("/", "/\n") if len(name) > _MAX_NAME_CHARACTERS else name]
    inside = name.rpartition("/")[0] + "/"
    others = [other.removeprefix(inside) for other in group.producers if other != name]
    if group.is_branch:
        lines.append("(a residual branch)")
    elif others:
        lines.append(f"with {_shorten_names(others)}")
    return "\n".join(lines)


def _shorten_names(names: Sequence[str], shown: int = 1) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if names[shown:] else ""
    return ", ".join(names[:shown]) + more
