"""SavedModel, LiteRT, ONNX and Keras files from any backend, checked and measured."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

import keras
from rich.console import Console

from keras_taylor.exports.artifacts import Artifact, ExportError, size_on_disk
from keras_taylor.exports.conversion import save_and_convert
from keras_taylor.exports.export_checks import check_calibration, check_limits, check_model, check_target
from keras_taylor.exports.export_failures import conversion_failure, run_failure, shorten
from keras_taylor.exports.export_parity import (
    Verdict,
    explain_refusal,
    judge,
    size_violation,
    summarize_errors,
)
from keras_taylor.exports.export_worker import JobError, run_job, workers
from keras_taylor.exports.formats import ExportSettings, check_installed, checked_format
from keras_taylor.exports.inspection import Inspection
from keras_taylor.exports.source_models import (
    ExportExamples,
    ExportMetric,
    Reference,
    accepted_error,
    find_user_code,
)
from keras_taylor.exports.timing import ExportedFile
from keras_taylor.support.arguments import format_value
from keras_taylor.support.arrays import read_arrays, write_arrays
from keras_taylor.support.console import Reporter
from keras_taylor.support.files import AtomicFile, scratch_folder
from keras_taylor.support.types import Array, Data, Tree

_MAX_REPETITIONS = 100


def export(
    model: keras.Model,
    path: str | os.PathLike[str],
    format: str | None = None,
    quantize: str | None = None,
    calibration: Data = None,
    int8_io: bool = False,
    batch_size: int | None = None,
    samples: Tree = None,
    data: Data = None,
    metric: Callable[[Tree, Tree], float] | None = None,
    tolerance: float | None = None,
    max_drop: float | None = None,
    max_bytes: float | None = None,
    max_arena_bytes: float | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Writes a model for inference elsewhere, runs the written file, and measures it.

    It works the same on every backend: another process, which runs Keras on TensorFlow, loads a copy of
    the model and converts it. It runs the result and compares the outputs with those of the model on its
    own backend. Only then is the file moved to `path`. Your own layers may be in a module that can be
    imported; or, with the package `cloudpickle`, in a script or notebook.

    The file is for inference: layers that do something in training only, such as dropout and augmentation,
    are not in it. LiteRT and ONNX files compute in float32 where the model does in half precision.

    Args:
        model: A built Sequential or Functional model; it is not changed. For a `PrunableModel`, pass what
            `strip()` returns.
        path: The file to write, or the directory for "saved_model". Its parent must exist.
        format: "saved_model" (signature `serving_default`, names as Keras' own export gives
            them), "litert" (`.tflite`, built-in operations only), "onnx" (`.onnx`) or "keras"
            (`.keras`, without the optimizer). Default `None`: the format that the suffix of `path`
            stands for.
        quantize: LiteRT only. `None` (default): float32. "float16": weights in float16. "dynamic":
            weights of 1024 values or more as int8, activations in float32. "int8": weights and
            activations as int8.
        calibration: Required for "int8", and only allowed there: inputs from which the ranges of
            activations are taken, in any form that `model.fit` takes (arrays, `(x, y)`, a
            tf.data.Dataset, a PyDataset, ...). At most 200 examples are used: evenly spread ones of
            arrays, the first ones of other data.
        int8_io: "int8" only. Whether inputs and outputs are int8 too, with the "scale" and
            "zero_point" in the result. Default `False`: they are float32.
        batch_size: Number of examples that a call takes. Default `None`: any number. Microcontrollers
            need a fixed one, and so do some recurrent layers in LiteRT. The format "keras" takes
            `None` only.
        samples: Inputs to compare outputs on, with the structure and shapes that the model takes, batch
            axis first. Default `None`: those of `calibration`, else of `data` (at most 32), else
            32 random examples (standard normal reals, integers 0 and 1).
        data: `(x, y)`, or batches of these, to compute a metric on for the artifact and the model.
            Default `None`: no metric is computed.
        metric: A callable `(y, outputs)` that returns a number, the larger the better. It gets arrays, or
            lists of arrays for a model with several outputs. Default `None`: the first metric that the
            model is compiled with; without one the accuracy, for integer labels or one-hot `y` and a single
            output with classes along its last axis; else the compiled loss.
        tolerance: Largest error to accept. Default `None`: in float32 1e-4, for "float16" 1e-2, of
            `Artifact.relative_difference`. For "dynamic" and "int8" with `data` the metric decides; without,
            0.1 of each output in its own terms: of `1 - agreement` for classes and masks, of
            `relative_error` for numbers. `Artifact.verdict` says it in one line.
        max_drop: How much worse the metric may be. Default `None`: 0.02; a tenth of its value for a compiled
            metric or loss that is better the smaller it is.
        max_bytes: Largest size to accept, in bytes. Default `None`: any.
        max_arena_bytes: LiteRT only: largest `Artifact.arena_bytes` to accept. Default `None`: any. A
            microcontroller limits both `max_bytes` (flash) and `max_arena_bytes` (RAM). Leave it some
            slack.
        overwrite: Whether to replace a file at `path`, or a SavedModel by a SavedModel. Default `False`.

    Returns:
        An `Artifact`: sizes in bytes, differences, latency in milliseconds.

    Raises:
        ValueError: for arguments that do not go together, before anything is written.
        ImportError: if a package is missing. The message names the extra to install.
        ExportError: if the model cannot be converted; or if the written file does not run, differs by
            more than `tolerance` or `max_drop`, or is larger than `max_bytes` or `max_arena_bytes`. A file
            that runs then lies beside the target as `<name>.rejected`. Nothing changes at `path`.

    Example:

    >>> artifact = keras_taylor.export(model, "small.tflite", data=(x_val, y_val))
    >>> artifact.format, artifact.batch_size
    ('litert', None)
    >>> artifact.relative_difference < 1e-4
    True
    """
    target = pathlib.Path(path)
    format = checked_format(target, format)
    check_model(model)
    settings = ExportSettings(format, quantize, int8_io, batch_size)
    check_calibration(settings, calibration)
    check_limits(format, tolerance, max_bytes, max_arena_bytes)
    check_target(target, format, overwrite)
    check_installed(format)
    examples = ExportExamples.collect(model, samples, calibration, data)
    on_data = None if data is None else ExportMetric(model, examples, metric)
    backend = _backend_for(format)
    if workers.start(backend):  # while the model's own outputs are computed
        Reporter(console=Console(stderr=True, soft_wrap=True)).say(
            f"export: starting a process with Keras on {backend}, which takes some seconds the first time"
        )
    reference = Reference(model, examples, on_data)
    limits = accepted_error(model, quantize, data is not None) if tolerance is None else tolerance, max_drop
    with AtomicFile(target) as draft:
        convert_model(model, draft.path, settings, examples.calibration)
        artifact, verdict = _inspect(model, draft.path, settings, reference, limits)
        violation = "" if verdict.is_accepted else explain_refusal(verdict, quantize)
        violation = violation or size_violation(artifact, max_bytes, max_arena_bytes)
        if violation:
            rejected = draft.move_to(target.with_name(target.name + ".rejected"))
            raise ExportError(f"{violation} The file is at '{rejected}'. Received: path={os.fspath(path)!r}")
        draft.move_to(target)
    return dataclasses.replace(artifact, path=str(target))


