"""How long each layer takes at which widths: a table that is measured once for a machine and kept."""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time

import keras
import numpy as np
from scipy.interpolate import RegularGridInterpolator

from keras_taylor.exports.export_worker import JobError, run_job
from keras_taylor.exports.timing import time_layers
from keras_taylor.reading.cloning import clone_operation
from keras_taylor.reading.tracing import UnsupportedModelError
from keras_taylor.rules.base import KeptLabels
from keras_taylor.support.atomic_files import AtomicFile

FRACTIONS = (0.25, 0.5, 1.0)  # of a layer's channels, in and out
_OFFSETS = {1: (3, 7), 4: (4,), 8: (8,)}  # multiple -> how far below coarser ones its widths may be
_COARSEST, _PAYS = 16, 1.05
_ALIGNED = 8  # wide layers are timed at multiples of this
_PACKAGES = ("keras", "tensorflow", "jax", "torch", "onnxruntime", "tf2onnx", "ai-edge-litert")
_CHUNK = 12  # layers a job, after each of which the table is kept


class LayerTimes:
    """Times of a network's mixing layers alone, at a grid of widths, and at all widths in between.

    Args:
        channels: `groups.LabeledModel` of the whole model.
        form: Key of `formats.VARIANTS`; "keras": this process's backend.
        batch_size: Examples a call.
        cache_dir: Where tables are kept; `None`: `keras_taylor` in Keras' own folder (`KERAS_HOME`, else
            `~/.keras`).
        say: A function of a text: told how many layers have to be timed, and about how long it takes.

    Raises:
        ValueError: if no layer can be timed alone.
    """

    def __init__(self, labeled, variant, batch_size=1, cache_dir=None, say=None):
        self._table = TimeTable(variant, batch_size, cache_dir, say)
        grids = {name: _Grid(labeled, *found) for name, found in _mixing(labeled).items()}
        self._table.fill([point for grid in grids.values() for point in grid.points()])
        self._grids = {name: grid for name, grid in grids.items() if grid.read(self._table)}
        if not self._grids:
            raise ValueError(
                "None of the layers can be timed alone, so nothing is known of what narrower ones save. Ask "
                f"for FLOPs in place of a latency. Received: layers {sorted(grids)} as '{variant}'"
            )

    def __call__(self, labeled):
        """A function of a mask of kept units to the sum of the layers' times, in nanoseconds.

        Args:
            channels: `groups.LabeledModel` of the same network, which may have lost channels.
        """
        found = _mixing(labeled)
        pairs = [(grid, _Widths(labeled, *found[name])) for name, grid in self._grids.items()]
        return lambda kept: sum(grid(*widths(kept)) for grid, widths in pairs)

    def best_multiple(self):
        """The multiple of channels that is worth keeping to: 1, 4, 8 or 16.

        The table holds round widths. Where layers of other widths take more than 5 % longer than
        it says for these, by the same number of channels, the next coarser multiple is looked at. Layers
        of less than 32 channels have no say.
        """
        for multiple, offsets in _OFFSETS.items():
            if all(self._excess(offset) <= _PAYS for offset in offsets):
                return multiple
        return _COARSEST

    def _excess(self, offset):
        """How much longer wide layers take, so many channels below half of them, than the table says."""
        grids = [grid for grid in self._grids.values() if not grid.narrower(offset).all()]
        masks = [grid.narrower(offset) for grid in grids]
        points = [grid.point(kept) for grid, kept in zip(grids, masks, strict=True)]
        self._table.fill(points)
        times = [self._table[point] for point in points]
        said = [grid(*grid.widths(kept)) for grid, kept in zip(grids, masks, strict=True)]
        pairs = [(ns, expected) for ns, expected in zip(times, said, strict=True) if ns is not None]
        return sum(ns for ns, _ in pairs) / sum(expected for _, expected in pairs) if pairs else 1.0


