"""The command `keras-taylor`."""

import dataclasses
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import sys
from typing import Annotated

import keras
import typer
from rich.console import Console

import keras_taylor
from keras_taylor.budget.goals import goal_of_texts
from keras_taylor.cli.loading import FileError, compiled_for, load_data, load_model
from keras_taylor.cli.options import (
    Backend,
    Data,
    DivideBy,
    Exclude,
    Force,
    Goal,
    Html,
    Imports,
    Inexact,
    Json,
    Mean,
    Model,
    RoundTo,
    Std,
    Trust,
    multiple_of,
)
from keras_taylor.cli.outputs import picture_path, stop_paths, writable, write, write_text
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.reports.report import Info

BACKENDS = ("tensorflow", "jax", "torch")

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)


@app.command(epilog="Example: keras-taylor analyze model.keras --data images/ --plot sensitivity.png")
def analyze(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="As of `compress`: also measure the loss of the training part as a growing share of each "
            "group of channels goes.",
            show_default=False,
        ),
    ] = "",
    divide_by: DivideBy = 1.0,
    mean: Mean = "",
    std: Std = "",
    num_examples: Annotated[int, typer.Option(help="Measure on so many examples; 0: all.")] = 512,
    criterion: Annotated[
        str | None, typer.Option(help="What orders the channels of a group; else taylor.")
    ] = None,
    plot: Annotated[
        str, typer.Option(help="With --data: draw it, a .png, .svg or .pdf file.", show_default=False)
    ] = "",
    exclude: Exclude = None,
    inexact: Inexact = False,
    force: Force = False,
    trust: Trust = False,
    modules: Imports = None,
    as_json: Json = False,
    backend: Backend = "",
):
    """Say which channels could go, which stay, and why; with data, what the loss of each group does."""
    path = picture_path(plot, data, force)
    loaded, train = _model(model, trust, modules), None
    if data:
        train, _ = load_data(data, loaded, divide_by=divide_by, mean=_numbers(mean), std=_numbers(std))
        loaded = compiled_for(loaded, train[1])
    analysis = keras_taylor.analyze(
        *(loaded, train),
        exclude=exclude or (),
        exact=not inexact,
        criterion=criterion,
        num_examples=num_examples or None,
        verbose=0 if as_json else "auto",
    )
    if path:
        write(path, analysis.plot)
    if as_json:
        _print_json(
            costs=analysis.costs,
            reachable=analysis.reachable,
            groups=[dataclasses.asdict(group) for group in analysis.groups],
            unknown=analysis.unknown,
            sensitivity=analysis.sensitivity and analysis.sensitivity.to_dict(),
        )
    else:
        print(analysis)
        if path:
            print(f"written: {path}")


