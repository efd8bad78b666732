"""Criteria: formulas that turn gate statistics and weights into the importance of each channel unit.

Every unit has a gate: a factor that multiplies its channels, 1 at first. With 0 the unit is gone. Let g be
the derivative of one example's loss by a gate. Without the unit that loss changes by -g, to first order. The
table says for each criterion what it computes, with means over examples, and where that comes from:

    taylor            mean(g^2)
                      Molchanov et al., Importance estimation for neural network pruning, CVPR 2019
                      (arXiv 1906.10771), eq. 8, with a gate
    taylor_batch      mean over batches of (mean of g over the batch)^2
                      published code of the same paper
    taylor_abs        mean(abs(g))
                      Molchanov et al., Pruning convolutional neural networks for resource efficient
                      inference, ICLR 2017 (arXiv 1611.06440), eq. 7
    taylor2           -mean(g) + mean(g^2) / 2
                      second order of the CVPR 2019 paper, with the Fisher information in place of the
                      Hessian's diagonal; Hassibi and Stork, Optimal brain surgeon, NIPS 1992
    log_odds          mean(log(p + q exp(-g / q)) + (1 - s) / (1 + s) g^2 / q / 2)
                      this project: exact if the log-odds of the true class are linear in the gate, see
                      `log_odds.OddsModel`
    log_odds_probed   the same with a curvature that four probes an example measure
                      this project
    fisher            rank in a greedy removal by s^T F s / 2, with F = mean(g g^T), for what is saved
                      this project, after optimal brain surgeon, see `fisher.removal_ranks`
    magnitude         L2 norm of the unit's filters / mean of its group
                      Li et al., Pruning filters for efficient ConvNets, ICLR 2017 (with the L1 norm)
    batchnorm         mean(abs(gamma))
                      Liu et al., Learning efficient convolutional networks through network slimming,
                      ICCV 2017 (arXiv 1708.06519)
    fpgm              mean distance of the unit's filters from those of its layer / mean of its group
                      He et al., Filter pruning via geometric median, CVPR 2019 (arXiv 1811.00250)
    activation        mean(abs(a)) / mean of its group, with a the values that layers read of the unit
                      "mean activation" of Molchanov et al., ICLR 2017
    apoz              share of a that is not zero: 1 - APoZ, the average percentage of zeros
                      Hu et al., Network trimming, 2016 (arXiv 1607.03250)
    random            uniform
                      baseline
    sensitivity       measured divergence of the predictions for each parameter (or FLOP) saved
                      this project, see `sensitivity.SensitivityCurve`
    oracle            measured change of the mean loss without the unit
                      "oracle pruning" of Molchanov et al., ICLR 2017: the judge of all others

A criterion is a function of a `GroupStatistics`, which holds the statistics of one group of units. It
returns an array `(num_units,)`: the higher, the more important. All scores must be finite, also those of dead
units, whose g are all zero. `None` means that it cannot judge this group, whose units then all stay.
Statistics are sums in float32, so a difference of two may come out slightly negative.

To use a criterion of your own, pass the function. For example, the signal-to-noise ratio of the derivatives:

>>> def signal_to_noise(statistics):
...     variance = np.maximum(statistics.mean_square - statistics.mean**2, 0)
...     return abs(statistics.mean) / np.sqrt(variance + 1e-12)
>>> scores = keras_taylor.score(model, (x, y), criterion=signal_to_noise)
>>> plan = keras_taylor.make_plan(model, scores, 0.3)

To make it a criterion of this package, with a name:

1. Write the function below. Its docstring has the formula and the source ("this project" if it is new).
   Read statistics that only data gives through `_required`, which refuses statistics that were not gathered:

        def signal_to_noise(statistics: GroupStatistics) -> FloatArray:
            mean = _required(statistics.mean, statistics)
            variance = _required(statistics.mean_square, statistics) - np.square(mean)
            return np.abs(mean) / np.sqrt(np.maximum(variance, 0) + 1e-12)

2. List it: in `LOSS_CRITERIA` if it needs the loss on data (as this one does), in `ACTIVATION_CRITERIA` if
   it needs data and no loss, else in `DATA_FREE_CRITERIA`.
3. Say how `make_plan` ranks units by it. If its scores estimate how much the loss grows, so that sums of
   scores can be compared with sums of saved parameters, list its name in `LOSS_CHANGE_CRITERIA`: units are
   ranked by score for cost. If its scores are already relative to what a unit saves, list it in
   `COST_AWARE_CRITERIA`. Otherwise (as here) list it in neither: units are ranked by score.
4. Add it to the table above, and its formula to `FORMULAS` in `tests/scores/test_scoring.py`, which computes
   it by hand. `score`, `compress`, `PrunableModel` and the command line know it then.

If it needs a statistic that is not there, fill in a new attribute of `GroupStatistics`, `None` by default, in
`group_statistics.statistics_by_group`. The values come from one of three places:

- What needs no gates is measured when a criterion first asks: add a property to `GroupStatistics`, as
  `filter_distances` and `zero_share` are, and how it is measured to `group_statistics.LazyStatistics`.
- A sum over examples of a function of g is a row: add it to `gates.GATE_STATISTICS` (its `loss_power` says
  how it grows with the loss, 4 for g^4) and to `gates.batch_statistics`. Every criterion has it then, also in
  `PrunableModel`, and every pass pays for it. Saved `PrunableModel` files hold these rows, so files of
  earlier versions no longer load.
- Anything else needs a subclass of `gates.Gates`, as `fisher.FisherGates` is, chosen in
  `scoring.make_gated_model`. `PrunableModel` does not use it, so list the criterion in `_NEED_OWN_PASS` of
  `keras_taylor.loop.wrapper`; if one pass is not enough, exclude it in `scoring.is_single_pass`.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from keras_taylor.support.types import Array, FloatArray

__all__ = [
    "GroupStatistics",
    "Scores",
    "activation",
    "apoz",
    "batchnorm",
    "fisher",
    "fpgm",
    "log_odds",
    "log_odds_probed",
    "magnitude",
    "oracle",
    "random",
    "sensitivity",
    "taylor",
    "taylor2",
    "taylor_abs",
    "taylor_abs_normalized",
    "taylor_batch",
]

# Criteria whose scores are relative to what a unit saves.
COST_AWARE_CRITERIA = ("sensitivity", "fisher")
# Criteria whose scores estimate how much the loss grows: sums of them can be compared with sums of savings.
LOSS_CHANGE_CRITERIA = (
    "taylor",
    "taylor_batch",
    "taylor_abs",
    "taylor2",
    "log_odds",
    "log_odds_probed",
    "oracle",
)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupStatistics:
    """The statistics of one group of units, which criteria look at.

    Arrays have shape `(num_units,)` and dtype float64. g is the derivative of an example's loss, weighted
    as the example is, by a unit's gate.

    Attributes:
        name: The group's name.
        num_units: Number of units.
        num_examples: Number of examples that means are over; 0 without data.
        num_batches: Number of batches that `mean_batch_square` is over; 0 without data.
        mean: Mean over examples of g. This and the next three are `None` without data.
        mean_absolute: Mean over examples of abs(g).
        mean_square: Mean over examples of g^2.
        mean_batch_square: Mean over batches of (mean over the batch of g)^2.
        filter_norms: Mean L2 norm of each unit's filters over the layers that make it.
        gammas: Mean absolute BatchNormalization scale; `None` if a unit has none.
        mean_log_odds: For "log_odds" and "log_odds_probed", else `None`: mean over examples of the loss
            change that follows from the log-odds, see `log_odds.OddsModel`.
        mean_probed_log_odds: For "log_odds_probed", else `None`: the same, with measured curvature.
        loss_changes: For "oracle", else `None`: mean loss without the unit minus mean loss with it.
        slopes: For "sensitivity", else `None`: divergence for what is saved, see
            `sensitivity.SensitivityCurve.slopes`.
        ranks: For "fisher", else `None`: when each unit goes, see `fisher.removal_ranks`.
        measure: A function that measures what only some criteria ask for, by the names of the properties
            below; they call it.

    Example:

    >>> def standard_error(statistics):
    ...     variance = np.maximum(statistics.mean_square - statistics.mean**2, 0)
    ...     return np.sqrt(variance / statistics.num_examples)
    >>> errors = keras_taylor.score(model, (x, y), criterion=standard_error)

    Activations are measured when a criterion asks for them:

    >>> def taylor_of_active_units(statistics):
    ...     return statistics.mean_square * (1 - statistics.zero_share)
    >>> scores = keras_taylor.score(model, (x, y), criterion=taylor_of_active_units)
    """

    name: str
    num_units: int
    num_examples: int
    num_batches: int
    mean: FloatArray | None
    mean_absolute: FloatArray | None
    mean_square: FloatArray | None
    mean_batch_square: FloatArray | None
    filter_norms: FloatArray
    gammas: FloatArray | None
    mean_log_odds: FloatArray | None = None
    mean_probed_log_odds: FloatArray | None = None
    loss_changes: FloatArray | None = None
    slopes: FloatArray | None = None
    ranks: FloatArray | None = None
    measure: Callable[[str], FloatArray | None] = dataclasses.field(default_factory=lambda: lambda name: None)

    @property
    def filter_distances(self) -> FloatArray | None:
        """Mean L2 distance of a unit's filters from all of the layer, over the layers that make it."""
        return self.measure("filter_distances")

    @property
    def mean_activation(self) -> FloatArray | None:
        """Mean of a unit's activations: the values that layers read of it.

        The mean is over examples and positions of each tensor that is read, then over these tensors. Sample
        weights do not count. Like the other activations, it is measured by a pass of its own, at inference,
        when a criterion first asks. `None` without data and in a `PrunableModel`.
        """
        return self.measure("mean_activation")

    @property
    def mean_absolute_activation(self) -> FloatArray | None:
        """Mean absolute value of a unit's activations, see `mean_activation`."""
        return self.measure("mean_absolute_activation")

    @property
    def mean_square_activation(self) -> FloatArray | None:
        """Mean square of a unit's activations, see `mean_activation`."""
        return self.measure("mean_square_activation")

    @property
    def zero_share(self) -> FloatArray | None:
        """Share of a unit's activations that are exactly zero, see `mean_activation`."""
        return self.measure("zero_share")


