"""A small GPT-2 that has learned Python's documentation letter by letter: perplexity after pruning.

    pip install "keras-taylor[hub]"
    KERAS_BACKEND=torch python benchmarks/language_model.py FOLDER > benchmarks/results/language_model.md

The texts are the documentation strings of the standard library; every tenth module is held out.
"""

import argparse
import importlib
import inspect
import os
import pathlib
import sys
import time
import warnings

import numpy as np
from common import BACKENDS, in_process, machine, markdown_table, on_each_backend

WIDTH, NUM_LAYERS, LENGTH, BATCH_SIZE = 96, 4, 96, 32
LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĠĠ"]  # as GPT-2 writes a space and a new line

HEAD = """# A language model

`KERAS_BACKEND={backend} python benchmarks/language_model.py FOLDER --steps {steps}`

A `GPT2CausalLM` of KerasHub, {layers} layers of width {width}, trained from scratch for {steps} steps of
{batch} x {length} letters on the documentation strings of Python's standard library ({train:,} letters);
perplexity of a letter on those of modules that it has not seen ({test:,} letters). "Fine-tuned": {tuned}
steps more, a fifth of its training. "Free": `Selection(uniform=False)`: each block has a width of its own,
and the task comes back as a plain Functional model. "Blocks": `Selection(branches=True)`: whole blocks may
leave, too. "Depth": nothing but whole blocks may leave. "Comes back": the class of the result and the layers
of its backbone.
Before: perplexity {before:.2f}, {params:,} parameters.
"""


