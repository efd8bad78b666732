"""How many channels each group must lose, and may lose."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from keras_taylor.budget.measured_costs import measured_cost_of
from keras_taylor.reading.groups import matching

AUTO = "auto"  # of `round_to`: what the measured times of layers say


@dataclasses.dataclass(frozen=True)
class Limits:
    """What holds for every group, whatever the scores.

    Attributes:
        round_to, min_channels: As in `make_plan`.
        ratios: Group -> the least and the largest share of its channels that go, see `ratio_limits`.
    """

    round_to: int = 1
    min_channels: int = 1
    ratios: Mapping[str, tuple] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_whole("round_to", self.round_to)
        _check_whole("min_channels", self.min_channels)

    def bounds(self, labeled, whole=None, share=1.0):
        """How many units go of each group.

        Args:
            channels: `groups.LabeledModel`.
            whole: Group -> how many units it had in the original, of which ratios are shares, where
                the model has lost some already.
            share: How much of the way to the goal is gone after this, from 0 to 1: so much of the
                least ratios holds.

        Returns:
            The least and the largest number, two int64 arrays `(num_groups,)`.
        """
        least, most = [], []
        for group in labeled.groups:
            low, high = self.ratios.get(group.name, (0.0, 1.0))
            original = (whole or {}).get(group.name, group.num_units)
            low, high = _whole_numbers(low, high, original)
            gone = original - group.num_units
            most.append(max(min(high - gone, group.num_units - min(self.min_channels, group.num_units)), 0))
            least.append(min(max(int(share * low) - gone, 0), most[-1]))
        return np.array(least, np.int64), np.array(most, np.int64)


def check_round_to(round_to, measured):
    """Refuses "auto" where no times are measured that could say which multiple pays.

    Args:
        round_to: What the user passed.
        measured: The measured parts of the goal, as in `goals.Goal.measured`.

    Raises:
        ValueError: if it is "auto" and no latency is asked for.
    """
    if round_to == AUTO and not any(measured_cost_of(key).kind == "latency" for key in measured):
        raise ValueError(
            "`round_to='auto'` takes the multiple of channels that measured times say is worth keeping to. "
            "Expected a goal for a 'latency', or a whole number. Received: round_to='auto'"
        )


def ratio_limits(labeled, ratios):
    """Shares of groups that go, out of what users write of layers.

    Args:
        channels: `groups.LabeledModel`.
        ratios: Layer names, regular expressions that match whole names, or layers -> the fraction of
            the channels that goes, or a pair: at least and at most; `None`: nothing.

    Returns:
        A dict: group -> pair of floats.

    Raises:
        ValueError: for what is no such ratio, names that the model does not have, layers that must lose
            channels and cannot, and layers of one group that contradict each other.
    """
    limits, origin = {}, {}
    names = [name for _, _, name in labeled.space.producers]
    for pattern, ratio in (ratios or {}).items():
        low, high = _pair(pattern, ratio)
        matched = {names[index] for index in matching([pattern], labeled.graph, names, "ratios")}
        hit = [group for group in labeled.groups if matched.intersection(group.producers)]
        if low > 0 and not hit:
            reasons = [f"{g.name}: {g.reason}" for g in labeled.locked if matched.intersection(g.producers)]
            raise ValueError(
                f"Channels are to go that cannot ({'; '.join(reasons[:3]) or 'the layer makes none'}). "
                f"Expected layers with channels that can leave, or a ratio from 0 on. "
                f"Received: ratios={{{pattern!r}: {ratio!r}}}"
            )
        for group in hit:
            before = limits.get(group.name, (0.0, 1.0))
            limits[group.name] = max(before[0], low), min(before[1], high)
            if limits[group.name][0] > limits[group.name][1]:
                raise ValueError(
                    f"Ratios contradict each other for the channels of '{group.name}', which are made by "
                    f"{', '.join(group.producers)} and go together: {before[0]:.4g} to {before[1]:.4g} by "
                    f"{origin[group.name]!r}. Expected ranges that overlap. "
                    f"Received: ratios={{{pattern!r}: {ratio!r}}}"
                )
            origin[group.name] = pattern
    return limits


def _pair(pattern, ratio):
    """The least and the largest share of a ratio."""
    pair = (ratio, ratio) if _is_number(ratio) else tuple(ratio) if isinstance(ratio, (tuple, list)) else ()
    if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 <= pair[0] <= pair[1] <= 1 or pair[0] == 1:
        raise ValueError(
            "A ratio is the fraction of a layer's channels to remove. Expected a number from 0 on and below "
            f"1, or two such, at least and at most. Received: ratios={{{pattern!r}: {ratio!r}}}"
        )
    return float(pair[0]), float(pair[1])


def _whole_numbers(low, high, num):
    """The least and the largest number of `num` units; the nearest one where there is none between."""
    least, most = int(np.ceil(low * num - 1e-9)), int(np.floor(high * num + 1e-9))
    if least > most:
        least = most = int(np.floor((low + high) / 2 * num + 0.5))
    return least, most


def _is_number(value):
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_whole(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"`{name}` is a number of channels. Expected a whole number from 1 on. Received: {name}={value!r}"
        )
