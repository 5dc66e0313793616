"""Recipes for episodes of several turns."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from experiments import trloo_bias
from pgjax import advantages, objectives
from pgjax.diagnostics import problems
from pgjax.objectives import agentic

PARAMS = np.array([[0.3, -0.2, 0.1], [0.5, 0.1, -0.4], [-0.3, 0.2, 0.6]])
REWARDS = np.array([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0], [0.7, -0.2, 0.4]])


def rollout_of_turns(seed=0, rows=6, length=9):
    """Rows of two or three turns of one to three tokens, in groups of two or four."""
    rng = np.random.default_rng(seed)
    ids = np.full((rows, length), -1, np.int32)
    for b in range(rows):
        start = 1
        for m in range(rng.integers(1, 4)):
            stop = start + rng.integers(1, 3)
            ids[b, start:stop] = m
            start = stop + rng.integers(0, 2)
    mask = ids >= 0
    behavior = np.where(mask, -rng.random(ids.shape), 0.0).astype(np.float32)
    return pg.Rollout(
        tokens=jnp.zeros(ids.shape, jnp.int32),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(behavior),
        proximal_logprobs=jnp.asarray(behavior),
        rewards=jnp.asarray(np.where(mask, rng.normal(size=ids.shape), 0.0), jnp.float32),
        group_ids=jnp.array([4, 9, 4, 9, 9, 9]),
        turn_ids=jnp.asarray(ids),
        old=pg.PolicyOutputs(
            logprobs=jnp.asarray(behavior),
            entropy=jnp.asarray(np.where(mask, rng.random(ids.shape), 0.0), jnp.float32),
        ),
    )


def turn_table(rollout, gamma=1.0):
    """Returns to go by (row, turn), in a loop."""
    ids, rewards = np.asarray(rollout.turn_ids), np.asarray(rollout.rewards)
    table = {}
    for b in range(len(ids)):
        to_go = 0.0
        for m in reversed(range(ids[b].max() + 1)):
            to_go = rewards[b, ids[b] == m].sum() + gamma * to_go
            table[b, m] = to_go
    return table


def gradient_of(objective, prepared):
    def loss(logprobs):
        return objective.value(pg.PolicyOutputs(logprobs=logprobs), prepared)

    return jax.value_and_grad(loss)(prepared.behavior_logprobs)


@pytest.mark.parametrize("size", [1, 3])
def test_trloo_has_the_policy_gradient_however_few_reach_a_turn(size):
    with jax.enable_x64(True):
        params, rewards = jnp.asarray(PARAMS), jnp.asarray(REWARDS)
        task = trloo_bias.problem(rewards)
        true = jax.grad(lambda p: problems.expected_reward(task, p))(params)
        objective = agentic.trloo(turn_ids=trloo_bias.turn_ids, num_turns=trloo_bias.TURNS)
        found = trloo_bias.expected_gradient(objective, params, rewards, group_size=size)
        np.testing.assert_allclose(found, true, atol=1e-9)


def test_with_the_sample_in_its_baseline_later_turns_shrink():
    with jax.enable_x64(True):
        params, rewards = jnp.asarray(PARAMS), jnp.asarray(REWARDS)
        task = trloo_bias.problem(rewards)
        true = np.asarray(jax.grad(lambda p: problems.expected_reward(task, p))(params))
        objective = trloo_bias.objective(advantages.centered)
        found = trloo_bias.expected_gradient(objective, params, rewards, group_size=3)
    go_on = np.asarray(jax.nn.softmax(PARAMS))[:, trloo_bias.GO_ON]
    reach = np.cumprod([1.0, go_on[0], go_on[1]])
    factor = [
        sum(math.comb(2, k) * p**k * (1 - p) ** (2 - k) * (1 - 1 / (1 + k)) for k in range(3))
        for p in reach
    ]
    np.testing.assert_allclose(trloo_bias.shrinkage(reach, 3), factor, rtol=1e-6)
    np.testing.assert_allclose(found, np.array(factor)[:, None] * true, atol=1e-6)


def test_the_enumeration_counts_every_order_of_a_group():
    with jax.enable_x64(True):
        params, rewards = jnp.asarray(PARAMS), jnp.asarray(REWARDS)
        task = trloo_bias.problem(rewards)
        rows = jnp.asarray(problems.all_sequences(task))
        chance = np.exp(problems.log_probability(task, params, rows))
        objective = trloo_bias.objective(advantages.centered)

        def gradient(group):
            rollout = problems.rollout_of(task, rows[group], params)
            prepared = objective.prepare(rollout)
            return -jax.grad(
                lambda p: objective.value(
                    problems.outputs(task, p, prepared, frozenset()), prepared
                )
            )(params)

        groups = np.array(list(itertools.product(range(len(rows)), repeat=2)))
        each = jax.jit(jax.vmap(gradient))(groups)
        want = np.tensordot(chance[groups].prod(1), each, axes=1)
        found = trloo_bias.expected_gradient(objective, params, rewards, group_size=2)
        np.testing.assert_allclose(found, want, atol=1e-12)


def test_trloo_advantages_by_loop():
    rollout, gamma = rollout_of_turns(), 0.5
    prepared = agentic.trloo(gamma=gamma).prepare(rollout)
    table, groups = turn_table(rollout, gamma), np.asarray(rollout.group_ids)
    ids = np.asarray(rollout.turn_ids)
    for b, t in np.ndindex(ids.shape):
        m, want = ids[b, t], 0.0
        if m >= 0:
            others = [
                v for (i, n), v in table.items() if n == m and i != b and groups[i] == groups[b]
            ]
            want = table[b, m] - (np.mean(others) if others else 0.0)
        assert float(prepared.advantages[b, t]) == pytest.approx(want, abs=1e-5)
    small = agentic.trloo(gamma=gamma, num_turns=3).prepare(rollout)
    np.testing.assert_allclose(small.advantages, prepared.advantages, atol=1e-6)


def test_a_trajectory_in_several_rows_is_one_sample():
    whole = rollout_of_turns()
    ids = np.asarray(whole.turn_ids)
    # Each trajectory's first turn in one row, what follows in another; order of rows shuffled.
    order = np.random.default_rng(0).permutation(12)

    def split(x):
        return jnp.asarray(np.concatenate([x, x])[order])

    later = jnp.asarray(np.repeat([False, True], [6, 6])[order])[:, None]
    part = jnp.where(later, split(ids) > 0, split(ids) == 0)
    rows = whole.replace(
        tokens=split(whole.tokens),
        mask=part,
        behavior_logprobs=jnp.where(part, split(whole.behavior_logprobs), 0.0),
        proximal_logprobs=None,
        rewards=jnp.where(part, split(whole.rewards), 0.0),
        group_ids=split(whole.group_ids),
        turn_ids=jnp.where(part, split(ids), -1),
        trajectory_ids=split(np.array([30, 5, 17, 2, 80, 41])),
        old=pg.PolicyOutputs(
            logprobs=whole.old.logprobs,
            entropy=jnp.where(part, split(whole.old.entropy), 0.0),
        ),
    )
    for objective in (
        agentic.trloo(),
        agentic.with_entropy_modulation(agentic.trloo()),
        agentic.with_total_rewards(agentic.empg(weigh_tokens=True)),
    ):
        want = objective.prepare(whole)
        found = objective.prepare(rows)
        spread = np.where(part, split(want.advantages), 0.0)
        np.testing.assert_allclose(
            np.where(part, found.advantages, 0.0), spread, atol=1e-5, err_msg=str(objective)
        )


def test_one_reward_a_trajectory_is_that_of_its_last_turn():
    rollout = rollout_of_turns()
    total = rollout.rewards.sum(-1)
    last = np.asarray(rollout.turn_ids).max(1)
    at_end = np.zeros(rollout.mask.shape, np.float32)
    for b in range(6):
        at_end[b, np.flatnonzero(np.asarray(rollout.turn_ids)[b] == last[b])[0]] = total[b]
    one = agentic.trloo(gamma=0.9).prepare(rollout.replace(rewards=total))
    each = agentic.trloo(gamma=0.9).prepare(rollout.replace(rewards=jnp.asarray(at_end)))
    np.testing.assert_allclose(one.advantages, each.advantages, atol=1e-6)


def test_single_turns_are_rloo():
    rollout = rollout_of_turns()
    rollout = rollout.replace(
        turn_ids=jnp.where(rollout.mask, 0, -1), rewards=rollout.rewards.sum(-1)
    )
    trloo, rloo = agentic.trloo(), objectives.rloo()
    prepared, want = trloo.prepare(rollout), rloo.prepare(rollout)
    np.testing.assert_allclose(
        prepared.advantages, np.where(rollout.mask, want.advantages[:, None], 0.0), atol=1e-6
    )
    found = gradient_of(trloo, prepared)[1]
    np.testing.assert_allclose(found, gradient_of(rloo, want)[1], atol=1e-6)


def test_rejection_drops_trajectories_and_broken_rows():
    rollout = rollout_of_turns()
    proximal = rollout.behavior_logprobs.at[1].add(0.01 * rollout.mask[1])
    broken = proximal.at[3, 1].set(rollout.behavior_logprobs[3, 1] - 10.0)
    balance = np.flatnonzero(rollout.mask[3])[1]
    broken = broken.at[3, balance].add(10.0)
    objective = agentic.with_mismatch_rejection(agentic.trloo())
    assert objective.needs == {"proximal_logprobs"}
    prepared = objective.prepare(rollout.replace(proximal_logprobs=broken))
    kept = np.array([True, False, True, False, True, True])[:, None]
    np.testing.assert_array_equal(prepared.mask, np.asarray(rollout.mask) & kept)
    free = agentic.with_mismatch_rejection(agentic.trloo(), veto_threshold=None)
    assert free.prepare(rollout.replace(proximal_logprobs=broken)).mask[3].any()
    joined = jnp.array([0, 1, 1, 3, 4, 5])
    both = objective.prepare(rollout.replace(proximal_logprobs=broken, trajectory_ids=joined))
    assert not both.mask[1].any() and not both.mask[2].any()
    own = dataclasses.replace(agentic.trloo(), mask=lambda r: jnp.arange(6) > 0)
    found = agentic.with_mismatch_rejection(own).prepare(rollout).mask
    np.testing.assert_array_equal(found, np.asarray(rollout.mask) & (np.arange(6) > 0)[:, None])


def test_rejected_turns_leave_the_baselines_but_not_the_returns():
    rollout = rollout_of_turns()
    ids, groups = np.asarray(rollout.turn_ids), np.asarray(rollout.group_ids)
    dropped = {(1, 0), (3, ids[3].max()), (4, 1)}
    keep = np.ones(ids.shape, bool)
    for b, m in dropped:
        keep[b, ids[b] == m] = False
    objective = agentic.with_rejection(agentic.trloo(), lambda r: jnp.asarray(keep))
    prepared = objective.prepare(rollout)
    np.testing.assert_array_equal(prepared.mask, np.asarray(rollout.mask) & keep)
    table = turn_table(rollout)
    for (b, m), value in table.items():
        others = [
            v
            for (i, n), v in table.items()
            if n == m and i != b and groups[i] == groups[b] and (i, n) not in dropped
        ]
        want = 0.0 if (b, m) in dropped else value - (np.mean(others) if others else 0.0)
        np.testing.assert_allclose(prepared.advantages[b, ids[b] == m], want, atol=1e-5)
    # A mask of the objective acts after the advantages.
    after = dataclasses.replace(agentic.trloo(), mask=lambda r: jnp.asarray(keep))
    plain = agentic.trloo().prepare(rollout)
    np.testing.assert_array_equal(after.prepare(rollout).advantages, plain.advantages)
    np.testing.assert_array_equal(after.prepare(rollout).mask, prepared.mask)
    rows = agentic.with_rejection(after, lambda r: jnp.arange(6) != 2)
    assert not rows.prepare(rollout).mask[2].any()
    np.testing.assert_array_equal(
        rows.prepare(rollout).mask, np.asarray(prepared.mask) & (np.arange(6) != 2)[:, None]
    )


def test_with_everything_rejected_there_is_no_loss():
    rollout = rollout_of_turns()
    rollout = rollout.replace(proximal_logprobs=rollout.behavior_logprobs + 0.1 * rollout.mask)
    objective = agentic.with_mismatch_rejection(agentic.trloo())
    loss, gradient = gradient_of(objective, objective.prepare(rollout))
    assert float(loss) == 0.0 and not np.any(gradient)


def test_modulation_by_hand():
    rollout = rollout_of_turns()
    rewards = rollout.rewards.sum(-1)
    prepared = agentic.empg(k=1.5, k_future=0.5, zeta=0.2).prepare(rollout.replace(rewards=rewards))
    base = np.asarray(objectives.grpo().prepare(rollout.replace(rewards=rewards)).advantages)
    ids, entropy = np.asarray(rollout.turn_ids), np.asarray(rollout.old.entropy)
    steps = [(b, m) for b in range(6) for m in range(ids[b].max() + 1)]
    mean = np.array([entropy[b, ids[b] == m].mean() for b, m in steps])
    normal = (mean - mean.min()) / (mean.max() - mean.min())
    scale = np.exp(-1.5 * normal) / np.exp(-1.5 * normal).mean()
    raw = np.empty(len(steps))
    for i, (b, _) in enumerate(steps):
        raw[i] = base[b] * scale[i]
        if i + 1 < len(steps) and steps[i + 1][0] == b:
            raw[i] += 0.2 * np.exp(-0.5 * normal[i + 1])
    for (b, m), want in zip(steps, raw - raw.mean(), strict=True):
        np.testing.assert_allclose(prepared.advantages[b, ids[b] == m], want, atol=1e-5)


def test_modulation_of_nothing_is_the_base():
    rollout = rollout_of_turns()
    for base in (agentic.trloo(), agentic.with_total_rewards(objectives.grpo())):
        plain = agentic.with_entropy_modulation(base, k=0.0, zeta=0.0, centered=False)
        want = base.prepare(rollout).advantages
        want = want[:, None] if want.ndim == 1 else want
        np.testing.assert_allclose(
            plain.prepare(rollout).advantages, np.where(rollout.mask, want, 0.0), atol=1e-6
        )


def test_a_failed_reward_stays_out_of_the_scale():
    rollout = rollout_of_turns()
    rewards = rollout.rewards.sum(-1).at[2].set(jnp.nan)
    found = agentic.empg().prepare(rollout.replace(rewards=rewards))
    keep = np.array([0, 1, 3, 4, 5])
    fewer = jax.tree.map(lambda x: x[keep], rollout.replace(rewards=rewards))
    want = agentic.empg().prepare(fewer)
    np.testing.assert_allclose(found.advantages[keep], want.advantages, atol=1e-6)
    assert not found.mask[2].any()


def test_parts_combine_with_other_recipes():
    rollout = rollout_of_turns()
    per_turn = agentic.by_turn(advantages.group_normalize, ddof=0)
    mixed = dataclasses.replace(objectives.gspo(), advantage=per_turn)
    loss, _ = mixed.loss(
        pg.PolicyOutputs(logprobs=rollout.behavior_logprobs), mixed.prepare(rollout)
    )
    assert np.isfinite(loss)
    table = turn_table(rollout)
    second = [table[b, 1] for b in (1, 3, 4, 5) if (b, 1) in table]
    row = next(b for b in (1, 3, 4, 5) if (b, 1) in table)
    want = (table[row, 1] - np.mean(second)) / (np.std(second) + 1e-6)
    token = np.flatnonzero(np.asarray(rollout.turn_ids)[row] == 1)[0]
    assert len(second) > 1
    assert float(mixed.prepare(rollout).advantages[row, token]) == pytest.approx(want, rel=1e-4)


def test_training_computes_the_entropy_that_is_needed():
    task = trloo_bias.problem(jnp.asarray(REWARDS, jnp.float32))
    objective = agentic.with_total_rewards(agentic.empg(steps=trloo_bias.turn_ids, num_steps=3))
    update = pg.train.make_update(
        functools.partial(problems.outputs, task), objective, optax.sgd(0.1)
    )
    state = pg.train.init(jnp.asarray(PARAMS, jnp.float32), optax.sgd(0.1), jax.random.key(0))
    rollout = problems.sample(task, state.params, jax.random.key(1), group_size=16)
    before = np.asarray(state.params)
    state, metrics = update(state, rollout)
    assert np.isfinite(metrics["loss"]) and np.any(np.asarray(state.params) != before)


def test_errors():
    rollout = rollout_of_turns()
    with pytest.raises(ValueError, match="rollout.turn_ids: this objective needs it"):
        agentic.trloo().prepare(rollout.replace(turn_ids=None))
    with pytest.raises(ValueError, match="turn_ids: expected ids in"):
        agentic.trloo(num_turns=1).prepare(rollout)
    with pytest.raises(ValueError, match="rollout.old.entropy: this objective needs it"):
        agentic.empg().prepare(rollout.replace(old=None))
    for options in ({"gamma": 1.5}, {"low": -0.1}, {"high": -0.1}, {"bound": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            agentic.trloo(**options)
    for options in ({"k": -1.0}, {"k_future": -1.0}, {"zeta": -0.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            agentic.empg(**options)
    for options in ({"low": 0.0}, {"high": 0.99}, {"veto_threshold": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            agentic.with_mismatch_rejection(agentic.trloo(), **options)
