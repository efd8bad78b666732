"""The states that a run of `compress` writes to disk, so that it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import keras
import numpy as np

from keras_taylor.cutting.surgery import build_smaller_compiled
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.planning import kept_units, label_as_planned
from keras_taylor.reports.info import Info
from keras_taylor.support.files import exclusive, to_json_text
from keras_taylor.support.optimizers import persistent_variables
from keras_taylor.support.replicas import bytes_from_first_process, from_first_process, is_first_process
from keras_taylor.support.types import Array

_STATE_FORMAT = 1
_FILE_NAME = re.compile(r"round-(\d{4,})-([0-9a-f]{16})\.npz")
_UNFINISHED = "unfinished-*.tmp"
# A file of another origin can be anything.
_READ_ERRORS = (
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    zlib.error,
    zipfile.BadZipFile,
)

CallDescription: TypeAlias = dict[str, Any]  # what `describe_call` returns, as JSON can hold it


@dataclasses.dataclass
class State:
    """Everything that the next rounds depend on.

    Attributes:
        plans: The `Plan` of each completed round, in the indices of the model that it was made for. One
            after the other, they lead from the original to the model.
        info: The `Info` so far.
        seed: The number from which the random seeds of all rounds follow.
        variables: Values of the model's variables, those of its metrics left out.
        optimizer: Values of the optimizer's variables.
        optimizer_class: Name of the optimizer's class.
        path: The file that the state was read from.
    """

    plans: list[Plan]
    info: Info
    seed: int
    variables: list[Array]
    optimizer: list[Array]
    optimizer_class: str
    path: pathlib.Path | None = None


class StoredState(NamedTuple):
    """A state in a file, and the call of `compress` that it belongs to."""

    state: State
    call: CallDescription


def capture(model: keras.Model, plans: list[Plan], info: Info, seed: int) -> State:
    """The `State` of a run whose last round led to `model`."""
    variables = _read_values(persistent_variables(model))
    optimizer = _read_values(model.optimizer.variables)
    return State(plans, info, seed, variables, optimizer, type(model.optimizer).__name__)


def draw_seed() -> int:
    """A number from which the seeds of all rounds follow, the same in all processes."""
    return int(from_first_process(np.array([np.random.randint(2**31 - 1)], np.int32))[0])


def restore_model(original: keras.Model, state: State) -> keras.Model:
    """The model of a state: cut from the original by the same plans, with the stored values.

    Raises:
        ValueError: if the stored values do not fit the model.
    """
    model = original
    for plan in state.plans:
        labeled = label_as_planned(model, plan)
        model = build_smaller_compiled(labeled, kept_units(labeled, plan), compiled_as=original, carry=False)
    if not _assign_values(persistent_variables(model), state.variables):
        raise ValueError(
            "The state does not fit the model that its plans lead to; another version of Keras may "
            "have written it. Pass another directory, or delete the file. "
            f"Received: backup_dir with '{state.path}'"
        )
    # an optimizer makes its variables on first use
    same = type(model.optimizer).__name__ == state.optimizer_class
    if same and len(model.optimizer.variables) < len(state.optimizer):
        model.optimizer.build(model.trainable_variables)
    if not same or not _assign_values(model.optimizer.variables, state.optimizer):
        warnings.warn(
            "The optimizer that the model is compiled with is not the one whose state is in "
            f"'{state.path}'; it starts from the beginning.",
            stacklevel=2,
        )
    return model


def describe_call(model: keras.Model, **settings: Any) -> CallDescription:
    """What tells a call from others: digests of the model and its weights, and the settings."""
    weights = hashlib.sha256()
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        weights.update(f"{value.dtype}{value.shape}".encode())
        weights.update(np.ascontiguousarray(value).tobytes())
    return {
        _LAYER_NAMES: [
            layer.name for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)
        ],
        _ARCHITECTURE: hashlib.sha256(_describe_architecture(model).encode()).hexdigest(),
        _WEIGHTS: weights.hexdigest(),
        **settings,
    }


_LAYER_NAMES, _ARCHITECTURE = "names of layers", "architecture of the model"
_WEIGHTS = "weights of the model"


class Backups:
    """The newest states of one run, in a directory.

    Of several processes only the first one reads and writes files. It sends their content to the others,
    so the directory need not be shared.

    Args:
        directory: Path of the directory, which is made if missing.
        call: What `describe_call` returned. States of another call are refused.
        keep: Numbers of rounds whose states are not removed.

    Attributes:
        state: The newest `State` that can be read; `None` if there is none.

    Raises:
        ValueError: if the directory cannot be written to, or belongs to another call.
    """

    def __init__(
        self, directory: str | os.PathLike[str], call: CallDescription, keep: Iterable[int] = ()
    ) -> None:
        self._given, self._keep = directory, frozenset(keep)
        self._call = json.loads(to_json_text(call, default=str))  # in the form in which a file returns it
        self._directory = pathlib.Path()
        self.state: State | None = None
        self._latest: pathlib.Path | None = None
        content = bytes_from_first_process(self._open)
        if content and self.state is None:
            self.state = _parse_state(content, pathlib.Path(directory)).state

    def _open(self) -> bytes:
        """Finds the newest state; returns the content of its file, empty if there is none."""
        self._directory = _check_writable(self._given)
        self.state = self._newest()
        self._latest = self.state.path if self.state else None
        return self._latest.read_bytes() if self._latest else b""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context of rounds: no other process can have one for the same directory.

        What killed processes left half-written is removed. Where a system or a file system has no such
        locks, nobody is refused.

        Raises:
            ValueError: if another process is in such a context.
        """
        with contextlib.ExitStack() as stack:

            def hold() -> bytes:
                if not stack.enter_context(exclusive(self._directory)):
                    raise ValueError(
                        "`backup_dir` is in use: another process runs `compress` with it now, and two would "
                        "remove each other's states. Wait until that one ends, or pass another directory. "
                        f"Received: backup_dir={str(self._directory)!r}"
                    )
                for path in self._directory.glob(_UNFINISHED):
                    path.unlink(missing_ok=True)
                return b""

            bytes_from_first_process(hold)
            yield

    def write(self, state: State) -> None:
        """Adds a state, and keeps the one before. If that fails, it warns and the run continues."""
        if not is_first_process():
            return
        try:
            path = self._write_file(state)
        except OSError as error:
            before = (
                f"the state of round {_round_of(self._latest)} stays" if self._latest else "there is none yet"
            )
            warnings.warn(
                f"The state after round {len(state.plans)} could not be written ({error}); {before}. The "
                f"run continues. Free some space. Received: backup_dir={str(self._directory)!r}",
                stacklevel=2,
            )
            return
        self._remove_all_but({path, self._latest})
        self._latest = path

    def finish(self) -> None:
        """Keeps only the last state, with which the same call returns the finished model at once."""
        if self._latest is not None:
            self._remove_all_but({self._latest})

    def of_round(self, number: int) -> State:
        """The `State` after one of the rounds in `keep`.

        Raises:
            ValueError: if it is missing or damaged.
        """
        content = bytes_from_first_process(lambda: self._content_of_round(number))
        return _parse_state(content, pathlib.Path(self._given)).state

    def _content_of_round(self, number: int) -> bytes:
        paths = [path for path in self._paths() if _round_of(path) == number]
        try:
            _read_state(paths[0])
            return paths[0].read_bytes()
        except (IndexError, *_READ_ERRORS) as error:
            raise ValueError(
                f"The state after round {number}, where one of the goals was reached, cannot be read "
                f"({error}). Pass another directory: the run then starts from the beginning. "
                f"Received: backup_dir={str(self._directory)!r}"
            ) from error

    def _newest(self) -> State | None:
        paths = self._paths()
        for number, path in enumerate(paths, 1):
            try:
                state, call = _read_state(path)
            except _READ_ERRORS as error:
                last = number == len(paths)
                then = (
                    "there is no other, so the run starts from the beginning"
                    if last
                    else "the one before is used"
                )
                warnings.warn(f"'{path}' cannot be used ({error}); {then}.", stacklevel=2)
                continue
            self._check(call)
            return state
        return None

    def _check(self, call: CallDescription) -> None:
        keys = {**call, **self._call}
        different = [_describe_difference(k, call.get(k), self._call.get(k)) for k in keys]
        different = [text for text in different if text]
        if different:
            raise ValueError(
                f"`backup_dir` holds the state of another call: {'; '.join(different)}. Pass another "
                "directory, or delete the files round-*.npz in it. "
                f"Received: backup_dir={str(self._directory)!r}"
            )

    def _write_file(self, state: State) -> pathlib.Path:
        temporary = self._directory / f"unfinished-{os.getpid()}.tmp"
        try:
            with open(temporary, "w+b") as file:
                np.savez(file, allow_pickle=False, **_state_entries(state, self._call))
                file.flush()
                os.fsync(file.fileno())
                digest = _digest_file(file)
            path = self._directory / f"round-{len(state.plans):04}-{digest}.npz"
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync(self._directory)
        return path

    def _remove_all_but(self, paths: Collection[pathlib.Path | None]) -> None:
        for path in set(self._paths()).difference(path for path in paths if path):
            if _round_of(path) not in self._keep:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _paths(self) -> list[pathlib.Path]:
        """The files of all states, newest first."""
        times = {}
        for path in self._directory.iterdir():
            if _FILE_NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process has removed it
                    times[path] = _round_of(path), path.stat().st_mtime_ns
        return sorted(times, key=times.__getitem__, reverse=True)


