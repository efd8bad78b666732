"""Integer labels of channels, and which of them are one."""

import numpy as np

FIXED = 0  # the label of a position that is no channel: it stays where it is


class LabelSpace:
    """Hands out labels, and remembers which are one and which must stay.

    Unions and locks are only collected while a graph is read; `resolve` works
    them out for all labels at once, without a Python loop over channels.

    Args:
        exact: Whether channels that are normalized together stay.
        grouped: Names of convolutions whose groups stay, of however few channels they are.

    Attributes:
        normalized: Labels that are normalized together and, beside them, by what.
    """

    def __init__(self, exact=True, grouped=()):
        self.exact, self.grouped = exact, frozenset(grouped)
        self.normalized = []
        self.producers = []  # (first label, stop, name) of every range handed out
        self.reasons = []
        self._num_labels = 1
        self._pairs = []
        self._locks = []

    def __len__(self):
        return self._num_labels

    def new_labels(self, num, producer):
        """Returns `num` labels that nobody has, an int64 array `(num,)`.

        A single channel can never be removed, so it is `FIXED` from the start.
        """
        if num <= 1:
            return np.zeros(num, np.int64)
        start, self._num_labels = self._num_labels, self._num_labels + num
        self.producers.append((start, self._num_labels, producer))
        return np.arange(start, self._num_labels)

    def union(self, first, second, reason):
        """Makes labels that meet one; a channel that meets a fixed position is locked."""
        first, second = np.broadcast_arrays(first, second)
        differ = first != second
        first, second = first[differ], second[differ]
        both = (first != FIXED) & (second != FIXED)
        self._pairs.append((first[both], second[both]))
        self.lock(np.maximum(first, second)[~both], reason)

    def lock(self, labels, reason):
        """Keeps these labels for ever; `reason` says why, for the report."""
        labels = np.unique(labels)
        labels = labels[labels != FIXED]
        if labels.size:
            self._locks.append((labels, len(self.reasons)))
            self.reasons.append(reason)

    def record_normalization(self, labels, operation, name):
        """Notes that a kind of operation normalizes these together; says whether they may leave."""
        self.normalized.append((labels.reshape(-1), f"{operation} '{name}'"))
        if self.exact:
            self.lock(labels, f"normalized together ('{name}')")
        return not self.exact

    def resolve(self):
        """Works out the classes.

        Returns:
            `roots`, an int64 array `(len(self),)`: the smallest label of each
            label's class; and `locks`, of the same shape: the index in
            `self.reasons` of the first lock on the class, -1 where there is none.
        """
        roots = _smallest_connected(len(self), self._pairs)
        locks = np.full(len(self), len(self.reasons))
        for labels, reason in self._locks:
            np.minimum.at(locks, roots[labels], reason)
        locks = np.where(locks < len(self.reasons), locks, -1)
        return roots, locks[roots]


def _smallest_connected(num, pairs):
    """Connected components by hooking and pointer jumping, all labels at once."""
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
