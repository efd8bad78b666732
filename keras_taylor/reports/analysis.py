"""What could be removed, what stays, and why."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.groups import label_model
from keras_taylor.reports.loss_curves import Sensitivity
from keras_taylor.reports.sensitivity_scan import FRACTIONS, NUM_EXAMPLES, SensitivityScan, check_scan
from keras_taylor.support.console import Reporter, render_table


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
        sensitivity: The loss as a growing share of each group goes, a `Sensitivity`; `None` without data.
    """

    groups: tuple
    costs: Mapping[str, int | None]
    reachable: Mapping[str, float]
    unknown: tuple
    probed: tuple = ()
    behind: Mapping[str, Mapping[str, int | None]] = dataclasses.field(default_factory=dict)
    sensitivity: Sensitivity | None = None

    def plot(self, path=None, what=None):
        """Draws the loss against the fraction that is gone: a line a group, or a heat map of many groups.

        Args:
            path: File name; its ending tells the format (`.png`, `.svg`, `.pdf`). `None`: no file.
            what: The name of a compiled metric, such as "accuracy", in place of the loss.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: without matplotlib (`pip install "keras-taylor[plots]"`).
            ValueError: for an analysis without data, or a metric that was not measured.
        """
        if self.sensitivity is None:
            raise ValueError(
                "There is nothing to draw: the loss was not measured. Pass data, `analyze(model, ds)`. "
                "Received: an analysis with sensitivity=None"
            )
        from keras_taylor.reports import plots

        return plots.plot_sensitivity(self.sensitivity, path, what)

    def __str__(self):
        table = Table(title=self._headline())
        for column in ("group", "channels", "parameters", "FLOPs"):
            table.add_column(column, justify="left" if column == "group" else "right", overflow="fold")
        inexact = any(group.normalized_by for group in self.groups)
        for column in ("made by", "stays because", *["open with exact=False only: changes"] * inexact):
            table.add_column(column, overflow="fold")
        for group in self.groups:
            others = len(group.producers) - 1
            makers = group.producers[0] + (f" and {others} more" if others else "")
            behind = self.behind.get(group.name, {}) if group.prunable else {}
            costs = ["" if behind.get(what) is None else f"{behind[what]:,}" for what in ("params", "flops")]
            seen = [_and_more(group.normalized_by)] * inexact
            table.add_row(group.name, str(group.num_units), *costs, makers, group.reason or "", *seen)
        text = render_table(table)
        return text if self.sensitivity is None else f"{text}\n{self.sensitivity}"

    def _headline(self):
        can_go = ", ".join(f"{share:.1%} of {what}" for what, share in self.reachable.items())
        free = sum(group.num_units for group in self.groups if group.prunable)
        total = sum(group.num_units for group in self.groups)
        tried = f"; probed with random numbers: {', '.join(self.probed)}" if self.probed else ""
        return f"{free:,} of {total:,} channels can leave: up to {can_go}{tried}"


def analyze(
    model,
    ds=None,
    *,
    include=None,
    exclude=(),
    exact=True,
    fractions=FRACTIONS,
    criterion=None,
    num_examples=NUM_EXAMPLES,
    batch_size=None,
    steps_per_epoch=None,
    verbose="auto",
):
    """Finds the groups of channels of a model, how far it could shrink and, with data, what that costs.

    With data the loss is measured while a growing share of one group after the other is gone, and
    nothing else: a sensitivity scan (Han et al. 2015, arXiv 1506.02626; Li et al. 2017, arXiv 1608.08710).
    Nothing is repaired or fine-tuned, so it tells which layers bear less, not what a network comes to
    that was trained again. Channels of a group go by their scores, the least important first.

    Args:
        model: A built Keras model; compiled, for data with labels. It is not changed.
        ds: Data as for `model.fit`, to measure the loss on; without labels it is the divergence
            of the predictions from the whole model's. `None`: nothing is measured.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: only the channels that these make may leave / none of them may.
        exact: `False`: channels that LayerNormalization, RMSNormalization, UnitNormalization, or a
            GroupNormalization with one group, normalizes together may leave, too: in a transformer, a
            ConvNeXt or an MLP-Mixer the residual stream, embeddings and all. The others are then
            normalized with a mean and variance of fewer channels, so that even a channel that is
            always zero does not leave without a trace.
        fractions: The shares of a group that are taken out, above 0 and below 1.
        criterion: What orders the channels of a group, as in `score`. `None`: "taylor" (on labels that
            are drawn from the model's own predictions, where the data has none), or "magnitude" for a
            model that is not compiled.
        num_examples: Measure on so many examples, evenly spread over arrays, the first ones of an
            iterable, which are kept in memory; `None`: all.
        batch_size: Examples a batch, for arrays.
        steps_per_epoch: Batches in a pass over an endless data set.
        verbose: 0 is silent, 1 a live bar, 2 lines only, "auto" whichever suits the output. How long
            measuring will take is said before it starts.

    Returns:
        An `Analysis`.

    Raises:
        UnsupportedModelError: for a model whose layers cannot be seen.
        ValueError: for a model that is not built, or names that it does not have; for data that is
            empty, does not fit, has labels that no compiled loss is there for, or leads to NaN.

    Example:

    >>> analysis = keras_taylor.analyze(model)
    >>> analysis.reachable["params"]
    0.99
    >>> analysis = keras_taylor.analyze(model, (x, y))
    >>> analysis.sensitivity.num_dispensable()
    {"conv1": 12, "conv2": 3}
    >>> analysis.plot("sensitivity.png")
    """
    fractions, reporter = check_scan(fractions, num_examples), Reporter(verbose)
    labeled = label_model(model, include, exclude, exact)
    scan = None
    if ds is not None:
        scan = SensitivityScan(labeled, ds, batch_size, steps_per_epoch, fractions, criterion, num_examples)
    costs = CostModel(labeled)
    before, after = costs(), costs(_with_one_each(labeled))
    alone = costs.with_one_group_cut()
    return Analysis(
        groups=tuple(labeled.groups + labeled.locked_groups),
        costs=before,
        reachable={what: 1 - after[what] / before[what] for what in before if before[what]},
        unknown=tuple(labeled.unknown),
        probed=tuple(labeled.probed),
        behind={g.name: _saved(before, a) for g, a in zip(labeled.groups, alone, strict=True)},
        sensitivity=scan and scan.run(reporter),
    )


def _with_one_each(labeled):
    """The mask of kept units when every group keeps one channel."""
    kept = np.zeros(labeled.num_units, bool)
    kept[[group.start for group in labeled.groups]] = True
    return kept


def _and_more(names):
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{names[0]}{more}" if names else ""


def _saved(before, after):
    return {what: None if before[what] is None else before[what] - after[what] for what in before}