# A function from the statistics of a group to scores `(num_units,)`, or `None` for "cannot judge".
CriterionFunction: TypeAlias = Callable[[GroupStatistics], Array | None]
# A name of the table, or a function of one's own.
Criterion: TypeAlias = str | CriterionFunction


class Scores(dict[str, Array]):
    """Scores by group: a dict that remembers the criterion which made them.

    `make_plan` takes the criterion to decide how to rank units, see `keras_taylor.Selection`. `copy`, `|`,
    `copy.deepcopy` and `pickle` keep it. `dict(scores)`, `{**scores}` and comprehensions make a plain dict,
    which does not have it. `make_plan` then ranks by score and warns, unless the selection names a `rank`.
    To make `Scores` of it again: `Scores(values, criterion)`.

    Args:
        scores: Group name -> array `(num_units,)`; the higher, the more important.
        criterion: The criterion that made them, a name or a function.

    Attributes:
        criterion: As above.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="taylor")
    >>> scores.criterion
    'taylor'
    >>> normalized = keras_taylor.Scores({name: s / s.max() for name, s in scores.items()}, scores.criterion)
    >>> plan = keras_taylor.make_plan(model, normalized, 0.3)
    """

    def __init__(
        self, scores: Mapping[str, Array] | Iterable[tuple[str, Array]], criterion: Criterion
    ) -> None:
        super().__init__(scores)
        self.criterion = criterion

    def copy(self) -> "Scores":
        """Another `Scores` with the same arrays and criterion."""
        return Scores(self, self.criterion)

    def __or__(self, other: Mapping[str, Array]) -> "Scores":  # type: ignore[override]  # dict's is overloaded
        if not isinstance(other, dict):
            return NotImplemented
        return Scores({**self, **other}, self.criterion)

    def __ror__(self, other: Mapping[str, Array]) -> "Scores":  # type: ignore[override]  # dict's is overloaded
        if not isinstance(other, dict):
            return NotImplemented
        return Scores({**other, **self}, self.criterion)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scores, (dict(self), self.criterion)


