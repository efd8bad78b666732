"""Taylor importance of every channel."""

import functools

import keras
import numpy as np

from keras_taylor.budget.costs import COSTS, CostModel, check_countable, unit_savings
from keras_taylor.reading.groups import label_model
from keras_taylor.reading.tracing import functional_view
from keras_taylor.rules.base import producing_kernels, weight_of
from keras_taylor.scores import criteria
from keras_taylor.scores.fisher import FisherGates, removal_ranks
from keras_taylor.scores.gates import ROWS, GatedModel
from keras_taylor.scores.log_odds import NUM_PROBES, ODDS_ROWS, OddsModel, shrunk
from keras_taylor.scores.sampling import with_drawn_labels
from keras_taylor.scores.scoring_passes import gate_statistics, loss_changes, refuse_class_weight
from keras_taylor.scores.sensitivity import curves
from keras_taylor.support.datasets import Feed
from keras_taylor.support.replicas import strategy_scope

# Examples whose labels are drawn, at most: they are held in memory.
MAX_DRAWN = 10_000


def score(
    model,
    ds=None,
    *,
    criterion="taylor",
    num_examples=None,
    labels=None,
    include=None,
    exclude=(),
    batch_size=None,
    steps_per_epoch=None,
    class_weight=None,
    cost="params",
    exact=True,
):
    """Scores every channel unit that can be pruned.

    Args:
        model: A built Keras model; compiled, for criteria that need the loss. It is
            not changed.
        ds: Data as for `model.fit`; `None` for the label-free criteria.
        criterion: A name of the table in `keras_taylor.scores.criteria`, or a callable that
            takes a `GroupStatistics` and returns an array `(num_units,)`.
        num_examples: Use so many examples, evenly spread over arrays, the first of an
            iterable; `None`: all.
        labels: "data": those of `ds`. "model": drawn from the model's own predictions for its loss
            (cross-entropies, squared error, ...; at most 10,000 examples), so that `taylor` is the
            diagonal of the true Fisher information. `None`: those of `ds`, drawn if it has none.
        include, exclude: Layer names, regular expressions that match whole names, or
            layers: score only the channels that these make / none of them.
        batch_size: Examples a batch, for arrays, over all devices. All criteria but `taylor_batch` are
            the same at every batch size.
        steps_per_epoch: Batches in a pass over an endless data set.
        class_weight: As in `model.fit`.
        cost: What "sensitivity" and "fisher" hold against what is lost: the parameters ("params")
            or the "flops" that go with a unit. The one that the plan's goal is about. Other
            criteria score the units alone.
        exact: As in `analyze`. With `False` a gate tells of the means and variances, too, that the
            other channels are normalized with when this one goes.

    Returns:
        A dict: group name (that of the first layer making its channels) -> float32
        array `(num_units,)`; the higher, the more important. Groups that a criterion
        cannot judge (`batchnorm` without BatchNormalization) are left out. It knows its
        `criterion`, by which `make_plan` chooses how to rank.

    Raises:
        ValueError: for a model that is not compiled where the loss is needed, an
            unknown criterion, or data that is empty, has no targets, does not fit or
            leads to NaN; the message names the layer or the batch.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), num_examples=2048)
    >>> scores["conv1"].shape
    (32,)
    """
    with strategy_scope(model):
        model = functional_view(model)
        labeled = label_model(model, include, exclude, exact)
        criteria.get(criterion)
        check_cost(cost)
        feed = None
        if needs_data(criterion, ds):
            check_compiled(model, f"criterion={criterion!r}")
            feed = Feed(ds, model, batch_size, steps_per_epoch, targets=check_labels(labels) == "data")
            if draws_labels(feed, labels):
                num_examples = min(num_examples or MAX_DRAWN, MAX_DRAWN)
                feed = with_drawn_labels(feed, labeled.graph, num_examples)
        return score_channels(labeled, feed, criterion, num_examples, class_weight, cost=cost)


def check_labels(labels):
    """Refuses what is no source of labels; returns it."""
    if labels not in (None, "data", "model"):
        raise ValueError(
            'Expected "data" (those of `ds`), "model" (drawn from the model\'s own predictions) or `None` '
            f"(whichever there is). Received: labels={labels!r}"
        )
    return labels


