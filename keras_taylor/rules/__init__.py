"""What each kind of layer does to channels, and how it shrinks.

One table: the name of a Keras layer or `keras.ops` operation -> its rule. A rule
looks at one call (`base.Context`) and returns a `base.Effect`.
"""

import keras

from keras_taylor.rules import (
    along,
    attending,
    conv,
    dense,
    einsum,
    elementwise,
    embedding,
    norm,
    products,
    recurrent,
    shape,
)
from keras_taylor.rules.base import Context, Tensor, is_keras_own
from keras_taylor.rules.registry import REGISTERED


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
        ("Embedding", embedding.embedding),
        ("ReversibleEmbedding", embedding.reversible_embedding),
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
        ("Dot", products.dot),
        ("Attention AdditiveAttention", attending.attention),
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
            norm.spatial,
        ),
        (
            "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D CenterCrop",
            norm.moved,
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
        ("Repeat", along.repeat),
        ("Tile", along.tile),
        ("Roll Flip Cumsum Cumprod", along.beside),
        ("Tril Triu", along.triangle),
        ("Stack", along.stack),
        ("Unstack", along.unstack),
    ]
)


def rule_for(operation):
    """The rule of an operation; `elementwise.unknown` where there is none.

    Only Keras' own classes have rules, and those that were registered: a user's
    subclass may do anything in `call`.
    """
    own = is_keras_own(type(operation))
    table = LAYERS if isinstance(operation, keras.Layer) else OPERATIONS
    altered = getattr(operation, "quantization_mode", None) or getattr(operation, "lora_enabled", False)
    if type(operation) in REGISTERED and not altered:
        return REGISTERED[type(operation)]
    if altered or not own:
        return elementwise.unknown
    return table.get(type(operation).__name__, elementwise.unknown)


def apply(space, call, labels, shapes, positions, rule=None):
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
        inputs=[Tensor(labels[i], shapes[i]) for i in call.inputs],
        positions=positions,
        arguments=[None if i in positions else x for i, x in enumerate(call.flat)],
        args=call.args,
        kwargs=call.kwargs,
        output_shapes=[shapes[i] for i in call.outputs],
        closed=getattr(call, "closed", None),
    )
    return (rule or rule_for(call.operation))(context)
