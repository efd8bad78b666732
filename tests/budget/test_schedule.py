"""How much goes in each round."""

import pytest

from keras_taylor.budget.schedule import removed_fractions

pytestmark = pytest.mark.once


def test_equal_steps_and_the_rest():
    assert removed_fractions(0.3, 0.05) == pytest.approx([0.05, 0.10, 0.15, 0.20, 0.25, 0.30])
    assert removed_fractions(0.3, 0.125) == pytest.approx([0.125, 0.25, 0.3])
    assert removed_fractions(0.3, 1) == [0.3]


def test_a_function_ends_at_the_goal():
    assert removed_fractions(0.5, lambda number: 0.2 * number) == pytest.approx([0.2, 0.4, 0.5])
