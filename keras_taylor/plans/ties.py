"""Groups that are tied in number: in each step, every one of them loses as many units as the others."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import keras
import numpy as np

from keras_taylor.plans.task_numbers import numbers_of_task
from keras_taylor.reading.config_numbers import AxisCounts, ConfigNumbers, NumberPath, Step, WeightAxis
from keras_taylor.reading.groups import LabeledModel, find_producers
from keras_taylor.reading.tracing import Origin, origin_of
from keras_taylor.rules.base import weight_of
from keras_taylor.support.hub_tasks import has_configuration
from keras_taylor.support.identity import IdentityMap
from keras_taylor.support.types import FloatArray, IntArray

# `True`: groups of equal role; names or patterns: each is one tie; `None`: what the model asks for.
Uniform: TypeAlias = bool | str | Sequence[str] | None


class Tie(NamedTuple):
    """Groups that lose units together.

    Attributes:
        units: Group -> how many of its units leave in one step.
        numbers: Path in the configuration of a task -> by how much this number falls in one step.
    """

    units: Mapping[str, int]
    numbers: Mapping[NumberPath, int] = {}


class Ties(NamedTuple):
    """Which groups of a model are tied, and which ones its configuration has no number for.

    Attributes:
        ties: The ties. No group is in two of them.
        locked: Group -> why it stays.
    """

    ties: tuple[Tie, ...] = ()
    locked: Mapping[str, str] = {}


UNTIED = Ties()


def find_ties(labeled: LabeledModel, uniform: Uniform) -> Ties:
    """The ties that a user asks for, or else those without which a task could not be made again.

    Raises:
        ValueError: for a pattern that matches no layer.
    """
    origin = origin_of(labeled.graph.model)
    if origin is not None and not has_configuration(origin.model):
        origin = None
    if uniform is False:
        return Ties()
    if uniform is None or (uniform is True and origin is not None):
        if origin is None:
            return Ties()
        found, blocks = ties_of_configuration(labeled, origin), _ties_of_blocks(labeled, origin)
        return Ties((*found.ties, *blocks.ties), {**found.locked, **blocks.locked})
    if uniform is True:
        return Ties(_ties_by_role(labeled))
    return Ties(_ties_by_pattern(labeled, [uniform] if isinstance(uniform, str) else uniform))


class TiedGroups(NamedTuple):
    """A tie as arrays.

    Attributes:
        numbers: The numbers of its groups in `labeled.groups`.
        units: How many units of each leave in one step.
    """

    numbers: IntArray
    units: IntArray


def tied_groups(labeled: LabeledModel, ties: Ties) -> list[TiedGroups]:
    """The ties between groups that a model has."""
    numbers = {group.name: number for number, group in enumerate(labeled.groups)}
    found = [
        [(numbers[name], num) for name, num in tie.units.items() if name in numbers] for tie in ties.ties
    ]
    return [TiedGroups(*np.array(pairs, np.int64).T) for pairs in found if pairs]


def even_tied_scores(labeled: LabeledModel, unit_scores: FloatArray, ties: Ties) -> FloatArray:
    """Scores by which the units of one step come at once: each has the mean score of the step's units.

    Args:
        labeled: The model.
        unit_scores: Float64 `(num_units,)`.
        ties: The ties.
    """
    scores = unit_scores.copy()
    for numbers, units in tied_groups(labeled, ties):
        groups = [labeled.groups[number] for number in numbers]
        orders = [
            group.start + np.argsort(scores[group.start : group.start + group.num_units], kind="stable")
            for group in groups
        ]
        num_steps = min(len(order) // num for order, num in zip(orders, units, strict=True))
        parts = [
            order[: num_steps * num].reshape(num_steps, num) for order, num in zip(orders, units, strict=True)
        ]
        steps = np.concatenate(parts, axis=1)
        scores[steps] = np.maximum.accumulate(unit_scores[steps].mean(axis=1))[:, None]
        for order, num in zip(orders, units, strict=True):
            scores[order[num_steps * num :]] = np.inf
    return scores


def _ties_by_role(labeled: LabeledModel) -> tuple[Tie, ...]:
    """Ties of groups whose names differ in numbers only, and that have equally many units."""
    roles: dict[tuple[str, int], list[str]] = {}
    for group in (one for one in labeled.groups if not one.is_branch):
        roles.setdefault((re.sub(r"_?\d+", "", group.name), group.num_units), []).append(group.name)
    return tuple(Tie(dict.fromkeys(names, 1)) for names in roles.values() if len(names) > 1)


def _ties_by_pattern(labeled: LabeledModel, patterns: Iterable[str]) -> tuple[Tie, ...]:
    """One tie for each pattern; a group goes with the first pattern that matches a layer of it."""
    names = [name for _, _, name in labeled.label_space.producers]
    ties, taken = [], set[str]()
    for pattern in patterns:
        matched = {names[index] for index in find_producers([pattern], labeled.graph, names, "uniform")}
        hit = [one.name for one in labeled.groups if matched.intersection(one.producers)]
        ties.append(Tie({name: 1 for name in hit if name not in taken}))
        taken.update(hit)
    return tuple(tie for tie in ties if len(tie.units) > 1)


def ties_of_configuration(labeled: LabeledModel, origin: Origin) -> Ties:
    """The ties that let a task or backbone be made again from its configuration with smaller numbers.

    Each whole number of the configuration makes some axes of weights longer. A step is a set of groups that
    lose units, and of numbers that fall, with the same effect on all axes. Groups that are in no step stay.
    """
    model = origin.model
    numbers = numbers_of_task(model)
    groups = _axes_of_groups(labeled, origin.positions)
    ties: list[Tie] = []
    done: set[str] = set()
    for name, axes in groups.items():
        step = None if name in done else numbers.find_step(axes, groups)
        if step is not None and done.isdisjoint(step.units) and _is_right(step, numbers, groups):
            ties.append(Tie(step.units, step.numbers))
            done.update(step.units)
    if not ties:
        return Ties()
    reason = f"no numbers in the configuration of {type(model).__name__} count these channels alone"
    return Ties(tuple(ties), {name: reason for name in groups if name not in done})


def _ties_of_blocks(labeled: LabeledModel, origin: Origin) -> Ties:
    """The residual branches of each block that a number in the configuration of a task counts.

    The branches of one layer, or a closed layer, are a block if they hold all weights that are missing with
    one block less. Where there is such a number, branches that it does not count stay.
    """
    blocks: dict[str, list[str]] = {}
    layers = {branch.name for branch in labeled.branches.branches if branch.is_layer}
    for group in labeled.groups:
        if group.is_branch:
            block = group.name if group.name in layers else group.name.rpartition("/")[0]
            blocks.setdefault(block, []).append(group.name)
    if not blocks:
        return Ties()
    numbers = numbers_of_task(origin.model)
    shallower = {
        path: shapes
        for path, number in numbers.numbers.items()
        if (shapes := numbers.shapes_with({path: number - 1})) and len(shapes) < len(numbers.shapes)
    }
    ties: list[Tie] = []
    others: list[str] = []
    for names in blocks.values():
        gone = _weights_of_branches(labeled, origin, names)
        left = [shape for number, shape in enumerate(numbers.shapes) if number not in gone]
        path = next((path for path, shapes in shallower.items() if shapes == left), None)
        if path is None:
            others += names
        else:
            ties.append(Tie(dict.fromkeys(names, 1), {path: 1}))
    reason = f"no number in the configuration of {type(origin.model).__name__} counts this branch"
    return Ties(tuple(ties), dict.fromkeys(others, reason) if ties else {})


def _weights_of_branches(labeled: LabeledModel, origin: Origin, names: Sequence[str]) -> set[int]:
    """The positions of the weights of a task that leave with some branches."""
    numbers = {number for number, one in enumerate(labeled.branches.branches) if one.name in names}
    return {
        origin.positions[weight]
        for operation, members in labeled.branches.of_operations.items()
        if not numbers.isdisjoint(members)
        for weight in getattr(operation, "weights", ())
        if weight in origin.positions
    }


def _axes_of_groups(
    labeled: LabeledModel, positions: IdentityMap[keras.Variable, int]
) -> dict[str, dict[WeightAxis, float]]:
    """How many entries along the axes of the origin's weights go with one unit of each group.

    NaN where that differs from unit to unit.
    """
    channels = [group for group in labeled.groups if not group.is_branch]
    found: dict[str, dict[WeightAxis, float]] = {group.name: {} for group in channels}
    seen: set[int] = set()
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for name, axes in effect.weights.items():
            weight = weight_of(call.operation, name)
            position = None if weight is None else positions.get(weight)
            if position is None or position in seen:
                continue
            seen.add(position)
            for axis, labels in enumerate(axes):
                units = np.array([-1]) if labels is None else labeled.units_of(labels)
                counts = np.bincount(units[units >= 0], minlength=labeled.num_units)
                for group in channels:
                    own = counts[group.start : group.start + group.num_units]
                    if own.any():
                        even = float(own[0]) if (own == own[0]).all() else np.nan
                        found[group.name][WeightAxis(position, axis)] = even
    return found


def _is_right(step: Step, numbers: ConfigNumbers, groups: Mapping[str, AxisCounts]) -> bool:
    """Whether the configuration leads to the right shapes after some steps."""
    return numbers.has_led_to(step, groups) or numbers.lead_to(step, groups)
