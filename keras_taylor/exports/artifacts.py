"""An exported model: its place, size, precision and speed."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Self, TypedDict

from rich.table import Table

from keras_taylor.support.console import render_table
from keras_taylor.support.files import to_json_text, with_nan, with_nan_by_name

_MOST_SIDE_BY_SIDE = 3  # artifacts in a table


class ExportError(RuntimeError):
    """An exported model is not usable: conversion failed, or the file does not run or is not accurate enough.

    Example:

    >>> try:
    ...     keras_taylor.export(model, "small.keras", max_bytes=100)
    ... except keras_taylor.ExportError as error:
    ...     print(str(error).split(" takes")[0])
    The file
    """


class TensorDetails(TypedDict):
    """Shape (batch axis first, `None` where free) and dtype of an input or output.

    "scale" and "zero_point" are there if integers stand for reals: real = scale x (integer - zero_point).
    """

    shape: list[int | None]
    dtype: str
    scale: NotRequired[float]
    zero_point: NotRequired[int]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file that `export` wrote (a directory for a SavedModel). `print(artifact)` prints a table.

    Attributes:
        path: Where the file is, a str.
        format: "saved_model", "litert", "onnx" or "keras".
        quantize: `None` (float32), "float16", "dynamic" or "int8".
        batch_size: Number of examples that a call takes; `None` for any number.
        num_bytes: Size on disk in bytes. For a SavedModel, all files in the directory count.
        inputs: Name -> details, in the order of the model's flattened inputs. Details are a dict of
            "shape" (batch axis first, `None` where free) and "dtype". If an int8 input stands for reals,
            they also hold "scale" and "zero_point": real = scale x (integer - zero_point).
        outputs: The same for the model's flattened outputs.
        difference: Largest absolute difference from the Keras model's outputs.
        relative_difference: Largest difference in an output, divided by that output's largest
            absolute value; the maximum over all outputs.
        agreement: Share of predictions that equal the Keras model's, each class that it predicts weighted
            the same: of classes (argmax over the last axis), or of a mask (above 0.5; of logits 0).
            `None` if no output has either, or if the Keras model predicts the same for all samples.
        metric: The artifact's metric on `data`; `None` without `data`.
        model_metric: The same for the Keras model.
        latency_ms: Median time of one call in milliseconds, on one thread of this machine's CPU. The
            format "keras" uses as many threads as its backend takes.
        latency_p90_ms: 90th percentile of that time, in milliseconds.
        latency_batch: Number of examples in that call.
        peak_memory: Bytes by which the resident memory of a process grows when it loads the artifact
            and calls it. The runtime's own memory counts, its imports do not. `None` where the system
            does not tell.
        arena_bytes: LiteRT only, for one batch: the most bytes of tensors that are alive at the same
            time, see `inspection.LiveTensors`. `None` for other formats.
        relative_error: Root mean square of the differences of an output, divided by the standard deviation
            of its values; the maximum over all outputs. `None` in what an earlier version wrote.
        metric_name: Name of the metric; `None` without `data`.
        verdict: By what the file was accepted, one line.
        int8_io_arena_bytes: What `arena_bytes` would be with `int8_io=True`, for an "int8" file that has
            other inputs or outputs. `None` for all others, and in what an earlier version wrote.

    Example:

    >>> artifact = keras_taylor.export(model, "small.keras")
    >>> artifact.format, artifact.quantize
    ('keras', None)
    >>> artifact.relative_difference < 1e-4
    True
    """

    path: str
    format: str
    quantize: str | None
    batch_size: int | None
    num_bytes: int
    inputs: dict[str, TensorDetails]
    outputs: dict[str, TensorDetails]
    difference: float
    relative_difference: float
    agreement: float | None
    metric: float | None
    model_metric: float | None
    latency_ms: float
    latency_p90_ms: float
    latency_batch: int
    peak_memory: int | None
    arena_bytes: int | None
    relative_error: float | None = None
    metric_name: str | None = None
    verdict: str = ""
    int8_io_arena_bytes: int | None = None

    def to_json(self) -> str:
        """Writes all attributes as text.

        Returns:
            A str in JSON, which `from_json` reads. NaN is `null`, infinity is "Infinity".
        """
        return to_json_text(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Args:
            text: A str that `to_json` returned.

        Returns:
            An `Artifact`.

        Raises:
            ValueError: if `to_json` did not write the text.

        Example:

        >>> artifact = keras_taylor.export(model, "small.keras")
        >>> keras_taylor.Artifact.from_json(artifact.to_json()) == artifact
        True
        """
        try:
            return cls(**dataclasses.asdict(artifact_from_dict(json.loads(text))))
        except (ValueError, TypeError) as error:
            raise ValueError(
                "The text is not an `Artifact` that `Artifact.to_json` wrote "
                f"({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error

    def __str__(self) -> str:
        table = render_table(artifact_table([self]), width=140)
        return f"{table}\n{self.verdict}" if self.verdict else table


def artifact_from_dict(content: Mapping[str, Any]) -> Artifact:
    """Returns the artifact of a dict that JSON holds; `None` is NaN where a number belongs.

    Raises:
        TypeError: if an attribute is missing, or there are others.
    """
    artifact = Artifact(**with_nan_by_name(Artifact, content))
    if artifact.metric_name is None:
        return artifact
    numbers = {"metric": artifact.metric, "model_metric": artifact.model_metric}
    return dataclasses.replace(artifact, **with_nan(dict[str, float], numbers))


def artifact_table(artifacts: Sequence[Artifact]) -> Table:
    """A rich table of artifacts, without what none of them has: few of them side by side, more in rows."""
    table, rows = Table(), [artifact_row(artifact) for artifact in artifacts]
    names = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    if len(rows) <= _MOST_SIDE_BY_SIDE:  # ten columns would not fit a narrow terminal
        for column, text in enumerate(["file", *(row["file"] for row in rows)]):
            table.add_column(text, justify="right" if column else "left", overflow="fold")
        for name in names[1:]:
            table.add_row(name, *(row[name] for row in rows))
        return table
    for column, name in enumerate(names):
        table.add_column(name, justify="left" if column < 2 else "right", no_wrap=column < 2)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def artifact_row(artifact: Artifact) -> dict[str, str]:
    """The texts of an artifact's row in a table, by column name."""
    agreement, metric = artifact.agreement, artifact.metric
    return {
        "file": os.path.basename(artifact.path),
        "format": variant_label(artifact),
        "size": format_kib(artifact.num_bytes),
        "difference": f"{artifact.relative_difference:.1e}",
        "agreement": "" if agreement is None else f"{agreement:.1%}",
        "metric (Keras)": "" if metric is None else f"{metric:.4g} ({artifact.model_metric:.4g})",
        "median ms": f"{artifact.latency_ms:.3f}",
        "p90 ms": f"{artifact.latency_p90_ms:.3f}",
        "memory": format_kib(artifact.peak_memory),
        "arena": format_kib(artifact.arena_bytes),
    }


def variant_label(artifact: Artifact) -> str:
    """Format and precision of an artifact as text."""
    return artifact.format if artifact.quantize is None else f"{artifact.format} {artifact.quantize}"


def format_kib(num_bytes: int | None) -> str:
    """A size as text, `""` for `None`."""
    return "" if num_bytes is None else f"{num_bytes / 1024:,.1f} KiB"


def size_on_disk(path: str | pathlib.Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names
    )
