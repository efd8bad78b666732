"""The command `keras-taylor`: its subcommands, and how it starts and fails."""

import dataclasses
import importlib.util
import logging
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import keras
import typer
from rich.console import Console

import keras_taylor
from keras_taylor.cli.data_files import DataSplit
from keras_taylor.cli.demo import compress_digits_network
from keras_taylor.cli.held_out import measure_on_test_examples, print_notes, print_test_metrics
from keras_taylor.cli.model_files import FileError, compile_for_targets
from keras_taylor.cli.options import (
    Backend,
    ChannelOptions,
    CompressOutputs,
    ExportOptions,
    FineTuningOptions,
    Force,
    GeneralOptions,
    GoalTexts,
    InputOptions,
    ModelOptions,
    PruningOptions,
    ReportPath,
    RequiredData,
    SensitivityOptions,
    parse_goal_texts,
    parse_max_drop,
)
from keras_taylor.cli.outputs import check_output, check_plot, compress_paths, write_file, write_text
from keras_taylor.cli.signatures import flat_options
from keras_taylor.exports.artifacts import format_kib
from keras_taylor.exports.export_worker import installed_first
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.support.files import to_json_text

BACKENDS = ("tensorflow", "jax", "torch")
_OPTIONS = {"backup_dir": "--resume"}  # by the argument that an error may name

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich"
)


@app.command(
    "analyze", epilog="Example: keras-taylor analyze model.keras --data images/ --plot sensitivity.png"
)
@flat_options
def analyze_command(
    model: ModelOptions,
    sensitivity: SensitivityOptions,
    inputs: InputOptions,
    channels: ChannelOptions,
    general: GeneralOptions,
) -> None:
    """Show which channels can leave, which stay, and why. With data, measure how the loss reacts."""
    plot = check_plot(sensitivity.plot, sensitivity.data, general.force)
    loaded, train = model.load(), None
    if sensitivity.data:
        train = _load_split(inputs, sensitivity.data, loaded, general).train
        loaded = compile_for_targets(loaded, train[1])
    analysis = keras_taylor.analyze(
        loaded,
        train,
        exclude=channels.exclude or (),
        exact=not channels.inexact,
        branches=channels.branches,
        criterion=sensitivity.criterion,
        num_examples=sensitivity.num_examples or None,
        verbose=0 if general.as_json else "auto",
    )
    if plot:
        write_file(plot, analysis.plot)
    if general.as_json:
        content = {
            "costs": analysis.costs,
            "reachable": analysis.reachable,
            "groups": [dataclasses.asdict(group) for group in analysis.groups],
            "unknown": analysis.unknown,
            "sensitivity": analysis.sensitivity and analysis.sensitivity.to_dict(),
        }
        _print_json(content)
    else:
        print(analysis)
        if plot:
            _print_written(plot)


