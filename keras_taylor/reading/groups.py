"""The channels that live or die together."""

import dataclasses
import functools
import re

import keras
import numpy as np

from keras_taylor.reading import graph as graphs
from keras_taylor.reading.composites import find_rule_by_rebuilding
from keras_taylor.reading.rule_checks import check_registered_rule, find_rule_by_probing
from keras_taylor.rules.elementwise import is_probed_activation
from keras_taylor.rules.labels import FIXED, LabelSpace
from keras_taylor.rules.registry import apply_rule

_HINT = "; `exact=False` opens it"


@dataclasses.dataclass(frozen=True)
class Group:
    """Channel units that occur in the same places; each leaves as a whole.

    Attributes:
        name: Name of the first layer that makes these channels.
        num_units: How many units there are.
        producers: Names of all layers (and padding operations) that make them.
        start: Index of its first unit among all units of the analysis.
        reason: Why no unit of it can leave, `None` where they can.
        normalized_by: What normalizes its units together, as in "LayerNormalization 'norm1'": when one
            leaves, the others change. So the group is open with `exact=False` only.
    """

    name: str
    num_units: int
    producers: tuple
    start: int
    reason: str | None = None
    normalized_by: tuple = ()

    @property
    def prunable(self):
        """Whether its units can leave."""
        return self.reason is None


