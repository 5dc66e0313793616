"""What Lite PPO normalises and what a token weighs, beside the alternatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import advantages, aggregate, objectives
from pgjax.objectives import baselines
from pgjax.types import PolicyOutputs, Rollout

CENTERED_STD = baselines.normalized(
    center=advantages.centered, scale=advantages.by_centered_batch_std
)


def rollout_of(rewards, ids, lengths=None):
    rewards = jnp.asarray(rewards, jnp.float32)
    lengths = np.ones(len(rewards), int) if lengths is None else np.asarray(lengths)
    mask = jnp.asarray(np.arange(lengths.max()) < lengths[:, None])
    return Rollout(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=mask,
        behavior_logprobs=jnp.where(mask, -1.0, 0.0),
        rewards=rewards,
        group_ids=jnp.asarray(ids),
    )


def advantages_of(objective, rewards, ids):
    return np.asarray(objective.prepare(rollout_of(rewards, ids)).advantages)


def test_two_prompts_by_hand():
    """Mean-centred [.5, -.5, 0, 0] over the sample deviation .5 of [1, 0, 1, 1]."""
    found = advantages_of(objectives.lite_ppo(epsilon=0.0), [1, 0, 1, 1], [0, 0, 1, 1])
    np.testing.assert_allclose(found, [1.0, -1.0, 0.0, 0.0], atol=1e-6)


def test_one_prompt_is_grpo():
    rewards = np.random.default_rng(0).uniform(size=6)
    np.testing.assert_allclose(
        advantages_of(objectives.lite_ppo(), rewards, [3] * 6),
        advantages_of(objectives.grpo(), rewards, [3] * 6),
        rtol=1e-6,
    )


@pytest.mark.parametrize("solved", [0, 8, 14])
def test_a_single_success_is_not_inflated(solved):
    """15 zeros and a one: 3.75 under the group's deviation, less under any larger one."""
    rewards = np.r_[np.zeros(15), 1.0, np.ones(solved), np.zeros(16 - solved)]
    ids = np.repeat([0, 1], 16)
    group = advantages_of(objectives.grpo(epsilon=0.0), rewards, ids)[15]
    batch = advantages_of(objectives.lite_ppo(epsilon=0.0), rewards, ids)[15]
    assert group == pytest.approx(3.75, rel=1e-5)
    assert batch == pytest.approx((15 / 16) / rewards.std(ddof=1), rel=1e-5)
    larger = rewards.std(ddof=1) > rewards[:16].std(ddof=1)
    assert (batch < group) == larger == (solved > 0)


def test_a_constant_on_one_prompt_moves_only_the_raw_scale():
    rewards, ids = np.array([1.0, 0, 1, 1, 0, 0]), [0, 0, 0, 1, 1, 1]
    moved = rewards + np.repeat([0.0, 2.0], 3)
    raw = baselines.normalized(center=advantages.centered, scale=advantages.by_batch_std)
    for advantage, same in ((raw, False), (CENTERED_STD, True)):
        objective = dataclasses.replace(objectives.lite_ppo(), advantage=advantage)
        before, after = (advantages_of(objective, r, ids) for r in (rewards, moved))
        assert np.allclose(before, after, rtol=1e-5) == same
        # The numerators are unchanged: only one common factor differs.
        np.testing.assert_allclose(after / after[0], before / before[0], rtol=1e-5)
    assert advantages_of(objective, rewards, ids)[0] == pytest.approx(
        (1 / 3) / (rewards - np.repeat([2 / 3, 1 / 3], 3)).std(ddof=1), rel=1e-4
    )


@pytest.mark.parametrize("advantage", [None, CENTERED_STD])
def test_equal_rewards_teach_nothing(advantage):
    objective = objectives.lite_ppo()
    if advantage is not None:
        objective = dataclasses.replace(objective, advantage=advantage)
    np.testing.assert_array_equal(advantages_of(objective, [0.3] * 4, [0, 0, 1, 1]), 0.0)
    np.testing.assert_array_equal(advantages_of(objective, [1.0, 1, 0, 0], [0, 0, 1, 1]), 0.0)
    np.testing.assert_array_equal(advantages_of(objective, [0.3], [0]), 0.0)  # a single response


def weight_of_rows(objective, rollout):
    """Sums over each row of the gradient in its log-probs."""
    prepared = objective.prepare(rollout)

    def loss(logprobs):
        return objective.value(PolicyOutputs(logprobs=logprobs), prepared)

    return np.asarray(jax.grad(loss)(rollout.behavior_logprobs)).sum(-1)


def test_what_a_long_response_weighs():
    by_token = objectives.lite_ppo()
    by_sequence = dataclasses.replace(by_token, aggregate=aggregate.sequence_mean_token_mean)
    uneven = rollout_of([1.0, 0.0], [0, 0], lengths=[1, 9])
    short, long = weight_of_rows(by_token, uneven)
    assert long == pytest.approx(-9 * short, rel=1e-5)
    short, long = weight_of_rows(by_sequence, uneven)
    assert long == pytest.approx(-short, rel=1e-5)
    even = rollout_of([1.0, 0.0, 0.5], [0, 0, 0], lengths=[4, 4, 4])
    np.testing.assert_allclose(
        weight_of_rows(by_token, even), weight_of_rows(by_sequence, even), rtol=1e-5
    )


def test_lite_ppo_has_none_of_the_other_tricks():
    objective = objectives.lite_ppo()
    assert objective.mask is None and objective.rewards is None and objective.targets is None
    assert objective.regularizers == () and objective.needs == frozenset()
    prepared = objective.prepare(rollout_of([1.0, 0.0], [0, 0]))
    # Plain clip: the gradient of the better response ends at 1.2.
    for ratio, kept in ((1.19, True), (1.21, False)):
        logprobs = prepared.behavior_logprobs + jnp.log(ratio) * prepared.mask

        def loss(x):
            return objective.value(PolicyOutputs(logprobs=x), prepared)

        assert bool(jax.grad(loss)(logprobs)[0, 0] != 0) == kept
