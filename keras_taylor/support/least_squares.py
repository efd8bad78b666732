"""Ridge regression on rows that come in batches; held-out rows choose the ridge."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import DTypeLike
from scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve
from threadpoolctl import ThreadpoolController

from keras_taylor.support.types import Array, BoolArray, IntArray

# Candidate ridges, relative to the mean of the diagonal of X'X, and the index of the one that is tried
# first. An infinite ridge changes only the constant. It is always tried, since it costs nothing.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FIRST_RIDGE = 2
_MOST_ONE_THREAD = 2e9  # multiplications that one thread does faster than several

Solver: TypeAlias = Callable[[Array], Array]  # multiplies by the inverse of a matrix


class AffineMap(NamedTuple):
    """A change of a regression's matrix `(num_columns, num_outputs)` and its constant `(num_outputs,)`."""

    change: Array
    constant: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """The result of a `Regression`.

    Attributes:
        change: Array `(num_columns, num_outputs)` to add to the start; zeros if no fit is better than it.
        constant: Array `(num_outputs,)`.
        ridge: The chosen ridge; `None` if no fit is better than the start.
        error_before: Mean squared error of the start for a held-out row.
        error_after: Mean squared error of the solution for a held-out row.
    """

    change: Array
    constant: Array
    ridge: float | None
    error_before: float
    error_after: float


class Regression:
    """Fits a linear map from rows X to rows Y with the least squared error, starting from a given matrix.

    It minimizes |Y - X (start + change) - constant|² + ridge · s · |change|², s the mean of the diagonal of
    X'X (ridge regression, Hoerl and Kennard 1970, towards the start instead of zero).

    Args:
        start: Array `(num_columns, num_outputs)`.
        constant: Whether to fit a constant `(num_outputs,)`.
        num_rows: Number of rows that will be added. With fewer rows than columns, the rows are kept and the
            dual equations are solved, with one unknown for each row. Otherwise moments are summed up, so
            that memory does not grow with the number of rows.
        weights: Array `(num_outputs,)` with the weight of each output's squared error. It affects the
            choice of the ridge and the reported errors only; `None`: ones.
    """

    def __init__(self, start: Array, constant: bool, num_rows: int, weights: Array | None = None) -> None:
        self._start = np.asarray(start, np.float32)
        self._weights = np.ones(self._start.shape[1]) if weights is None else weights
        self._constant = constant
        make: type[_Rows | _TargetMoments] = _Rows if num_rows < len(self._start) else _TargetMoments
        num_columns, num_outputs = self._start.shape
        self._fit: _Sums = make(num_columns, num_outputs)
        self._held_out: _Sums = make(num_columns, num_outputs)

    def add(self, x: Array, y: Array, held_out: bool = False) -> None:
        """Adds rows `x` `(n, num_columns)` and `y` `(n, num_outputs)`; held-out rows choose the ridge."""
        (self._held_out if held_out else self._fit).add(x, y - x @ self._start)

    def repeated(self) -> RepeatedRegression:
        """The regression of the same rows, held-out ones included, whose targets can be changed."""
        return RepeatedRegression(self._all.repeated(), self._constant)

    @functools.cached_property
    def _all(self) -> _Sums:
        return self._fit.joined(self._held_out)

    def solve(self) -> Solution:
        """The `Solution` for all rows, with the ridge that is best on the held-out rows."""
        no_change = AffineMap(np.zeros(self._start.shape), np.zeros(self._start.shape[1]))
        before = self._error(no_change)

        @functools.cache
        def error(ridge: float) -> float:
            return self._error(self._fit.solve(ridge, self._constant, np.float32))

        # single precision is enough to choose a ridge; the chosen one is solved in double precision
        best = min(np.inf, search_downhill(RIDGES, error, _FIRST_RIDGE), key=error)
        num = max(self._held_out.num, 1)
        if not error(best) < before:  # not `>=`, since a NaN is no gain
            return Solution(*no_change, None, before / num, before / num)
        return Solution(*self._all.solve(best, self._constant), best, before / num, error(best) / num)

    def _error(self, fitted: AffineMap) -> float:
        return float(self._weights @ self._held_out.errors(fitted))