def measure_artifacts(
    artifacts: Iterable[Artifact], batch_size: int = 1, repetitions: int = _MAX_REPETITIONS
) -> list[Artifact]:
    """Times artifacts against each other: one call of each in turn, in one process.

    Args:
        artifacts: `Artifact`s, for example of the original and of the pruned model. Artifacts of the
            "keras" format run on this process's backend.
        batch_size: Number of examples in a call, for artifacts that take any number. Default 1.
        repetitions: Number of timed calls of each, at most. Default 100. Timing ends after three seconds
            for each artifact.

    Returns:
        A list of `Artifact`s with new latencies.

    Raises:
        TypeError: for something that is no `Artifact`, such as a model.
        ValueError: for an empty list, or an artifact whose file does not exist.
        ExportError: if an artifact does not run.

    Example:

    >>> artifact = keras_taylor.export(model, "model.keras")
    >>> (measured,) = keras_taylor.measure_artifacts([artifact], batch_size=8)
    >>> measured.latency_batch
    8
    """
    artifacts = list(artifacts)
    other = next((one for one in artifacts if not isinstance(one, Artifact)), None)
    if other is not None:
        raise TypeError(
            "Expected `Artifact`s, which `export` returns; a Keras model becomes one by "
            f"`keras_taylor.export(model, 'model.keras')`. Received: {format_value(other)}"
        )
    paths = [artifact.path for artifact in artifacts]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing or not artifacts:
        problem = f"No such file: '{missing[0]}'" if missing else "There is nothing to measure"
        raise ValueError(
            f"{problem}. Expected `Artifact`s whose files exist. Received: artifacts with paths {paths}"
        )
    files: list[ExportedFile] = [
        {
            "format": artifact.format,
            "path": os.path.abspath(artifact.path),
            "names": list(artifact.inputs),
            "batch_size": artifact.batch_size,
        }
        for artifact in artifacts
    ]
    try:
        latencies = run_job(
            _backend_for(*{artifact.format for artifact in artifacts}),
            "time_files",
            code=find_user_code(),
            files=files,
            batch_size=batch_size,
            repetitions=repetitions,
        )
    except JobError as error:
        raise ExportError(
            f"An artifact does not run ({shorten(error)}). Received: artifacts with paths {paths}"
        ) from error
    return [
        dataclasses.replace(artifact, **latency)
        for artifact, latency in zip(artifacts, latencies, strict=True)
    ]


