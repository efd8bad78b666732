"""Refits the layers of a smaller model that lost inputs to the outputs of the original model."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import keras
import numpy as np
from keras import ops

from keras_taylor.cutting.batch_statistics import NormalizationInputs, gather_inputs, renew_statistics
from keras_taylor.cutting.counterparts import find_counterparts
from keras_taylor.cutting.last_terms import find_last_term
from keras_taylor.cutting.layer_fits import FitOptions, LayerFit, LayerRepair
from keras_taylor.reading import graph as graphs
from keras_taylor.reading.closed_layers import record_inside
from keras_taylor.reading.graph import Call, Graph, single_layer_graph
from keras_taylor.reading.groups import LabeledModel
from keras_taylor.reading.matmul_views import MatrixMasks, matmul_view
from keras_taylor.reading.walk import InputBatch, Walk, fixed_batch_size, run_batches, split_into_batches
from keras_taylor.support.arrays import to_float32
from keras_taylor.support.keras_internals import layers_inside
from keras_taylor.support.types import Array, BoolArray, IntArray, Tensor

# Yields numbered calls as they are, and notes how many are done.
Track: TypeAlias = Callable[[Sequence[tuple[int, Call]]], Iterable[tuple[int, Call]]]

_HELD_OUT_SHARE = 1 / 4  # of the batches


def refit(
    labeled: LabeledModel,
    kept: BoolArray,
    small: keras.Model,
    inputs: Sequence[Array],
    thorough: bool = True,
    training: bool = False,
    track: Track = iter,
) -> list[LayerRepair]:
    """Refits, in place, the layers of a smaller model that lost inputs, from the input to the output.

    At the end it renews the moving statistics of BatchNormalizations (`renew_statistics`).

    Each kernel is fitted by ridge regression. The rows are what the layer reads in the smaller model, as it
    has been repaired so far. The targets are the outputs of the original layer. Before a residual sum, they
    also make up for what the other terms of the sum have lost.

    Args:
        labeled: The original model.
        kept: Bool array `(num_units,)`: the units of the smaller model.
        small: The smaller model, changed in place.
        inputs: Flattened inputs as arrays, batch axis first, in random order.
        thorough: `False` for a model that is trained afterwards. It leaves out what training does as well:
            refitting layers that lost no inputs, the slack of rectifiers, and most of the rows.
        training: Whether moving statistics are those of what layers read with augmentation and dropout as in
            training.
        track: What the numbered calls of the model go through, to show progress.

    Returns:
        The result for each layer that lost inputs, and with `thorough` also for later layers; then the
        normalizations whose statistics could not be renewed.
    """
    read = NormalizationInputs(graphs.read_model(small))
    batches = split_into_batches(inputs, fixed_batch_size(labeled.graph))
    if len(batches) == 1:
        batches *= 2  # a single example is used both to fit and to judge
    num_held_out = max(round(_HELD_OUT_SHARE * len(batches)), 1)
    unread = dict.fromkeys(read.observers, _ignore)  # so that the compiled functions are those of the walk
    outputs_before = list(zip(*run_batches(read.graph, batches[-num_held_out:], unread), strict=True))
    weights = [np.array(ops.convert_to_numpy(w)) for w in small.weights]
    options = FitOptions(
        num_fit_batches=len(batches) - num_held_out,
        random=np.random.default_rng(0),
        thorough=thorough,
    )
    walks = _PairedWalks(labeled, kept, read, batches, options)
    repairs = walks.refit_layers(track)
    wanted, outputs_after = walks.held_out_outputs()
    is_fitted = any(repair.ridge is not None for repair in repairs)
    is_undone = is_fitted and not (
        _relative_error(outputs_after, wanted) < _relative_error(outputs_before, wanted)
    )
    if is_undone:
        for weight, value in zip(small.weights, weights, strict=True):
            weight.assign(value)
        reason = "the model's held-out outputs were closer to the original's without the repair"
        repairs = [LayerRepair(repair.name, reason=repair.reason or reason) for repair in repairs]
    if is_undone or training:
        read = gather_inputs(read.graph, batches, training)
    return repairs + renew_statistics(read)


def _ignore(column: list[Tensor]) -> None:
    """Does nothing with a tensor's values."""


