"""How much a recorded action counts when a policy is fitted to the better ones."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened


def advantage_weights(
    advantages: Float[Array, "*B"], *, beta: float, limit: float = 100.0
) -> Float[Array, "*B"]:
    """min(exp(β A), limit): weights of log π(a|s) in advantage-weighted regression.

    β = 0 is behaviour cloning; the limit is reached at A = log(limit) / β.

    Args:
      advantages: A, `[...]`; detached here.
      beta: β ≥ 0, the inverse of a temperature.
      limit: largest weight, > 0; may be infinite.

    Returns:
      f32 of the same shape, finite for any finite advantage where the limit is.

    Raises:
      ValueError: β below 0, a limit not above 0, a dtype that is not floating.

    Source: Peng et al. 2019 (AWR), arXiv 1910.00177; the limit as in IQL, Kostrikov et al. 2021,
    arXiv 2110.06169.
    """
    _checks.in_range("beta", beta, 0.0)
    _checks.in_range("limit", limit, 0.0, low_open=True)
    _checks.floating(advantages=advantages)
    # Limited before the exponential, which would overflow.
    exponent = jnp.minimum(beta * widened(advantages), math.log(limit))
    return jax.lax.stop_gradient(jnp.exp(exponent))
