"""Tasks of KerasHub: what comes back, what can go, how long it takes; small sizes, random weights.

pip install "keras-taylor[hub]"
KERAS_BACKEND=torch python benchmarks/hub.py > benchmarks/results/hub.md
"""

import argparse
import io
import os
import pathlib
import sys
import tempfile
import time
import warnings

import families
from common import machine, markdown_table

GOAL = 0.15
TEXTS = ["the cat sat on the mat", "a dog ran fast", "the dog sat", "a slow cat ran"] * 4
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran", "fast", "slow"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"

HEAD = """# Tasks of KerasHub

`KERAS_BACKEND={backend} python benchmarks/hub.py`

Small configurations, random weights, raw data in: texts, or images of 40 x 48. Each task is pruned by
{goal:.0%} of its parameters, or by nine tenths of what can go. "Can go": the share of the parameters
that can leave, and with `exact=False`. "Comes back as": the class of the result, and that of its
backbone if it is another one than before. "Masked": the largest difference to the predictions of the
original whose units were set to zero, relative to the largest prediction. "Preset": the same after
`save_to_preset` and `from_preset`. "Generates": whether the greedy tokens are those of the masked
original. Seconds are those of the first call.
"""
HEADER = ["task", "parameters", "can go", "`exact=False`", "removed", "comes back as", "masked", "preset"]
HEADER += ["generates", "analyze s", "score s", "prune s"]


def tasks():
    """Functions that make a task and its data, by the name of the task's class."""
    from keras_hub import models as hub

    made = {}
    for name in ("ResNet", "MobileNet", "EfficientNet", "ViT", "CSPNet", "DenseNet"):
        made[f"{name}ImageClassifier"] = lambda name=name: image_classifier(hub, name)
    made["DeepLabV3ImageSegmenter"] = lambda: image_segmenter(hub)
    for name, backbone in (("Bert", "BERT"), ("Roberta", "RoBERTa"), ("DistilBert", "DistilBERT")):
        made[f"{name}TextClassifier"] = lambda name=name, backbone=backbone: text_classifier(
            hub, name, backbone
        )
    for name, backbone in (("GPT2", "GPT-2"), ("Llama", "Llama"), ("Gemma", "Gemma"), ("Mistral", "Mistral")):
        made[f"{name}CausalLM"] = lambda name=name, backbone=backbone: causal_lm(hub, name, backbone)
    made["BartSeq2SeqLM"] = lambda: seq_2_seq_lm(hub)
    return made


def images(num_outputs):
    import numpy as np

    random = np.random.default_rng(0)
    return random.integers(0, 255, (16, 40, 48, 3)).astype("uint8"), random.integers(0, num_outputs, 16)


def image_classifier(hub, name):
    backbone = families.backbones()[name]()
    preprocessor = getattr(hub, f"{name}ImageClassifierPreprocessor")(image_converter(hub))
    task = getattr(hub, f"{name}ImageClassifier")(backbone, num_classes=3, preprocessor=preprocessor)
    return task, images(3)


def image_converter(hub):
    import keras_hub

    return keras_hub.layers.ImageConverter(image_size=(32, 32), scale=1 / 255.0)


def image_segmenter(hub):
    import numpy as np

    backbone = families.backbones()["DeepLabV3"]()
    preprocessor = hub.DeepLabV3ImageSegmenterPreprocessor(image_converter(hub), resize_output_mask=True)
    task = hub.DeepLabV3ImageSegmenter(backbone, num_classes=3, preprocessor=preprocessor)
    masks = np.eye(3, dtype="float32")[np.random.default_rng(1).integers(0, 3, (16, 40, 48))]
    return task, (images(3)[0], masks)


def bytes_vocabulary(special):
    """A vocabulary of letters for tokenizers of byte pairs, and its merges."""
    pieces = [*special, *LETTERS, "Ġ", "th", "Ġa"]
    return {piece: number for number, piece in enumerate(pieces)}, ["t h", "Ġ a"]