class LabeledModel:
    """A model's graph together with its labels: which channel is which unit.

    Attributes:
        graph: The `Graph`.
        effects: `rules.base.Effect` of each call.
        labels: Label array of every tensor.
        groups: Prunable groups, in the order of their units.
        num_units: Number of prunable units.
        unknown: Names of operations without a rule that lock channels.
        probed: Names of operations that let channels through since running them on
            random numbers showed that each channel stands for itself.
        exact: Whether channels that are normalized together stay.
    """

    def __init__(self, graph, include=None, exclude=(), exact=True, grouped=()):
        self.graph, self.exact = graph, exact
        self.label_space = LabelSpace(exact, grouped)
        self._selection = include, exclude
        self._label(graph)
        self._select(include, exclude)
        self._roots, self._locks = self.label_space.resolve()
        self._make_groups(self._roots, self._locks)

    def units_of(self, labels):
        """Unit of each label: an int64 array of the same shape, -1 for what stays."""
        return self._unit_of_label[labels]

    def kept_mask(self, labels, kept):
        """Which positions stay: a bool array of the shape of `labels`; `kept` is a bool mask over units."""
        return np.append(kept, True)[self.units_of(labels)]

    def producers_of(self, labels):
        """Names of the layers after which the groups of these labels are called, a set."""
        labels = np.unique(labels)
        roots = np.unique(self._roots[labels[labels != FIXED]])
        starts = [start for start, _, _ in self.label_space.producers]
        return {self.label_space.producers[p][2] for p in np.searchsorted(starts, roots, "right") - 1}

    @property
    def grouped_convolutions(self):
        """Names of the convolutions of several groups that read several channels each, a frozenset."""
        layers = {call.name: call.operation for call in self.graph.calls}
        return frozenset(
            name
            for name, layer in layers.items()
            if getattr(layer, "groups", 1) > 1 and hasattr(layer, "kernel") and layer.kernel.shape[-2] > 1
        )

    def _label(self, graph):
        self.labels = [np.full((1,) * len(shape), FIXED) for shape in graph.shapes]
        self.effects, self.probed = [], []
        self._first = {}  # first effect of each operation, and of each site
        for call in graph.calls:
            check_registered_rule(call, self.labels, graph.shapes, self.exact)
            inside = find_rule_by_rebuilding(call, graph.shapes, LabeledModel)
            probed = None if inside else find_rule_by_probing(call, self.labels, graph.shapes)
            positions = call.tensor_positions
            effect = apply_rule(
                self.label_space, call, self.labels, graph.shapes, positions, inside or probed
            )
            if probed or (call.closed is None and is_probed_activation(call.operation)):
                self.probed.append(call.name)
            for index, labels in zip(call.outputs, effect.outputs, strict=True):
                self.labels[index] = labels
            self.effects.append(effect)
            self._join(call, effect)
        self._join_bindings(graph)
        for index in graph.outputs:
            self.label_space.lock(self.labels[index], "model output")
        self.probed = sorted(set(self.probed))
        self.unknown = sorted(
            {c.name for c, e in zip(graph.calls, self.effects, strict=True) if not e.has_rule}
        )

    def _join(self, call, effect):
        """An operation that was seen before has one set of weights and one configuration."""
        first = self._first.setdefault(call.operation, effect)
        if first is not effect:
            for before, now in _vectors(first, effect):
                self._unite(before, now, call.name)
        first = self._first.setdefault(call.site, effect)
        if first is not effect:
            for before, now in zip(first.outputs, effect.outputs, strict=True):
                self._unite(before, now, call.name)

    def _join_bindings(self, graph):
        for tensors in graph.bindings.values():
            for index in tensors[1:]:
                self._unite(self.labels[tensors[0]], self.labels[index], "an input of a sub-model")

    def _unite(self, before, now, name):
        fits = all(a == b or 1 in (a, b) for a, b in zip(before.shape, now.shape, strict=False))
        if before.ndim == now.ndim and fits:
            self.label_space.union(before, now, f"shared at several places ('{name}')")
        else:
            self.label_space.lock(before, f"shared at several places of different size ('{name}')")
            self.label_space.lock(now, f"shared at several places of different size ('{name}')")

    def _select(self, include, exclude):
        names = [name for _, _, name in self.label_space.producers]
        for index in find_producers(exclude, self.graph, names, "exclude"):
            self._lock_producer(index, "excluded by the caller")
        if include is not None:
            wanted = set(find_producers(include, self.graph, names, "include"))
            for index in set(range(len(names))) - wanted:
                self._lock_producer(index, "not included by the caller")

    def _lock_producer(self, index, reason):
        start, stop, _ = self.label_space.producers[index]
        self.label_space.lock(np.arange(start, stop), reason)

    def _make_groups(self, roots, locks):
        producer_of = np.zeros(len(self.label_space), np.int64)
        for index, (start, stop, _) in enumerate(self.label_space.producers):
            producer_of[start:stop] = index
        signature = self._signatures(roots)
        classes = np.flatnonzero(roots == np.arange(len(roots)))[1:]  # without FIXED
        free = classes[locks[classes] < 0]
        _, first, family = np.unique(signature[free], return_index=True, return_inverse=True)
        order = np.lexsort((free, first[family])) if free.size else np.zeros(0, np.int64)
        self.num_units = int(free.size)
        unit_of_class = np.full(len(roots), -1)
        unit_of_class[free[order]] = np.arange(free.size)
        self._unit_of_label = unit_of_class[roots]
        members = _members(roots, producer_of)
        self.groups, names = [], {}
        bounds = np.flatnonzero(np.diff(first[family][order], prepend=-1))
        stops = np.append(bounds[1:], free.size)[: bounds.size]
        for start, stop in zip(bounds, stops, strict=True):
            root = free[order[start]]
            producers = tuple(dict.fromkeys(self.label_space.producers[p][2] for p in members(root)))
            names[producers[0]] = names.get(producers[0], 0) + 1
            suffix = f"#{names[producers[0]]}" if names[producers[0]] > 1 else ""
            self.groups.append(Group(producers[0] + suffix, int(stop - start), producers, int(start)))
        self._note_normalized()

    def _note_normalized(self):
        """Tells the groups by what they are normalized."""
        starts = [group.start for group in self.groups]
        names = [{} for _ in self.groups]
        for labels, by in self.label_space.normalized:
            units = np.unique(self.units_of(labels))
            for number in np.unique(np.searchsorted(starts, units[units >= 0], "right") - 1).tolist():
                names[number][by] = None
        self.groups = [
            dataclasses.replace(group, normalized_by=tuple(by))
            for group, by in zip(self.groups, names, strict=True)
        ]

    def _signatures(self, roots):
        """A hash of all the places in which each class occurs."""
        random = np.random.default_rng(0)
        signature = np.zeros(len(roots), np.uint64)
        places = [labels.reshape(-1) for labels in self.labels if labels.size > 1]
        places += [v for e in self.effects for axes in e.weights.values() for v in axes if v is not None]
        for vector in places:
            weight = random.integers(1, 2**63, dtype=np.uint64)
            np.add.at(signature, roots[vector], weight)
        return signature

    @functools.cached_property
    def locked_groups(self):
        """Groups of which no unit can leave."""
        roots, locks = self._roots, self._locks
        classes = np.flatnonzero((roots == np.arange(len(roots))) & (locks >= 0))
        starts = np.array([start for start, _, _ in self.label_space.producers], np.int64)
        producers = np.searchsorted(starts, classes, "right") - 1
        open_otherwise = self._open_if_inexact()
        groups = {}
        for root, producer in zip(classes.tolist(), producers.tolist(), strict=True):
            name = self.label_space.producers[producer][2]
            opens = (name, root - int(starts[producer])) in open_otherwise
            key = (producer, int(locks[root]), opens)
            groups[key] = groups.get(key, 0) + 1
        return [
            Group(name, num, (name,), -1, self.label_space.reasons[lock] + _HINT * opens)
            for (producer, lock, opens), num in sorted(groups.items())
            for name in [self.label_space.producers[producer][2]]
        ]

    def _open_if_inexact(self):
        """Channels, as names of their producers and positions, that `exact=False` would open."""
        if not (self.exact and self.label_space.normalized):
            return set()
        other = LabeledModel(self.graph, *self._selection, exact=False, grouped=self.label_space.grouped)
        return {
            (name, position)
            for start, stop, name in other.label_space.producers
            for position in np.flatnonzero(other.units_of(np.arange(start, stop)) >= 0).tolist()
        }


