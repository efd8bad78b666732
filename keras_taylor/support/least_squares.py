"""Ridge regression on rows that come in batches, the ridge chosen on held-out ones."""

import contextlib
import dataclasses
import functools

import numpy as np
from scipy.linalg import cho_factor, cho_solve, lu_factor, lu_solve
from threadpoolctl import ThreadpoolController

# Candidates, relative to the mean of the diagonal of X'X, and which is tried first. Infinity, which leaves
# the start but for the constant, is always tried: it costs nothing.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FIRST = 2
_ONE_THREAD = 2e9  # multiplications that are done on one processor


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """What a `Regression` found.

    Attributes:
        change: Array `(num_columns, num_outputs)` to add to the start; zeros if nothing is won.
        constant: Array `(num_outputs,)`.
        ridge: The one that was chosen; `None` if nothing is won.
        error_before, error_after: Mean squared error a held-out row, of the start and of the solution.
    """

    change: np.ndarray
    constant: np.ndarray
    ridge: float | None
    error_before: float
    error_after: float


class Regression:
    """Maps rows X to rows Y with least squared error, starting from a given matrix.

    Minimises |Y - X (start + change) - constant|² + ridge · s · |change|², s the mean of the diagonal of
    X'X: the ridge pulls towards the start, not towards zero.

    Args:
        start: Array `(num_columns, num_outputs)`.
        constant: Whether there is a constant `(num_outputs,)`.
        num_rows: How many rows will come. With fewer than columns the rows themselves are kept, and
            the equations that are solved have one unknown a row; else moments are summed up,
            so that memory does not grow with the rows.
        weights: Array `(num_outputs,)`: what a squared error of each output counts; it matters only
            for the choice of the ridge, and for the errors that are told.
    """

    def __init__(self, start, constant, num_rows, weights=None):
        self._start = np.asarray(start, np.float32)
        self._weights = np.ones(self._start.shape[1]) if weights is None else weights
        self._constant = constant
        make = _Rows if num_rows < len(self._start) else _Moments
        self._fit, self._held_out = make(self._start.shape), make(self._start.shape)

    def add(self, x, y, held_out=False):
        """Takes rows `x` `(n, num_columns)` and `y` `(n, num_outputs)`; held-out ones judge the ridge."""
        (self._held_out if held_out else self._fit).add(x, y - x @ self._start)

    def again(self):
        """The regression of the same rows, fit and held out, on other targets; see `Again`."""
        return Again(self._all.without_targets(), self._start, self._constant)

    @functools.cached_property
    def _all(self):
        return self._fit.joined(self._held_out)

    def solve(self):
        """The `Solution` with the ridge that is best on the held-out rows, found from all rows."""
        nothing = np.zeros(self._start.shape), np.zeros(self._start.shape[1])
        before = self._error(*nothing)

        @functools.cache
        def error(ridge):
            return self._error(*self._fit.solve(ridge, self._constant, np.float32))

        # candidates in single precision, which is enough to choose; what is chosen in double
        best = min(np.inf, _downhill(RIDGES, error, _FIRST), key=error)
        num = max(self._held_out.num, 1)
        if not error(best) < before:  # not `>=`: a NaN is no gain
            return Solution(*nothing, None, before / num, before / num)
        return Solution(*self._all.solve(best, self._constant), best, before / num, error(best) / num)

    def _error(self, change, constant):
        return float(self._weights @ self._held_out.errors(change, constant))


class Elimination:
    """What the squared error of a regression grows by as blocks of columns leave, one after the other.

    The columns that stay are refitted after each: the block formula of the optimal brain surgeon
    (Hassibi and Stork, NIPS 1992) on the second moments.

    Args:
        products: Second moments of the columns, ridge included, `(num_columns, num_columns)`.
        matrix: Array `(num_columns, num_outputs)`.
        blocks: Indices of each block's columns, an int array `(num_blocks, size)`.
        weights: What a squared error of each output counts.
    """

    def __init__(self, products, matrix, blocks, weights):
        self._inverse = np.linalg.inv(products)
        self._matrix = matrix * np.sqrt(weights)
        self._blocks = blocks
        self._scale = max(float((self._matrix * (products @ self._matrix)).sum()), 1e-30)

    def costs(self):
        """Growth for each block if it went next, relative to the mean square of what the matrix makes."""
        inner = self._inverse[self._blocks[:, :, None], self._blocks[:, None, :]]
        rows = self._matrix[self._blocks]
        return (rows * np.linalg.solve(inner, rows)).sum((1, 2)) / self._scale

    def remove(self, block):
        """Lets a block go."""
        columns = self._blocks[block]
        across = self._inverse[:, columns]
        inner = np.linalg.inv(across[columns])
        self._matrix = self._matrix - across @ (inner @ self._matrix[columns])
        self._inverse = self._inverse - across @ inner @ across.T
        self._matrix[columns] = 0
        # what has gone costs nothing more, and is touched no more
        self._inverse[columns] = self._inverse[:, columns] = 0
        self._inverse[columns, columns] = 1


