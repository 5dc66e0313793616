"""Advantages: loops over groups, exact expectations, degenerate rewards, devices."""

import functools
import itertools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgjax import advantages

B, S = 10, 4
GROUPED = ("centered", "group_normalize", "leave_one_out", "group_mean_batch_std")
SCALED = ("group_normalize", "group_mean_batch_std")


def spread(x, ddof):
    return np.std(x, ddof=ddof) if len(x) > ddof else 0.0


def reference(name, r, ids, where, epsilon=1e-6, ddof=1):
    """The definition, row by row."""
    r = np.asarray(r, np.float64)
    valid = np.isfinite(r)
    counted = valid & where
    out = np.zeros(len(r))
    for i in np.flatnonzero(valid):
        group = r[counted & (ids == ids[i])]
        own = r[i]
        mean = group.mean() if len(group) else 0.0
        if name == "centered":
            out[i] = own - mean
        elif name == "leave_one_out":
            n = len(group)
            # A row outside `where` belongs to a trajectory that counts: its own reward once less.
            out[i] = own - (group.sum() - own) / (n - 1) if n > 1 else own
        elif name == "group_normalize":
            if len(group) <= 1:
                out[i] = own
            elif np.ptp(group) > 0:
                out[i] = (own - mean) / (spread(group, ddof) + epsilon)
        elif name == "group_mean_batch_std":
            batch = r[counted]
            if len(batch) > 1 and np.ptp(batch) > 0:
                out[i] = (own - mean) / (spread(batch, ddof) + epsilon)
        else:  # batch_normalize
            batch = r[counted]
            if len(batch) > 1 and np.ptp(batch) > 0:
                out[i] = (own - batch.mean()) / (spread(batch, ddof) + epsilon)
    return out


@functools.cache
def compiled(name, **options):
    return jax.jit(functools.partial(getattr(advantages, name), num_groups=S, **options))


def call(name, r, ids, where=None, **options):
    return np.asarray(compiled(name, **options)(jnp.asarray(r), jnp.asarray(ids), where=where))


# Multiples of 1/8: whether rewards are equal is then never a matter of rounding.
eighths = st.integers(-400, 400).map(lambda k: k / 8)
some_rewards = hnp.arrays(np.float64, B, elements=eighths)
failed_rewards = hnp.arrays(
    np.float64, B, elements=eighths | st.sampled_from([np.nan, np.inf, -np.inf])
)
some_ids = hnp.arrays(np.int32, B, elements=st.integers(0, S - 1))
some_rows = hnp.arrays(bool, B)


@settings(max_examples=40, deadline=None)
@given(failed_rewards, some_ids, some_rows)
def test_against_loops_over_groups(r, ids, where):
    with jax.enable_x64(True):
        for name in GROUPED:
            options = [{}, {"ddof": 0, "epsilon": 0.01}] if name in SCALED else [{}]
            for o in options:
                got = call(name, r, ids, where, **o)
                want = reference(name, r, ids, where, **o)
                np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11, err_msg=name)
                assert np.all(got[~np.isfinite(r)] == 0)
        got = _batch_normalize(r, where=where)
        want = reference("batch_normalize", r, ids, where)
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


_batch_normalize = jax.jit(advantages.batch_normalize)


