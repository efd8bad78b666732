"""Finds which configuration values of a closed layer count the units inside, by building it again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import keras
import numpy as np

from keras_taylor.reading.cloning import build_like, clone_operation, copy_weights
from keras_taylor.reading.closed_layers import (
    Gate,
    InnerStructure,
    LockedGroup,
    UnitCount,
    gate_inside,
    kept_entries,
)
from keras_taylor.reading.configurations import configuration_of
from keras_taylor.reading.graph import Call
from keras_taylor.reading.rule_checks import equivalence_tolerance, random_input, run_like_call, tensor_dtype
from keras_taylor.reading.tracing import UnsupportedModelError
from keras_taylor.support.types import Array, BoolArray, Shape

_MAX_KEYS = 3  # configuration values that count one group
_MAX_TRIALS = 64  # combinations of configuration values that are tried for one group

# The largest difference of a copy with the same configuration and weights, relative to the largest value.
_COPY_TOLERANCE = 1e-5


class ConfigCount(NamedTuple):
    """A configuration value that counts the units of a group.

    Attributes:
        key: Key of the value.
        rank: Which axes it counts: those of the smallest size for 0, of the next larger size for 1, ...
        factor: The value divided by the size of these axes.
    """

    key: str
    rank: int
    factor: int


@dataclasses.dataclass(frozen=True)
class GroupSearch:
    """The configuration values that count the units of a group, or why there are none.

    Attributes:
        counts: The configuration values.
        reason: Why no values count them, `None` if some do.
    """

    counts: tuple[ConfigCount, ...] = ()
    reason: str | None = None

    def __post_init__(self) -> None:
        if bool(self.counts) == (self.reason is not None):
            raise ValueError(
                "Expected either configuration values or a reason why there are none. "
                f"Received: counts={self.counts}, reason={self.reason!r}"
            )


class LayerRebuilder:
    """One call of a closed layer, run with copies of the layer that have another configuration.

    Args:
        call: The call.
        shapes: Shape of every tensor of its graph.

    Attributes:
        call: The call.
        integers: The integers above 1 among the layer's configuration values, by key.
    """

    def __init__(self, call: Call, shapes: Sequence[Shape]) -> None:
        self.call, self._shapes = call, shapes
        config = configuration_of(call.operation)
        self.integers = {key: value for key, value in config.items() if type(value) is int and value > 1}
        self._known_shapes: dict[tuple[tuple[str, int], ...], list[Shape] | None] = {}

    def fits(self, structure: InnerStructure, kept: BoolArray) -> bool:
        """Whether the layer built for the kept units has weights of the shapes that remain."""
        wanted = self._own_shapes()
        for number, masks in structure.weight_masks(kept).items():
            wanted[number] = tuple(
                size if mask is None else int(mask.sum())
                for size, mask in zip(wanted[number], masks, strict=True)
            )
        return self._shapes_for(structure, kept) == wanted

    def may_fit(self, structure: InnerStructure, kept: BoolArray) -> bool:
        """Whether the layer built for the kept units might fit if other values changed as well.

        It might if it cannot be built with this change alone, or if only weights that have units change.
        """
        shapes = self._shapes_for(structure, kept)
        if shapes is None:
            return True
        pairs = zip(self._own_shapes(), shapes, strict=True)
        changed = {number for number, (before, after) in enumerate(pairs) if before != after}
        return bool(changed) and changed <= structure.weights.keys()

    def rebuild(self, changes: Mapping[str, int]) -> keras.Layer:
        """The layer with other configuration values, built with new weights.

        Raises:
            UnsupportedModelError: if it cannot be built.
        """
        operation = self.call.operation
        clone = clone_operation(operation, self.call.name, changes)
        try:
            build_like(clone, operation, self.call.name)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"It cannot be built. Received: {operation!r}") from error
        return clone

    def run(self, layer: keras.Layer, seed: int, gates: Mapping[int, Gate] | None = None) -> list[Array]:
        """Flattened outputs of a layer, called as in this call on random inputs.

        Args:
            layer: The layer or a copy of it.
            seed: Of the inputs.
            gates: Number of an inner layer -> its gate.
        """
        random = np.random.default_rng(seed)
        indices = dict.fromkeys(self.call.inputs)
        inputs = {index: self._random_values(random, index, seed) for index in indices}
        with gate_inside(layer, gates or {}):
            return run_like_call(self.call, layer, inputs)

    def _own_shapes(self) -> list[Shape]:
        """Shapes of the layer's weights."""
        return [tuple(weight.shape) for weight in self.call.operation.weights]

    def _shapes_for(self, structure: InnerStructure, kept: BoolArray) -> list[Shape] | None:
        """Shapes of the weights of the layer built for the kept units, `None` if it cannot be built."""
        changes = structure.config_changes(kept)
        key = tuple(sorted(changes.items()))
        if key not in self._known_shapes:
            try:
                shapes = [tuple(weight.shape) for weight in self.rebuild(changes).weights]
            except UnsupportedModelError:
                self._known_shapes[key] = None
            else:
                self._known_shapes[key] = shapes
        return self._known_shapes[key]

    def _random_values(self, random: np.random.Generator, index: int, seed: int) -> Array:
        """Random values of an input; integers may be masks, and each row of a mask needs a one."""
        dtype = tensor_dtype(self.call, index)
        values = random_input(random, self._shapes[index], dtype)
        if "float" not in dtype:
            values[:, : None if seed == 0 else 1] = 1
        return values


