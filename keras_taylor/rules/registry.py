"""The table of rules, and rules for layers of the user's own (`register_rule`).

The table goes from the name of a Keras layer or `keras.ops` operation to its rule. A new layer is a new row.
`base` says what a rule is.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import keras

from keras_taylor.rules import attention, einsum, elementwise, indexing, kernels, norm, recurrent, shape
from keras_taylor.rules.base import (
    Context,
    Effect,
    LabeledTensor,
    Rule,
    Work,
    count_kept,
    elementwise_work,
    is_from_keras,
    lock_inputs,
    num_elements,
    size_product,
    unknown_operation,
    weight_of,
)
from keras_taylor.rules.labels import BatchAxis, LabelSpace
from keras_taylor.support.types import IntArray, Shape

LayerClass = TypeVar("LayerClass", bound=type[keras.Layer])

# Rules of the user's own layer classes.
REGISTERED: dict[type[keras.Layer], Rule] = {}

# What can lie along an axis of a weight, in `register_rule`.
_AXIS_ROLES = ("channels", "inputs", "units")
AxisRoles: TypeAlias = Sequence[str | None]


def time_distributed(ctx: Context) -> Effect:
    """As the inner layer, for each time step."""
    return recurrent.apply_to_each_step(ctx, rule_for(ctx.operation.layer))


def spectral_normalization(ctx: Context) -> Effect:
    """As the inner layer, whose outputs it has at inference."""
    return recurrent.apply_to_inner_layer(ctx, rule_for(ctx.operation.layer))


def _rules_by_name(rows: Sequence[tuple[str, Rule]]) -> dict[str, Rule]:
    """The table as a dict: a row has several names, separated by spaces."""
    return {name: rule for names, rule in rows for name in names.split()}


# The rules of Keras' layers, by class name.
LAYERS = _rules_by_name(
    [
        ("Conv1D Conv2D Conv3D", kernels.conv),
        ("Conv1DTranspose Conv2DTranspose Conv3DTranspose", kernels.conv_transpose),
        ("DepthwiseConv1D DepthwiseConv2D", kernels.depthwise),
        ("SeparableConv1D SeparableConv2D", kernels.separable),
        ("Dense", kernels.dense),
        ("RNN LSTM GRU SimpleRNN ConvLSTM1D ConvLSTM2D ConvLSTM3D", recurrent.recurrent),
        ("Bidirectional", recurrent.bidirectional),
        ("TimeDistributed", time_distributed),
        ("SpectralNormalization", spectral_normalization),
        ("EinsumDense", einsum.einsum_dense),
        ("Embedding", kernels.embedding),
        ("ReversibleEmbedding", kernels.reversible_embedding),
        ("BatchNormalization", norm.batch_normalization),
        ("LayerNormalization", norm.layer_normalization),
        ("RMSNormalization", norm.rms_normalization),
        ("UnitNormalization", norm.unit_normalization),
        ("GroupNormalization", norm.group_normalization),
        ("Normalization", norm.normalization),
        ("Rescaling", norm.rescaling),
        ("PReLU", norm.prelu),
        ("LayerScale", norm.layer_scale),
        ("ReLU LeakyReLU ELU", elementwise.unary),
        ("Masking", elementwise.masking),
        ("Activation", elementwise.activation_layer),
        ("Softmax", elementwise.softmax),
        (
            "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout "
            "GaussianNoise AlphaDropout ActivityRegularization Identity StochasticDepth",
            elementwise.identity,
        ),
        (
            "Add Subtract Multiply Average Maximum Minimum CustomScaleLayer",
            elementwise.merge,
        ),
        ("Dot", einsum.dot_layer),
        ("Attention AdditiveAttention", attention.attention),
        ("Concatenate", shape.concatenate),
        ("Reshape", shape.reshape),
        ("Flatten", shape.flatten),
        ("Permute", shape.permute),
        ("RepeatVector", shape.repeat_vector),
        (
            "MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D "
            "AveragePooling3D AdaptiveAveragePooling1D AdaptiveAveragePooling2D "
            "AdaptiveAveragePooling3D AdaptiveMaxPooling1D AdaptiveMaxPooling2D "
            "AdaptiveMaxPooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D "
            "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D "
            "UpSampling1D UpSampling2D UpSampling3D Resizing",
            kernels.pool_or_resize,
        ),
        (
            "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D CenterCrop",
            kernels.pad_or_crop,
        ),
    ]
)

# The rules of `keras.ops`, by the class name of the operation.
OPERATIONS = _rules_by_name(
    [
        (
            "Relu Relu6 Sigmoid SparseSigmoid Softplus Softsign SoftShrink SparsePlus Silu "
            "Squareplus LogSigmoid LeakyRelu HardSigmoid HardSilu Elu Selu Gelu Celu TanhShrink "
            "HardTanh HardShrink Threshold Absolute Fabs Exp Exp2 Expm1 Log Log1p Log2 Log10 Negative "
            "Reciprocal Rsqrt Sqrt Cbrt Square Sin Cos Tan Sinh Cosh Tanh Arcsin Arccos Arctan Arcsinh "
            "Arccosh Arctanh Sinc I0 Deg2rad Rad2deg Sign Signbit Floor Ceil Round Trunc Erf Erfc Erfinv "
            "NanToNum Real Imag Conjugate Angle LogicalNot BitwiseInvert BitwiseNot Isfinite Isinf Isneginf "
            "Isposinf Isnan Isreal OnesLike ZerosLike",
            elementwise.unary,
        ),
        ("Clip", elementwise.clip),
        ("Cast SaturateCast StopGradient Copy Identity Array ConvertToTensor", elementwise.identity),
        ("Softmax LogSoftmax Sparsemax Normalize", elementwise.softmax),
        (
            "Add Subtract Multiply Divide DivideNoNan TrueDivide FloorDivide Power Maximum Fmax "
            "Minimum Fmin Mod Fmod Select Logaddexp Logaddexp2 Arctan2 Hypot Ldexp Heaviside Nextafter "
            "Gcd Lcm Greater GreaterEqual Less LessEqual Equal NotEqual Isclose LogicalAnd LogicalOr "
            "LogicalXor BitwiseAnd BitwiseOr BitwiseXor BitwiseLeftShift BitwiseRightShift LeftShift "
            "RightShift FullLike BinaryCrossentropy",
            elementwise.merge,
        ),
        ("Where", elementwise.where),
        ("MaxPool AveragePool", kernels.pool_or_resize),
        ("Resize GaussianBlur", kernels.resize_images),
        ("PadImages CropImages", kernels.pad_images),
        ("Conv DepthwiseConv", kernels.convolve),
        ("Concatenate Append Hstack Vstack Dstack", shape.concatenate),
        ("Reshape Ravel", shape.reshape),
        ("Transpose", shape.transpose),
        ("Swapaxes", shape.swapaxes),
        ("Moveaxis", shape.moveaxis),
        ("BroadcastTo", shape.broadcast_to),
        ("ExpandDims", shape.expand_dims),
        ("Squeeze", shape.squeeze),
        (
            "Mean Max Min Amax Amin Sum Var Std Prod Logsumexp Any All Norm Moments Ptp Median "
            "Argmax Argmin Nanargmax Nanargmin Nanmax Nanmean Nanmedian Nanmin Nanprod Nanstd Nansum Nanvar",
            shape.reduce,
        ),
        ("Pad", shape.pad),
        ("Split ArraySplit Hsplit Vsplit Dsplit", shape.split),
        ("GetItem", shape.get_item),
        ("Einsum", einsum.einsum),
        ("Matmul", einsum.matmul),
        ("Dot", einsum.dot),
        ("Tensordot Inner", einsum.tensordot),
        ("DotProductAttention", einsum.dot_product_attention),
        ("Repeat", shape.repeat),
        ("Tile", shape.tile),
        (
            "Cumsum Cumprod Nancumsum Nancumprod Diff Sort Argsort Argpartition",
            shape.along_axis,
        ),
        ("IsIn", lock_inputs),
        ("Take", indexing.take),
        ("Flip", indexing.flip),
        ("Roll", indexing.roll),
        ("Tril Triu", shape.triangle),
        ("Stack", shape.stack),
        ("Unstack", shape.unstack),
    ]
)


def rule_for(operation: keras.Operation) -> Rule:
    """Returns the rule of an operation, `base.unknown_operation` if it has none.

    Only Keras' own classes and registered classes have rules: a user's subclass may do anything in `call`.
    """
    is_altered = getattr(operation, "quantization_mode", None) or getattr(operation, "lora_enabled", False)
    if is_altered:
        return unknown_operation
    if type(operation) in REGISTERED:
        return REGISTERED[type(operation)]
    if not is_from_keras(type(operation)):
        return unknown_operation
    table = LAYERS if isinstance(operation, keras.Layer) else OPERATIONS
    return table.get(type(operation).__name__, unknown_operation)


class RecordedCall(Protocol):
    """What `apply_rule` needs of a call in a graph (`reading.graph.Call`)."""

    @property
    def name(self) -> str:
        """Name of the operation in the graph."""

    @property
    def operation(self) -> keras.Operation:
        """The layer or operation."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, with references in the place of tensors."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments, with references in the place of tensors."""

    @property
    def flat(self) -> Sequence[Any]:
        """The flattened arguments."""

    @property
    def tensor_positions(self) -> Sequence[int]:
        """Positions of tensors among the flattened arguments."""

    @property
    def inputs(self) -> Sequence[int]:
        """Index of each input tensor."""

    @property
    def outputs(self) -> Sequence[int]:
        """Index of each output tensor."""

    @property
    def closed_reason(self) -> str | None:
        """Why the operations inside a custom layer could not be read; `None` if they need not be."""


def apply_rule(
    space: LabelSpace,
    call: RecordedCall,
    labels: Sequence[IntArray] | Mapping[int, IntArray],
    shapes: Sequence[Shape],
    batches: Sequence[BatchAxis | None],
    rule: Rule | None = None,
) -> Effect:
    """Applies a rule to one call.

    The effect that is returned says where the examples are in each output. Its work is that of one example.

    Args:
        space: Collects unions and locks.
        call: The call.
        labels: Label array of each tensor seen so far, by index.
        shapes: Shape of each tensor, by index.
        batches: Where the examples are in each tensor seen so far, by index.
        rule: The rule. By default that of `rule_for`.
    """
    inputs = [
        LabeledTensor(labels[i], _visible_shape(shapes[i], batches[i]), batches[i]) for i in call.inputs
    ]
    with_batch = next((i for i in call.inputs if batches[i] is not None), call.inputs[0])
    source = inputs[call.inputs.index(with_batch)]
    is_one = len({tensor.batch for tensor in inputs} - {None}) == 1
    output_shapes = [shapes[i] for i in call.outputs]
    found = [_kept_batch_axis(source.batch, shapes[with_batch], s) if is_one else None for s in output_shapes]
    context = Context(
        space=space,
        name=call.name,
        operation=call.operation,
        inputs=inputs,
        input_positions=call.tensor_positions,
        constants=[None if i in call.tensor_positions else x for i, x in enumerate(call.flat)],
        args=call.args,
        kwargs=call.kwargs,
        output_shapes=[_visible_shape(s, batch) for s, batch in zip(output_shapes, found, strict=True)],
        recorded_shapes=[shapes[i] for i in (*call.inputs, *call.outputs)],
        closed_reason=call.closed_reason,
    )
    effect = (rule or rule_for(call.operation))(context)
    return dataclasses.replace(
        effect,
        batches=found if effect.batches is None else effect.batches,
        work=_work_of_example(effect.work, source),
    )


def _visible_shape(shape: Shape, batch: BatchAxis | None) -> Shape:
    """The shape that rules see: with the size for one example on a batch axis that is not the first."""
    return shape if batch is None or batch.axis == 0 else batch.shape_of_example(shape)


def _kept_batch_axis(batch: BatchAxis | None, before: Shape, after: Shape) -> BatchAxis | None:
    """Where the examples are after an operation that leaves them where they were; `None` if it does not.

    Args:
        batch: Where they are before it.
        before, after: Shapes of its input and output.
    """
    if batch is None or len(after) <= batch.axis or (batch.axis and len(after) != len(before)):
        return None
    return batch if after[batch.axis] in (None, before[batch.axis]) else None


def _work_of_example(work: tuple[Work, ...], tensor: LabeledTensor) -> tuple[Work, ...]:
    """The work of one example, given that of one row of the tensor's first axis."""
    batch = tensor.batch
    num = batch.num_rows if batch is not None and batch.axis == 0 else tensor.shape[0]
    if num == 1:
        return work
    return tuple(Work(size_product([num]) * each.factor, each.labels) for each in work)


