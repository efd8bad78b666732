"""Fits one layer of a smaller model to the output of the original layer."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from keras import ops

from keras_taylor.cutting.downstream import DownstreamPath
from keras_taylor.reading.graph import Call
from keras_taylor.reading.matmul_views import (
    MatmulView,
    SampledPositions,
    find_bias_weight,
    has_no_activation,
    matmul_view,
    rows_per_example,
    sample_positions,
)
from keras_taylor.reading.walk import ComputedTensors
from keras_taylor.support.least_squares import AffineMap, Regression, Solution, limit_blas_threads
from keras_taylor.support.types import Array, BoolArray, FloatArray

# How often targets are relaxed by the slack of a rectifier. Twice was not better on held-out images.
NUM_RELAXATIONS = 1


@dataclasses.dataclass(frozen=True)
class LayerRepair:
    """The result of a repair for one layer.

    `keras_taylor.repair(..., return_repairs=True)` returns one for each layer that it looked at.

    Attributes:
        name: The layer's name, a `str`; `"outer/inner"` for a layer inside another one.
        error_before: Mean squared error of the layer's output before the repair, over held-out examples,
            relative to the mean square of the output that it should have. A `float`; `None` if no fit was
            tried.
        error_after: The same error after the repair.
        ridge: The ridge that was chosen, a `float`, relative to the mean square of what the layer reads;
            infinity if only the layer's bias was changed. `None` if the layer was left unchanged.
        reason: Why the layer was left unchanged, a `str`; `None` if it was repaired.

    Example:

    >>> plan = keras_taylor.make_plan(model, keras_taylor.score(model, (x, y)), 0.3)
    >>> small = keras_taylor.prune(model, plan)
    >>> repaired, repairs = keras_taylor.repair(small, model, plan, x, return_repairs=True)
    >>> all((one.ridge is None) != (one.reason is None) for one in repairs)
    True
    """

    name: str
    error_before: float | None = None
    error_after: float | None = None
    ridge: float | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class FitOptions:
    """How layers are fitted.

    Attributes:
        num_fit_batches: Number of batches to fit on. The remaining batches are held out.
        random: Draws the positions that are used.
        thorough: `False` uses fewer rows, and does not relax targets by the slack of a rectifier.
    """

    num_fit_batches: int
    random: np.random.Generator
    thorough: bool = True

    def __post_init__(self) -> None:
        if not self.num_fit_batches > 0:
            raise ValueError(
                f"Expected at least one batch to fit on. Received: num_fit_batches={self.num_fit_batches}"
            )


class LayerFit:
    """Fits a linear layer's kernel, and its bias if it has one, in place.

    Args:
        old, new: Tensors of the original and of the smaller model. The original has run the layer.
        old_call, call: The layer's calls in the graphs of the two models.
        outputs: Bool array over the original's outputs: which were kept.
        options: How to fit.
        old_inputs: Maps a later call of the smaller model to the tensors that its counterpart reads.
        others_lack: What other terms of a sum that its output is a part of lack, an array for each batch;
            `None`: nothing.
    """

    def __init__(
        self,
        old: ComputedTensors,
        new: ComputedTensors,
        old_call: Call,
        call: Call,
        outputs: BoolArray,
        options: FitOptions,
        old_inputs: Callable[[Call], Sequence[int]],
        others_lack: Sequence[Array] | None = None,
    ) -> None:
        self._others_lack = others_lack
        self._name, self._old_layer = call.name, old_call.operation
        self._old_view, self._view = _view_of(old_call), _view_of(call)
        self._outputs, self._options = outputs, options
        self._old_inputs, self._inputs = old.tensors[old_call.inputs[0]], new.tensors[call.inputs[0]]
        self._old_outputs = old.tensors[old_call.outputs[0]]
        self._path = DownstreamPath(old, new, call, self._old_view, self._view, outputs, old_inputs)
        self._bias_weight = find_bias_weight(new.graph, call, self._view)

    def run(self) -> LayerRepair:
        """Fits the layer; leaves it unchanged if the fit is not better on the held-out batches."""
        options, num_columns = self._options, self._view.matrix().shape[1]
        num_examples = sum(map(len, self._inputs))  # more than in the data where the batch axis holds windows
        num_rows = rows_per_example(num_columns, num_examples, options.thorough)
        with limit_blas_threads(num_rows * num_examples, num_columns):
            if not self._is_matrix_product():
                return LayerRepair(
                    self._name, reason="its output is not the product of its input and its kernel"
                )
            positions = [
                sample_positions(len(x), self._view.num_positions(x), num_rows, options.random)
                for x in self._inputs
            ]
            return self._fit(positions)

    def _is_matrix_product(self) -> bool:
        """Whether the original's output is the activation of rows times matrix plus bias."""
        places = np.arange(min(self._old_view.num_positions(self._old_inputs[0]), 64))
        positions = SampledPositions(np.zeros_like(places), places)
        computed = ops.convert_to_tensor(self._compute_old_output(0, positions))
        computed = ops.convert_to_numpy(self._old_layer.activation(computed))
        output = self._old_view.output_rows(self._old_outputs[0], positions)
        tolerance = 1e-3 if self._old_layer.compute_dtype == "float32" else 3e-2
        return bool(np.abs(computed - output).max() <= tolerance * np.abs(output).max())

    def _fit(self, positions: list[SampledPositions]) -> LayerRepair:
        """Fits on rows at these positions, given for each batch."""
        targets = [self._targets(batch, where) for batch, where in enumerate(positions)]
        weights = self._path.error_weights(targets[0].shape[1])
        regressions = self._regress(positions, targets, weights)
        solutions = [regression.solve() for regression in regressions]
        held_out = targets[self._options.num_fit_batches :]
        power = float(np.mean([(np.square(y) @ weights).mean() for y in held_out]))
        scale = max(power, float(np.finfo(np.float32).tiny))
        error_before = float(sum(solution.error_before for solution in solutions) / scale)
        ridges = [solution.ridge for solution in solutions if solution.ridge is not None]
        if not ridges:
            reason = "the fit was no better on held-out examples"
            return LayerRepair(self._name, error_before, error_before, None, reason)
        error_after = float(sum(solution.error_after for solution in solutions) / scale)
        fitted = [AffineMap(solution.change, solution.constant) for solution in solutions]
        if self._path.has_rectifier and self._options.thorough:
            for _ in range(NUM_RELAXATIONS):
                fitted = self._fit_relaxed(regressions, solutions, fitted, positions, targets)
        matrix = self._view.matrix() + np.stack([change for change, _ in fitted])
        self._view.assign(matrix.astype(np.float32))
        if self._bias_weight is not None:
            self._bias_weight.add(np.concatenate([constant for _, constant in fitted]))
        return LayerRepair(self._name, error_before, error_after, max(ridges))

    def _regress(
        self, positions: list[SampledPositions], targets: list[FloatArray], weights: FloatArray
    ) -> list[Regression]:
        """A regression for each block of the matrix, with all rows added."""
        has_constant, num_rows = self._bias_weight is not None, sum(map(len, targets))
        regressions = [
            Regression(block, has_constant, num_rows, block_weights)
            for block, block_weights in zip(self._view.matrix(), self._split(weights), strict=True)
        ]
        for batch, rows in self._rows_of_batches(positions):
            is_held_out = batch >= self._options.num_fit_batches
            for regression, x, y in zip(regressions, rows, self._split(targets[batch]), strict=True):
                regression.add(x, y, is_held_out)
        return regressions

    def _fit_relaxed(
        self,
        regressions: Sequence[Regression],
        solutions: Sequence[Solution],
        fitted: Sequence[AffineMap],
        positions: list[SampledPositions],
        targets: list[FloatArray],
    ) -> list[AffineMap]:
        """Solves again for targets that are relaxed by the slack of the rectifier, with the same ridges."""
        bias, pairs = self._view.bias(), zip(self._view.matrix(), fitted, strict=True)
        blocks = [((block + c).astype(np.float32), k.astype(np.float32)) for block, (c, k) in pairs]
        repeated = [regression.repeated() for regression in regressions]
        for batch, rows in self._rows_of_batches(positions):
            both = zip(rows, blocks, strict=True)
            predicted = np.concatenate([x @ block + k for x, (block, k) in both], axis=1)
            wanted, place = targets[batch] + bias, positions[batch]
            change = self._path.relax_targets(wanted, predicted + bias, batch, place) - wanted
            for regression, x, part in zip(repeated, rows, self._split(change), strict=True):
                regression.change_targets(x, part)
        return [
            before if solution.ridge is None else regression.solve(solution.ridge)
            for regression, solution, before in zip(repeated, solutions, fitted, strict=True)
        ]

    def _targets(self, batch: int, positions: SampledPositions) -> FloatArray:
        """The output that the layer should have before its bias, `(num_rows, num_outputs)`."""
        if has_no_activation(self._old_layer) and self._old_layer.compute_dtype == "float32":
            y = self._old_view.output_rows(self._old_outputs[batch], positions)
        else:
            y = self._compute_old_output(batch, positions)
        targets = y[:, self._outputs] - self._view.bias() + self._path.residual_correction(batch, positions)
        if self._others_lack is None:
            return targets
        return targets + self._view.output_rows(self._others_lack[batch], positions)

    def _compute_old_output(self, batch: int, positions: SampledPositions) -> FloatArray:
        """The original's output before its activation, `(num_rows, num_old_outputs)`."""
        view = self._old_view
        rows = view.input_rows(self._old_inputs[batch], positions)
        y = np.concatenate([x @ block for x, block in zip(rows, view.matrix(), strict=True)], axis=1)
        return y + view.bias()

    def _rows_of_batches(self, positions: list[SampledPositions]) -> Iterator[tuple[int, FloatArray]]:
        """Yields the number of each batch and the rows that the smaller layer reads, one array a block."""
        for batch, where in enumerate(positions):
            yield batch, self._view.input_rows(self._inputs[batch], where)

    def _split(self, outputs: FloatArray) -> list[FloatArray]:
        """Splits the last axis, over all outputs, into those of each block."""
        return np.split(outputs, self._view.num_blocks, axis=-1)


def _view_of(call: Call) -> MatmulView:
    """The layer of a call as a matrix product."""
    view = matmul_view(call.operation)
    if view is None:
        raise ValueError(
            f"Expected a linear layer (Dense, EinsumDense, a convolution). Received: {call.name}="
            f"{call.operation!r}"
        )
    return view