def sentence_pieces(start, end):
    """A tokenizer model for sentence pieces, trained on a few sentences."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        minloglevel=2,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece=end,
        bos_piece=start,
        unk_piece="<unk>",
    )
    return model.getvalue()


def text_classifier(hub, name, backbone):
    import numpy as np

    if name == "Roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = hub.RobertaTokenizer(*bytes_vocabulary(special))
    else:
        vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *WORDS]
        tokenizer = getattr(hub, f"{name}Tokenizer")(vocabulary)
    preprocessor = getattr(hub, f"{name}TextClassifierPreprocessor")(tokenizer, sequence_length=12)
    task_class = getattr(hub, f"{name}TextClassifier")
    return task_class(families.backbones()[backbone](), num_classes=2, preprocessor=preprocessor), (
        TEXTS,
        np.array([0, 1, 0, 1] * 4),
    )


def causal_lm(hub, name, backbone):
    if name == "GPT2":
        tokenizer = hub.GPT2Tokenizer(*bytes_vocabulary(["<|endoftext|>"]))
    else:
        edges = ("<bos>", "<eos>") if name == "Gemma" else ("<s>", "</s>")
        tokenizer = getattr(hub, f"{name}Tokenizer")(sentence_pieces(*edges))
    preprocessor = getattr(hub, f"{name}CausalLMPreprocessor")(tokenizer, sequence_length=12)
    made = families.backbones()[backbone]()
    made = type(made).from_config({**made.get_config(), "vocabulary_size": tokenizer.vocabulary_size()})
    task = getattr(hub, f"{name}CausalLM")(made, preprocessor=preprocessor)
    task.compile(sampler="greedy")
    return task, TEXTS


def seq_2_seq_lm(hub):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = hub.BartTokenizer(*bytes_vocabulary(special))
    preprocessor = hub.BartSeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=12, decoder_sequence_length=12
    )
    backbone = hub.BartBackbone(
        vocabulary_size=50,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
    )
    task = hub.BartSeq2SeqLM(backbone, preprocessor=preprocessor)
    task.compile(sampler="greedy")
    return task, {"encoder_text": TEXTS, "decoder_text": TEXTS}


def masked(task, plan):
    """A copy of a task in which all that belongs to the units of a plan is zero."""
    import keras
    import numpy as np

    import keras_taylor
    from keras_taylor.plans.planning import kept_units
    from keras_taylor.reading.groups import label_model
    from keras_taylor.rules.base import weight_of

    copy = keras_taylor.prune(task, keras_taylor.Plan())
    labeled, kept = label_model(copy, exact=plan.exact), kept_units(label_model(task, exact=plan.exact), plan)
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        for name, axes in effect.weights.items():
            weight = weight_of(call.operation, name)
            if weight is None:
                continue
            values = np.array(keras.ops.convert_to_numpy(weight))
            for axis, labels in enumerate(axes):
                if labels is not None:
                    open_entries = labeled.kept_mask(labels.reshape(-1), kept)
                    values *= open_entries.reshape([-1 if a == axis else 1 for a in range(values.ndim)])
            weight.assign(values)
    return copy


def timed(function, *arguments, **keywords):
    start = time.perf_counter()
    result = function(*arguments, **keywords)
    return result, time.perf_counter() - start


def row(name, make):
    """The cells of one task."""
    import zoo

    import keras_taylor

    task, data = make()
    zoo.randomized(task.backbone)
    x = data[0] if isinstance(data, tuple) else data
    analysis, analyze_s = timed(keras_taylor.analyze, task)
    reachable = analysis.reachable["params"]
    inexact = keras_taylor.analyze(task, exact=False).reachable["params"]
    scores, score_s = timed(keras_taylor.score, task, data)
    plan = keras_taylor.make_plan(task, scores, min(GOAL, 0.9 * reachable))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small, prune_s = timed(keras_taylor.prune, task, plan)
    whole = masked(task, plan)
    given = predicted(small, x)
    kept = type(small).__name__
    if type(small.backbone) is not type(task.backbone):
        kept += f" over {type(small.backbone).__name__}"
    law2 = families.difference(given, predicted(whole, x))
    return [
        *(name, f"{task.count_params():,}", f"{reachable:.1%}", f"{inexact:.1%}"),
        f"{1 - small.count_params() / task.count_params():.1%}",
        *(kept, f"{law2:.0e}", preset_difference(small, x, given), generated(small, whole)),
        *(f"{seconds:.1f}" for seconds in (analyze_s, score_s, prune_s)),
    ]


def predicted(task, x):
    import keras

    return keras.tree.flatten(task.predict(x, verbose=0))


def preset_difference(small, x, given):
    """How far the predictions of a task are from `given` after it was saved as a preset and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            small.save_to_preset(folder)
            loaded = type(small).from_preset(folder)
            for name in ("encoder_sequence_length", "decoder_sequence_length"):  # presets leave these out
                if hasattr(small.preprocessor, name):
                    setattr(loaded.preprocessor, name, getattr(small.preprocessor, name))
            return f"{families.difference(given, predicted(loaded, x)):.0e}"
        except Exception as error:
            print(f"preset: {type(error).__name__}: {error}", file=sys.stderr)
            return f"**{type(error).__name__}**"


def generated(small, whole):
    """Whether two tasks generate the same texts, "" if they generate none."""
    if not hasattr(small, "generate"):
        return ""
    prompts = ["the c", "a d", "dog"]
    made = [task.generate(prompts, max_length=12, stop_token_ids=None) for task in (small, whole)]
    return "equal" if list(made[0]) == list(made[1]) else "**other**"


def rows(names):
    for name, make in tasks().items():
        if names and name not in names:
            continue
        try:
            cells = row(name, make)
        except Exception as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else ""
            cells = [name, f"**{type(error).__name__}: {why[:200]}**", *[""] * (len(HEADER) - 2)]
            if names:
                raise
        print(*cells, file=sys.stderr, flush=True)
        yield cells


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names of task classes; none: all")
    arguments = parser.parse_args()
    sys.path[:0] = [str(pathlib.Path(__file__).parent.parent / part) for part in ("", "tests")]
    import keras

    backend = keras.backend.backend()
    print(HEAD.format(backend=backend, goal=GOAL), machine([backend]), "", sep="\n")
    print(markdown_table(HEADER, list(rows(arguments.names))))


if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "torch")
    main()