@app.command(
    epilog="Example: keras-taylor compress model.keras --data images/ --goal 0.4 --epochs 2 -o small.keras "
    "--export litert-int8 --report report.html"
)
def compress(
    model: Model,
    data: Data,
    output: Annotated[
        str, typer.Option("--output", "-o", help="The .keras file to write.", show_default=False)
    ],
    goal: Goal = None,
    increment: Annotated[float, typer.Option(help="The fraction removed a round.")] = 0.1,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning a round; 0: none.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Examples a batch.")] = 32,
    learning_rate: Annotated[
        float,
        typer.Option(help="Else the model's own or 0.001; a tenth after a repair."),
    ] = 0.0,
    criterion: Annotated[
        str | None, typer.Option(help="What makes a channel important; else it depends on the model.")
    ] = None,
    exclude: Exclude = None,
    inexact: Inexact = False,
    round_to: RoundTo = "1",
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Refit the layers that lost inputs after each cut.")
    ] = True,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Undo the round after which the test accuracy is worse by more than this, and end."
        ),
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Fine-tune with the given model as the teacher.")
    ] = False,
    divide_by: DivideBy = 1.0,
    mean: Mean = "",
    std: Std = "",
    export: Annotated[list[str] | None, typer.Option(help=f"Also write {', '.join(VARIANTS)}.")] = None,
    report: Html = "",
    resume: Annotated[str, typer.Option(help="A folder for the state: a killed run goes on from it.")] = "",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    force: Force = False,
    trust: Trust = False,
    modules: Imports = None,
    as_json: Json = False,
    backend: Backend = "",
):
    """Make a trained model smaller: score, prune, fine-tune, round by round."""
    target = writable(output, force, ".keras")
    exports = [(name, writable(_beside(target, name), force)) for name in map(_checked_format, export or ())]
    page = writable(report, force, ".html") if report else None
    wanted = goal_of_texts(goal or ["0.3"])
    stops = stop_paths(target, wanted, force)
    keras.utils.set_random_seed(seed)
    original = _model(model, trust, modules)
    train, test = load_data(data, original, divide_by=divide_by, mean=_numbers(mean), std=_numbers(std))
    original = compiled_for(original, train[1])
    models, info = keras_taylor.compress(
        original,
        train,
        wanted,
        increment=increment,
        criterion=criterion,
        exclude=exclude or (),
        exact=not inexact,
        round_to=multiple_of(round_to),
        repair=repair,
        learning_rate=learning_rate or None,
        max_drop=max_drop,
        distill=distill,
        epochs=epochs,
        batch_size=batch_size,
        validation_data=test,
        backup_dir=resume or None,
        verbose=0 if as_json else "auto",
        return_info=True,
    )
    info.command = " ".join(["keras-taylor", *sys.argv[1:]])
    *between, small = models if stops else [models]
    written = [*stops[: len(between)], target]
    for path, one in zip(written, [*between, small], strict=True):
        write(path, one.save)
    if exports:
        made = [
            _exported(one, where, name, train, test, force)
            for name, path in exports
            for one, where in ((original, path.with_name(f"original-{path.name}")), (small, path))
        ]
        made = keras_taylor.measure_artifacts(made)  # in turn, so that latencies can be compared
        info.artifacts = {"before": made[::2], "after": made[1::2]}
    if page:
        write_text(page, info.to_html())
    write_text(target.with_suffix(".json"), info.to_json())
    if as_json:
        print(info.to_json())
    else:
        print(info)
        print(f"written: {', '.join(str(p) for p in (*written, target.with_suffix('.json'), page) if p)}")


@app.command(
    epilog="Example: keras-taylor export small.keras --format litert-int8 --data images/ -o small.tflite "
    "--batch-size 1 --int8-io --max-kib 128 --max-arena-kib 64"
)
def export(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="What to write.", show_default=False)],
    format: Annotated[str, typer.Option(help=", ".join(VARIANTS))] = "litert",
    data: Annotated[
        str, typer.Option(help="As of `compress`; needed for litert-int8.", show_default=False)
    ] = "",
    divide_by: DivideBy = 1.0,
    mean: Mean = "",
    std: Std = "",
    batch_size: Annotated[int, typer.Option(help="Examples a call, fixed; 0: any number.")] = 0,
    int8_io: Annotated[bool, typer.Option("--int8-io", help="litert-int8: integers in and out.")] = False,
    max_kib: Annotated[float, typer.Option(help="Refuse a larger file (flash), in KiB; 0: any.")] = 0.0,
    max_arena_kib: Annotated[
        float, typer.Option(help="LiteRT: refuse a larger tensor arena (RAM), in KiB; 0: any.")
    ] = 0.0,
    force: Force = False,
    trust: Trust = False,
    modules: Imports = None,
    as_json: Json = False,
    backend: Backend = "",
):
    """Write a model for inference elsewhere; what was written is run, compared and measured."""
    path = writable(output, force, VARIANTS[_checked_format(format)].suffix)
    loaded = _model(model, trust, modules)
    train = test = None
    if data:
        train, test = load_data(data, loaded, divide_by=divide_by, mean=_numbers(mean), std=_numbers(std))
    elif format == "litert-int8":
        raise FileError("litert-int8 is calibrated on examples: pass --data.")
    artifact = _exported(
        *(loaded, path, format, train, test, force),
        batch_size=batch_size or None,
        int8_io=int8_io,
        max_bytes=_bytes(max_kib),
        max_arena_bytes=_bytes(max_arena_kib),
    )
    print(artifact.to_json() if as_json else artifact)


