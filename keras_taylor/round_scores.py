"""Where the scores of each round of `compress` come from."""

from keras_taylor import criteria
from keras_taylor.datasets import Feed
from keras_taylor.log_odds import has_odds
from keras_taylor.sampling import with_drawn_labels
from keras_taylor.scoring import check_labels, draws_labels, needs_data, score_channels

_MOST = 10_000  # examples a pass, unless more are asked for


def default_criterion(channels, repaired, draws):
    """The criterion that leaves most accuracy for one pass, by `benchmarks/results/criteria.md`.

    Args:
        channels: `groups.Channels` of a compiled model.
        repaired: Whether cuts are repaired.
        draws: Whether labels are drawn: what depends on the sign of derivatives is then noise.
    """
    return "log_odds" if repaired and not draws and has_odds(channels) else "taylor"


class RoundScores:
    """Scores by one criterion from the same data in every round.

    Args:
        model: The original model.
        feed: `datasets.Feed` of the training data.
        score_ds: Other data for the scores; `None`: those of the training.
        criterion, labels: As in `compress`.
        num_examples: Examples a pass; `None`: all that are not validation data, at most 10,000.
        cost: What the goal is about, "params" or "flops".
        fit_kwargs: What `fit` is called with: class weights and the validation split count here.

    Attributes:
        apart: Whether scores come from other data than the training's.
        draws: Whether labels are drawn from the model's own predictions.
        num_examples: Examples a pass, at most.
        needs_data: Whether the criterion needs any.
    """

    def __init__(self, model, feed, score_ds, criterion, labels, num_examples, cost, fit_kwargs):
        criteria.get(criterion)
        self._criterion, self._cost, self._class_weight = criterion, cost, fit_kwargs.get("class_weight")
        self.apart = score_ds is not None
        split = fit_kwargs.get("validation_split") or 0
        if self.apart:
            feed = Feed(score_ds, model, feed.batch_size, targets=check_labels(labels) == "data")
            split = 0
        self.needs_data = needs_data(criterion, feed)
        self._feed = feed if self.needs_data else None
        self.draws = self.needs_data and draws_labels(feed, labels)
        self.num_examples = num_examples or _available(feed, split)

    def __call__(self, channels, number, callbacks):
        """Scores by group in the round after `number` others.

        Args:
            channels: `groups.Channels` of the model as it is.
            number: How many rounds are done: labels are drawn anew in each.
            callbacks: Keras callbacks of the scoring pass.
        """
        feed = self._feed
        if self.draws:
            feed = with_drawn_labels(feed, channels.graph, self.num_examples, number)
        arguments = self._criterion, self.num_examples, self._class_weight, callbacks, self._cost
        return score_channels(channels, feed, *arguments)


def _available(feed, split):
    return min(_MOST, int((feed.num_examples or _MOST) * (1 - split)))
