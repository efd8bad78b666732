"""A table of measured times of layers, for one machine, kept in a file."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import keras

from keras_taylor.exports.export_worker import JobError, run_job
from keras_taylor.exports.timing import IsolatedLayer, time_layers
from keras_taylor.support.files import AtomicFile, to_json_text

_PACKAGES: Final = ("keras", "tensorflow", "jax", "torch", "onnxruntime", "tf2onnx", "ai-edge-litert")
_LAYERS_PER_JOB = 12  # the table is saved after each job
_LAYERS_OF_FIRST_JOBS = 2  # short jobs, from whose times the total is estimated
_NUM_BEFORE_ESTIMATE = 4


class TimeTable:
    """Measured times by layer, in memory and in a file.

    Args:
        variant: Key of `formats.VARIANTS`; "keras" is this process's backend.
        batch_size: Number of examples in a call.
        cache_dir: Folder of the file; `None` for `keras_taylor` in Keras' own folder (`KERAS_HOME`, else
            `~/.keras`).
        say: A function that gets progress messages.

    Attributes:
        path: The file.
    """

    def __init__(
        self,
        variant: str,
        batch_size: int,
        cache_dir: str | os.PathLike[str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._variant, self._batch_size, self._say = variant, batch_size, say or (lambda text: None)
        folder = cache_dir or os.path.join(os.environ.get("KERAS_HOME") or "~/.keras", "keras_taylor")
        # "form" is the variant; another name would make tables useless that users already have
        self._machine = {"form": variant, "batch_size": batch_size, **_describe_machine(variant)}
        name = f"layer-times-{_content_key(self._machine)}.json"
        self.path = pathlib.Path(folder).expanduser() / name
        self._times = self._read()

    def __getitem__(self, layer: IsolatedLayer) -> int | None:
        """Nanoseconds of a layer, `None` if it cannot be timed alone."""
        return self._times[_content_key(layer)]

    def fill(self, layers: Iterable[IsolatedLayer]) -> None:
        """Times the layers that are not in the table yet."""
        by_key = {_content_key(layer): layer for layer in layers}
        missing = [layer for key, layer in by_key.items() if key not in self._times]
        done = 0
        while done < len(missing):
            is_first = done < _NUM_BEFORE_ESTIMATE
            chunk = missing[done : done + (_LAYERS_OF_FIRST_JOBS if is_first else _LAYERS_PER_JOB)]
            start = time.perf_counter()
            for layer, nanoseconds in zip(chunk, self._time(chunk), strict=True):
                self._times[_content_key(layer)] = nanoseconds
            done += len(chunk)
            if done == _NUM_BEFORE_ESTIMATE:  # by the second job: the first one waits for imports
                seconds = (time.perf_counter() - start) / len(chunk) * (len(missing) - done)
                self._say(
                    f"timing {len(missing)} layers for '{self._variant}', once for this machine: about "
                    f"{seconds:.0f} s more"
                )
            self._write()

    def _time(self, layers: Sequence[IsolatedLayer]) -> list[int | None]:
        if self._variant == "keras":
            return time_layers(self._variant, layers, self._batch_size)
        try:
            times: list[int | None] = run_job(
                "tensorflow",
                "time_layers",
                variant=self._variant,
                layers=layers,
                batch_size=self._batch_size,
            )
        except JobError:  # a crash of native code ends the whole job: time each layer in its own
            return [None] if len(layers) == 1 else [self._time([layer])[0] for layer in layers]
        return times

    def _read(self) -> dict[str, int | None]:
        try:
            times: dict[str, int | None] = json.loads(self.path.read_text("utf-8"))["times"]
        except (OSError, ValueError, KeyError):
            return {}
        return times

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFile(self.path) as draft:
                content = {"machine": self._machine, "times": {**self._read(), **self._times}}
                draft.path.write_text(to_json_text(content), "utf-8")
                draft.move_to(self.path)
        except OSError as error:  # the layers will be timed again, nothing worse
            self._say(f"the times of layers cannot be saved ({error})")


def _content_key(content: Mapping[str, Any]) -> str:
    """A short text that is the same for equal contents."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def _describe_machine(variant: str) -> dict[str, Any]:
    """Hardware and versions that the time of a layer depends on."""
    found: dict[str, Any] = {"processor": _processor_name(), "cores": os.cpu_count()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if variant == "keras":
        found["backend"] = keras.backend.backend()
        found["device"] = str(keras.ops.convert_to_tensor(0.0).device)
        found["threads"] = os.environ.get("OMP_NUM_THREADS")
    return found


def _processor_name() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} {platform.processor()}"
