"""Products of tensors: `EinsumDense`, `einsum`, `matmul`, `Dot`, scaled attention."""

import math

import keras
import numpy as np

from keras_taylor.rules.base import Edit, Effect, Work, elementwise_work, is_elementwise, lock_inputs
from keras_taylor.rules.elementwise import cut_constant
from keras_taylor.rules.labels import FIXED


def einsum_dense(ctx):
    """Units along the first axis that the kernel makes; it reads what it sums over.

    Of an attention layer's projections these are the heads, each as a whole. Channels on an
    axis that is not summed over go through, and the layer's own units stay.
    """
    layer, tensor = ctx.operation, ctx.inputs[0]
    terms = parse_subscripts(layer.equation, (tensor.rank, len(layer.kernel.shape)))
    if terms is None or terms[0][0] != terms[2][0] or terms[0][0] in terms[1]:
        return lock_inputs(ctx)
    read, kernel, made = terms
    axis = tensor.channel_axis
    labels = {} if axis is None else {read[axis]: tensor.labels_along(axis)}
    along = next((letter for letter in labels if letter in made), None)
    if along is None:
        along = next((letter for letter in made if letter not in read), None)
        if along is not None:
            labels[along] = ctx.new_labels(ctx.output_shapes[0][made.index(along)])
    output = ctx.fixed_labels() if along is None else ctx.output_labels(labels[along], made.index(along))
    if not is_elementwise(layer.activation):
        ctx.lock(output, "goes through an activation that may mix channels")
    return Effect(
        outputs=[output],
        weights={
            "kernel": tuple(labels.get(letter) for letter in kernel),
            "bias": tuple(labels.get(letter) for letter in _bias_letters(layer)),
        },
        config={} if along is None else _output_shape(layer, terms, along, labels[along]),
        reads={0: axis} if axis is not None and read[axis] not in made else {},
        work=_work(_sizes((read, kernel), (tensor.shape, layer.kernel.shape)), made[0], labels),
    )


def einsum(ctx):
    """Channels on one named axis: kept, it goes through; summed over, both sides lose the same ones."""
    return _product(ctx, ctx.operation.subscripts)


def matmul(ctx):
    """An `einsum` over the last axis of the first and the last but one of the second."""
    ranks = [len(shape) for shape in _operand_shapes(ctx) or ()]
    return _product(ctx, "...y,y->..." if ranks[1:] == [1] else "...xy,...yz->...xz")


def dot(ctx):
    """As `matmul`, where both are the same."""
    shapes = _operand_shapes(ctx) or ((), (0, 0, 0))
    return matmul(ctx) if len(shapes[1]) <= 2 else lock_inputs(ctx)