@app.command(epilog="Example: keras-taylor report small.json -o report.html")
def report(
    info: Annotated[str, typer.Argument(help="The .json file that `compress` wrote.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The HTML file to write; else a table is printed.")
    ] = "",
    force: Force = False,
    backend: Backend = "",
):
    """Show what a run did: a table, or one HTML page."""
    path = pathlib.Path(info)
    if not path.is_file():
        raise FileError(f"There is no file '{path}'. Pass the .json file that `compress` wrote.")
    page = writable(output, force, ".html") if output else None
    done = Info.from_json(path.read_text("utf-8"))
    if page:
        write_text(page, done.to_html())
        print(f"written: {page}")
    else:
        print(done)


@app.command(epilog="Example: keras-taylor demo --backend jax")
def demo(
    goal: Goal = None,
    report: Html = "",
    force: Force = False,
    backend: Backend = "",
):
    """Train a small network on real handwritten digits, and make it smaller: about a minute."""
    from keras_taylor.cli.demo import small_network

    page = writable(report, force, ".html") if report else None
    wanted = goal_of_texts(goal or ["0.3"])
    keras.utils.set_random_seed(0)
    model = small_network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    train, test = load_data("digits", model)
    print("training a network on 1,438 handwritten digits")
    model.fit(*train, epochs=15, batch_size=64, verbose=0)
    _, info = keras_taylor.compress(
        model, train, wanted, increment=0.1, epochs=2, batch_size=64, validation_data=test, return_info=True
    )
    info.command = " ".join(["keras-taylor", *sys.argv[1:]])
    print(info)
    if page:
        write_text(page, info.to_html())
        print(f"written: {page}")


def main():
    """The command `keras-taylor`: every failure that a user can mend is one line, and exit code 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Keras' remarks on old model files
    _start_on_backend()
    try:
        app(standalone_mode=True)
    except keras_taylor.CompressionInterrupted as interrupt:
        _fail(f"{interrupt}. With --resume the same command goes on.", 130)
    except (ValueError, TypeError, ImportError, OSError, keras_taylor.ExportError) as error:
        _fail(" ".join(str(error).split()), 1)


def _start_on_backend():
    """Keras takes its backend from the environment when it is imported, which has happened by now."""
    wanted = _option("--backend")
    if not wanted or wanted == keras.backend.backend():
        return
    if wanted not in BACKENDS:
        _fail(f"There is no backend '{wanted}'. Expected one of {', '.join(BACKENDS)}.", 2)
    if importlib.util.find_spec(wanted) is None:
        _fail(f'{wanted} is not installed: pip install "keras-taylor[{wanted}]"', 1)
    if os.environ.get("KERAS_BACKEND") == wanted:
        _fail(f"Keras runs on {keras.backend.backend()}, although KERAS_BACKEND says {wanted}.", 1)
    os.environ["KERAS_BACKEND"] = wanted
    os.execv(sys.executable, [sys.executable, "-m", "keras_taylor", *sys.argv[1:]])


def _option(name):
    for position, argument in enumerate(sys.argv):
        if argument == name:
            return sys.argv[position + 1] if position + 1 < len(sys.argv) else ""
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return ""


def _fail(text, code):
    Console(stderr=True, soft_wrap=True).print(f"keras-taylor: {text}", markup=False, highlight=False)
    raise SystemExit(code)


def _model(path, trust, modules):
    sys.path.insert(0, os.getcwd())
    for name in modules or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise FileError(f"The module '{name}' of --import cannot be imported ({error}).") from error
    return load_model(path, trust)


def _checked_format(name):
    if name not in VARIANTS:
        raise FileError(f"There is no format '{name}'. Expected one of {', '.join(VARIANTS)}.")
    return name


def _beside(target, name):
    return str(target.with_name(f"{target.stem}-{name}{VARIANTS[name].suffix}"))


def _bytes(kib):
    return kib * 1024 if kib else None


def _exported(model, path, name, train, test, force, **options):
    variant = VARIANTS[name]
    return keras_taylor.export(
        model,
        path,
        variant.format,
        quantize=variant.quantize,
        calibration=train[0] if variant.quantize == "int8" else None,
        data=test,
        overwrite=force,
        **options,
    )


def _numbers(text):
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise FileError(f"'{text}' is no number, nor a list of numbers like 0.5,0.4,0.4.") from error


def _print_json(**content):
    print(json.dumps(content, default=str))
