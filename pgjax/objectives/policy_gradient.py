"""REINFORCE and its descendants, with and without a critic, and maximum likelihood.

All ratios are taken against `rollout.behavior_logprobs`; see `with_mismatch_weights` for samplers
that disagree with the learner. Expected gradients are stated for one on-policy step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pgjax import _checks, advantages, aggregate, masks, returns
from pgjax.objectives._parts import by_group, clipped, score_function
from pgjax.objectives.objective import Objective, Regularizer
from pgjax.objectives.regularizers import entropy_bonus, value_loss
from pgjax.types import Rollout


def supervised() -> Objective:
    """Maximum likelihood on given completions: `-log π(y_t)`, mean over tokens.

    The policy gradient with advantage 1 and denominator π itself; rewards are not read.
    """

    def advantage(rollout: Rollout) -> Array:
        return jnp.ones(rollout.tokens.shape[0], jnp.float32)

    return Objective(advantage=advantage, surrogate=score_function)


def reinforce() -> Objective:
    """REINFORCE without a baseline: `-R log π(y)`, mean over sequences of sums over tokens.

    Expected gradient: the policy gradient, unbiased.

    Source: Williams 1992.
    """

    def advantage(rollout: Rollout) -> Array:
        rewards = jnp.where(jnp.isfinite(rollout.rewards), rollout.rewards, 0.0)
        if rewards.ndim == 1:
            return rewards
        # Per-token rewards: what a token is credited with is what comes after it.
        return returns.discounted(rewards, jnp.ones_like(rewards), mask=rollout.mask)

    return Objective(
        advantage=advantage,
        surrogate=score_function,
        aggregate=aggregate.sequence_mean_token_sum,
    )


def rloo() -> Objective:
    """REINFORCE with leave-one-out baselines: `-(R_i - mean_{j≠i} R_j) log π(y_i)`.

    Expected gradient: the policy gradient, unbiased, for groups of any size.

    Source: RLOO, Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019.
    """
    return Objective(
        advantage=by_group(advantages.leave_one_out),
        surrogate=score_function,
        aggregate=aggregate.sequence_mean_token_sum,
    )


def reinforce_pp(
    *, kl_coefficient: float = 0.0, gamma: float = 1.0, low: float = 0.2, high: float = 0.2
) -> Objective:
    """REINFORCE++: KL in the reward, returns-to-go whitened over all response tokens, PPO clip.

    `r_t = R 1[t last] - β (log π_old - log π_ref)_t`, `A = whiten(Σ_{s≥t} γ^{s-t} r_s)`.

    Args:
      kl_coefficient: β ≥ 0; above 0 needs `reference_logprobs`.
      gamma: discount per token, in [0, 1].
      low, high: clip widths.

    Expected gradient: biased, since each sample is part of its own mean and scale.

    Source: Hu et al. 2025, arXiv 2501.03262.
    """
    _checks.in_range("kl_coefficient", kl_coefficient, 0.0)
    _checks.in_range("gamma", gamma, 0.0, 1.0)

    def advantage(rollout: Rollout) -> Array:
        behavior, reference = rollout.behavior_logprobs, rollout.reference_logprobs
        if not kl_coefficient or reference is None:
            reference = behavior
        to_go = advantages.kl_shaped_returns(
            rollout.rewards, behavior, reference, rollout.mask, beta=kl_coefficient, gamma=gamma
        )
        valid = rollout.mask & masks.finite_rewards(rollout.rewards)[:, None]
        return advantages.token_whiten(to_go, valid)

    needs = frozenset({"reference_logprobs"}) if kl_coefficient else frozenset()
    return Objective(advantage=advantage, surrogate=clipped(low, high), own_needs=needs)


def ppo(
    *,
    gamma: float = 1.0,
    lambda_: float = 0.95,
    low: float = 0.2,
    high: float = 0.2,
    value_coefficient: float = 0.5,
    value_clip: float | None = 0.2,
    entropy_coefficient: float = 0.0,
) -> Objective:
    """PPO with a learnt value function: GAE over response tokens, whitened; clipped surrogate.

    The sequence's reward arrives at its last response token (per-token rewards stay where they
    are); positions off the mask are skipped by the recursion.

    Args:
      gamma: discount per token, in [0, 1].
      lambda_: GAE's λ, in [0, 1].
      low, high: clip widths.
      value_coefficient: weight of the value loss.
      value_clip: width of the value clipping, None for none.
      entropy_coefficient: weight of the entropy bonus; above 0 needs `entropy`.

    Needs `values` (old ones in the rollout, current ones in the outputs).

    Source: Schulman et al. 2017, arXiv 1707.06347; GAE, 2015, arXiv 1506.02438.
    """
    _checks.in_range("gamma", gamma, 0.0, 1.0)
    _checks.in_range("lambda_", lambda_, 0.0, 1.0)
    _checks.in_range("entropy_coefficient", entropy_coefficient, 0.0)

    def raw(rollout: Rollout) -> tuple[Array, Array]:
        valid = rollout.mask & masks.finite_rewards(rollout.rewards)[:, None]
        rewards = rollout.rewards
        if rewards.ndim == 1:
            rewards = advantages.at_last_token(rewards, rollout.mask)
        assert rollout.values is not None
        estimate = returns.gae(
            rewards,
            rollout.values,
            returns.next_values_within(rollout.values, valid),
            jnp.full(valid.shape, gamma, rollout.values.dtype),
            lambda_=lambda_,
            mask=valid,
        )
        return estimate, valid

    def advantage(rollout: Rollout) -> Array:
        return advantages.token_whiten(*raw(rollout))

    def targets(rollout: Rollout) -> Array:
        estimate, valid = raw(rollout)
        assert rollout.values is not None
        return jnp.where(valid, estimate + rollout.values, 0.0)

    regularizers: tuple[Regularizer, ...] = (value_loss(value_coefficient, clip=value_clip),)
    if entropy_coefficient:
        regularizers += (entropy_bonus(entropy_coefficient),)
    return Objective(
        advantage=advantage,
        surrogate=clipped(low, high),
        targets=targets,
        regularizers=regularizers,
        own_needs=frozenset({"values"}),
    )
