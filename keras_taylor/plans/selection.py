"""How the units that leave are selected: the value that a user passes as `selection`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import keras
import numpy as np

from keras_taylor.scores.criteria import rank_for
from keras_taylor.support.arguments import MovedArgument

SCOPES = ("global", "layer")
RANKS = ("score", "cost")
AUTO = "auto"  # a value of `round_to`: the measured times of layers decide


@dataclasses.dataclass(frozen=True)
class Selection:
    """How the units that leave are selected.

    A goal says how much leaves, scores say how much each unit matters. A selection says how the two
    lead to a choice, and what every layer keeps whatever its scores are.

    Args:
        scope: "global" (the default) removes the least important units of the whole network. "layer"
            removes the least important units of each group, the same share of all groups.
        rank: "score" removes the units with the lowest scores first. "cost" removes the units with the
            lowest ratio of score to savings first, as the relaxed knapsack problem does (Dantzig,
            Operations Research 5, 1957). If the goal has several costs, each counts as much as it is hard
            to meet. `None` (the default): "cost" for criteria that estimate how much the loss grows
            (`taylor`, `log_odds` and their kin, `oracle`), "score" for all others, and for scores of
            your own.
        balance: A float from 0 to 1, 0.5 by default. Every group keeps at least this share of the units
            that `scope="layer"` would leave it, so that no layer collapses if much leaves. It never puts
            a goal out of reach. 0: there is no such floor.
        ratios: How much of single layers leaves: `{"conv3": 0.5, "block.*": (0.1, 0.4)}` removes half of
            the channels of one layer, and between a tenth and four tenths of each layer that a pattern
            matches. Keys are layer names, regular expressions that match whole names, or layers. Layers
            that leave together lose what all of their ratios allow. `round_to` and `min_channels` come
            first. At least these channels leave, even if the goal asks for less. `None` (the default):
            no ratios.
        round_to: Every group keeps a multiple of this number of channels, an int, 1 by default. With a
            goal for a latency (`compress` only) also "auto": 1, 4, 8 or 16, the least multiple that other
            widths of this network's layers are at most 5 % slower than, as measured on this machine.
        min_channels: Every group keeps at least this number of channels, an int, 1 by default.
        uniform: Which groups lose equally many units, in lock-step: the least important unit of each, then
            the next of each. `True`: groups of equal role, whose names differ in numbers only and that are
            equally wide, such as the hidden layers of all blocks. Names of layers, or regular expressions
            that match whole names: the groups that one of them matches are tied to each other. `None` (the
            default): a task or backbone of KerasHub loses what smaller numbers in its configuration can
            say, and comes back as one; other models have no ties. `False`: no ties; a task may come back
            Functional then.
        branches: Whether whole residual branches may leave: the sum that a branch ends in then passes its
            other side on. Each one competes with the channels, by its score and by what it saves. The scores
            have to be those of `score(..., branches=True)`. In a task of KerasHub whose configuration has a
            number of layers, the branches of a layer leave together, and the number follows; where it
            has none, the task comes back Functional. `False` by default.

    Raises:
        ValueError: if a value is not one of the above.

    Example:

    >>> selection = keras_taylor.Selection(ratios={".*": (0, 0.75)}, min_channels=2)
    >>> scores = keras_taylor.score(model, (x, y))
    >>> plan = keras_taylor.make_plan(model, scores, 0.3, selection=selection)
    """

    scope: str = "global"
    rank: str | None = None
    balance: float = 0.5
    ratios: Mapping[str | keras.Layer, float | tuple[float, float]] | None = None
    round_to: int | str = 1
    min_channels: int = 1
    uniform: bool | str | Sequence[str] | None = None
    branches: bool = False

    def __post_init__(self) -> None:
        _check_choice("scope", self.scope, SCOPES)
        if self.rank is not None:
            _check_choice("rank", self.rank, RANKS)
        balance = self.balance
        if isinstance(balance, bool) or not isinstance(balance, (int, float)) or not 0 <= balance <= 1:
            raise ValueError(
                "`balance` is the share of an even cut's channels that every group keeps. Expected a number "
                f"from 0 to 1. Received: balance={balance!r}"
            )
        if self.ratios is not None and not isinstance(self.ratios, Mapping):
            raise ValueError(
                "`ratios` says how much of single layers leaves. Expected a dict from layer names to "
                f"fractions. Received: ratios={self.ratios!r}"
            )
        for pattern, ratio in (self.ratios or {}).items():
            ratio_range(pattern, ratio)
        if self.round_to != AUTO:
            check_num_channels("round_to", self.round_to)
        check_num_channels("min_channels", self.min_channels)
        _check_uniform(self.uniform)
        if not isinstance(self.branches, (bool, np.bool_)):
            raise TypeError(f"Expected `True` or `False`. Received: branches={self.branches!r}")

    def for_criterion(self, criterion: str | Callable[..., Any] | None) -> "Selection":
        """This selection with a `rank`: its own, or the one that suits scores by a criterion.

        Args:
            criterion: A name, a callable, or `None` for scores of unknown origin.

        Returns:
            A `Selection` whose `rank` is not `None`.

        Example:

        >>> keras_taylor.Selection().for_criterion("taylor").rank
        'cost'
        """
        return dataclasses.replace(self, rank=self.rank or rank_for(criterion))


def ratio_range(pattern: str | keras.Layer, ratio: object) -> tuple[float, float]:
    """The least and the largest share that a ratio allows to leave; refuses a value that is no ratio."""
    low, high = ratio if isinstance(ratio, (tuple, list)) and len(ratio) == 2 else (ratio, ratio)
    if not (_is_real_number(low) and _is_real_number(high) and 0 <= low <= high <= 1 and low < 1):
        raise ValueError(
            "A ratio is the fraction of a layer's channels to remove. Expected a number from 0 on and below "
            f"1, or two numbers, at least and at most. Received: ratios={{{pattern!r}: {ratio!r}}}"
        )
    return float(low), float(high)


def check_num_channels(name: str, value: object) -> None:
    """Refuses a number of channels that is not a whole number from 1 on."""
    if value == AUTO:
        raise ValueError(
            f"`{name}` is found by timing layers, which only `compress` with a goal for a latency does. "
            f"Expected a whole number from 1 on. Received: {name}={value!r}"
        )
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"`{name}` is a number of channels. Expected a whole number from 1 on. Received: {name}={value!r}"
        )


def parse_selection(selection: object) -> Selection:
    """The `Selection` that a user passed, or the default one for `None`; refuses anything else."""
    if selection is None:
        return Selection()
    if not isinstance(selection, Selection):
        raise TypeError(
            "`selection` says how channels are selected. Expected a `keras_taylor.Selection`. "
            f"Received: selection={selection!r}"
        )
    return selection


# Arguments of earlier versions that are fields of a `Selection` now.
MOVED_TO_SELECTION = {
    field.name: MovedArgument("selection", Selection, field.name) for field in dataclasses.fields(Selection)
}


def _check_uniform(uniform: object) -> None:
    is_listed = isinstance(uniform, (list, tuple)) and bool(uniform)
    if isinstance(uniform, (bool, str, type(None))) or (
        is_listed and all(isinstance(one, str) for one in uniform)  # type: ignore[attr-defined]  # a list
    ):
        return
    raise ValueError(
        "`uniform` says which groups lose equally many units. Expected `True`, `False`, `None`, or names of "
        f"layers or regular expressions, each for groups that are tied. Received: uniform={uniform!r}"
    )


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"Expected one of {', '.join(map(repr, known))}. Received: {name}={value!r}")


def _is_real_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
