"""Errors of value estimates, one a sample; the half squared one is `surrogates.value_error`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened


def huber_error(
    values: Float[Array, "*B"], targets: Float[Array, "*B"], *, delta: float = 1.0
) -> Float[Array, "*B"]:
    """u²/2 for |u| ≤ δ, δ (|u| - δ/2) beyond, u = target - V: its slope is never above δ.

    Args:
      values: V, current estimates, differentiable.
      targets: of the same shape; detached here.
      delta: δ > 0.

    Returns:
      f32 of the same shape.

    Raises:
      ValueError: unequal shapes, wrong dtypes, δ not above 0.

    Source: Huber 1964, "Robust estimation of a location parameter"; with δ = 1 the error that DQN
    calls clipped, Mnih et al. 2015.
    """
    _checks.in_range("delta", delta, 0.0, low_open=True)
    return optax.huber_loss(*_pair(values, targets), delta=delta)


def expectile_error(
    values: Float[Array, "*B"], targets: Float[Array, "*B"], *, expectile: float
) -> Float[Array, "*B"]:
    """|τ - 1{u ≤ 0}| u², u = target - V: its minimum is the τ-expectile of the targets.

    With τ = 1/2 half the squared error. For τ → 1 the minimiser goes to the largest target.

    Args:
      values: V, current estimates, differentiable.
      targets: of the same shape; detached here.
      expectile: τ in (0, 1).

    Returns:
      f32 of the same shape.

    Raises:
      ValueError: unequal shapes, wrong dtypes, τ outside (0, 1).

    Source: Newey and Powell 1987; as a value loss IQL, Kostrikov et al. 2021, arXiv 2110.06169.
    """
    _checks.in_range("expectile", expectile, 0.0, 1.0, low_open=True, high_open=True)
    values, targets = _pair(values, targets)
    away = targets - values
    return jnp.where(away > 0, expectile, 1.0 - expectile) * jnp.square(away)


def _pair(values: Array, targets: Array) -> tuple[Array, Array]:
    _checks.floating(values=values, targets=targets)
    _checks.same_shape(values=values, targets=targets)
    return widened(values), jax.lax.stop_gradient(widened(targets))
