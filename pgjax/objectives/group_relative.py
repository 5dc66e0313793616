"""Recipes whose baseline is the other samples of the same prompt: GRPO and what came of it.

All ratios are taken against `rollout.behavior_logprobs`; see `with_mismatch_weights` for samplers
that disagree with the learner. Expected gradients are stated for one on-policy step.
"""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from pgjax import _checks, advantages, aggregate, masks, surrogates
from pgjax.objectives._parts import advantages_of, by_group, clipped, kl_penalty
from pgjax.objectives.objective import Objective
from pgjax.rewards import shaping
from pgjax.types import PolicyOutputs, Rollout


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
        advantage=by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=clipped(low, high),
        aggregate=aggregate.sequence_mean_token_mean,
        regularizers=kl_penalty(kl_coefficient),
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
        advantage=by_group(advantages.centered),
        surrogate=clipped(low, high),
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
        advantage=by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
        surrogate=clipped(low, high),
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
        return surrogates.clipped(ratio, advantages_of(rollout), low=low, high=high)

    return Objective(
        advantage=by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
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
            outputs.logprobs, rollout.behavior_logprobs, advantages_of(rollout), low=low, high=high
        )

    return Objective(
        advantage=by_group(advantages.group_normalize, epsilon=epsilon, ddof=ddof),
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
        advantage=by_group(advantages.group_mean_batch_std, epsilon=epsilon),
        surrogate=clipped(low, high),
        aggregate=aggregate.token_mean,
    )