def check_cost(cost):
    """Refuses what is no cost."""
    if cost not in COSTS:
        raise ValueError(
            f"Expected one of {', '.join(map(repr, COSTS))}: what the removal of units saves. "
            f"Received: cost={cost!r}"
        )


def draws_labels(feed, labels):
    """Whether labels come from the model, not from the data."""
    return labels == "model" or (labels is None and not feed.has_targets)


def needs_data(criterion, ds):
    """Whether a criterion needs the loss on data.

    Raises:
        ValueError: where it does, and there is none.
    """
    if callable(criterion):
        return ds is not None
    if criterion in criteria.LABEL_FREE:
        return False
    if ds is None:
        raise ValueError(
            f"The criterion '{criterion}' needs data. Pass `ds`, or one of the label-free criteria "
            f"{', '.join(criteria.LABEL_FREE)}. Received: ds=None"
        )
    return True


def check_compiled(model, wanted_by):
    """Refuses a model without a compiled loss; `wanted_by` says what needs it."""
    if not getattr(model, "compiled", False) or model.optimizer is None or model.loss is None:
        raise ValueError(
            f"The model is not compiled with a loss, and {wanted_by} needs its loss. Call "
            f"`model.compile(optimizer, loss)` first. Received: model={model.name!r}, not compiled"
        )


def score_channels(
    labeled, feed, criterion, num_examples=None, class_weight=None, callbacks=(), cost="params"
):
    """`score` for a model that was read and data that was checked.

    Args:
        channels: `groups.LabeledModel`.
        feed: `datasets.Feed`, or `None` for criteria that need no data.
        criterion, num_examples, class_weight, cost: As in `score`.
        callbacks: Keras callbacks of the scoring pass.
    """
    totals, apart = None, {}
    if feed is not None:
        feed.check_devices(num_examples)
        if criterion in criteria.BY_COST:
            check_countable(CostModel(labeled)(), cost, f"cost={cost!r}")
        gated = gated_for(labeled, criterion)
        gather = functools.partial(
            gate_statistics, gated, labeled, feed, num_examples, class_weight, callbacks
        )
        if criterion == "oracle":
            refuse_class_weight(class_weight)
            apart["loss_changes"] = loss_changes(gated, labeled, feed, num_examples)
        elif criterion == "sensitivity":
            apart["slopes"] = _slopes(gated, labeled, feed, gather, cost)
        else:
            totals = gather()
        if criterion == "fisher":
            apart["ranks"] = removal_ranks(totals, unit_savings(labeled, cost))
            totals = totals[: len(ROWS)]
    return scores_of(labeled, criterion, totals, apart)


def takes_one_pass(criterion):
    """Whether all that a criterion needs of the data are the sums of one pass through gates."""
    return criterion not in ("oracle", "sensitivity", "fisher")


def gated_for(labeled, criterion):
    """The model that gathers what a criterion needs."""
    if criterion in ("log_odds", "log_odds_probed"):
        return OddsModel(labeled, NUM_PROBES if criterion == "log_odds_probed" else 0)
    if criterion == "fisher":
        return GatedModel(labeled, gates=FisherGates(labeled.num_units, name="gates"))
    return GatedModel(labeled)


def scores_of(labeled, criterion, totals=None, apart=None):
    """Scores by group, from what was gathered.

    Args:
        channels: `groups.LabeledModel`.
        criterion: As in `score`.
        totals: Statistics as `gate_statistics` gives them; `None`: none.
        apart: What single criteria need, by attribute of `GroupStatistics`: arrays `(num_units,)`.
    """
    function = criteria.get(criterion)
    norms, gammas = _filter_norms(labeled), _gammas(labeled)
    scores = criteria.Scores({}, criterion)
    for group in labeled.groups:
        part = slice(group.start, group.start + group.num_units)
        values = function(_statistics_of(group, part, totals, apart or {}, norms, gammas))
        if values is not None:
            scores[group.name] = _checked(values, group, criterion)
    return scores