class TimeTable:
    """Measured times by layer, in memory and in a file.

    Args:
        form, batch_size, cache_dir, say: As in `LayerTimes`.
    """

    def __init__(self, variant, batch_size, cache_dir=None, say=None):
        self._form, self._batch_size, self._say = variant, batch_size, say or (lambda text: None)
        folder = cache_dir or os.path.join(os.environ.get("KERAS_HOME") or "~/.keras", "keras_taylor")
        self._machine = {"form": variant, "batch_size": batch_size, **_machine(variant)}
        name = f"layer-times-{_digest(self._machine)}.json"
        self.path = pathlib.Path(folder).expanduser() / name
        self._times = self._read()

    def __getitem__(self, point):
        """Nanoseconds of a layer, `None` if it cannot be timed alone."""
        return self._times[_digest(point)]

    def fill(self, points):
        """Times what is not there yet.

        Args:
            points: Dicts with "layer" (serialized), "shape" (of its input) and "dtype".
        """
        missing = list({_digest(p): p for p in points if _digest(p) not in self._times}.values())
        done = 0
        while done < len(missing):
            chunk = missing[done : done + (_CHUNK if done > 3 else 2)]
            start = time.perf_counter()
            for point, value in zip(chunk, self._measured(chunk), strict=True):
                self._times[_digest(point)] = value
            done += len(chunk)
            if done == 4:  # the first ones wait for libraries
                seconds = (time.perf_counter() - start) / len(chunk) * (len(missing) - done)
                self._say(
                    f"timing {len(missing)} layers for '{self._form}', once for this machine: about "
                    f"{seconds:.0f} s more"
                )
            self._write()

    def _measured(self, points):
        arguments = {"variant": self._form, "layers": points, "batch_size": self._batch_size}
        if self._form == "keras":
            return time_layers(**arguments)
        try:
            return run_job("tensorflow", "time_layers", **arguments)
        except JobError:  # native code that crashed takes its neighbors along: one by one then
            return [None] if len(points) == 1 else [t for p in points for t in self._measured([p])]

    def _read(self):
        try:
            return json.loads(self.path.read_text("utf-8"))["times"]
        except (OSError, ValueError, KeyError):
            return {}

    def _write(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFile(self.path) as draft:
                content = {"machine": self._machine, "times": {**self._read(), **self._times}}
                draft.path.write_text(json.dumps(content), "utf-8")
                draft.move_to(self.path)
        except OSError as error:  # it will be measured again, no more
            self._say(f"the times of layers cannot be kept ({error})")


class _Widths:
    """How many channels one call reads and makes."""

    def __init__(self, labeled, call, effect):
        first = getattr(call.operation, "data_format", None) == "channels_first"
        sizes = [labeled.graph.shapes[i][1 if first else -1] for i in (call.inputs[0], call.outputs[0])]
        labels = (labeled.labels[call.inputs[0]], effect.outputs[0])
        self.read, self.made = (_units(labeled, a, size) for a, size in zip(labels, sizes, strict=True))

    def __call__(self, kept):
        kept = np.append(kept, True)  # the -1 of what stays
        return int(kept[self.read].sum()), int(kept[self.made].sum())


def _units(labeled, labels, size):
    """The unit of each channel; labels that are all the same are stored once."""
    units = labeled.units_of(labels.reshape(-1))
    return np.repeat(units, size or 1) if units.size == 1 else units


class _Grid:
    """One layer alone at several widths."""

    def __init__(self, labeled, call, effect):
        self._labeled, self._call, self._effect = labeled, call, effect
        self.widths = _Widths(labeled, call, effect)
        read, made = (np.unique(u[u >= 0]) for u in (self.widths.read, self.widths.made))
        self._tied = bool(np.intersect1d(read, made).size)
        self._units = [np.union1d(read, made)] if self._tied else [read, made]
        self._axes = [[units[:n] for n in grid_of(units.size)] for units in self._units]
        self._removal_order = np.union1d(read, made)

    def points(self):
        """What has to be timed: one row of the table for each place of the grid."""
        return [self.point(kept) for kept in self._masks()]

    def narrower(self, offset):
        """The mask that keeps so many units less than half of the layer's, in and out, where it is wide."""
        kept = np.ones(self._labeled.num_units, bool)
        for units in self._units:
            if units.size >= 2 * _COARSEST:
                half = -(-units.size // (2 * _COARSEST)) * _COARSEST
                kept[units[half - offset :]] = False
        return kept

    def point(self, kept):
        """The layer with these units kept, as `TimeTable` knows it."""
        call = self._call
        kept_labels = KeptLabels(lambda labels: np.append(kept, True)[self._labeled.units_of(labels)])
        changes = kept_labels.changes(self._effect.config)
        layer = clone_operation(call.operation, call.name, changes)
        dtype = next(x.dtype for x in call.site.flat if isinstance(x, keras.KerasTensor))
        labels = self._labeled.labels[call.inputs[0]]
        shape = list(self._labeled.graph.shapes[call.inputs[0]])
        for axis, size in enumerate(labels.shape):
            if size > 1:
                shape[axis] = self.widths(kept)[0]
        return {"layer": _bare(layer), "shape": shape[1:], "dtype": keras.backend.standardize_dtype(dtype)}

    def read(self, table):
        """Takes the times of all points; whether all are there."""
        times = [table[point] for point in self.points()]
        if None in times:
            return False
        widths = np.array([self.widths(kept) for kept in self._masks()])
        shape = [len(axis) for axis in self._axes]
        columns = [0] if self._tied else [0, 1]
        if self._tied and not np.ptp(widths[:, 0]):
            columns = [1]
        places = [np.unique(widths[:, c]) for c in columns]
        self._columns = [c for c, place in zip(columns, places, strict=True) if len(place) > 1]
        values = np.array(times, float).reshape(shape)
        values = np.squeeze(values, tuple(k for k, p in enumerate(places) if len(p) == 1))
        for axis in range(values.ndim):  # a narrower layer takes no longer, and noise only adds
            values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
        self._value = float(values) if not self._columns else None
        if self._columns:
            grid = [p for p in places if len(p) > 1]
            self._between = RegularGridInterpolator(grid, values, bounds_error=False, fill_value=None)
        return True

    def __call__(self, read, made):
        """Nanoseconds at these widths, in between bilinear."""
        if self._value is not None:
            return self._value
        return float(self._between([[(read, made)[c] for c in self._columns]])[0])

    def _masks(self):
        first, *second = self._axes
        for units in first:
            for others in second[0] if second else [first[0][:0]]:
                kept = np.ones(self._labeled.num_units, bool)
                kept[self._removal_order] = False
                kept[units] = kept[others] = True
                yield kept


def grid_of(num):
    """The numbers of units at which a layer is timed, rising: of many multiples of eight."""
    if not num:
        return [0]
    step = _ALIGNED if num >= 2 * _ALIGNED else 1
    return sorted({min(num, max(step, round(num * f / step) * step)) for f in FRACTIONS} | {num})


def _mixing(labeled):
    """Calls of layers with kernels, of one input and one output, by name and number of the call.

    What only has vectors, as BatchNormalization, is mostly fused into these.
    """
    found, seen = {}, {}
    for call, effect in zip(labeled.graph.calls, labeled.effects, strict=True):
        has_matrix = any(len(axes) > 1 for axes in effect.weights.values())
        if not isinstance(call.operation, keras.Layer) or not effect.work or not has_matrix:
            continue
        number = seen[call.name] = seen.get(call.name, 0) + 1
        if len(call.inputs) == len(call.outputs) == 1 and _can_be_made(call):
            found[call.name, number] = call, effect
    return found


def _can_be_made(call):
    try:
        clone_operation(call.operation, call.name)
    except UnsupportedModelError:
        return False
    return True


def _bare(layer):
    """A serialized layer without what does not change its speed; weights begin as zeros."""
    content = keras.saving.serialize_keras_object(layer)
    content.pop("build_config", None)
    content["config"] = {
        key: "zeros" if key.endswith("_initializer") else value
        for key, value in content["config"].items()
        if key not in ("name", "trainable") and not key.endswith(("_regularizer", "_constraint"))
    }
    return content


def _machine(variant):
    """What the times of a layer depend on, besides the layer."""
    found = {"processor": _processor(), "cores": os.cpu_count()}
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


def _processor():
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else f"{platform.machine()} {platform.processor()}"


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
