"""The table of rules, and rules for layers of the user's own (`register_rule`).

One table: the name of a Keras layer or `keras.ops` operation -> its rule. A rule looks at one call
(`base.Context`) and returns a `base.Effect`.
"""

import math

import keras

from keras_taylor.rules import attention, conv, dense, einsum, elementwise, norm, recurrent, shape
from keras_taylor.rules.base import (
    Context,
    Effect,
    LabeledTensor,
    Work,
    count_kept,
    elementwise_work,
    is_from_keras,
    num_elements,
    unknown_operation,
    weight_of,
)

REGISTERED: dict = {}  # class -> rule
_AXES = ("channels", "inputs", "units")


def _time_distributed(ctx):
    """What its layer does to one step; time stays."""
    return recurrent.time_distributed(ctx, rule_for(ctx.operation.layer))


def _spectral_normalization(ctx):
    """At inference it is the layer that it wraps."""
    return recurrent.spectral_normalization(ctx, rule_for(ctx.operation.layer))


def _table(rows):
    return {name: rule for names, rule in rows for name in names.split()}


LAYERS = _table(
    [
        ("Conv1D Conv2D Conv3D", conv.conv),
        ("Conv1DTranspose Conv2DTranspose Conv3DTranspose", conv.conv_transpose),
        ("DepthwiseConv1D DepthwiseConv2D", conv.depthwise),
        ("SeparableConv1D SeparableConv2D", conv.separable),
        ("Dense", dense.dense),
        ("RNN LSTM GRU SimpleRNN ConvLSTM1D ConvLSTM2D ConvLSTM3D", recurrent.recurrent),
        ("Bidirectional", recurrent.bidirectional),
        ("TimeDistributed", _time_distributed),
        ("SpectralNormalization", _spectral_normalization),
        ("EinsumDense", einsum.einsum_dense),
        ("Embedding", dense.embedding),
        ("ReversibleEmbedding", dense.reversible_embedding),
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
        ("Activation", elementwise.activation),
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
            conv.pool_or_resize,
        ),
        (
            "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D CenterCrop",
            conv.pad_or_crop,
        ),
    ]
)

OPERATIONS = _table(
    [
        (
            "Relu Relu6 Sigmoid SparseSigmoid Softplus Softsign SoftShrink SparsePlus Silu "
            "Squareplus LogSigmoid LeakyRelu HardSigmoid HardSilu Elu Selu Gelu Celu TanhShrink "
            "HardTanh HardShrink Threshold Absolute Exp Expm1 Log Log1p Log2 Log10 Negative "
            "Reciprocal Rsqrt Sqrt Square Sin Cos Tan Sinh Cosh Tanh Arctan Arcsinh Sign Floor "
            "Ceil Round Erf Clip NanToNum LogicalNot Isfinite Isinf Isnan OnesLike ZerosLike",
            elementwise.unary,
        ),
        ("Cast SaturateCast StopGradient Copy Identity", elementwise.identity),
        ("Softmax LogSoftmax Sparsemax", elementwise.softmax),
        (
            "Add Subtract Multiply Divide DivideNoNan TrueDivide FloorDivide Power Maximum "
            "Minimum Mod Where Logaddexp Arctan2 Greater GreaterEqual Less LessEqual Equal "
            "NotEqual LogicalAnd LogicalOr LogicalXor BitwiseAnd BitwiseOr",
            elementwise.merge,
        ),
        ("Concatenate", shape.concatenate),
        ("Reshape Ravel", shape.reshape),
        ("Transpose", shape.transpose),
        ("Swapaxes", shape.swapaxes),
        ("ExpandDims", shape.expand_dims),
        ("Squeeze", shape.squeeze),
        ("Mean Max Min Amax Amin Sum Var Std Prod Logsumexp Any All", shape.reduce),
        ("Pad", shape.pad),
        ("Split", shape.split),
        ("GetItem", shape.get_item),
        ("Einsum", einsum.einsum),
        ("Matmul", einsum.matmul),
        ("Dot", einsum.dot),
        ("DotProductAttention", einsum.dot_product_attention),
        ("Repeat", shape.repeat),
        ("Tile", shape.tile),
        ("Roll Flip Cumsum Cumprod", shape.along_axis),
        ("Tril Triu", shape.triangle),
        ("Stack", shape.stack),
        ("Unstack", shape.unstack),
    ]
)


