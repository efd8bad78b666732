"""Where the scores of each round of `compress` come from."""

import functools

from keras_taylor.cutting.surgery import cut
from keras_taylor.loop.masked_scoring import MaskedScorer
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.scores import criteria
from keras_taylor.scores.log_odds import has_odds
from keras_taylor.scores.sampling import with_drawn_labels
from keras_taylor.scores.scoring import (
    check_labels,
    draws_labels,
    gated_for,
    needs_data,
    score_channels,
    scores_of,
    takes_one_pass,
)
from keras_taylor.support.datasets import Feed
from keras_taylor.support.replicas import from_first_process

# Examples a pass, unless more are asked for: an eighth of what is trained on in a round, within these.
_SHARE, _FEWEST, _MOST = 1 / 8, 512, 10_000
# A smaller model is scored through the mask of a larger one until it has less than this share of its FLOPs.
_CUT_AT = 0.7


def default_criterion(labeled, repaired, draws):
    """The criterion that leaves most accuracy for one pass, by `benchmarks/results/criteria.md`.

    Args:
        channels: `groups.LabeledModel` of a compiled model.
        repaired: Whether cuts are repaired.
        draws: Whether labels are drawn: what depends on the sign of derivatives is then noise.
    """
    return "log_odds" if repaired and not draws and has_odds(labeled) else "taylor"


class RoundScores:
    """Scores by one criterion from the same data in every round.

    Args:
        model: The original model.
        read: A function from a model to its `groups.LabeledModel`.
        feed: `datasets.Feed` of the training data.
        score_ds: Other data for the scores; `None`: those of the training.
        criterion, labels: As in `compress`.
        num_examples: Examples a pass; `None`: an eighth of those that a round trains on, at least 512, at
            most 10,000; of `score_ds`, and without training, all, at most 10,000.
        cost: What the goal is about, "params" or "flops".
        fit_kwargs: What `fit` is called with: class weights, epochs and the validation split count here.

    Attributes:
        apart: Whether scores come from other data than the training's.
        draws: Whether labels are drawn from the model's own predictions.
        num_examples: Examples a pass, at most.
        needs_data: Whether the criterion needs any.
    """

    def __init__(self, model, read, feed, score_ds, criterion, labels, num_examples, cost, fit_kwargs):
        criteria.get(criterion)
        self._model, self._read = model, read
        self._criterion, self._cost, self._class_weight = criterion, cost, fit_kwargs.get("class_weight")
        self.apart = score_ds is not None
        trained, split = trained_examples(feed, fit_kwargs), fit_kwargs.get("validation_split") or 0
        if self.apart:
            feed = Feed(score_ds, model, feed.batch_size, targets=check_labels(labels) == "data")
            split, trained = 0, None
        self.needs_data = needs_data(criterion, feed)
        self._feed = feed if self.needs_data else None
        self.draws = self.needs_data and draws_labels(feed, labels)
        available = min(_MOST, int((feed.num_examples or _MOST) * (1 - split)))
        share = share_of_training(trained, _SHARE, _FEWEST, available)
        size = feed.batch_size or 32  # whole batches: a smaller last one would be compiled apart
        self.num_examples = num_examples or min(-(-share // size) * size, available)
        self._scorer, self._scorer_after = None, None
        if self.needs_data:
            feed.check_devices(self.num_examples)

    def __call__(self, labeled, plans, callbacks):
        """Scores by group; several processes take the first one's.

        Args:
            channels: `groups.LabeledModel` of the model as it is.
            plans: A `Plan` for each round that is done: labels are drawn anew in each.
            callbacks: Keras callbacks of the scoring pass.
        """
        feed = self._feed
        if self.draws:
            feed = with_drawn_labels(feed, labeled.graph, self.num_examples, len(plans))
        totals = None
        if self.needs_data and takes_one_pass(self._criterion):
            totals = self._totals(labeled, plans, feed, callbacks)
        if totals is not None:
            scores = scores_of(labeled, self._criterion, totals)
        else:
            arguments = self._criterion, self.num_examples, self._class_weight, callbacks, self._cost
            scores = score_channels(labeled, feed, *arguments)
        scores.update({name: from_first_process(values) for name, values in scores.items()})
        return scores

    def _totals(self, labeled, plans, feed, callbacks):
        """Statistics of one pass through the model of an earlier round, masked; `None` if that cannot be."""
        base = _last_cut(plans)
        if self._scorer_after != base:
            whole = labeled if base == len(plans) else self._channels_after(plans[:base])
            self._scorer = MaskedScorer(whole, gated_for(whole, self._criterion))
            self._scorer_after = base
        arguments = feed, self.num_examples, self._class_weight, callbacks
        return self._scorer.statistics(labeled, _composed(plans[base:]), *arguments)

    def _channels_after(self, plans):
        """The original as some plans leave it: its structure, not what was learnt since."""
        if not plans:
            return self._read(self._model)
        plan = _composed(plans)
        original = label_model(self._model, exact=plan.exact)
        return self._read(cut(original, kept_units(original, plan), carry=False))


def trained_examples(feed, fit_kwargs):
    """How many examples `fit` trains on, one counted once an epoch; `None`: unknown, or none."""
    epochs = fit_kwargs.get("epochs", 1)
    if not epochs or feed.num_examples is None:
        return None
    return feed.num_examples * (1 - (fit_kwargs.get("validation_split") or 0)) * epochs


def share_of_training(trained, share, least, most):
    """How many examples something beside the training may take, so that it costs a share of it.

    Args:
        trained: How many examples are trained on; `None`: unknown, or none.
        share: The share.
        least, most: At least and at most so many; `most` where `trained` is unknown.
    """
    return most if trained is None else min(max(round(trained * share), least), most)


def _composed(plans):
    return functools.reduce(Plan.compose, plans) if plans else None


def _last_cut(plans):
    """After how many plans the model was so much smaller that scoring it by itself pays."""
    last, whole = 0, None
    for number, plan in enumerate(plans, 1):
        what = "params" if plan.after["flops"] is None else "flops"
        whole = whole or plan.before[what]
        if plan.after[what] < _CUT_AT * whole:
            last, whole = number, plan.after[what]
    return last
