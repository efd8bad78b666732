"""Layers that lost inputs, fitted anew to what the original put out."""

import dataclasses

import numpy as np
from keras import ops

from keras_taylor.cutting.layer_fits import LayerFit, LayerRepair
from keras_taylor.reading import graph as graphs
from keras_taylor.reading.closed_layers import recorded_inside
from keras_taylor.reading.graph import Graph, single_layer_graph
from keras_taylor.reading.linear_views import linear_view
from keras_taylor.reading.walk import Walk, in_batches, outputs_of
from keras_taylor.rules.attention import inner_layers

_HELD_OUT = 1 / 4  # of the batches


def refit(labeled, kept, small, inputs, thorough=True):
    """Refits, in place, the layers of a cut model that lost inputs, from the input to the output.

    Each kernel is fitted by least squares: from what the layer reads in the model as it is repaired so
    far, to what it put out in the original; before a residual sum also to what the other terms lack.

    Args:
        channels: `groups.LabeledModel` of the original model.
        kept: Bool array `(num_units,)`, what was kept.
        small: The model that was cut by it.
        inputs: Flattened inputs as arrays, batch first, in random order.
        thorough: `False` where training follows, which does as well what is then left out: layers that
            read changed values only, targets that a rectifier hides, and most of the rows.

    Returns:
        A list of `LayerRepair`.
    """
    batches = in_batches(inputs)
    if len(batches) == 1:
        batches *= 2  # of one example, which can only judge itself
    num_held_out = max(round(_HELD_OUT * len(batches)), 1)
    before = list(zip(*outputs_of(graphs.read_model(small), batches[-num_held_out:]), strict=True))
    weights = [np.array(ops.convert_to_numpy(w)) for w in small.weights]
    side_by_side = _SideBySide(labeled, kept, small, batches, num_held_out, thorough)
    repairs = side_by_side.run()
    wanted, after = side_by_side.held_out_outputs()
    fitted = any(one.ridge is not None for one in repairs)
    if fitted and not _distance(after, wanted) < _distance(before, wanted):
        for weight, value in zip(small.weights, weights, strict=True):
            weight.assign(value)
        reason = "the model's held-out outputs were nearer to the original's without"
        return [LayerRepair(one.name, reason=one.reason or reason) for one in repairs]
    return repairs


class _SideBySide:
    """Both models, call by call, the original one step ahead."""

    def __init__(self, labeled, kept, small, batches, num_held_out, thorough):
        self._labeled, self._kept, self._thorough = labeled, kept, thorough
        self._num_examples = sum(len(batch[0]) for batch in batches)
        self._num_fit = len(batches) - num_held_out
        self._old, self._new = Walk(labeled.graph, batches), Walk(graphs.read_model(small), batches)
        self._before_a_mixing_layer = _before_a_mixing_layer(self._new.graph)
        self._changed = set()  # tensors whose values are no longer the original's
        self._random = np.random.default_rng(0)

    def run(self):
        repairs = {}
        for number, call in enumerate(self._new.graph.calls):
            self._old.run(number)
            lost = self._lost_inputs(number)
            if self._to_refit(number, call, lost) and call.name not in repairs:
                repairs[call.name] = self._refit(number, call)
            lost_inside = self._lost_inside(number)
            for read in lost_inside:
                one = self._refit_inside(number, read)
                repairs.setdefault(one.name, one)
            if self._puts_out_other_values(number) or self._changed.intersection(call.inputs):
                self._changed.update(call.outputs)
            self._new.run(number)
            for walk in (self._old, self._new):
                walk.forget(number)
        return list(repairs.values())

    def held_out_outputs(self):
        """Outputs of the original and of the repaired model on the held-out batches."""
        return [[column[self._num_fit :] for column in walk.outputs()] for walk in (self._old, self._new)]

    def _to_refit(self, number, call, lost):
        """Layers that lost inputs, and later ones that do not make the outputs: those have been
        fitted to the examples once, with labels, and learn nothing from them again."""
        if lost or not self._thorough:
            return lost
        changed = self._changed.intersection(call.inputs) and call.outputs[0] in self._before_a_mixing_layer
        return bool(changed) and self._masks(number) is not None

    def _masks(self, number):
        """Which columns and which outputs of a mixing layer stay; `None` if it is no such layer."""
        view = linear_view(self._old.graph.calls[number].operation)
        axes = view and self._labeled.effects[number].weights.get(view.weight)
        if not axes:
            return None
        return view.kept([None if a is None else self._labeled.kept_mask(a, self._kept) for a in axes])

    def _lost_inputs(self, number):
        masks = self._masks(number)
        return masks is not None and not masks[0].all()

    def _puts_out_other_values(self, number):
        """Whether what is left of a layer read what is gone: from before, of its own past, or inside."""
        call, effect = self._labeled.graph.calls[number], self._labeled.effects[number]
        read = [self._labeled.labels[call.inputs[k]] for k in effect.reads]
        read += [gate.labels for gate in effect.internal_reads]
        return not all(self._labeled.kept_mask(labels, self._kept).all() for labels in read)

    def _lost_inside(self, number):
        """What layers inside a closed one read, and lost a part of."""
        reads = self._labeled.effects[number].internal_reads
        reads = [read for read in reads if read.layer_number is not None]
        return [read for read in reads if not self._labeled.kept_mask(read.labels, self._kept).all()]

    def _refit_inside(self, number, read):
        weights = self._labeled.effects[number].weights

        def masks(of_weight):
            axes = weights.get(f"weights.{of_weight}", (None, None))
            return [None if a is None else self._labeled.kept_mask(a, self._kept) for a in axes]

        walks = (self._old, self._new)
        return refit_inside(
            *(walks, number, read, masks, self._num_fit, self._num_examples, self._random, self._thorough)
        )

    def _refit(self, number, call):
        if not self._new.graph.is_used_once(call.operation):
            return LayerRepair(call.name, reason="it is used at several places")
        _, outputs = self._masks(number)
        old_call = self._old.graph.calls[number]
        fit = LayerFit(self._old, self._new, old_call, call, outputs, self._num_fit)
        return fit.run(self._num_examples, self._random, self._thorough)


