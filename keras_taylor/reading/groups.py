"""The channels of a model that leave together."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import keras
import numpy as np

from keras_taylor.reading.branches import Branches, find_branches
from keras_taylor.reading.composites import find_structure
from keras_taylor.reading.graph import Call, Graph, Site, read_model
from keras_taylor.reading.rule_checks import (
    check_registered_rule,
    find_batches_by_running,
    find_rule_by_probing,
)
from keras_taylor.rules.attention import equally_wide_parts, is_attention
from keras_taylor.rules.base import Effect, KeptLabels, LabeledTensor
from keras_taylor.rules.elementwise import is_probed_activation
from keras_taylor.rules.labels import FIRST_AXIS, FIXED, BatchAxis, LabelSpace, SizeChoices
from keras_taylor.rules.registry import apply_rule
from keras_taylor.support.types import BoolArray, IntArray, LayerPatterns, Shape

# Layer names, regular expressions that match whole names, or layers; or one of these.

_INEXACT_HINT = "; `exact=False` opens it"


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that occur in the same places of a model. Each unit is a set of channels that leave together.

    Attributes:
        name: Name of the first layer that makes these channels; a second group of the same layer gets
            "#2" appended.
        num_units: The number of units.
        producers: Names of all layers (and padding operations) that make the channels.
        start: Index of the first unit among all units of the model; -1 if no unit can leave.
        reason: Why no unit can leave, `None` if they can.
        normalized_by: The operations that normalize the units together, such as "LayerNormalization
            'norm1'". If one unit leaves, the others change there. So the group is open with `exact=False`
            only.
        is_branch: Whether its only unit is a residual branch, which leaves as a whole. The group bears the
            name of the sum that the branch ends in.

    Example:
        >>> group = keras_taylor.analyze(model).groups[0]
        >>> group.prunable, group.reason is None
        (True, True)
    """

    name: str
    num_units: int
    producers: tuple[str, ...]
    start: int
    reason: str | None = None
    normalized_by: tuple[str, ...] = ()
    is_branch: bool = False

    @property
    def prunable(self) -> bool:
        """Whether its units can leave."""
        return self.reason is None