def _slopes(gated, labeled, feed, gather, cost):
    """Slopes of each group's curve; `gather` gives statistics of gates, if they are needed."""
    found = curves(labeled, gated, feed, lambda: gather()[ROWS.index("square")], cost)
    slopes = np.zeros(labeled.num_units)
    for group, curve in zip(labeled.groups, found.values(), strict=True):
        slopes[group.start : group.start + group.num_units] = curve.slopes()
    return slopes


def _statistics_of(group, part, totals, apart, norms, gammas):
    rows = dict.fromkeys(ROWS + ODDS_ROWS)
    if totals is not None:
        rows.update(zip(rows, totals[:, part], strict=False))
    examples = 0 if totals is None else rows["examples"][0]  # older ones may count in part
    batches = 0 if totals is None else rows["batches"][0]

    def mean(row, num):
        return None if rows[row] is None else rows[row] / num

    scales = gammas[part]
    log_odds = probed = None
    if rows["odds"] is not None:
        log_odds = mean("odds", examples) + mean("spread", examples)
        correction = mean("probe", examples) - mean("spread", examples)
        noise = mean("probe_square", examples) - np.square(mean("probe", examples))
        probed = log_odds + shrunk(correction, noise / (examples * NUM_PROBES), log_odds)
    return criteria.GroupStatistics(
        name=group.name,
        num_units=group.num_units,
        num_examples=round(examples),
        num_batches=round(batches),
        mean=mean("sum", examples),
        mean_absolute=mean("absolute", examples),
        mean_square=mean("square", examples),
        mean_batch_square=mean("batch_square", batches),
        mean_log_odds=log_odds,
        mean_probed_log_odds=probed,
        filter_norms=norms[part],
        gammas=None if np.isnan(scales).any() else scales,
        **{name: values[part] for name, values in apart.items()},
    )


def _checked(values, group, criterion):
    values = np.asarray(values, np.float32)
    if values.shape != (group.num_units,) or not np.isfinite(values).all():
        raise ValueError(
            f"The criterion gave no finite score for each unit of group '{group.name}'. Expected a "
            f"finite array of shape ({group.num_units},). Received: criterion={criterion!r}, which "
            f"returned {values!r}"
        )
    return values


def _filter_norms(labeled):
    """Mean over the layers that make a unit of the L2 norm of its filters, `(num_units,)`."""
    norms = _per_unit(labeled, lambda _, effect: producing_kernels(effect), _norms_along)
    return np.where(np.isnan(norms), 0, norms)  # what only padding makes has no filter


def _gammas(labeled):
    """Mean absolute BatchNormalization scale of each unit, NaN where it has none."""
    return _per_unit(labeled, _scaled_by_gammas, lambda gamma, _: np.abs(gamma, dtype=np.float64))


def _per_unit(labeled, select, reduce):
    total, number = np.zeros(labeled.num_units), np.zeros(labeled.num_units)
    seen = set()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if id(call.operation) in seen:
            continue
        seen.add(id(call.operation))
        for name, axis, labels in select(call, effect):
            weight = keras.ops.convert_to_numpy(weight_of(call.operation, name))
            # types that NumPy does not know (bfloat16) are cast, others only as they are added up
            values = reduce(weight if weight.dtype.kind == "f" else weight.astype(np.float64), axis)
            units = labeled.units(labels)
            np.add.at(total, units[units >= 0], values[units >= 0])
            np.add.at(number, units[units >= 0], 1)
    with np.errstate(invalid="ignore"):
        return total / number


def _norms_along(kernel, axis):
    """L2 norms of the parts of a kernel along an axis, without an array of its size beside it."""
    axes = list(range(kernel.ndim))
    return np.sqrt(np.einsum(kernel, axes, kernel, axes, [axis % kernel.ndim], dtype=np.float64))


def _scaled_by_gammas(call, effect):
    is_batch_norm = isinstance(call.operation, keras.layers.BatchNormalization)
    if is_batch_norm and call.operation.scale and "gamma" in effect.weights:
        yield "gamma", 0, effect.weights["gamma"][0]
