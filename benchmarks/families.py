"""What can be reached in families of models, what stays and why, and whether the laws hold there.

    pip install keras-hub
    KERAS_BACKEND=torch python benchmarks/families.py > benchmarks/results/families.md

Networks of `keras.applications` as they are (structure only), backbones of KerasHub at small sizes with
random weights: these are pruned by 20 % where that can be reached, compared with closed gates (law 2), saved
and loaded (law 4), and trained for a step (law 5).
"""

import argparse
import collections
import math
import os
import pathlib
import sys
import tempfile
import time

from common import machine, markdown_table

APPLICATIONS = [
    *("ResNet50", "ResNet50V2", "EfficientNetB0", "EfficientNetV2B0", "MobileNet", "MobileNetV2"),
    *("MobileNetV3Small", "DenseNet121", "VGG16", "Xception", "NASNetMobile", "InceptionV3"),
    *("InceptionResNetV2", "ConvNeXtTiny"),
]
GOAL = 0.2
NUM_REASONS = 2

HEAD = """# Families of models

`KERAS_BACKEND={backend} python benchmarks/families.py`

"Unlocked": the share of the parameters that lie in weights of which a part can go. "Reachable": the share
that can go when every group keeps one channel. Reasons: the most frequent ones why channels stay, with
how many.
"""

HUB = """## KerasHub at small sizes, random weights

The layers as a plain model, so that any width is allowed ([tasks](hub.md) come back as tasks).
Pruned by {goal:.0%}, or by nine tenths of what can be reached. "Law 2": largest difference to the network
with these gates closed, relative to its largest output. "Loaded": the same after saving and loading, "no"
if the file does not load. A train step changes the weights and leaves them finite.
"""


