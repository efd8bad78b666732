"""Scores the channels in each round of `compress`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.cutting.surgery import build_smaller_compiled
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.planning import kept_units, label_as_planned
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.scores import criteria
from keras_taylor.scores.group_statistics import LazyStatistics
from keras_taylor.scores.log_odds import has_odds
from keras_taylor.scores.sampling import sample_labels
from keras_taylor.scores.scoring import (
    Scoring,
    compute_scores,
    is_single_pass,
    make_gated_model,
    needs_loss,
    score_channels,
    uses_model_labels,
)
from keras_taylor.scores.scoring_passes import RepeatedPasses
from keras_taylor.support.datasets import BATCH_SIZE, Feed
from keras_taylor.support.replicas import from_first_process
from keras_taylor.support.types import Array, FloatArray

# Examples of a scoring pass, if the user does not say: a share of what a round trains on, within bounds.
_SCORED_SHARE, _MIN_SCORED, _MAX_SCORED = 1 / 8, 512, 10_000
# A smaller model is scored through the mask of a larger one until it has less than this share of its FLOPs.
NEW_SCORER_AT = 0.7


def default_criterion(labeled: LabeledModel, repairs: bool, draws: bool) -> str:
    """Returns the criterion that keeps most accuracy with one pass, see `benchmarks/results/criteria.md`.

    Args:
        labeled: The model, compiled.
        repairs: Whether cuts are repaired.
        draws: Whether labels are drawn: the sign of derivatives is noise then.
    """
    return "log_odds" if repairs and not draws and has_odds(labeled) else "taylor"


@dataclasses.dataclass(frozen=True)
class ScoreData:
    """The data of all scoring passes of a run.

    Attributes:
        feed: The data, checked.
        num_examples: Most examples of a pass.
        is_separate: Whether the user passed data for the scores beside those of the training.
        draws_labels: Whether labels are drawn from the model's own predictions, again in each round.
    """

    feed: Feed
    num_examples: int
    is_separate: bool = False
    uses_model_labels: bool = False


def prepare_score_data(
    model: keras.Model,
    training: Feed,
    fit_kwargs: Mapping[str, Any],
    scoring: Scoring,
    trainings: float = 1.0,
) -> ScoreData:
    """Checks the data of the scores, and chooses how many examples a pass takes.

    Args:
        model: The original model.
        training: The data of the training.
        fit_kwargs: Arguments of `fit`: "epochs" counts here.
        scoring: As in `compress`.
        trainings: How many trainings there are for each scoring pass.

    Raises:
        ValueError: If the data does not fit the model.
    """
    labels, num_examples = scoring.labels, scoring.num_examples
    feed, num_trained = training, count_trained(training, fit_kwargs, trainings)
    if scoring.ds is not None:
        feed = Feed(scoring.ds, model, training.batch_size, targets=labels == "data")
        num_trained = None
    if num_examples is None:
        available = min(_MAX_SCORED, feed.num_examples or _MAX_SCORED)
        wanted = share_of_trained(num_trained, _SCORED_SHARE, _MIN_SCORED, available)
        size = feed.batch_size or BATCH_SIZE  # whole batches: a smaller last one would be compiled apart
        num_examples = min(-(-wanted // size) * size, available)
    return ScoreData(feed, num_examples, scoring.ds is not None, uses_model_labels(feed, labels))


class RoundScorer:
    """Scores the model of each round by one criterion, from the same data.

    Models that are little smaller than an earlier one are scored through the mask of that one, so that
    nothing is compiled again.

    Args:
        model: The original model.
        read: A function from a model, and the plan that led to it or `None`, to its `LabeledModel`.
        data: The data; `None`: the criterion needs none.
        criterion: As in `compress`, not `None`.
        cost: The cost that the goal is about, "params" or "flops".
        class_weight: As in `fit`.

    Attributes:
        criterion: As passed.
    """

    def __init__(
        self,
        model: keras.Model,
        read: Callable[[keras.Model, Plan | None], LabeledModel],
        data: ScoreData | None,
        criterion: criteria.Criterion,
        cost: str = "params",
        class_weight: Mapping[int, float] | None = None,
    ) -> None:
        criteria.get(criterion)
        self._model, self._read, self._data = model, read, data
        self.criterion, self._cost, self._class_weight = criterion, cost, class_weight
        self._num_examples = None if data is None else data.num_examples
        # after how many plans, the model then, and passes through its gates
        self._masked: tuple[int, LabeledModel, RepeatedPasses] | None = None
        if data is not None:
            data.feed.check_devices(data.num_examples)

    @property
    def needs_data(self) -> bool:
        """Whether the criterion needs data."""
        return self._data is not None

    @property
    def draws_labels(self) -> bool:
        """Whether labels are drawn from the model's own predictions."""
        return self._data is not None and self._data.uses_model_labels and needs_loss(self.criterion)

    def score(
        self, labeled: LabeledModel, plans: Sequence[Plan], callbacks: Sequence[keras.callbacks.Callback]
    ) -> dict[str, Array]:
        """Returns the scores by group; if there are several processes, those of the first one.

        Args:
            labeled: The model as it is.
            plans: The plan of each round that is done, which together led to it.
            callbacks: Keras callbacks of the scoring pass.
        """
        feed, totals = None, None
        if self._data is not None:
            feed = self._data.feed
            if self.draws_labels:
                feed = sample_labels(feed, labeled.graph, self._data.num_examples, len(plans))
            if is_single_pass(self.criterion):
                totals = self._masked_statistics(labeled, plans, feed, callbacks)
        if totals is not None:
            measured = LazyStatistics(labeled, feed, self._num_examples)
            scores = compute_scores(labeled, self.criterion, totals, measured=measured)
        else:
            arguments = self.criterion, self._num_examples, self._class_weight, callbacks, self._cost
            scores = score_channels(labeled, feed, *arguments)
        scores.update({name: from_first_process(values) for name, values in scores.items()})
        return scores

    def _masked_statistics(
        self,
        labeled: LabeledModel,
        plans: Sequence[Plan],
        feed: Feed,
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> FloatArray | None:
        """Statistics of one pass through the masked model of an earlier round; `None` if it does not fit."""
        num_plans = _num_plans_of_scorer(plans)
        if self._masked is None or self._masked[0] != num_plans:
            base = labeled if num_plans == len(plans) else self._read_after(plans[:num_plans])
            passes = RepeatedPasses(base, make_gated_model(base, self.criterion))
            self._masked = num_plans, base, passes
        _, base, passes = self._masked
        plan = _compose(plans[num_plans:])
        kept = np.ones(base.num_units, bool) if plan is None else kept_units(base, plan)
        return passes.statistics(labeled, kept, feed, self._num_examples, self._class_weight, callbacks)

    def _read_after(self, plans: Sequence[Plan]) -> LabeledModel:
        """The original after some plans: its structure, without what was trained since."""
        plan = _compose(plans)
        if plan is None:
            return self._read(self._model, None)
        original = label_as_planned(self._model, plan)
        kept = kept_units(original, plan)
        return self._read(build_smaller_compiled(original, kept, carry=False), plan)


def count_trained(feed: Feed, fit_kwargs: Mapping[str, Any], trainings: float = 1.0) -> int | None:
    """Returns how many examples trainings take, one counted once an epoch; `None`: unknown, or none."""
    epochs = fit_kwargs.get("epochs", 1)
    if not epochs or feed.num_examples is None:
        return None
    return round(feed.num_examples * epochs * trainings)


def share_of_trained(num_trained: int | None, share: float, least: int, most: int) -> int:
    """Returns how many examples a task beside the training may take, so that it costs a share of it.

    Args:
        num_trained: How many examples are trained on; `None`: unknown, or none.
        share: The share.
        least, most: Bounds; `most` if `num_trained` is unknown.
    """
    return most if num_trained is None else min(max(round(num_trained * share), least), most)


def _compose(plans: Sequence[Plan]) -> Plan | None:
    return functools.reduce(Plan.compose, plans) if plans else None


def _num_plans_of_scorer(plans: Sequence[Plan]) -> int:
    """Returns after how many plans the model was so small that scoring it by itself pays."""
    if not plans:
        return 0
    cost = "params" if plans[0].before["flops"] is None else "flops"
    num_plans, largest = 0, plans[0].before[cost]
    for number, plan in enumerate(plans, 1):
        left = plan.after[cost]
        if left is not None and largest is not None and left < NEW_SCORER_AT * largest:
            num_plans, largest = number, left
    return num_plans