def search_group(structure: InnerStructure, rebuilder: LayerRebuilder) -> GroupSearch:
    """Searches the configuration values that count the units of a structure with one group."""
    counts = _search_counts(structure, rebuilder)
    if not counts:
        return GroupSearch(reason="no configuration values count these alone")
    search = GroupSearch(counts)
    counted = _with_config(structure, {structure.groups[0].name: search})
    if not is_equivalent(counted, rebuilder, num_draws=1):
        return GroupSearch(reason="its outputs change when it is built with fewer of these")
    return search


def combine_groups(
    structure: InnerStructure, searches: Mapping[str, GroupSearch], rebuilder: LayerRebuilder
) -> InnerStructure | None:
    """The structure with the configuration values of its groups; groups without such values are locked.

    Args:
        structure: The structure without configuration values.
        searches: The result of the search for each group, by its name.
        rebuilder: Builds the layer again.

    Returns:
        `None` if no group can leave, or if the layer differs when all groups shrink together.
    """
    locked = tuple(
        LockedGroup(name, num, reason)
        for name, num in structure.groups
        if (reason := searches[name].reason) is not None
    )
    can_leave = [name for name, _ in structure.groups if searches[name].reason is None]
    keys = [count.key for name in can_leave for count in searches[name].counts]
    if not can_leave or len(set(keys)) < len(keys):
        return None
    part = _with_config(structure.restricted_to(can_leave), searches)
    combined = dataclasses.replace(part, locked=locked)
    return combined if is_equivalent(combined, rebuilder) else None