class Elimination:
    """The growth of a regression's squared error as blocks of columns are removed one after the other.

    The remaining columns are refitted after each removal, by the block formula of the optimal brain surgeon
    (Hassibi and Stork, NIPS 1992) on the second moments.

    Args:
        products: Second moments of the columns, with the ridge, `(num_columns, num_columns)`.
        matrix: Array `(num_columns, num_outputs)`.
        blocks: Indices of each block's columns, an int array `(num_blocks, size)`.
        weights: Array `(num_outputs,)` with the weight of each output's squared error.
    """

    def __init__(self, products: Array, matrix: Array, blocks: IntArray, weights: Array) -> None:
        self._inverse = np.linalg.inv(products)
        self._matrix = matrix * np.sqrt(weights)
        self._blocks = blocks
        self._scale = max(float((self._matrix * (products @ self._matrix)).sum()), 1e-30)

    def costs(self) -> Array:
        """The growth `(num_blocks,)` if each block were next, relative to the mean square of the outputs."""
        inner = self._inverse[self._blocks[:, :, None], self._blocks[:, None, :]]
        rows = self._matrix[self._blocks]
        return (rows * np.linalg.solve(inner, rows)).sum((1, 2)) / self._scale

    def remove(self, block: int) -> None:
        """Removes a block."""
        columns = self._blocks[block]
        across = self._inverse[:, columns]
        inner = np.linalg.inv(across[columns])
        self._matrix = self._matrix - across @ (inner @ self._matrix[columns])
        self._inverse = self._inverse - across @ inner @ across.T
        self._matrix[columns] = 0
        # removed columns have no further cost and no further effect
        self._inverse[columns] = self._inverse[:, columns] = 0
        self._inverse[columns, columns] = 1


class RepeatedRegression:
    """A regression on known rows with a known ridge. It reuses everything that depends on the rows alone."""

    def __init__(self, sums: _Sums, constant: bool) -> None:
        self._sums, self._constant = sums, constant

    def change_targets(self, x: Array, change: Array) -> None:
        """Adds to the targets of rows that were added before; batches come in the order they had then."""
        self._sums.change_targets(x, change)

    def solve(self, ridge: float) -> AffineMap:
        """The change and the constant, as in `Solution`."""
        return self._sums.solve(ridge, self._constant)


class Moments:
    """Means and second moments of rows that come in batches.

    Attributes:
        num: Number of rows.
        xx: Sum of the rows' outer products, float64 `(num_columns, num_columns)`.
    """

    def __init__(self, num_columns: int) -> None:
        self.num, self._x = 0, np.zeros(num_columns)
        self.xx = np.zeros((num_columns, num_columns))
        self._solver = _LastSolver()

    @property
    def mean(self) -> Array:
        """Mean of the rows, `(num_columns,)`."""
        return self._x / max(self.num, 1)

    def add(self, x: Array) -> None:
        """Adds rows `(n, num_columns)`."""
        self.num += len(x)
        self.xx += x.T @ x
        self._x += x.sum(0, dtype=np.float64)

    def solve(self, products: Array, ridge: float, centered: bool, dtype: DTypeLike = np.float64) -> Array:
        """The inverse of `products(ridge, centered)` times an array; the last factorization is kept."""
        key = (ridge, centered, dtype)
        solver = self._solver.get(key, lambda: self.products(ridge, centered).astype(dtype))
        return solver(products.astype(dtype))

    def joined(self, other: Moments) -> Moments:
        """The moments of both sets of rows."""
        both = Moments(len(self._x))
        both.num, both.xx, both._x = self.num + other.num, self.xx + other.xx, self._x + other._x
        return both

    def elimination(
        self, matrix: Array, blocks: IntArray, ridge: float, centered: bool, weights: Array
    ) -> Elimination:
        """An `Elimination` of blocks of columns; arguments as in `Elimination` and `restricted`."""
        return Elimination(self.products(ridge, centered), matrix, blocks, weights)

    def products(self, ridge: float, centered: bool) -> Array:
        """The sum of outer products, minus that of the mean if `centered`, with the ridge on the diagonal."""
        xx = self.xx - self.num * np.outer(self.mean, self.mean) if centered else self.xx.copy()
        xx.flat[:: len(xx) + 1] += ridge * max(np.trace(xx) / len(xx), 1e-30)
        return xx

    def restricted(self, matrix: Array, columns: BoolArray, ridge: float, centered: bool) -> Array:
        """The matrix that uses some columns only and whose outputs come closest to those of another one.

        Args:
            matrix: Array `(num_columns, num_outputs)` that uses all columns.
            columns: Bool array `(num_columns,)`: the columns to use.
            ridge: As in `Regression`; it pulls towards `matrix`.
            centered: Whether there will be a constant.

        Returns:
            An array `(num_columns, num_outputs)`, zero in the rows of the other columns.
        """
        xx = self.products(ridge, centered)
        among = xx[np.ix_(columns, columns)]
        fitted = np.zeros(matrix.shape)
        lost = xx[np.ix_(columns, ~columns)] @ matrix[~columns]
        fitted[columns] = matrix[columns] + np.linalg.solve(among, lost)
        return fitted


