"""Policy-gradient surrogates on log-probs and ratios.

With `g = ∇ log π` every one of them has, per token, the gradient `-k ρ A g`: a stability mask `k`,
the ratio `ρ` of the policy to a reference denominator, and an advantage `A`; `unified` is that
formula itself. Advantages are data: no gradient flows into them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks, masks

LOG_RATIO_LIMIT = 20.0  # e^20 ≈ 4.9e8: far beyond any ratio worth learning from, finite in float32


def _broadcast_advantages(
    advantages: Float[Array, ...], like: Float[Array, "B T"]
) -> Float[Array, ...]:
    """Detached float advantages that broadcast against `like`; `[B]` counts as one per sequence."""
    _checks.floating(advantages=advantages)
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages))
    advantages = advantages.astype(jnp.promote_types(advantages.dtype, jnp.float32))
    shape = jnp.shape(like)
    if advantages.ndim == 1 and len(shape) == 2:
        advantages = advantages[:, None]
    try:
        fits = jnp.broadcast_shapes(advantages.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"advantages: expected a shape that broadcasts to {shape} "
            f"(one per sequence or one per token), got {advantages.shape}"
        )
    return advantages


def _exp_clamped(log_ratio: Float[Array, ...]) -> Float[Array, ...]:
    """exp with its value held in e^±20 and its gradient equal to that value, never cut to 0."""
    frozen = jax.lax.stop_gradient(log_ratio)
    limited = jnp.clip(frozen, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return jnp.exp(limited + (log_ratio - frozen))


def _float(x: Float[Array, ...]) -> Float[Array, ...]:
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def importance_ratio(
    logprobs: Float[Array, "B T"], behavior_logprobs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Token-level ratio `π(a|s) / μ(a|s) = exp(logprobs - behavior_logprobs)`.

    Args:
      logprobs: under the current policy, differentiable.
      behavior_logprobs: under the policy that sampled; detached here.

    Returns:
      f32 `[B, T]`, held within e^±20; its gradient is `ratio * ∇ logprobs` throughout. Positions
      that hold 0 in both (off the mask) give 1.

    Raises:
      ValueError: unequal shapes or a non-floating dtype.
    """
    _checks.floating(logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    _checks.same_shape(logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    return _exp_clamped(_float(logprobs) - jax.lax.stop_gradient(_float(behavior_logprobs)))


def sequence_ratio(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """GSPO's sequence ratio, written on every token with that token's own gradient.

    Value `s_i = exp(mean_t log r_t)`; gradient at token t `s_i ∇ log π_t`, so that the mean over a
    sequence's tokens has the gradient of the sequence ratio itself.

    Args:
      logprobs: under the current policy, differentiable.
      behavior_logprobs: under the policy that sampled; detached here.
      mask: response tokens; the mean runs over these.

    Returns:
      f32 `[B, T]`; 1 for a sequence without tokens. The mean log-ratio is held within ±20.

    Raises:
      ValueError: unequal shapes, wrong dtypes.

    Source: GSPO, Zheng et al. 2025, arXiv 2507.18071.
    """
    _checks.rank("logprobs", logprobs, 2)
    _checks.floating(logprobs=logprobs, behavior_logprobs=behavior_logprobs)
    _checks.same_shape(logprobs=logprobs, behavior_logprobs=behavior_logprobs, mask=mask)
    _checks.boolean(mask=mask)
    logprobs = jnp.where(mask, _float(logprobs), 0.0)
    frozen = jax.lax.stop_gradient(logprobs)
    behavior = jax.lax.stop_gradient(jnp.where(mask, _float(behavior_logprobs), 0.0))
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    mean_log_ratio = (frozen - behavior).sum(-1, keepdims=True) / length
    return _exp_clamped(mean_log_ratio + (logprobs - frozen))


def score_function(
    logprobs: Float[Array, "B T"], advantages: Float[Array, ...]
) -> Float[Array, "B T"]:
    """REINFORCE: `-A log π`.

    Args:
      logprobs: under the current policy, differentiable.
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-A ∇ log π`. Its value means nothing by itself.

    Raises:
      ValueError: advantages that do not broadcast.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    _checks.floating(logprobs=logprobs)
    return -_broadcast_advantages(advantages, logprobs) * _float(logprobs)


def importance_weighted(
    ratio: Float[Array, "B T"], advantages: Float[Array, ...]
) -> Float[Array, "B T"]:
    """The unclipped off-policy surrogate `-r A`.

    Args:
      ratio: π/μ, differentiable.
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-r A ∇ log π`.

    Raises:
      ValueError: advantages that do not broadcast.

    Source: the conservative policy iteration surrogate of Schulman et al. 2015, arXiv 1502.05477.
    """
    _checks.floating(ratio=ratio)
    return -_broadcast_advantages(advantages, ratio) * _float(ratio)


def clipped(
    ratio: Float[Array, "B T"], advantages: Float[Array, ...], *, low: float, high: float
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate `-min(r A, clip(r, 1 - low, 1 + high) A)`.

    Args:
      ratio: π/π_old, differentiable; token ratio, or `sequence_ratio` for GSPO.
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.
      low: lower clip width, in [0, 1].
      high: upper clip width, ≥ 0; larger than `low` for DAPO's clip-higher.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-r A ∇ log π` where `masks.ppo_clip` is true, else 0.
      On the boundary itself the gradient is kept.

    Raises:
      ValueError: a width out of range, advantages that do not broadcast.

    Source: Schulman et al. 2017, arXiv 1707.06347; separate widths: DAPO, arXiv 2503.14476.
    """
    _checks.floating(ratio=ratio)
    ratio = _float(ratio)
    advantages = _broadcast_advantages(advantages, ratio)
    # Written with the mask rather than `minimum`, whose gradient is split where both arms tie.
    kept = masks.ppo_clip(ratio, advantages, low=low, high=high)
    bounded = jax.lax.stop_gradient(jnp.clip(ratio, 1.0 - low, 1.0 + high))
    return -advantages * jnp.where(kept, ratio, bounded)


def dual_clipped(
    ratio: Float[Array, "B T"],
    advantages: Float[Array, ...],
    *,
    low: float,
    high: float,
    bound: float = 3.0,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate, capped for bad actions: `min(-bound A, L_clip)` where A < 0.

    Args:
      ratio: π/π_old, differentiable.
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.
      low: lower clip width, in [0, 1].
      high: upper clip width, ≥ 0.
      bound: the ratio above which a bad action is no longer pushed down, > 1.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-r A ∇ log π` where `masks.dual_clip` is true, else 0.

    Raises:
      ValueError: a width out of range, `bound` ≤ 1, advantages that do not broadcast.

    Source: Ye et al. 2020, arXiv 1912.09729.
    """
    _checks.in_range("bound", bound, 1.0, low_open=True)
    advantages = _broadcast_advantages(advantages, ratio)
    loss = clipped(ratio, advantages, low=low, high=high)
    runaway = (advantages < 0) & (ratio > bound)
    return jnp.where(runaway, -bound * advantages, loss)


def cispo(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    advantages: Float[Array, ...],
    *,
    low: float = 1.0,
    high: float,
) -> Float[Array, "B T"]:
    """Clipped importance weight on the score function: `-sg(clip(r, 1 - low, 1 + high)) A log π`.

    The weight is bounded, yet no token ever loses its gradient.

    Args:
      logprobs: under the current policy, differentiable.
      behavior_logprobs: under the policy that sampled.
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.
      low: lower clip width, ≥ 0; 1 or more means no lower bound.
      high: upper clip width, ≥ 0: the weight is at most `1 + high` (some code states that absolute
        cap instead).

    Returns:
      f32 `[B, T]` per-token loss; gradient `-clip(r) A ∇ log π`.

    Raises:
      ValueError: a width out of range, unequal shapes, advantages that do not broadcast.

    Source: MiniMax-M1, 2025, arXiv 2506.13585.
    """
    _checks.in_range("low", low, 0.0)
    _checks.in_range("high", high, 0.0)
    ratio = importance_ratio(logprobs, behavior_logprobs)
    weight = jax.lax.stop_gradient(jnp.clip(ratio, max(1.0 - low, 0.0), 1.0 + high))
    return weight * score_function(logprobs, advantages)


def unified(
    logprobs: Float[Array, "B T"],
    denominator_logprobs: Float[Array, "B T"],
    advantages: Float[Array, ...],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """The one estimator: mask × 1/π_denominator × advantage × ∇π, as a loss.

    `-k A exp(log π - sg(log π_den))`, whose gradient is `-k A (π/π_den) ∇ log π`.

    Args:
      logprobs: under the current policy, differentiable.
      denominator_logprobs: log of the reference denominator, detached here: the current policy
        itself (score function), the old policy (importance weighting), zeros (denominator 1), ...
      advantages: `[B]` or broadcastable to `[B, T]`; detached here.
      mask: the stability mask `k`: bool, or any non-negative multiplier; detached here.

    Returns:
      f32 `[B, T]` per-token loss; exactly 0, with zero gradient, where the mask is 0.

    Raises:
      ValueError: unequal shapes, advantages that do not broadcast.

    Source: the unified policy gradient estimator of Lv et al. 2025, arXiv 2509.04419.
    """
    _checks.same_shape(logprobs=logprobs, denominator_logprobs=denominator_logprobs, mask=mask)
    _checks.floating(logprobs=logprobs, denominator_logprobs=denominator_logprobs)
    advantages = _broadcast_advantages(advantages, logprobs)
    multiplier = jax.lax.stop_gradient(jnp.asarray(mask).astype(advantages.dtype))
    active = multiplier != 0
    log_ratio = _float(logprobs) - jax.lax.stop_gradient(_float(denominator_logprobs))
    ratio = _exp_clamped(jnp.where(active, log_ratio, 0.0))
    return jnp.where(active, -multiplier * advantages * ratio, 0.0)
