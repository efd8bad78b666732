"""Products of tensors: `EinsumDense`, `einsum`, `matmul`, `Dot`, scaled attention.

Axes have letters, as in the equation of an einsum. The letters of one operand or of the result are a *term*.
"""

from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_taylor.rules.base import (
    Context,
    Edit,
    Effect,
    LabeledTensor,
    Work,
    elementwise_work,
    lock_batch_operation,
    lock_inputs,
    size_product,
)
from keras_taylor.rules.elementwise import cut_constant, lock_unless_elementwise
from keras_taylor.rules.labels import FIXED, BatchAxis
from keras_taylor.support.types import IntArray, Shape


def einsum_dense(ctx: Context) -> Effect:
    """Units along the first axis that the kernel makes can leave. The layer reads the axes it sums over.

    In the projections of an attention layer these units are the heads, each as a whole. Channels on an axis
    that is not summed over go through; then the layer's own units stay.
    """
    layer, tensor = ctx.operation, ctx.inputs[0]
    terms = parse_subscripts(layer.equation, (tensor.rank, len(layer.kernel.shape)))
    if terms is None:
        return lock_inputs(ctx)
    read, kernel, result = terms
    if read[0] != result[0] or read[0] in kernel:
        return lock_batch_operation(ctx)
    axis = tensor.channel_axis
    labels = {} if axis is None else {read[axis]: tensor.labels_along(axis)}
    along = next((letter for letter in labels if letter in result), None)
    mixed = [k for k, letter in enumerate(read) if letter not in result]
    if not ctx.passes_channels(mixed):
        along = next((letter for letter in result if letter not in read), None)
        if along is not None:
            labels[along] = ctx.new_labels(layer.kernel.shape[kernel.index(along)])
    output = ctx.fixed_labels() if along is None else ctx.output_labels(labels[along], result.index(along))
    lock_unless_elementwise(ctx, output)
    sizes = _size_of_each_letter((read, kernel), (tensor.shape, layer.kernel.shape))
    return Effect(
        outputs=[output],
        weights={
            "kernel": tuple(labels.get(letter) for letter in kernel),
            "bias": tuple(labels.get(letter) for letter in _bias_letters(layer)),
        },
        config={} if along is None else _output_shape_edit(layer, terms, along, labels[along]),
        reads={0: axis} if axis is not None and read[axis] not in result else {},
        work=_product_work(sizes, result[0], labels),
    )


def einsum(ctx: Context) -> Effect:
    """Channels go through if their axis is kept. If it is summed over, both sides lose the same ones."""
    return _product_effect(ctx, ctx.operation.subscripts)


def matmul(ctx: Context) -> Effect:
    """As `einsum`, over the last axis of the first operand and the last but one of the second."""
    ranks = [len(shape) for shape in _operand_shapes(ctx) or ()]
    return _product_effect(ctx, "...y,y->..." if ranks[1:] == [1] else "...xy,...yz->...xz")


def dot(ctx: Context) -> Effect:
    """As `matmul`, if the second operand has at most two axes. Else channels stay."""
    shapes = _operand_shapes(ctx) or ((), (0, 0, 0))
    return matmul(ctx) if len(shapes[1]) <= 2 else lock_inputs(ctx)


def tensordot(ctx: Context) -> Effect:
    """As `einsum`, over the axes that are given, or the last ones of both operands."""
    shapes = _operand_shapes(ctx)
    if shapes is None:
        return lock_inputs(ctx)
    axes = getattr(ctx.operation, "axes", (-1, -1))
    ranks = [len(shape) for shape in shapes]
    if isinstance(axes, int):
        axes = range(ranks[0] - axes, ranks[0]), range(axes)
    summed = [[int(k) % rank for k in np.atleast_1d(a)] for a, rank in zip(axes, ranks, strict=True)]
    first = [_elided_letter(k) for k in range(ranks[0])]
    second = [_elided_letter(ranks[0] + k) for k in range(ranks[1])]
    for k, other in zip(*summed, strict=True):
        second[other] = first[k]
    result = [letter for letter in first + second if (letter in first) != (letter in second)]
    return _product_effect(ctx, f"{''.join(first)},{''.join(second)}->{''.join(result)}")