def rule_for(operation):
    """The rule of an operation; `unknown_operation` where there is none.

    Only Keras' own classes have rules, and those that were registered: a user's
    subclass may do anything in `call`.
    """
    own = is_from_keras(type(operation))
    table = LAYERS if isinstance(operation, keras.Layer) else OPERATIONS
    altered = getattr(operation, "quantization_mode", None) or getattr(operation, "lora_enabled", False)
    if type(operation) in REGISTERED and not altered:
        return REGISTERED[type(operation)]
    if altered or not own:
        return unknown_operation
    return table.get(type(operation).__name__, unknown_operation)


def apply_rule(space, call, labels, shapes, positions, rule=None):
    """Applies its rule to one call.

    Args:
        space: `LabelSpace` that collects unions and locks.
        call: Object with `name`, `operation`, `args`, `kwargs`, `flat`, `inputs` and `outputs`, perhaps
            `closed`.
        labels: Label array of every tensor seen so far, by index.
        shapes: Shape of every tensor.
        positions: Where tensors stand among the call's flattened arguments.
        rule: `None`: that of `rule_for`.

    Returns:
        A `base.Effect`.
    """
    context = Context(
        space=space,
        name=call.name,
        operation=call.operation,
        inputs=[LabeledTensor(labels[i], shapes[i]) for i in call.inputs],
        input_positions=positions,
        constants=[None if i in positions else x for i, x in enumerate(call.flat)],
        args=call.args,
        kwargs=call.kwargs,
        output_shapes=[shapes[i] for i in call.outputs],
        closed=getattr(call, "closed", None),
    )
    return (rule or rule_for(call.operation))(context)


def register_rule(layer_class, rule=None, *, like=None, weights=None, config=None, axis=-1):
    """Says what a layer class of your own does to channels, so that they can leave.

    A rule holds for the class itself, not for its subclasses. When a model with such a
    layer is read, the rule is tried on a copy of the layer with random weights and inputs:
    without some channels, it must put out the same for those that stay.

    Args:
        layer_class: A subclass of `keras.Layer`, with a `get_config`.
        rule: A function from a `rules.base.Context` to a `rules.base.Effect`, for what
            the other arguments cannot say. Without any of them, a decorator for one.
        like: `"elementwise"`: each value that comes out depends on the value at the same
            place only. Or a Keras layer class that does the same, with weights and
            configuration of the same names.
        weights: For each weight (attribute, or path as "projection.kernel") what lies along each of its axes:
            `"channels"`, those that go through the layer; `"inputs"` and `"units"` of a
            layer that mixes channels; or `None`.
        config: For each configuration value that is such a number: which.
        axis: The axis of the channels.

    Returns:
        `layer_class`; a decorator where nothing was said of it.

    Raises:
        ValueError: for what is no such class, or does not fit together. A rule that does
            not hold is refused when a model is read.

    Example:

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

    A layer with a kernel: `register_rule(Mix, weights={"kernel": ("inputs", "units")},
    config={"width": "units"})`. One without weights: `register_rule(Swish, like="elementwise")`.
    """
    _check(layer_class, rule, like, weights, config)
    if rule is None and like is None and weights is None:
        return lambda function: _register(layer_class, function) and function
    if like is not None:
        rule = elementwise.unary if like == "elementwise" else _of_keras(like)
    elif weights is not None:
        rule = _described(dict(weights), dict(config or {}), axis)
    return _register(layer_class, rule)


def _register(layer_class, rule):
    REGISTERED[layer_class] = rule
    return layer_class


