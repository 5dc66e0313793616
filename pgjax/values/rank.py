"""How alike a critic's features of consecutive states may be, and a penalty where they are more so.

Where Q = φᵀw solves the Bellman equation, features of a pair and of the next differ by as much as
the reward asks for. The penalty raises the rank of the features so far, and no further.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import safe_sqrt, widened

_SMALLEST = 1e-6  # of a norm that is divided by


def beer_bound(
    features: Float[Array, "*B D"],
    next_features: Float[Array, "*B D"],
    rewards: Float[Array, "*B"],
    *,
    head_square_norm: Any,
    discount: float,
    scale_features: Float[Array, "*B D"] | None = None,
) -> Float[Array, "*B"]:
    """U = (‖φ‖² + γ²‖φ'‖² - r²/‖w‖²) / (2γ ‖φ‖ ‖φ'‖), the largest cosine that Bellman allows.

    r = φᵀw - γ φ'ᵀw gives |r| ≤ ‖φ - γφ'‖ ‖w‖ by Cauchy and Schwarz, which is cos(φ, φ') ≤ U; equal
    where φ - γφ' is parallel to w. Above 1, and so no bound, where the reward is 0.

    Args:
      features: φ of a state and action, the input of the critic's linear head, `[..., D]`.
      next_features: φ' of the next state and the policy's action there, `[..., D]`.
      rewards: r, `[...]`.
      head_square_norm: ‖w‖² > 0, of the head's weights without its bias.
      discount: γ in (0, 1].
      scale_features: whose norm stands for ‖φ'‖ in the denominator, `[..., D]`; None for
        `next_features`. The authors' code has the learning critic's φ' above and its averaged
        copy's below, and then U is a bound only in the limit in which both agree.

    Returns:
      f32 `[...]`, finite also for features of norm 0; no gradient flows through it.

    Raises:
      ValueError: unequal shapes, wrong dtypes, γ outside (0, 1], a concrete ‖w‖² not above 0.

    Source: He et al. 2024 (BEER), arXiv 2404.12754, equation of the upper bound.
    """
    _checks.in_range("discount", discount, 0.0, 1.0, low_open=True)
    _checks.in_range("head_square_norm", head_square_norm, 0.0, low_open=True)
    _checks.floating(
        features=features,
        next_features=next_features,
        rewards=rewards,
        scale_features=scale_features,
    )
    _checks.same_shape(
        features=features, next_features=next_features, scale_features=scale_features
    )
    _rows(features, rewards=rewards)
    later = _norm(next_features)
    scale = later if scale_features is None else _norm(scale_features)
    own = _norm(features)
    room = jnp.square(own) + discount**2 * jnp.square(later)
    room = room - jnp.square(widened(rewards)) / head_square_norm
    below = 2.0 * discount * jnp.maximum(own, _SMALLEST) * jnp.maximum(scale, _SMALLEST)
    return jax.lax.stop_gradient(room / below)


def beer_penalty(
    features: Float[Array, "*B D"],
    next_features: Float[Array, "*B D"],
    bounds: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """max(0, cos(φ, φ') - U): nothing where the features are no more alike than they may be.

    Args:
      features: φ, `[..., D]`, differentiable.
      next_features: φ', `[..., D]`, of the averaged copy where there is one; detached here.
      bounds: U, from `beer_bound`, `[...]`; detached here. A bound of -1 everywhere penalises any
        likeness.

    Returns:
      f32 `[...]`, finite also for features of norm 0.

    Raises:
      ValueError: unequal shapes, wrong dtypes.

    Source: He et al. 2024 (BEER), arXiv 2404.12754.
    """
    _checks.floating(features=features, next_features=next_features, bounds=bounds)
    _checks.same_shape(features=features, next_features=next_features)
    _rows(features, bounds=bounds)
    own, later = widened(features), jax.lax.stop_gradient(widened(next_features))
    norms = jnp.maximum(_norm(own), _SMALLEST) * jnp.maximum(_norm(later), _SMALLEST)
    cosine = jnp.sum(own * later, axis=-1) / norms
    return jnp.maximum(cosine - jax.lax.stop_gradient(widened(bounds)), 0.0)


def _norm(x: Array) -> Array:
    return safe_sqrt(jnp.sum(jnp.square(widened(x)), axis=-1))


def _rows(features: Array, **arrays: Array) -> None:
    """Raises ValueError unless each has one number for each row of the features."""
    if np.ndim(features) < 1:
        raise ValueError("features: expected shape [..., D], got a scalar")
    for name, a in arrays.items():
        if np.shape(a) != np.shape(features)[:-1]:
            raise ValueError(
                f"{name}: expected shape {np.shape(features)[:-1]} like features without their "
                f"last axis, got {np.shape(a)}"
            )