def _vectors(first, second):
    """Pairs of label arrays of two effects of one operation that must agree."""
    for name, axes in first.weights.items():
        for before, now in zip(axes, second.weights.get(name, axes), strict=True):
            if before is not None and now is not None:
                yield before, now
    for edits, others in ((first.config, second.config), (first.arguments, second.arguments)):
        for key in edits.keys() & others.keys():
            yield from zip(edits[key].labels, others[key].labels, strict=True)


def _members(roots, producer_of):
    """A function from a class to the producers of its labels, in order."""
    order = np.argsort(roots, kind="stable")
    sorted_roots = roots[order]

    def members(root):
        start, stop = np.searchsorted(sorted_roots, [root, root + 1])
        return np.unique(producer_of[order[start:stop]])

    return members


def find_producers(patterns, graph, names, argument):
    """Indices of producers that names, regular expressions or layers stand for."""
    patterns = [patterns] if isinstance(patterns, (str, keras.Layer)) else list(patterns)
    layers = {layer: name for name, layer in graph.layers()}
    known = list(layers.values()) + [n for n in names if n not in layers.values()]
    found = []
    for pattern in patterns:
        if isinstance(pattern, str):
            hits = {n for n in known if re.fullmatch(pattern, n)} or {n for n in known if n == pattern}
        else:
            hits = {layers[pattern]} if pattern in layers else set()
        if not hits:
            raise ValueError(
                f"`{argument}` names a layer that the model does not have. Expected layer names, "
                f"regular expressions that match whole names, or layers of the model; it has "
                f"{', '.join(known[:8])}{', ...' if len(known) > 8 else ''}. "
                f"Received: {argument}={pattern!r}"
            )
        found += [i for i, name in enumerate(names) if name in hits]
    return found


def as_name_patterns(model, patterns):
    """Patterns with layers of the model replaced by their names, which pruned models have too."""
    if patterns is None:
        return None
    names = {layer: name for name, layer in graphs.read_model(model).layers()}
    patterns = [patterns] if isinstance(patterns, (str, keras.Layer)) else patterns
    return [re.escape(names[p]) if p in names else p for p in patterns]


def label_model(model, include=None, exclude=(), exact=True, grouped=()):
    """Reads a model and finds its groups.

    Args:
        model: A built Keras model.
        include: Prune only these: layer names, regular expressions that match whole
            names, or layers. `None`: all. A unit that several layers make is pruned
            only if all of them are included.
        exclude: Never prune the channels that these layers make.
        exact: `False`: channels that are normalized together may leave, too, although that
            changes what the others become.
        grouped: Names of convolutions that once had groups of several channels
            (`LabeledModel.grouped_convolutions`):
            of one channel each, whole groups would leave, which no plan for the original can say.

    Returns:
        `LabeledModel`.
    """
    return LabeledModel(graphs.read_model(model), include, exclude, exact, grouped)