@app.command(
    "compress",
    epilog="Example: keras-taylor compress model.keras --data images/ --goal 0.4 --epochs 2 -o small.keras "
    "--export litert-int8 --report report.html",
)
@flat_options
def compress_command(
    model: ModelOptions,
    data: RequiredData,
    inputs: InputOptions,
    channels: ChannelOptions,
    pruning: PruningOptions,
    tuning: FineTuningOptions,
    outputs: CompressOutputs,
    general: GeneralOptions,
) -> None:
    """Make a trained model smaller: score, prune and fine-tune it, round by round."""
    goal = parse_goal_texts(pruning.goal)
    paths = compress_paths(outputs, goal, general.force)
    keras.utils.set_random_seed(tuning.seed)
    original = model.load()
    split = _load_split(inputs, data, original, general)
    original = compile_for_targets(original, split.train[1])
    try:
        models, info = keras_taylor.compress(
            original,
            split.train,
            goal,
            increment=pruning.increment,
            criterion=pruning.criterion,
            exclude=channels.exclude or (),
            exact=not channels.inexact,
            selection=pruning.selection(channels.branches),
            repair=pruning.repair,
            learning_rate=keras_taylor.FineTuning(tuning.learning_rate, tuning.keep_best, tuning.every_round),
            max_drop=parse_max_drop(pruning.max_drop),
            distill=tuning.distill,
            epochs=tuning.epochs,
            batch_size=tuning.batch_size,
            validation_data=split.validation,
            backup_dir=outputs.resume or None,
            verbose=0 if general.as_json else "auto",
            return_info=True,
        )
    except keras_taylor.CompressionInterrupted as interrupt:  # typer would end without a word
        way_on = "the same command continues" if outputs.resume else "with --resume it could be continued"
        _fail(f"interrupted after {len(interrupt.info.rounds)} complete rounds; {way_on}.", 130)
    info.command = _command_line()
    *others, small = models if isinstance(models, list) else [models]
    info.test_metrics = measure_on_test_examples(original, small, split.test)
    written = [*paths.intermediate[: len(others)], paths.result]
    for path, one in zip(written, [*others, small], strict=True):
        write_file(path, one.save)
    write_text(paths.info, info.to_json())
    written.append(paths.info)
    artifacts = [
        _export_variant(one, path, variant, split, general.force)
        for variant, path_of_small in paths.exports.items()
        for one, path in (
            (original, path_of_small.with_name(f"original-{path_of_small.name}")),
            (small, path_of_small),
        )
    ]
    if artifacts:
        # their times can be compared because they are measured in turn
        artifacts = keras_taylor.measure_artifacts(artifacts)
        info.artifacts = {"before": artifacts[::2], "after": artifacts[1::2]}
        write_text(paths.info, info.to_json())
        written += [pathlib.Path(artifact.path) for artifact in artifacts]
    if paths.report:
        write_text(paths.report, info.to_html())
        written.append(paths.report)
    if general.as_json:
        print(info.to_json())
    else:
        print(info)
        print_test_metrics(info.test_metrics, len(split.test[0]))
        print_notes(original, split)
        _offer_int8_io(artifacts[1::2])
        _print_written(*written)


@app.command(
    "export",
    epilog="Example: keras-taylor export small.keras --format litert-int8 --data images/ -o small.tflite "
    "--batch-size 1 --int8-io --max-kib 128 --max-arena-kib 64",
)
@flat_options
def export_command(
    *,
    model: ModelOptions,
    target: ExportOptions,
    data: Annotated[
        str,
        typer.Option(
            help="The same kinds of data as for `compress`. litert-int8 needs it.",
            show_default=False,
            rich_help_panel="Data",
        ),
    ] = "",
    inputs: InputOptions,
    general: GeneralOptions,
) -> None:
    """Write a model for inference elsewhere. The file is run, compared with the model, and measured."""
    path = check_output(target.output, general.force, VARIANTS[target.format].suffix)
    loaded = model.load()
    if not data and target.format == "litert-int8":
        raise FileError("litert-int8 is calibrated on examples: pass --data.")
    split = _load_split(inputs, data, loaded, general) if data else None
    artifact = _export_variant(loaded, path, target.format, split, general.force, **target.arguments())
    if general.as_json:
        print(artifact.to_json())
    else:
        print(artifact)
        _offer_int8_io([artifact])
        _print_written(path)


@app.command("report", epilog="Example: keras-taylor report small.json -o report.html")
def report_command(
    info: Annotated[str, typer.Argument(help="The .json file that `compress` wrote.", show_default=False)],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The HTML file to write. Without it, a table is printed.")
    ] = "",
    force: Force = False,
    backend: Backend = "",
) -> None:
    """Show what a run of `compress` did: a table, or one HTML page."""
    path = pathlib.Path(info)
    if not path.is_file():
        raise FileError(f"There is no file '{path}'. Pass the .json file that `compress` wrote.")
    page = check_output(output, force, ".html") if output else None
    done = keras_taylor.Info.from_json(_read_info(path))
    if page:
        write_text(page, done.to_html())
        _print_written(page)
    else:
        print(done)
        print_test_metrics(done.test_metrics)


