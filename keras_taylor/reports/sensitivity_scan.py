"""Measures the loss while a growing share of each group is removed, one group at a time."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import keras
import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.cloning import compile_settings, losses_by_output
from keras_taylor.reading.groups import Group, LabeledModel
from keras_taylor.reading.walk import fixed_batch_size
from keras_taylor.reports.loss_curves import LossCurve, Sensitivity
from keras_taylor.scores import criteria
from keras_taylor.scores.criteria import Criterion
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.losses import (
    BINARY_LOSSES,
    CLASS_LOSSES,
    ONE_HOT_LOSSES,
    check_targets,
    kind_of,
    mean_divergence,
)
from keras_taylor.scores.sampling import sample_labels
from keras_taylor.scores.scoring import check_compiled, needs_data, needs_loss, score_channels
from keras_taylor.scores.scoring_passes import explain_nonfinite
from keras_taylor.support.arguments import check_whole_number
from keras_taylor.support.arrays import as_number
from keras_taylor.support.console import Clock, Reporter, describe_duration
from keras_taylor.support.datasets import Feed, flat_inputs
from keras_taylor.support.types import BoolArray, Costs, Data, IntArray

SCAN_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_SCAN_EXAMPLES = 512

# Scores by these take as long as many evaluations; scores by others take about as long as three compilations.
_SLOW_CRITERIA = ("sensitivity", "oracle")
_SCORING_COMPILATIONS = 3
# The increase up to which units count as dispensable: of a cross-entropy, and as a share of other losses.
_DISPENSABLE_NATS = 0.05
_DISPENSABLE_SHARE = 0.1

# Name -> value: the measure first, then the compiled metrics.
Values: TypeAlias = dict[str, float]


@dataclasses.dataclass(frozen=True)
class ScanSettings:
    """What a scan measures.

    Attributes:
        fractions: The shares of each group to remove, above 0 and below 1. They are sorted, and
            duplicates are dropped.
        criterion: What orders the units of a group, as in `score`; `None`: "taylor", or "magnitude" for
            a model that is not compiled.
        num_examples: How many examples to measure on; `None`: all.
    """

    fractions: Sequence[float] = SCAN_FRACTIONS
    criterion: Criterion | None = None
    num_examples: int | None = NUM_SCAN_EXAMPLES

    def __post_init__(self) -> None:
        found = sorted({float(fraction) for fraction in np.ravel(self.fractions)})
        if not found or not all(0 < fraction < 1 for fraction in found):
            raise ValueError(
                "Expected shares of a group's channels above 0 and below 1, as in (0.25, 0.5, 0.75). "
                f"Received: fractions={self.fractions!r}"
            )
        check_whole_number("num_examples", self.num_examples, 1, or_none="all")
        object.__setattr__(self, "fractions", tuple(found))


class SensitivityScan:
    """A scan of a model on data that was checked.

    Units are removed by closing their gates in a copy. This computes what the smaller model would
    compute, and nothing is compiled again. If several fractions of a group come to the same number of
    units, that number is measured once.

    Args:
        labeled: The model.
        ds: Data as for `fit`, with or without labels.
        batch_size: Examples in a batch, for arrays.
        steps_per_epoch: Batches in a pass over an endless data set.
        settings: What to measure. Groups that the criterion cannot judge are left out.

    Raises:
        ValueError: for data that does not fit, or needs a loss that the model does not have.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        ds: Data,
        batch_size: int | None,
        steps_per_epoch: int | None,
        settings: ScanSettings,
    ) -> None:
        self._labeled, self._model = labeled, labeled.graph.model
        self._fractions, self._num_examples = settings.fractions, settings.num_examples
        has_loss = getattr(self._model, "loss", None) is not None
        self._criterion = settings.criterion or ("taylor" if has_loss else "magnitude")
        criteria.get(self._criterion)
        self._scored_on_data = needs_data(self._criterion, ds)
        self._feed = Feed(ds, self._model, batch_size, steps_per_epoch, targets=False)
        if self._feed.has_targets:
            check_compiled(self._model, "`analyze` on data with labels")
            check_targets(self._model, *self._feed.known_targets)
        elif self._scored_on_data and needs_loss(self._criterion):
            check_compiled(self._model, f"criterion={self._criterion!r}")
        self._groups: list[Group] = [group for group in labeled.groups if group.num_units > 1]

    def run(self, reporter: Reporter) -> Sensitivity:
        """Measures all groups. The reporter says how long it will take before the work starts."""
        feed, clock = self._feed.in_memory(self._num_examples), Clock()
        gated = self._gated_model()
        measure = self._measure(gated, feed)
        with clock.phase("compiling"):
            baseline = measure()
        self._check_finite(baseline, gated, feed)
        with clock.phase("evaluation"):
            measure()
        reporter.say(self._announcement(feed, clock))
        with reporter, clock.phase("all"):
            order = self._removal_order(feed, reporter.callback("scoring"))
            measured: dict[tuple[str, int], Values] = {}
            for name, num in reporter.track(self._points(), "sensitivity"):
                if name in order:
                    gated.mask = self._kept_without(order[name][:num])
                    measured[name, num] = measure()
        reporter.say(f"sensitivity: measured in {clock.seconds['all']:.1f} s")
        return self._result(baseline, measured, order, feed)

    def _gated_model(self) -> GatedModel:
        """A gated copy of the model, compiled as the model is."""
        gated = GatedModel(self._labeled)
        settings = compile_settings(self._model)
        if settings is not None:
            gated.compile(**settings)
        return gated

    def _measure(self, gated: GatedModel, feed: Feed) -> Callable[[], Values]:
        """A function that measures the gated model as it is now."""
        if feed.has_targets:
            return functools.partial(_evaluate, gated, feed)
        inputs = flat_inputs(feed, self._model)
        size = fixed_batch_size(self._labeled.graph) or feed.batch_size
        predict = functools.partial(gated.predict_arrays, inputs, size)
        expected = predict()
        return lambda: {"divergence": mean_divergence(self._model, expected, predict())}

    def _check_finite(self, values: Values, gated: GatedModel, feed: Feed) -> None:
        if not np.isfinite(next(iter(values.values()))):
            raise ValueError(explain_nonfinite(gated, feed))

    def _num_gone(self, group: Group) -> IntArray:
        """How many units of a group are removed at each fraction, an int array `(num_fractions,)`."""
        rounded = np.round(np.multiply(self._fractions, group.num_units))
        return np.minimum(rounded, group.num_units - 1).astype(int)

    def _points(self) -> list[tuple[str, int]]:
        """What to measure: a group's name, and a number of its units, above 0, that are removed."""
        return [(g.name, num) for g in self._groups for num in np.unique(self._num_gone(g)).tolist() if num]

    def _announcement(self, feed: Feed, clock: Clock) -> str:
        """What will be done, and how long it will take."""
        seconds_each, num = clock.seconds["evaluation"], len(self._points())
        seconds, scores = seconds_each * num, ""
        if self._scored_on_data and self._criterion in _SLOW_CRITERIA:
            scores = f", plus the time for the scores by '{self._criterion}'"
        elif self._scored_on_data:
            # the scoring pass is compiled as well
            seconds += _SCORING_COMPILATIONS * clock.seconds["compiling"]
            scores = f", with the scores by '{self._criterion}'"
        return (
            f"sensitivity: groups: {len(self._groups)}, evaluations: {num} on {feed.num_examples:,} examples "
            f"({seconds_each:.2g} s each), {describe_duration(seconds)}{scores}"
        )

    def _removal_order(
        self, feed: Feed, callbacks: Sequence[keras.callbacks.Callback]
    ) -> dict[str, IntArray]:
        """Group name -> its units, the least important first, for each group that the criterion can judge."""
        scored_feed: Feed | None = None
        if self._scored_on_data:
            draws_labels = needs_loss(self._criterion) and not feed.has_targets
            scored_feed = sample_labels(feed, self._labeled.graph) if draws_labels else feed
        scores = score_channels(self._labeled, scored_feed, self._criterion, callbacks=callbacks)
        return {
            g.name: g.start + np.argsort(scores[g.name], kind="stable")
            for g in self._groups
            if g.name in scores
        }

    def _kept_without(self, gone: IntArray) -> BoolArray:
        """The mask of kept units `(num_units,)` without some."""
        kept = np.ones(self._labeled.num_units, bool)
        kept[gone] = False
        return kept

    def _result(
        self,
        baseline: Values,
        measured: dict[tuple[str, int], Values],
        order: dict[str, IntArray],
        feed: Feed,
    ) -> Sensitivity:
        costs = CostModel(self._labeled)
        curves = {
            group.name: self._curve(group, order[group.name], baseline, measured, costs)
            for group in self._groups
            if group.name in order
        }
        measure = next(iter(baseline))
        share_of_loss = _DISPENSABLE_SHARE * abs(baseline[measure])
        return Sensitivity(
            measure=measure,
            baseline=baseline,
            fractions=tuple(self._fractions),
            curves=curves,
            num_examples=feed.num_examples or 0,
            criterion=getattr(self._criterion, "__name__", str(self._criterion)),
            max_increase=_DISPENSABLE_NATS if self._is_in_nats(measure) else share_of_loss,
        )

    def _curve(
        self,
        group: Group,
        units: IntArray,
        baseline: Values,
        measured: dict[tuple[str, int], Values],
        costs: CostModel,
    ) -> LossCurve:
        """The curve of a group whose units are removed in this order."""
        num_gone = self._num_gone(group)
        before = costs()
        saved = [cost_savings(before, costs(self._kept_without(units[:num]))) for num in num_gone]
        values = [measured.get((group.name, num), baseline) for num in num_gone.tolist()]
        return LossCurve(
            order=units - group.start,
            num_gone=num_gone,
            values={name: np.array([one[name] for one in values]) for name in baseline},
            saved={
                cost: None if amount is None else np.array([one[cost] for one in saved])
                for cost, amount in before.items()
            },
        )

    def _is_in_nats(self, measure: str) -> bool:
        """Whether the measure is a divergence, or a mean of cross-entropies, which are as large."""
        losses = [one for one in losses_by_output(self._model, len(self._model.outputs)) if one is not None]
        return measure == "divergence" or all(
            kind_of(one)[0] in CLASS_LOSSES | ONE_HOT_LOSSES | BINARY_LOSSES
            and getattr(one, "reduction", None) != "sum"
            for one in losses
        )


def _evaluate(gated: GatedModel, feed: Feed) -> Values:
    """The compiled loss on all examples, and the metrics, as `evaluate` returns them."""
    values = gated.evaluate(**feed.fit_arguments(), verbose=0, return_dict=True)
    return {"loss": float(values.pop("loss")), **{name: as_number(value) for name, value in values.items()}}


def cost_savings(before: Costs, after: Costs) -> dict[str, int | None]:
    """Cost -> what is saved, `None` if it is unknown."""
    return {
        cost: None if amount is None or (left := after[cost]) is None else amount - left
        for cost, amount in before.items()
    }
