"""Composite layers that stay closed, and are made again with less inside."""

import contextlib
import dataclasses
import itertools
import json
import math

import keras
import numpy as np

from keras_taylor.reading.closed_layers import Remade, gate_inside, holds
from keras_taylor.reading.configurations import configuration_of
from keras_taylor.reading.graph import read_layer
from keras_taylor.reading.tracing import LayerStaysClosed, UnsupportedModelError
from keras_taylor.rules.attention import inner_layers
from keras_taylor.rules.base import (
    Edit,
    Effect,
    InternalRead,
    Work,
    override_attributes,
    producing_kernels,
    weight_of,
)
from keras_taylor.rules.labels import FIXED

_MOST_KEYS, _MOST_TRIALS = 3, 64  # of configuration values that one group of channels changes
_recipes: dict = {}
# What was found once: keys that count units, the layer's description without them, what counts each group.
_searched: list = []


def inside_rule(call, shapes, label_model):
    """The rule of a layer that cannot be opened for any size, found by reading it at some sizes.

    Its channels inside are those that are found at two sizes alike. They can leave where values of its
    configuration say how many there are: found by making it again with others, and tried on random
    numbers, closed gates inside of one against the other that was made with less.

    Args:
        call: A `graph.Call`.
        shapes: Shape of every tensor of the graph.
        read_channels: Makes `groups.LabeledModel` of a `Graph`.

    Returns:
        A rule; `None` where nothing can leave, or the layer is not closed.
    """
    is_open_ended = any(None in shapes[index] for index in call.inputs)
    if not call.closed or not is_open_ended or not call.operation.weights:
        return None
    try:
        key = _described(call, shapes)
    except Exception:  # whatever its `get_config` raises
        return None
    if key not in _recipes:
        _recipes[key] = _recipe(call, shapes, label_model)
    recipe = _recipes[key]
    return recipe and recipe.effect


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe:
    """What is inside a layer of this class and configuration, in numbers of units; -1 is what stays.

    Attributes:
        groups: Names and numbers of units.
        weights: For each weight (by number) the units along each axis, or `None`.
        reads: For each inner layer (by number) the units of what it contracts.
        made: Weights by number, with the axis along which they make units.
        config: For each configuration value the units that it counts, and how often it counts each.
        work: Floating point operations: factors, and the units along the axes.
        stays: Names, numbers of units, and reasons of groups that cannot leave.
    """

    groups: tuple
    weights: dict
    reads: dict
    made: tuple
    config: dict
    work: tuple
    stays: tuple = ()

    def effect(self, ctx):
        """What goes in and out stays; units inside can leave."""
        for tensor in ctx.inputs:
            ctx.lock(tensor.labels, f"read by {type(ctx.operation).__name__}, of which only insides can go")
        fresh = [ctx.space.new_labels(num, f"{ctx.name}/{name}") for name, num in self.groups]
        labels_of = np.concatenate([*fresh, [FIXED]])
        for number, made in enumerate(fresh):
            if self._shares(number):
                ctx.lock(made[:2], "the last one of those that share would be divided otherwise")
        for name, num, reason in self.stays:
            ctx.lock(ctx.space.new_labels(num, f"{ctx.name}/{name}"), reason)

        def labels(units):
            return None if units is None else labels_of[units]

        return Effect(
            outputs=[ctx.fixed_labels(k) for k in range(len(ctx.output_shapes))],
            weights={f"weights.{k}": tuple(map(labels, axes)) for k, axes in self.weights.items()},
            config={key: _times(factor, labels(units)) for key, (units, factor) in self.config.items()},
            work=tuple(Work(factor, tuple(map(labels, axes))) for factor, axes in self.work),
            internal_reads=tuple(
                InternalRead(labels(units), _gate_before(k), k) for k, units in self.reads.items()
            ),
            inner_kernels=tuple((f"weights.{k}", axis) for k, axis in self.made),
        )

    def axes(self):
        """The units along each axis of weights along which there are any."""
        every = itertools.chain.from_iterable(self.weights.values())
        return [units for units in every if units is not None]

    def _shares(self, number):
        """Whether units of a group stand at several places along one axis, as heads that share a key."""
        sizes = [num for _, num in self.groups]
        start = sum(sizes[:number])
        for units in self.axes():
            mine = units[(units >= start) & (units < start + sizes[number])]
            if np.unique(mine).size < mine.size == units.size:
                return True
        return False

    def only(self, names):
        """The recipe for some of its groups; the units of the others stay."""
        number, num, groups = [], 0, []
        for name, size in self.groups:
            is_kept = name in names
            number += range(num, num + size) if is_kept else [-1] * size
            num += size * is_kept
            groups += [(name, size)] * is_kept
        number = np.array([*number, -1])

        def renumbered(units):
            return None if units is None or (number[units] < 0).all() else number[units]

        return Recipe(
            groups=tuple(groups),
            weights={k: tuple(map(renumbered, axes)) for k, axes in self.weights.items()},
            reads={k: found for k, units in self.reads.items() if (found := renumbered(units)) is not None},
            made=tuple((k, axis) for k, axis in self.made if renumbered(self.weights[k][axis]) is not None),
            config={
                key: (renumbered(units), factor)
                for key, (units, factor) in self.config.items()
                if renumbered(units) is not None
            },
            work=tuple((factor, tuple(map(number.__getitem__, axes))) for factor, axes in self.work),
        )