def backbones():
    """Small KerasHub backbones, by name: functions that make one."""
    from keras_hub import models as hub

    image = {"image_shape": (32, 32, 3)}
    text = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
    heads = {**text, "num_heads": 2}
    short = {**heads, "max_sequence_length": 12}
    resnet = {
        **{"input_conv_filters": [64], "input_conv_kernel_sizes": [7], "stackwise_num_blocks": [1, 1]},
        **{"stackwise_num_filters": [64, 128], "stackwise_num_strides": [1, 2], **image},
    }
    csp = {
        **{"stem_filters": 8, "stem_kernel_size": 3, "stem_strides": 1, "stackwise_depth": [1, 2]},
        **{"stackwise_strides": [1, 2], "stackwise_num_filters": [16, 24], "bottle_ratio": [0.5], **image},
        **{"block_ratio": [1.0], "expand_ratio": [2.0]},
    }
    efficient = {
        **{"stackwise_width_coefficients": [1.0] * 2, "stackwise_depth_coefficients": [1.0] * 2},
        **{"stackwise_kernel_sizes": [3, 5], "stackwise_num_repeats": [1, 2], "stackwise_strides": [1, 2]},
        **{"stackwise_input_filters": [16, 16], "stackwise_output_filters": [16, 24]},
        **{"stackwise_expansion_ratios": [1, 4], "stackwise_squeeze_and_excite_ratios": [0.25] * 2},
        **{"stackwise_block_types": ["v1"] * 2, "stackwise_force_input_filters": [0] * 2},
        **{"stackwise_nores_option": [False] * 2, "min_depth": 8, "include_initial_padding": True},
        **{"use_depth_divisor_as_min_depth": False, "cap_round_filter_decrease": True, **image},
        **{"stem_conv_padding": "valid", "dropout": 0.0, "num_features": 32, "input_filters": 16},
        **{"projection_activation": None, "activation": "swish"},
        **{"batch_norm_momentum": 0.9, "batch_norm_epsilon": 1e-5},
    }
    mobile = {
        **{"stackwise_expansion": [[16], [24, 24]], "stackwise_num_blocks": [1, 2], "depthwise_filters": 8},
        **{"stackwise_num_filters": [[8], [16, 16]], "stackwise_kernel_size": [[3], [3, 3]], **image},
        **{"stackwise_num_strides": [[2], [2, 1]], "stackwise_se_ratio": [[0.25], [None, 0.25]]},
        **{"stackwise_activation": [["relu"], ["relu", "hard_swish"]], "stackwise_padding": [[1], [1, 1]]},
        **{"output_num_filters": 32, "input_activation": "hard_swish", "output_activation": "hard_swish"},
        **{"input_num_filters": 8, "depthwise_stride": 1, "depthwise_residual": False},
        **{"squeeze_and_excite": None, "last_layer_filter": 32},
    }
    mit = {
        **{"layerwise_depths": [1, 1], "num_layers": 2, "max_drop_path_rate": 0.1, **image},
        **{"layerwise_num_heads": [1, 2], "layerwise_sr_ratios": [2, 1], "hidden_dims": [8, 16]},
        **{"layerwise_patch_sizes": [7, 3], "layerwise_strides": [4, 2]},
    }
    deep_lab = {
        **{"low_level_feature_key": "P2", "spatial_pyramid_pooling_key": "P3", "projection_filters": 8},
        **{"dilation_rates": [2, 3, 4], "upsampling_size": 2, **image},
    }
    vit = {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, **image}
    xception = {"stackwise_conv_filters": [[8, 8], [16, 16]], "stackwise_pooling": [True, False], **image}
    dense = {"stackwise_num_repeats": [2, 2], "compression_ratio": 0.5, "growth_rate": 8, **image}
    vgg = {"stackwise_num_repeats": [1, 1, 2], "stackwise_num_filters": [8, 16, 16], **image}
    whisper = {
        **heads,
        **{"num_mels": 8, "max_encoder_sequence_length": 8, "max_decoder_sequence_length": 8},
    }
    grouped = {**text, "num_query_heads": 4, "num_key_value_heads": 2}
    return {
        "ResNet": lambda: hub.ResNetBackbone(**resnet, block_type="basic_block"),
        "ResNet, bottleneck": lambda: hub.ResNetBackbone(**resnet, block_type="bottleneck_block"),
        "EfficientNet": lambda: hub.EfficientNetBackbone(**efficient),
        "MobileNet": lambda: hub.MobileNetBackbone(**mobile),
        "DenseNet": lambda: hub.DenseNetBackbone(**dense),
        "CSPNet": lambda: hub.CSPNetBackbone(**csp, block_type="dark_block", stage_type="dark"),
        "VGG": lambda: hub.VGGBackbone(**vgg),
        "Xception": lambda: hub.XceptionBackbone(**xception),
        "ViT": lambda: hub.ViTBackbone(**vit),
        "MiT": lambda: hub.MiTBackbone(**mit),
        "SegFormer": lambda: hub.SegFormerBackbone(hub.MiTBackbone(**mit), projection_filters=8),
        "DeepLabV3": lambda: hub.DeepLabV3Backbone(
            hub.ResNetBackbone(**resnet, block_type="basic_block"), **deep_lab
        ),
        "BERT": lambda: hub.BertBackbone(**short),
        "RoBERTa": lambda: hub.RobertaBackbone(**short),
        "DistilBERT": lambda: hub.DistilBertBackbone(**short),
        "ALBERT": lambda: hub.AlbertBackbone(**short, embedding_dim=8),
        "GPT-2": lambda: hub.GPT2Backbone(**short),
        "Gemma": lambda: hub.GemmaBackbone(**{**grouped, "num_key_value_heads": 1}, head_dim=4),
        "Llama": lambda: hub.LlamaBackbone(**grouped),
        "Mistral": lambda: hub.MistralBackbone(**grouped),
        "Phi-3": lambda: hub.Phi3Backbone(**grouped),
        "Qwen": lambda: hub.QwenBackbone(**grouped),
        "Whisper": lambda: hub.WhisperBackbone(**whisper),
    }


def free(backbone):
    """The layers of a backbone as a plain model: what its configuration can say binds it no longer."""
    import keras

    return keras.Model(backbone.input, backbone.output, name=backbone.name)


def described(model):
    """Cells about what can be reached: parameters, shares, seconds, reasons."""
    import keras_taylor

    start = time.perf_counter()
    analysis = keras_taylor.analyze(model)
    seconds = time.perf_counter() - start
    reasons = collections.Counter()
    for group in analysis.groups:
        if not group.prunable:
            reasons[group.reason.split(" ('")[0]] += group.num_units
    why = "; ".join(f"{reason} ({num})" for reason, num in reasons.most_common(NUM_REASONS))
    shares = [unlocked(model), analysis.reachable["params"]]
    return [f"{model.count_params():,}", *(f"{s:.1%}" for s in shares), f"{seconds:.1f}", why], shares[1]


