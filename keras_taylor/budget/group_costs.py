"""Parameters, FLOPs and activation memory from how many units each group keeps."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class GroupCosts:
    """Costs of a model as sums of products of widths; it needs no model, and can be saved.

    All units of a group stand at the same places, so a width is a fixed number and so many channels for
    each unit of each group.

    Attributes:
        widths: For each width its fixed part and a tuple of pairs: group, channels a unit.
        terms: "params" and "flops" -> a tuple of pairs: factor, and the widths that it is
            multiplied by (indices, one each time); `None` where a size is unknown.
        memory: What `tensor_lifetimes.Lifetimes` knows, a tuple for each place in memory: bytes a channel,
            its width, first and last step; `None` where a size is unknown.
        num_groups: How many groups there are.
    """

    widths: tuple
    terms: Mapping
    memory: tuple | None
    num_groups: int

    def __call__(self, counts):
        """Costs with so many units left in each group.

        Args:
            counts: Array `(num_groups,)`.

        Returns:
            A dict with ints "params", "flops" and "activation_memory" (bytes); `None` where unknown.
        """
        widths = self._sizes(counts)
        counted = {what: self._products(what, widths) for what in self.terms}
        costs = {what: None if one is None else round(math.fsum(one)) for what, one in counted.items()}
        memory = None if self.memory is None else round(float(self._alive(widths).max()))
        return {**costs, "activation_memory": memory}

    def each_alone(self, whole, alone):
        """Costs with one group cut and all others whole, for each group.

        Only what a group has a part in is counted anew.

        Args:
            whole: How many units all have, `(num_groups,)`.
            alone: How many the group has that is cut, `(num_groups,)`.

        Returns:
            A list of dicts as `__call__` gives them, one a group.
        """
        gone = np.asarray(whole) - np.asarray(alone)
        widths, lost = self._sizes(whole), [{} for _ in range(self.num_groups)]
        for width, group, multiple in zip(*(one.tolist() for one in self._parts), strict=True):
            lost[group][width] = multiple * float(gone[group])
        columns = {what: self._each_alone_of(what, widths, lost) for what in self.terms}
        columns["activation_memory"] = self._each_peak(widths, lost)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _each_alone_of(self, what, widths, lost):
        """One cost for each group, with the widths that it loses, or `None`s."""
        if self.terms[what] is None:
            return [None] * self.num_groups
        products, of_width, costs = self._products(what, widths), self._terms_of_width(what), []
        whole = math.fsum(products)
        for one in lost:
            changes = []
            for term in {term for width in one for term in of_width.get(width, ())}:
                factor, axes = self.terms[what][term]
                changes += [-products[term], factor * math.prod(widths[a] - one.get(a, 0.0) for a in axes)]
            costs.append(round(math.fsum([whole, *changes])))
        return costs

    def _terms_of_width(self, what):
        found = {}
        for term, (_, axes) in enumerate(self.terms[what]):
            for width in set(axes):
                found.setdefault(width, []).append(term)
        return found

    def _each_peak(self, widths, lost):
        """The peak of memory for each group, or `None`s: looked at anew where it has tensors."""
        if self.memory is None:
            return [None] * self.num_groups
        places = {}
        for size, width, first, last in self.memory:
            places.setdefault(width, []).append((size, first, last))
        alive = self._alive(widths)
        before = np.maximum.accumulate(np.append(0.0, alive))
        after = np.append(np.maximum.accumulate(alive[::-1])[::-1], 0.0)
        peaks = []
        for one in lost:
            spans = [(size * num, f, s) for width, num in one.items() for size, f, s in places.get(width, ())]
            start, stop = min((f for _, f, _ in spans), default=0), max((s for _, _, s in spans), default=-1)
            within = alive[start : stop + 1].copy()
            for size, first, last in spans:
                within[first - start : last - start + 1] -= size
            peaks.append(round(float(max(before[start], within.max(initial=0.0), after[stop + 1]))))
        return peaks

    def slopes(self, counts, what):
        """How much of a cost one unit of each group makes up: its derivative, `(num_groups,)`.

        Args:
            counts: Array `(num_groups,)`.
            what: A cost that is known.
        """
        widths = self._sizes(counts)
        by_width = np.zeros(widths.size)
        if what == "activation_memory":
            alive = self._alive(widths)
            worst = int(alive.argmax())
            for size, place, first, last in self.memory:
                by_width[place] += size * (first <= worst <= last)
        else:
            factors, axes = self._arrays[what]
            for number in range(axes.shape[1]):
                others = _product(factors, np.delete(axes, number, 1), widths)
                np.add.at(by_width, axes[:, number], others)
        numbers, groups, multiples = self._parts
        return np.bincount(groups, multiples * by_width[numbers], self.num_groups)

    def _sizes(self, counts):
        """All widths, and a 1 that shorter terms are filled up with."""
        numbers, groups, multiples = self._parts
        own = multiples * np.asarray(counts, np.float64)[groups]
        return np.append(self._fixed + np.bincount(numbers, own, len(self.widths)), 1.0)

    def _products(self, what, widths):
        """The values of a cost's terms, a list, `None` where unknown."""
        return None if self.terms[what] is None else _product(*self._arrays[what], widths).tolist()

    @functools.cached_property
    def _fixed(self):
        return np.array([one for one, _ in self.widths], np.float64)

    @functools.cached_property
    def _parts(self):
        """Widths, groups that have a part in them, and channels a unit, three arrays."""
        parts = [(n, *part) for n, (_, several) in enumerate(self.widths) for part in several]
        numbers, groups, multiples = np.array(parts, np.int64).reshape(-1, 3).T
        return numbers, groups, multiples.astype(np.float64)

    @functools.cached_property
    def _arrays(self):
        """For each cost that is known the factors of its terms, and their widths, a row each."""
        arrays = {}
        for what, terms in self.terms.items():
            if terms is not None:
                longest = max((len(axes) for _, axes in terms), default=0)
                rows = [[*axes, *[len(self.widths)] * (longest - len(axes))] for _, axes in terms]
                factors = np.array([factor for factor, _ in terms], np.float64)
                arrays[what] = factors, np.array(rows, np.int64).reshape(len(rows), longest)
        return arrays

    @functools.cached_property
    def _places(self):
        sizes, places, first, last = np.array(self.memory, np.float64).reshape(-1, 4).T
        return sizes, places.astype(int), first.astype(int), last.astype(int)

    def _alive(self, widths):
        """Bytes that are alive at each step."""
        sizes, places, first, last = self._places
        change = np.zeros(int(last.max(initial=0)) + 2)
        sizes = sizes * widths[places]
        np.add.at(change, first, sizes)
        np.add.at(change, last + 1, -sizes)
        return np.cumsum(change)

    def to_dict(self):
        """The costs as dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content):
        """What `to_dict` made, also after a way through JSON."""
        return cls(**{name: _frozen(value) for name, value in content.items()})


def _frozen(value):
    """Lists as tuples, to any depth."""
    if isinstance(value, Mapping):
        return {key: _frozen(one) for key, one in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _product(factors, axes, widths):
    """The values of terms."""
    return factors * functools.reduce(np.multiply, (widths[column] for column in axes.T), 1.0)
