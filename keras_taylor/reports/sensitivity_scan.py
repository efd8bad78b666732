"""Measures the loss as a growing share of each group goes, one group at a time."""

import functools

import numpy as np

from keras_taylor.budget.costs import CostModel
from keras_taylor.reading.cloning import compile_settings
from keras_taylor.reports.loss_curves import LossCurve, Sensitivity
from keras_taylor.scores import criteria
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.losses import (
    BINARY_LOSSES,
    CLASS_LOSSES,
    ONE_HOT_LOSSES,
    kind_of,
    losses_by_output,
    mean_divergence,
)
from keras_taylor.scores.sampling import sample_labels
from keras_taylor.scores.scoring import check_compiled, needs_data, score_channels
from keras_taylor.scores.scoring_passes import explain_nonfinite
from keras_taylor.support.console import Clock, describe_duration
from keras_taylor.support.datasets import Feed, flat_inputs

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_EXAMPLES = 512
# Criteria whose scores take as long as many evaluations; those of others, about as long as so many.
_SLOW, _SCORING = ("sensitivity", "oracle"), 3
# What units may cost that count as dispensable: of a cross-entropy, and as a share of another loss.
_NATS, _SHARE = 0.05, 0.1


def check_scan(fractions, num_examples):
    """Refuses what no scan can be made of; returns the fractions in order, each once."""
    found = sorted({float(one) for one in np.ravel(fractions)})
    if not found or not all(0 < one < 1 for one in found):
        raise ValueError(
            "Expected shares of a group's channels above 0 and below 1, as in (0.25, 0.5, 0.75). "
            f"Received: fractions={fractions!r}"
        )
    if num_examples is not None and num_examples < 1:
        raise ValueError(
            f"Expected one example or more, or `None` for all. Received: num_examples={num_examples!r}"
        )
    return tuple(found)