class _PairedWalks:
    """Walks the original and the smaller model together, the original one call ahead.

    Args:
        labeled: The original model.
        kept: Bool array `(num_units,)`: the units of the smaller model.
        read: Takes note of what the normalizations of the smaller model read. The layers of its graph are
            refitted in place.
        batches: The inputs.
        options: How to fit.
    """

    def __init__(
        self,
        labeled: LabeledModel,
        kept: BoolArray,
        read: NormalizationInputs,
        batches: Sequence[InputBatch],
        options: FitOptions,
    ) -> None:
        self._labeled, self._kept, self._read, self._options = labeled, kept, read, options
        self._old = Walk(labeled.graph, batches)
        self._new = Walk(read.graph, batches, observers=read.observers)
        counterparts = find_counterparts(labeled, kept, self._new.graph)
        assert counterparts is not None, "the smaller model was cut from the original"
        self._counterparts = counterparts
        self._before_linear_layers = _tensors_before_linear_layers(self._new.graph)
        self._changed: set[int] = set()  # numbers of tensors whose values differ from the original's
        self._num_run = 0  # calls of the original
        self._last_terms: dict[keras.Operation, int | None] = {}
        self._past_branches: set[int] = set()  # those whose values lack a branch, up to the next linear layer

    def refit_layers(self, track: Track) -> list[LayerRepair]:
        """Runs both models to the end, and refits layers on the way."""
        repairs: dict[str, LayerRepair] = {}
        for number, call in track(list(enumerate(self._new.graph.calls))):
            old_number = self._counterparts.numbers[number]
            self._run_original_to(old_number, self._counterparts.first_needed[number])
            lacks_branch = self._lacks_branch(call)
            masks = self._matrix_masks(old_number)
            if masks is not None and call.name not in repairs and self._is_to_refit(call, masks):
                repairs[call.name] = self._refit_layer(call, masks)
            for layer_number in self._inner_layers_to_refit(call, old_number):
                repair = self._refit_inner_layer(call, layer_number)
                repairs.setdefault(repair.name, repair)
            if self._lost_any_input(old_number) or lacks_branch or self._changed.intersection(call.inputs):
                self._changed.update(call.outputs)
            if lacks_branch and masks is None and len(call.inputs) == 1:
                self._past_branches.update(call.outputs)
            self._read.run(self._new, number)
            self._new.free_after(number)
            self._old.free_after(min(self._num_run, self._counterparts.first_needed[number + 1]) - 1)
        return list(repairs.values())

    def _run_original_to(self, number: int, first_needed: int) -> None:
        """Runs the calls of the original that have not been run, up to one with this number.

        Args:
            number: The number.
            first_needed: The first call whose inputs and outputs are still needed.
        """
        for each in range(self._num_run, number + 1):
            self._old.free_after(min(each, first_needed) - 1)
            self._old.run(each)
        self._num_run = max(self._num_run, number + 1)

    def held_out_outputs(self) -> list[list[list[Tensor]]]:
        """Outputs of the original and of the repaired model for the held-out batches."""
        num_fit = self._options.num_fit_batches
        return [[column[num_fit:] for column in walk.outputs()] for walk in (self._old, self._new)]

    def _is_to_refit(self, call: Call, masks: MatrixMasks) -> bool:
        """Whether a linear layer lost inputs, or reads changed values and is not one of the last layers.

        A layer that reads what lacks a branch has lost inputs. The last layers learn nothing from refitting,
        since they were trained on these examples with labels.
        """
        has_lost = not masks.columns.all() or self._lacks_branch(call)
        if not self._options.thorough or has_lost:
            return has_lost
        reads_changed = bool(self._changed.intersection(call.inputs))
        return reads_changed and call.outputs[0] in self._before_linear_layers

    def _lacks_branch(self, call: Call) -> bool:
        """Whether a call reads what lacks a branch, with no linear layer or sum in between."""
        is_past = not self._past_branches.isdisjoint(call.inputs)
        return is_past or self._counterparts.reads_past_branch(call)

    def _matrix_masks(self, number: int) -> MatrixMasks | None:
        """Which columns and outputs of a linear layer were kept; `None` for other operations."""
        view = matmul_view(self._labeled.graph.calls[number].operation)
        axes = view and self._labeled.effects[number].weights.get(view.kernel_name)
        return view.matrix_masks(self._masks_of(axes)) if view is not None and axes else None

    def _masks_of(self, axes: Sequence[IntArray | None]) -> list[BoolArray | None]:
        """The kept entries along axes that have these labels."""
        return [None if labels is None else self._labeled.kept_mask(labels, self._kept) for labels in axes]

    def _lost_any_input(self, number: int) -> bool:
        """Whether an operation lost something that it read: an input, its past state, or a tensor inside."""
        call, effect = self._labeled.graph.calls[number], self._labeled.effects[number]
        read = [self._labeled.labels[call.inputs[k]] for k in effect.reads]
        read += [internal.labels for internal in effect.internal_reads]
        return not all(self._labeled.kept_mask(labels, self._kept).all() for labels in read)

    def _inner_layers_that_lost_inputs(self, number: int) -> list[int]:
        """Which of the layers inside a closed layer lost a part of their input."""
        return [
            read.layer_number
            for read in self._labeled.effects[number].internal_reads
            if read.layer_number is not None and not self._labeled.kept_mask(read.labels, self._kept).all()
        ]

    def _inner_layers_to_refit(self, call: Call, number: int) -> list[int]:
        """Which layers inside a closed layer are refitted, the one that makes its last term at the end.

        That one also makes up for what the other terms lack. So it is refitted wherever a linear layer in its
        place would be.
        """
        lost = self._inner_layers_that_lost_inputs(number)
        last = self._last_term_of(call)
        if last is None:
            return lost
        reads_changed = bool(self._changed.intersection(call.inputs))
        is_on_the_way = call.outputs[0] in self._before_linear_layers
        if (
            last in lost
            or self._lacks_branch(call)
            or (self._options.thorough and reads_changed and is_on_the_way)
        ):
            return [*(one for one in lost if one != last), last]
        return lost

    def _last_term_of(self, call: Call) -> int | None:
        """The inner layer whose output is the last term of a closed layer's output, `None` without one."""
        if not call.closed_reason or len(call.outputs) != 1:
            return None
        if call.operation not in self._last_terms:
            self._last_terms[call.operation] = find_last_term(call, self._new.graph.shapes)
        return self._last_terms[call.operation]

    def _refit_layer(self, call: Call, masks: MatrixMasks) -> LayerRepair:
        """Refits a linear layer of the smaller model."""
        if not self._new.graph.is_used_once(call.operation):
            return LayerRepair(call.name, reason="it is used in several places")
        old_call = self._counterparts.old_call(call)
        fitted = self._old, self._new, old_call, call, masks.outputs, self._options
        return LayerFit(*fitted, lambda reader: self._counterparts.old_call(reader).inputs).run()

    def _refit_inner_layer(self, call: Call, layer_number: int) -> LayerRepair:
        """Refits a layer inside a closed layer of the smaller model."""
        old_call = self._counterparts.old_call(call)
        inner = layers_inside(old_call.operation)[layer_number]
        name = f"{old_call.name}/{inner.name}"
        if not self._new.graph.is_used_once(call.operation):
            return LayerRepair(name, reason="it is used in several places")
        view = matmul_view(inner)
        if view is None:
            return LayerRepair(name, reason="it is not a known matrix product")
        weights = old_call.operation.weights
        kernel_number = next(k for k, weight in enumerate(weights) if weight is view.kernel)
        effect = self._labeled.effects[old_call.number]
        axes = effect.weights.get(f"weights.{kernel_number}", (None, None))
        outputs = view.matrix_masks(self._masks_of(axes)).outputs
        walks = (self._old, old_call), (self._new, call)
        old, new = (_record(walk, one.number, layer_number, name) for walk, one in walks)
        others = None
        if layer_number == self._last_term_of(call):
            whole = [walk.tensors[one.outputs[0]] for walk, one in walks]
            others = [
                (to_float32(y) - to_float32(term)) - (to_float32(z) - to_float32(own))
                for y, term, z, own in zip(whole[0], old.tensors[1], whole[1], new.tensors[1], strict=True)
            ]
        fitted = old, new, old.graph.calls[0], new.graph.calls[0], outputs, self._options
        return LayerFit(*fitted, lambda reader: reader.inputs, others).run()


