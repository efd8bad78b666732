"""Small tasks of KerasHub with random weights and vocabularies made by hand."""

import keras
import numpy as np
from helpers import EAGER

TEXTS = ["the cat sat on the mat", "a dog ran fast", "the dog sat", "a slow cat ran"] * 8
LABELS = np.array([0, 1, 0, 1] * 8)
WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran", "fast", "slow"]


def bert_classifier():
    """A BERT text classifier: encoders, and a pooled head."""
    from keras_hub import models

    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *WORDS]
    tokenizer = models.BertTokenizer(vocabulary=words)
    backbone = models.BertBackbone(
        vocabulary_size=len(words),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=12,
    )
    preprocessor = models.BertTextClassifierPreprocessor(tokenizer, sequence_length=12)
    task = settled(models.BertTextClassifier(backbone, num_classes=2, preprocessor=preprocessor))
    task.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy()],
        run_eagerly=EAGER,
    )
    return task


def gpt2_lm():
    """A GPT-2 causal language model."""
    from keras_hub import models

    pieces = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz.", "Ġ", "th", "Ġa"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = models.GPT2Tokenizer(vocabulary=vocabulary, merges=["t h", "Ġ a"])
    backbone = models.GPT2Backbone(
        vocabulary_size=len(pieces),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=24,
    )
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=24)
    task = settled(models.GPT2CausalLM(backbone, preprocessor=preprocessor))
    task.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
        run_eagerly=EAGER,
    )
    return task


def settled(task):
    """The task with random weights of which none is zero, the same ones in each run."""
    random = np.random.default_rng(0)
    for weight in task.weights:
        if "float" in weight.dtype:
            scale = 0.3 if len(weight.shape) > 1 else 0.1
            center = 1.0 if weight.name in ("gamma", "scale") else 0.0
            weight.assign(center + random.normal(0, scale, weight.shape).astype("float32"))
    return task