def register_rule(
    layer_class: LayerClass,
    rule: Rule | None = None,
    *,
    like: str | type[keras.Layer] | None = None,
    weights: Mapping[str, AxisRoles] | None = None,
    config: Mapping[str, str] | None = None,
    axis: int = -1,
) -> LayerClass | Callable[[Rule], Rule]:
    """Tells how a layer class of your own treats channels, so that they can be removed.

    Give one of `rule`, `like` and `weights`. Most layers need `weights` only, which says what lies along each
    axis of each weight. A rule holds for the class itself, not for its subclasses.

    When a model with such a layer is read, the rule is tried on a copy of the layer with random weights and
    inputs: without some of its channels, the layer must compute the same values for the channels that stay as
    it does with the removed ones set to zero.

    Args:
        layer_class: A subclass of `keras.Layer`. Its `get_config` must return all that `__init__` needs.
        rule: A function from a `keras_taylor.rules.base.Context` to a `keras_taylor.rules.base.Effect`, for a
            layer that the other arguments cannot describe. The documentation of `keras_taylor.rules.base`
            shows how to write one.
        like: `"elementwise"` if each output value depends on the input value at the same place only. Or a
            layer class of Keras with the same weights and configuration keys, whose rule then holds.
        weights: For each weight a tuple with one entry for each axis. The key is the attribute of the weight,
            or a path as `"projection.kernel"`. The entries are `"channels"` for channels that go through the
            layer, one by one; `"inputs"` and `"units"` for the channels that a layer reads and makes, if it
            mixes channels; `None` for any other axis.
        config: For each configuration key whose value is a number of channels: `"channels"`, `"inputs"` or
            `"units"`. Required for `"units"`, since the smaller layer is made from its configuration.
        axis: Axis of the channels in the layer's input and output. Default -1, the last one.

    Returns:
        `layer_class`. Without `rule`, `like` and `weights`: a decorator for a rule.

    Raises:
        ValueError: If `layer_class` is no layer class of your own, or if the arguments contradict each other.
            A rule that does not hold raises a `ValueError` when a model with such a layer is read.

    Example:

    A layer with one weight for each channel:

    >>> import keras, keras_taylor
    >>> class Scale(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")
    ...     def call(self, x):
    ...         return x * self.scale
    >>> _ = keras_taylor.register_rule(Scale, weights={"scale": ("channels",)})
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), Scale(), keras.layers.Dense(2)])
    >>> [group.num_units for group in keras_taylor.analyze(model).groups if group.prunable]
    [8]

    A layer that mixes channels, with a kernel:

    >>> class Mix(keras.layers.Layer):
    ...     def __init__(self, width, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.width = width
    ...     def build(self, shape):
    ...         self.kernel = self.add_weight(shape=(shape[-1], self.width))
    ...     def call(self, x):
    ...         return keras.ops.matmul(x, self.kernel)
    ...     def get_config(self):
    ...         return {**super().get_config(), "width": self.width}
    >>> kernel = ("inputs", "units")
    >>> _ = keras_taylor.register_rule(Mix, weights={"kernel": kernel}, config={"width": "units"})
    >>> model = keras.Sequential([keras.Input((4,)), Mix(8), keras.layers.Dense(2)])
    >>> [group.num_units for group in keras_taylor.analyze(model).groups if group.prunable]
    [8]

    A layer without weights:

    >>> class Swish(keras.layers.Layer):
    ...     def call(self, x):
    ...         return x * keras.ops.sigmoid(x)
    >>> _ = keras_taylor.register_rule(Swish, like="elementwise")
    """
    _check_registration(layer_class, rule, like, weights, config)
    if rule is None and like is None and weights is None:

        def decorator(function: Rule) -> Rule:
            REGISTERED[layer_class] = function
            return function

        return decorator
    if like is not None:
        rule = LAYERS[like.__name__] if isinstance(like, type) else elementwise.unary
    elif weights is not None:
        rule = _rule_from_weights(dict(weights), dict(config or {}), axis)
    if rule is not None:
        REGISTERED[layer_class] = rule
    return layer_class