def rank_for(criterion: object) -> str:
    """How `make_plan` ranks units by the scores of a criterion: "score" or "cost".

    Measured in `benchmarks/results/ranking.md`.
    """
    return "cost" if isinstance(criterion, str) and criterion in LOSS_CHANGE_CRITERIA else "score"


def warn_without_criterion(scores: Mapping[str, Array]) -> None:
    """Warns the caller of `make_plan` of scores that do not say which criterion made them.

    They may be a plain copy of `Scores`, which would be ranked otherwise.
    """
    if isinstance(scores, Scores):
        return
    warnings.warn(
        "The scores do not say which criterion made them, so units are ranked by their scores alone. Pass "
        '`selection=keras_taylor.Selection(rank="score")` to keep that, `rank="cost"` if scores estimate how '
        f"much the loss grows (the criteria {', '.join(LOSS_CHANGE_CRITERIA)}). Or pass "
        "`keras_taylor.Scores(scores, criterion)`, which is what `score` returns. "
        f"Received: scores of type {type(scores).__name__}, rank=None",
        stacklevel=3,
    )


def _required(values: FloatArray | None, statistics: GroupStatistics) -> FloatArray:
    """The values of an attribute that is `None` where it was not gathered."""
    if values is None:
        raise ValueError(
            "The criterion needs statistics that were not gathered. Pass `ds`, and pass the criterion by its "
            f"name, if it has one. Received: statistics of group '{statistics.name}' without them"
        )
    return values