class _Sums(Protocol):
    """What a `Regression` remembers of rows `x` and their residuals `r = y - x @ start`."""

    @property
    def num(self) -> int:
        """Number of rows."""

    def add(self, x: Array, r: Array) -> None:
        """Adds rows."""

    def change_targets(self, x: Array, change: Array) -> None:
        """Adds to the residuals of rows that are known already; only `solve` takes note."""

    def joined(self, other: Self) -> Self:
        """The sums of both sets of rows."""

    def repeated(self) -> Self:
        """The same rows and residuals, which can be changed."""

    def solve(self, ridge: float, constant: bool, dtype: DTypeLike = np.float64) -> AffineMap:
        """The change of the matrix, and the constant."""

    def errors(self, fitted: AffineMap) -> Array:
        """The sum of squared errors of each output, `(num_outputs,)`."""


class _TargetMoments:
    """Moments of rows and residuals, for more rows than columns; see `_Sums`."""

    def __init__(self, num_columns: int, num_outputs: int, rows: Moments | None = None) -> None:
        self._rows = rows or Moments(num_columns)
        self._xr, self._r = np.zeros((num_columns, num_outputs)), np.zeros(num_outputs)
        self._squares = np.zeros(num_outputs)

    @property
    def num(self) -> int:
        return self._rows.num

    def add(self, x: Array, r: Array) -> None:
        self._rows.add(x)
        self.change_targets(x, r)
        self._squares += np.square(r, dtype=np.float64).sum(0)

    def change_targets(self, x: Array, change: Array) -> None:
        self._xr += x.T @ change
        self._r += change.sum(0, dtype=np.float64)

    def joined(self, other: Self) -> Self:
        both = type(self)(*self._xr.shape, self._rows.joined(other._rows))
        both._xr, both._r = self._xr + other._xr, self._r + other._r
        both._squares = self._squares + other._squares
        return both

    def repeated(self) -> Self:
        same = type(self)(*self._xr.shape, self._rows)
        same._xr, same._r = self._xr.copy(), self._r.copy()
        return same

    def solve(self, ridge: float, constant: bool, dtype: DTypeLike = np.float64) -> AffineMap:
        level = constant * self._r / max(self.num, 1)
        if np.isinf(ridge):
            return AffineMap(np.zeros(self._xr.shape), level)
        centered = self._xr - self.num * np.outer(self._rows.mean, level)
        change = self._rows.solve(centered, ridge, constant, dtype)
        return AffineMap(change, constant * (level - self._rows.mean @ change))

    def errors(self, fitted: AffineMap) -> Array:
        (change, constant), rows = fitted, self._rows
        products = rows.xx.astype(np.float32) @ change.astype(np.float32)  # enough to compare ridges
        mixed = (change * (products - 2 * self._xr)).sum(0)
        shifted = (
            self.num * (np.square(constant) + 2 * constant * (rows.mean @ change)) - 2 * constant * self._r
        )
        return self._squares + mixed + shifted


