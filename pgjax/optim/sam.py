"""Sharpness-aware gradients: taken not at the parameters but uphill of them, on the same batch.

There is no state and no optimizer here: what comes out goes into any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from pgjax.optim import points

LossFn = Callable[[Any, Any], Array]


def sam_gradient(loss_fn: LossFn, params: Any, batch: Any, *, rho: Any = 0.05) -> Any:
    """`∇L(θ + ρ g / ‖g‖)` with `g = ∇L(θ)`, one norm of all parameters: two gradients.

    Args:
      loss_fn: (params, batch) to a scalar.
      params: pytree of floating arrays.
      batch: anything; both gradients see the same.
      rho: distance, at least 0, usually 0.05 to 0.1; 0 gives the plain gradient. May be traced.

    Returns:
      a pytree like `params`; where g is 0, the gradient at θ.

    Raises:
      ValueError: ρ below 0.

    Source: Foret et al., Sharpness-aware minimization, 2021, arXiv 2010.01412.
    """
    gradient = jax.grad(loss_fn)
    uphill = points.sam_point(params, gradient(params, batch), rho=rho)
    return gradient(jax.lax.stop_gradient(uphill), batch)


def asam_gradient(loss_fn: LossFn, params: Any, batch: Any, *, rho: Any = 0.5) -> Any:
    """`sam_gradient` at `θ + ρ θ² g / ‖θ g‖`: rescaling layers against each other changes nothing.

    Args:
      loss_fn, params, batch: of `sam_gradient`.
      rho: at least 0, usually ten times SAM's. May be traced.

    Returns:
      a pytree like `params`.

    Raises:
      ValueError: ρ below 0.

    Source: Kwon et al., ASAM, 2021, arXiv 2102.11600, without their offset of |θ|.
    """
    gradient = jax.grad(loss_fn)
    uphill = points.asam_point(params, gradient(params, batch), rho=rho)
    return gradient(jax.lax.stop_gradient(uphill), batch)