def unlocked(model):
    """The share of the parameters that lie in weights of which a part can go."""
    from keras_taylor.reading.groups import label_model
    from keras_taylor.rules.base import weight_of

    channels, free, seen = label_model(model), 0, set()
    for call, effect in zip(channels.graph.calls, channels.effects, strict=True):
        if id(call.operation) in seen:
            continue
        seen.add(id(call.operation))
        for name, axes in effect.weights.items():
            weight = weight_of(call.operation, name)
            if weight is not None and any(a is not None and (channels.units_of(a) >= 0).any() for a in axes):
                free += math.prod(weight.shape)
    return free / model.count_params()


def laws(model, reachable):
    """Cells about a pruned model: removed, law 2, loaded, trained."""
    import keras
    import numpy as np

    import keras_taylor
    from keras_taylor.plans.planning import kept_units
    from keras_taylor.reading.groups import label_model
    from keras_taylor.scores.gated_model import GatedModel

    x = random_inputs(model)
    goal = min(GOAL, 0.9 * reachable)
    plan = keras_taylor.make_plan(model, keras_taylor.score(model, criterion="magnitude"), goal)
    small = keras_taylor.prune(model, plan)
    channels = label_model(model)
    gated = GatedModel(channels)
    gated.mask = kept_units(channels, plan)
    given = predicted(small, x)
    law2 = difference(given, predicted(gated, x))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "small.keras"
        try:
            small.save(path)
            loaded = f"{difference(given, predicted(keras.models.load_model(path), x)):.0e}"
        except Exception:  # whatever a class of KerasHub raises
            loaded = "no"
    small.compile(keras.optimizers.SGD(1e-3), "mse")
    targets = keras.tree.map_structure(keras.ops.zeros_like, small(x, training=False))
    before = [np.array(keras.ops.convert_to_numpy(w)) for w in small.trainable_weights]
    small.train_on_batch(x, targets)
    after = [keras.ops.convert_to_numpy(w) for w in small.trainable_weights]
    trained = all(np.isfinite(w).all() for w in after)
    trained = trained and any((a != b).any() for a, b in zip(after, before, strict=True))
    gone = 1 - small.count_params() / model.count_params()
    return [f"{gone:.1%}", f"{law2:.0e}", loaded, "yes" if trained else "no"]


def random_inputs(model):
    """Two examples, in the model's own structure; axes of unknown size are 8."""
    import keras
    import numpy as np

    random = np.random.default_rng(0)

    def values(tensor):
        shape = (2, *(8 if size is None else size for size in tensor.shape[1:]))
        if "int" not in tensor.dtype:
            return random.normal(size=shape).astype("float32")
        if "mask" in tensor.name:
            return np.ones(shape, "int32")
        return random.integers(0, 2 if "segment" in tensor.name else 50, shape).astype("int32")

    return keras.tree.map_structure(values, model._inputs_struct)


def predicted(model, x):
    import keras

    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


def difference(first, second):
    return max(abs(a - b).max() / abs(b).max() for a, b in zip(first, second, strict=True))


def application_rows(names):
    import keras

    for name in names:
        try:
            model = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3))
        except ValueError as error:  # Keras has not all of them on PyTorch
            yield [name, *[""] * 4, str(error).split(". ")[0]]
            continue
        yield [name, *described(model)[0]]


def hub_rows(names):
    import zoo

    for name, make in backbones().items():
        if names and name not in names:
            continue
        try:
            model = zoo.randomized(free(make()))
            cells, reachable = described(model)
            pruned = laws(model, reachable) if reachable > 0.01 else ["-"] * 4
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else ""
            yield [name, *[""] * 8, f"**{type(error).__name__}: {why[:200]}**"]
            continue
        yield [name, *cells[:3], *pruned, *cells[3:]]


def _reported(rows):
    for row in rows:
        print(*row, file=sys.stderr, flush=True)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--applications", nargs="*", default=APPLICATIONS)
    parser.add_argument("--hub", nargs="*", help="names of backbones; none: all")
    arguments = parser.parse_args()
    sys.path[:0] = [str(pathlib.Path(__file__).parent.parent / part) for part in ("", "tests")]
    import keras

    backend = keras.backend.backend()
    print(HEAD.format(backend=backend), machine([backend]), "\n## `keras.applications`\n", sep="\n")
    header = ["network", "parameters", "unlocked", "reachable", "analysis s", "channels stay because"]
    print(markdown_table(header, list(_reported(application_rows(arguments.applications)))), end="\n\n")
    print(HUB.format(goal=GOAL))
    header[4:4] = ["removed", "law 2", "loaded", "trains"]
    print(markdown_table(header, list(_reported(hub_rows(arguments.hub)))))


if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "torch")
    main()
