"""MiniRL: the token-level objective corrected for the engine that sampled, and clipped."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks, masks
from pgjax.surrogates.core import _broadcast_advantages, importance_ratio, unified


def minirl(
    logprobs: Float[Array, "B T"],
    proximal_logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    advantages: Float[Array, ...],
    *,
    low: float = 0.2,
    high: float = 0.27,
    cap: float = 5.0,
) -> Float[Array, "B T"]:
    """`-M min(π/μ, cap) A log π`: two ratios, one for the weight and one for the clip.

    The weight `π/μ = (π_old/μ) (π/π_old)` undoes what the sampling engine and staleness do; the
    mask M looks at staleness `π/π_old` alone, as PPO's clip does.

    Args:
      logprobs: under the current policy π, differentiable.
      proximal_logprobs: under the learner's own policy before the first update, π_old.
      behavior_logprobs: under the engine that sampled, μ.
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.
      low: lower clip width of π/π_old, in [0, 1]; 1 never clips.
      high: upper clip width, ≥ 0; infinity never clips.
      cap: of the weight, ≥ 1; infinity leaves it exact.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-M min(π/μ, cap) A ∇ log π`: `unified` with the
      denominator `max(μ, π / cap)`.

    Raises:
      ValueError: an option out of range, unequal shapes, advantages that do not broadcast.

    Source: Zheng et al. 2025, "Stabilizing Reinforcement Learning with LLMs", arXiv 2512.01374. The
    defaults are not the paper's own, whose constants could not be confirmed.
    """
    _checks.in_range("cap", cap, 1.0)
    _checks.same_shape(
        logprobs=logprobs,
        proximal_logprobs=proximal_logprobs,
        behavior_logprobs=behavior_logprobs,
    )
    staleness = importance_ratio(logprobs, proximal_logprobs)
    advantages = _broadcast_advantages(advantages, staleness)
    kept = masks.ppo_clip(staleness, advantages, low=low, high=high)
    denominator = jnp.maximum(behavior_logprobs, logprobs - jnp.log(cap))
    return unified(logprobs, denominator, advantages, kept)
