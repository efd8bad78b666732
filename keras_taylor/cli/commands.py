"""The command `keras-taylor`: its subcommands, and how it starts and fails."""

import importlib.util
import logging
import os
import pathlib
import sys
import types
from typing import Annotated, NoReturn

import typer

import keras_taylor
from keras_taylor.cli.failures import FileError, check_source, fail
from keras_taylor.cli.loading import quiet_imports
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
)
from keras_taylor.cli.outputs import check_output, check_plot
from keras_taylor.cli.signatures import flat_options
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.support.files import installed_first

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
    _load_actions().show_analysis(model, sensitivity, inputs, channels, general, plot)


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
    _load_actions().compress_model(model, data, inputs, channels, pruning, tuning, outputs, general)


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
            callback=check_source,
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
    if not data and target.format == "litert-int8":
        raise FileError("litert-int8 is calibrated on examples: pass --data.")
    _load_actions().export_model(model, target, data, inputs, general, path)


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
    text = _read_info(path)
    _load_actions().show_report(text, page)


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
    _load_actions().show_demo(goal, page)


def _load_actions() -> types.ModuleType:
    """The module that does the work, which loads Keras."""
    with quiet_imports():
        from keras_taylor.cli import actions
    return actions


def main() -> None:
    """Runs the command. A failure that the user can fix prints one line, and the exit code is 1."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # hides what Keras says about old model files
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # and what TensorFlow says about the machine
    _close_working_directory()
    _choose_backend()
    try:
        app(standalone_mode=True)
    except (ValueError, TypeError, ImportError, OSError) as error:
        _fail_with(error)
    except RuntimeError as error:
        if not isinstance(error, keras_taylor.ExportError):
            raise
        _fail_with(error)


def _fail_with(error: Exception) -> NoReturn:
    """Prints an error in one line, with the names of options."""
    text = " ".join(str(error).split())
    for argument, option in _OPTIONS.items():
        text = text.replace(f"`{argument}`", option).replace(f"{argument}=", f"{option} ")
    fail(text, 1)


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


def _choose_backend() -> None:
    """Has Keras run on the backend that `--backend` names. Keras chooses when it is imported."""
    wanted = _value_of_option("--backend")
    if not wanted:
        return
    if wanted not in BACKENDS:
        fail(f"There is no backend '{wanted}'. Expected one of {', '.join(BACKENDS)}.", 2)
    if importlib.util.find_spec(wanted) is None:
        fail(f'{wanted} is not installed: pip install "keras-taylor[{wanted}]"', 1)
    if "keras" in sys.modules and sys.modules["keras"].backend.backend() != wanted:
        fail(f"Keras was imported before the command, and runs on another backend than {wanted}.", 1)
    os.environ["KERAS_BACKEND"] = wanted


def _value_of_option(name: str) -> str:
    """The value of an option on the command line, before typer reads it; "" without it."""
    for position, argument in enumerate(sys.argv):
        if argument == name:
            return sys.argv[position + 1] if position + 1 < len(sys.argv) else ""
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return ""