class SensitivityScan:
    """A scan of data that was checked.

    Units are taken out by closing their gates in a copy: that computes what the smaller model would, and
    nothing is compiled anew. Counts of units that several fractions come to are measured once.

    Args:
        channels: `groups.LabeledModel`.
        ds, batch_size, steps_per_epoch: Data as for `fit`, with or without labels.
        fractions: From `check_scan`.
        criterion: What orders the units of a group; `None`: "taylor", or "magnitude" for a model that
            is not compiled. Groups that it cannot judge are left out.
        num_examples: How many examples to measure on; `None`: all.

    Raises:
        ValueError: for data that does not fit, or needs a loss that the model does not have.
    """

    def __init__(self, labeled, ds, batch_size, steps_per_epoch, fractions, criterion, num_examples):
        self._labeled, self._model = labeled, labeled.graph.model
        self._fractions, self._num_examples = fractions, num_examples
        compiled = getattr(self._model, "loss", None) is not None
        self._criterion = criterion or ("taylor" if compiled else "magnitude")
        criteria.get(self._criterion)
        self._scored_on_data = needs_data(self._criterion, ds)
        self._feed = Feed(ds, self._model, batch_size, steps_per_epoch, targets=False)
        if self._feed.has_targets:
            check_compiled(self._model, "`analyze` on data with labels")
        elif self._scored_on_data:
            check_compiled(self._model, f"criterion={self._criterion!r}")
        self._groups = [group for group in labeled.groups if group.num_units > 1]

    def run(self, reporter):
        """Measures; says by a `progress.Reporter` how long that will take before it starts.

        Returns:
            A `loss_curves.Sensitivity`.
        """
        feed, clock = self._feed.in_memory(self._num_examples), Clock()
        gated = self._gated()
        measure = self._measure(gated, feed)
        with clock.phase("compiling"):
            whole = measure()
        self._check_finite(whole, gated, feed)
        with clock.phase("evaluation"):
            measure()
        reporter.say(self._announcement(feed, clock))
        with reporter, clock.phase("all"):
            order = self._order(feed, reporter.callback("scoring"))
            found = {}
            for name, num in reporter.track(self._points(), "sensitivity"):
                if name in order:
                    gated.mask = self._kept(order[name][:num])
                    found[name, num] = measure()
        reporter.say(f"sensitivity: measured in {clock.seconds['all']:.1f} s")
        return self._result(whole, found, order, feed)

    def _gated(self):
        gated = GatedModel(self._labeled)
        settings = compile_settings(self._model)
        if settings is not None:
            gated.compile(**settings)
        return gated

    def _measure(self, gated, feed):
        """A function without arguments that gives values by name, that of the loss first."""
        if feed.has_targets:
            return functools.partial(_losses, gated, feed)
        inputs = flat_inputs(feed, self._model)
        predict = functools.partial(gated.predict_arrays, inputs, feed.batch_size)
        wanted = predict()
        return lambda: {"divergence": mean_divergence(self._model, wanted, predict())}

    def _check_finite(self, whole, gated, feed):
        if not np.isfinite(next(iter(whole.values()))):
            raise ValueError(explain_nonfinite(gated, feed))

    def _num_gone(self, group):
        """How many units of a group are gone at each fraction."""
        return np.minimum(
            np.round(np.multiply(self._fractions, group.num_units)), group.num_units - 1
        ).astype(int)

    def _points(self):
        """Pairs of a group's name and a number of its units, above 0, that go."""
        return [(g.name, num) for g in self._groups for num in np.unique(self._num_gone(g)).tolist() if num]

    def _announcement(self, feed, clock):
        each, num = clock.seconds["evaluation"], len(self._points())
        seconds, scores = each * num, ""
        if self._scored_on_data:
            # the scoring pass is compiled as well
            seconds += 0 if self._criterion in _SLOW else _SCORING * clock.seconds["compiling"]
            scores = (
                f", {'besides' if self._criterion in _SLOW else 'with'} the scores by '{self._criterion}'"
            )
        return (
            f"sensitivity: groups: {len(self._groups)}, evaluations: {num} on {feed.num_examples:,} examples "
            f"({each:.2g} s each), {describe_duration(seconds)}{scores}"
        )

    def _order(self, feed, callbacks):
        """For each group that the criterion can judge, by name, its units, the least important first."""
        if not self._scored_on_data:
            feed = None
        elif not feed.has_targets:
            feed = sample_labels(feed, self._labeled.graph)
        scores = score_channels(self._labeled, feed, self._criterion, callbacks=callbacks)
        return {
            g.name: g.start + np.argsort(scores[g.name], kind="stable")
            for g in self._groups
            if g.name in scores
        }

    def _kept(self, gone):
        kept = np.ones(self._labeled.num_units, bool)
        kept[gone] = False
        return kept

    def _result(self, whole, found, order, feed):
        costs, curves = CostModel(self._labeled), {}
        before = costs()
        for group in self._groups:
            if group.name not in order:
                continue
            num_gone = self._num_gone(group)
            after = [costs(self._kept(order[group.name][:num])) for num in num_gone]
            values = [found.get((group.name, num), whole) for num in num_gone.tolist()]
            curves[group.name] = LossCurve(
                order=order[group.name] - group.start,
                num_gone=num_gone,
                values={name: np.array([one[name] for one in values]) for name in whole},
                saved={
                    what: None
                    if before[what] is None
                    else np.array([before[what] - one[what] for one in after])
                    for what in before
                },
            )
        measure = next(iter(whole))
        return Sensitivity(
            measure=measure,
            whole=whole,
            fractions=self._fractions,
            curves=curves,
            num_examples=feed.num_examples,
            criterion=getattr(self._criterion, "__name__", self._criterion),
            max_increase=_NATS if self._in_nats(measure) else _SHARE * abs(whole[measure]),
        )

    def _in_nats(self, measure):
        """Whether the measure is a mean of cross-entropies, or a divergence, which is as large."""
        losses = [one for one in losses_by_output(self._model, len(self._model.outputs)) if one is not None]
        entropies = all(
            kind_of(one)[0] in CLASS_LOSSES | ONE_HOT_LOSSES | BINARY_LOSSES
            and getattr(one, "reduction", None) != "sum"
            for one in losses
        )
        return measure == "divergence" or entropies


def _losses(gated, feed):
    """The compiled loss of all examples, and the metrics, as `evaluate` gives them."""
    values = gated.evaluate(**feed.fit_arguments(), verbose=0, return_dict=True)
    return {"loss": float(values.pop("loss")), **{name: float(value) for name, value in values.items()}}