def dot_layer(ctx: Context) -> Effect:
    """Channels that are summed over become one unit with those they meet. Others go through."""
    layer, (first, second) = ctx.operation, ctx.inputs
    axes = layer.axes if isinstance(layer.axes, (list, tuple)) else (layer.axes,) * 2
    axes = [axis % tensor.rank for axis, tensor in zip(axes, ctx.inputs, strict=True)]
    free = [_labels_without(tensor, axis) for tensor, axis in zip(ctx.inputs, axes, strict=True)]
    rank = len(ctx.output_shapes[0])
    is_plain = rank == free[0].ndim + free[1].ndim - 1 and 0 not in axes
    if layer.normalize:
        return lock_inputs(ctx)
    if not is_plain or all(labels.size > 1 for labels in free):
        for labels in free:
            ctx.lock(labels, "combined with channels on another axis")
        free = [np.zeros(1, np.int64)] * 2
    read = first.labels_along(axes[0])
    ctx.union(read, second.labels_along(axes[1]))
    output = ctx.fixed_labels()
    if free[0].size > 1:
        output = free[0].reshape(free[0].shape + (1,) * (rank - free[0].ndim))
    elif free[1].size > 1:
        output = free[1].reshape((1,) * (rank - free[1].ndim + 1) + free[1].shape[1:])
    if axes[0] != first.channel_axis:
        factor = 2.0 * size_product([first.shape[axes[0]]])
        return Effect(outputs=[output], work=elementwise_work(output, ctx.output_shapes[0], factor))
    work = [Work(2.0 * w.factor, (*w.labels, read)) for w in elementwise_work(output, ctx.output_shapes[0])]
    # A gate on the first input is enough: it multiplies the products.
    return Effect(outputs=[output], reads={0: axes[0]}, work=tuple(work))


