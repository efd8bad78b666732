"""From the sums of a scoring pass and the weights of a model to the statistics of each group."""

import functools
from collections.abc import Callable, Iterable, Mapping

import keras
import numpy as np

from keras_taylor.reading.graph import Call
from keras_taylor.reading.groups import Group, LabeledModel
from keras_taylor.rules.base import Effect, producing_kernels, weight_of
from keras_taylor.scores.criteria import GroupStatistics
from keras_taylor.scores.log_odds import NUM_PROBES, ODDS_ROWS, shrink_to_noise
from keras_taylor.scores.scoring_passes import measure_activations
from keras_taylor.support.datasets import Feed
from keras_taylor.support.types import Array, FloatArray, IntArray

# Filters whose distances from all others are in memory at once.
_ROWS_AT_ONCE = 1024

# A weight by name, the axis along which units vary, and the labels along it.
_LabeledAxis = tuple[str, int, IntArray]


def statistics_by_group(
    labeled: LabeledModel,
    totals: FloatArray | None,
    extra: Mapping[str, FloatArray],
    measured: "LazyStatistics",
) -> Iterable[tuple[Group, GroupStatistics]]:
    """Each group with its statistics.

    Args:
        labeled: The labels of the model.
        totals: Statistics as `scoring_passes.gather_statistics` gives them; `None`: none.
        extra: What single criteria need, by attribute of `GroupStatistics`: arrays `(num_units,)`.
        measured: What is measured when a criterion asks.
    """
    norms, gammas = _filter_norms(labeled), _mean_gammas(labeled)
    for group in labeled.groups:
        part = slice(group.start, group.start + group.num_units)
        means = _Means(None if totals is None else totals[:, part])
        yield (
            group,
            GroupStatistics(
                name=group.name,
                num_units=group.num_units,
                num_examples=round(means.num_examples),
                num_batches=round(means.num_batches),
                mean=means.of("sum"),
                mean_absolute=means.of("absolute"),
                mean_square=means.of("square"),
                mean_batch_square=means.over_batches("batch_square"),
                mean_log_odds=means.log_odds(),
                mean_probed_log_odds=means.probed_log_odds(),
                filter_norms=norms[part],
                gammas=None if np.isnan(gammas[part]).any() else gammas[part],
                measure=functools.partial(measured.of, part),
                **{name: values[part] for name, values in extra.items()},
            ),
        )


class LazyStatistics:
    """What is measured of all units when a criterion first asks for it.

    Args:
        labeled: The labels of the model.
        feed: The data; `None`: there is none, and no activations.
        num_examples: As in `gather_statistics`.
    """

    def __init__(
        self, labeled: LabeledModel, feed: Feed | None = None, num_examples: int | None = None
    ) -> None:
        self._distances = functools.cache(lambda: _filter_distances(labeled))
        self._activations = functools.cache(
            lambda: {} if feed is None else measure_activations(labeled, feed, num_examples)
        )

    def of(self, part: slice, name: str) -> FloatArray | None:
        """A property of `GroupStatistics` for some of the units; `None` if there is no data for it."""
        values = self._distances() if name == "filter_distances" else self._activations().get(name)
        return None if values is None else values[part]


class _Means:
    """Means over examples or batches, from the sums of one group.

    Args:
        totals: The group's part of the sums, `(num_rows, num_units)`; `None`: there are none.
    """

    def __init__(self, totals: FloatArray | None) -> None:
        self._totals = totals
        self.num_examples = (
            0.0 if totals is None else totals[ODDS_ROWS["examples"], 0]
        )  # older ones count in part
        self.num_batches = 0.0 if totals is None else totals[ODDS_ROWS["batches"], 0]

    def of(self, row: str) -> FloatArray | None:
        """The mean over examples, `None` if the row was not gathered."""
        values = self._row(row)
        return None if values is None else values / self.num_examples

    def over_batches(self, row: str) -> FloatArray | None:
        """The mean over batches, `None` if the row was not gathered."""
        values = self._row(row)
        return None if values is None else values / self.num_batches

    def log_odds(self) -> FloatArray | None:
        """The mean loss change that follows from the log-odds."""
        odds, spread = self.of("odds"), self.of("spread")
        return None if odds is None or spread is None else odds + spread

    def probed_log_odds(self) -> FloatArray | None:
        """The same, with the curvature that probes measured in place of the spread."""
        log_odds, spread = self.log_odds(), self.of("spread")
        probe, probe_square = self.of("probe"), self.of("probe_square")
        if log_odds is None or spread is None or probe is None or probe_square is None:
            return None
        noise = probe_square - np.square(probe)
        return log_odds + shrink_to_noise(probe - spread, noise / (self.num_examples * NUM_PROBES), log_odds)

    def _row(self, name: str) -> FloatArray | None:
        number = ODDS_ROWS[name]
        return None if self._totals is None or number >= len(self._totals) else self._totals[number]


