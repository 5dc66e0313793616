"""Weights that correct for a sampler (μ) that is not quite the learner's old policy (π_old).

They multiply a per-token loss whose ratio is taken against π_old. All are detached.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks
from pgjax.surrogates.core import LOG_RATIO_LIMIT, importance_ratio


def truncated_weights(
    logprobs: Float[Array, "B T"], behavior_logprobs: Float[Array, "B T"], *, cap: float = 2.0
) -> Float[Array, "B T"]:
    """Truncated importance sampling `min(π_old/μ, cap)` per token.

    Args:
      logprobs: the learner's, before the update (π_old).
      behavior_logprobs: the sampler's (μ).
      cap: ≥ 0; infinity gives exact token-level importance sampling, 0 no gradient at all.

    Returns:
      f32 `[B, T]`, detached.

    Raises:
      ValueError: unequal shapes, a negative cap.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy training";
    truncation after Ionides 2008.
    """
    _checks.in_range("cap", cap, 0.0)
    ratio = importance_ratio(logprobs, behavior_logprobs)
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def truncated_sequence_weights(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: float = 2.0,
) -> Float[Array, "B T"]:
    """`min(Π_t π_old/μ, cap)`, one weight a sequence; otherwise as `truncated_weights`.

    The product's logarithm is held within ±20.
    """
    _checks.in_range("cap", cap, 0.0)
    _checks.same_shape(logprobs=logprobs, behavior_logprobs=behavior_logprobs, mask=mask)
    _checks.boolean(mask=mask)
    log_ratio = jnp.where(mask, logprobs - behavior_logprobs, 0.0).sum(-1, keepdims=True)
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return jax.lax.stop_gradient(jnp.broadcast_to(jnp.minimum(ratio, cap), mask.shape))


def masked_weights(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> Float[Array, "B T"]:
    """Masked importance sampling: `π_old/μ` inside `[low, high]`, 0 outside.

    Args:
      logprobs: the learner's, before the update (π_old).
      behavior_logprobs: the sampler's (μ).
      low: smallest accepted ratio, ≥ 0.
      high: largest accepted ratio, ≥ `low`.

    Returns:
      f32 `[B, T]`, detached.

    Raises:
      ValueError: unequal shapes, bounds out of order.

    Source: IcePop, Ring Team 2025, arXiv 2510.18855.
    """
    _checks.in_range("low", low, 0.0)
    _checks.in_range("high", high, low)
    ratio = importance_ratio(logprobs, behavior_logprobs)
    kept = (ratio >= low) & (ratio <= high)
    return jax.lax.stop_gradient(jnp.where(kept, ratio, 0.0))