def _rule_from_weights(weights: Mapping[str, AxisRoles], config: Mapping[str, str], axis: int) -> Rule:
    """The rule that follows from what lies along the axes of weights."""
    roles = {role for axes in weights.values() for role in axes}

    def rule(ctx: Context) -> Effect:
        """As its weights say."""
        tensor = ctx.inputs[0]
        if len(ctx.inputs) > 1 or len(ctx.output_shapes) > 1:
            return unknown_operation(ctx)
        if roles <= {"channels", None}:
            labels = {"channels": tensor.labels_along(axis)}
            output, reads = tensor.labels, {}
            work = elementwise_work(output, ctx.output_shapes[0])
        else:
            labels = {"inputs": ctx.input_labels(0, axis)}
            output, reads = ctx.fixed_labels(), {0: axis % tensor.rank}
            if "units" in roles:
                num_units = ctx.output_shapes[0][axis]
                if num_units is None:
                    return lock_inputs(ctx, "read by a layer with an unknown number of units")
                labels["units"] = ctx.new_labels(num_units)
                output = ctx.output_labels(labels["units"], axis)
            work = _kernel_work(ctx, weights, labels, axis)
        return Effect(
            outputs=[output],
            weights={
                name: tuple(None if role is None else labels[role] for role in axes)
                for name, axes in weights.items()
            },
            config={key: count_kept(labels[role]) for key, role in config.items()},
            reads=reads,
            work=work,
        )

    return rule


