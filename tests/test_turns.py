"""Turns: totals and returns, baselines per turn, rejection by turn and trajectory, profiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import advantages, masks
from pgjax.advantages.turn_level import turn_leave_one_out, turn_level
from pgjax.masks import quality
from pgjax.masks import trajectory_mismatch as mismatch
from pgjax.returns import turns
from pgjax.rewards import density, profiling

# Trajectory 7 is rows 0 and 2, its turns 0, 1 and 2, 3; trajectory 3 is row 1; -1 are observations.
TURN_IDS = np.array(
    [[-1, 0, 0, -1, 1, 1, 1], [-1, -1, 0, 1, -1, -1, -1], [2, 2, -1, -1, 3, -1, -1]]
)
TRAJECTORIES = np.array([7, 3, 7])


def by_loop(values, num_turns, *, rows, mask=None):
    out, count = np.zeros((3, num_turns)), np.zeros((3, num_turns), int)
    for b in range(3):
        for t in range(TURN_IDS.shape[1]):
            m = TURN_IDS[b, t]
            if m >= 0 and (mask is None or mask[b, t]):
                out[rows[b], m] += values[b, t]
                count[rows[b], m] += 1
    return out, count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", [False, True])
def test_totals_sizes_and_the_way_back(masked, spread):
    rng = np.random.default_rng(0)
    values = rng.normal(size=TURN_IDS.shape).astype(np.float32)
    mask = rng.random(TURN_IDS.shape) < 0.7 if masked else None
    rows, ids = ([1, 0, 1], TRAJECTORIES) if spread else ([0, 1, 2], None)
    want, count = by_loop(values, 4, rows=rows, mask=mask)
    poisoned = np.where((TURN_IDS >= 0) & (mask if masked else True), values, np.nan)
    options = {"num_turns": 4, "trajectory_ids": ids, "mask": mask}
    for compiled in (False, True):
        total, size = turns.turn_totals, turns.turn_sizes
        if compiled:
            total = jax.jit(total, static_argnames="num_turns")
            size = jax.jit(size, static_argnames="num_turns")
        np.testing.assert_allclose(total(poisoned, TURN_IDS, **options), want, atol=1e-6)
        np.testing.assert_array_equal(size(TURN_IDS, **options), count)
    back = np.asarray(turns.at_turns(jnp.asarray(want), TURN_IDS, trajectory_ids=ids))
    for b, t in np.ndindex(TURN_IDS.shape):
        m = TURN_IDS[b, t]
        assert back[b, t] == pytest.approx(0.0 if m < 0 else want[rows[b], m], abs=1e-6)


def test_turn_ids_beyond_the_grid_raise_or_show():
    values = jnp.ones(TURN_IDS.shape)
    with pytest.raises(ValueError, match=r"turn_ids: expected ids in \[-1, 3\)"):
        turns.turn_totals(values, TURN_IDS, num_turns=3)
    total = jax.jit(lambda ids: turns.turn_totals(values, ids, num_turns=3))(TURN_IDS)
    np.testing.assert_array_equal(total, [[2, 3, 0], [1, 1, 0], [0, 0, 2]])
    back = np.asarray(jax.jit(lambda ids: turns.at_turns(total, ids))(TURN_IDS))
    np.testing.assert_array_equal(np.isnan(back), TURN_IDS == 3)


def test_turn_returns_by_hand_and_by_loop():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(2, 5, 4))
    valid = np.arange(4) < rng.integers(0, 5, (2, 5, 1))
    for gamma in (0.0, 0.7, 1.0):
        want = np.zeros_like(rewards)
        for m in reversed(range(4)):
            later = want[..., m + 1] if m < 3 else 0.0
            want[..., m] = np.where(valid[..., m], rewards[..., m] + gamma * later, 0.0)
        found = turns.turn_returns(rewards.astype(np.float32), valid, gamma=gamma)
        np.testing.assert_allclose(found, want, atol=1e-5)


def test_holes_are_cut_out_where_they_are_allowed():
    rewards, valid = jnp.array([1.0, 100.0, 2.0]), np.array([True, False, True])
    with pytest.raises(ValueError, match="valid: expected no invalid turn before a valid one"):
        turns.turn_returns(rewards, valid)
    found = turns.turn_returns(rewards, valid, gamma=0.5, allow_holes=True)
    np.testing.assert_allclose(found, [2.0, 0.0, 2.0])


def test_a_failed_reward_takes_out_its_turn_and_those_before():
    rewards = jnp.array([[1.0, jnp.nan, 3.0], [1.0, 1.0, jnp.inf]])
    valid = np.array([[True] * 3, [True, True, False]])
    found = turns.turn_returns(rewards, valid)
    np.testing.assert_array_equal(found, [[np.nan, np.nan, 3.0], [2.0, 1.0, 0.0]])
    advantage = turn_leave_one_out(found, jnp.zeros(2, int), valid, num_groups=1)
    np.testing.assert_array_equal(advantage, [[0.0, 0.0, 3.0], [2.0, 1.0, 0.0]])


def test_turn_baselines_by_hand():
    one = turn_leave_one_out(
        jnp.array([[3.0], [1.0]]), jnp.zeros(2, int), jnp.ones((2, 1), bool), num_groups=1
    )
    np.testing.assert_allclose(one[:, 0], [2.0, -2.0])
    three = turn_leave_one_out(
        jnp.array([[1.0], [2.0], [6.0]]), jnp.zeros(3, int), jnp.ones((3, 1), bool), num_groups=1
    )
    np.testing.assert_allclose(three[:, 0], [-3.0, -1.5, 4.5])


@pytest.mark.parametrize("function", [advantages.leave_one_out, advantages.centered])
def test_turns_against_a_loop(function):
    rng = np.random.default_rng(2)
    groups, valid = rng.integers(0, 3, 12), np.arange(4) < rng.integers(1, 5, (12, 1))
    values = rng.normal(size=(12, 4)).astype(np.float32)
    found = np.asarray(turn_level(function, values, groups, valid, num_groups=3))
    for i, m in np.ndindex(values.shape):
        peers = [j for j in range(12) if groups[j] == groups[i] and valid[j, m]]
        if not valid[i, m]:
            want = 0.0
        elif function is advantages.centered:
            want = values[i, m] - np.mean(values[peers, m])
        else:
            others = [values[j, m] for j in peers if j != i]
            want = values[i, m] - (np.mean(others) if others else 0.0)
        assert found[i, m] == pytest.approx(want, abs=1e-5)


def test_one_turn_is_rloo():
    rng = np.random.default_rng(3)
    rewards = rng.normal(size=10).astype(np.float32)
    groups = rng.integers(0, 3, 10)
    found = turn_leave_one_out(rewards[:, None], groups, np.ones((10, 1), bool), num_groups=3)
    want = advantages.leave_one_out(rewards, groups, num_groups=3)
    np.testing.assert_allclose(found[:, 0], want, atol=1e-6)


def sides(seed=4, scale=0.01):
    rng = np.random.default_rng(seed)
    mask = TURN_IDS >= 0
    behavior = np.where(mask, -rng.random(mask.shape), 0.0).astype(np.float32)
    proximal = np.where(mask, behavior + scale * rng.normal(size=mask.shape), 0.0)
    return proximal.astype(np.float32), behavior, mask


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_trajectories_are_judged_by_all_their_rows(scale):
    proximal, behavior, mask = sides(scale=scale)
    bounds = {"low": 0.999, "high": 1.001}
    kept = mismatch.trajectory_geometric_mismatch(proximal, behavior, mask, TRAJECTORIES, **bounds)
    whole = mismatch.trajectory_sequence_mismatch(proximal, behavior, mask, TRAJECTORIES, **bounds)
    for rows in ([0, 2], [1]):
        ratio = (proximal - behavior)[rows][mask[rows]]
        for found, statistic in ((kept, ratio.mean()), (whole, ratio.sum())):
            want = 0.999 <= np.exp(statistic) <= 1.001
            np.testing.assert_array_equal(found[np.array(rows)], want)
    alone = np.arange(3)
    np.testing.assert_array_equal(
        mismatch.trajectory_geometric_mismatch(proximal, behavior, mask, alone),
        masks.geometric_mismatch(proximal, behavior, mask),
    )


def test_turns_are_judged_by_themselves():
    proximal, behavior, mask = sides()
    options = {"num_turns": 4, "low": 0.995, "high": 1.005}
    mean = mismatch.turn_geometric_mismatch(proximal, behavior, mask, TURN_IDS, **options)
    total = mismatch.turn_sequence_mismatch(proximal, behavior, mask, TURN_IDS, **options)
    seen = set()
    for b in range(3):
        for m in range(4):
            tokens = TURN_IDS[b] == m
            if tokens.any():
                ratio = (proximal - behavior)[b, tokens]
                for found, statistic in ((mean, ratio.mean()), (total, ratio.sum())):
                    want = 0.995 <= np.exp(statistic) <= 1.005
                    seen.add(bool(want))
                    assert np.all(np.asarray(found)[b, tokens] == want)
    assert seen == {True, False}
    assert np.asarray(mean)[TURN_IDS < 0].all()
    one_turn = np.where(mask, 0, -1)
    np.testing.assert_array_equal(
        np.asarray(
            mismatch.turn_geometric_mismatch(proximal, behavior, mask, one_turn, num_turns=1)
        )[mask],
        np.asarray(masks.geometric_mismatch(proximal, behavior, mask))[mask],
    )


def test_the_geometric_statistic_does_not_depend_on_length():
    behavior, mask = np.full((2, 5), -1.0, np.float32), np.ones((2, 5), bool)
    proximal = behavior + np.array([[8e-4], [1.5e-3]], np.float32)
    ids = np.arange(2)
    for function, change in (
        (mismatch.trajectory_geometric_mismatch, False),
        (mismatch.trajectory_sequence_mismatch, True),
    ):
        bounds = {"low": 0.995, "high": 1.005} if change else {}
        once = function(proximal, behavior, mask, ids, **bounds)
        twice = function(*(np.repeat(x, 2, 1) for x in (proximal, behavior, mask)), ids, **bounds)
        assert bool(np.any(np.asarray(once)[:, 0] != np.asarray(twice)[:, 0])) == change
    kept = mismatch.trajectory_geometric_mismatch(proximal, behavior, mask, ids)
    np.testing.assert_array_equal(kept[:, 0], [True, False])


def test_veto_of_rows_and_of_trajectories():
    proximal, behavior, mask = sides()
    proximal[0, 4] = behavior[0, 4] + np.log(5e-5)
    row = masks.veto(proximal, behavior, mask)
    whole = mismatch.trajectory_veto(proximal, behavior, mask, TRAJECTORIES)
    np.testing.assert_array_equal(row[:, 0], [False, True, True])
    np.testing.assert_array_equal(whole[:, 0], [False, True, False])


def test_broken_log_probs_reject_their_own_trajectory_only():
    proximal, behavior, mask = sides(scale=1e-5)
    for value in (np.nan, -np.inf):
        broken = proximal.copy()
        broken[2, 0] = value
        kept = mismatch.trajectory_geometric_mismatch(broken, behavior, mask, TRAJECTORIES)
        np.testing.assert_array_equal(kept[:, 0], [False, True, False])
        off = proximal.copy()
        off[1, 0] = value  # not on the mask
        assert mismatch.trajectory_geometric_mismatch(off, behavior, mask, TRAJECTORIES).all()


def test_keep_probability():
    coverage = jnp.array([0.25, 0.35, 0.45, 0.25, np.nan, np.nan])
    correct = np.array([True, True, True, False, True, False])
    found = quality.coverage_keep_probability(coverage, correct)
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 1.0, 0.0, 1.0], atol=1e-6)
    hard = quality.coverage_keep_probability(
        jnp.array([0.29, 0.3, 0.31]), np.ones(3, bool), width=0.0
    )
    np.testing.assert_array_equal(hard, [0.0, 1.0, 1.0])
    fast = quality.coverage_keep_probability(
        coverage[:3], correct[:3], speedup=jnp.array([1.3, 1.0, 1.3]), min_speedup=1.2
    )
    np.testing.assert_allclose(fast, [1.0, 0.5, 1.0], atol=1e-6)


def test_draws_have_their_probability():
    probability = jnp.repeat(jnp.array([0.0, 0.3, 1.0, jnp.nan]), 20_000)
    drawn = np.asarray(quality.bernoulli_mask(jax.random.key(0), probability)).reshape(4, -1)
    np.testing.assert_array_equal(drawn[[0, 2, 3]].mean(1), [0.0, 1.0, 0.0])
    assert abs(drawn[1].mean() - 0.3) < 4 * np.sqrt(0.21 / 20_000)
    again = quality.bernoulli_mask(jax.random.key(0), probability)
    np.testing.assert_array_equal(again.reshape(4, -1), drawn)


def test_geometric_coverage():
    coverage = jnp.array([[0.2, 0.8, 0.9], [0.5, 0.0, 0.1], [0.3, 0.3, 0.3]])
    valid = np.array([[True, True, False], [True, True, True], [False] * 3])
    np.testing.assert_allclose(quality.geometric_coverage(coverage, valid), [0.4, 0.0, 0.0])


def test_profiling_reward():
    correct = np.array([True, True, False, True, True])
    speedup = jnp.array([5.0, -1.0, np.nan, np.nan, 2.0])
    coverage = jnp.array([0.4, 0.0, np.nan, 0.1, 1.0])
    decoy = np.array([False, False, False, False, True])
    found = profiling.profiling_reward(correct, speedup, coverage, decoy=decoy)
    np.testing.assert_allclose(found, [2.2, 0.5, 0.0, np.nan, 0.0], rtol=1e-6)
    times = profiling.time_coverage(jnp.array([1.0, 0.0, 3.0]), jnp.array([4.0, 0.0, 2.0]))
    np.testing.assert_array_equal(times, [0.25, 0.0, 1.0])


def test_densities_keep_the_total():
    rng = np.random.default_rng(5)
    rewards = rng.random((6, 7)).astype(np.float32)
    valid = np.arange(7) < rng.integers(0, 8, (6, 1))
    rewards = np.where(valid, rewards, np.nan)
    total = np.where(valid, rewards, 0).sum(-1)
    np.testing.assert_array_equal(
        density.sparsify(rewards, valid, every=1), np.where(valid, rewards, 0.0)
    )
    for every in (2, 3, 50):
        paid = np.asarray(density.sparsify(rewards, valid, every=every))
        np.testing.assert_allclose(paid.sum(-1), total, rtol=1e-6)
        for row, length in zip(paid, valid.sum(-1), strict=True):
            pays = {i for i in range(length) if (i + 1) % every == 0} | {length - 1}
            assert set(np.flatnonzero(row)) <= pays
    last = np.asarray(density.only_complete(rewards, valid, goal=2.0))
    np.testing.assert_allclose(last.sum(-1), np.where(total >= 2.0, total, 0.0), rtol=1e-6)
    assert 0 < np.count_nonzero(last) < 6


def test_errors():
    proximal, behavior, mask = sides()
    with pytest.raises(ValueError, match="high: expected a number"):
        mismatch.trajectory_geometric_mismatch(
            proximal, behavior, mask, TRAJECTORIES, low=1.0, high=1.0
        )
    with pytest.raises(ValueError, match="low: expected a number"):
        mismatch.turn_sequence_mismatch(proximal, behavior, mask, TURN_IDS, num_turns=4, low=0.0)
    with pytest.raises(ValueError, match="threshold"):
        mismatch.trajectory_veto(proximal, behavior, mask, TRAJECTORIES, threshold=0.0)
    with pytest.raises(ValueError, match="trajectory_ids: expected 3 ids"):
        mismatch.trajectory_veto(proximal, behavior, mask, TRAJECTORIES[:2])
    with pytest.raises(ValueError, match=r"trajectory_ids: expected shape \(3,\)"):
        turns.turn_totals(proximal, TURN_IDS, num_turns=4, trajectory_ids=TRAJECTORIES[:2])
    with pytest.raises(ValueError, match="num_turns: expected at least 1"):
        turns.turn_sizes(TURN_IDS, num_turns=0)
    with pytest.raises(ValueError, match="grid: expected 3 rows"):
        turns.at_turns(jnp.zeros((2, 4)), TURN_IDS)
    with pytest.raises(ValueError, match="gamma"):
        turns.turn_returns(jnp.ones(2), np.ones(2, bool), gamma=1.1)
    with pytest.raises(ValueError, match="group_ids: expected 2 ids"):
        turn_leave_one_out(jnp.ones((2, 1)), np.zeros(3, int), np.ones((2, 1), bool), num_groups=1)
    with pytest.raises(ValueError, match="coverage: expected values in"):
        quality.coverage_keep_probability(jnp.array([1.2]), np.array([True]))
    with pytest.raises(ValueError, match="speedup and min_speedup"):
        quality.coverage_keep_probability(jnp.array([0.2]), np.array([True]), min_speedup=1.0)
    with pytest.raises(ValueError, match="probability: expected values in"):
        quality.bernoulli_mask(jax.random.key(0), jnp.array([-0.1]))
    with pytest.raises(ValueError, match="speedup_cap"):
        profiling.profiling_reward(np.ones(1, bool), jnp.ones(1), jnp.ones(1), speedup_cap=-1.0)
    with pytest.raises(ValueError, match="every: expected at least 1"):
        density.sparsify(jnp.ones(2), np.ones(2, bool), every=0)
