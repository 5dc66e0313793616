"""How new a direction is: elliptical bonuses from the second moments of the features met so far."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import safe_sqrt, widened
from pgjax.uncertainty import gp


class Ellipsoid(NamedTuple):
    """What has been met in which direction; under `jax.vmap` one for each step of an episode.

    Attributes:
      covariance: Λ = λ I + Σ φ φᵀ, `[D, D]`.
      ridge: λ, what Λ is without data.
    """

    covariance: Float[Array, "D D"]
    ridge: Float[Array, ""]


def elliptical_init(
    size: int, *, ridge: float = 1.0, dtype: jnp.dtype | type = jnp.float32
) -> Ellipsoid:
    """Λ = λ I, before any data.

    Args:
      size: D, entries of a feature vector, ≥ 1.
      ridge: λ > 0. Rounding loses a ridge below the dtype's epsilon times the largest entry of Λ.
      dtype: float32 or float64.

    Raises:
      ValueError: a number out of range.
    """
    _checks.in_range("size", size, 1)
    _checks.in_range("ridge", ridge, 0.0, low_open=True)
    return Ellipsoid(ridge * jnp.eye(size, dtype=dtype), jnp.asarray(ridge, dtype))


def elliptical_update(
    state: Ellipsoid,
    features: Float[Array, "*N D"],
    *,
    weights: Float[Array, "*N"] | None = None,
    decay: float = 1.0,
) -> Ellipsoid:
    """Λ ← ρ Λ + (1 - ρ) λ I + Σ_n w_n φ_n φ_nᵀ.

    Args:
      state: from `elliptical_init` or an earlier update.
      features: φ, `[..., D]`.
      weights: w ≥ 0, `[...]`, such as 0 for padding; None for ones.
      decay: ρ in [0, 1], what is left of older data; 1 forgets nothing. The ridge stays.

    Returns:
      the new state, in its own dtype.

    Raises:
      ValueError: features of another size or dtype, weights of another shape, ρ outside [0, 1].

    Source: Abbasi-Yadkori, Pál and Szepesvári 2011 (OFUL); of learned features Qiu et al. 2022
    (Contrastive UCB), arXiv 2207.14800.
    """
    _checks.in_range("decay", decay, 0.0, 1.0)
    x = _features(state, features)
    if weights is not None:
        _checks.floating(weights=weights)
        if np.shape(weights) != x.shape[:-1]:
            raise ValueError(f"weights: expected shape {x.shape[:-1]}, got {np.shape(weights)}")
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    # Roots of weights would have an infinite slope at 0.
    weighted = rows if weights is None else rows * jnp.reshape(weights, (-1, 1)).astype(x.dtype)
    prior = (1.0 - decay) * state.ridge * jnp.eye(size, dtype=x.dtype)
    return state._replace(covariance=decay * state.covariance + prior + rows.T @ weighted)


def elliptical_bonus(
    state: Ellipsoid,
    features: Float[Array, "*N D"],
    *,
    scale: float | Float[Array, ""] = 1.0,
    cap: float = float("inf"),
) -> Float[Array, "*N"]:
    """min(γ √(φᵀ Λ⁻¹ φ), cap): large where few features pointed the same way.

    For one-hot features it is γ / √(λ + n), n the visits; for a linear model it is γ standard
    deviations of its prediction. To explore, add it to the reward.

    Args:
      state: of what was met.
      features: φ, `[..., D]`, differentiable; the slope at φ = 0 is 0.
      scale: γ ≥ 0.
      cap: largest bonus, ≥ 0; Contrastive UCB takes the horizon.

    Returns:
      f32 or wider, `[...]`. 0 where a traced Λ is not positive definite up to rounding, as the
      authors' code has it.

    Raises:
      ValueError: features of another size or dtype, a number out of range, a concrete Λ that is not
        symmetric and positive definite.

    Source: as `elliptical_update`. Solved by a Cholesky factor; no inverse is formed.
    """
    _checks.in_range("scale", scale, 0.0)
    _checks.in_range("cap", cap, 0.0)
    x = _features(state, features)
    gp.symmetric("state.covariance", state.covariance)
    factor = jnp.linalg.cholesky(state.covariance)
    if _checks.is_concrete(factor) and not np.isfinite(np.asarray(factor)).all():
        raise ValueError("state.covariance: expected a positive definite matrix")
    rows = x.reshape(-1, x.shape[-1])
    away = jax.scipy.linalg.solve_triangular(factor, rows.T, lower=True)
    squared = jnp.sum(jnp.square(away), axis=0).reshape(x.shape[:-1])
    bonus = scale * safe_sqrt(jnp.where(jnp.isfinite(squared), squared, 0.0))
    return jnp.minimum(bonus, cap)


def _features(state: Ellipsoid, features: Array) -> Array:
    _checks.floating(features=features)
    size = state.covariance.shape[-1]
    if np.ndim(features) < 1 or np.shape(features)[-1] != size:
        raise ValueError(f"features: expected shape [..., {size}], got {np.shape(features)}")
    return widened(features).astype(state.covariance.dtype)