@dataclasses.dataclass(frozen=True, eq=False)
class _RecordedTensors:
    """Inputs and outputs of a layer inside a closed one, as the tensors of a model of this one layer."""

    graph: Graph
    tensors: dict[int, list[Tensor]]


def _record(walk: Walk, number: int, layer_number: int, name: str) -> _RecordedTensors:
    """Runs a call of a closed layer, and records one of the layers inside."""
    operation = walk.graph.calls[number].operation
    walk.run_waiting()  # which may have this call among them
    with record_inside(operation, layer_number) as (inputs, outputs):
        walk.run_alone(number)
    layer = layers_inside(operation)[layer_number]
    input_shape, output_shape = ((None, *values[0].shape[1:]) for values in (inputs, outputs))
    graph = single_layer_graph(layer, name, input_shape, output_shape)
    return _RecordedTensors(graph, {0: inputs, 1: outputs})


def _tensors_before_linear_layers(graph: Graph) -> set[int]:
    """Numbers of the tensors that some linear layer depends on."""
    found: set[int] = set()
    for call in reversed(graph.calls):
        if found.intersection(call.outputs) or matmul_view(call.operation) is not None:
            found.update(call.inputs)
    return found


def _relative_error(outputs: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> float:
    """The mean squared difference divided by the mean square of `wanted`, averaged over the outputs.

    Args:
        outputs: For each output of a model its value for each batch.
        wanted: The same for the original model.
    """
    errors = []
    for column, wanted_column in zip(outputs, wanted, strict=True):
        ours, theirs = (np.concatenate([to_float32(y) for y in ys]) for ys in (column, wanted_column))
        power = np.square(theirs, dtype=np.float64).mean()
        errors.append(np.square(ours - theirs, dtype=np.float64).mean() / max(power, 1e-30))
    return float(np.mean(errors))
