"""Published recipes. Each is its choice of advantage, mask, surrogate and aggregation.

All ratios are taken against `rollout.behavior_logprobs`; see `with_mismatch_weights` for samplers
that disagree with the learner. Expected gradients are stated for one on-policy step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks, advantages, aggregate, masks, returns, segments, surrogates
from pgjax.objectives.objective import Objective, Regularizer
from pgjax.objectives.regularizers import entropy_bonus, kl_to_reference, value_loss
from pgjax.types import PolicyOutputs, Rollout


def _by_group(function: Callable[..., Array], **options: float) -> Callable[[Rollout], Array]:
    """An advantage function of `(rewards, group_ids)` as a function of the rollout.

    Statistics count each trajectory once, by its first row, and all its rows get that row's
    advantage.
    """

    def advantage(rollout: Rollout) -> Array:
        ids, first = rollout.trajectory_ids, None
        if ids is not None:
            first = segments.first_rows(ids)
        result = function(
            rollout.rewards,
            rollout.group_ids,
            num_groups=rollout.rewards.shape[0],
            where=first,
            **options,
        )
        if ids is None:
            return result
        by_trajectory = segments.total(
            result, segments.dense_ids(ids), num_segments=ids.shape[0], where=first
        )
        return by_trajectory[segments.dense_ids(ids)]

    return advantage


def _advantages(rollout: Rollout) -> Array:
    assert rollout.advantages is not None  # the objective has checked it
    return rollout.advantages


def _clipped(low: float, high: float) -> Callable[[PolicyOutputs, Rollout], Array]:
    """PPO's clipped surrogate on token ratios."""
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        ratio = surrogates.importance_ratio(outputs.logprobs, rollout.behavior_logprobs)
        return surrogates.clipped(ratio, _advantages(rollout), low=low, high=high)

    return surrogate


def _score_function(outputs: PolicyOutputs, rollout: Rollout) -> Array:
    return surrogates.score_function(outputs.logprobs, _advantages(rollout))


def _kl(coefficient: float) -> tuple[Regularizer, ...]:
    _checks.in_range("kl_coefficient", coefficient, 0.0)
    return (kl_to_reference(coefficient),) if coefficient else ()


def supervised() -> Objective:
    """Maximum likelihood on given completions: `-log π(y_t)`, mean over tokens.

    The policy gradient with advantage 1 and denominator π itself; rewards are not read.
    """

    def advantage(rollout: Rollout) -> Array:
        return jnp.ones(rollout.tokens.shape[0], jnp.float32)

    return Objective(advantage=advantage, surrogate=_score_function)


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
        surrogate=_score_function,
        aggregate=aggregate.sequence_mean_token_sum,
    )


def rloo() -> Objective:
    """REINFORCE with leave-one-out baselines: `-(R_i - mean_{j≠i} R_j) log π(y_i)`.

    Expected gradient: the policy gradient, unbiased, for groups of any size.

    Source: RLOO, Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019.
    """
    return Objective(
        advantage=_by_group(advantages.leave_one_out),
        surrogate=_score_function,
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
    return Objective(advantage=advantage, surrogate=_clipped(low, high), own_needs=needs)


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
        surrogate=_clipped(low, high),
        targets=targets,
        regularizers=regularizers,
        own_needs=frozenset({"values"}),
    )


def grpo(
    *,
    low: float = 0.2,
    high: float = 0.2,
    epsilon: float = 1e-6,
    ddof: int = 1,
    kl_coefficient: float = 0.0,
) -> Objective:
    """GRPO: rewards normalised within their group, PPO clip, mean over sequences of token means.

    `A_i = (R_i - mean_g) / (std_g + ε)`.

    Args:
      low, high: clip widths.
      epsilon: added to the standard deviation, > 0.
      ddof: 1 for the sample, 0 for the population standard deviation.
      kl_coefficient: weight β of the k3 penalty to a reference policy; above 0 needs
        `reference_logprobs`. The paper used 0.04, later work 0.001 or none.

    Expected gradient: biased; each prompt's gradient is weighted by about 1/std of its rewards,
    and tokens of a sequence by 1/length.

    Source: DeepSeekMath, Shao et al. 2024, arXiv 2402.03300.
    """
    return Objective(
        advantage=_by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=_clipped(low, high),
        aggregate=aggregate.sequence_mean_token_mean,
        regularizers=_kl(kl_coefficient),
    )


def dr_grpo(*, length: int, low: float = 0.2, high: float = 0.2) -> Objective:
    """Dr. GRPO: GRPO without the two biases, of scale and of length.

    `A_i = R_i - mean_g`; tokens are summed and divided by the constant `length`.

    Args:
      length: the generation budget in tokens, fixed over training.
      low, high: clip widths.

    Expected gradient: `(1 - 1/G) / length` times the policy gradient, exactly, for groups of G.

    Source: Liu et al. 2025, arXiv 2503.20783.
    """
    _checks.in_range("length", length, 1)
    return Objective(
        advantage=_by_group(advantages.centered),
        surrogate=_clipped(low, high),
        aggregate=functools.partial(aggregate.constant_length, length=length),
    )


