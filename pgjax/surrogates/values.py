"""Per-token losses for value estimates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks


def value_error(values: Float[Array, "B T"], targets: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Half squared error `(V - target)² / 2`.

    Args:
      values: current estimates, differentiable.
      targets: detached here.

    Returns:
      f32 `[B, T]`.

    Raises:
      ValueError: unequal shapes.
    """
    _checks.same_shape(values=values, targets=targets)
    return 0.5 * jnp.square(values - jax.lax.stop_gradient(targets))


def clipped_value_error(
    values: Float[Array, "B T"],
    targets: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    *,
    width: float,
) -> Float[Array, "B T"]:
    """PPO's clipped value loss `max((V - R)², (clip(V, V_old ± width) - R)²) / 2`.

    Args:
      values: current estimates, differentiable.
      targets: detached here.
      old_values: estimates before the update, detached here.
      width: > 0.

    Returns:
      f32 `[B, T]`; no gradient where moving away from `old_values` beyond `width` would still
      reduce the error of the unclipped estimate.

    Raises:
      ValueError: unequal shapes, a width ≤ 0.

    Source: the PPO reference implementation (Dhariwal et al. 2017).
    """
    _checks.same_shape(values=values, targets=targets, old_values=old_values)
    _checks.in_range("width", width, 0.0, low_open=True)
    old_values = jax.lax.stop_gradient(old_values)
    bounded = old_values + jnp.clip(values - old_values, -width, width)
    return jnp.maximum(value_error(values, targets), value_error(bounded, targets))