class Again:
    """A regression on rows that were seen before, the ridge known; what depends on rows alone is kept."""

    def __init__(self, sums, start, constant):
        self._sums, self._start, self._constant = sums, start, constant

    def add(self, x, y):
        """Takes the same rows in the same order, with new targets."""
        self._sums.add_targets(x, y - x @ self._start)

    def solve(self, ridge):
        """`change` and `constant`, as in `Solution`."""
        return self._sums.solve(ridge, self._constant)


class Moments:
    """Means and second moments of rows that come in batches.

    Attributes:
        num: How many rows there were.
        xx: Sum of the rows' outer products, `(num_columns, num_columns)`.
    """

    def __init__(self, num_columns):
        self.num, self._x = 0, np.zeros(num_columns)
        self.xx = np.zeros((num_columns, num_columns))
        self._solver = None

    @property
    def mean(self):
        """Mean of the rows."""
        return self._x / max(self.num, 1)

    def add(self, x):
        """Takes rows `(n, num_columns)`."""
        self.num += len(x)
        self.xx += x.T @ x
        self._x += x.sum(0, dtype=np.float64)

    def solve(self, products, ridge, centered, dtype=np.float64):
        """The inverse of `products(ridge, centered)` times an array; the last factorization is kept."""
        if self._solver is None or self._solver[0] != (ridge, centered, dtype):
            self._solver = None  # let go of it before the next is there
            solver = _solver(lambda: self.products(ridge, centered).astype(dtype))
            self._solver = (ridge, centered, dtype), solver
        return self._solver[1](products.astype(dtype))

    def joined(self, other):
        """Those of both sets of rows."""
        both = Moments(len(self._x))
        both.num, both.xx, both._x = self.num + other.num, self.xx + other.xx, self._x + other._x
        return both

    def elimination(self, matrix, blocks, ridge, centered, weights):
        """An `Elimination` of blocks of columns; arguments as in `restricted`."""
        return Elimination(self.products(ridge, centered), matrix, blocks, weights)

    def products(self, ridge, centered):
        """The outer products with the ridge on their diagonal, less those of the mean if `centered`."""
        xx = self.xx - self.num * np.outer(self.mean, self.mean) if centered else self.xx.copy()
        xx.flat[:: len(xx) + 1] += ridge * max(np.trace(xx) / len(xx), 1e-30)
        return xx

    def restricted(self, matrix, columns, ridge, centered):
        """The matrix, zero outside some columns, that comes nearest to what another makes of the rows.

        Args:
            matrix: Array `(num_columns, num_outputs)` that uses all columns.
            columns: Bool array `(num_columns,)`.
            ridge: As in `Regression`; it pulls towards `matrix`.
            centered: Whether there will be a constant.
        """
        xx = self.products(ridge, centered)
        among = xx[np.ix_(columns, columns)]
        fitted = np.zeros(matrix.shape)
        lost = xx[np.ix_(columns, ~columns)] @ matrix[~columns]
        fitted[columns] = matrix[columns] + np.linalg.solve(among, lost)
        return fitted


class _Moments:
    """Moments of rows and of what they should give, for more rows than columns."""

    def __init__(self, shape, rows=None):
        columns, outputs = shape
        self._rows = rows or Moments(columns)
        self._xr, self._r, self._squares = np.zeros(shape), np.zeros(outputs), np.zeros(outputs)

    @property
    def num(self):
        return self._rows.num

    def add(self, x, r):
        self._rows.add(x)
        self.add_targets(x, r)

    def add_targets(self, x, r):
        self._xr += x.T @ r
        self._r += r.sum(0, dtype=np.float64)
        self._squares += np.square(r, dtype=np.float64).sum(0)

    def joined(self, other):
        both = _Moments(self._xr.shape, self._rows.joined(other._rows))
        both._xr, both._r = self._xr + other._xr, self._r + other._r
        both._squares = self._squares + other._squares
        return both

    def without_targets(self):
        return _Moments(self._xr.shape, self._rows)

    def solve(self, ridge, constant, dtype=np.float64):
        """The change of the matrix, and the constant."""
        level = constant * self._r / max(self.num, 1)
        if np.isinf(ridge):
            return np.zeros(self._xr.shape), level
        centered = self._xr - self.num * np.outer(self._rows.mean, level)
        change = self._rows.solve(centered, ridge, constant, dtype)
        return change, constant * (level - self._rows.mean @ change)

    def errors(self, change, constant):
        """Sum of squared errors of each output."""
        rows = self._rows
        mixed = (change * (rows.xx @ change)).sum(0) - 2 * (change * self._xr).sum(0)
        shifted = (
            self.num * (np.square(constant) + 2 * constant * (rows.mean @ change)) - 2 * constant * self._r
        )
        return self._squares + mixed + shifted


