"""pass@k, maj@k and their intervals, against counting."""

import itertools

import numpy as np
import pytest

from deepzoo.recipes.parts.accuracy import interval, majority_at_k, pass_at_k, wilson


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples():
    right = np.random.default_rng(0).random((20, 6)) < 0.3
    for k in range(1, 7):
        every = [right[:, list(c)].any(axis=1) for c in itertools.combinations(range(6), k)]
        np.testing.assert_allclose(pass_at_k(right, k), np.mean(every, axis=0), atol=1e-12)
    with pytest.raises(ValueError, match="pass@7 needs at least 7 samples, there are 6"):
        pass_at_k(right, 7)


def test_the_majority_of_each_group_decides():
    right = np.array([[1, 0, 0, 1, 1, 0]], bool)
    votes = [["a", "b", "b", "a", "a", "c"]]
    assert majority_at_k(right, votes, 1).tolist() == [0.5]
    assert majority_at_k(right, votes, 3).tolist() == [0.5]  # b, then a
    assert majority_at_k(right, votes, 6).tolist() == [1.0]
    assert majority_at_k(right, votes, 2).tolist() == [2 / 3]  # ties: the first, a, b, a
    # Those that answer nothing have no vote, and a group of them is wrong.
    assert majority_at_k(right, [[None, "b", "b", "a", None, None]], 6).tolist() == [0.0]
    assert majority_at_k(right, [[None] * 6], 6).tolist() == [0.0]
    with pytest.raises(ValueError, match="maj@7 needs"):
        majority_at_k(right, votes, 7)


def test_the_majority_gains_where_wrong_answers_differ():
    rng = np.random.default_rng(1)
    right = rng.random((200, 15)) < 0.4
    votes = [["right" if r else str(rng.integers(100)) for r in row] for row in right]
    alone = majority_at_k(right, votes, 1).mean()
    assert alone == pytest.approx(right.mean(), abs=1e-9)
    assert majority_at_k(right, votes, 15).mean() > 0.95


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("samples", [1, 4])
def test_intervals_hold_the_true_share_as_often_as_they_say(share, samples):
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        # Problems differ in how hard they are; samples of one share that.
        hard = rng.beta(2 * share, 2 * (1 - share), 200)
        low, high = interval((rng.random((samples, 200)) < hard).mean(axis=0))
        held += low <= share <= high
    assert 0.92 < held / 400 < 0.985


def test_intervals_where_nothing_varies_are_not_empty():
    assert interval(np.ones(20)) == wilson(20, 20)
    assert interval(np.zeros(20)) == wilson(0, 20)
    low, high = interval(np.full(20, 0.5))
    assert low < 0.35
    assert high > 0.65
    assert interval(np.ones(1)) == wilson(1, 1)