def _before_a_mixing_layer(graph):
    """Tensors from which some mixing layer follows."""
    found = set()
    for call in reversed(graph.calls):
        if found.intersection(call.outputs) or linear_view(call.operation) is not None:
            found.update(call.inputs)
    return found


def _distance(outputs, wanted):
    """Mean over outputs of the mean squared difference, divided by the mean square of what is wanted."""
    distances = []
    for ours, theirs in zip(outputs, wanted, strict=True):
        ours, theirs = (
            np.concatenate([ops.convert_to_numpy(ops.cast(y, "float32")) for y in column])
            for column in (ours, theirs)
        )
        power = np.square(theirs, dtype=np.float64).mean()
        distances.append(np.square(ours - theirs, dtype=np.float64).mean() / max(power, 1e-30))
    return float(np.mean(distances))


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorded:
    """An inner layer and what it reads and puts out, as a walk through a model of this one layer."""

    graph: Graph
    tensors: dict


def refit_inside(walks, number, read, axes_masks, num_fit, num_examples, random, thorough):
    """Refits, in place, a layer inside a closed one that lost inputs.

    Args:
        walks: `Walk`s of the original and of the repaired model; before the closed layer's outputs are used.
        number: The number of the closed layer's call in both.
        read: A `rules.base.InternalRead` of it, with a number.
        axes_masks: From the number of one of the closed layer's weights to a bool array, or `None`, for
            each of its axes.
        num_fit: Batches to fit on; the others are held out.
        num_examples: In all batches.
        random: A numpy generator.
        thorough: As in `refitting.refit`.

    Returns:
        A `LayerRepair`.
    """
    calls = [walk.graph.calls[number] for walk in walks]
    inner = [inner_layers(call.operation)[read.layer_number] for call in calls]
    name = f"{calls[0].name}/{inner[0].name}"
    if not walks[1].graph.is_used_once(calls[1].operation):
        return LayerRepair(name, reason="it is used at several places")
    view = linear_view(inner[0])
    if view is None:
        return LayerRepair(name, reason="it is not known as a matrix product")
    old, new = (_recorded(walk, number, read.layer_number, name) for walk in walks)
    (kernel,) = (n for n, weight in enumerate(calls[0].operation.weights) if weight is view.kernel)
    _, outputs = view.kept(axes_masks(kernel))
    fit = LayerFit(old, new, old.graph.calls[0], new.graph.calls[0], outputs, num_fit)
    return fit.run(num_examples, random, thorough)


def _recorded(walk, number, inner_number, name):
    operation = walk.graph.calls[number].operation
    with recorded_inside(operation, inner_number) as (inputs, outputs):
        walk.run(number)
    layer = inner_layers(operation)[inner_number]
    shapes = [(None, *values[0].shape[1:]) for values in (inputs, outputs)]
    return _Recorded(single_layer_graph(layer, name, *shapes), {0: inputs, 1: outputs})