def dapo(
    *,
    low: float = 0.2,
    high: float = 0.28,
    epsilon: float = 1e-6,
    ddof: int = 1,
    max_length: int | None = None,
    cache_length: int | None = None,
    filter_truncated: bool = False,
) -> Objective:
    """DAPO: clip-higher, token mean, groups without signal filtered out, overlong penalty.

    Args:
      low, high: clip widths; the larger `high` leaves room for unlikely tokens to grow.
      epsilon, ddof: as in `grpo`.
      max_length, cache_length: soft overlong penalty, see `rewards.soft_overlong_penalty`; both or
        neither (the paper: 20480 and 4096).
      filter_truncated: also mask samples that ran out of budget; needs `rollout.truncated`.

    Departs from the paper in one point: filtered prompts are not replaced by new ones (that is the
    sampling loop's business), so an update sees fewer samples.

    Expected gradient: biased as `grpo`'s, and by the batch's own number of tokens.

    Source: Yu et al. 2025, arXiv 2503.14476.
    """
    if (max_length is None) != (cache_length is None):
        raise ValueError(
            "max_length and cache_length: expected both or neither, "
            f"got {max_length} and {cache_length}"
        )

    def shaped(rollout: Rollout) -> Float[Array, " B"]:
        from pgjax.rewards import shaping

        assert max_length is not None and cache_length is not None
        return rollout.rewards + shaping.soft_overlong_penalty(
            rollout.mask.sum(-1), max_length=max_length, cache_length=cache_length
        )

    def selected(rollout: Rollout) -> Array:
        keep = masks.informative_groups(
            rollout.rewards, rollout.group_ids, num_groups=rollout.rewards.shape[0]
        )
        if filter_truncated:
            if rollout.truncated is None:
                raise ValueError("rollout.truncated: filter_truncated needs it, got None")
            keep = keep & masks.overlong_filter(rollout.truncated)
        return keep

    return Objective(
        advantage=_by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=_clipped(low, high),
        aggregate=aggregate.token_mean,
        mask=selected,
        rewards=None if max_length is None else shaped,
    )


def gspo(
    *, low: float = 3e-4, high: float = 4e-4, epsilon: float = 1e-6, ddof: int = 1
) -> Objective:
    """GSPO: GRPO with one ratio per sequence, the geometric mean of its tokens', clipped as one.

    Args:
      low, high: clip widths of the sequence ratio, two orders below PPO's.
      epsilon, ddof: as in `grpo`.

    Expected gradient: as `grpo`'s.

    Source: Zheng et al. 2025, arXiv 2507.18071.
    """
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        ratio = surrogates.sequence_ratio(outputs.logprobs, rollout.behavior_logprobs, rollout.mask)
        return surrogates.clipped(ratio, _advantages(rollout), low=low, high=high)

    return Objective(
        advantage=_by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=surrogate,
        aggregate=aggregate.sequence_mean_token_mean,
    )


def cispo(
    *, low: float = 1.0, high: float = 4.0, epsilon: float = 1e-6, ddof: int = 1
) -> Objective:
    """CISPO: the score function, weighted by a clipped importance ratio; token mean.

    Args:
      low: 1 or more means no lower bound, as in the paper.
      high: the weight is at most `1 + high`. The paper tuned it without stating the value; a cap
        of 5 is chosen here.
      epsilon, ddof: as in `grpo`.

    Expected gradient: as `grpo`'s under a token mean.

    Source: MiniMax-M1, 2025, arXiv 2506.13585.
    """
    _checks.in_range("low", low, 0.0)
    _checks.in_range("high", high, 0.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        return surrogates.cispo(
            outputs.logprobs, rollout.behavior_logprobs, _advantages(rollout), low=low, high=high
        )

    return Objective(
        advantage=_by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=surrogate,
        aggregate=aggregate.token_mean,
    )


def lite_ppo(*, low: float = 0.2, high: float = 0.2, epsilon: float = 1e-6) -> Objective:
    """Lite PPO: group mean, batch standard deviation, token mean, plain PPO clip, no critic.

    `A_i = (R_i - mean_g) / (std_batch + ε)`, the sample standard deviation of all raw rewards.

    Args:
      low, high: clip widths.
      epsilon: > 0.

    Expected gradient: biased by the batch's own scale and number of tokens.

    Source: "Tricks or Traps?", Liu et al. 2025, arXiv 2508.08221.
    """
    return Objective(
        advantage=_by_group(advantages.group_mean_batch_std, epsilon=epsilon),
        surrogate=_clipped(low, high),
        aggregate=aggregate.token_mean,
    )