def _kernel_work(
    ctx: Context, weights: Mapping[str, AxisRoles], labels: Mapping[str, IntArray], axis: int
) -> tuple[Work, ...]:
    """A multiplication and an addition for each value of each kernel, at each position.

    Args:
        ctx: The call.
        weights: What lies along each axis of each weight. Kernels are those with `"inputs"`.
        labels: Labels of the inputs and units.
        axis: The channel axis.
    """
    shape = ctx.output_shapes[0]
    positions = num_elements(shape, (axis % len(shape),))
    work = []
    for name, axes in weights.items():
        kernel = weight_of(ctx.operation, name)
        if kernel is not None and "inputs" in axes:
            others = [size for size, role in zip(kernel.shape, axes, strict=True) if role is None]
            factor = 2.0 * positions * math.prod(others)
            work.append(Work(factor, tuple(labels[role] for role in axes if role is not None)))
    return tuple(work)


def _check_registration(
    layer_class: object,
    rule: object,
    like: object,
    weights: Mapping[str, AxisRoles] | None,
    config: Mapping[str, str] | None,
) -> None:
    """Raises a `ValueError` for arguments of `register_rule` that are wrong or contradict each other."""
    is_layer_class = isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)
    if not is_layer_class or is_from_keras(layer_class):
        raise ValueError(
            "A rule is registered for a layer class of your own. Expected a subclass of `keras.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    given = [k for k, v in {"rule": rule, "like": like, "weights": weights}.items() if v is not None]
    if len(given) > 1 or (config and weights is None):
        raise ValueError(
            "Expected one of `rule`, `like` and `weights`, and `config` together with `weights` only. "
            f"Received: {', '.join(given + ['config'] * bool(config))}"
        )
    if rule is not None and not callable(rule):
        raise ValueError(f"Expected a function from a Context to an Effect. Received: rule={rule!r}")
    if like is not None and like != "elementwise":
        name = like.__name__ if isinstance(like, type) else ""
        if getattr(keras.layers, name, None) is not like:
            raise ValueError(f'Expected "elementwise" or a layer class of Keras. Received: like={like!r}')
        if name not in LAYERS:
            raise ValueError(
                f"`{name}` has no rule itself. Expected a layer class with a rule. Received: like={like!r}"
            )
    if weights is not None:
        _check_roles(weights, dict(config or {}))


def _check_roles(weights: Mapping[str, AxisRoles], config: Mapping[str, str]) -> None:
    """Raises a `ValueError` for a description of weights and configuration that makes no sense."""
    of_weights = {role for axes in weights.values() for role in axes if role is not None}
    roles = of_weights | set(config.values())
    unknown = roles - set(_AXIS_ROLES)
    if unknown:
        raise ValueError(
            f"Expected {', '.join(map(repr, _AXIS_ROLES))} or None along the axes of weights, and the "
            f"first three in `config`. Received: {', '.join(sorted(map(repr, unknown)))}"
        )
    if ("channels" in roles and len(roles) > 1) or not roles <= of_weights:
        raise ValueError(
            'A layer lets channels through ("channels"), or mixes them ("inputs", "units"). Expected either, '
            "and in `config` only what lies along an axis of a weight. "
            f"Received: weights={weights!r}, config={config!r}"
        )
    if "units" in roles and "units" not in config.values():
        raise ValueError(
            "The smaller layer is made from its configuration, with fewer units. Expected the key of their "
            f'number, as in `config={{"units": "units"}}`. Received: config={config or None!r}'
        )
