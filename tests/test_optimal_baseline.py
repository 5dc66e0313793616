"""Baselines of least variance: closed forms, loops in NumPy, exact enumeration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pgjax import advantages, diagnostics, objectives
from pgjax.advantages import optimal_baseline as ob
from pgjax.objectives import baselines


def loop(rewards, weights, ids, *, leave_out):
    """By hand, in float64: weighted mean of the group with or without the row itself."""
    found = np.zeros(len(rewards))
    for i in range(len(rewards)):
        rows = [
            j
            for j in range(len(rewards))
            if ids[j] == ids[i] and np.isfinite(rewards[j]) and not (leave_out and j == i)
        ]
        w = np.array([weights[j] for j in rows], np.float64)
        r = np.array([rewards[j] for j in rows], np.float64)
        baseline = 0.0
        if len(r):
            baseline = np.average(r, weights=w if w.sum() else None)
        found[i] = rewards[i] - baseline if np.isfinite(rewards[i]) else 0.0
    return found


@pytest.mark.parametrize("leave_out", [False, True])
def test_equal_to_a_loop(leave_out):
    rng = np.random.default_rng(0)
    function = ob.weighted_leave_one_out if leave_out else ob.weighted_centered
    ids = np.array([3, 0, 0, 1, 3, 0, 1, 3, 2, 0, 4, 4])
    rewards = rng.normal(size=12).astype(np.float32)
    rewards[5] = np.nan
    weights = rng.exponential(size=12).astype(np.float32)
    weights[10:] = 0.0
    found = function(rewards, weights, ids, num_groups=6)
    np.testing.assert_allclose(
        found, loop(rewards, weights, ids, leave_out=leave_out), rtol=1e-5, atol=1e-6
    )
    # A group of one: the baseline is empty, or the sample itself.
    assert float(found[8]) == (pytest.approx(rewards[8]) if leave_out else 0.0)
    order = rng.permutation(12)
    shuffled = jax.jit(lambda r, w, i: function(r, w, i, num_groups=6))(
        rewards[order], weights[order], ids[order]
    )
    np.testing.assert_allclose(shuffled, found[order], rtol=1e-5, atol=1e-6)


def test_one_weight_above_all_others_does_not_hide_them():
    """Taking it off the total would leave nothing of the others in float32."""
    rewards = np.array([1.0, 0.0, 1.0, 0.0], np.float32)
    weights = np.array([2.0, 3e-9, 1e-9, 4e-9], np.float32)
    found = ob.weighted_leave_one_out(rewards, weights, np.zeros(4, int), num_groups=1)
    np.testing.assert_allclose(found[0], 1.0 - 1 / 8, rtol=1e-6)
    tiny = ob.weighted_leave_one_out(rewards, weights * 1e-25, np.zeros(4, int), num_groups=1)
    np.testing.assert_allclose(tiny, found, rtol=1e-5)


def test_equal_weights_are_the_plain_baselines():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 4, 20)
    rewards = rng.normal(size=20).astype(np.float32)
    weights = np.full(20, 0.3, np.float32)
    for ours, plain in (
        (ob.weighted_leave_one_out, advantages.leave_one_out),
        (ob.weighted_centered, advantages.centered),
    ):
        np.testing.assert_allclose(
            ours(rewards, weights, ids, num_groups=4),
            plain(rewards, ids, num_groups=4),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("function", [ob.weighted_leave_one_out, ob.weighted_centered])
def test_equal_rewards_are_exactly_zero(function):
    weights = np.random.default_rng(2).exponential(size=6).astype(np.float32)
    found = function(np.full(6, 0.7, np.float32), weights, np.zeros(6, int), num_groups=1)
    np.testing.assert_array_equal(found, 0.0)


def test_proxy_is_the_squared_score_of_a_token():
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.ones(5), size=(3, 4))
    tokens = rng.integers(0, 5, (3, 4))
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    logprobs = np.log(np.take_along_axis(p, tokens[..., None], -1)[..., 0])
    want = ((np.eye(5)[tokens] - p) ** 2).sum(-1)
    found = ob.token_score_norms(logprobs, (p**2).sum(-1), mask)
    np.testing.assert_allclose(found, np.where(mask, want, 0.0), rtol=1e-5)
    sums = ob.score_norm_proxy(logprobs, (p**2).sum(-1), mask)
    np.testing.assert_allclose(sums, np.where(mask, want, 0.0).sum(-1), rtol=1e-5)
    ratio = rng.uniform(0.5, 2.0, (3, 4))
    weighted = ob.score_norm_proxy(logprobs, (p**2).sum(-1), mask, importance_weights=ratio)
    np.testing.assert_allclose(weighted, np.where(mask, want * ratio**2, 0).sum(-1), rtol=1e-5)


def test_proxy_is_the_gradient_of_the_logits():
    logits = jnp.array([0.4, -1.0, 2.0])
    scores = jax.vmap(jax.grad(lambda z, y: jax.nn.log_softmax(z)[y]), (None, 0))(
        logits, jnp.arange(3)
    )
    logprobs = jax.nn.log_softmax(logits)[:, None]
    square = jnp.full((3, 1), jnp.sum(jax.nn.softmax(logits) ** 2))
    found = ob.score_norm_proxy(logprobs, square, jnp.ones((3, 1), bool))
    np.testing.assert_allclose(found, jnp.sum(scores**2, -1), rtol=1e-5)


def variance(policy, rewards, baseline):
    """Trace of the covariance of one draw's `(R - b) ∇ log π`, by summing over the arms."""
    scores = np.eye(len(policy)) - policy
    draws = (rewards - baseline)[:, None] * scores
    mean = policy @ draws
    return policy @ (draws**2).sum(-1) - mean @ mean