class _Rows:
    """The rows and residuals themselves, for fewer rows than columns; see `_Sums`."""

    def __init__(self, num_columns: int, num_outputs: int, gram: _GramMatrix | None = None) -> None:
        self._x = [np.zeros((0, num_columns), np.float32)]
        self._r = [np.zeros((0, num_outputs), np.float32)]
        self._gram, self._num_changed = gram, 0

    @property
    def num(self) -> int:
        return sum(map(len, self._x))

    def add(self, x: Array, r: Array) -> None:
        self._x.append(x)
        self._r.append(r)

    def joined(self, other: Self) -> Self:
        both = type(self)(self._x[0].shape[1], self._r[0].shape[1])
        both._x, both._r = self._x + other._x, self._r + other._r
        return both

    def repeated(self) -> Self:
        same = type(self)(self._x[0].shape[1], self._r[0].shape[1], self._gram)
        same._x, same._r = ([part for part in parts if len(part)] for parts in (self._x, self._r))
        return same

    def change_targets(self, x: Array, change: Array) -> None:
        self._r[self._num_changed] = self._r[self._num_changed] + change
        self._num_changed += 1

    def solve(self, ridge: float, constant: bool, dtype: DTypeLike = np.float64) -> AffineMap:
        r = np.concatenate(self._r).astype(np.float64)
        level = r.mean(0) if constant else 0 * r[:1].sum(0)
        if np.isinf(ridge) or not len(r):
            return AffineMap(np.zeros((self._x[0].shape[1], r.shape[1])), level)
        if self._gram is None:
            self._gram = _GramMatrix(np.concatenate(self._x), constant)
        change = self._gram.solve(r - level, ridge, dtype)
        return AffineMap(change, level - self._gram.middle @ change)

    def errors(self, fitted: AffineMap) -> Array:
        change, constant = (part.astype(np.float32) for part in fitted)
        squares = [np.square(r - x @ change - constant).sum(0) for x, r in zip(self._x, self._r, strict=True)]
        return np.sum(squares, 0)


class _GramMatrix:
    """Rows, and the products of all pairs of them.

    Attributes:
        middle: The rows' mean `(num_columns,)` if they are centered, else zeros.
    """

    def __init__(self, x: Array, centered: bool) -> None:
        self.middle = x.mean(0) if centered else np.zeros(x.shape[1], x.dtype)
        self._x = x - self.middle
        self._products = (self._x @ self._x.T).astype(np.float64)
        self._solver = _LastSolver()

    def solve(self, r: Array, ridge: float, dtype: DTypeLike) -> Array:
        """The change of the matrix that maps the rows to `r`; the last factorization is kept."""
        solver = self._solver.get((ridge, dtype), lambda: self._with_ridge(ridge).astype(dtype))
        return self._x.T @ solver(r.astype(dtype)).astype(self._x.dtype)

    def _with_ridge(self, ridge: float) -> Array:
        products = self._products.copy()
        mean = np.trace(products) / self._x.shape[1]
        products.flat[:: len(products) + 1] += ridge * max(mean, 1e-30)
        return products


class _LastSolver:
    """The last solver that was made, and what it was made for."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._solver: Solver | None = None

    def get(self, key: tuple[Any, ...], make_matrix: Callable[[], Array]) -> Solver:
        """The solver for a key; it is made from `make_matrix()` if the key is a new one."""
        if self._solver is None or self._key != key:
            self._solver = None  # frees its memory before the next one is made
            self._key, self._solver = key, _make_solver(make_matrix)
        return self._solver


@contextlib.contextmanager
def limit_blas_threads(num_rows: int, num_columns: int) -> Iterator[None]:
    """A context in which NumPy and SciPy multiply small matrices on one thread.

    OpenBLAS' threads keep spinning for some milliseconds after their work. They then take the processors
    from the backend's threads, which costs more time than they save.

    Args:
        num_rows: Rows of the largest matrix whose second moments are summed up.
        num_columns: Its columns.
    """
    limit = 1 if num_rows * num_columns**2 < _MOST_ONE_THREAD else None
    with _openblas().limit(limits=limit):
        yield


@functools.cache
def _openblas() -> ThreadpoolController:
    return ThreadpoolController().select(internal_api="openblas")


def _make_solver(make_matrix: Callable[[], Array]) -> Solver:
    """A function that multiplies by the inverse of the symmetric matrix which `make_matrix` returns."""
    try:
        factor = cho_factor(make_matrix().T, overwrite_a=True, check_finite=False)
        return functools.partial(cho_solve, factor, check_finite=False)
    except np.linalg.LinAlgError:  # the ridge is smaller than the rounding errors of float32 products
        factor = lu_factor(make_matrix().T, overwrite_a=True, check_finite=False)
        return functools.partial(lu_solve, factor, check_finite=False)


def search_downhill(values: Sequence[float], error: Callable[[float], float], first: int) -> float:
    """The value that is found by stepping from the first one to neighbors with a smaller error."""
    at = first
    for step in (-1, 1):
        while 0 <= at + step < len(values) and error(values[at + step]) < error(values[at]):
            at += step
        if at != first:
            break
    return values[at]