def _filter_norms(labeled: LabeledModel) -> FloatArray:
    """Mean over the layers that make a unit of the L2 norm of its filters, `(num_units,)`."""
    norms = _mean_per_unit(labeled, lambda _, effect: producing_kernels(effect), _norms_along)
    return np.where(np.isnan(norms), 0, norms)  # units that only padding makes have no filter


def _filter_distances(labeled: LabeledModel) -> FloatArray:
    """Mean over the layers that make a unit of the mean distance of its filters from all of the layer."""
    distances = _mean_per_unit(labeled, lambda _, effect: producing_kernels(effect), _distances_along)
    return np.where(np.isnan(distances), 0, distances)


def _mean_gammas(labeled: LabeledModel) -> FloatArray:
    """Mean absolute BatchNormalization scale of each unit, NaN where it has none."""
    return _mean_per_unit(labeled, _gamma_axes, lambda gamma, _: np.abs(gamma, dtype=np.float64))


def _mean_per_unit(
    labeled: LabeledModel,
    select: Callable[[Call, Effect], Iterable[_LabeledAxis]],
    reduce: Callable[[Array, int], FloatArray],
) -> FloatArray:
    """Mean of what `reduce` gives for each unit, over the weights that `select` names; NaN over none."""
    total, number = np.zeros(labeled.num_units), np.zeros(labeled.num_units)
    seen = set()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        if call.operation in seen:
            continue
        seen.add(call.operation)
        for name, axis, labels in select(call, effect):
            weight = keras.ops.convert_to_numpy(weight_of(call.operation, name))
            # types that NumPy does not know (bfloat16) are cast, others only as they are added up
            values = reduce(weight if weight.dtype.kind == "f" else weight.astype(np.float64), axis)
            units = labeled.units_of(labels)
            np.add.at(total, units[units >= 0], values[units >= 0])
            np.add.at(number, units[units >= 0], 1)
    with np.errstate(invalid="ignore"):
        return total / number


def _norms_along(kernel: Array, axis: int) -> FloatArray:
    """L2 norms of the parts of a kernel along an axis, without an array of its size beside it."""
    axes = list(range(kernel.ndim))
    return np.sqrt(np.einsum(kernel, axes, kernel, axes, [axis % kernel.ndim], dtype=np.float64))


def _distances_along(kernel: Array, axis: int) -> FloatArray:
    """Mean L2 distance of each part of a kernel along an axis from all of them."""
    filters = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1).astype(np.float64)
    filters -= filters.mean(0)  # distances stay, and less is lost where products are subtracted
    squares = np.square(filters).sum(1)
    means = np.zeros(len(filters))
    for start in range(0, len(filters), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        products = filters[rows] @ filters.T
        means[rows] = np.sqrt(np.maximum(squares[rows, None] + squares - 2 * products, 0)).mean(1)
    return means


def _gamma_axes(call: Call, effect: Effect) -> Iterable[_LabeledAxis]:
    """The scale of a BatchNormalization."""
    is_batch_norm = isinstance(call.operation, keras.layers.BatchNormalization)
    labels = effect.weights.get("gamma", (None,))[0]
    if is_batch_norm and call.operation.scale and labels is not None:
        yield "gamma", 0, labels