def _check_writable(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The directory as a path. It is made if missing; a ValueError says why no file can be written in it."""
    try:
        path = pathlib.Path(directory).absolute()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"unfinished-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"`backup_dir` cannot be written to ({type(error).__name__}: {error}). Expected the path of a "
            f"directory, which is made if missing, and not of a file. Received: backup_dir={directory!r}"
        ) from error
    return path


def _sync(directory: pathlib.Path) -> None:
    """Makes a new name in a directory durable, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _state_entries(state: State, call: CallDescription) -> dict[str, Array]:
    """The arrays of a state's `.npz` file. The first one holds everything else as JSON."""
    about = {
        "format": _STATE_FORMAT,
        "call": call,
        "plans": [json.loads(plan.to_json()) for plan in state.plans],
        "info": json.loads(state.info.to_json()),
        "seed": state.seed,
        "variables": len(state.variables),
        "optimizer": len(state.optimizer),
        "optimizer_class": state.optimizer_class,
    }
    arrays = {f"{kind}-{i}": a for kind in _ARRAY_KINDS for i, a in enumerate(getattr(state, kind))}
    return {"about": np.frombuffer(to_json_text(about).encode(), np.uint8), **arrays}


_ARRAY_KINDS = ("variables", "optimizer")  # attributes of `State`


def _read_state(path: pathlib.Path) -> StoredState:
    """The state in a file.

    Raises:
        ValueError: if the content is not that which the name of the file was made from.
    """
    content = path.read_bytes()
    match = _FILE_NAME.fullmatch(path.name)
    if match is None or _digest_file(io.BytesIO(content)) != match.group(2):
        raise ValueError("its content is not what was written")
    return _parse_state(content, path)


def _parse_state(content: bytes, path: pathlib.Path) -> StoredState:
    """The state in the content of a file."""
    with np.load(io.BytesIO(content), allow_pickle=False) as entries:
        about = json.loads(entries["about"].tobytes())
        if about["format"] != _STATE_FORMAT:
            raise ValueError(f"format {about['format']}, expected {_STATE_FORMAT}")
        if not isinstance(about["seed"], int) or not isinstance(about["call"], dict):
            raise ValueError("no seed or no call in it")
        arrays = {kind: [entries[f"{kind}-{i}"] for i in range(about[kind])] for kind in _ARRAY_KINDS}
    plans = [Plan.from_json(to_json_text(plan)) for plan in about["plans"]]
    info = Info.from_json(to_json_text(about["info"]))
    state = State(plans, info, about["seed"], **arrays, optimizer_class=about["optimizer_class"], path=path)
    return StoredState(state, about["call"])


def _digest_file(file: io.BytesIO | io.BufferedRandom) -> str:
    """The digest of an open file's content. The position is at the start afterwards."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    file.seek(0)
    return digest


def _round_of(path: pathlib.Path) -> int:
    """The round in the name of a state's file."""
    return int(cast("re.Match[str]", _FILE_NAME.fullmatch(path.name)).group(1))


def _read_values(variables: Iterable[keras.Variable]) -> list[Array]:
    return [_to_storable(keras.ops.convert_to_numpy(v)) for v in variables]


def _to_storable(value: Array) -> Array:
    """NumPy's files cannot hold bfloat16 and similar types; float32 holds their values exactly."""
    return value if value.dtype.isbuiltin == 1 else value.astype(np.float32)


def _assign_values(variables: Sequence[keras.Variable], values: Sequence[Array]) -> bool:
    """Assigns values to the first variables, and returns `True`, if all shapes fit."""
    shapes = [tuple(v.shape) for v in variables[: len(values)]]
    fit = shapes == [value.shape for value in values]
    if fit:
        for variable, value in zip(variables, values, strict=False):
            variable.assign(value)
    return fit


def _describe_architecture(model: keras.Model) -> str:
    """A text that tells a model's structure from others: its configuration, layer classes and shapes."""
    seen = [(type(layer).__name__, [list(w.shape) for w in layer.weights]) for layer in model.layers]
    try:
        config = model.get_config()
    except Exception:  # a layer without a configuration may raise any error
        config = None
    # Keras numbers inputs and models without a name, in each process from the start; plans ignore these names
    names = dict.fromkeys([model.name, *_names_of_inputs(config)])
    names = {name: f"name {number}" for number, name in enumerate(names)}
    text = json.dumps([seen, config], sort_keys=True, default=lambda value: type(value).__name__)
    for name, neutral in names.items():
        text = text.replace(json.dumps(name), json.dumps(neutral))
    return text


def _names_of_inputs(config: Any) -> Iterator[str]:
    """Names of all input layers in a model's configuration, those in sub-models among them."""
    if isinstance(config, dict):
        if config.get("class_name") == "InputLayer":
            yield config["config"]["name"]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _names_of_inputs(part)


def _describe_difference(key: str, there: Any, here: Any) -> str:
    """How two calls differ in one setting, in words; empty if they are equal."""
    if there == here:
        return ""
    if key == _LAYER_NAMES and there and here:
        there, here = next(
            (a, b) for a, b in itertools.zip_longest(there, here, fillvalue="no more layers") if a != b
        )
        return (
            f"{key}: {there!r} there, {here!r} here (call `keras.utils.clear_session()` before you build a "
            "model, and names are numbered from the start)"
        )
    if key in (_ARCHITECTURE, _WEIGHTS):
        return f"{key} {'differs' if key == _ARCHITECTURE else 'differ'}"
    return f"{key}: {there!r} there, {here!r} here"
