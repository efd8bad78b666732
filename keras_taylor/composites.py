"""Composite layers that stay closed, and are made again with less inside."""

import dataclasses
import itertools
import json
import math

import keras
import numpy as np

from keras_taylor.attention import inner_layers
from keras_taylor.cloning import configuration_of
from keras_taylor.graph import read_inside
from keras_taylor.insides import inlined
from keras_taylor.labels import FIXED
from keras_taylor.opening import Closed, UnsupportedModelError
from keras_taylor.remaking import Remade, holds
from keras_taylor.rules.base import Edit, Effect, InnerRead, Work, made_by_kernels, weight_of

_MOST_KEYS, _MOST_TRIALS = 3, 64  # of configuration values that one group of channels changes
_recipes: dict = {}


def inside_rule(call, shapes, read_channels):
    """The rule of a layer that cannot be opened for any size, found by reading it at some sizes.

    Its channels inside are those that are found at two sizes alike. They can leave where values of its
    configuration say how many there are: found by making it again with others, and tried on random
    numbers, closed gates inside of one against the other that was made with less.

    Args:
        call: A `graph.Call`.
        shapes: Shape of every tensor of the graph.
        read_channels: Makes `groups.Channels` of a `Graph`.

    Returns:
        A rule; `None` where nothing can leave, or the layer is not closed.
    """
    is_open_ended = any(None in shapes[index] for index in call.inputs)
    if not call.closed or not is_open_ended or not call.operation.weights:
        return None
    key = _key(call, shapes)
    if key not in _recipes:
        _recipes[key] = _recipe(call, shapes, read_channels)
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
        fresh = [ctx.space.fresh(num, f"{ctx.name}/{name}") for name, num in self.groups]
        labels_of = np.concatenate([*fresh, [FIXED]])
        for number, made in enumerate(fresh):
            if self._shares(number):
                ctx.lock(made[:2], "the last one of those that share would be divided otherwise")
        for name, num, reason in self.stays:
            ctx.lock(ctx.space.fresh(num, f"{ctx.name}/{name}"), reason)

        def labels(units):
            return None if units is None else labels_of[units]

        return Effect(
            outputs=[ctx.fixed(k) for k in range(len(ctx.output_shapes))],
            weights={f"weights.{k}": tuple(map(labels, axes)) for k, axes in self.weights.items()},
            config={key: _times(factor, labels(units)) for key, (units, factor) in self.config.items()},
            work=tuple(Work(factor, tuple(map(labels, axes))) for factor, axes in self.work),
            inside=tuple(InnerRead(k, labels(units)) for k, units in self.reads.items()),
            made=tuple((f"weights.{k}", axis) for k, axis in self.made),
        )

    def _shares(self, number):
        """Whether units of a group stand at several places along one axis, as heads that share a key."""
        sizes = [num for _, num in self.groups]
        start = sum(sizes[:number])
        for units in itertools.chain.from_iterable(self.weights.values()):
            mine = units is not None and units[(units >= start) & (units < start + sizes[number])]
            if mine is not False and np.unique(mine).size < mine.size == units.size:
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


def _times(factor, labels):
    return Edit((labels,), lambda kept: factor * int(kept.sum()))


def _key(call, shapes):
    config = configuration_of(call.operation).items()
    config = {k: v for k, v in config if k != "name" and not k.endswith("initializer")}  # they have seeds
    arguments = [x if isinstance(x, (int, float, str, bool)) else None for x in _arguments(call)]
    sizes = [shapes[index] for index in call.inputs]
    described = json.dumps([config, arguments, sizes], sort_keys=True, default=repr)
    return type(call.operation), described, tuple(w.shape for w in call.operation.weights)


def _arguments(call):
    return keras.tree.flatten((call.site.args, call.site.kwargs))


def _recipe(call, shapes, read_channels):
    """`None` where nothing inside can leave."""
    try:
        one, other = (_read_at(call, shapes, which, read_channels) for which in (0, 1))
        if not _alike(one, other):
            return None
        recipe = _of_channels(call.operation, one, other)
        remade = Remade(call, shapes)
        found, stays = {}, []
        for name, num in recipe.groups:
            part = recipe.only([name])
            config = _counted_by(part, remade)
            if config is None:
                stays.append((name, num, "no values of the configuration make fewer of these alone"))
            elif not holds(dataclasses.replace(part, config=config), remade):
                stays.append((name, num, "made again with fewer of these, it puts out something else"))
            else:
                found[name] = config
    except (Closed, UnsupportedModelError):
        return None
    together = _together(recipe, found, remade)
    return together and dataclasses.replace(together, stays=tuple(stays))