def _relative_to_mean(values: FloatArray) -> FloatArray:
    """Values of a group divided by their mean, so that those of different layers can be compared."""
    return values / max(values.mean(), 1e-30)


def taylor(statistics: GroupStatistics) -> FloatArray:
    """Mean squared gate derivative, mean(g^2): the default.

    The squared first-order change of the loss without the unit, example by example. Molchanov et al.,
    Importance estimation for neural network pruning, CVPR 2019 (arXiv 1906.10771), eq. 8, with a gate.

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)`, in squared units of the loss.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="taylor")
    """
    return _required(statistics.mean_square, statistics)


def taylor_batch(statistics: GroupStatistics) -> FloatArray:
    """Mean over batches of the squared mean gate derivative, mean((mean over the batch of g)^2).

    The published code of Molchanov et al., CVPR 2019, computes this. It depends on the batch size; with
    one example a batch it is `taylor`.

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)`, in squared units of the loss.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="taylor_batch", batch_size=32)
    """
    return _required(statistics.mean_batch_square, statistics)


def taylor_abs(statistics: GroupStatistics) -> FloatArray:
    """Mean absolute gate derivative, mean(abs(g)).

    The absolute first-order change of the loss without the unit. Molchanov et al., Pruning convolutional
    neural networks for resource efficient inference, ICLR 2017 (arXiv 1611.06440), eq. 7, without the
    normalization of layers (`taylor_abs_normalized`).

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)`, in units of the loss.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="taylor_abs")
    """
    return _required(statistics.mean_absolute, statistics)


def taylor_abs_normalized(statistics: GroupStatistics) -> FloatArray:
    """`taylor_abs` divided by its L2 norm over the group; has no name, pass the function.

    The layer-wise normalization of Molchanov et al., ICLR 2017.

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)` of norm 1.

    Example:

    >>> normalized = keras_taylor.criteria.taylor_abs_normalized
    >>> scores = keras_taylor.score(model, (x, y), criterion=normalized)
    """
    values = _required(statistics.mean_absolute, statistics)
    return values / max(float(np.linalg.norm(values)), 1e-30)


def taylor2(statistics: GroupStatistics) -> FloatArray:
    """Loss change without the unit to second order, -mean(g) + mean(g^2) / 2.

    With H the second derivative of the mean loss by the gate, the change is -mean(g) + H / 2. For a
    likelihood H is close to the Fisher information mean(g^2). Second order of Molchanov et al., CVPR 2019;
    Hassibi and Stork, Optimal brain surgeon, NIPS 1992.

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)`, in units of the loss; may be negative.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="taylor2")
    """
    mean = _required(statistics.mean, statistics)
    return -mean + _required(statistics.mean_square, statistics) / 2


