"""Scores of every channel unit by a criterion (`score`), and what they are made from (`Scoring`)."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.budget.costs import COSTS, CostModel, check_countable, unit_savings
from keras_taylor.reading.groups import Group, LabeledModel, label_model
from keras_taylor.reading.tracing import functional_view
from keras_taylor.scores import criteria
from keras_taylor.scores.criteria import Criterion, Scores
from keras_taylor.scores.fisher import FisherGates, removal_ranks
from keras_taylor.scores.gated_model import GatedModel
from keras_taylor.scores.gates import GATE_ROWS
from keras_taylor.scores.group_statistics import LazyStatistics, statistics_by_group
from keras_taylor.scores.log_odds import NUM_PROBES, OddsModel
from keras_taylor.scores.losses import check_targets
from keras_taylor.scores.sampling import sample_labels
from keras_taylor.scores.scoring_passes import (
    RepeatedPasses,
    gather_statistics,
    measure_loss_changes,
    refuse_class_weight,
)
from keras_taylor.scores.sensitivity import measure_sensitivity
from keras_taylor.support.arguments import check_whole_number, takes_data_as_one
from keras_taylor.support.datasets import Feed
from keras_taylor.support.hub_tasks import preprocessed
from keras_taylor.support.keras_internals import notes_of_compilation
from keras_taylor.support.replicas import num_replicas, strategy_scope
from keras_taylor.support.types import Array, Data, FloatArray, LayerPatterns

# Examples whose labels are sampled, at most: they are held in memory.
MAX_SAMPLED_LABELS = 10_000
# Single-pass criteria whose gates gather more than others.
_WITH_OWN_GATES = ("log_odds", "log_odds_probed")
_PASSES = "passes"  # the name of a note
# The model with gates holds a copy of the weights. One with more of them (200 MB) is made again at each call.
MOST_WEIGHTS_KEPT = 50_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """How the scores of a run are made: by which criterion, from which examples and labels.

    `compress` takes it in place of a criterion.

    Args:
        criterion: What makes a channel important: a name of the table in `keras_taylor.criteria`, or
            a function from a `GroupStatistics` to an array `(num_units,)`. `None`: "log_odds" for a
            classifier with one output, a cross-entropy and labels, where `repair` is on; else "taylor".
        ds: Data for the scores, in any form that `model.fit` takes: examples that the model was not
            trained on, for instance, if it knows the training examples by heart and they tell little; or
            examples as they are, where the training data augments them. Repairs read them, too, if there are
            1024, or as many as in the training data. `None`: the training data.
        num_examples: Examples in a scoring pass, 1 or more. `None`: an eighth of those that a round trains
            on (an example counts once an epoch), at least 512; of other data, and without training, all;
            at most 10,000.
        labels: Where labels come from: "data": from the data. "model": sampled from the model's own
            predictions in each round. `None`: from the data if it has labels, else sampled.

    Raises:
        ValueError: for an unknown criterion, a number of examples below 1, an unknown source of labels.

    Example:

    >>> scoring = keras_taylor.Scoring("taylor", ds=(x_val, y_val), num_examples=256)
    >>> scoring.criterion, scoring.num_examples
    ('taylor', 256)
    """

    criterion: Criterion | None = None
    ds: Data | None = None
    num_examples: int | None = None
    labels: str | None = None

    def __post_init__(self) -> None:
        if self.criterion is not None:
            criteria.get(self.criterion)
        check_whole_number("num_examples", self.num_examples, 1, or_none="a share of the training examples")
        check_labels(self.labels)


@takes_data_as_one
def score(
    model: keras.Model,
    ds: Data | None = None,
    *,
    criterion: Criterion = "taylor",
    num_examples: int | None = None,
    labels: str | None = None,
    include: LayerPatterns | None = None,
    exclude: LayerPatterns = (),
    batch_size: int | None = None,
    steps_per_epoch: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    cost: str = "params",
    exact: bool = True,
    branches: bool = False,
) -> Scores:
    """Scores every channel unit that can be pruned.

    Args:
        model: A built Keras model; compiled, for criteria that need the loss: all but "activation", "apoz"
            and those without data. It is not changed.
        ds: Data as for `model.fit`; `None` for criteria without data ("magnitude", "batchnorm",
            "fpgm", "random").
        criterion: A name of the table in `keras_taylor.criteria`, or a function that takes a
            `GroupStatistics` and returns an array `(num_units,)`.
        num_examples: Number of examples to use, evenly spread over arrays, the first ones of an iterable;
            `None`: all.
        labels: "data": from `ds`. "model": sampled from the model's own predictions for its loss
            (cross-entropies, squared error, ...; at most 10,000 examples), so that `taylor` is the
            diagonal of the true Fisher information. `None`: from `ds` if it has labels, else sampled. A model
            of a fixed batch size gets the examples that fill whole batches.
        include: Layer names, regular expressions that match whole names, or layers: score only the
            channels that these make; `None`: all.
        exclude: In the same form: do not score the channels that these make.
        batch_size: Examples a batch, for arrays, over all devices; `None`: 32. Only the criterion
            `taylor_batch` depends on it.
        steps_per_epoch: Batches in a pass over an endless data set.
        class_weight: As in `model.fit`: class -> weight.
        cost: "params" or "flops": what "sensitivity" and "fisher" compare a loss with. Take the one that
            the plan's goal is about. Other criteria score the units alone.
        exact: As in `analyze`. With `False` a gate also tells how the means and variances change that the
            other channels are normalized with.
        branches: Whether to score whole residual branches, too. A branch is a group of one unit that bears
            the name of its sum, and its gate scales what it adds. Criteria from derivatives of the loss, and
            "oracle", score it; the others leave it out.

    Returns:
        `Scores`, a dict: group name (that of the first layer making its channels) -> float32 array
        `(num_units,)`; the higher, the more important. Groups that a criterion cannot judge (`batchnorm`
        without BatchNormalization) are left out. It remembers its `criterion`, by which `make_plan`
        chooses how to rank.

    Raises:
        ValueError: for a model that is not compiled where the loss is needed, an unknown criterion, or
            data that is empty, has no targets, does not fit or leads to NaN; the message names the layer
            or the batch.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), num_examples=2048)
    >>> name = next(iter(scores))
    >>> least_important = scores[name].argmin()
    """
    ds = preprocessed(model, ds, batch_size)
    with strategy_scope(model):
        model = functional_view(model)
        labeled = label_model(model, include, exclude, exact, with_branches=branches)
        criteria.get(criterion)
        check_cost(cost)
        check_whole_number("num_examples", num_examples, 1, or_none="all")
        feed = None
        if needs_data(criterion, ds):
            with_loss = needs_loss(criterion)
            if with_loss:
                check_compiled(model, f"criterion={criterion!r}")
            targets = check_labels(labels) == "data" and with_loss
            feed = Feed(ds, model, batch_size, steps_per_epoch, targets=targets)
            if with_loss and uses_model_labels(feed, labels):
                num_examples = min(num_examples or MAX_SAMPLED_LABELS, MAX_SAMPLED_LABELS)
                feed = sample_labels(feed, labeled.graph, num_examples)
            elif with_loss:
                check_targets(model, *feed.known_targets)
        return score_channels(labeled, feed, criterion, num_examples, class_weight, cost=cost)


def check_labels(labels: str | None) -> str | None:
    """Refuses an unknown source of labels; returns a known one."""
    if labels not in (None, "data", "model"):
        raise ValueError(
            'Expected "data" (those of `ds`), "model" (drawn from the model\'s own predictions) or `None` '
            f"(whichever there is). Received: labels={labels!r}"
        )
    return labels


def check_cost(cost: str) -> None:
    """Refuses an unknown cost."""
    if cost not in COSTS:
        raise ValueError(
            f"Expected one of {', '.join(map(repr, COSTS))}: what the removal of units saves. "
            f"Received: cost={cost!r}"
        )


def uses_model_labels(feed: Feed, labels: str | None) -> bool:
    """Whether labels are sampled from the model, not taken from the data."""
    return labels == "model" or (labels is None and not feed.has_targets)


def needs_loss(criterion: Criterion) -> bool:
    """Whether a criterion that has data needs the loss on it, too."""
    return callable(criterion) or criterion in criteria.LOSS_CRITERIA


def needs_data(criterion: Criterion, ds: Data | None) -> bool:
    """Whether a criterion needs data.

    Raises:
        ValueError: if it does, and there is no data.
    """
    if callable(criterion):
        return ds is not None
    if criterion in criteria.DATA_FREE_CRITERIA:
        return False
    if ds is None:
        raise ValueError(
            f"The criterion '{criterion}' needs data. Pass `ds`, or one of the criteria without data: "
            f"{', '.join(criteria.DATA_FREE_CRITERIA)}. Received: ds=None"
        )
    return True


def check_compiled(model: keras.Model, required_by: str) -> None:
    """Refuses a model without a compiled loss; `required_by` says what needs it."""
    if not getattr(model, "compiled", False) or model.optimizer is None or model.loss is None:
        raise ValueError(
            f"The model is not compiled with a loss, and {required_by} needs its loss. Call "
            f"`model.compile(optimizer, loss)` first. Received: model={model.name!r}, not compiled"
        )


def score_channels(
    labeled: LabeledModel,
    feed: Feed | None,
    criterion: Criterion,
    num_examples: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    cost: str = "params",
) -> Scores:
    """`score` for a model that was read and data that was checked.

    Args:
        labeled: The labels of the model.
        feed: The data, or `None` for criteria that need none.
        criterion, num_examples, class_weight, cost: As in `score`.
        callbacks: Keras callbacks of the scoring pass.
    """
    totals, extra = None, {}
    if feed is not None and labeled.num_units and needs_loss(criterion):
        feed.check_devices(num_examples)
        if criterion in criteria.COST_AWARE_CRITERIA:
            check_countable(CostModel(labeled)(), cost, f"cost={cost!r}")
        arguments = feed, num_examples, class_weight, callbacks
        if is_single_pass(criterion):
            everything = np.ones(labeled.num_units, bool)
            totals = _passes_of_compiled(labeled, criterion, feed).statistics(labeled, everything, *arguments)
            return compute_scores(
                labeled, criterion, totals, measured=LazyStatistics(labeled, feed, num_examples)
            )
        gated = make_gated_model(labeled, criterion)
        gather = functools.partial(gather_statistics, gated, labeled, *arguments)
        if criterion == "oracle":
            refuse_class_weight(class_weight)
            extra["loss_changes"] = measure_loss_changes(gated, labeled, feed, num_examples)
        elif criterion == "sensitivity":
            extra["slopes"] = _slopes(gated, labeled, feed, gather, cost)
        else:
            totals = gather()
        if criterion == "fisher" and totals is not None:
            extra["ranks"] = removal_ranks(totals, unit_savings(labeled, cost))
            totals = totals[: len(GATE_ROWS)]
    return compute_scores(labeled, criterion, totals, extra, LazyStatistics(labeled, feed, num_examples))


def is_single_pass(criterion: Criterion) -> bool:
    """Whether a criterion needs nothing of the data but the sums of one pass through gates."""
    return needs_loss(criterion) and criterion not in ("oracle", "sensitivity", "fisher")


def _passes_of_compiled(labeled: LabeledModel, criterion: Criterion, feed: Feed) -> RepeatedPasses:
    """The passes of an earlier call if the model was not compiled again, nor changed but in its weights.

    So a second `score` compiles nothing. The model with gates lives as long as what `compile` noted, unless
    it is large.
    """
    notes, key = notes_of_compilation(labeled.graph.model), _key_of_passes(labeled, criterion, feed)
    found = notes.get(_PASSES)
    if key is not None and found is not None and found[0] == key:
        passes: RepeatedPasses = found[1]
        return passes
    passes = RepeatedPasses(labeled, make_gated_model(labeled, criterion))
    notes.pop(_PASSES, None)
    if key is not None and labeled.graph.model.count_params() <= MOST_WEIGHTS_KEPT:
        notes[_PASSES] = key, passes
    return passes


def _key_of_passes(labeled: LabeledModel, criterion: Criterion, feed: Feed) -> tuple[Any, ...] | None:
    """What the compiled model with gates depends on; `None` if that is not known."""
    model = labeled.graph.model
    operations = [call.operation for call in labeled.graph.calls]
    if num_replicas() > 1 or keras.distribution.distribution() is not None:
        return None
    adapted = [one for one in operations if hasattr(one, "finalize_state")]  # leaves values beside weights
    if any(type(one) is not keras.layers.Normalization for one in adapted):
        return None
    values = [keras.ops.convert_to_numpy(weight).tobytes() for one in adapted for weight in one.weights]
    try:
        config = json.dumps(model.get_config(), default=repr)
    except Exception:  # some layers have no complete configuration
        return None
    gates = criterion if criterion in _WITH_OWN_GATES else "plain"
    groups = [(group.name, group.start, group.num_units) for group in labeled.groups]
    reads = [sorted(effect.reads.items()) for effect in labeled.effects]
    labels = hashlib.sha256(b"".join(np.asarray(one).tobytes() for one in labeled.labels)).hexdigest()
    functions = [getattr(one, name, None) for one in operations for name in ("activation", "function")]
    # data of another rank: TensorFlow would trace the compiled step again, for tensors of no known rank
    data = feed.form
    compiled = model.loss, model.jit_compile, model.run_eagerly
    return gates, config, values, groups, reads, labels, functions, data, *compiled


def make_gated_model(labeled: LabeledModel, criterion: Criterion) -> GatedModel:
    """The model that gathers the statistics of a criterion."""
    if criterion in _WITH_OWN_GATES:
        return OddsModel(labeled, NUM_PROBES if criterion == "log_odds_probed" else 0)
    if criterion == "fisher":
        return GatedModel(labeled, gates=FisherGates(labeled.num_units, name="gates"))
    return GatedModel(labeled)


def compute_scores(
    labeled: LabeledModel,
    criterion: Criterion,
    totals: FloatArray | None = None,
    extra: Mapping[str, FloatArray] | None = None,
    measured: LazyStatistics | None = None,
) -> Scores:
    """Scores by group, from the statistics that were gathered.

    Args:
        labeled: The labels of the model.
        criterion: As in `score`.
        totals: Statistics as `gather_statistics` gives them; `None`: none.
        extra: Statistics of single criteria, by attribute of `GroupStatistics`: arrays `(num_units,)`.
        measured: What is measured when the criterion asks; `None`: activations are not.
    """
    function, scores = criteria.get(criterion), Scores({}, criterion)
    measured = measured or LazyStatistics(labeled)
    scores_branches = totals is not None or "loss_changes" in (extra or {})
    for group, statistics in statistics_by_group(labeled, totals, extra or {}, measured):
        if group.is_branch and not scores_branches:
            continue
        values = function(statistics)
        if values is not None:
            scores[group.name] = _check_scores(values, group, criterion)
    return scores


def _slopes(
    gated: GatedModel, labeled: LabeledModel, feed: Feed, gather: Callable[[], FloatArray], cost: str
) -> FloatArray:
    """Slopes of each group's curve; `gather` gives statistics of gates, if they are needed."""
    curves = measure_sensitivity(labeled, gated, feed, lambda: gather()[GATE_ROWS["square"]], cost)
    slopes = np.zeros(labeled.num_units)
    for group, curve in zip(labeled.groups, curves.values(), strict=True):
        slopes[group.start : group.start + group.num_units] = curve.slopes()
    return slopes


def _check_scores(values: Array, group: Group, criterion: Criterion) -> FloatArray:
    """Scores as float32; refuses those that are not finite, or not one for each unit."""
    values = np.asarray(values, np.float32)
    if values.shape != (group.num_units,) or not np.isfinite(values).all():
        raise ValueError(
            f"The criterion gave no finite score for each unit of group '{group.name}'. Expected a "
            f"finite array of shape ({group.num_units},). Received: criterion={criterion!r}, which "
            f"returned {values!r}"
        )
    return values
