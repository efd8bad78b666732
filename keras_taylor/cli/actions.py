"""What the commands do once their options are read: files in, public functions of this package, files out."""

import contextlib
import dataclasses
import importlib
import math
import os
import pathlib
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import keras

import keras_taylor
from keras_taylor.cli.data_files import DataSplit, Scaling, load_data
from keras_taylor.cli.demo import compress_digits_network
from keras_taylor.cli.failures import GOAL_MISSED, FileError, fail
from keras_taylor.cli.held_out import measure_on_test_examples, print_notes, print_test_metrics
from keras_taylor.cli.loading import quiet_imports
from keras_taylor.cli.model_files import compile_for_targets, load_model
from keras_taylor.cli.options import (
    ChannelOptions,
    CompressOutputs,
    ExportOptions,
    FineTuningOptions,
    GeneralOptions,
    InputOptions,
    ModelOptions,
    PruningOptions,
    SensitivityOptions,
    parse_goal_texts,
    parse_max_drop,
    parse_numbers,
)
from keras_taylor.cli.outputs import compress_paths, write_file, write_text
from keras_taylor.exports.artifacts import format_kib
from keras_taylor.exports.formats import VARIANTS
from keras_taylor.reports.run_record import GOAL_REACHED, NOTHING_TO_DO
from keras_taylor.support.files import to_json_text


def show_analysis(
    model: ModelOptions,
    sensitivity: SensitivityOptions,
    inputs: InputOptions,
    channels: ChannelOptions,
    general: GeneralOptions,
    plot: pathlib.Path | None,
) -> None:
    """Prints what can leave a model, and draws what is measured on data."""
    loaded, train = _load_model(model), None
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
        print(to_json_text(content, default=str))
    else:
        print(analysis)
        if plot:
            _print_written(plot)


def compress_model(
    model: ModelOptions,
    data: str,
    inputs: InputOptions,
    channels: ChannelOptions,
    pruning: PruningOptions,
    tuning: FineTuningOptions,
    outputs: CompressOutputs,
    general: GeneralOptions,
) -> None:
    """Makes a model smaller, writes it and what was asked for beside it, and prints what was done."""
    _load_what_saves()
    goal = parse_goal_texts(pruning.goal)
    paths = compress_paths(outputs, len(goal) if isinstance(goal, list) else 1, general.force)
    keras.utils.set_random_seed(tuning.seed)
    original = _load_model(model)
    split = _load_split(inputs, data, original, general)
    original = compile_for_targets(original, split.train[1])
    rate = keras_taylor.FineTuning(tuning.learning_rate, tuning.keep_best, tuning.every_round)
    try:
        with warnings.catch_warnings(record=True) as caught:
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
                learning_rate=rate,
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
        fail(f"interrupted after {len(interrupt.info.rounds)} complete rounds; {way_on}.", 130)
    for text in dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning):
        if text != info.stop_reason:
            print(f"note: {text}", file=sys.stderr)
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
    if goal is not None and info.stop_reason not in (GOAL_REACHED, NOTHING_TO_DO):
        fail(f"the goal was not reached: {info.stop_reason}", GOAL_MISSED)


def export_model(
    model: ModelOptions,
    target: ExportOptions,
    data: str,
    inputs: InputOptions,
    general: GeneralOptions,
    path: pathlib.Path,
) -> None:
    """Exports a model to a checked path."""
    _load_what_saves()
    loaded = _load_model(model)
    split = _load_split(inputs, data, loaded, general) if data else None
    artifact = _export_variant(loaded, path, target.format, split, general.force, **target.arguments())
    if general.as_json:
        print(artifact.to_json())
    else:
        print(artifact)
        _offer_int8_io([artifact])
        _print_written(path)


def show_report(info: str, page: pathlib.Path | None) -> None:
    """Prints what a run did, from the text of its `.json` file, or writes the page."""
    done = keras_taylor.Info.from_json(info)
    if page:
        write_text(page, done.to_html())
        _print_written(page)
    else:
        print(done)
        print_test_metrics(done.test_metrics)


def show_demo(goals: list[str] | None, page: pathlib.Path | None) -> None:
    """Makes a network for digits smaller, prints what was done, and writes the page."""
    info = compress_digits_network(parse_goal_texts(goals))
    info.command = _command_line()
    print(info)
    if page:
        write_text(page, info.to_html())
        _print_written(page)


def _load_model(options: ModelOptions) -> keras.Model:
    """The model, after the modules that register its layers."""
    if options.modules:
        sys.path.append(os.getcwd())
    for name in options.modules or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise FileError(f"The module '{name}' of --import cannot be imported ({error}).") from error
    return load_model(options.model, options.trust)


def _load_what_saves() -> None:
    """To save a model, Keras imports TensorFlow on every backend, if it is installed."""
    with quiet_imports(), contextlib.suppress(ImportError):
        import tensorflow  # noqa: F401


def _load_split(inputs: InputOptions, source: str, model: keras.Model, general: GeneralOptions) -> DataSplit:
    """The data, scaled, after a line that says what was taken."""
    scaling = Scaling(inputs.divide_by, parse_numbers(inputs.mean), parse_numbers(inputs.std))
    split = load_data(source, model, inputs.validation, inputs.test, scaling)
    if not general.as_json:
        print(split.description)
    return split


def _command_line() -> str:
    """The command that was typed, ready to be pasted into a shell."""
    return shlex.join(["keras-taylor", *sys.argv[1:]])


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
