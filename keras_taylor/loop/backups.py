"""What a run leaves on disk, so that it can go on."""

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

import keras
import numpy as np

from keras_taylor.cutting.surgery import build_smaller_compiled
from keras_taylor.plans.plan import Plan
from keras_taylor.plans.planning import kept_units
from keras_taylor.reading.groups import label_model
from keras_taylor.reports.report import Info
from keras_taylor.support.replicas import bytes_from_first_process, from_first_process, is_first_process

_FORMAT = 1
_NAME = re.compile(r"round-(\d{4,})-([0-9a-f]{16})\.npz")
_UNFINISHED = "unfinished-*.tmp"


@dataclasses.dataclass
class State:
    """Everything that the rounds to come depend on.

    Attributes:
        plans: The `Plan` of each completed round, in the indices of the model that it was
            made for: one after the other they lead from the original to the model.
        info: The `Info` so far.
        seed: Number that the random seeds of all rounds come from.
        variables: Values of the model's variables, those of its metrics left out.
        optimizer: Values of the optimizer's variables.
        optimizer_class: Name of its class.
        path: The file that it was read from.
    """

    plans: list[Plan]
    info: Info
    seed: int
    variables: list[np.ndarray]
    optimizer: list[np.ndarray]
    optimizer_class: str
    path: pathlib.Path | None = None


def capture(model, plans, info, seed):
    """The `State` of a run whose last round led to `model`."""
    values = _values(_lasting_variables(model)), _values(model.optimizer.variables)
    return State(plans, info, seed, *values, type(model.optimizer).__name__)


def drawn_seed():
    """A number that the seeds of all rounds come from, the same in all processes."""
    return int(from_first_process(np.array([np.random.randint(2**31 - 1)], np.int32))[0])


def restore_model(original, state):
    """The model of a state, made from the original by the same cuts, with the values of then."""
    model = original
    for plan in state.plans:
        labeled = label_model(model, exact=plan.exact)
        model = build_smaller_compiled(labeled, kept_units(labeled, plan), compiled_as=original, carry=False)
    if not _assigned(_lasting_variables(model), state.variables):
        raise ValueError(
            "The state does not fit the model that its plans lead to; another version of Keras may "
            "have written it. Pass another directory, or delete the file. "
            f"Received: backup_dir with '{state.path}'"
        )
    # an optimizer makes its variables when it is first used; those of a trained model are there
    same = type(model.optimizer).__name__ == state.optimizer_class
    if same and len(model.optimizer.variables) < len(state.optimizer):
        model.optimizer.build(model.trainable_variables)
    if not same or not _assigned(model.optimizer.variables, state.optimizer):
        warnings.warn(
            "The optimizer that the model is compiled with is not the one whose state is in "
            f"'{state.path}'; it starts anew.",
            stacklevel=2,
        )
    return model


def describe_call(model, **settings):
    """What a state belongs to: digests of the model and of its weights, and the settings, a dict."""
    weights = hashlib.sha256()
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        weights.update(f"{value.dtype}{value.shape}".encode())
        weights.update(np.ascontiguousarray(value).tobytes())
    return {
        _NAMES: [layer.name for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)],
        _ARCHITECTURE: hashlib.sha256(_architecture(model).encode()).hexdigest(),
        _WEIGHTS: weights.hexdigest(),
        **settings,
    }


_NAMES, _ARCHITECTURE, _WEIGHTS = "names of layers", "architecture of the model", "weights of the model"


