"""What makes a channel unit important: formulas over gate statistics and weights.

With g the derivative of one example's loss with respect to a unit's gate, and
means over examples:

| name | formula | source |
|---|---|---|
| `taylor` | mean(g^2) | Molchanov et al. 2019 (arXiv 1906.10771), eq. 8, gate, per example |
| `taylor_batch` | mean over mini-batches of (mean g)^2 | the same paper's published procedure |
| `taylor_abs` | mean(abs(g)) | Molchanov et al. 2016 (arXiv 1611.06440), eq. 7 |
| `taylor2` | -mean(g) + mean(g^2) / 2 | 2019 paper, second order, Gauss-Newton diagonal |
| `log_odds` | mean of what the loss grows by if the log-odds of the true class are linear in the gate, and of
  how the wrong classes spread | this project; `log_odds.OddsModel` |
| `log_odds_probed` | the same, the curvature measured by four probes an example | this project |
| `fisher` | rank in a greedy removal: the next unit is the one that adds least to mean((sum of g of all
  that have gone)^2) / 2 a parameter (or FLOP) saved | this project, after the 2019 paper's second order |
| `magnitude` | norm of the filters, relative to their group's mean | label-free baseline |
| `batchnorm` | mean(abs(gamma)) | Liu et al. 2017 (arXiv 1708.06519) |
| `random` | uniform | baseline |
| `sensitivity` | measured divergence of the predictions a parameter (or FLOP) saved, as a growing share of
  its group goes and what reads it is refitted; within a group by the error of that fit | for `repair` |
| `oracle` | true change of the mean loss without the unit | the judge of all others |
"""

import dataclasses

import numpy as np

# Criteria that hold what is lost against what is saved.
BY_COST = ("sensitivity", "fisher")
# Criteria that say what the loss grows by: sums of them can be held against sums of savings.
OF_LOSS = ("taylor", "taylor_batch", "taylor_abs", "taylor2", "log_odds", "log_odds_probed", "oracle")


class Scores(dict):
    """Scores by group: a dict that knows by which criterion.

    Args:
        scores: Group name -> array `(num_units,)`.
        criterion: A name or a callable.
    """

    def __init__(self, scores, criterion):
        super().__init__(scores)
        self.criterion = criterion


def rank_for(criterion):
    """How units are ranked by its scores, by `benchmarks/results/ranking.md`: "score" or "cost"."""
    return "cost" if isinstance(criterion, str) and criterion in OF_LOSS else "score"


@dataclasses.dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What a criterion may look at, for the units of one group.

    Arrays have shape `(num_units,)` and dtype float64. Those over gate derivatives
    are `None` where no data was used; `loss_changes` is there for `oracle` only.

    Attributes:
        name: The group's name.
        num_units: Number of units.
        num_examples, num_batches: What the means are over.
        mean, mean_absolute, mean_square: Means over examples of g, abs(g), g^2.
        mean_batch_square: Mean over batches of (mean g)^2.
        mean_log_odds: Mean over examples of the loss change that follows from the log-odds.
        mean_probed_log_odds: The same with the curvature that probes measured; for `log_odds_probed` only.
        filter_norms: Mean L2 norm of each unit's filters over the layers that make it.
        gammas: Mean absolute BatchNormalization scale, `None` without such a layer.
        loss_changes: Mean loss without the unit minus mean loss with it.
        slopes: Divergence of the predictions for what is saved (`sensitivity.Curve.slopes`).
        ranks: When each unit goes in a greedy removal (`fisher.removal_ranks`).
    """

    name: str
    num_units: int
    num_examples: int
    num_batches: int
    mean: np.ndarray | None
    mean_absolute: np.ndarray | None
    mean_square: np.ndarray | None
    mean_batch_square: np.ndarray | None
    filter_norms: np.ndarray
    gammas: np.ndarray | None
    mean_log_odds: np.ndarray | None = None
    mean_probed_log_odds: np.ndarray | None = None
    loss_changes: np.ndarray | None = None
    slopes: np.ndarray | None = None
    ranks: np.ndarray | None = None


def taylor(statistics):
    """Mean squared gate derivative."""
    return statistics.mean_square


def taylor_batch(statistics):
    """Mean over batches of the squared mean gate derivative: depends on the batch size."""
    return statistics.mean_batch_square


def taylor_abs(statistics):
    """Mean absolute gate derivative."""
    return statistics.mean_absolute


def taylor_abs_normalized(statistics):
    """`taylor_abs` with the 2016 paper's L2 normalization of each layer (a callable criterion)."""
    return statistics.mean_absolute / max(np.linalg.norm(statistics.mean_absolute), 1e-30)


def taylor2(statistics):
    """Loss change of removing a unit, to second order (Gauss-Newton diagonal)."""
    return -statistics.mean + statistics.mean_square / 2


def log_odds(statistics):
    """Loss change of removing a unit, if the log-odds of the true class are linear in its gate."""
    return statistics.mean_log_odds


def log_odds_probed(statistics):
    """The same, with the curvature that probes measured, as far as it stands out of their noise."""
    return statistics.mean_probed_log_odds


def magnitude(statistics):
    """Norm of a unit's filters, relative to the mean of its group."""
    return statistics.filter_norms / max(statistics.filter_norms.mean(), 1e-30)


def batchnorm(statistics):
    """Mean absolute BatchNormalization scale; `None` where there is none."""
    return statistics.gammas


def random(statistics):
    """Uniform numbers from NumPy's global generator (`keras.utils.set_random_seed`)."""
    return np.random.random_sample(statistics.num_units)


def sensitivity(statistics):
    """Measured divergence of the predictions for what is saved, on the group's curve."""
    return statistics.slopes


def fisher(statistics):
    """Rank in a greedy removal of units that are looked at together."""
    return statistics.ranks


def oracle(statistics):
    """True change of the mean loss without the unit."""
    return statistics.loss_changes


_TAYLOR = (taylor, taylor_batch, taylor_abs, taylor2)
WITH_DATA = {f.__name__: f for f in (*_TAYLOR, log_odds, log_odds_probed, fisher, sensitivity, oracle)}
LABEL_FREE = {f.__name__: f for f in (magnitude, batchnorm, random)}


def get(criterion):
    """The function behind a criterion's name; a callable is returned as it is.

    Raises:
        ValueError: for a name that is not in the table.
    """
    named = {**WITH_DATA, **LABEL_FREE}
    if callable(criterion):
        return criterion
    if criterion not in named:
        raise ValueError(
            f"Unknown criterion. Expected one of {', '.join(sorted(named))}, or a callable that "
            "takes a `GroupStatistics` and returns an array `(num_units,)`. "
            f"Received: criterion={criterion!r}"
        )
    return named[criterion]
