"""Integer labels of channels: which channels are one unit, and which must stay. Where examples are."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from keras_taylor.support.types import BoolArray, IntArray, Shape

FIXED = 0  # the label of a position that is no channel, and stays


@dataclasses.dataclass(frozen=True)
class BatchAxis:
    """Where the examples of a tensor are.

    A model may fold windows, time steps or patches into the batch axis. Then each example has several rows:
    row number `(o * num_examples + example) * inner + i`, for each `o < outer` and `i < inner`.

    Attributes:
        axis: The axis on which the examples are.
        outer: How often the whole batch is repeated along this axis.
        inner: How many rows in a row belong to one example.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1

    @property
    def num_rows(self) -> int:
        """How many rows an example has."""
        return self.outer * self.inner

    def shape_of_example(self, shape: Shape) -> Shape:
        """The shape of the tensor for one example alone."""
        return (*shape[: self.axis], self.num_rows, *shape[self.axis + 1 :])

    def rows_of_first(self, num_examples: int) -> BoolArray:
        """Which rows belong to the first of this many examples, a bool array."""
        return np.tile(np.repeat(np.arange(num_examples) == 0, self.inner), self.outer)

    def after(self, move: Callable[[IntArray], IntArray], rank: int) -> "BatchAxis | None":
        """The batch axis after an operation that moves, adds or removes axes; `None` if it removes this one.

        Args:
            move: Does the same to an array.
            rank: Number of axes before it.
        """
        moved = move(np.zeros([2 if axis == self.axis else 1 for axis in range(rank)], np.int64))
        return dataclasses.replace(self, axis=moved.shape.index(2)) if 2 in moved.shape else None

    def after_reshape(self, before: Shape, after: Shape) -> "BatchAxis | None":
        """The batch axis after a reshape; `None` if a size is unknown, or if rows of two examples are mixed.

        Args:
            before, after: The shapes.
        """
        example = self.shape_of_example(before)
        size = before[self.axis]
        num_examples = None if size is None else size // self.num_rows
        if None in example:
            return None
        outside = self.outer * math.prod(d for d in example[: self.axis] if d)
        inside = self.inner * math.prod(d for d in example[self.axis + 1 :] if d)
        for axis, size in enumerate(after):
            others = [d for d in (*after[:axis], *after[axis + 1 :]) if d]
            outer, rest = divmod(outside, math.prod(others[:axis]))
            inner, remainder = divmod(inside, math.prod(others[axis:]))
            fits = size == (None if num_examples is None else num_examples * outer * inner)
            if fits and len(others) == len(after) - 1 and not rest and not remainder:
                return BatchAxis(axis, outer, inner)
        return None


FIRST_AXIS = BatchAxis()  # as in the inputs of a model: one row for each example


class Producer(NamedTuple):
    """A range of labels that was handed out to one operation.

    Attributes:
        start: The first label.
        stop: The label after the last one.
        name: Name of the operation that makes these channels.
    """

    start: int
    stop: int
    name: str


class NormalizedLabels(NamedTuple):
    """Channels that one operation normalizes together.

    Attributes:
        labels: int64 array `(num,)`.
        normalized_by: The operation, as reports name it: `"LayerNormalization 'norm'"`.
    """

    labels: IntArray
    normalized_by: str


@dataclasses.dataclass(frozen=True)
class SizeChoices:
    """What was decided by sizes when a model was read.

    In a smaller version of the model other sizes would decide otherwise, and units would leave that no plan
    for the original can express. So it is read with the choices of the original.

    Attributes:
        grouped: Names of convolutions with several groups of several channels. With one channel left in each
            group they would be read as depthwise, and whole groups would leave.
        passed: Names of layers through which channels pass on an axis that the layers do not mix. Their own
            units stay. With one channel left on that axis they would leave.
        split_axes: Name of an operation that spreads channels over several axes -> the axis on which they are
            units from there on.
        units: Layer -> the unit in the original of each channel that it has, -1 for one that stays. Without a
            residual branch, channels could leave that the branch keeps together or in place.
    """

    grouped: frozenset[str] = frozenset()
    passed: frozenset[str] = frozenset()
    split_axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    units: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)


class ResolvedLabels(NamedTuple):
    """The classes of labels that are one unit each, for all labels of a space.

    Attributes:
        roots: int64 array `(len(space),)`: the smallest label of each label's class.
        locks: int64 array `(len(space),)`: the index in `space.reasons` of the first lock on the label's
            class, -1 if there is none.
    """

    roots: IntArray
    locks: IntArray


