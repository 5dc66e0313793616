"""Generalised Gaussian errors of scale 1: a shape that says how heavy their tails are.

The density of an error δ is β exp(-|δ|^β) / (2 Γ(1/β)): Laplace's for β = 1, the normal one of
variance 1/2 for β = 2; a larger β has lighter tails and a smaller variance.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened

_LARGEST_LOG = 80.0  # of a power, whose exponential is still a float32


def ggd_nll(errors: Float[Array, "*B"], shapes: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """|δ|^β - log β + log Γ(1/β): the negative log-likelihood, less log 2.

    Args:
      errors: δ, `[...]`, differentiable; the slope at 0 is taken to be 0, where for β ≤ 1 there is
        none.
      shapes: β > 0, of the same shape, differentiable; `jax.nn.softplus` of a network's head.

    Returns:
      f32 of the same shape, finite for finite errors: |δ|^β is cut off at exp(80), with slope 0
      beyond.

    Raises:
      ValueError: unequal shapes, wrong dtypes, concrete β not above 0.

    Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295, the loss of the paper; its code has
    `ggd_linear_loss`.
    """
    delta, beta = _pair(errors, shapes)
    size = jnp.abs(delta)
    # Neither log 0 nor its slope may be met where the error is 0.
    away = size > 0
    power = jnp.exp(jnp.minimum(beta * jnp.log(jnp.where(away, size, 1.0)), _LARGEST_LOG))
    return jnp.where(away, power, 0.0) + _normaliser(beta)


def ggd_linear_loss(errors: Float[Array, "*B"], shapes: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """|δ| β - log β + log Γ(1/β): `ggd_nll` with a product for the power, equal at β = 1.

    In δ it is an absolute error whatever β is, so its minimiser is a median of the targets.

    Args:
      errors: δ, `[...]`, differentiable.
      shapes: β > 0, of the same shape, differentiable.

    Returns:
      f32 of the same shape.

    Raises:
      ValueError: as `ggd_nll`.

    Source: the authors' code of Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
    """
    delta, beta = _pair(errors, shapes)
    return jnp.abs(delta) * beta + _normaliser(beta)


def gaussian_nll(errors: Float[Array, "*B"], variances: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """(δ²/σ² + log σ²) / 2: the negative log-likelihood of a normal error, less log(2π)/2.

    Args:
      errors: δ, `[...]`, differentiable.
      variances: σ² > 0, of the same shape, differentiable.

    Returns:
      f32 of the same shape.

    Raises:
      ValueError: unequal shapes, wrong dtypes, concrete σ² not above 0.

    Source: Nix and Weigend 1994; for temporal differences Mai et al. 2022, arXiv 2201.01666.
    """
    _checks.floating(errors=errors, variances=variances)
    _checks.same_shape(errors=errors, variances=variances)
    _positive("variances", variances)
    square = jnp.square(widened(errors)) / widened(variances)
    return 0.5 * (square + jnp.log(widened(variances)))


def ggd_variance(shapes: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Γ(3/β) / Γ(1/β): 2 for Laplace's, 1/2 for the normal, 1/3 in the limit of a uniform one.

    Raises:
      ValueError: a wrong dtype, concrete β not above 0.
    """
    beta = _shape(shapes)
    return jnp.exp(gammaln(3.0 / beta) - gammaln(1.0 / beta))


def ggd_kurtosis(shapes: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Γ(5/β) Γ(1/β) / Γ(3/β)²: 6 for Laplace's, 3 for the normal, 9/5 for a uniform one.

    Raises:
      ValueError: a wrong dtype, concrete β not above 0.
    """
    beta = _shape(shapes)
    return jnp.exp(gammaln(5.0 / beta) + gammaln(1.0 / beta) - 2.0 * gammaln(3.0 / beta))


def risk_averse_weights(shapes: Float[Array, "*B"], *, axis: int = -1) -> Float[Array, "*B"]:
    """β_m / Σ_m' β_m': among members of an ensemble, more for those that expect lighter tails.

    Args:
      shapes: β > 0, `[...]`, differentiable. The authors' code differentiates the weights as well;
        detach them for weights that are only that.
      axis: of the members.

    Returns:
      f32 of the same shape, summing to 1 over the axis.

    Raises:
      ValueError: a wrong dtype, concrete β not above 0, an axis that is not there.

    Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
    """
    beta = _shape(shapes)
    if not -beta.ndim <= axis < beta.ndim:
        raise ValueError(f"axis: expected one of shape {beta.shape}, got {axis}")
    return beta / beta.sum(axis, keepdims=True)


def sample_ggd(
    key: Any, shapes: Float[Array, "*B"], shape: tuple[int, ...] = ()
) -> Float[Array, "*N *B"]:
    """Errors of these shapes: |δ|^β is a gamma variable of parameter 1/β, and the sign a coin.

    Args:
      key: of the draws.
      shapes: β > 0, `[...]`.
      shape: of axes in front, for several of each.

    Returns:
      f32 `[*shape, ...]`.

    Raises:
      ValueError: a wrong dtype, concrete β not above 0.
    """
    beta = _shape(shapes)
    size_key, sign_key = jax.random.split(key)
    whole = (*shape, *beta.shape)
    size = jax.random.gamma(size_key, 1.0 / beta, whole) ** (1.0 / beta)
    return jnp.where(jax.random.bernoulli(sign_key, 0.5, whole), size, -size)


def _normaliser(beta: Array) -> Array:
    return gammaln(1.0 / beta) - jnp.log(beta)


def _pair(errors: Array, shapes: Array) -> tuple[Array, Array]:
    _checks.floating(errors=errors, shapes=shapes)
    _checks.same_shape(errors=errors, shapes=shapes)
    return widened(errors), _shape(shapes)


def _shape(shapes: Array) -> Array:
    _checks.floating(shapes=shapes)
    _positive("shapes", shapes)
    return widened(shapes)


def _positive(name: str, x: Array) -> None:
    if _checks.is_concrete(x) and not np.all(np.asarray(x, np.float64) > 0):
        raise ValueError(f"{name}: expected numbers > 0, got {np.min(np.asarray(x, np.float64))}")