class Backups:
    """The newest states of one run, in a directory.

    Of several processes only the first one reads and writes files; the others hear from it what they
    hold, so the directory need not be theirs.

    Args:
        directory: Path of the directory, made if missing.
        call: What `describe_call` returned; states of another call are refused.
        keep: Numbers of rounds whose states stay.

    Attributes:
        state: The newest `State` that can be read, or `None`.

    Raises:
        ValueError: if the directory cannot be written to, or belongs to another call.
    """

    def __init__(self, directory, call, keep=()):
        self._given, self._keep = directory, frozenset(keep)
        self._call = json.loads(json.dumps(call, default=str))  # as it will be read again
        self.state = self._latest = None
        content = bytes_from_first_process(self._opened)
        if content and self.state is None:
            self.state = _parsed(content, pathlib.Path(directory))[0]

    def _opened(self):
        """Looks into the directory; returns the content of the newest file, empty if there is none."""
        self._directory = _writable(self._given)
        self.state = self._newest()
        for path in self._directory.glob(_UNFINISHED):  # of runs that were killed while they wrote
            path.unlink(missing_ok=True)
        self._latest = self.state and self.state.path
        return self._latest.read_bytes() if self._latest else b""

    def write(self, state):
        """Adds a state; it and the one before stay. Warns, and goes on, if that is not possible."""
        if not is_first_process():
            return
        try:
            path = self._written(state)
        except OSError as error:
            before = f"that of round {_round_of(self._latest)} stays" if self._latest else "there is none yet"
            warnings.warn(
                f"The state after round {len(state.plans)} could not be written ({error}); {before}. The "
                f"run goes on. Free some space. Received: backup_dir={str(self._directory)!r}",
                stacklevel=2,
            )
            return
        self._remove_all_but({path, self._latest})
        self._latest = path

    def finish(self):
        """Leaves only the last state: with it the same call returns the finished model at once."""
        if self._latest is not None:
            self._remove_all_but({self._latest})

    def of_round(self, number):
        """The `State` after one of the rounds that are kept.

        Raises:
            ValueError: if it is gone or damaged.
        """
        return _parsed(
            bytes_from_first_process(lambda: self._content_of_round(number)), pathlib.Path(self._given)
        )[0]

    def _content_of_round(self, number):
        paths = [path for path in self._paths() if _round_of(path) == number]
        try:
            _read(paths[0])
            return paths[0].read_bytes()
        except (IndexError, OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"The state after round {number}, where one of the goals was reached, cannot be read "
                f"({error}). Pass another directory: the run then starts anew. "
                f"Received: backup_dir={str(self._directory)!r}"
            ) from error

    def _newest(self):
        paths = self._paths()
        for number, path in enumerate(paths, 1):
            try:
                state, call = _read(path)
            except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
                last = number == len(paths)
                then = "there is no other, so the run starts anew" if last else "the one before is used"
                warnings.warn(f"'{path}' cannot be used ({error}); {then}.", stacklevel=2)
                continue
            self._check(call)
            return state
        return None

    def _check(self, call):
        keys = {**call, **self._call}
        different = [_difference(k, call.get(k), self._call.get(k)) for k in keys]
        different = [text for text in different if text]
        if different:
            raise ValueError(
                f"`backup_dir` holds the state of another call: {'; '.join(different)}. Pass another "
                "directory, or delete the files round-*.npz in it. "
                f"Received: backup_dir={str(self._directory)!r}"
            )

    def _written(self, state):
        temporary = self._directory / f"unfinished-{os.getpid()}.tmp"
        try:
            with open(temporary, "w+b") as file:
                np.savez(file, **_entries(state, self._call))
                file.flush()
                os.fsync(file.fileno())
                digest = _digest(file)
            path = self._directory / f"round-{len(state.plans):04}-{digest}.npz"
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync(self._directory)
        return path

    def _remove_all_but(self, paths):
        for path in set(self._paths()) - paths:
            if _round_of(path) not in self._keep:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _paths(self):
        """States, newest first."""
        paths = [path for path in self._directory.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(paths, key=lambda path: (_round_of(path), path.stat().st_mtime_ns), reverse=True)


def _writable(directory):
    """The directory as a path; it exists and a file in it can be written, or a ValueError says why not."""
    try:
        path = pathlib.Path(directory).absolute()
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"unfinished-{os.getpid()}.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"`backup_dir` cannot be written to ({type(error).__name__}: {error}). Expected the path of a "
            f"directory, there or to be made, and not of a file. Received: backup_dir={directory!r}"
        ) from error
    return path