def log_odds(statistics: GroupStatistics) -> FloatArray:
    """Loss change without the unit, if the log-odds of the true class are linear in its gate.

    With p the probability of an example's class, q = 1 - p, and s the sum of the squared shares that the
    wrong classes have of q: mean(log(p + q exp(-g / q)) + (1 - s) / (1 + s) g^2 / q / 2). Of this project;
    derived at `log_odds.OddsModel`. For classifiers with one output and a cross-entropy.

    Args:
        statistics: Statistics of one group, with data, gathered for this criterion.

    Returns:
        A float64 array `(num_units,)`, in nats; may be negative.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="log_odds")
    """
    return _required(statistics.mean_log_odds, statistics)


def log_odds_probed(statistics: GroupStatistics) -> FloatArray:
    """`log_odds` with the curvature of the log-odds, which four probes an example measure.

    The difference from `log_odds` is shrunk as far as it is noise (`log_odds.shrink_to_noise`). Of this
    project; derived at `log_odds.OddsModel`. It takes about five times as long.

    Args:
        statistics: Statistics of one group, with data, gathered for this criterion.

    Returns:
        A float64 array `(num_units,)`, in nats; may be negative.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="log_odds_probed")
    """
    return _required(statistics.mean_probed_log_odds, statistics)


def magnitude(statistics: GroupStatistics) -> FloatArray:
    """L2 norm of a unit's filters, divided by the mean of its group; needs no data.

    Li et al., Pruning filters for efficient ConvNets, ICLR 2017 (with the L1 norm, and layer by layer).

    Args:
        statistics: Statistics of one group.

    Returns:
        A float64 array `(num_units,)` of mean 1.

    Example:

    >>> scores = keras_taylor.score(model, criterion="magnitude")
    """
    return _relative_to_mean(statistics.filter_norms)


def batchnorm(statistics: GroupStatistics) -> FloatArray | None:
    """Mean absolute BatchNormalization scale, mean(abs(gamma)); needs no data.

    Liu et al., Learning efficient convolutional networks through network slimming, ICCV 2017
    (arXiv 1708.06519).

    Args:
        statistics: Statistics of one group.

    Returns:
        A float64 array `(num_units,)`; `None` for a group without BatchNormalization.

    Example:

    >>> scores = keras_taylor.score(model, criterion="batchnorm")
    """
    return statistics.gammas


def fpgm(statistics: GroupStatistics) -> FloatArray:
    """Mean distance of a unit's filters from all filters of its layer, divided by the mean of its group.

    Filters near the geometric median of their layer are the ones that others can replace. Needs no data. He
    et al., Filter pruning via geometric median for deep convolutional neural networks acceleration, CVPR 2019
    (arXiv 1811.00250), which takes the same share of each layer: `Selection(scope="layer")`.

    Args:
        statistics: Statistics of one group.

    Returns:
        A float64 array `(num_units,)` of mean 1.

    Example:

    >>> scores = keras_taylor.score(model, criterion="fpgm")
    >>> plan = keras_taylor.make_plan(model, scores, 0.3, selection=keras_taylor.Selection(scope="layer"))
    """
    return _relative_to_mean(_required(statistics.filter_distances, statistics))


def activation(statistics: GroupStatistics) -> FloatArray:
    """Mean absolute activation, divided by the mean of its group; needs examples, but no labels or loss.

    After a ReLU it is the mean activation of Molchanov et al., ICLR 2017. An activation is a value that a
    layer reads of the unit, see `GroupStatistics.mean_activation`.

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)` of mean 1.

    Example:

    >>> scores = keras_taylor.score(model, x, criterion="activation")
    """
    return _relative_to_mean(_required(statistics.mean_absolute_activation, statistics))


def apoz(statistics: GroupStatistics) -> FloatArray | None:
    """Share of a unit's activations that are not zero; needs examples, but no labels or loss.

    It is 1 - APoZ, the average percentage of zeros: Hu et al., Network trimming: a data-driven neuron pruning
    approach towards efficient deep architectures, 2016 (arXiv 1607.03250). An activation is a value that a
    layer reads of the unit, see `GroupStatistics.mean_activation`.

    Args:
        statistics: Statistics of one group, with data.

    Returns:
        A float64 array `(num_units,)` between 0 and 1; `None` for a group without any zero, as where there
        is no ReLU.

    Example:

    >>> scores = keras_taylor.score(model, x, criterion="apoz")
    """
    zeros = _required(statistics.zero_share, statistics)
    return 1 - zeros if zeros.any() else None