def dot_product_attention(ctx: Context) -> Effect:
    """Heads of queries, keys and values leave together. Queries that share a key are one unit.

    Where several queries share a key, two keys stay: Keras on TensorFlow cannot run a single key for several
    queries.
    """
    query, key, value, *masks = ctx.inputs
    head_axis = 2
    heads, key_heads, value_heads = (ctx.input_labels(number, head_axis) for number in range(3))
    ctx.union(key_heads, value_heads)
    if key_heads.size > 1:  # a single key meets every query and belongs to none
        shared = np.maximum(key_heads, value_heads)
        shared = np.repeat(shared, heads.size // shared.size)
        ctx.union(heads, shared)
        heads = np.maximum(heads, shared)
    if key.shape[head_axis] != query.shape[head_axis]:
        ctx.lock(key_heads[:2], "several queries share a key, and a single key does not run on every backend")
    for mask in masks:
        if mask.rank != 4 or mask.channel_axis not in (None, 1):
            ctx.lock(mask.labels, "combined with channels on another axis")
            ctx.lock(heads, "masked along another axis")
        elif mask.shape[1] != 1:
            ctx.union(heads, mask.labels_along(1))
    if any(np.ndim(a) == 4 and np.shape(a)[1] != 1 for a in ctx.constants if hasattr(a, "shape")):
        ctx.lock(heads, "masked by a constant that differs between heads")
    depths = size_product(query.shape[3:]) + size_product(value.shape[3:])
    factor = 2.0 * size_product((query.shape[1], key.shape[1])) * depths
    return Effect(outputs=[ctx.output_labels(heads, head_axis)], work=(Work(factor, (heads,)),))


def parse_subscripts(subscripts: str, ranks: Sequence[int]) -> list[str] | None:
    """Returns the letters of each operand and of the result, one letter for each axis.

    Axes behind `...` get letters of their own, counted from the last one.

    Args:
        subscripts: The equation, as `"bqd,dhc->bqhc"`.
        ranks: Number of axes of each operand.

    Returns:
        One string for each operand, and one for the result. `None` if the equation has no rule: there is no
        `->`, a letter stands twice in a term, a term has no axis, or the ranks do not fit.
    """
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or len(terms) != len(ranks):
        return None
    num_elided = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    num_elided.append(max((e for e, t in zip(num_elided, terms, strict=True) if "..." in t), default=0))
    terms.append(right)
    if any(e < 0 or (e and "..." not in term) for e, term in zip(num_elided, terms, strict=True)):
        return None
    terms = [
        term.replace("...", "".join(map(_elided_letter, reversed(range(e)))))
        for term, e in zip(terms, num_elided, strict=True)
    ]
    are_distinct = all(len(set(term)) == len(term) for term in terms)
    return terms if are_distinct and all(terms) else None


def _elided_letter(number: int) -> str:
    """A letter for an axis behind `...` that no equation uses."""
    return chr(ord("\u0100") + number)


def _product_effect(ctx: Context, subscripts: str) -> Effect:
    """The effect of a product of tensors and constants over named axes."""
    shapes = _operand_shapes(ctx)
    terms = None if shapes is None else parse_subscripts(subscripts, [len(shape) for shape in shapes])
    if shapes is None or terms is None:
        return lock_inputs(ctx)
    tensors = dict(zip(ctx.input_positions, ctx.inputs, strict=True))
    result = terms[-1]
    batches = {p: t.batch for p, t in tensors.items() if t.batch is not None}
    examples = {(terms[p][batch.axis], batch.outer, batch.inner) for p, batch in batches.items()}
    letter, outer, inner = next(iter(examples), ("", 1, 1))
    if len(examples) != 1 or letter not in result:
        return lock_batch_operation(ctx)
    found = [BatchAxis(result.index(letter), outer, inner)]
    first = terms[next(iter(batches))][0]
    letters = {p: terms[p][t.channel_axis] for p, t in tensors.items() if t.channel_axis is not None}
    sizes = _size_of_each_letter(terms, shapes)
    if not letters:
        return Effect(outputs=[ctx.fixed_labels()], work=_product_work(sizes, first, {}), batches=found)
    along = next(iter(letters.values()))
    for p in (p for p, letter in letters.items() if letter != along):
        ctx.lock(tensors[p].labels, "multiplied with channels on another axis")
    # The axis of this letter in each operand. An axis of size 1 broadcasts: it meets every channel.
    axes = {p: terms[p].index(along) for p in range(len(shapes)) if along in terms[p]}
    axes = {p: axis for p, axis in axes.items() if shapes[p][axis] != 1}
    read = next(p for p in axes if p in tensors and tensors[p].channel_axis is not None)
    channels = tensors[read].labels_along(axes[read])
    for p in axes.keys() & tensors.keys():
        others = tensors[p].labels_along(axes[p])
        ctx.union(channels, others if others.size else np.full(1, FIXED))
    is_kept = along in result
    return Effect(
        outputs=[ctx.output_labels(channels, result.index(along)) if is_kept else ctx.fixed_labels()],
        arguments={
            p: cut_constant(ctx.constants[p], axis, channels) for p, axis in axes.items() if p not in tensors
        },
        reads={} if is_kept else {ctx.input_positions.index(read): axes[read]},
        work=_product_work(sizes, first, {along: channels}),
        batches=found,
    )


def _operand_shapes(ctx: Context) -> list[Shape] | None:
    """Shapes of the tensors and constants that are multiplied; `None` if an operand is neither."""
    shapes = dict(zip(ctx.input_positions, (t.shape for t in ctx.inputs), strict=True))
    operands = ctx.constants[: len(ctx.args)]
    found = []
    for position, value in enumerate(operands):
        if position not in shapes and (isinstance(value, keras.Variable) or not hasattr(value, "shape")):
            return None
        found.append(tuple(shapes.get(position, getattr(value, "shape", ()))))
    return found


def _size_of_each_letter(terms: Sequence[str], shapes: Sequence[Shape]) -> dict[str, int | None]:
    """Size of each letter, `None` where unknown. Where one operand broadcasts, the other's size counts."""
    sizes: dict[str, int | None] = {}
    for term, shape in zip(terms, shapes, strict=False):
        for letter, size in zip(term, shape, strict=True):
            if sizes.get(letter) in (None, 1):
                sizes[letter] = sizes.get(letter) if size is None else size
    return sizes


def _product_work(
    sizes: Mapping[str, int | None], first: str, labels: Mapping[str, IntArray]
) -> tuple[Work, ...]:
    """A multiplication and an addition for each combination of positions.

    Args:
        sizes: Size of each letter.
        first: The letter of the first axis, which does not count.
        labels: Labels along the letters that have channels.
    """
    others = [size for letter, size in sizes.items() if letter != first and letter not in labels]
    return (Work(2.0 * size_product(others), tuple(labels.values())),)


def _bias_letters(layer: keras.layers.EinsumDense) -> list[str]:
    """The letter of each axis of the layer's bias, empty for an axis of size 1."""
    if layer.bias is None:
        return []
    result = layer.equation.partition("->")[2].replace("...", "")
    first = min(result.index(letter) for letter in layer.bias_axes)
    letters = [letter if letter in layer.bias_axes else "" for letter in result[first:]]
    return letters + [""] * (len(layer.bias.shape) - len(letters))


def _output_shape_edit(
    layer: keras.layers.EinsumDense, terms: Sequence[str], along: str, labels: IntArray
) -> dict[str, Edit]:
    """The edit of one entry of `output_shape`, which has no entry for the batch and for a leading `...`.

    Args:
        layer: The layer.
        terms: Letters of input, kernel and result.
        along: The letter of the channels.
        labels: Labels along this axis.
    """
    shape = layer.partial_output_shape
    num_left_out = 1
    if layer.equation.startswith("..."):
        num_left_out = max(1, len(terms[0]) - len(layer.equation.partition(",")[0][3:]))
    entry = terms[2].index(along) - num_left_out
    if not 0 <= entry < len(shape) or shape[entry] is None:
        return {}
    edit = Edit((labels,), lambda kept: (*shape[:entry], int(kept.sum()), *shape[entry + 1 :]))
    return {"output_shape": edit}


def _labels_without(tensor: LabeledTensor, axis: int) -> IntArray:
    """Labels of the tensor's other axes, an array without `axis`; fixed if the channels lie on it."""
    return np.take(tensor.labels, 0, axis) * (tensor.channel_axis != axis)