class LabeledModel:
    """A model's graph with its labels, which say to which unit each channel belongs.

    Args:
        graph: The model.
        include, exclude, exact, choices, with_branches: As in `label_model`.

    Attributes:
        graph: The model.
        exact: Whether channels that are normalized together stay.
        with_branches: Whether residual branches are units, too.
        branches: The residual branches; none unless `with_branches`.
        label_space: The labels, with their producers and locks.
        labels: Label array of every tensor.
        batches: Where the examples are in every tensor, `None` where gates cannot follow them.
        effects: What the rule says of each call.
        groups: Prunable groups, in the order of their units.
        num_units: Number of prunable units.
        branch_units: The unit of each branch, -1 for one that stays: an int64 array `(num_branches,)`.
        unknown: Names of operations without a rule, which lock the channels that they read. Augmentation
            before the first layer reads none.
        probed: Names of operations without a rule that let channels through: on random numbers, each channel
            of the output depended on the same channel of the input only.
    """

    def __init__(
        self,
        graph: Graph,
        include: LayerPatterns | None = None,
        exclude: LayerPatterns = (),
        exact: bool = True,
        choices: SizeChoices | None = None,
        with_branches: bool = False,
    ) -> None:
        self.graph, self.exact, self.with_branches = graph, exact, with_branches
        self._include, self._exclude, self._choices = include, exclude, choices
        self.label_space = LabelSpace(exact, choices)
        labeling = _Labeling(graph, self.label_space)
        self.labels, self.batches, self.effects = labeling.labels, labeling.batches, labeling.effects
        self.unknown, self.probed = labeling.unknown, labeling.probed
        self.branches = find_branches(graph) if with_branches else Branches()
        self._branch_labels = [self._label_branch(number) for number in range(len(self.branches.branches))]
        self._lock_unselected()
        self._unite_as_in_original()
        self._roots, self._locks = self.label_space.resolve()
        grouping = _group_units(self.label_space, self._roots, self._locks, self._signatures())
        self._unit_of_label = grouping.unit_of_label
        self.num_units = sum(group.num_units for group in grouping.groups)
        self.branch_units = self.units_of(np.array(self._branch_labels, np.int64))
        branch_starts = {unit for unit in self.branch_units.tolist() if unit >= 0}
        self.groups = [
            dataclasses.replace(group, is_branch=group.start in branch_starts)
            for group in self._with_normalizations(grouping.groups)
        ]

    def shape_of_example(self, tensor: int) -> Shape:
        """The shape of a tensor for one example alone; an example may have several rows on the batch axis."""
        batch, shape = self.batches[tensor], self.graph.shapes[tensor]
        return shape if batch is None else batch.shape_of_example(shape)

    def units_of(self, labels: IntArray) -> IntArray:
        """The unit of each label: an int64 array of the same shape, -1 for what stays."""
        return self._unit_of_label[labels]

    def kept_mask(self, labels: IntArray, kept: BoolArray) -> BoolArray:
        """Which positions stay: a bool array of the shape of `labels`; `kept` is a bool mask over units."""
        return np.append(kept, True)[self.units_of(labels)]

    def branch_units_of_call(self, number: int) -> IntArray:
        """The units of the branches that a call leaves with: an int64 array."""
        return self._units_of_branches(self.branches.of_calls.get(number, frozenset()))

    def branch_units_of_operation(self, operation: keras.Operation) -> IntArray:
        """The units of the branches that a layer leaves with, weights and all: an int64 array."""
        return self._units_of_branches(self.branches.of_operations.get(operation, frozenset()))

    def _units_of_branches(self, numbers: frozenset[int]) -> IntArray:
        units = self.branch_units[sorted(numbers)]
        return units[units >= 0]

    def bypassed_sums(self, kept: BoolArray) -> dict[Site, int]:
        """The sums whose branches leave -> which of the tensors that they read takes their place."""
        return {
            branch.site: branch.trunk
            for branch, unit in zip(self.branches.branches, self.branch_units.tolist(), strict=True)
            if unit >= 0 and not kept[unit]
        }

    @functools.cached_property
    def makers_in_branches(self) -> dict[str, list[str]]:
        """Name of the sum of a branch that can leave -> names of what makes channels and leaves with it."""
        operations = {call.name: call.operation for call in self.graph.calls}
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for _, _, name in self.label_space.producers):
            layer = name
            while layer and layer not in operations:  # a closed layer names what is inside of it
                layer = layer.rpartition("/")[0]
            for number in self.branches.of_operations.get(operations.get(layer), ()):
                branch = self.branches.branches[number].name
                if branch != name and self.branch_units[number] >= 0:
                    found.setdefault(branch, []).append(name)
        return found

    def kept_labels(self, kept: BoolArray) -> KeptLabels:
        """What follows for weights and configurations if these units are kept."""
        return KeptLabels(lambda labels: self.kept_mask(labels, kept))

    def producers_of(self, labels: IntArray) -> set[str]:
        """Names of the layers after which the groups of these labels are called."""
        labels = np.unique(labels)
        roots = np.unique(self._roots[labels[labels != FIXED]])
        return {self.label_space.producers[index][2] for index in self._producer_indices(roots)}

    @property
    def size_choices(self) -> SizeChoices:
        """What was decided by sizes, for smaller versions of the model."""
        layers = {call.name: call.operation for call in self.graph.calls}
        grouped = {
            name
            for name, layer in layers.items()
            if getattr(layer, "groups", 1) > 1 and hasattr(layer, "kernel") and layer.kernel.shape[-2] > 1
        }
        space = self.label_space
        return SizeChoices(space.grouped | grouped, frozenset(space.passed), dict(space.split_axes))

    @functools.cached_property
    def locked_groups(self) -> list[Group]:
        """Groups whose units all stay, one for each layer and reason."""
        roots, locks = self._roots, self._locks
        locked = np.flatnonzero((roots == np.arange(len(roots))) & (locks >= 0))
        opened = self._opened_if_inexact()
        counts: dict[tuple[int, int, bool], int] = {}
        for root, producer in zip(locked.tolist(), self._producer_indices(locked).tolist(), strict=True):
            start, _, name = self.label_space.producers[producer]
            key = producer, int(locks[root]), (name, root - start) in opened
            counts[key] = counts.get(key, 0) + 1
        groups = []
        for (producer, lock, opens), num in sorted(counts.items()):
            start, _, name = self.label_space.producers[producer]
            reason = self.label_space.reasons[lock] + (_INEXACT_HINT if opens else "")
            is_branch = start in self._branch_labels
            groups.append(Group(name, num, (name,), -1, reason, is_branch=is_branch))
        return groups

    def _opened_if_inexact(self) -> set[tuple[str, int]]:
        """Channels that `exact=False` would open: the producer's name, and the position in its output."""
        if not (self.exact and self.label_space.normalized):
            return set()
        other = LabeledModel(self.graph, self._include, self._exclude, False, self._choices)
        return {
            (name, position)
            for start, stop, name in other.label_space.producers
            for position in np.flatnonzero(other.units_of(np.arange(start, stop)) >= 0).tolist()
        }

    def _label_branch(self, number: int) -> int:
        """The label of a residual branch."""
        branch = self.branches.branches[number]
        label = self.label_space.new_branch(branch.name)
        if branch.reason is not None:
            self.label_space.lock(label, branch.reason)
        for call in self.graph.calls:
            if call.site is branch.site:
                index = branch.added(call)
                if self.batches[index] is None or len(self.graph.shapes[index]) < 2:
                    self.label_space.lock(label, "a gate cannot follow its example")
        return int(label[0])

    def _producer_indices(self, labels: IntArray) -> IntArray:
        """The index of the producer of each label."""
        starts = np.array([start for start, _, _ in self.label_space.producers], np.int64)
        return np.searchsorted(starts, labels, "right") - 1

    def _lock_unselected(self) -> None:
        names = [name for _, _, name in self.label_space.producers]
        is_smaller = self._choices is not None and bool(self._choices.units)
        for index in find_producers(self._exclude, self.graph, names, "exclude", is_smaller):
            self._lock_producer(index, "excluded by the caller")
        if self._include is not None:
            wanted = find_producers(self._include, self.graph, names, "include", is_smaller)
            for index in set(range(len(names))) - set(wanted):
                self._lock_producer(index, "not included by the caller")

    def _unite_as_in_original(self) -> None:
        """Keeps channels together, or locked, that were so in the original, although a branch is gone."""
        units_before = {} if self._choices is None else self._choices.units
        labels, units = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, stop, name in self.label_space.producers:
            if len(units_before.get(name, ())) == stop - start:
                labels.append(np.arange(start, stop))
                units.append(np.array(units_before[name]))
        channels, before = np.concatenate(labels), np.concatenate(units)
        self.label_space.lock(channels[before < 0], "stays in the original")
        channels, before = channels[before >= 0], before[before >= 0]
        _, first, inverse = np.unique(before, return_index=True, return_inverse=True)
        self.label_space.union(channels[first][inverse], channels, "leave together in the original")

    def _lock_producer(self, index: int, reason: str) -> None:
        start, stop, _ = self.label_space.producers[index]
        self.label_space.lock(np.arange(start, stop), reason)

    def _signatures(self) -> IntArray:
        """A hash of all places in which each class of labels occurs: a uint64 array, one for each label."""
        random = np.random.default_rng(0)
        signatures = np.zeros(len(self._roots), np.uint64)
        places = [labels.reshape(-1) for labels in self.labels if labels.size > 1]
        places += [np.array([label]) for label in self._branch_labels]
        places += [v for e in self.effects for axes in e.weights.values() for v in axes if v is not None]
        for vector in places:
            weight = random.integers(1, 2**63, dtype=np.uint64)
            np.add.at(signatures, self._roots[vector], weight)
        return signatures

    def _with_normalizations(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with the names of what normalizes their units together."""
        starts = [group.start for group in groups]
        names: list[dict[str, None]] = [{} for _ in groups]
        for labels, normalization in self.label_space.normalized:
            units = np.unique(self.units_of(labels))
            for number in np.unique(np.searchsorted(starts, units[units >= 0], "right") - 1).tolist():
                names[number][normalization] = None
        return [
            dataclasses.replace(group, normalized_by=tuple(by))
            for group, by in zip(groups, names, strict=True)
        ]


class _Labeling:
    """Labels the tensors and weights of a graph, call by call.

    Attributes:
        labels, batches, effects, unknown, probed: As in `LabeledModel`.
    """

    def __init__(self, graph: Graph, label_space: LabelSpace) -> None:
        self._graph, self._label_space = graph, label_space
        self._first_effects: dict[keras.Operation | Site, Effect] = {}
        self.labels: list[IntArray] = [np.full((1,) * len(shape), FIXED) for shape in graph.shapes]
        self.batches: list[BatchAxis | None] = [FIRST_AXIS] * len(graph.shapes)
        self._lost: dict[int, str] = {}  # where gates cannot follow the examples, and the name of why
        self.effects: list[Effect] = []
        probed = {call.name for call in graph.calls if self._label_call(call)}
        for tensors in graph.bindings.values():
            for index in tensors[1:]:
                self._unite(self.labels[tensors[0]], self.labels[index], "an input of a sub-model")
        for submodel in dict.fromkeys(graph.submodels.values()):
            if is_attention(submodel.model):
                self._unite_widths(submodel.model)
        self._lock_outputs()
        self.probed = sorted(probed)
        self.unknown = self._find_unknown()

    def _find_unknown(self) -> list[str]:
        """Names of operations without a rule; not of those between the inputs and the first channels."""
        found: set[str] = set()
        behind_channels: set[int] = set()  # tensors
        for call, effect in zip(self._graph.calls, self.effects, strict=True):
            is_behind = not behind_channels.isdisjoint(call.inputs)
            has_weights = isinstance(call.operation, keras.Layer) and bool(call.operation.weights)
            if not effect.has_rule and (is_behind or has_weights):
                found.add(call.name)
            if is_behind or any((labels != FIXED).any() for labels in effect.outputs):
                behind_channels.update(call.outputs)
        return sorted(found)

    def _lock_outputs(self) -> None:
        """Locks what the model puts out, also where a softmax or the like is all that follows."""
        makers = {index: number for number, call in enumerate(self._graph.calls) for index in call.outputs}
        shapes = self._graph.shapes
        for index in self._graph.outputs:
            self._label_space.lock_output(self.labels[index])
            while index in makers:
                call, effect = self._graph.calls[makers[index]], self.effects[makers[index]]
                is_last = (
                    len(call.inputs) == 1 and not effect.weights and shapes[call.inputs[0]] == shapes[index]
                )
                if not is_last:
                    break
                index = call.inputs[0]
                self._label_space.lock_output(self.labels[index])

    def _label_call(self, call: Call) -> bool:
        """Applies the rule of a call; returns whether the rule was found by probing."""
        shapes = self._graph.shapes
        check_registered_rule(call, self.labels, shapes, self.batches, self._label_space.exact)
        inside = find_structure(call, shapes, LabeledModel)
        probed = None if inside else find_rule_by_probing(call, self.labels, shapes, self.batches)
        rule = inside.make_effect if inside else probed
        effect = apply_rule(self._label_space, call, self.labels, shapes, self.batches, rule)
        is_followed = bool(probed) or (inside is not None and inside.keeps_examples)
        self._follow_examples(call, effect, is_followed)
        for index, labels in zip(call.outputs, effect.outputs, strict=True):
            self.labels[index] = labels
        self.effects.append(effect)
        self._unite_with_first(call, effect)
        return bool(probed) or (call.closed_reason is None and is_probed_activation(call.operation))

    def _follow_examples(self, call: Call, effect: Effect, is_followed: bool) -> None:
        """Notes where the examples are in the outputs of a call, and locks what gates in it cannot reach.

        Args:
            call: The call.
            effect: What its rule says.
            is_followed: Whether it is known that they are where the effect says.
        """
        batches = [self.batches[index] for index in call.inputs]
        lost = next((self._lost[index] for index in call.inputs if index in self._lost), call.name)
        unreached = [self.labels[call.inputs[k]] for k in effect.reads if batches[k] is None]
        if batches[0] is None or batches[0].axis:
            unreached += [read.labels for read in effect.internal_reads]
        if batches[0] is None and effect.call_with_gate is not None:
            unreached.append(self.labels[call.inputs[0]])
        for labels in unreached:
            self._label_space.lock(labels, f"behind '{lost}', where a gate cannot follow its example")
        found: Sequence[BatchAxis | None] = effect.batches or ()
        if not is_followed:
            found = find_batches_by_running(call, self._graph.shapes, self.batches, found)
        for index, batch in zip(call.outputs, found, strict=True):
            self.batches[index] = batch
            if batch is None:
                self._lost[index] = lost

    def _unite_with_first(self, call: Call, effect: Effect) -> None:
        """Unites labels with those of an earlier call of the same operation: they have the same weights."""
        first = self._first_effects.setdefault(call.operation, effect)
        if first is not effect:
            for before, now in _shared_labels(first, effect):
                self._unite(before, now, call.name)
        first = self._first_effects.setdefault(call.site, effect)
        if first is not effect:
            for before, now in zip(first.outputs, effect.outputs, strict=True):
                self._unite(before, now, call.name)

    def _unite_widths(self, layer: keras.Layer) -> None:
        """Unites the channels of tensors that an attention layer wants to be equally wide."""
        readers, makers = equally_wide_parts(layer)
        first: IntArray | None = None
        for call in self._graph.calls:
            for index in call.inputs * (call.operation in readers) + call.outputs * (
                call.operation in makers
            ):
                channels = LabeledTensor(self.labels[index], self._graph.shapes[index]).labels_along(-1)
                first = channels if first is None else first
                name = call.name.rpartition("/")[0]
                self._label_space.union(first, channels, f"has to be as wide as the query of '{name}'")

    def _unite(self, before: IntArray | None, now: IntArray | None, name: str) -> None:
        if before is None or now is None:
            for labels in (before, now):
                if labels is not None:
                    self._label_space.lock(labels, f"stays at another call of a shared layer ('{name}')")
            return
        fits = all(a == b or 1 in (a, b) for a, b in zip(before.shape, now.shape, strict=False))
        if before.ndim == now.ndim and fits:
            self._label_space.union(before, now, f"shared at several places ('{name}')")
        else:
            self._label_space.lock(before, f"shared at several places of different size ('{name}')")
            self._label_space.lock(now, f"shared at several places of different size ('{name}')")


def _shared_labels(first: Effect, second: Effect) -> Iterator[tuple[IntArray | None, IntArray | None]]:
    """Pairs of label arrays that must agree in two effects of the same operation; `None`: all of it stays."""
    for before, now in zip(_dependent_labels(first), _dependent_labels(second), strict=True):
        for key in {**before, **now}:
            yield from itertools.zip_longest(before.get(key, ()), now.get(key, ()))


def _dependent_labels(effect: Effect) -> list[Mapping[Any, Sequence[IntArray | None]]]:
    """The labels on which weights, configuration values and arguments depend, by their keys."""
    edits = effect.config, effect.arguments
    return [effect.weights, *({key: edit.labels for key, edit in each.items()} for each in edits)]


class _Grouping(NamedTuple):
    """Groups in the order of their units, and the unit of each label (-1 for what stays)."""

    groups: list[Group]
    unit_of_label: IntArray


def _group_units(
    label_space: LabelSpace, roots: IntArray, locks: IntArray, signatures: IntArray
) -> _Grouping:
    """Makes a unit of each class of labels that is not locked, and groups units with equal signatures.

    Args:
        label_space: The labels.
        roots, locks: As `LabelSpace.resolve` returns them.
        signatures: A hash of the places of each class.
    """
    classes = np.flatnonzero(roots == np.arange(len(roots)))[1:]  # without FIXED
    free = classes[locks[classes] < 0]
    _, first, family = np.unique(signatures[free], return_index=True, return_inverse=True)
    order = np.lexsort((free, first[family])) if free.size else np.zeros(0, np.int64)
    unit_of_class = np.full(len(roots), -1)
    unit_of_class[free[order]] = np.arange(free.size)
    producers_of_class = _producers_by_class(label_space, roots)
    starts = np.flatnonzero(np.diff(first[family][order], prepend=-1))
    stops = np.append(starts[1:], free.size)[: starts.size]
    groups: list[Group] = []
    counts: dict[str, int] = {}
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        producers = producers_of_class(free[order[start]])
        name = producers[0]
        counts[name] = counts.get(name, 0) + 1
        suffix = f"#{counts[name]}" if counts[name] > 1 else ""
        groups.append(Group(name + suffix, stop - start, producers, start))
    return _Grouping(groups, unit_of_class[roots])


def _producers_by_class(label_space: LabelSpace, roots: IntArray) -> Callable[[int], tuple[str, ...]]:
    """A function from the root of a class to the names of all producers of its labels, in order."""
    producer_of_label = np.zeros(len(label_space), np.int64)
    for index, (start, stop, _) in enumerate(label_space.producers):
        producer_of_label[start:stop] = index
    order = np.argsort(roots, kind="stable")
    sorted_roots = roots[order]

    def producers_of_class(root: int) -> tuple[str, ...]:
        start, stop = np.searchsorted(sorted_roots, [root, root + 1])
        indices = np.unique(producer_of_label[order[start:stop]])
        return tuple(dict.fromkeys(label_space.producers[index][2] for index in indices))

    return producers_of_class


def find_producers(
    patterns: LayerPatterns, graph: Graph, names: Sequence[str], argument: str, may_miss: bool = False
) -> list[int]:
    """The producers that are meant by layer names, regular expressions or layers.

    Args:
        patterns: Layer names, regular expressions that match whole names, or layers of the model.
        graph: The model.
        names: Names of all producers.
        argument: Name of the public argument that holds the patterns, for messages.
        may_miss: Whether a pattern may match nothing, as one for a layer that left with a branch.

    Returns:
        Indices into `names`, for one pattern after the other.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    layers = {layer: name for name, layer in graph.layers()}
    known = list(layers.values()) + [n for n in names if n not in layers.values()]
    found: list[int] = []
    for pattern in _listed(patterns):
        if isinstance(pattern, str):
            hits = _matching_names(pattern, known, argument)
        else:
            hits = {layers[pattern]} if pattern in layers else set()
        if not hits and not may_miss:
            raise ValueError(
                f"`{argument}` names a layer that the model does not have. Expected layer names, "
                f"regular expressions that match whole names, or layers of the model; it has "
                f"{', '.join(known[:8])}{', ...' if len(known) > 8 else ''}. "
                f"Received: {argument}={pattern!r}"
            )
        found += [i for i, name in enumerate(names) if name in hits]
    return found


def _listed(patterns: LayerPatterns) -> list[str | keras.Layer]:
    is_one = isinstance(patterns, (str, keras.Layer)) or not isinstance(patterns, Iterable)
    return [patterns] if is_one else list(patterns)  # anything else is refused


def _matching_names(pattern: str, names: Sequence[str], argument: str) -> set[str]:
    """The names that a regular expression matches, else the name that it is."""
    same = {name for name in names if name == pattern}
    try:
        return {name for name in names if re.fullmatch(pattern, name)} or same
    except re.error as error:
        if same:
            return same
        raise ValueError(
            f"`{argument}` has a text that is neither the name of a layer nor a regular expression "
            f"({error}). Received: {argument}={pattern!r}"
        ) from error


@overload
def as_name_patterns(model: keras.Model, patterns: LayerPatterns) -> list[str | keras.Layer]: ...
@overload
def as_name_patterns(model: keras.Model, patterns: None) -> None: ...
def as_name_patterns(model: keras.Model, patterns: LayerPatterns | None) -> list[str | keras.Layer] | None:
    """Patterns with layers of the model replaced by their names, which the layers of pruned models keep."""
    if patterns is None:
        return None
    names = {layer: name for name, layer in read_model(model).layers()}
    return [re.escape(names[p]) if p in names else p for p in _listed(patterns)]


def label_model(
    model: keras.Model,
    include: LayerPatterns | None = None,
    exclude: LayerPatterns = (),
    exact: bool = True,
    choices: SizeChoices | None = None,
    with_branches: bool = False,
) -> LabeledModel:
    """Reads a model and finds its groups.

    Args:
        model: A built Keras model.
        include: Prune only these: layer names, regular expressions that match whole
            names, or layers. `None`: all. A unit that several layers make is pruned
            only if all of them are included.
        exclude: Never prune the channels that these layers make.
        exact: `False`: channels that are normalized together may leave, although the others change then.
        choices: If this is a smaller version of another model: the `LabeledModel.size_choices` of that one.
        with_branches: Whether residual branches are units, too.
    """
    return LabeledModel(read_model(model), include, exclude, exact, choices, with_branches)