def texts():
    """Documentation strings of the standard library for training, and those of other modules for judging."""
    parts = {True: [], False: []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, name in enumerate(sorted(sys.stdlib_module_names)):
            if name.startswith("_") or name in ("antigravity", "this", "idlelib", "turtledemo"):
                continue
            try:
                module = importlib.import_module(name)
            except ImportError:  # of another operating system
                continue
            things = [module, *vars(module).values()]
            things += [part for one in things if inspect.isclass(one) for part in vars(one).values()]
            for one in things:
                said = getattr(one, "__doc__", None)
                if isinstance(said, str) and getattr(one, "__module__", name) == name:
                    parts[number % 10 == 0].append(inspect.cleandoc(said))
    return tuple(_pieces("\n\n".join(dict.fromkeys(parts[held_out]))) for held_out in (False, True))


def _pieces(text):
    """Pieces of equal length, in ASCII."""
    text = "".join(letter for letter in text if letter == "\n" or " " <= letter <= "~")
    return [text[start : start + LENGTH] for start in range(0, len(text) - LENGTH, LENGTH)]


def new_task():
    """The task, not trained."""
    from keras_hub import models

    pieces = ["<|endoftext|>", *LETTERS]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = models.GPT2Tokenizer(vocabulary=vocabulary, merges=["Ġ Ġ"])
    backbone = models.GPT2Backbone(
        vocabulary_size=len(pieces),
        num_layers=NUM_LAYERS,
        num_heads=4,
        hidden_dim=WIDTH,
        intermediate_dim=4 * WIDTH,
        dropout=0.0,
        max_sequence_length=LENGTH,
    )
    preprocessor = models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
    return models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def compiled(task, rate=1e-3, num_steps=None):
    """The task with Adam, at a constant rate or with one cycle over so many steps."""
    import keras

    if num_steps:
        rise = num_steps // 10
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, num_steps - rise, warmup_target=rate, warmup_steps=max(rise, 1)
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sampler = {"sampler": "greedy"} if hasattr(task, "generate") else {}
    task.compile(keras.optimizers.Adam(rate), loss=loss, weighted_metrics=[], **sampler)
    return task


def perplexity(task, held_out):
    """Of a letter."""
    return float(np.exp(compiled(task).evaluate(held_out, batch_size=BATCH_SIZE, verbose=0)))


def trained(task, train, num_steps, rate):
    """The task after so many steps on pieces drawn without replacement."""
    order = np.random.default_rng(0)
    chosen = np.concatenate(
        [order.permutation(len(train)) for _ in range(num_steps * BATCH_SIZE // len(train) + 1)]
    )
    chosen = [train[k] for k in chosen[: num_steps * BATCH_SIZE]]
    compiled(task, rate, num_steps).fit(chosen, batch_size=BATCH_SIZE, epochs=1, verbose=0)
    return task


def row(task, how, goal, train, held_out, num_steps):
    """Perplexity of a task that lost units: cut, repaired, fine-tuned."""
    import keras_taylor

    selection = keras_taylor.Selection(
        uniform=False if how == "free" else None, branches=how in ("blocks", "depth")
    )
    include = [r".*transformer_layer_\d+"] if how == "depth" else None
    start = time.perf_counter()
    sample = train[:: len(train) // 1024][:1024]
    scores = keras_taylor.score(compiled(task), sample, branches=selection.branches, include=include)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = keras_taylor.make_plan(task, scores, goal, selection=selection, include=include)
        cut = keras_taylor.prune(task, plan)
        repaired = keras_taylor.repair(cut, task, plan, sample)
    seconds = time.perf_counter() - start
    values = [perplexity(cut, held_out), perplexity(repaired, held_out)]
    values.append(perplexity(trained(repaired, train, num_steps, 5e-4), held_out))
    gone = 1 - repaired.count_params() / task.count_params()
    print(how, goal, values, file=sys.stderr, flush=True)
    layers = getattr(getattr(repaired, "backbone", None), "num_layers", "")
    back = f"{type(repaired).__name__} {layers}".strip()
    return repaired, [how, back, f"{gone:.1%}", *(f"{one:.2f}" for one in values), f"{seconds:.0f}"]


def measure(folder, names):
    """Tokens in a second that tasks in a folder generate, greedily, compiled, the best of three."""
    import keras_hub

    found = {}
    for name in names:
        task = keras_hub.models.CausalLM.from_preset(os.path.join(folder, name))
        task.compile(sampler="greedy")
        prompts = ["Return the "] * 16
        task.generate(prompts, stop_token_ids=None)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            task.generate(prompts, stop_token_ids=None)
            seconds.append(time.perf_counter() - start)
        found[name] = len(prompts) * (LENGTH - len(prompts[0])) / min(seconds)
    return found


def main():
    if in_process(measure, sys.argv):
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="where tasks are kept as presets")
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--goals", type=float, nargs="+", default=[0.3, 0.5])
    options = parser.parse_args()
    import keras
    from keras_hub import models

    train, held_out = texts()
    held_out = held_out[:: len(held_out) // 512][:512]
    place = options.folder / "given"
    if not place.exists():
        keras.utils.set_random_seed(0)
        trained(new_task(), train, options.steps, 3e-3).save_to_preset(str(place))
    task = models.CausalLM.from_preset(str(place))
    before, tuned = perplexity(task, held_out), options.steps // 5
    print("before", before, file=sys.stderr, flush=True)
    rows, names = [], ["given"]
    for goal in options.goals:
        for how in ("uniform", "free", "blocks", "depth"):
            small, cells = row(task, how, goal, train, held_out, tuned)
            rows.append([f"{goal:.0%}", *cells])
            if how in ("uniform", "depth"):
                names.append(f"-{goal:.0%}, {how}".replace("%", " %"))
                small.save_to_preset(str(options.folder / names[-1]))
    print(
        HEAD.format(
            backend=keras.backend.backend(),
            **{"steps": options.steps, "layers": NUM_LAYERS, "width": WIDTH, "batch": BATCH_SIZE},
            **{"length": LENGTH, "train": LENGTH * len(train), "test": LENGTH * len(held_out)},
            **{"tuned": tuned, "before": before, "params": task.count_params()},
        )
    )
    print(machine([keras.backend.backend()]), end="\n\n")
    header = [
        "goal",
        "widths",
        "comes back",
        "parameters gone",
        "cut",
        "repaired",
        "fine-tuned",
        "score to repair, s",
    ]
    print(markdown_table(header, rows))
    print("\nLetters generated in a second, greedy, 16 prompts at once, one process a backend:\n")
    found = on_each_backend(__file__, BACKENDS, folder=str(options.folder), names=names)
    cells = [[backend, *(f"{values[name]:,.0f}" for name in names)] for backend, values in found.items()]
    print(markdown_table(["backend", *names], cells))


if __name__ == "__main__":
    main()