def _together(recipe, found, remade):
    """The recipe for the groups that can leave, if they can together."""
    keys = [key for config in found.values() for key in config]
    if not found or len(set(keys)) < len(keys):
        return None
    start, config = 0, {}
    part = recipe.only(found)
    for name, num in part.groups:
        for key, (units, factor) in found[name].items():
            config[key] = (np.where(units < 0, -1, units + start), factor)
        start += num
    part = dataclasses.replace(part, config=config)
    return part if holds(part, remade) else None


def _read_at(call, shapes, which, read_channels):
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

    flat = [stand_in(x) for x in _arguments(call)]
    args, kwargs = keras.tree.pack_sequence_as((call.site.args, call.site.kwargs), flat)
    with inlined(call.operation):
        return batch, read_channels(read_inside(call.operation, args, kwargs))


def _alike(one, other):
    """Whether two readings show the same calls, and the same channels."""
    calls = [
        [(c.name, id(c.operation) if isinstance(c.operation, keras.Layer) else type(c.operation), c.inputs)]
        for _, channels in (one, other)
        for c in channels.graph.calls
    ]
    half = len(calls) // 2
    return calls[:half] == calls[half:] and one[1].groups == other[1].groups


def _of_channels(layer, one, other):
    """The recipe without its configuration values; groups that no gate reaches are left out."""
    channels, graph = one[1], one[1].graph
    inner = {id(each): number for number, each in enumerate(inner_layers(layer))}
    numbers = {id(weight): number for number, weight in enumerate(layer.weights)}
    weights, reads, made, unreached, seen = {}, {}, [], set(), set()
    for position, (call, effect) in enumerate(zip(graph.calls, channels.effects, strict=True)):
        for number in effect.reads:
            units = channels.units(channels.labels[call.inputs[number]])
            if (units < 0).all():
                continue
            if _can_be_gated(position, number, one, other) and id(call.operation) in inner:
                reads[inner[id(call.operation)]] = units
            else:
                unreached.update(units.reshape(-1).tolist())
        if id(call.operation) not in seen and not effect.inside:
            seen.add(id(call.operation))
            of_weight = {name: numbers.get(id(weight_of(call.operation, name))) for name in effect.weights}
            made += [(of_weight[name], axis) for name, axis, _ in made_by_kernels(effect)]
            for name, axes in effect.weights.items():
                if of_weight[name] is not None:
                    weights[of_weight[name]] = tuple(_units_or_none(channels, a) for a in axes)
    recipe = Recipe(
        groups=tuple((group.name, group.num_units) for group in channels.groups),
        weights=weights,
        reads=reads,
        made=tuple((k, axis) for k, axis in made if weights[k][axis] is not None),
        config={},
        work=tuple(_work(one[1], other[1])),
    )
    reached = {g.name for g in channels.groups if unreached.isdisjoint(range(g.start, g.start + g.num_units))}
    return recipe.only(reached)


def _can_be_gated(position, number, one, other):
    """Whether a gate can be put where an inner layer is called: once, on one tensor, an example a row."""
    call = one[1].graph.calls[position]
    rows = [channels.graph.shapes[call.inputs[number]][0] for _, channels in (one, other)]
    is_one_tensor = len(call.inputs) == 1 and one[1].graph.is_used_once(call.operation)
    return is_one_tensor and rows == [one[0], other[0]]


def _units_or_none(channels, labels):
    units = None if labels is None else channels.units(labels)
    return None if units is None or (units < 0).all() else units


def _work(channels, other):
    """Work that does not depend on the sizes that were put in; else unknown."""
    for effect, again in zip(channels.effects, other.effects, strict=True):
        for work, same in zip(effect.work, again.work, strict=True):
            factor = work.factor if work.factor == same.factor else math.nan
            yield factor, tuple(channels.units(axis) for axis in work.axes)


def _counted_by(recipe, remade):
    """Configuration values that say how many units a recipe of one group has, `None` if none do."""
    ((_, num),) = recipe.groups
    every = itertools.chain.from_iterable(recipe.weights.values())
    axes = {len(units): units for units in every if units is not None}
    options = [
        (key, units, value // size)
        for key, value in remade.numbers.items()
        for size, units in axes.items()
        if value % size == 0
    ]
    options.sort(key=lambda option: option[2])
    kept = [np.arange(num) != 0, np.arange(num) == num - 1]
    trials = itertools.chain.from_iterable(
        itertools.combinations(options, many) for many in range(1, _MOST_KEYS + 1)
    )
    for trial in itertools.islice(trials, _MOST_TRIALS):
        config = {key: (units, factor) for key, units, factor in trial}
        candidate = dataclasses.replace(recipe, config=config)
        if len(config) == len(trial) and all(remade.fits(candidate, which) for which in kept):
            return config
    return None