def _of_keras(layer_class):

    return LAYERS[layer_class.__name__]


def _described(weights, config, axis):
    """The rule that follows from what lies along the axes of weights."""
    names = {name for axes in weights.values() for name in axes}

    def rule(ctx):
        tensor = ctx.inputs[0]
        if len(ctx.inputs) > 1 or len(ctx.output_shapes) > 1:
            return unknown_operation(ctx)
        if names <= {"channels", None}:
            labels = {"channels": tensor.labels_along(axis)}
            outputs, reads = tensor.labels, {}
            work = elementwise_work(outputs, ctx.output_shapes[0])
        else:
            labels = {"inputs": ctx.input_labels(0, axis)}
            outputs, reads = ctx.fixed_labels(), {0: axis % tensor.rank}
            if "units" in names:
                labels["units"] = ctx.new_labels(ctx.output_shapes[0][axis])
                outputs = ctx.output_labels(labels["units"], axis)
            work = _products(ctx, weights, labels, axis)
        return Effect(
            outputs=[outputs],
            weights={
                name: tuple(None if a is None else labels[a] for a in axes) for name, axes in weights.items()
            },
            config={key: count_kept(labels[what]) for key, what in config.items()},
            reads=reads,
            work=work,
        )

    rule.__doc__ = "What its weights say."
    return rule


def _products(ctx, weights, labels, axis):
    """A multiplication and an addition for each value of a kernel, at every place."""
    shape = ctx.output_shapes[0]
    places = num_elements(shape, (axis % len(shape),))
    work = []
    for name, axes in weights.items():
        kernel = weight_of(ctx.operation, name)
        if kernel is not None and "inputs" in axes:
            rest = math.prod(d for d, a in zip(kernel.shape, axes, strict=True) if a is None)
            work.append(Work(2.0 * places * rest, tuple(labels[a] for a in axes if a is not None)))
    return tuple(work)


def _check(layer_class, rule, like, weights, config):
    own = isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)
    if not own or layer_class.__module__.split(".")[0] == "keras":
        raise ValueError(
            "A rule is registered for a layer class of your own. Expected a subclass of `keras.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    given = [k for k, v in {"rule": rule, "like": like, "weights": weights}.items() if v is not None]
    if len(given) > 1 or (config and weights is None):
        raise ValueError(
            "Expected one of `rule`, `like` and `weights`, and `config` beside `weights` only. "
            f"Received: {', '.join(given + ['config'] * bool(config))}"
        )
    if rule is not None and not callable(rule):
        raise ValueError(f"Expected a function from a Context to an Effect. Received: rule={rule!r}")
    if like is not None and like != "elementwise":
        if not (isinstance(like, type) and getattr(keras.layers, like.__name__, None) is like):
            raise ValueError(f'Expected "elementwise" or a layer class of Keras. Received: like={like!r}')
        if like.__name__ not in LAYERS:
            raise ValueError(f"`{like.__name__}` has no rule itself. Received: like={like!r}")
    names = {name for axes in (weights or {}).values() for name in axes} - {None}
    unknown = (names | set((config or {}).values())) - set(_AXES)
    if unknown:
        raise ValueError(
            f"Expected {', '.join(repr(a) for a in _AXES)} or None along the axes of weights, and the "
            f"first three in `config`. Received: {', '.join(sorted(map(repr, unknown)))}"
        )
    used = names | set((config or {}).values())
    if weights is not None and (("channels" in used and len(used) > 1) or not used <= names):
        raise ValueError(
            'Channels go through a layer ("channels"), or are mixed by it ("inputs", "units"). Expected '
            "either, and `config` to speak of what weights have. "
            f"Received: weights={weights!r}, config={config!r}"
        )
    if "units" in names and "units" not in (config or {}).values():
        raise ValueError(
            "A layer is made again with fewer units from its configuration. Expected the key that says "
            f'how many it has, as in `config={{"units": "units"}}`. Received: config={config!r}'
        )