def _gate_before(number):
    """What gates an inner layer's input."""
    return lambda layer, gate: gate_inside(layer, {number: lambda x: x * keras.ops.cast(gate, x.dtype)})


def _times(factor, labels):
    return Edit((labels,), lambda kept: factor * int(kept.sum()))


def _described(call, shapes, without=()):
    """The layer's class, configuration, and call; some configuration values left out."""
    config = configuration_of(call.operation).items()
    config = {k: v for k, v in config if k not in ("name", *without)}
    config = {k: v for k, v in config.items() if not k.endswith("initializer")}  # they have seeds
    arguments = [x if isinstance(x, (int, float, str, bool)) else None for x in call.site.flat]
    sizes = [shapes[index] for index in call.inputs]
    return type(call.operation), json.dumps([config, arguments, sizes], sort_keys=True, default=repr)


def _recipe(call, shapes, label_model):
    """`None` where nothing inside can leave."""
    try:
        one = _read_at(call, shapes, 0, label_model)
        remade = Remade(call, shapes)
        names = {group.name for group in one[1].groups}
        for without, described, found in _searched:
            if names <= found.keys() and described == _described(call, shapes, without):
                recipe = _of_channels(call, shapes, one, one)
                return _together(recipe, {name: found[name] for name in names}, remade)
        other = _read_at(call, shapes, 1, label_model)
        if not _alike(one, other):
            return None
        recipe = _of_channels(call, shapes, one, other)
        found = {name: _search(recipe.only([name]), remade) for name, _ in recipe.groups}
        together = _together(recipe, found, remade)
    except (LayerStaysClosed, UnsupportedModelError):
        return None
    if together is not None and names <= found.keys():
        without = tuple(together.config)
        _searched.append((without, _described(call, shapes, without), found))
    return together


def _search(part, remade):
    """Configuration values that count the units of one group, as `_counted_by`, or why there are none."""
    counted = _counted_by(part, remade)
    if counted is None:
        return "no values of the configuration make fewer of these alone"
    if not holds(_with_counts(part, {part.groups[0][0]: counted}), remade, num_draws=1):
        return "made again with fewer of these, it puts out something else"
    return counted


def _with_counts(recipe, found):
    """A recipe with the configuration values that count its groups."""
    config, start = {}, 0
    for name, num in recipe.groups:
        own = [(u >= start) & (u < start + num) for u in recipe.axes()]
        sizes = {len(units): units for units, mine in zip(recipe.axes(), own, strict=True) if mine.any()}
        order = sorted(sizes)
        config.update(
            {key: (sizes[order[min(rank, len(order) - 1)]], factor) for key, rank, factor in found[name]}
        )
        start += num
    return dataclasses.replace(recipe, config=config)


def _together(recipe, found, remade):
    """The recipe for the groups that can leave, if they can together."""
    stays = tuple((name, num, found[name]) for name, num in recipe.groups if isinstance(found[name], str))
    can_leave = [name for name, _ in recipe.groups if not isinstance(found[name], str)]
    keys = [key for name in can_leave for key, _, _ in found[name]]
    if not can_leave or len(set(keys)) < len(keys):
        return None
    part = dataclasses.replace(_with_counts(recipe.only(can_leave), found), stays=stays)
    return part if holds(part, remade) else None


def _read_at(call, shapes, which, label_model):
    """The channels inside at sizes that stand for the unknown ones."""
    known = {size for index in call.inputs for size in shapes[index]}
    batch, length = [size for size in range(2, 99) if size not in known][which : which + 3 : 2]
    tensors = iter(call.inputs)

    def stand_in(x):
        if not isinstance(x, keras.KerasTensor):
            return x
        first, *rest = shapes[next(tensors)]
        shape = (batch if first is None else first, *(length if size is None else size for size in rest))
        return keras.KerasTensor(shape, dtype=x.dtype)

    flat = [stand_in(x) for x in call.site.flat]
    args, kwargs = call.site.packed(flat)
    with inlined(call.operation):
        return batch, label_model(read_layer(call.operation, args, kwargs))