def convert_model(
    model: keras.Model,
    target: str | pathlib.Path,
    settings: ExportSettings,
    calibration: Sequence[Array] | None = None,
) -> None:
    """Writes the file that `export` writes, without checks.

    Args:
        model: A built Sequential or Functional model.
        target: The file or directory to write.
        settings: The format and its options.
        calibration: Examples for each of the flattened inputs, for "int8"; `None` for random ones.

    Raises:
        ExportError: if the model cannot be converted.
    """

    def convert(source: str, target: str, settings: ExportSettings, calibration: str | None) -> None:
        run_job(
            _backend_for(settings.format),
            "convert",
            find_user_code(model),
            source=source,
            target=target,
            settings=dataclasses.asdict(settings),
            calibration=calibration,
        )

    try:
        save_and_convert(model, target, settings, calibration, convert)
    except (JobError, OSError) as error:
        raise conversion_failure(error, model, settings) from error


def _inspect(
    model: keras.Model,
    path: pathlib.Path,
    settings: ExportSettings,
    reference: Reference,
    limits: tuple[float, float | None],
) -> tuple[Artifact, Verdict]:
    """Runs, measures and judges a file that was converted from a model; `limits` are as `judge` takes them.

    Raises:
        ExportError: if the file does not run.
    """
    with scratch_folder() as folder:

        def write_table(name: str, arrays: Sequence[Array]) -> tuple[str, str]:
            source, outputs = (os.path.join(folder, f"{name}-{part}.npz") for part in ("inputs", "outputs"))
            write_arrays(source, arrays)
            return source, outputs

        tables = [write_table("samples", reference.examples.samples)]
        if reference.examples.data is not None:
            tables.append(write_table("data", reference.examples.data))
        try:
            inspection: Inspection = run_job(
                _backend_for(settings.format),
                "inspect",
                find_user_code(model),
                format=settings.format,
                path=str(path),
                names=[tensor.name for tensor in model.inputs],
                batch_size=settings.batch_size,
                tables=tables,
                repetitions=_MAX_REPETITIONS,
            )
        except JobError as error:
            raise run_failure(error, model, settings) from error
        outputs, *data_outputs = [read_arrays(target) for _, target in tables]
    errors = reference.compare(outputs)
    metric = reference.metric_values(*data_outputs) if data_outputs else None
    verdict = judge(settings.quantize, errors, metric, *limits)
    artifact = Artifact(
        path=str(path),
        format=settings.format,
        quantize=settings.quantize,
        batch_size=settings.batch_size,
        num_bytes=size_on_disk(path),
        **summarize_errors(errors),
        metric=metric and metric.after,
        model_metric=metric and metric.before,
        metric_name=metric and metric.name,
        verdict=verdict.text,
        **inspection,
    )
    return artifact, verdict


def _backend_for(*formats: str) -> str:
    """The backend of the process that converts or runs such files: the user's own if any is "keras"."""
    return str(keras.backend.backend()) if "keras" in formats else "tensorflow"
