"""Parameters, FLOPs and activation memory as a function of the number of units that each group keeps."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_taylor.support.types import FloatArray, IntArray


class WidthPart(NamedTuple):
    """The channels that one group contributes to a width."""

    group: int
    channels_per_unit: int


class Width(NamedTuple):
    """The number of positions that are kept along an axis: fixed ones, and channels of several groups.

    It is zero once one of its branches has left; each is the number of a group of one unit.
    """

    fixed: int
    parts: tuple[WidthPart, ...]
    branches: tuple[int, ...] = ()


class Term(NamedTuple):
    """A product: a factor times the sizes of some widths (their numbers, repeated if they occur twice)."""

    factor: float
    widths: tuple[int, ...]


class Buffer(NamedTuple):
    """A place in memory: its bytes per channel, its width, and the first and last step of its life."""

    bytes_per_channel: float
    width: int
    first_step: int
    last_step: int


@dataclasses.dataclass(frozen=True)
class GroupCosts:
    """Costs of a model as sums of products of widths. It needs no model, and it can be saved.

    All units of a group occur in the same places. So the size of a width is affine in the numbers `n` of
    units that the groups keep: `size(w) = fixed(w) + sum over its parts of channels_per_unit * n[group]`.
    What is in a residual branch has that size times the `n[group]` of the branch.
    Parameters and FLOPs are sums of terms, `factor * size(w1) * size(w2) * ...`. Activation memory is the
    largest sum, over all steps, of `bytes_per_channel * size(w)` of the buffers that are alive at the step.

    Attributes:
        widths: All widths; terms and buffers name them by number. Width 0 is the constant 1.
        terms: "params" and "flops" -> the terms whose sum is the cost; `None` if a size is unknown.
        memory: The buffers of activations; `None` if a size is unknown.
        num_groups: How many groups there are.
    """

    widths: tuple[Width, ...]
    terms: Mapping[str, tuple[Term, ...] | None]
    memory: tuple[Buffer, ...] | None
    num_groups: int

    def __call__(self, num_kept: IntArray | FloatArray | Sequence[int]) -> dict[str, int | None]:
        """Costs if each group keeps some of its units.

        Args:
            num_kept: How many units each group keeps, `(num_groups,)`.

        Returns:
            A dict of ints: "params" (numbers), "flops" (2 per multiply-add) and "activation_memory"
            (bytes); `None` for costs that are unknown.
        """
        sizes = self._sizes(num_kept)
        costs: dict[str, int | None] = {}
        for cost in self.terms:
            products = self._products(cost, sizes)
            costs[cost] = None if products is None else round(math.fsum(products))
        memory = None if self.memory is None else round(float(self._bytes_alive(sizes).max()))
        return {**costs, "activation_memory": memory}

    def with_one_group_cut(self, num_units: IntArray, num_left: IntArray) -> list[dict[str, int | None]]:
        """Costs with one group cut and all others whole, for each group.

        Only the terms and buffers in which the group takes part are counted again.

        Args:
            num_units: How many units all groups have, `(num_groups,)`.
            num_left: How many units the group has that is cut, `(num_groups,)`.

        Returns:
            A list of dicts as `__call__` returns them, one for each group.
        """
        num_removed = np.asarray(num_units) - np.asarray(num_left)
        sizes = self._sizes(num_units)
        losses: list[dict[int, float]] = [{} for _ in range(self.num_groups)]
        for width, group, channels in zip(*(array.tolist() for array in self._part_arrays), strict=True):
            losses[group][width] = channels * float(num_removed[group])
        for width, group in zip(*(array.tolist() for array in self._branch_arrays), strict=True):
            losses[group][width] = sizes[width] * float(num_removed[group])
        columns = {cost: self._sums_after(cost, sizes, losses) for cost in self.terms}
        columns["activation_memory"] = self._peaks_after(sizes, losses)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def gradient(self, num_kept: IntArray | FloatArray, cost: str) -> FloatArray:
        """The derivative of a cost with respect to the number of units of each group.

        Args:
            num_kept: How many units each group keeps, `(num_groups,)`.
            cost: The name of a cost that is known.

        Returns:
            A float64 array `(num_groups,)`: by how much one unit of each group raises the cost.
        """
        sizes, kept = self._sizes(num_kept), np.asarray(num_kept, np.float64)
        by_width = np.zeros(sizes.size)
        if cost == "activation_memory":
            peak = int(self._bytes_alive(sizes).argmax())
            for buffer in self.memory or ():
                is_alive = buffer.first_step <= peak <= buffer.last_step
                by_width[buffer.width] += buffer.bytes_per_channel * is_alive
        else:
            terms = self._term_arrays[cost]
            for number in range(terms.widths.shape[1]):  # the product rule
                others = terms._replace(widths=np.delete(terms.widths, number, 1))
                np.add.at(by_width, terms.widths[:, number], others.values(sizes))
        parts = self._part_arrays
        whole = self._whole_sizes(num_kept)
        is_there = np.ones(len(self.widths))
        np.multiply.at(is_there, self._branch_arrays.widths, kept[self._branch_arrays.groups])
        by_part = parts.channels_per_unit * (by_width[:-1] * is_there)[parts.widths]
        by_group = np.bincount(parts.groups, by_part, self.num_groups).astype(np.float64)
        for width, group in zip(*(array.tolist() for array in self._branch_arrays), strict=True):
            others = math.prod(kept[other] for other in self.widths[width].branches if other != group)
            by_group[group] += by_width[width] * whole[width] * others
        return by_group

    def _sums_after(
        self, cost: str, sizes: FloatArray, losses: Sequence[Mapping[int, float]]
    ) -> list[int | None]:
        """One cost for each group, after its widths lost their channels in `losses`; or `None`s."""
        terms, products = self.terms[cost], self._products(cost, sizes)
        if terms is None or products is None:
            return [None] * self.num_groups
        terms_of_width: dict[int, list[int]] = {}
        for number, term in enumerate(terms):
            for width in set(term.widths):
                terms_of_width.setdefault(width, []).append(number)
        total = math.fsum(products)
        sums: list[int | None] = []
        for lost in losses:
            changes = []
            for number in {n for width in lost for n in terms_of_width.get(width, ())}:
                left = math.prod(sizes[width] - lost.get(width, 0.0) for width in terms[number].widths)
                changes += [-products[number], terms[number].factor * left]
            sums.append(round(math.fsum([total, *changes])))
        return sums

    def _peaks_after(self, sizes: FloatArray, losses: Sequence[Mapping[int, float]]) -> list[int | None]:
        """The peak of memory for each group, after its widths lost their channels; or `None`s."""
        if self.memory is None:
            return [None] * self.num_groups
        buffers_of_width: dict[int, list[Buffer]] = {}
        for buffer in self.memory:
            buffers_of_width.setdefault(buffer.width, []).append(buffer)
        alive = self._bytes_alive(sizes)
        peak_before = np.maximum.accumulate(np.append(0.0, alive))
        peak_after = np.append(np.maximum.accumulate(alive[::-1])[::-1], 0.0)
        peaks: list[int | None] = []
        for lost in losses:
            smaller = [(b, num) for width, num in lost.items() for b in buffers_of_width.get(width, ())]
            start = min((buffer.first_step for buffer, _ in smaller), default=0)
            stop = max((buffer.last_step for buffer, _ in smaller), default=-1) + 1
            within = alive[start:stop].copy()  # only these steps change
            for buffer, num in smaller:
                life = slice(buffer.first_step - start, buffer.last_step - start + 1)
                within[life] -= buffer.bytes_per_channel * num
            peaks.append(round(float(max(peak_before[start], within.max(initial=0.0), peak_after[stop]))))
        return peaks

    def _sizes(self, num_kept: IntArray | FloatArray | Sequence[int]) -> FloatArray:
        """The sizes of all widths, and a 1 that fills up the rows of shorter terms."""
        sizes, branches = self._whole_sizes(num_kept), self._branch_arrays
        np.multiply.at(sizes, branches.widths, np.asarray(num_kept, np.float64)[branches.groups])
        return np.append(sizes, 1.0)

    def _whole_sizes(self, num_kept: IntArray | FloatArray | Sequence[int]) -> FloatArray:
        """The sizes of all widths with every branch there."""
        parts = self._part_arrays
        channels = parts.channels_per_unit * np.asarray(num_kept, np.float64)[parts.groups]
        return self._fixed_sizes + np.bincount(parts.widths, channels, len(self.widths))

    def _products(self, cost: str, sizes: FloatArray) -> list[float] | None:
        """The values of the terms of a cost; `None` if it is unknown."""
        return None if self.terms[cost] is None else self._term_arrays[cost].values(sizes).tolist()

    def _bytes_alive(self, sizes: FloatArray) -> FloatArray:
        """The bytes that are alive at each step."""
        buffers = self._buffer_arrays
        changes = np.zeros(int(buffers.last_steps.max(initial=0)) + 2)
        num_bytes = buffers.bytes_per_channel * sizes[buffers.widths]
        np.add.at(changes, buffers.first_steps, num_bytes)
        np.add.at(changes, buffers.last_steps + 1, -num_bytes)
        return np.cumsum(changes)

    @functools.cached_property
    def _fixed_sizes(self) -> FloatArray:
        return np.array([width.fixed for width in self.widths], np.float64)

    @functools.cached_property
    def _part_arrays(self) -> "_PartArrays":
        parts = [(number, *part) for number, width in enumerate(self.widths) for part in width.parts]
        widths, groups, channels = np.array(parts, np.int64).reshape(-1, 3).T
        return _PartArrays(widths, groups, channels.astype(np.float64))

    @functools.cached_property
    def _branch_arrays(self) -> "_BranchArrays":
        pairs = [(number, group) for number, width in enumerate(self.widths) for group in width.branches]
        return _BranchArrays(*np.array(pairs, np.int64).reshape(-1, 2).T)

    @functools.cached_property
    def _term_arrays(self) -> "dict[str, _TermArrays]":
        arrays, filler = {}, len(self.widths)
        for cost, terms in self.terms.items():
            if terms is not None:
                longest = max((len(term.widths) for term in terms), default=0)
                rows = [[*term.widths, *[filler] * (longest - len(term.widths))] for term in terms]
                factors = np.array([term.factor for term in terms], np.float64)
                arrays[cost] = _TermArrays(factors, np.array(rows, np.int64).reshape(len(rows), longest))
        return arrays

    @functools.cached_property
    def _buffer_arrays(self) -> "_BufferArrays":
        sizes, widths, first, last = np.array(self.memory, np.float64).reshape(-1, 4).T
        return _BufferArrays(sizes, widths.astype(int), first.astype(int), last.astype(int))

    def to_dict(self) -> dict[str, Any]:
        """The costs as dicts, tuples and numbers, which JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "GroupCosts":
        """The costs that `to_dict` returned, also after a way through JSON."""
        widths = tuple(
            Width(fixed, tuple(WidthPart(*part) for part in parts), *map(tuple, branches))
            for fixed, parts, *branches in content["widths"]
        )
        terms = {
            cost: None if terms is None else tuple(Term(factor, tuple(numbers)) for factor, numbers in terms)
            for cost, terms in content["terms"].items()
        }
        memory = content["memory"]
        buffers = None if memory is None else tuple(Buffer(*buffer) for buffer in memory)
        return cls(widths, terms, buffers, content["num_groups"])


class _PartArrays(NamedTuple):
    """All parts of all widths, one entry for each part: its width, its group, its channels per unit."""

    widths: IntArray
    groups: IntArray
    channels_per_unit: FloatArray


class _BranchArrays(NamedTuple):
    """All branches of all widths, one entry for each: the width, and the group of the branch."""

    widths: IntArray
    groups: IntArray


class _TermArrays(NamedTuple):
    """The terms of a cost: factors `(num_terms,)`, and rows of width numbers `(num_terms, longest)`."""

    factors: FloatArray
    widths: IntArray

    def values(self, sizes: FloatArray) -> FloatArray:
        """The values of the terms `(num_terms,)` for these sizes of all widths."""
        return self.factors * functools.reduce(np.multiply, (sizes[column] for column in self.widths.T), 1.0)


class _BufferArrays(NamedTuple):
    """All buffers, one entry for each: fields as of `Buffer`."""

    bytes_per_channel: FloatArray
    widths: IntArray
    first_steps: IntArray
    last_steps: IntArray
