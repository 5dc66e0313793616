"""Choosing rows and tokens: exhaustive search, plain loops, worked examples."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import advantages
from pgjax.masks import conflict, downsample, entropy_filter

ROWS, LENGTH = 24, 9  # tests share these shapes, and so a few compiled programs
GROUPS = 5


@jax.jit
def _grouped(values, ids, size, where):
    return downsample.max_variance_subset_by_group(
        values, ids, size, num_groups=GROUPS, where=where
    )


@jax.jit
def _subset(values, size, where):
    return downsample.max_variance_subset(values, size, where=where)


def subset(values, size, where=None):
    """One program for any number of rows: the others are there but may not be chosen."""
    rows = len(values)
    where = np.ones(rows, bool) if where is None else np.asarray(where)
    values = np.pad(np.asarray(values, np.float32), (0, ROWS - rows), constant_values=7e3)
    chosen = np.asarray(_subset(values, size, np.pad(where, (0, ROWS - rows))))
    assert not chosen[rows:].any()
    return chosen[:rows]


def grouped(values, ids, size):
    rows = len(values)
    values = np.pad(np.asarray(values, np.float32), (0, ROWS - rows), constant_values=-7e3)
    where = np.arange(ROWS) < rows
    sizes = np.broadcast_to(size, (GROUPS,))
    chosen = np.asarray(_grouped(values, np.pad(ids, (0, ROWS - rows)), sizes, where))
    return chosen[:rows]


# --- rows of largest variance ---------------------------------------------------------------------


def best_variance(values, size):
    return max(np.var(c) for c in itertools.combinations(np.asarray(values, float), size))


@pytest.mark.parametrize("seed", range(6))
def test_subset_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    for count in (2, 3, 5, 8, 10):
        values = rng.normal(size=count) ** 3 if seed % 2 else rng.integers(-2, 3, count) * 1.0
        for size in range(2, count + 1):
            chosen = subset(values, size)
            assert chosen.sum() == size
            want = best_variance(values, size)
            assert np.var(values[chosen]) == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_subset_of_the_worked_example():
    values = np.array([2.0, 1.0, 0.0, 0.0, -1.0, -2.0])
    assert sorted(values[subset(values, 2)].tolist()) == [-2, 2]
    assert sorted(values[subset(values, 4)].tolist()) == [-2, -1, 1, 2]
    assert subset(values, 6).all()


def test_groups_are_chosen_from_on_their_own():
    rng = np.random.default_rng(1)
    ids = rng.permutation(np.repeat([0, 2, 3, 4], [1, 2, 5, 9]))  # no row has id 1
    values = (rng.normal(size=ids.size) * 10.0 ** rng.integers(-3, 4, 5)[ids]).astype(np.float32)
    for size in (2, 3, 6):
        chosen = grouped(values, ids, size)
        for group in range(5):
            rows = ids == group
            assert chosen[rows].sum() == min(size, rows.sum())
            if rows.sum() >= 2:
                want = best_variance(values[rows], min(size, rows.sum()))
                assert np.var(values[rows & chosen]) == pytest.approx(want, rel=1e-5)
    chosen = grouped(values, ids, np.array([2, 2, 2, 3, 7]))
    assert [chosen[ids == g].sum() for g in range(5)] == [1, 0, 2, 3, 7]


def test_a_group_among_many_is_chosen_from_as_if_alone():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(64, 6)).astype(np.float32)
    values[0] = 1e4 * (1 + 1e-3 * values[0])  # far off: sums over the batch would drown the others
    ids = np.repeat(np.arange(64), 6)
    chosen = jax.jit(lambda x: downsample.max_variance_subset_by_group(x, ids, 4, num_groups=64))(
        values.reshape(-1)
    )
    for row, kept in zip(values, np.asarray(chosen).reshape(values.shape), strict=True):
        assert kept.sum() == 4
        assert np.var(row[kept]) == pytest.approx(best_variance(row, 4), rel=1e-5)


def test_rows_that_may_not_be_chosen():
    values = np.array([9.0, np.nan, -1.0, 0.0, 1.0, np.inf, -9.0])
    where = np.array([False, True, True, True, True, True, True])
    chosen = subset(values, 2, where=where)
    assert np.flatnonzero(chosen).tolist() == [4, 6]
    assert subset(values, 100, where=where).sum() == 4
    assert np.flatnonzero(subset(values, 2, where=np.arange(7) == 3)).tolist() == [3]
    assert not subset(values, 2, where=np.zeros(7, bool)).any()


def test_zero_advantages_wait_until_nothing_else_is_left():
    rng = np.random.default_rng(3)
    half = rng.gamma(2.0, 1.0, 5)
    values = rng.permutation(np.concatenate([half, -half, np.zeros(10)])).astype(np.float32)
    for size in (2, 4, 6, 8, 10):
        assert np.all(values[subset(values, size)] != 0)


def test_variance_of_two_from_a_standardised_group_is_at_least_one():
    rng = np.random.default_rng(4)
    for _ in range(20):
        rewards = rng.integers(0, 3, 8) + rng.random() * rng.normal(size=8)
        x = (rewards - rewards.mean()) / rewards.std()
        pair = x[subset(x, 2)]
        assert np.var(pair) == pytest.approx((np.ptp(x) / 2) ** 2, rel=1e-5)
        assert np.var(pair) >= 1 - 1e-6
    three = np.array([1.0, 1.0, -1.0, -1.0])
    assert np.var(three[subset(three, 3)]) == pytest.approx(8 / 9)  # not so for every size


def test_equal_values_and_tiny_ones():
    assert subset(np.full(5, 0.7), 3).sum() == 3
    np.testing.assert_array_equal(subset(np.full(5, 0.7), 3), subset(np.zeros(5), 3))
    tiny = np.array([0.0, 3e-30, -1e-30, 0.0])
    assert np.flatnonzero(subset(tiny, 2)).tolist() == [1, 2]


def test_sizes_are_data():
    values = np.random.default_rng(5).normal(size=12)
    counts = [subset(values, size).sum() for size in range(15)]
    assert counts == [2, 2, *range(2, 13), 12, 12]
    share = jax.jit(lambda s: downsample.rows_to_keep(s, jnp.array([10, 4, 100, 1])))
    assert share(0.3).tolist() == [3, 2, 30, 2]
    assert share(0.29).tolist() == [2, 2, 29, 2]


def test_subset_errors():
    x, ids = jnp.zeros(4), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="size: expected a number in"):
        downsample.max_variance_subset(x, 1)
    with pytest.raises(ValueError, match="size: expected an integer"):
        downsample.max_variance_subset(x, 2.0)
    with pytest.raises(ValueError, match="size: expected one number or 3"):
        downsample.max_variance_subset_by_group(x, ids, jnp.array([2, 2]), num_groups=3)
    with pytest.raises(ValueError, match="values"):
        downsample.max_variance_subset(jnp.zeros((2, 2)), 2)
    with pytest.raises(ValueError, match="where"):
        downsample.max_variance_subset(x, 2, where=jnp.zeros(4))
    with pytest.raises(ValueError, match="share"):
        downsample.rows_to_keep(1.5, jnp.int32(3))


# --- tokens in doubt ------------------------------------------------------------------------------


def test_tokens_kept_are_exactly_the_share_with_the_highest_scores():
    rng = np.random.default_rng(0)
    scores = rng.random((6, 7)).astype(np.float32)
    mask = rng.random((6, 7)) < 0.7
    total = mask.sum()
    top = jax.jit(downsample.topk_token_mask)
    for share in (0.01, 0.2, 0.5, 0.77, 1.0):
        kept = np.asarray(top(scores, mask, share))
        assert kept.sum() == int(np.ceil(round(share * total, 6)))
        assert not kept[~mask].any()
        assert scores[kept].min() >= scores[mask & ~kept].max(initial=-1.0)
    np.testing.assert_array_equal(top(scores, mask, 1.0), mask)
    assert not top(scores, np.zeros_like(mask), 0.5).any()


def test_shares_of_whole_numbers_are_not_rounded_up():
    @jax.jit
    def kept(total, share):
        mask = (jnp.arange(99_999) < total)[None]
        return downsample.topk_token_mask(jnp.zeros(mask.shape), mask, share).sum()

    for total in (10, 30, 50, 70, 1000, 99_999):
        for tenths in (1, 3, 7, 9, 10):
            assert int(kept(total, tenths / 10)) == -(-total * tenths // 10)


def test_ties_go_by_place_and_nan_comes_last():
    mask = jnp.array([[True, False, True], [True, True, True]])
    kept = downsample.topk_token_mask(jnp.zeros((2, 3)), mask, 0.5)
    np.testing.assert_array_equal(kept, [[True, False, True], [True, False, False]])
    scores = jnp.array([[jnp.nan, 9.0, 0.0], [-jnp.inf, 1.0, 2.0]])
    kept = downsample.topk_token_mask(scores, mask, 0.8)
    np.testing.assert_array_equal(kept, [[False, False, True], [True, True, True]])


def test_uncertainty_is_the_advantage_times_the_entropy():
    entropy = jnp.array([[0.5, 1.0], [2.0, 0.0]])
    np.testing.assert_array_equal(
        downsample.token_uncertainty(jnp.array([-2.0, 3.0]), entropy), [[1.0, 2.0], [6.0, 0.0]]
    )
    np.testing.assert_array_equal(downsample.token_uncertainty(-entropy, entropy), entropy**2)


def test_token_errors():
    scores, mask = jnp.zeros((2, 3)), jnp.ones((2, 3), bool)
    for share in (0.0, 1.1, -0.2):
        with pytest.raises(ValueError, match="fraction"):
            downsample.topk_token_mask(scores, mask, share)
    with pytest.raises(ValueError, match="mask"):
        downsample.topk_token_mask(scores, jnp.ones((2, 3)), 0.5)
    with pytest.raises(ValueError, match="mask: expected shape"):
        downsample.topk_token_mask(scores, mask[:, :2], 0.5)
    with pytest.raises(ValueError, match="entropy: expected numbers of at least 0"):
        downsample.token_uncertainty(jnp.zeros(2), scores - 1)
    with pytest.raises(ValueError, match="advantages: expected 2 rows"):
        downsample.token_uncertainty(jnp.zeros(3), scores)


# --- conflicts ------------------------------------------------------------------------------------


CONFLICTS = jax.jit(conflict.conflict_tokens)


def loops(tokens, mask, signs, ids):
    """Conflicts by their definition, one completion after the other."""
    size = len(tokens)
    answers = [tokens[b][mask[b]] for b in range(size)]
    found = np.zeros((2, *mask.shape), bool)
    for way in (0, 1):
        seen = [a[::-1] if way else a for a in answers]
        for b in range(size):
            places = np.flatnonzero(mask[b])
            places = places[::-1] if way else places
            for k, token in enumerate(seen[b]):
                holders = {
                    signs[c]
                    for c in range(size)
                    if ids[c] == ids[b] and len(seen[c]) > k and seen[c][k] == token
                }
                if not signs[b] or not {1, -1} <= holders:
                    break
                found[way, b, places[k]] = True
    return found


@pytest.mark.parametrize("seed", range(8))
def test_conflicts_equal_their_definition(seed):
    rng = np.random.default_rng(seed)
    shape = (12, LENGTH)
    tokens = rng.integers(0, 2 + seed % 2, shape)
    starts, lengths = rng.integers(0, 3, (12, 1)), rng.integers(0, 7, (12, 1))
    columns = np.arange(shape[1])
    mask = (columns >= starts) & (columns < starts + lengths)
    if seed % 2:  # holes, as tool outputs leave them
        mask &= rng.random(shape) < 0.8
    signs = rng.choice([-1, 1, 0], 12, p=[0.45, 0.45, 0.1])
    ids = rng.choice([5, -3, 7], 12)
    found = CONFLICTS(tokens, mask, signs, ids)
    np.testing.assert_array_equal(np.stack(found), loops(tokens, mask, signs, ids))


def worked(tokens, signs, mask=None):
    """Conflicts and weights of one group, through the same compiled program as above."""
    tokens = np.asarray(tokens)
    rows, length = tokens.shape
    mask = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask, bool)
    pad = ((0, 12 - rows), (0, LENGTH - length))
    found = CONFLICTS(
        np.pad(tokens, pad), np.pad(mask, pad), np.pad(signs, pad[0]), np.zeros(12, int)
    )
    found = conflict.Conflicts(*(x[:rows, :length] for x in found))
    return found, conflict.conflict_weights(found, np.asarray(signs))


def test_conflicts_of_the_worked_example():
    found, weights = worked([[5, 7, 9], [5, 7, 8]], [1, -1])
    np.testing.assert_array_equal(found.forward, [[1, 1, 0], [1, 1, 0]])
    assert not found.backward.any()
    np.testing.assert_array_equal(weights, [[2, 2, 1], [0, 0, 1]])


def test_identical_completions_of_opposite_sign_conflict_both_ways():
    _, weights = worked([[5, 7, 9], [5, 7, 9]], [1, -1])
    np.testing.assert_array_equal(weights, [[4, 4, 4], [0, 0, 0]])


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (0, 0, 0), (1, 0, 1)])
def test_no_conflict_without_both_signs(signs):
    found, weights = worked([[5, 7], [5, 7], [5, 7]], signs)
    assert not found.forward.any() and not found.backward.any() and (weights == 1).all()


def test_a_match_after_the_first_difference_does_not_count():
    found, _ = worked([[5, 1, 9, 2, 3], [5, 2, 9, 1, 4]], [1, -1])
    np.testing.assert_array_equal(found.forward, [[1, 0, 0, 0, 0]] * 2)
    assert not found.backward.any()


def test_ends_are_matched_from_each_rows_own_last_token():
    tokens = [[0, 4, 8, 9, 0, 0], [0, 5, 6, 7, 8, 9]]
    mask = [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    found, weights = worked(tokens, [1, -1], mask)
    assert not found.forward.any()
    np.testing.assert_array_equal(found.backward, [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(weights, [[1, 1, 2, 2, 1, 1], [1, 1, 1, 1, 0, 0]])


def test_weights_take_few_values():
    rng = np.random.default_rng(1)
    tokens, signs = rng.integers(0, 2, (12, LENGTH)), rng.choice([-1, 0, 1], 12)
    tokens[:, 2:] = 0
    found = CONFLICTS(tokens, np.ones((12, LENGTH), bool), signs, rng.integers(0, 2, 12))
    weights = conflict.conflict_weights(found, signs, boost=3.0)
    assert set(np.unique(weights)) == {0.0, 1.0, 3.0, 9.0}
    assert (conflict.conflict_weights(found, signs, boost=1.0, suppress=1.0) == 1).all()


def test_conflict_errors():
    tokens, mask, ids = jnp.zeros((2, 3), int), jnp.ones((2, 3), bool), jnp.zeros(2, int)
    check = functools.partial(conflict.conflict_tokens, tokens)
    with pytest.raises(ValueError, match="signs: expected -1, 0 or 1, got 2"):
        check(mask, jnp.array([1, 2]), ids)
    with pytest.raises(ValueError, match="signs: expected an integer"):
        check(mask, jnp.ones(2), ids)
    with pytest.raises(ValueError, match="signs: expected 2 rows"):
        check(mask, jnp.ones(3, int), ids)
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        check(jnp.ones((2, 3)), jnp.ones(2, int), ids)
    with pytest.raises(ValueError, match="mask: expected shape"):
        check(mask[:, :1], jnp.ones(2, int), ids)
    found = conflict.Conflicts(mask, mask)
    for name in ("boost", "suppress"):
        with pytest.raises(ValueError, match=name):
            conflict.conflict_weights(found, jnp.array([1, -1]), **{name: -1.0})


# --- the gate -------------------------------------------------------------------------------------


def test_gate_closes_above_ln_2_where_training_began_below():
    entropy = jnp.array([0.0, 0.69, float(np.float32(np.log(2))), 0.70, 3.0])
    gate = jax.jit(entropy_filter.entropy_gate)
    for start in (0.0, 0.5, float(np.float32(np.log(2)))):
        assert gate(entropy, start).tolist() == [True, True, True, False, False]
    assert gate(entropy, 0.7).all()
    assert entropy_filter.entropy_gate(entropy, 0.0, threshold=jnp.inf).all()
    assert entropy_filter.entropy_gate(entropy, 0.0, threshold=0.1).sum() == 1


def test_below_ln_2_there_is_a_majority_token():
    """The fact behind the threshold: max p <= 1/2 makes the entropy at least ln 2."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.3), 4000)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-300)), axis=1)
    assert np.all(entropy[p.max(1) <= 0.5] >= np.log(2) - 1e-12)
    assert np.all(p.max(1)[entropy < np.log(2)] > 0.5)
    assert -np.log(0.5) == pytest.approx(entropy_filter.MAJORITY_ENTROPY)  # attained by two halves


def test_gate_errors():
    with pytest.raises(ValueError, match="threshold"):
        entropy_filter.entropy_gate(jnp.zeros(3), 0.0, threshold=0.0)
    with pytest.raises(ValueError, match="mean_entropy"):
        entropy_filter.entropy_gate(jnp.zeros((3, 1)), 0.0)


def test_selection_follows_advantages_of_any_kind():
    """Group-normalised advantages of mixed groups: groups without signal are left out first."""
    rewards = np.array([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0])
    ids = np.repeat(np.arange(4), 4)
    values = jax.jit(lambda r: advantages.group_normalize(r, ids, num_groups=4))(rewards)
    chosen = subset(values, 8)
    assert sorted(set(ids[chosen].tolist())) == [0, 3]