class LabelSpace:
    """Hands out labels, and collects which of them are one unit and which must stay.

    Reading a graph only collects unions and locks. `resolve` works them out for all labels at once, without a
    Python loop over channels.

    Args:
        exact: Whether channels that are normalized together stay.
        choices: Those of the original, if its smaller version is read.

    Attributes:
        exact: As given.
        grouped: Names of grouped convolutions that keep their number of groups, even if each group has one
            channel.
        passed, split_axes: As in `SizeChoices`, of all operations so far.
        normalized: `NormalizedLabels` of each operation that normalizes channels together.
        producers: `Producer` of each range of labels, in ascending order.
        reasons: Why labels were locked.
    """

    def __init__(self, exact: bool = True, choices: SizeChoices | None = None) -> None:
        choices = choices or SizeChoices()
        self.exact, self.grouped = exact, choices.grouped
        self.passed, self.split_axes = set(choices.passed), dict(choices.split_axes)
        self.normalized: list[NormalizedLabels] = []
        self.producers: list[Producer] = []
        self.reasons = ["the model's output"]  # goes before all others
        self._num_labels = 1
        self._unions: list[tuple[IntArray, IntArray]] = []
        self._locks: list[tuple[IntArray, int]] = []  # labels, and the index of the reason

    def __len__(self) -> int:
        return self._num_labels

    def new_labels(self, num: int, producer: str) -> IntArray:
        """Returns `num` labels that are not in use yet, an int64 array `(num,)`.

        A single channel can never be removed, so it is `FIXED` from the start.
        """
        if num <= 1:
            return np.zeros(num, np.int64)
        start, self._num_labels = self._num_labels, self._num_labels + num
        self.producers.append(Producer(start, self._num_labels, producer))
        return np.arange(start, self._num_labels)

    def new_branch(self, name: str) -> IntArray:
        """Returns the label of a residual branch, an int64 array `(1,)`; `name` is that of its sum."""
        self._num_labels += 1
        self.producers.append(Producer(self._num_labels - 1, self._num_labels, name))
        return np.array([self._num_labels - 1])

    def union(self, first: IntArray, second: IntArray, reason: str) -> None:
        """Makes labels that meet one unit. A channel that meets a fixed position is locked.

        Args:
            first: Label array.
            second: Label array that broadcasts against it.
            reason: Why channels that meet fixed positions stay.
        """
        first, second = np.broadcast_arrays(first, second)
        differ = first != second
        first, second = first[differ], second[differ]
        both = (first != FIXED) & (second != FIXED)
        self._unions.append((first[both], second[both]))
        self.lock(np.maximum(first, second)[~both], reason)

    def lock(self, labels: IntArray, reason: str) -> None:
        """Keeps these labels for good. The report quotes the reason."""
        labels = np.unique(labels)
        labels = labels[labels != FIXED]
        if labels.size:
            self._locks.append((labels, len(self.reasons)))
            self.reasons.append(reason)

    def lock_output(self, labels: IntArray) -> None:
        """Keeps the labels of an output of the model. No other reason is reported for them."""
        self._locks.append((np.unique(labels[labels != FIXED]), 0))

    def record_normalization(self, labels: IntArray, operation: str, name: str) -> bool:
        """Records that an operation normalizes these labels together, and locks them if `exact`.

        Args:
            labels: Label array of any shape.
            operation: Class of the operation.
            name: Name of the operation.

        Returns:
            Whether these channels may leave.
        """
        self.normalized.append(NormalizedLabels(labels.reshape(-1), f"{operation} '{name}'"))
        if self.exact:
            self.lock(labels, f"normalized together ('{name}')")
        return not self.exact

    def resolve(self) -> ResolvedLabels:
        """Works out which labels are one unit, and which are locked."""
        roots = _smallest_connected(len(self), self._unions)
        locks = np.full(len(self), len(self.reasons))
        for labels, reason in self._locks:
            np.minimum.at(locks, roots[labels], reason)
        locks = np.where(locks < len(self.reasons), locks, -1)
        return ResolvedLabels(roots, locks[roots])


def _smallest_connected(num: int, pairs: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """The smallest label that each label is connected with, an int64 array `(num,)`.

    Connected components by hooking and pointer jumping (Shiloach and Vishkin 1982), on all labels at once.

    Args:
        num: Number of labels.
        pairs: Arrays of labels that are connected, of equal shape in each pair.
    """
    parents = np.arange(num)
    first = np.concatenate([p[0] for p in pairs] + [np.zeros(0, np.int64)])
    second = np.concatenate([p[1] for p in pairs] + [np.zeros(0, np.int64)])
    while True:
        first, second = parents[first], parents[second]
        apart = first != second
        if not apart.any():
            return parents
        first, second = first[apart], second[apart]
        np.minimum.at(parents, np.maximum(first, second), np.minimum(first, second))
        while True:
            grandparents = parents[parents]
            if np.array_equal(grandparents, parents):
                break
            parents = grandparents
