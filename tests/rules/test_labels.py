"""Unions and locks of channel labels."""

import numpy as np
import pytest

from keras_taylor.rules.labels import FIXED, LabelSpace

pytestmark = pytest.mark.once


def test_labels_are_fresh_and_never_zero():
    space = LabelSpace()
    a, b = space.new_labels(3, "a"), space.new_labels(2, "b")
    assert a.tolist() == [1, 2, 3]
    assert b.tolist() == [4, 5]
    assert space.producers == [(1, 4, "a"), (4, 6, "b")]
    assert len(space) == 6


def test_a_single_channel_is_fixed():
    space = LabelSpace()
    assert space.new_labels(1, "heat").tolist() == [FIXED]
    assert space.producers == []


def test_labels_without_unions_are_their_own_roots():
    space = LabelSpace()
    space.new_labels(3, "a")
    roots, locks = space.resolve()
    assert roots.tolist() == [0, 1, 2, 3]
    assert (locks == -1).all()


def test_union_is_transitive_and_the_root_is_the_smallest():
    space = LabelSpace()
    a, b, c = (space.new_labels(2, name) for name in "abc")
    space.union(c, b, "sum")
    space.union(b, a, "sum")
    roots, _ = space.resolve()
    assert roots[a].tolist() == roots[b].tolist() == roots[c].tolist() == [1, 2]


def test_a_long_chain_in_random_order_becomes_one():
    space = LabelSpace()
    labels = np.random.default_rng(0).permutation(space.new_labels(100_000, "a"))
    space.union(labels[1:], labels[:-1], "chain")
    roots, _ = space.resolve()
    assert set(roots[1:]) == {1}


def test_components_equal_those_of_a_plain_search():
    random = np.random.default_rng(1)
    space = LabelSpace()
    space.new_labels(200, "a")
    pairs = random.integers(1, 201, (120, 2))
    space.union(pairs[:, 0], pairs[:, 1], "random")
    expected = np.arange(201)
    for _ in range(200):
        for a, b in pairs:
            expected[[a, b]] = min(expected[a], expected[b])
    roots, _ = space.resolve()
    np.testing.assert_array_equal(roots, expected)


def test_a_lock_holds_for_the_whole_class_and_the_first_reason_is_told():
    space = LabelSpace()
    a, b = space.new_labels(2, "a"), space.new_labels(2, "b")
    space.union(a, b, "sum")
    space.lock(b[:1], "first")
    space.lock(a[:1], "second")
    _, locks = space.resolve()
    assert [space.reasons[k] for k in locks[[1, 3]]] == ["first", "first"]
    assert locks[[2, 4]].tolist() == [-1, -1]


def test_a_channel_that_meets_a_fixed_position_is_locked():
    space = LabelSpace()
    a = space.new_labels(3, "a")
    space.union(a, np.array([FIXED, 2, 3]), "meets the image")
    roots, locks = space.resolve()
    assert roots.tolist() == [0, 1, 2, 3]
    assert locks.tolist() == [-1, 1, -1, -1]
    assert space.reasons[1:] == ["meets the image"]


def test_fixed_positions_that_meet_are_nothing():
    space = LabelSpace()
    space.union(np.zeros(3, int), np.zeros(3, int), "nothing")
    space.lock(np.zeros(3, int), "nothing")
    assert space.resolve().locks.tolist() == [-1] and len(space.reasons) == 1


def test_labels_broadcast_in_a_union():
    space = LabelSpace()
    a = space.new_labels(2, "a")
    b = space.new_labels(6, "b").reshape(3, 2)
    space.union(a, b, "every row")
    roots, _ = space.resolve()
    assert roots[b].tolist() == [[1, 2]] * 3