@settings(max_examples=30, deadline=None)
@given(some_rewards, some_ids, st.permutations(range(B)), st.permutations(range(S)))
def test_order_of_rows_and_names_of_groups_do_not_matter(r, ids, order, names):
    order, names = np.array(order), np.array(names, np.int32)
    with jax.enable_x64(True):
        for name in GROUPED:
            got = call(name, r[order], names[ids][order])
            np.testing.assert_allclose(got, call(name, r, ids)[order], rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(some_rewards, some_ids, st.integers(-80, 80), st.sampled_from([0.25, 3.0, -2.0]))
def test_shift_and_scale(r, ids, shift, scale):
    """Of all rewards; groups of one aside, where two of the functions return the reward itself."""
    size = np.bincount(ids, minlength=S)[ids]
    with jax.enable_x64(True):
        for name in GROUPED:
            exact = {"epsilon": 0.0} if name in SCALED else {}
            plain = call(name, r, ids, **exact)
            moved = call(name, r + shift, ids, **exact)
            many = size > 1
            np.testing.assert_allclose(moved[many], plain[many], rtol=1e-10, atol=1e-10)
            scaled = call(name, scale * r, ids, **exact)
            factor = np.sign(scale) if name in SCALED else scale
            np.testing.assert_allclose(scaled[many], factor * plain[many], rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(some_rewards, some_ids)
def test_sums_and_sizes(r, ids):
    with jax.enable_x64(True):
        normal = call("group_normalize", r, ids, epsilon=0.0)
        for s in range(S):
            rows = ids == s
            if rows.sum() < 2:
                continue
            for name in GROUPED:
                assert abs(call(name, r, ids)[rows].sum()) < 1e-9
            if np.ptp(r[rows]):
                np.testing.assert_allclose(np.std(normal[rows], ddof=1), 1.0, rtol=1e-11)


# --- expectations, by enumeration of every draw ---------------------------------------------------

LOGITS = np.array([0.3, -0.8, 1.1])
ARM_REWARDS = np.array([1.0, 0.25, -0.6])
G = 3


def expected_gradient(advantage, rows=tuple(range(G))):
    """E[(1/G) Σ_rows A_row ∇log π(a_draw(row)) / (rows of that draw)] over all 3^G draws."""
    rows = np.array(rows)
    share = 1.0 / np.bincount(rows)[rows]
    p = np.exp(LOGITS) / np.exp(LOGITS).sum()
    draws = np.array(list(itertools.product(range(3), repeat=G)))
    probability = p[draws].prod(1)
    assert abs(probability.sum() - 1) < 1e-12
    a = np.asarray(jax.vmap(advantage)(jnp.asarray(ARM_REWARDS[draws][:, rows])))
    scores = np.eye(3)[draws][:, rows] - p
    estimate = np.sum((a * share)[..., None] * scores, axis=1) / G
    return probability @ estimate


def true_gradient():
    return jax.grad(lambda x: jax.nn.softmax(x) @ ARM_REWARDS)(jnp.asarray(LOGITS))


def grouped(name, **options):
    def advantage(r):
        f = getattr(advantages, name)
        return f(r, jnp.zeros(r.shape, jnp.int32), num_groups=1, **options)

    return advantage


def test_leave_one_out_is_unbiased():
    with jax.enable_x64(True):
        got = expected_gradient(grouped("leave_one_out"))
        np.testing.assert_allclose(got, true_gradient(), rtol=0, atol=1e-14)


def test_centered_shrinks_the_gradient_by_its_own_share():
    with jax.enable_x64(True):
        got, want = expected_gradient(grouped("centered")), true_gradient()
        np.testing.assert_allclose(got, (1 - 1 / G) * want, rtol=0, atol=1e-14)


def test_group_normalize_is_biased_uphill():
    with jax.enable_x64(True):
        got, want = expected_gradient(grouped("group_normalize")), np.asarray(true_gradient())
    ratio = got / want
    assert got @ want > 0 and np.ptp(ratio) > 0.05  # not the true direction, at an acute angle


def test_trajectories_split_into_rows_keep_both_facts():
    """The first trajectory is cut into three rows, the last into two; each counts once."""
    rows = (0, 0, 0, 1, 2, 2)
    first = jnp.array([True, False, False, True, True, False])
    with jax.enable_x64(True):
        want = true_gradient()
        got = expected_gradient(grouped("leave_one_out", where=first), rows)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-14)
        got = expected_gradient(grouped("centered", where=first), rows)
        np.testing.assert_allclose(got, (1 - 1 / G) * want, rtol=0, atol=1e-14)
        # What `where` is for: counting every row would bias even leave-one-out.
        blind = expected_gradient(grouped("leave_one_out"), rows)
        assert np.max(np.abs(blind - want)) > 1e-2


def test_leave_one_out_with_unequal_groups_is_unbiased():
    """Draws 0 and 1 share a group, draw 2 is alone: its baseline is empty."""
    ids = jnp.array([0, 0, 1])
    with jax.enable_x64(True):
        got = expected_gradient(lambda r: advantages.leave_one_out(r, ids, num_groups=2))
        np.testing.assert_allclose(got, true_gradient(), rtol=0, atol=1e-14)


# --- worked examples and degenerate rewards -------------------------------------------------------


def test_batch_scale_worked_example():
    r, ids = jnp.array([1.0, 0.0, 1.0, 1.0]), jnp.array([0, 0, 1, 1])
    got = advantages.group_mean_batch_std(r, ids, num_groups=2, epsilon=0.0)
    np.testing.assert_allclose(got, [1, -1, 0, 0], rtol=1e-6)
    # One prompt in the batch: the two scales are the same.
    one = jnp.zeros(4, jnp.int32)
    for ddof in (0, 1):
        np.testing.assert_allclose(
            advantages.group_mean_batch_std(r, one, num_groups=1, ddof=ddof),
            advantages.group_normalize(r, one, num_groups=1, ddof=ddof),
            rtol=1e-6,
        )


def test_batch_scale_tames_a_lone_success():
    """15 zeros and a 1 give 3.75 under the group's scale; a mixed batch has a wider one."""
    lone = np.array([0.0] * 15 + [1.0])
    r = np.concatenate([lone, np.tile([0.0, 1.0], 8)])
    ids = np.repeat([0, 1], 16)
    own = advantages.group_normalize(r, ids, num_groups=2)[15]
    np.testing.assert_allclose(own, 3.75, rtol=1e-5)
    batch = advantages.group_mean_batch_std(r, ids, num_groups=2)[15]
    np.testing.assert_allclose(batch, (15 / 16) / (np.std(r, ddof=1) + 1e-6), rtol=1e-5)
    assert batch < own


def test_raw_batch_scale_sees_a_shifted_group():
    r, ids = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0, 0, 1, 1])
    shifted = r + np.array([0.0, 0.0, 4.0, 4.0])
    before = np.asarray(advantages.group_mean_batch_std(r, ids, num_groups=2))
    after = np.asarray(advantages.group_mean_batch_std(shifted, ids, num_groups=2))
    np.testing.assert_allclose(
        after * np.std(shifted, ddof=1), before * np.std(r, ddof=1), rtol=1e-5
    )
    assert np.all(np.abs(after) < 0.5 * np.abs(before))


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.1, -1e20, 0.0])
def test_equal_rewards_give_exactly_nothing(value):
    ids = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    r = np.full(B, value, np.float32)
    for name in GROUPED:
        assert np.all(call(name, r, ids) == 0)
        if name in SCALED:
            assert np.all(call(name, r, ids, epsilon=0.0) == 0)
    assert np.all(np.asarray(_batch_normalize(r)) == 0)
    # Three rewards of 0.1 stay at nothing beside a group that has a spread.
    r[3] = value + 1 + abs(value)
    for name in GROUPED:
        got = call(name, r, ids)
        assert np.all(got[:3] == 0) and np.all(got[3:7] != 0) and np.all(got[7:] == 0)