def _alike(one, other):
    """Whether two readings show the same calls, and the same channels."""
    calls = [
        [(c.name, id(c.operation) if isinstance(c.operation, keras.Layer) else type(c.operation), c.inputs)]
        for _, labeled in (one, other)
        for c in labeled.graph.calls
    ]
    half = len(calls) // 2
    return calls[:half] == calls[half:] and one[1].groups == other[1].groups


def _of_channels(call, shapes, one, other):
    """The recipe without its configuration values; groups that no gate reaches are left out."""
    layer, labeled, graph = call.operation, one[1], one[1].graph
    is_known = not any(None in shapes[index][1:] for index in call.inputs)
    inner = {id(each): number for number, each in enumerate(inner_layers(layer))}
    numbers = {id(weight): number for number, weight in enumerate(layer.weights)}
    weights, reads, made, unreached, seen = {}, {}, [], set(), set()
    for position, (step, effect) in enumerate(zip(graph.calls, labeled.effects, strict=True)):
        for number in effect.reads:
            units = labeled.units_of(labeled.labels[step.inputs[number]])
            if (units < 0).all():
                continue
            if _can_be_gated(position, number, one, other) and id(step.operation) in inner:
                reads[inner[id(step.operation)]] = units
            else:
                unreached.update(units.reshape(-1).tolist())
        if id(step.operation) not in seen and not effect.internal_reads:
            seen.add(id(step.operation))
            of_weight = {name: numbers.get(id(weight_of(step.operation, name))) for name in effect.weights}
            made += [(of_weight[name], axis) for name, axis, _ in producing_kernels(effect)]
            for name, axes in effect.weights.items():
                if of_weight[name] is not None:
                    weights[of_weight[name]] = tuple(_units_or_none(labeled, a) for a in axes)
    recipe = Recipe(
        groups=tuple((group.name, group.num_units) for group in labeled.groups),
        weights=weights,
        reads=reads,
        made=tuple((k, axis) for k, axis in made if weights[k][axis] is not None),
        config={},
        work=tuple(_work(one[1], other[1], is_known)),
    )
    reached = {g.name for g in labeled.groups if unreached.isdisjoint(range(g.start, g.start + g.num_units))}
    return recipe.only(reached)


def _can_be_gated(position, number, one, other):
    """Whether a gate can be put where an inner layer is called: once, on one tensor, an example a row."""
    call = one[1].graph.calls[position]
    rows = [labeled.graph.shapes[call.inputs[number]][0] for _, labeled in (one, other)]
    is_one_tensor = len(call.inputs) == 1 and one[1].graph.is_used_once(call.operation)
    return is_one_tensor and rows == [one[0], other[0]]


def _units_or_none(labeled, labels):
    units = None if labels is None else labeled.units_of(labels)
    return None if units is None or (units < 0).all() else units


def _work(labeled, other, is_known):
    """Work that does not depend on the sizes that were put in; else unknown."""
    for effect, again in zip(labeled.effects, other.effects, strict=True):
        for work, same in zip(effect.work, again.work, strict=True):
            factor = work.factor if is_known and work.factor == same.factor else math.nan
            yield factor, tuple(labeled.units_of(axis) for axis in work.labels)


def _counted_by(recipe, remade):
    """Configuration values that say how many units a recipe of one group has.

    Returns:
        For each its key, which of the sizes of axes it counts (from the smallest), and how often; `None`
        where no values do.
    """
    ((name, num),) = recipe.groups
    kept = [np.arange(num) != 0, np.arange(num) == num - 1]
    sizes = sorted({len(units) for units in recipe.axes()})
    options = [
        (key, rank, value // size)
        for key, value in remade.numbers.items()
        for rank, size in enumerate(sizes)
        if value % size == 0
    ]
    options.sort(key=lambda option: option[2])
    options = [o for o in options if remade.may_fit(_with_counts(recipe, {name: [o]}), kept[0])]
    trials = itertools.chain.from_iterable(
        itertools.combinations(options, many) for many in range(1, _MOST_KEYS + 1)
    )
    for trial in itertools.islice(trials, _MOST_TRIALS):
        candidate = _with_counts(recipe, {name: trial})
        if len(candidate.config) == len(trial) and all(remade.fits(candidate, which) for which in kept):
            return trial
    return None


@contextlib.contextmanager
def inlined(layer):
    """Within it, layers inside that Keras cannot call on symbolic tensors do what they do in plain sight.

    There are some that say less of their outputs than they put out, or whose parent class does.
    """
    with contextlib.ExitStack() as stack:
        for each in inner_layers(layer):
            stack.enter_context(override_attributes(each, symbolic_call=_in_plain_sight(each)))
        yield


def _in_plain_sight(layer):
    symbolic_call = layer.symbolic_call

    def call(*args, **kwargs):
        try:
            return symbolic_call(*args, **kwargs)
        except Exception:
            return layer.call(*args, **kwargs)

    return call
