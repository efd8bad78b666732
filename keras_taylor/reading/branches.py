"""Residual branches: what lies between the two sides of a sum, and can leave as a whole."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import keras
from keras import ops

from keras_taylor.reading.graph import Call, Graph, Site
from keras_taylor.reading.rule_checks import (
    equivalence_tolerance,
    inputs_with_masks,
    largest_difference,
    run_like_call,
)
from keras_taylor.rules.attention import is_attention
from keras_taylor.rules.base import is_from_keras
from keras_taylor.support.keras_internals import mask_of_tensor

# Numbers of branches; what bears them is there as long as all of these branches are.
BranchSet = frozenset[int]

_CHANGES_SHAPE = "neither side of the sum is made from the other one, as where a block changes the shape"
_SHARED_SUM = "its sum is a layer that is used at several places"
_IS_OUTPUT = "it is an output of the model, which bears its name"
_OTHER_MASK = "what follows its sum gets another mask from the trunk"
_OTHER_PRECISION = "its sum has another precision than the trunk"
_READ_ELSEWHERE = "what it adds is read elsewhere, too"


@dataclasses.dataclass(frozen=True, eq=False)
class Branch:
    """What makes one side of a sum from the other side, the trunk.

    Without the branch the sum is gone as well, and what read the sum reads the trunk. The sum may be inside
    of a layer that stays closed, such as a decoder. Then that layer is the branch, and stands for its sum.

    Attributes:
        name: Name of the sum.
        site: The place of the sum.
        trunk: Which of the tensors that the sum reads is the trunk: 0 or 1, or 0 for a closed layer.
        reason: Why the branch stays; `None` if it can leave.
        is_layer: Whether it is a closed layer.
    """

    name: str
    site: Site
    trunk: int = 0
    reason: str | None = None
    is_layer: bool = False

    def added(self, call: Call) -> int:
        """The tensor that holds what the branch adds, given the call of its sum.

        A closed layer's holds the sum.
        """
        return call.outputs[0] if self.is_layer else call.inputs[1 - self.trunk]


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """The residual branches of a graph, and what leaves with them.

    Attributes:
        branches: All branches, in the order of the network.
        of_calls: Number of a call -> the branches that it belongs to.
        of_operations: Layer or operation -> the branches to which all of its calls belong.
    """

    branches: tuple[Branch, ...] = ()
    of_calls: Mapping[int, BranchSet] = dataclasses.field(default_factory=dict)
    of_operations: Mapping[keras.Operation, BranchSet] = dataclasses.field(default_factory=dict)


def find_branches(graph: Graph) -> Branches:
    """Finds the residual branches of a graph.

    A sum of two tensors of equal shape has a branch if one of them, the trunk, is an ancestor of the other.
    All that only the other side needs is the branch. A closed layer that adds to its input is one, too. Each
    call and each layer with weights must be there exactly as long as certain branches are, so that costs are
    products. Where a call serves two branches, one of these has to stay.
    """
    branches = _find_sums(graph)
    while True:
        members = _find_members(graph, branches)
        obstacle = members.conflict or _find_misplaced(graph, branches, members.of_calls)
        if obstacle is None:
            return Branches(tuple(branches), members.of_calls, members.of_operations)
        number, reason = obstacle
        branches[number] = dataclasses.replace(branches[number], reason=reason)


def _find_sums(graph: Graph) -> list[Branch]:
    """The branch of each sum of two tensors of equal shape, each sum once."""
    open_sites = {
        site
        for submodel in (graph.root, *graph.submodels.values())
        if not is_attention(submodel.model)
        for site in submodel.sites
    }
    sites = collections.Counter(
        site.operation for submodel in {graph.root, *graph.submodels.values()} for site in submodel.sites
    )
    ancestors = {index: 1 << index for index in graph.inputs}  # of each tensor, as bits
    trunks: dict[int, int] = {}  # a sum -> its trunk
    found: dict[str, Branch] = {}
    for call in graph.calls:
        bits = 0
        for index in call.inputs:
            bits |= ancestors[index]
        ancestors.update((index, bits | 1 << index) for index in call.outputs)
        is_layer = _may_be_residual(graph, call)
        if call.site not in open_sites or not (is_layer or _is_plain_sum(graph, call)):
            continue
        if is_layer and call.name not in found and not _passes_input_on(call, graph):
            continue
        trunk = 0 if is_layer else _find_trunk(call, ancestors, trunks)
        if trunk is not None:
            trunks[call.outputs[0]] = call.inputs[trunk]
        reason = _CHANGES_SHAPE if trunk is None else _find_bond(graph, call, trunk)
        if sites[call.operation] > 1:
            reason = _SHARED_SUM
        known = found.get(call.name)
        if known is not None and known.trunk != (trunk or 0):
            reason = _SHARED_SUM
        if known is None or reason is not None:
            found[call.name] = Branch(call.name, call.site, trunk or 0, reason, is_layer)
    return list(found.values())


def _find_bond(graph: Graph, call: Call, trunk: int) -> str | None:
    """Why the trunk cannot take the place of a sum although the shapes are equal; `None` if it can."""
    if call.outputs[0] in graph.outputs and not isinstance(graph.root.outputs, dict):
        return _IS_OUTPUT
    (output,) = call.site.outputs
    inputs = [x for x in call.site.flat if isinstance(x, keras.KerasTensor)]
    if (mask_of_tensor(inputs[trunk]) is None) != (mask_of_tensor(output) is None):
        return _OTHER_MASK
    return None if inputs[trunk].dtype == output.dtype else _OTHER_PRECISION


def _may_be_residual(graph: Graph, call: Call) -> bool:
    """Whether a call is one of a closed layer with weights whose output has the shape of its first tensor."""
    if not (call.closed_reason and call.inputs and len(call.outputs) == 1 and _has_weights(call.operation)):
        return False
    return graph.shapes[call.inputs[0]] == graph.shapes[call.outputs[0]]


def _passes_input_on(call: Call, graph: Graph) -> bool:
    """Whether a layer whose weights are all zero returns its first tensor, as one that adds to it does."""
    layer, first, inputs = call.operation, call.inputs[0], inputs_with_masks(call, graph.shapes)
    zeros = [(weight, ops.zeros(weight.shape, weight.dtype)) for weight in layer.weights]
    try:
        with keras.StatelessScope(state_mapping=zeros):
            (output,) = run_like_call(call, layer, inputs)
        difference = largest_difference([output], [inputs[first]])
    except Exception:  # a layer may raise anything
        return False
    return output.shape == inputs[first].shape and difference <= equivalence_tolerance(layer.compute_dtype)


def _is_plain_sum(graph: Graph, call: Call) -> bool:
    """Whether a call adds two tensors of equal shape."""
    if type(call.operation).__name__ != "Add" or not is_from_keras(type(call.operation)):
        return False
    shapes = {graph.shapes[index] for index in (*call.inputs, *call.outputs)}
    return len(call.inputs) == 2 and len(set(call.inputs)) == 2 and len(shapes) == 1


def _find_trunk(call: Call, ancestors: Mapping[int, int], trunks: Mapping[int, int]) -> int | None:
    """Which input of a sum the other one is made from, directly or from a trunk further up."""
    for position, index in enumerate(call.inputs):
        other = ancestors[call.inputs[1 - position]]
        trunk: int | None = index
        while trunk is not None:
            if other >> trunk & 1:
                return position
            trunk = trunks.get(trunk)
    return None


class _Members(NamedTuple):
    """What belongs to which branches, and the first branch that has to stay with the reason, if one has."""

    of_calls: dict[int, BranchSet]
    of_operations: dict[keras.Operation, BranchSet]
    conflict: tuple[int, str] | None


def _find_members(graph: Graph, branches: Sequence[Branch]) -> _Members:
    """Which branches every call and operation belongs to: found from the outputs to the inputs."""
    numbers = {branch.site: number for number, branch in enumerate(branches) if branch.reason is None}
    readers: dict[int, list[BranchSet]] = {index: [frozenset()] for index in graph.outputs}
    of_calls: dict[int, BranchSet] = {}
    of_operations: dict[keras.Operation, list[BranchSet]] = {}
    conflicts: list[tuple[int, str]] = []
    for call in reversed(graph.calls):
        read = [members for index in call.outputs for members in readers.get(index, ())]
        if not read:
            continue  # no output depends on it
        members = _common_members(read, call.name, conflicts)
        number = numbers.get(call.site)
        own = members if number is None else members | {number}
        for position, index in enumerate(call.inputs):
            is_trunk = number is not None and position == branches[number].trunk
            readers.setdefault(index, []).append(members if is_trunk else own)
        of_calls[call.number] = own
        of_operations.setdefault(call.operation, []).append(own)
    common = {
        operation: _common_members(read, operation.name, conflicts if _has_weights(operation) else [])
        for operation, read in of_operations.items()
    }
    return _Members(of_calls, common, min(conflicts, default=None))


def _common_members(read: Sequence[BranchSet], name: str, conflicts: list[tuple[int, str]]) -> BranchSet:
    """The branches that something belongs to which is there as long as any of its readers is.

    Notes a conflict if that is not the same as being there as long as certain branches all are.
    """
    common = frozenset.intersection(*read)
    if common not in read:
        number = min(frozenset.union(*read) - common)
        conflicts.append((number, f"'{name}' serves other branches, too, so one of them has to stay"))
    return common


def _find_misplaced(
    graph: Graph, branches: Sequence[Branch], of_calls: Mapping[int, BranchSet]
) -> tuple[int, str] | None:
    """The first branch that is nothing but its sum, or that does not consist of whole layers, and the reason.

    A sub-model or opened layer inside a branch leaves as a whole. One that holds the sum keeps its inputs.
    """
    inside: dict[int, list[str]] = {}  # branch -> names of its calls
    for number in sorted(of_calls):
        for each in of_calls[number]:
            inside.setdefault(each, []).append(graph.calls[number].name)
    for number, branch in enumerate(branches):
        if branch.reason is None:
            place = branch.name[: branch.name.rfind("/") + 1]  # the sub-model that holds the sum
            names = [name for name in inside.get(number, ()) if branch.is_layer or name != branch.name]
            reason = _find_obstacle(graph, place, names, of_calls) if names else _READ_ELSEWHERE
            if reason is not None:
                return number, reason
    return None


def _find_obstacle(
    graph: Graph, place: str, names: Sequence[str], of_calls: Mapping[int, BranchSet]
) -> str | None:
    """Why calls of these names are not all of some layers of the sub-model at `place`; `None` if they are."""
    outside = next((name for name in names if not name.startswith(place)), None)
    if outside is not None:
        return f"'{outside}' is a part of it, and outside of '{place.rstrip('/')}', where the sum is"
    layers = (place + name[len(place) :].partition("/")[0] for name in names)
    num_gone = collections.Counter(layers)
    num_all = collections.Counter(
        place + call.name[len(place) :].partition("/")[0]
        for call in graph.calls
        if call.number in of_calls and call.name.startswith(place)
    )
    divided = next((layer for layer, num in num_gone.items() if num != num_all[layer]), None)
    return None if divided is None else f"only a part of '{divided}' is a part of it"


def _has_weights(operation: keras.Operation) -> bool:
    return bool(getattr(operation, "weights", None))