def random(statistics: GroupStatistics) -> FloatArray:
    """Uniform numbers between 0 and 1, the baseline; needs no data.

    They come from NumPy's global generator, which `keras.utils.set_random_seed` seeds.

    Args:
        statistics: Statistics of one group.

    Returns:
        A float64 array `(num_units,)`.

    Example:

    >>> keras.utils.set_random_seed(0)
    >>> scores = keras_taylor.score(model, criterion="random")
    """
    return np.random.random_sample(statistics.num_units)


def sensitivity(statistics: GroupStatistics) -> FloatArray:
    """Measured divergence of the predictions for each parameter (or FLOP) that a unit saves.

    Shares of a group are removed, the layers that read it are refitted, and the predictions of the rest
    are compared with the whole model's. Of this project, see `sensitivity.SensitivityCurve`.

    Args:
        statistics: Statistics of one group, gathered for this criterion.

    Returns:
        A float64 array `(num_units,)`: nats (or relative squared difference) a parameter or FLOP.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="sensitivity", cost="flops")
    """
    return _required(statistics.slopes, statistics)


def fisher(statistics: GroupStatistics) -> FloatArray:
    """Rank in a greedy removal that considers pairs of units.

    The next unit is the one that adds least to s^T F s / 2 for what it saves; s marks the units that have
    gone, F is the mean over examples of g g^T. Of this project, after Hassibi and Stork, Optimal brain
    surgeon, NIPS 1992; see `fisher.removal_ranks`.

    Args:
        statistics: Statistics of one group, gathered for this criterion.

    Returns:
        A float64 array `(num_units,)`: 1 for the unit of the network that goes last.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="fisher", cost="params")
    """
    return _required(statistics.ranks, statistics)


def oracle(statistics: GroupStatistics) -> FloatArray:
    """Measured change of the mean loss when the unit alone is removed.

    It takes one evaluation of the data a unit: "oracle pruning" of Molchanov et al., ICLR 2017.

    Args:
        statistics: Statistics of one group, gathered for this criterion.

    Returns:
        A float64 array `(num_units,)`, in units of the loss; may be negative.

    Example:

    >>> scores = keras_taylor.score(model, (x, y), criterion="oracle", num_examples=256)
    """
    return _required(statistics.loss_changes, statistics)


# Criteria that need the loss on data, by name.
LOSS_CRITERIA: dict[str, CriterionFunction] = {
    "taylor": taylor,
    "taylor_batch": taylor_batch,
    "taylor_abs": taylor_abs,
    "taylor2": taylor2,
    "log_odds": log_odds,
    "log_odds_probed": log_odds_probed,
    "fisher": fisher,
    "sensitivity": sensitivity,
    "oracle": oracle,
}
# Criteria that need data, but neither labels nor a loss, by name.
ACTIVATION_CRITERIA: dict[str, CriterionFunction] = {
    "activation": activation,
    "apoz": apoz,
}
# Criteria that need no data, by name.
DATA_FREE_CRITERIA: dict[str, CriterionFunction] = {
    "magnitude": magnitude,
    "batchnorm": batchnorm,
    "fpgm": fpgm,
    "random": random,
}


def get(criterion: Criterion) -> CriterionFunction:
    """The function behind a criterion's name; a function is returned unchanged.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if callable(criterion):
        return criterion
    named = {**LOSS_CRITERIA, **ACTIVATION_CRITERIA, **DATA_FREE_CRITERIA}
    if not isinstance(criterion, str) or criterion not in named:
        raise ValueError(
            f"Unknown criterion. Expected one of {', '.join(sorted(named))}, or a callable that "
            "takes a `GroupStatistics` and returns an array `(num_units,)`. "
            f"Received: criterion={criterion!r}"
        )
    return named[criterion]
