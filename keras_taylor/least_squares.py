"""Ridge regression on rows that come in batches, the ridge chosen on held-out ones."""

import dataclasses

import numpy as np

# Candidates, relative to the mean of the diagonal of X'X; infinity leaves the start, but for the constant.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, np.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """What a `Regression` found.

    Attributes:
        change: Array `(num_columns, num_outputs)` to add to the start, float64; zeros if nothing is won.
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
    """

    def __init__(self, start, constant, num_rows):
        self._start = np.asarray(start, np.float32)
        self._constant = constant
        make = _Rows if num_rows < len(self._start) else _Moments
        self._fit, self._held_out = make(self._start.shape), make(self._start.shape)

    def add(self, x, y, held_out=False):
        """Takes rows `x` `(n, num_columns)` and `y` `(n, num_outputs)`; held-out ones judge the ridge."""
        (self._held_out if held_out else self._fit).add(x, y - x @ self._start)

    def again(self):
        """The regression of the same rows, fit and held out, on other targets; see `Again`."""
        return Again(self._fit.joined(self._held_out).without_targets(), self._start, self._constant)

    def solve(self):
        """The `Solution` with the ridge that is best on the held-out rows, found from all rows."""
        nothing = np.zeros(self._start.shape), np.zeros(self._start.shape[1])
        before = self._held_out.error(*nothing)
        errors = {ridge: self._held_out.error(*self._fit.solve(ridge, self._constant)) for ridge in RIDGES}
        best = min(errors, key=errors.get)
        num = max(self._held_out.num, 1)
        if not errors[best] < before:  # not `>=`: a NaN is no gain
            return Solution(*nothing, None, before / num, before / num)
        solution = self._fit.joined(self._held_out).solve(best, self._constant)
        return Solution(*solution, best, before / num, errors[best] / num)


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
    """Means and second moments of rows that come in batches."""

    def __init__(self, num_columns):
        self._num, self._x = 0, np.zeros(num_columns)
        self._xx = np.zeros((num_columns, num_columns))

    @property
    def mean(self):
        """Mean of the rows."""
        return self._x / max(self._num, 1)

    def add(self, x):
        """Takes rows `(n, num_columns)`."""
        self._num += len(x)
        self._xx += x.T @ x
        self._x += x.sum(0, dtype=np.float64)

    def restricted(self, matrix, columns, ridge, centred):
        """The matrix, zero outside some columns, that comes nearest to what another makes of the rows.

        Args:
            matrix: Array `(num_columns, num_outputs)` that uses all columns.
            columns: Bool array `(num_columns,)`.
            ridge: As in `Regression`; it pulls towards `matrix`.
            centred: Whether there will be a constant.
        """
        xx = self._xx - self._num * np.outer(self.mean, self.mean) if centred else self._xx
        among = xx[np.ix_(columns, columns)]
        among.flat[:: len(among) + 1] += ridge * max(np.trace(among) / len(among), 1e-30)
        fitted = np.zeros(matrix.shape)
        lost = xx[np.ix_(columns, ~columns)] @ matrix[~columns]
        fitted[columns] = matrix[columns] + np.linalg.solve(among, lost)
        return fitted


class _Moments:
    """Sums of products of rows, for more rows than columns."""

    def __init__(self, shape):
        columns, outputs = shape
        self.num, self._squares = 0, 0.0
        self._xx, self._xr = np.zeros((columns, columns)), np.zeros((columns, outputs))
        self._x, self._r = np.zeros(columns), np.zeros(outputs)

    def add(self, x, r):
        self.num += len(x)
        self._xx += x.T @ x
        self._x += x.sum(0, dtype=np.float64)
        self.add_targets(x, r)

    def add_targets(self, x, r):
        self._xr += x.T @ r
        self._r += r.sum(0, dtype=np.float64)
        self._squares += float(np.square(r, dtype=np.float64).sum())

    def joined(self, other):
        both = _Moments(self._xr.shape)
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both

    def without_targets(self):
        fresh = _Moments(self._xr.shape)
        fresh.num, fresh._xx, fresh._x = self.num, self._xx, self._x
        return fresh

    def solve(self, ridge, constant):
        """The change of the matrix, and the constant."""
        num = max(self.num, 1)
        x, r = (self._x / num, self._r / num) if constant else (0 * self._x, 0 * self._r)
        if np.isinf(ridge):
            return np.zeros(self._xr.shape), r
        xx = self._xx - num * np.outer(x, x)
        xx.flat[:: len(xx) + 1] += ridge * max(np.trace(xx) / len(xx), np.finfo(np.float32).tiny)
        change = np.linalg.solve(xx, self._xr - num * np.outer(x, r))
        return change, r - x @ change

    def error(self, change, constant):
        """Sum of squared errors."""
        mixed = (change * (self._xx @ change)).sum() - 2 * (change * self._xr).sum()
        shifted = self.num * constant @ constant - 2 * constant @ (self._r - self._x @ change)
        return float(self._squares + mixed + shifted)


class _Rows:
    """The rows themselves, for fewer of them than columns."""

    def __init__(self, shape):
        columns, outputs = shape
        self._x, self._r = [np.zeros((0, columns), np.float32)], [np.zeros((0, outputs), np.float32)]

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
        fresh = _Rows((self._x[0].shape[1], self._r[0].shape[1]))
        fresh._x = [x for x in self._x if len(x)]
        return fresh

    def add_targets(self, x, r):
        self._r.append(r)

    def solve(self, ridge, constant):
        x, r = np.concatenate(self._x), np.concatenate(self._r).astype(np.float64)
        middle, level = (x.mean(0), r.mean(0)) if constant else (0 * x[:1].sum(0), 0 * r[:1].sum(0))
        if np.isinf(ridge) or not len(x):
            return np.zeros((x.shape[1], r.shape[1])), level
        x = x - middle
        gram = (x @ x.T).astype(np.float64)
        gram.flat[:: len(gram) + 1] += ridge * max(np.trace(gram) / x.shape[1], np.finfo(np.float32).tiny)
        change = x.T @ np.linalg.solve(gram, r - level)
        return change, level - middle @ change

    def error(self, change, constant):
        return float(
            sum(np.square(r - x @ change - constant).sum() for x, r in zip(self._x, self._r, strict=True))
        )