def _sync(directory):
    """Makes a new name in a directory durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _entries(state, call):
    about = {
        "format": _FORMAT,
        "call": call,
        "plans": [json.loads(plan.to_json()) for plan in state.plans],
        "info": json.loads(state.info.to_json()),
        "seed": state.seed,
        "variables": len(state.variables),
        "optimizer": len(state.optimizer),
        "optimizer_class": state.optimizer_class,
    }
    arrays = {f"{kind}-{i}": a for kind in _ARRAYS for i, a in enumerate(getattr(state, kind))}
    return {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays}


_ARRAYS = ("variables", "optimizer")


def _read(path):
    """The `State` in a file, and the call that it belongs to."""
    content = path.read_bytes()
    if _digest(io.BytesIO(content)) != _NAME.fullmatch(path.name).group(2):
        raise ValueError("its content is not what was written")
    return _parsed(content, path)


def _parsed(content, path):
    """The `State` in the content of a file, and the call that it belongs to."""
    with np.load(io.BytesIO(content), allow_pickle=False) as entries:
        about = json.loads(entries["about"].tobytes())
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']}, expected {_FORMAT}")
        arrays = {kind: [entries[f"{kind}-{i}"] for i in range(about[kind])] for kind in _ARRAYS}
    plans = [Plan.from_json(json.dumps(plan)) for plan in about["plans"]]
    info = Info.from_json(json.dumps(about["info"]))
    state = State(plans, info, about["seed"], **arrays, optimizer_class=about["optimizer_class"], path=path)
    return state, about["call"]


def _digest(file):
    """Digest of an open file's content, and the position at its start again."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    file.seek(0)
    return digest


def _round_of(path):
    return int(_NAME.fullmatch(path.name).group(1))


def _lasting_variables(model):
    """Weights and the seeds of random layers."""
    of_metrics = {id(v) for v in model.metrics_variables}
    return [v for v in model.variables if id(v) not in of_metrics]


def _values(variables):
    return [_as_numpy_knows(keras.ops.convert_to_numpy(v)) for v in variables]


def _as_numpy_knows(value):
    """bfloat16 and its like, which no file of NumPy's can hold, as float32, which holds them exactly."""
    return value if value.dtype.isbuiltin == 1 else value.astype(np.float32)


def _assigned(variables, values):
    """Gives variables their values; whether these fit. An optimizer may have more variables."""
    shapes = [tuple(v.shape) for v in variables[: len(values)]]
    fit = shapes == [value.shape for value in values]
    if fit:
        for variable, value in zip(variables, values, strict=False):
            variable.assign(value)
    return fit


def _architecture(model):
    """Text that tells a model's structure: its configuration if there is one, else what can be seen."""
    seen = [(type(layer).__name__, [list(w.shape) for w in layer.weights]) for layer in model.layers]
    try:
        config = model.get_config()
    except Exception:  # a layer without configuration may raise anything
        config = None
    # Keras numbers what has no name, anew in each process; plans do not speak of inputs and the model
    names = dict.fromkeys([model.name, *_names_of_inputs(config)])
    names = {name: f"name {number}" for number, name in enumerate(names)}
    text = json.dumps([seen, config], sort_keys=True, default=lambda value: type(value).__name__)
    for name, neutral in names.items():
        text = text.replace(json.dumps(name), json.dumps(neutral))
    return text


def _names_of_inputs(config):
    """Names of all input layers in a model's configuration, those of sub-models too."""
    if isinstance(config, dict):
        if config.get("class_name") == "InputLayer":
            yield config["config"]["name"]
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _names_of_inputs(part)


def _difference(key, there, here):
    """How two calls differ in one setting, in words; empty if they do not."""
    if there == here:
        return ""
    if key == _NAMES and there and here:
        there, here = next(
            (a, b) for a, b in itertools.zip_longest(there, here, fillvalue="no more layers") if a != b
        )
        return (
            f"{key}: {there!r} there, {here!r} here (`keras.utils.clear_session()` before a model is "
            "built makes names start anew)"
        )
    if key in (_ARCHITECTURE, _WEIGHTS):
        return f"{key} {'differs' if key == _ARCHITECTURE else 'differ'}"
    return f"{key}: {there!r} there, {here!r} here"
