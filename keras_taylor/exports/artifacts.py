"""An exported model: where it is, how large, how exact, how fast."""

import dataclasses
import json
import os

from rich.table import Table

from keras_taylor.support.console import render_table


class ExportError(RuntimeError):
    """A model could not be converted, or its artifact does not run, or computes something else."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A file (of a SavedModel: a directory) that `export` wrote; `print(artifact)` is a table.

    Attributes:
        path: Where it is.
        format: "saved_model", "litert", "onnx" or "keras".
        quantize: `None` (float32), "float16", "dynamic" or "int8".
        batch_size: Examples a call takes; `None`: any number.
        num_bytes: Size on disk; of a SavedModel that of all its files.
        inputs, outputs: For each name, in the order of the model's flattened inputs and
            outputs: "shape" (batch first, `None` where free) and "dtype", and where the
            artifact takes or gives integers for reals "scale" and "zero_point":
            real = scale x (integer - zero_point).
        difference: Largest absolute difference to the Keras model's outputs.
        relative_difference: Largest difference of an output, divided by that output's largest value.
        agreement: Fraction of predictions (argmax over the last axis) that are the
            Keras model's; `None` without an output of two or more classes, or if it predicts
            the same one for all samples.
        metric, model_metric: Accuracy, or what `metric=` computes, of the artifact and of the
            Keras model on `data`; `None` without `data`.
        latency_ms, latency_p90_ms: Median and 90th percentile of the time of one call, in
            milliseconds, on one thread of this machine's CPU ("keras" format: as many as
            its backend takes).
        latency_batch: Examples in that call.
        peak_memory: Bytes by which the resident memory of a process grows that loads the
            artifact and calls it, the runtime's own included, imports not; `None` where
            the system does not tell.
        arena_bytes: LiteRT only, for one batch: bytes of the tensors that are alive together, at
            the worst point; see `runners.arena_size`. `None` else.
    """

    path: str
    format: str
    quantize: str | None
    batch_size: int | None
    num_bytes: int
    inputs: dict
    outputs: dict
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

    def to_json(self):
        """Everything as a JSON string."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text):
        """The `Artifact` that `to_json` wrote.

        Raises:
            ValueError: if the text is not such an `Artifact`.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"This is no `Artifact` that `Artifact.to_json` wrote ({type(error).__name__}: {error}). "
                f"Received: text={text[:80]!r}"
            ) from error

    def __str__(self):
        return render_table(artifact_table([self]), width=140)


def artifact_table(artifacts):
    """A rich table with one row an artifact."""
    table = Table()
    rows = [artifact_row(one) for one in artifacts]
    for column, name in enumerate(rows[0] if rows else ()):
        table.add_column(name, justify="left" if column < 2 else "right", no_wrap=column < 2)
    for row in rows:
        table.add_row(*row.values())
    return table


def artifact_row(one):
    """What tables say of an artifact: texts by the columns' names."""
    return {
        "file": os.path.basename(one.path),
        "format": variant_label(one),
        "size": format_kib(one.num_bytes),
        "difference": f"{one.relative_difference:.1e}",
        "agreement": "" if one.agreement is None else f"{one.agreement:.1%}",
        "metric (Keras)": "" if one.metric is None else f"{one.metric:.4g} ({one.model_metric:.4g})",
        "median ms": f"{one.latency_ms:.3f}",
        "p90 ms": f"{one.latency_p90_ms:.3f}",
        "memory": format_kib(one.peak_memory),
        "arena": format_kib(one.arena_bytes),
    }


def variant_label(one):
    """Format and precision of an artifact as text."""
    return one.format if one.quantize is None else f"{one.format} {one.quantize}"


def format_kib(num_bytes):
    """A size as text, `""` where it is not known."""
    return "" if num_bytes is None else f"{num_bytes / 1024:,.1f} KiB"


def size_of(path):
    """Bytes of a file, or of all files in a directory."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names
    )
