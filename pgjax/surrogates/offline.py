"""Losses on sequences that the policy did not sample and whose probabilities nobody knows.

Both are `unified` with a denominator that does not ask for the demonstrator's probabilities.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks
from pgjax.surrogates.core import unified


def unit_denominator(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, ...],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """Importance weighting against a demonstrator taken to be certain: `-A π`.

    `unified` with the denominator 1. Tokens that the policy finds unlikely hardly count.

    Args:
      logprobs: under the current policy, differentiable.
      advantages: `[B]` or broadcastable to `[B, T]`; detached.
      mask: tokens that count, or a non-negative multiplier.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-A π ∇ log π`.

    Raises:
      ValueError: unequal shapes, advantages that do not broadcast.

    Source: the off-policy term of SRFT, Fu et al. 2025, arXiv 2506.19767, as a row of Lv et al.
    2025, arXiv 2509.04419.
    """
    return unified(logprobs, jnp.zeros_like(logprobs), advantages, mask)


def shaped_weight(logprobs: Float[Array, "B T"], *, shape: float = 0.1) -> Float[Array, "B T"]:
    """LUFFY's weight of a demonstrated token, `f'(π) π = γ π / (π + γ)²` for `f(π) = π / (π + γ)`.

    Largest, 1/4, at π = γ, where plain importance weighting has π: unlikely tokens are learnt.

    Args:
      logprobs: log π ≤ 0.
      shape: γ > 0.

    Returns:
      f32 of the same shape, differentiable.

    Raises:
      ValueError: `shape` not above 0.
    """
    return jnp.exp(logprobs - _log_denominator(logprobs, shape))


def shaped(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, ...],
    mask: Bool[Array, "B T"] | Float[Array, "B T"],
    *,
    shape: float = 0.1,
) -> Float[Array, "B T"]:
    """LUFFY's policy shaping on demonstrations: the gradient of `-A f(π)`, `f(π) = π / (π + γ)`.

    `unified` with the denominator `(π + γ)² / γ`.

    Args:
      logprobs: under the current policy, differentiable.
      advantages: `[B]` or broadcastable to `[B, T]`; detached.
      mask: tokens that count, or a non-negative multiplier.
      shape: γ > 0.

    Returns:
      f32 `[B, T]` per-token loss; gradient `-A γ π / (π + γ)² ∇ log π`. Its value is that weight,
      not `f`.

    Raises:
      ValueError: `shape` not above 0, unequal shapes, advantages that do not broadcast.

    Source: LUFFY, Yan et al. 2025, arXiv 2504.14945.
    """
    return unified(logprobs, _log_denominator(logprobs, shape), advantages, mask)


def _log_denominator(logprobs: Array, shape: float) -> Array:
    _checks.floating(logprobs=logprobs)
    _checks.in_range("shape", shape, 0.0, low_open=True, high_open=True)
    logprobs = jnp.asarray(logprobs)
    logprobs = logprobs.astype(jnp.promote_types(logprobs.dtype, jnp.float32))
    return 2 * jnp.logaddexp(logprobs, jnp.log(shape)) - jnp.log(shape)
