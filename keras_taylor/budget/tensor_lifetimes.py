"""Tensors that are alive together while a model runs."""

import math

import numpy as np

_ITEM_SIZE = 4  # float32


class Lifetimes:
    """When each tensor of a graph is made and read last, and what is alive between.

    A tensor lives from the call that makes it (a model input: from the start) to the last one that reads
    it (a model output: to the end). What a call without a kernel makes of one tensor, each value where it
    was, like an activation or a normalization, takes that tensor's place if nothing reads it later:
    runtimes fuse these. So do reshapes.

    Args:
        channels: `groups.LabeledModel`, or what has its `graph`, `effects` and `labels`.

    Attributes:
        places: For each place in memory: its bytes a channel as float32 (NaN where a size is unknown) and
            the labels of its channels, `None` where it has none.
        first, last: For each place the numbers of the first and the last call while it is alive.
    """

    def __init__(self, labeled):
        graph = labeled.graph
        last = dict.fromkeys(graph.inputs, -1)
        for step, call in enumerate(graph.calls):
            last.update(dict.fromkeys(call.outputs, step))
            last.update(dict.fromkeys(call.inputs, step))
        last.update(dict.fromkeys(graph.outputs, len(graph.calls)))
        self.places, self.first, self.last, place_of = [], [], [], {}

        def add(index, step):
            place_of[index] = len(self.places)
            self.places.append(_size(graph.shapes[index], labeled.labels[index]))
            self.first.append(step)
            self.last.append(last[index])

        for index in graph.inputs:
            if index not in place_of:
                add(index, 0)
        for step, (call, effect) in enumerate(zip(graph.calls, labeled.effects, strict=True)):
            source = call.inputs[0] if call.inputs else None
            if _in_place(call, effect, labeled) and last[source] == step and source in place_of:
                place_of[call.outputs[0]] = place_of[source]
                self.last[place_of[source]] = last[call.outputs[0]]
                continue
            for index in call.outputs:
                add(index, step)


def _in_place(call, effect, labeled):
    if len(call.inputs) != 1 or len(call.outputs) != 1 or effect.reads or not effect.has_rule:
        return False
    if any(len(axes) > 1 for axes in effect.weights.values()):
        return False
    before, after = (labeled.graph.shapes[index] for index in (call.inputs[0], call.outputs[0]))
    return None not in before[1:] + after[1:] and math.prod(before[1:]) == math.prod(after[1:])


def _size(shape, labels):
    """Bytes a channel (or all, where there are none), and the channels' labels."""
    labels = np.asarray(labels)
    sizes = shape[1:] if labels.size == 1 else _across(shape, labels)
    factor = math.nan if None in sizes else float(_ITEM_SIZE * math.prod(sizes))
    return factor, None if labels.size == 1 else labels.reshape(-1)


def _across(shape, labels):
    """The sizes along which labels do not vary, the batch's left out."""
    return [size for size, varied in zip(shape[1:], labels.shape[1:], strict=True) if varied == 1]