def test_large_offsets_cost_no_precision():
    ids = np.repeat([0, 1], 5)
    bits = np.array([1.0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    for name in GROUPED:
        got = call(name, (1e6 + bits).astype(np.float32), ids)
        want = reference(name, bits, ids, np.ones(B, bool))
        if name == "group_mean_batch_std":
            want = reference(name, 1e6 + bits, ids, np.ones(B, bool))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_stay_finite(scale):
    ids = np.repeat([0, 1], 5)
    r = (np.arange(10.0) ** 2 * scale).astype(np.float32)
    want = reference("group_normalize", r, ids, np.ones(B, bool), epsilon=0.0)
    np.testing.assert_allclose(call("group_normalize", r, ids, epsilon=0.0), want, rtol=2e-6)
    for name in GROUPED:
        assert np.all(np.isfinite(call(name, r, ids)))
    x, mask = r.reshape(2, 5), np.ones((2, 5), bool)
    exact = advantages.token_whiten(x, mask, epsilon=0.0)
    want = (x.astype(np.float64) - x.mean(dtype=np.float64)) / np.std(x.astype(np.float64), ddof=1)
    np.testing.assert_allclose(exact, want, rtol=2e-6)
    assert np.all(np.isfinite(advantages.token_whiten(x, mask)))


def test_groups_of_one_and_groups_where_nothing_counts():
    r = jnp.array([2.5, 1.0, 3.0, jnp.nan, 4.0])
    ids = jnp.array([3, 0, 0, 1, 1])  # group 1: one verifier failed, one sample remains
    where = jnp.array([True, False, False, True, True])  # group 0: nothing counts
    assert call("centered", r, ids, where).tolist() == [0, 1, 3, 0, 0]
    assert call("group_normalize", r, ids, where).tolist() == [2.5, 1, 3, 0, 4]
    assert call("leave_one_out", r, ids, where).tolist() == [2.5, 1, 3, 0, 4]
    assert advantages.batch_normalize(r[:1]).tolist() == [0]
    assert advantages.group_mean_batch_std(r[:1], ids[:1] * 0, num_groups=1).tolist() == [0]


def test_all_verifiers_failed():
    r, ids = jnp.full(B, jnp.nan), jnp.zeros(B, jnp.int32)
    for name in GROUPED:
        assert np.all(call(name, r, ids) == 0)
    assert np.all(np.asarray(advantages.batch_normalize(r)) == 0)


def test_rows_outside_where_are_measured_by_those_inside():
    r, ids = jnp.array([1.0, 0.0, 1.0, 5.0]), jnp.zeros(4, jnp.int32)
    where = jnp.array([True, True, False, False])
    std = 0.5**0.5
    options = {"num_groups": 1, "where": where}
    np.testing.assert_allclose(advantages.centered(r, ids, **options), [0.5, -0.5, 0.5, 4.5])
    for f in (advantages.group_normalize, advantages.group_mean_batch_std):
        got = f(r, ids, epsilon=0.0, **options)
        np.testing.assert_allclose(got, np.array([0.5, -0.5, 0.5, 4.5]) / std, rtol=1e-6)
    got = advantages.batch_normalize(r, epsilon=0.0, where=where)
    np.testing.assert_allclose(got, np.array([0.5, -0.5, 0.5, 4.5]) / std, rtol=1e-6)
    # No spread among those that count: nothing to measure by, for the others neither.
    where = jnp.array([True, False, True, False])
    assert np.all(call("group_normalize", r, ids, where) == 0)


@pytest.mark.parametrize("name", GROUPED)
def test_gradients_are_finite(name):
    """With equal rewards, failed verifiers, groups of one and an empty group."""
    r = jnp.array([0.1, 0.1, 0.1, jnp.nan, 1.0, jnp.inf, 2.0, 5.0, 7.0, 7.0])
    ids = jnp.array([0, 0, 0, 0, 1, 1, 3, 3, 3, 3])
    weight = jnp.arange(1.0, B + 1)
    f = compiled(name)
    g = jax.jit(jax.grad(lambda r: jnp.sum(weight * f(r, ids))))(r)
    assert np.all(np.isfinite(g)) and g[3] == g[5] == 0 and np.any(np.asarray(g)[6:] != 0)


@pytest.mark.parametrize("name", GROUPED)
def test_vmap_dtypes_and_traced_ids_out_of_range(name):
    rng = np.random.default_rng(0)
    r, ids = rng.normal(size=(2, B)).astype(np.float32), rng.integers(0, S, (2, B))
    got = jax.vmap(compiled(name))(r, ids)
    for i in range(2):
        np.testing.assert_allclose(got[i], call(name, r[i], ids[i]), rtol=1e-6, atol=1e-6)
    half = jnp.asarray(r[0], jnp.bfloat16)
    out = compiled(name)(half, jnp.asarray(ids[0]))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, compiled(name)(half.astype(jnp.float32), ids[0]))
    wrong = call(name, r[0], np.where(np.arange(B) < 2, [-1, S] * (B // 2), ids[0]))
    assert np.all(np.isnan(wrong[:2])) and np.all(np.isfinite(wrong[2:]))


# --- tokens ---------------------------------------------------------------------------------------

TB, TT = 4, 6
token_values = hnp.arrays(np.float64, (TB, TT), elements=eighths)
token_masks = hnp.arrays(bool, (TB, TT))
_whiten = jax.jit(advantages.token_whiten, static_argnames="ddof")


@settings(max_examples=30, deadline=None)
@given(token_values, token_masks, token_masks, st.sampled_from([0, 1]))
def test_token_whiten_against_its_definition(x, mask, failed, ddof):
    bad = np.where(mask, np.where(failed, np.nan, x), np.inf)
    counted = mask & ~failed
    chosen = x[counted]
    want = np.zeros((TB, TT))
    if len(chosen) > 1 and np.ptp(chosen):
        variance = np.var(chosen, ddof=ddof)
        want[counted] = (chosen - chosen.mean()) / np.sqrt(variance + 1e-8)
    with jax.enable_x64(True):
        got = _whiten(bad, mask, ddof=ddof)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_token_whiten_degenerate():
    mask = jnp.array([[True, True, False], [True, False, False]])
    equal = jnp.full((2, 3), 0.1)
    for epsilon in (0.0, 1e-8):
        assert np.all(np.asarray(_whiten(equal, mask, epsilon=epsilon)) == 0)
        assert np.all(np.asarray(_whiten(equal, mask & False, epsilon=epsilon)) == 0)
        one = mask & jnp.array([[True, False, False], [False, False, False]])
        assert np.all(np.asarray(_whiten(equal, one, epsilon=epsilon)) == 0)
        g = jax.grad(lambda x, e=epsilon: _whiten(x, mask, epsilon=e)[0, 0])(equal)
        assert np.all(np.isfinite(g))
    poisoned = jnp.where(mask, jnp.arange(6.0).reshape(2, 3), jnp.nan)
    g = jax.grad(lambda x: jnp.sum(_whiten(x, mask) ** 3))(poisoned)
    assert np.all(np.isfinite(g)) and np.all(np.asarray(g)[~np.asarray(mask)] == 0)
    assert advantages.token_whiten(jnp.zeros((2, 0)), jnp.zeros((2, 0), bool)).shape == (2, 0)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float64, TB, elements=eighths | st.just(np.nan)),
    token_values,
    token_values,
    token_masks,
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_kl_shaped_returns_against_a_loop(r, logprobs, reference_logprobs, mask, beta, gamma):
    want, last = np.zeros((TB, TT)), np.zeros((TB, TT))
    for i in np.flatnonzero(np.isfinite(r)):
        steps = np.flatnonzero(mask[i])
        carry = 0.0
        for t in steps[::-1]:
            at_end = r[i] if t == steps[-1] else 0.0
            last[i, t] = at_end
            carry = at_end - beta * (logprobs[i, t] - reference_logprobs[i, t]) + gamma * carry
            want[i, t] = carry
    off = np.where(mask, logprobs, np.nan)
    with jax.enable_x64(True):
        got = _kl_shaped(r, off, np.where(mask, reference_logprobs, -np.inf), mask, beta, gamma)
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)
        np.testing.assert_array_equal(_last(r, mask), last)


_last = jax.jit(advantages.at_last_token)
_kl_shaped = jax.jit(
    lambda r, lp, ref, m, beta, gamma: advantages.kl_shaped_returns(
        r, lp, ref, m, beta=beta, gamma=gamma
    )
)


def test_kl_shaped_returns_worked_example():
    """The first return is the reward less β times the sequence's log-ratio."""
    mask = jnp.array([[False, True, False, True, True, False]])
    logprobs = jnp.array([[9.0, -1.0, 9.0, -2.0, -0.5, 9.0]])
    other = jnp.array([[0.0, -1.5, 0.0, -1.0, -0.25, 0.0]])
    got = advantages.kl_shaped_returns(jnp.array([2.0]), logprobs, other, mask, beta=0.4)
    np.testing.assert_allclose(got, [[0, 2.3, 0, 2.5, 2.1, 0]], rtol=1e-6)
    assert got.dtype == jnp.float32
    assert advantages.at_last_token(jnp.ones(1), mask & False).tolist() == [[0] * 6]


def test_kl_shaped_returns_gradient_and_impossible_tokens():
    mask = jnp.array([[True, True, False], [True, True, True]])
    logprobs = jnp.where(mask, -1.0, jnp.nan)

    def loss(r, lp):
        return advantages.kl_shaped_returns(r, lp, -1.5 * mask, mask, beta=0.5).sum()

    r = jnp.array([jnp.nan, 1.0])
    by_reward, by_logprob = jax.grad(loss, argnums=(0, 1))(r, logprobs)
    assert by_reward.tolist() == [0, 3]
    np.testing.assert_allclose(by_logprob, [[0, 0, 0], [-0.5, -1.0, -1.5]], rtol=1e-6)
    # A token impossible under the reference: whitening leaves its row's returns out, up to there.
    reference_logprobs = jnp.where(mask, -1.5, 0.0).at[1, 1].set(-jnp.inf)
    to_go = advantages.kl_shaped_returns(
        jnp.ones(2), jnp.where(mask, -1.0, 0.0), reference_logprobs, mask, beta=0.5, gamma=0.9
    )
    assert np.isfinite(to_go).tolist() == [[True] * 3, [False, False, True]]
    white = np.asarray(advantages.token_whiten(to_go, mask))
    assert np.all(np.isfinite(white)) and white[1, 0] == white[1, 1] == 0 != white[1, 2]


def test_to_tokens():
    mask = jnp.array([[False, True, True], [True, False, False], [True, True, True]])
    got = advantages.to_tokens(jnp.array([2.0, -1.0, jnp.nan]), mask)
    assert got.tolist() == [[0, 2, 2], [-1, 0, 0], [0, 0, 0]]


# --- errors and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "ids", "options", "message"),
    [
        (np.ones((3, 2)), np.zeros(3, int), {}, r"rewards: expected rank 1, got shape \(3, 2\)"),
        (np.ones(3), np.zeros(4, int), {}, r"group_ids: expected shape \(3,\) like rewards"),
        (np.ones(3), np.zeros(3), {}, "ids: expected an integer dtype"),
        (np.ones(3, int), np.zeros(3, int), {}, "rewards: expected a floating dtype, got int"),
        (np.ones(3), np.array([0, 1, 2]), {}, r"ids: expected ids in \[0, 2\)"),
        (np.ones(3), np.zeros(3, int), {"where": np.ones(3)}, "where: expected dtype bool"),
        (np.ones(3), np.zeros(3, int), {"where": np.ones(2, bool)}, "where: expected shape"),
    ],
)
def test_errors(r, ids, options, message):
    for name in GROUPED:
        with pytest.raises(ValueError, match=message):
            getattr(advantages, name)(r, ids, num_groups=2, **options)


def test_more_errors():
    r, ids, x, mask = np.ones(3), np.zeros(3, int), np.ones((3, 2)), np.ones((3, 2), bool)
    scaled = (
        functools.partial(advantages.group_normalize, r, ids, num_groups=1),
        functools.partial(advantages.group_mean_batch_std, r, ids, num_groups=1),
        functools.partial(advantages.batch_normalize, r),
        functools.partial(advantages.token_whiten, x, mask),
    )
    for f in scaled:
        for epsilon in (-1e-6, np.nan, np.inf):
            with pytest.raises(ValueError, match="epsilon: expected a number in"):
                f(epsilon=epsilon)
        with pytest.raises(ValueError, match="ddof: expected one of 0, 1, got 2"):
            f(ddof=2)
    with pytest.raises(ValueError, match="rewards: expected rank 1"):
        advantages.batch_normalize(x)
    with pytest.raises(ValueError, match="advantages: expected rank 2"):
        advantages.token_whiten(r, mask)
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        advantages.token_whiten(x, x)
    for f, name in ((advantages.to_tokens, "advantages"), (advantages.at_last_token, "rewards")):
        with pytest.raises(ValueError, match=f"{name}: expected 3 rows like mask, got 2"):
            f(r[:2], mask)
        with pytest.raises(ValueError, match=f"{name}: expected rank 1"):
            f(x, mask)
        with pytest.raises(ValueError, match="mask: expected rank 2"):
            f(r, mask[0])
    shaped = functools.partial(advantages.kl_shaped_returns, r, mask=mask)
    with pytest.raises(ValueError, match="beta: expected a number in"):
        shaped(x, x, beta=-0.1)
    with pytest.raises(ValueError, match="gamma: expected a number in"):
        shaped(x, x, beta=0.1, gamma=1.5)
    with pytest.raises(ValueError, match="reference_logprobs: expected shape"):
        shaped(x, x[:, :1], beta=0.1)
    with pytest.raises(ValueError, match="logprobs: expected a floating dtype"):
        shaped(mask, x, beta=0.1)


EIGHT_DEVICES = """
    import functools, json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from pgjax import advantages, segments

    assert jax.device_count() == 8
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(0)
    r = rng.normal(size=64).astype(np.float32)
    r[5] = np.nan
    ids = rng.integers(0, 9, 64).astype(np.int32)  # groups spread over all devices
    where = rng.random(64) < 0.8
    mask = rng.random((64, 7)) < 0.5
    off = {}
    def compare(name, f, *arrays):
        f = jax.jit(f)
        got = f(*(jax.device_put(a, rows) for a in arrays))
        want = f(*arrays)
        off[name] = float(np.max(np.abs(np.asarray(got, float) - np.asarray(want, float))))
        return got
    for name in ("centered", "group_normalize", "leave_one_out", "group_mean_batch_std"):
        f = functools.partial(getattr(advantages, name), num_groups=9)
        got = compare(name, lambda r, i, w: f(r, i, where=w), r, ids, where)
        assert got.sharding.is_equivalent_to(rows, 1), got.sharding
    compare("batch_normalize", advantages.batch_normalize, r)
    compare("token_whiten", advantages.token_whiten, rng.normal(size=mask.shape), mask)
    compare("dense_ids", segments.dense_ids, ids * 7 - 20)
    compare("first_rows", segments.first_rows, ids)
    compare("maximum", functools.partial(segments.maximum, num_segments=9), np.nan_to_num(r), ids)
    print(json.dumps(off))
    """


def test_eight_devices():
    off = devices.run(EIGHT_DEVICES)
    assert len(off) == 9 and all(error < 2e-6 for error in off.values()), off
