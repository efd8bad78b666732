"""Ridge regression in batches, against NumPy's own in float64."""

import numpy as np
import pytest
import threadpoolctl

from keras_taylor.support.least_squares import (
    RIDGES,
    Moments,
    Regression,
    limit_blas_threads,
    search_downhill,
)


def problem(num_rows, columns=6, outputs=3, noise=0.0):
    random = np.random.default_rng(0)
    x = (random.normal(size=(num_rows, columns)) @ random.normal(size=(columns, columns)) + 3).astype(
        "float32"
    )
    matrix = random.normal(size=(columns, outputs))
    constant = np.array([5.0, -2.0, 0.5])[:outputs]
    y = x @ matrix + constant + noise * random.normal(size=(num_rows, outputs))
    return x, y.astype("float32"), matrix, constant


def solved(x, y, start, constant=True, held_out=10, num_rows=None):
    regression = Regression(start, constant, len(x) if num_rows is None else num_rows)
    for k in range(0, len(x), 7):  # in uneven batches
        rows = slice(k, min(k + 7, len(x)))
        regression.add(x[rows], y[rows], held_out=rows.stop > len(x) - held_out)
    return regression.solve()


def by_hand(x, y, start, ridge, constant):
    """The normal equations, solved for all rows at once."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    residual = y - x @ start
    middle, level = (x.mean(0), residual.mean(0)) if constant else (0.0, 0.0)
    xx = (x - middle).T @ (x - middle)
    xx += ridge * np.trace(xx) / len(xx) * np.eye(len(xx))
    change = np.linalg.solve(xx, (x - middle).T @ (residual - level))
    return change, level - middle @ change if constant else np.zeros(y.shape[1])


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("num_rows", [200, 5], ids=["moments", "rows"])
def test_the_solution_is_that_of_the_normal_equations(constant, num_rows):
    x, y, *_ = problem(200 if num_rows == 200 else 24, columns=6 if num_rows == 200 else 40, noise=0.3)
    start = np.random.default_rng(1).normal(size=(x.shape[1], 3)).astype("float32")
    solution = solved(x, y, start, constant)
    assert solution.ridge in RIDGES
    change, level = by_hand(x, y, start, solution.ridge, constant)
    np.testing.assert_allclose(solution.change, change, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(solution.constant, level, rtol=1e-3, atol=1e-3)
    assert solution.error_after < solution.error_before


def test_what_is_linear_is_found():
    x, y, *_ = problem(300)
    solution = solved(x, y, np.zeros((6, 3)))
    assert solution.ridge == min(RIDGES)
    assert np.abs(x @ solution.change + solution.constant - y).max() < 2e-2
    assert solution.error_after < 1e-4 * solution.error_before


def test_without_a_gain_on_held_out_rows_nothing_changes():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 4)).astype("float32")
    start = random.normal(size=(4, 2))
    y = x @ start
    y[:50] += random.normal(size=(50, 2))  # noise, which the held-out rows do not know
    solution = solved(x, y.astype("float32"), start)
    assert solution.ridge is None and not solution.change.any() and not solution.constant.any()
    assert solution.error_before == solution.error_after


def test_errors_are_those_of_the_held_out_rows():
    x, y, *_ = problem(100, noise=0.5)
    start = np.zeros((6, 3))
    regression = Regression(start, True, len(x))
    regression.add(x[:70], y[:70])
    regression.add(x[70:], y[70:], held_out=True)
    solution = regression.solve()
    change, level = by_hand(x[:70], y[:70], start, solution.ridge, True)
    after = np.square(y[70:] - x[70:] @ change - level).sum() / 30
    np.testing.assert_allclose(solution.error_before, np.square(y[70:]).sum() / 30, rtol=1e-4)
    np.testing.assert_allclose(solution.error_after, after, rtol=1e-3)


def test_nan_is_no_gain():
    x, y, *_ = problem(50)
    y[3] = np.nan
    solution = solved(x, y, np.ones((6, 3)))
    assert solution.ridge is None and not solution.change.any()


def test_moments_that_are_not_positive_definite_are_solved_too():
    """Sums of float32 products may have eigenvalues below zero that a small ridge does not lift."""
    moments = Moments(3)
    moments.num, moments.xx = 10, np.diag([4.0, 2.0, -1e-3])
    products = np.array([[1.0], [2.0], [3.0]])
    found = moments.solve(products, 1e-6, False)
    np.testing.assert_allclose(moments.products(1e-6, False) @ found, products, rtol=1e-9)


def test_the_best_ridge_is_reached_from_the_first():
    tried = []

    def error(value):
        tried.append(value)
        return abs(value - 3)

    assert search_downhill((0, 1, 2, 3, 4, 5), error, 1) == 3
    assert 5 not in tried
    assert search_downhill((0, 1, 2, 3, 4, 5), error, 5) == 3


def test_threads():
    """Small products are made on one thread, large ones on as many as before; afterwards all is as it was."""
    openblas = threadpoolctl.ThreadpoolController().select(internal_api="openblas")

    def threads():
        return [library.num_threads for library in openblas.lib_controllers]

    before = threads()
    with limit_blas_threads(5000, 500):
        assert set(threads()) <= {1}
    with limit_blas_threads(100_000, 5000):
        assert threads() == before
    assert threads() == before
