"""Layers inside closed ones, fitted to what they put out in the original."""

import dataclasses

from keras_taylor.cutting.layer_fits import LayerFit, LayerRepair
from keras_taylor.reading.graph import Call, Graph, TensorRef
from keras_taylor.reading.inner_gates import recorded_inside
from keras_taylor.reading.linear_views import linear_view
from keras_taylor.rules.attention import inner_layers


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
    inner = [inner_layers(call.operation)[read.number] for call in calls]
    name = f"{calls[0].name}/{inner[0].name}"
    if not walks[1].graph.is_used_once(calls[1].operation):
        return LayerRepair(name, reason="it is used at several places")
    view = linear_view(inner[0])
    if view is None:
        return LayerRepair(name, reason="it is not known as a matrix product")
    old, new = (_recorded(walk, number, read.number, name) for walk in walks)
    weights = [id(weight) for weight in calls[0].operation.weights]
    _, outputs = view.kept(axes_masks(weights.index(id(view.kernel))))
    fit = LayerFit(old, new, old.graph.calls[0], new.graph.calls[0], outputs, num_fit)
    return fit.run(num_examples, random, thorough)


def _recorded(walk, number, inner_number, name):
    operation = walk.graph.calls[number].operation
    with recorded_inside(operation, inner_number) as (inputs, outputs):
        walk.run(number)
    layer = inner_layers(operation)[inner_number]
    call = Call(name, layer, None, (TensorRef(0),), {}, inputs=(0,), outputs=(1,))
    shapes = [(None, *values[0].shape[1:]) for values in (inputs, outputs)]
    return _Recorded(Graph(layer, [call], shapes, (0,), (1,), {}, {}, {}), {0: inputs, 1: outputs})