@pytest.mark.parametrize("seed", range(5))
def test_optimal_baseline_has_the_least_variance(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=6) * 2.0
    policy = np.exp(logits) / np.exp(logits).sum()
    rewards = rng.uniform(size=6)
    # The expectations as a weighted mean over the arms: weights π w.
    norms = np.asarray(
        ob.score_norm_proxy(
            np.log(policy)[:, None], np.full((6, 1), (policy**2).sum()), np.ones((6, 1), bool)
        )
    )
    centered = ob.weighted_centered(rewards, policy * norms, np.zeros(6, int), num_groups=1)
    best = float(rewards[0] - centered[0])
    grid = np.linspace(-0.5, 1.5, 2001)
    found = [variance(policy, rewards, b) for b in grid]
    assert abs(best - grid[int(np.argmin(found))]) <= 1e-3
    least = variance(policy, rewards, best)
    assert least < variance(policy, rewards, policy @ rewards) - 1e-6
    assert least < variance(policy, rewards, 0.0) - 1e-6


REWARDS = jnp.array([[0.0, 1.0, 0.4]])
LOGITS = jnp.array([[1.5, -0.5, 0.2]])


def without_old(objective):
    """The policy of the bandit put in, which enumeration of batches does not fill."""

    def advantage(rollout):
        logprobs = jax.nn.log_softmax(LOGITS)[0]
        old = objectives.objective.PolicyOutputs(
            logprobs=jnp.where(rollout.mask, logprobs[rollout.tokens], 0.0),
            square_sum=jnp.where(rollout.mask, jnp.sum(jnp.exp(logprobs) ** 2), 0.0),
        )
        return objective.advantage(rollout.replace(old=old))

    return dataclasses.replace(objective, advantage=advantage, old_needs=frozenset())


@pytest.mark.parametrize("group_size", [2, 4])
def test_leaving_out_the_sample_is_unbiased(group_size):
    found = diagnostics.expected_gradient(
        without_old(baselines.oblr()), LOGITS, REWARDS, group_size=group_size
    )
    want = diagnostics.policy_gradient(LOGITS, REWARDS)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_the_sample_in_its_own_baseline_is_biased():
    objective = baselines.oblr()

    def with_itself(rollout):
        rows = rollout.rewards.shape[0]
        weights = baselines.score_norms(rollout)
        return ob.weighted_centered(rollout.rewards, weights, rollout.group_ids, num_groups=rows)

    biased = without_old(dataclasses.replace(objective, advantage=with_itself))
    found = diagnostics.expected_gradient(biased, LOGITS, REWARDS, group_size=3)
    want = np.asarray(diagnostics.policy_gradient(LOGITS, REWARDS))
    # It points the same way, but is shorter, and by more than the plain mean's 1 - 1/3.
    assert np.sum(found * want) < 0.66 * np.sum(want * want)
    assert np.sum(found * want) > 0