def dot_product_attention(ctx):
    """Heads of queries, keys and values leave together; queries that share a key are one unit.

    Where they share, two keys stay: Keras on TensorFlow cannot run a single one for several queries.
    """
    query, key, value, *masks = ctx.inputs
    heads = 2
    if any(t.channel_axis not in (None, heads) for t in (query, key, value)):
        return lock_inputs(ctx)
    made, shared = query.labels_along(heads), key.labels_along(heads)
    ctx.union(shared, value.labels_along(heads))
    if shared.size > 1:  # a single key meets every query and belongs to none
        shared = np.repeat(np.maximum(shared, value.labels_along(heads)), made.size // shared.size)
        ctx.union(made, shared)
        made = np.maximum(made, shared)
    if key.shape[heads] != query.shape[heads]:
        ctx.lock(
            key.labels_along(heads)[:2],
            "several queries share a key, and a single one does not run everywhere",
        )
    for mask in masks:
        if mask.rank != 4 or mask.channel_axis not in (None, 1):
            ctx.lock(mask.labels, "combined with channels on another axis")
            ctx.lock(made, "masked along another axis")
        elif mask.shape[1] != 1:
            ctx.union(made, mask.labels_along(1))
    if any(np.ndim(a) == 4 and np.shape(a)[1] != 1 for a in ctx.constants if hasattr(a, "shape")):
        ctx.lock(made, "masked by a constant of its own for each head")
    lengths = (query.shape[1], key.shape[1], query.shape[3] + value.shape[3])
    factor = math.nan if None in lengths else 2.0 * math.prod(lengths)
    return Effect(outputs=[ctx.output_labels(made, heads)], work=(Work(factor, (made,)),))


def _product(ctx, subscripts):
    """A product of tensors and constants over named axes."""
    shapes = _operand_shapes(ctx)
    terms = None if shapes is None else parse_subscripts(subscripts, [len(shape) for shape in shapes])
    if terms is None:
        return lock_inputs(ctx)
    tensors = dict(zip(ctx.input_positions, ctx.inputs, strict=True))
    made = terms[-1]
    if any(terms[p][0] != made[:1] for p in tensors):
        return lock_inputs(ctx, f"read by an operation on the batch axis ('{ctx.name}')")
    letters = {p: terms[p][t.channel_axis] for p, t in tensors.items() if t.channel_axis is not None}
    sizes = _sizes(terms, shapes)
    if not letters:
        return Effect(outputs=[ctx.fixed_labels()], work=_work(sizes, made[0], {}))
    along = next(iter(letters.values()))
    for p in (p for p, letter in letters.items() if letter != along):
        ctx.lock(tensors[p].labels, "multiplied with channels on another axis")
    met = {p: terms[p].index(along) for p in range(len(shapes)) if along in terms[p]}
    met = {p: axis for p, axis in met.items() if shapes[p][axis] != 1}  # else it meets every channel
    read = next(p for p in met if p in tensors and tensors[p].channel_axis is not None)
    vector = tensors[read].labels_along(met[read])
    for p in met.keys() & tensors.keys():
        mine = tensors[p].labels_along(met[p])
        ctx.union(vector, mine if mine.size else np.full(1, FIXED))
    return Effect(
        outputs=[ctx.output_labels(vector, made.index(along)) if along in made else ctx.fixed_labels()],
        arguments={
            p: cut_constant(ctx.constants[p], axis, vector) for p, axis in met.items() if p not in tensors
        },
        reads={} if along in made else {ctx.input_positions.index(read): met[read]},
        work=_work(sizes, made[0], {along: vector}),
    )


def _operand_shapes(ctx):
    """Shapes of tensors and constants that are multiplied, `None` where one is neither."""
    shapes = dict(zip(ctx.input_positions, (t.shape for t in ctx.inputs), strict=True))
    operands = ctx.constants[: len(ctx.args)]
    found = []
    for position, value in enumerate(operands):
        if position not in shapes and (isinstance(value, keras.Variable) or not hasattr(value, "shape")):
            return None
        found.append(tuple(shapes.get(position, getattr(value, "shape", ()))))
    return found


def parse_subscripts(subscripts, ranks):
    """The letters of each operand and of the result, one for each axis; `None` for what has no rule.

    Axes behind `...` get letters of their own, counted from the last one.
    """
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(ranks):
        return None
    elided = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    elided.append(max((e for e, t in zip(elided, terms, strict=True) if "..." in t), default=0))
    terms.append(right)
    if any(e < 0 or (e and "..." not in term) for e, term in zip(elided, terms, strict=True)):
        return None
    terms = [
        t.replace("...", "".join(map(_elided_letter, reversed(range(e)))))
        for t, e in zip(terms, elided, strict=True)
    ]
    distinct = all(len(set(term)) == len(term) for term in terms)
    return terms if distinct and all(terms) else None


def _elided_letter(number):
    return chr(ord("\u0100") + number)


def _sizes(terms, shapes):
    """Size of each letter; where one broadcasts, the other's."""
    sizes = {}
    for term, shape in zip(terms, shapes, strict=False):
        for letter, size in zip(term, shape, strict=True):
            if sizes.get(letter) in (None, 1):
                sizes[letter] = sizes.get(letter) if size is None else size
    return sizes


def _work(sizes, batch, labels):
    """A multiply-add for every combination of positions."""
    rest = [size for letter, size in sizes.items() if letter != batch and letter not in labels]
    factor = math.nan if None in rest else 2.0 * math.prod(rest)
    return (Work(factor, tuple(labels.values())),)


def _bias_letters(layer):
    """The letter of each axis of an `EinsumDense` layer's bias, empty where it has size 1."""
    if layer.bias is None:
        return ()
    made = layer.equation.partition("->")[2].replace("...", "")
    first = min(made.index(letter) for letter in layer.bias_axes)
    letters = [letter if letter in layer.bias_axes else "" for letter in made[first:]]
    return letters + [""] * (len(layer.bias.shape) - len(letters))


def _output_shape(layer, terms, along, vector):
    """The edit of an entry of `output_shape`, which has none for the batch and for a leading `...`."""
    shape = layer.partial_output_shape
    left_out = 1
    if layer.equation.startswith("..."):
        left_out = max(1, len(terms[0]) - len(layer.equation.partition(",")[0][3:]))
    entry = terms[2].index(along) - left_out
    if not 0 <= entry < len(shape) or shape[entry] is None:
        return {}
    edit = Edit((vector,), lambda kept: (*shape[:entry], int(kept.sum()), *shape[entry + 1 :]))
    return {"output_shape": edit}


def dot_layer(ctx):
    """Channels that it sums over are one with those that they meet; others go through."""
    layer, (first, second) = ctx.operation, ctx.inputs
    axes = layer.axes if isinstance(layer.axes, (list, tuple)) else (layer.axes,) * 2
    axes = [axis % tensor.rank for axis, tensor in zip(axes, ctx.inputs, strict=True)]
    free = [_without(tensor, axis) for tensor, axis in zip(ctx.inputs, axes, strict=True)]
    rank = len(ctx.output_shapes[0])
    known = rank == free[0].ndim + free[1].ndim - 1 and 0 not in axes
    if layer.normalize or (not known and any(labels.size > 1 for labels in free)):
        return lock_inputs(ctx)
    if all(labels.size > 1 for labels in free):
        for labels in free:
            ctx.lock(labels, "combined with channels on another axis")
        free = [np.zeros(1, np.int64)] * 2
    read = first.labels_along(axes[0])
    ctx.union(read, second.labels_along(axes[1]))
    outputs = ctx.fixed_labels()
    if free[0].size > 1:
        outputs = free[0].reshape(free[0].shape + (1,) * (rank - free[0].ndim))
    elif free[1].size > 1:
        outputs = free[1].reshape((1,) * (rank - free[1].ndim + 1) + free[1].shape[1:])
    if axes[0] != first.channel_axis:
        factor = 2.0 * (np.nan if first.shape[axes[0]] is None else first.shape[axes[0]])
        return Effect(outputs=[outputs], work=elementwise_work(outputs, ctx.output_shapes[0], factor))
    work = [Work(2.0 * w.factor, (*w.labels, read)) for w in elementwise_work(outputs, ctx.output_shapes[0])]
    # one gate is enough: it multiplies the products
    return Effect(outputs=[outputs], reads={0: axes[0]}, work=tuple(work))


def _without(tensor, axis):
    """Labels of what is not summed over."""
    return np.take(tensor.labels, 0, axis) * (tensor.channel_axis != axis)