def _read_info(path: pathlib.Path) -> str:
    """The text of a file that `compress` wrote."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        beside = path.with_suffix(".json")
        hint = f" Try '{beside}'." if beside.is_file() else ""
        raise FileError(f"'{path}' is not the .json file that `compress` wrote.{hint}") from error


@app.command("demo", epilog="Example: keras-taylor demo --backend jax")
def demo_command(
    goal: GoalTexts = None,
    report: ReportPath = "",
    force: Force = False,
    backend: Backend = "",
) -> None:
    """Train a small network on real handwritten digits and make it smaller. This takes about a minute."""
    page = check_output(report, force, ".html") if report else None
    info = compress_digits_network(parse_goal_texts(goal))
    info.command = _command_line()
    print(info)
    if page:
        write_text(page, info.to_html())
        _print_written(page)


def _command_line() -> str:
    """The command that was typed, ready to be pasted into a shell."""
    return shlex.join(["keras-taylor", *sys.argv[1:]])


def _load_split(inputs: InputOptions, source: str, model: keras.Model, general: GeneralOptions) -> DataSplit:
    """The data, after a line that says what was taken."""
    split = inputs.load(source, model)
    if not general.as_json:
        print(split.description)
    return split


def _print_json(content: Any) -> None:
    """Prints one line of JSON."""
    print(to_json_text(content, default=str))


def _print_written(*paths: pathlib.Path) -> None:
    print(f"written: {', '.join(map(str, paths))}")


def _offer_int8_io(artifacts: Sequence[keras_taylor.Artifact]) -> None:
    """Prints how much less memory a file would need if its inputs and outputs were integers as well."""
    for one in artifacts:
        if one.arena_bytes is not None and (one.int8_io_arena_bytes or math.inf) < one.arena_bytes:
            print(
                f"{pathlib.Path(one.path).name}: its tensor arena takes {format_kib(one.arena_bytes)}, or "
                f"{format_kib(one.int8_io_arena_bytes)} with `keras-taylor export --int8-io`: inputs and "
                "outputs are int8 then"
            )


def _export_variant(
    model: keras.Model,
    path: pathlib.Path,
    name: str,
    split: DataSplit | None,
    force: bool,
    **options: Any,
) -> keras_taylor.Artifact:
    """Exports a model; calibrates on the training examples, and measures on the test examples."""
    variant = VARIANTS[name]
    train, test = (split.train, split.test) if split is not None else (None, None)
    return keras_taylor.export(
        model,
        path,
        variant.format,
        quantize=variant.quantize,
        calibration=train[0] if train is not None and variant.quantize == "int8" else None,
        data=test,
        overwrite=force,
        **options,
    )


def main() -> None:
    """Runs the command. A failure that the user can fix prints one line, and the exit code is 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # hides what Keras says about old model files
    _close_working_directory()
    _restart_on_backend()
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, ImportError, OSError, keras_taylor.ExportError) as error:
        text = " ".join(str(error).split())
        for argument, option in _OPTIONS.items():
            text = text.replace(f"`{argument}`", option).replace(f"{argument}=", f"{option} ")
        _fail(text, 1)


def _close_working_directory() -> None:
    """Takes the working directory off `sys.path`: a file that lies there must not pass for a library.

    `python -m` puts it there, and so does an empty entry of PYTHONPATH. `--import` appends it again. Where
    this package itself lies there, in a checkout of its source, it stays, but last.
    """
    folder = os.getcwd()
    path = installed_first(sys.path, folder)
    own = os.path.dirname(os.path.dirname(keras_taylor.__file__))
    if path[-1] == folder and not os.path.samefile(own, folder):
        path.pop()
    sys.path[:] = path


def _restart_on_backend() -> None:
    """Starts the process again with the backend that `--backend` names, if Keras runs on another one.

    Keras chooses its backend when it is imported, and that has happened already.
    """
    wanted = _value_of_option("--backend")
    if not wanted or wanted == keras.backend.backend():
        return
    if wanted not in BACKENDS:
        _fail(f"There is no backend '{wanted}'. Expected one of {', '.join(BACKENDS)}.", 2)
    if importlib.util.find_spec(wanted) is None:
        _fail(f'{wanted} is not installed: pip install "keras-taylor[{wanted}]"', 1)
    if os.environ.get("KERAS_BACKEND") == wanted:
        _fail(f"Keras runs on {keras.backend.backend()}, although KERAS_BACKEND says {wanted}.", 1)
    os.environ["KERAS_BACKEND"] = wanted
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _value_of_option(name: str) -> str:
    """The value of an option on the command line, before typer reads it; "" without it."""
    for position, argument in enumerate(sys.argv):
        if argument == name:
            return sys.argv[position + 1] if position + 1 < len(sys.argv) else ""
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return ""


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"keras-taylor: {text}", markup=False, highlight=False)
    raise SystemExit(code)