def test_per_token_is_one_baseline_per_column():
    rng = np.random.default_rng(5)
    rewards = rng.normal(size=(6, 4)).astype(np.float32)
    weights = np.cumsum(rng.exponential(size=(6, 4)), -1).astype(np.float32)
    lengths, ids = np.array([4, 2, 3, 1, 4, 4]), np.array([0, 0, 0, 1, 1, 1])
    mask = np.arange(4) < lengths[:, None]
    found = jax.jit(
        lambda r, w, m: ob.token_weighted_leave_one_out(r, w, ids, num_groups=2, mask=m)
    )(rewards, weights, mask)
    for t in range(4):
        rows = np.flatnonzero(mask[:, t])
        want = loop(rewards[rows, t], weights[rows, t], ids[rows], leave_out=True)
        np.testing.assert_allclose(found[rows, t], want, rtol=1e-5, atol=1e-6)
    assert not np.asarray(found)[~mask].any()


def test_history_is_two_fading_sums():
    rng = np.random.default_rng(6)
    history = ob.history_init(3)
    top, bottom = np.zeros(3), np.zeros(3)
    for step in range(4):
        ids = np.array([0, 0, 2, 2, 2]) if step % 2 else np.array([0, 0, 0, 0, 0])
        rewards = rng.uniform(size=5).astype(np.float32)
        weights = rng.exponential(size=5).astype(np.float32)
        rewards[4] = np.nan
        history = ob.history_update(history, ids, rewards, weights, decay=0.7)
        for p in set(ids):
            rows = (ids == p) & np.isfinite(rewards)
            top[p] = 0.7 * top[p] + (weights * rewards)[rows].sum()
            bottom[p] = 0.7 * bottom[p] + weights[rows].sum()
    np.testing.assert_allclose(history.weighted_reward, top, rtol=1e-5)
    np.testing.assert_allclose(history.weight, bottom, rtol=1e-5)
    found = ob.history_baseline(
        history, np.array([2, 1, 0]), otherwise=np.array([9.0, 8.0, 7.0], np.float32)
    )
    np.testing.assert_allclose(found, [top[2] / bottom[2], 8.0, top[0] / bottom[0]], rtol=1e-5)


def test_rows_that_do_not_count_and_weights_that_are_not_finite():
    rewards = np.array([1.0, 0.0, 0.5, 0.25], np.float32)
    weights = np.array([1.0, 3.0, np.inf, 2.0], np.float32)
    where = np.array([True, True, True, False])
    found = ob.weighted_leave_one_out(rewards, weights, np.zeros(4, int), num_groups=1, where=where)
    np.testing.assert_allclose(found, [1.0, -1.0, 0.25, 0.0])


def test_ids_out_of_range_stay_visible():
    def run(ids):
        return ob.weighted_leave_one_out(jnp.array([1.0, 2.0, 4.0]), jnp.ones(3), ids, num_groups=2)

    found = jax.jit(run)(jnp.array([0, 0, 7]))
    np.testing.assert_allclose(found[:2], [-1.0, 1.0])
    assert np.isnan(found[2])
    error, _ = checkify.checkify(jax.jit(run), errors=checkify.user_checks)(jnp.array([0, 0, 7]))
    assert "expected ids in [0, 2)" in error.get()


def test_bad_input():
    ones, ids = np.ones(3, np.float32), np.zeros(3, int)
    for function in (ob.weighted_centered, ob.weighted_leave_one_out):
        with pytest.raises(ValueError, match="weights: expected numbers ≥ 0, got -1"):
            function(ones, np.array([1, -1, 1], np.float32), ids, num_groups=1)
        with pytest.raises(ValueError, match="weights: expected shape"):
            function(ones, ones[:2], ids, num_groups=1)
        with pytest.raises(ValueError, match="ids in"):
            function(ones, ones, ids + 2, num_groups=1)
    row, mask = np.full((1, 2), -0.5, np.float32), np.ones((1, 2), bool)
    for wrong in (-0.1, 1.2):
        with pytest.raises(ValueError, match=r"square_sum: expected numbers in \[0, 1\]"):
            ob.score_norm_proxy(row, np.full((1, 2), wrong, np.float32), mask)
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        ob.score_norm_proxy(row, row + 1, row)
    history = ob.history_init(2)
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match="decay"):
            ob.history_update(history, ids, ones, ones, decay=decay)
    with pytest.raises(ValueError, match="num_prompts"):
        ob.history_init(0)
    with pytest.raises(ValueError, match="weights: expected numbers ≥ 0"):
        ob.token_weighted_leave_one_out(row, row, ids[:1], num_groups=1, mask=mask)
