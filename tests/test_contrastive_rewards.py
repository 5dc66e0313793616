"""The contrastive bonus for an optional action."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import rewards
from pgjax.rewards import contrastive

ZEROS = np.zeros(4, int)


def sign(correct, used, ids=None, **options):
    ids = np.zeros(len(used), int) if ids is None else np.asarray(ids)
    found = contrastive.contrastive_mask(
        np.asarray(correct, np.float32), np.asarray(used), ids, **{"num_groups": 1, **options}
    )
    return found.tolist()


def test_by_hand():
    assert sign([1, 1, 0, 0], [1, 1, 0, 0]) == [1]
    assert sign([1, 1, 0, 0], [0, 0, 1, 1]) == [-1]
    assert sign([1, 0, 1, 0], [1, 1, 0, 0]) == [0]
    # An empty side, on either hand; a group without samples.
    assert sign([1, 1, 0, 0], [1, 1, 1, 1], num_groups=2) == [0, 0]
    assert sign([1, 1, 0, 0], [0, 0, 0, 0]) == [0]


def test_against_a_loop():
    rng = np.random.default_rng(0)
    ids, correct = rng.integers(0, 6, 60), rng.integers(0, 2, 60).astype(np.float32)
    used = rng.integers(0, 2, 60).astype(bool)
    correct[::9] = np.nan
    found = contrastive.contrastive_mask(correct, used, ids, num_groups=6, margin=0.1)
    known = np.isfinite(correct)
    for g in range(6):
        a, b = (correct[(ids == g) & known & side] for side in (used, ~used))
        want = 0
        if len(a) and len(b) and abs(a.mean() - b.mean()) > 0.1:
            want = np.sign(a.mean() - b.mean())
        assert found[g] == want
    order = rng.permutation(60)
    np.testing.assert_array_equal(
        found,
        jax.jit(lambda c, u, i: contrastive.contrastive_mask(c, u, i, num_groups=6, margin=0.1))(
            correct[order], used[order], ids[order]
        ),
    )
    flipped = contrastive.contrastive_mask(correct, ~used, ids, num_groups=6, margin=0.1)
    np.testing.assert_array_equal(flipped, -found)
    assert len(set(found.tolist())) > 1


@pytest.mark.parametrize("count", [10, 20, 30])
@pytest.mark.parametrize("tenths", [1, 3, 7])
def test_a_difference_of_exactly_the_margin_is_within_it(count, tenths):
    """.1 cannot be written in binary; shares of ten can differ by exactly that."""
    used = np.arange(2 * count) < count
    base = count // 5
    right = np.where(used, np.arange(2 * count) < base + count * tenths // 10, False)
    right |= ~used & (np.arange(2 * count) - count < base)
    assert sign(right, used, margin=tenths / 10) == [0]
    assert sign(right, used, margin=tenths / 10 - 1e-3) == [1]
    assert sign(right, ~used, margin=tenths / 10 - 1e-3) == [-1]


def test_only_dedicated_samples_are_contrasted():
    where = np.array([False, False, True, True])
    assert sign([1, 0, 0, 1], [1, 0, 1, 0], where=where) == [-1]
    assert sign([1, 0, 0, 1], [1, 0, 1, 0]) == [0]


def test_reward_adds_up():
    correct = np.array([1, 0, 1, 0, np.nan], np.float32)
    used = np.array([1, 1, 0, 0, 1], bool)
    ids, lengths = np.array([0, 0, 1, 1, 1]), np.array([5, 20, 0, 10, 5])
    options = {"use_weight": 0.5, "length_weight": 0.2, "length_reference": 10}
    found = contrastive.gcpo_reward(correct, used, lengths, np.array([1, -1]), ids, **options)
    np.testing.assert_allclose(found, [1.6, 0.7, 1.0, 0.2, np.nan], rtol=1e-6)
    everywhere = contrastive.gcpo_reward(correct, used, lengths, np.ones(2, int), ids, **options)
    length = np.minimum(lengths / 10, 1)
    np.testing.assert_allclose(everywhere, correct + 0.5 * used + 0.2 * length, rtol=1e-6)
    for signs in ([1, 1], [-1, -1], [0, 1]):
        total = contrastive.gcpo_reward(correct, used, lengths, np.array(signs), ids, **options)
        assert np.all(np.abs(total[:4]) <= 1 + 0.5 + 0.2 + 1e-6)
    without = contrastive.gcpo_reward(
        correct,
        used,
        lengths,
        np.array([1, -1]),
        ids,
        use_weight=0.0,
        length_weight=0.0,
        length_reference=10,
    )
    np.testing.assert_array_equal(without, correct)


def test_length_reward():
    found = contrastive.length_reward(jnp.array([0, 4, 8, 9]), reference=8)
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.0])


def test_bad_input():
    ones = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="correct: expected zeros and ones"):
        contrastive.contrastive_mask(ones * 0.5, ones > 0, ZEROS, num_groups=1)
    with pytest.raises(ValueError, match="used: expected zeros and ones"):
        contrastive.contrastive_mask(ones, 2 * ones, ZEROS, num_groups=1)
    with pytest.raises(ValueError, match="margin"):
        contrastive.contrastive_mask(ones, ones > 0, ZEROS, num_groups=1, margin=-0.1)
    with pytest.raises(ValueError, match="used: expected shape"):
        contrastive.contrastive_mask(ones, ones[:3] > 0, ZEROS, num_groups=1)
    with pytest.raises(ValueError, match="ids in"):
        contrastive.contrastive_mask(ones, ones > 0, ZEROS + 1, num_groups=1)
    lengths = np.full(4, 3)
    options = {"length_reference": 2.0}
    # Signs of fewer groups than there are ids.
    with pytest.raises(ValueError, match="ids in"):
        contrastive.gcpo_reward(
            ones, ones > 0, lengths, np.ones(1, int), np.array([0, 0, 1, 1]), **options
        )
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="reference"):
            contrastive.length_reward(lengths, reference=wrong)
    with pytest.raises(ValueError, match="lengths: expected numbers ≥ 0"):
        contrastive.length_reward(-lengths, reference=2.0)
    for name in ("use_weight", "length_weight"):
        with pytest.raises(ValueError, match=name):
            contrastive.gcpo_reward(
                ones, ones > 0, lengths, np.ones(1, int), ZEROS, **options, **{name: -1.0}
            )
    assert rewards.contrastive is contrastive