class _Rows:
    """The rows themselves and what they should give, for fewer of them than columns."""

    def __init__(self, shape, kernel=None):
        columns, outputs = shape
        self._x, self._r = [np.zeros((0, columns), np.float32)], [np.zeros((0, outputs), np.float32)]
        self._kernel = kernel

    @property
    def num(self):
        return sum(map(len, self._x))

    def add(self, x, r):
        self._x.append(x)
        self._r.append(r)

    def joined(self, other):
        both = _Rows((self._x[0].shape[1], self._r[0].shape[1]))
        both._x, both._r = self._x + other._x, self._r + other._r
        return both

    def without_targets(self):
        fresh = _Rows((self._x[0].shape[1], self._r[0].shape[1]), self._kernel)
        fresh._x = [x for x in self._x if len(x)]
        return fresh

    def add_targets(self, x, r):
        self._r.append(r)

    def solve(self, ridge, constant, dtype=np.float64):
        r = np.concatenate(self._r).astype(np.float64)
        level = r.mean(0) if constant else 0 * r[:1].sum(0)
        if np.isinf(ridge) or not len(r):
            return np.zeros((self._x[0].shape[1], r.shape[1])), level
        if self._kernel is None:
            self._kernel = _Kernel(np.concatenate(self._x), constant)
        change = self._kernel.solve(r - level, ridge, dtype)
        return change, level - self._kernel.middle @ change

    def errors(self, change, constant):
        change, constant = change.astype(np.float32), constant.astype(np.float32)
        return sum(np.square(r - x @ change - constant).sum(0) for x, r in zip(self._x, self._r, strict=True))


class _Kernel:
    """Rows, and the products of all pairs of them.

    Attributes:
        middle: The rows' mean if they are centered, else zeros.
    """

    def __init__(self, x, centered):
        self.middle = x.mean(0) if centered else np.zeros(x.shape[1], x.dtype)
        self._x = x - self.middle
        self._products = (self._x @ self._x.T).astype(np.float64)
        self._solver = None

    def solve(self, r, ridge, dtype):
        """The change of the matrix that makes `r` of the rows; the last factorization is kept."""
        if self._solver is None or self._solver[0] != (ridge, dtype):
            self._solver = None
            self._solver = (ridge, dtype), _solver(lambda: self._with(ridge).astype(dtype))
        return self._x.T @ self._solver[1](r.astype(dtype)).astype(self._x.dtype)

    def _with(self, ridge):
        products = self._products.copy()
        mean = np.trace(products) / self._x.shape[1]
        products.flat[:: len(products) + 1] += ridge * max(mean, 1e-30)
        return products


@contextlib.contextmanager
def threads_for(num_rows, num_columns):
    """Within it NumPy and SciPy multiply small matrices on one thread.

    OpenBLAS' threads go on spinning for some milliseconds when they are done. Between a backend's operations
    they take the processors away from its threads, which costs more than they won.

    Args:
        num_rows, num_columns: Of the largest matrix whose second moments are taken.
    """
    limit = 1 if num_rows * num_columns**2 < _ONE_THREAD else None
    with _openblas().limit(limits=limit):
        yield


@functools.cache
def _openblas():
    return ThreadpoolController().select(internal_api="openblas")


def _solver(make):
    """A function that multiplies by the inverse of a symmetric matrix, which `make` makes."""
    try:
        factor = cho_factor(make().T, overwrite_a=True, check_finite=False)
        return functools.partial(cho_solve, factor, check_finite=False)
    except np.linalg.LinAlgError:  # sums of float32 products, and a ridge too small for their errors
        factor = lu_factor(make().T, overwrite_a=True, check_finite=False)
        return functools.partial(lu_solve, factor, check_finite=False)


def _downhill(values, error, first):
    """The value with the smallest error that is reached by steps to better neighbors."""
    at = first
    for step in (-1, 1):
        while 0 <= at + step < len(values) and error(values[at + step]) < error(values[at]):
            at += step
        if at != first:
            break
    return values[at]