def _search_counts(structure: InnerStructure, rebuilder: LayerRebuilder) -> tuple[ConfigCount, ...]:
    """Configuration values that together count the units of a structure with one group; empty if none do."""
    ((name, num),) = structure.groups
    without_first, only_last = np.arange(num) != 0, np.arange(num) == num - 1
    sizes = sorted({len(units) for units in structure.unit_axes()})
    options = [
        ConfigCount(key, rank, value // size)
        for key, value in rebuilder.integers.items()
        for rank, size in enumerate(sizes)
        if value % size == 0
    ]
    options.sort(key=lambda option: option.factor)

    def counted_by(counts: Collection[ConfigCount]) -> InnerStructure:
        return _with_config(structure, {name: GroupSearch(tuple(counts))})

    options = [option for option in options if rebuilder.may_fit(counted_by([option]), without_first)]
    trials = itertools.chain.from_iterable(
        itertools.combinations(options, num_keys) for num_keys in range(1, _MAX_KEYS + 1)
    )
    for trial in itertools.islice(trials, _MAX_TRIALS):
        candidate = counted_by(trial)
        has_distinct_keys = len(candidate.config) == len(trial)
        if has_distinct_keys and all(rebuilder.fits(candidate, kept) for kept in (without_first, only_last)):
            return trial
    return ()


def _with_config(structure: InnerStructure, searches: Mapping[str, GroupSearch]) -> InnerStructure:
    """A structure with the configuration values that count its groups."""
    config: dict[str, UnitCount] = {}
    start = 0
    for name, num in structure.groups:
        axes_by_size = {
            len(units): units
            for units in structure.unit_axes()
            if ((units >= start) & (units < start + num)).any()
        }
        sizes = sorted(axes_by_size)
        for key, rank, factor in searches[name].counts:
            config[key] = UnitCount(axes_by_size[sizes[min(rank, len(sizes) - 1)]], factor)
        start += num
    return dataclasses.replace(structure, config=config)


def is_equivalent(structure: InnerStructure, rebuilder: LayerRebuilder, num_draws: int = 2) -> bool:
    """Whether the layer built for fewer units has the outputs of the whole layer with closed gates.

    Both are copies of the layer with random weights. A copy with the layer's own weights and configuration
    must also have the outputs of the layer.

    Args:
        structure: The units inside, with the configuration values that count them.
        rebuilder: Builds the layer again.
        num_draws: How often units, weights and inputs are drawn.
    """
    try:
        return all(_is_equivalent_for_seed(structure, rebuilder, seed) for seed in range(num_draws))
    except UnsupportedModelError:
        return False


def _is_equivalent_for_seed(structure: InnerStructure, rebuilder: LayerRebuilder, seed: int) -> bool:
    random, layer = np.random.default_rng(seed), rebuilder.call.operation
    whole = rebuilder.rebuild({})
    copy_weights(layer, whole)
    if _largest_difference(rebuilder.run(whole, seed), rebuilder.run(layer, seed)) > _COPY_TOLERANCE:
        return False
    for weight in whole.weights:
        if "float" in weight.dtype:
            weight.assign(random.normal(0, 0.5, weight.shape).astype("float32"))
    kept = _draw_kept_units(structure, random)
    small = rebuilder.rebuild(structure.config_changes(kept))
    if not rebuilder.fits(structure, kept):
        return False
    copy_weights(whole, small, structure.weight_masks(kept))
    gates = {number: _gate_of(kept_entries(units, kept)) for number, units in structure.reads.items()}
    closed, cut = rebuilder.run(whole, seed, gates), rebuilder.run(small, seed)
    tolerance = equivalence_tolerance(layer.compute_dtype)
    # closed gates must make a difference, or else the comparison shows nothing
    has_effect = _largest_difference(rebuilder.run(whole, seed), closed) > tolerance
    return _largest_difference(cut, closed) <= tolerance and has_effect


def _draw_kept_units(structure: InnerStructure, random: np.random.Generator) -> BoolArray:
    """A random bool array `(num_units,)`: some units of each group stay, and some leave."""
    parts = []
    for _, num in structure.groups:
        kept = random.random(num) < 0.6
        stays, leaves = random.permutation(num)[:2]
        kept[stays], kept[leaves] = True, False
        parts.append(kept)
    return np.concatenate(parts)


def _gate_of(mask: BoolArray) -> Gate:
    """A gate that is 1 where the mask is true, else 0."""
    return lambda x: x * keras.ops.convert_to_tensor(mask.astype("float32"), x.dtype)


def _largest_difference(first: Sequence[Array], second: Sequence[Array]) -> float:
    """Largest difference of outputs, relative to the second ones' largest value; infinite for a NaN."""
    differences = [
        np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in zip(first, second, strict=True)
    ]
    largest = max(differences)
    return float(largest) if np.isfinite(largest) else np.inf
