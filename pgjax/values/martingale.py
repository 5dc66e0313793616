"""Values in continuous time, by the martingale that a right one makes of every path.

J is the value of a policy exactly where `M_t = e^{-ρt} J(t, X_t) + ∫₀ᵗ e^{-ρs} r_s ds` is a
martingale and J is the terminal reward at the end.

On a grid `t_i = i dt`, i = 0 … n, the increments of M are temporal differences. Their mean square
is the wrong thing to minimise: as dt goes to 0 it measures M's quadratic variation, which a wrong J
can have less of. Right are the distance to the returns (`martingale_loss`, Monte Carlo) and
orthogonality, `E ∫ ξ_t dM_t = 0` for test functions ξ that know the path up to t alone: increments
weighted by the value's gradient are CTD(0), by its trace CTD(λ), solved for linear values CLSTD,
with the squared expectation as a loss GTD.

Time is the last axis of scalars, `[..., n]`, and the last but one of vectors, `[..., n, P]`; values
have one entry more than rewards. Where a path has an end with a known value h, put it in the
place of the last value, or build it into the family.

Source: Jia and Zhou 2022, arXiv 2108.06655.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks, returns
from pgjax._arrays import widened


def increments(
    values: Float[Array, "*B n+1"], rewards: Float[Array, "*B n"], *, dt: float, rho: float = 0.0
) -> Float[Array, "*B n"]:
    """`δ_i = J_{i+1} - J_i + (r_i - ρ J_i) dt`: the martingale's increments to first order.

    For average reward, subtract its estimate from the rewards and take ρ = 0.

    Args:
      values: J at the n + 1 times of the grid.
      rewards: r, rates: reward in a unit of time.
      dt: > 0.
      rho: discount rate ρ ≥ 0.

    Returns:
      f32 `[..., n]`, differentiable in both values.

    Raises:
      ValueError: not one value more than rewards, other shapes or dtypes, numbers out of range.
    """
    v, r = _path(values, rewards, dt, rho)
    return v[..., 1:] - v[..., :-1] + (r - rho * v[..., :-1]) * dt


def exact_increments(
    values: Float[Array, "*B n+1"], rewards: Float[Array, "*B n"], *, dt: float, rho: float = 0.0
) -> Float[Array, "*B n"]:
    """`δ_i = e^{-ρ dt} J_{i+1} - J_i + r_i (1 - e^{-ρ dt}) / ρ`, for rewards constant in each step.

    Args, returns, raises: as `increments`, from which it differs by a term of order dt².
    """
    v, r = _path(values, rewards, dt, rho)
    rate = jnp.asarray(rho, v.dtype)
    none = rate == 0
    weight = jnp.where(none, dt, -jnp.expm1(-rate * dt) / jnp.where(none, 1.0, rate))
    return jnp.exp(-rate * dt) * v[..., 1:] - v[..., :-1] + weight * r


def mean_square_td_error(delta: Float[Array, "*B n"], *, dt: float) -> Float[Array, "*B"]:
    """`½ Σ_i (δ_i / dt)² dt` of each path: the naive objective, which has the wrong minimum.

    dt times its expectation goes to half the expected quadratic variation of M. Kept as the
    baseline that the others are measured against.

    Args:
      delta: increments, `[..., n]`.
      dt: > 0.

    Raises:
      ValueError: no time axis, a dtype that is not floating, dt ≤ 0.
    """
    d = _series("delta", delta)
    _checks.in_range("dt", dt, 0.0, low_open=True)
    return 0.5 * jnp.sum(jnp.square(d), axis=-1) / dt


def path_returns(
    rewards: Float[Array, "*B n"],
    terminal: Float[Array, "*B"] | float,
    *,
    dt: float,
    rho: float = 0.0,
) -> Float[Array, "*B n"]:
    """`G_i = e^{-ρ(T - t_i)} h + Σ_{j ≥ i} e^{-ρ(t_j - t_i)} r_j dt`.

    Args:
      rewards: r, rates.
      terminal: h at the end of each path.
      dt: > 0.
      rho: ρ ≥ 0.

    Raises:
      ValueError: wrong shapes or dtypes, numbers out of range.
    """
    r = _series("rewards", rewards)
    _step(dt, rho)
    discounts = jnp.full_like(r, jnp.exp(-jnp.asarray(rho * dt, r.dtype)))
    return returns.discounted(r * dt, discounts, bootstrap=terminal)


def martingale_loss(
    values: Float[Array, "*B n"],
    rewards: Float[Array, "*B n"],
    terminal: Float[Array, "*B"] | float,
    *,
    dt: float,
    rho: float = 0.0,
) -> Float[Array, "*B"]:
    """`½ Σ_i (G_i - J_i)² dt` of each path, G the returns: `E[M_T - M_t]²` over time.

    Its minimum over a family is the best approximation of the true value in mean square.

    Args:
      values: J at the first n times; the end is given by `terminal`.
      rewards, terminal, dt, rho: as in `path_returns`; returns are detached.

    Raises:
      ValueError: as `path_returns`; values of another shape than rewards.
    """
    _checks.same_shape(rewards=rewards, values=values)
    v = _series("values", values)
    target = jax.lax.stop_gradient(path_returns(rewards, terminal, dt=dt, rho=rho))
    return 0.5 * jnp.sum(jnp.square(target - v), axis=-1) * dt


def trace_test_functions(
    gradients: Float[Array, "*B n P"], *, lambda_: float, dt: float
) -> Float[Array, "*B n P"]:
    """`z_i = λ^dt z_{i-1} + ∇J_i dt` from z = 0 before each path: the test functions of CTD(λ).

    `∫₀ᵗ λ^{t-s} ∇J_s ds` in the limit; λ = 1 keeps everything, λ towards 0 leaves ∇J_i dt. With
    dt = 1 it is the eligibility trace of TD(λ) with λ for γλ.

    Args:
      gradients: ∇_θ J at the first n times.
      lambda_: in (0, 1], of a unit of time.
      dt: > 0.

    Raises:
      ValueError: fewer than two axes, a dtype that is not floating, numbers out of range.
    """
    g = _vectors("gradients", gradients)
    _checks.in_range("lambda_", lambda_, 0.0, 1.0, low_open=True)
    _checks.in_range("dt", dt, 0.0, low_open=True)
    inputs = jnp.moveaxis(g, -2, -1) * dt
    kept = jnp.full_like(inputs, jnp.asarray(lambda_, g.dtype) ** dt)
    return jnp.moveaxis(returns.linear_recurrence(kept, inputs), -1, -2)


def orthogonality(
    test_functions: Float[Array, "*B n P"], delta: Float[Array, "*B n"]
) -> Float[Array, "*B P"]:
    """`Σ_i ξ_i δ_i` of each path: the direction of one update of CTD after a whole path.

    `θ += α` times it is gradient-free stochastic approximation of `E ∫ ξ dM = 0`. With ξ the
    value's gradient it is CTD(0), with `trace_test_functions` CTD(λ). Optimizers descend, so they
    take its negative.

    Args:
      test_functions: ξ at the first n times; ξ_i may use the path up to t_i and nothing after it,
        else the true value is no root. That cannot be checked here.
      delta: increments.

    Returns:
      f32 `[..., P]`, detached.

    Raises:
      ValueError: wrong shapes or dtypes.
    """
    return jax.lax.stop_gradient(_moment(test_functions, delta))


def gtd_objective(
    test_functions: Float[Array, "*B n P"],
    delta: Float[Array, "*B n"],
    *,
    weight: Float[Array, "P P"] | None = None,
) -> Float[Array, ""]:
    """`½ mᵀ A m` with `m = E[Σ_i ξ_i δ_i]` over the paths: orthogonality as a loss.

    Args:
      test_functions: ξ, detached here; as in `orthogonality`.
      delta: increments, differentiable.
      weight: A, symmetric and positive definite; None for the identity (GTD's norm of the expected
        update). The inverse of `E ∫ ξ ξᵀ dt`, from `gram_of_test_functions`, gives GTD2's and TDC's
        projected error.

    Returns:
      f32 scalar. From finitely many paths it is too large by ½ tr(A Cov[m]) on average.

    Raises:
      ValueError: wrong shapes or dtypes.
    """
    every = _moment(jax.lax.stop_gradient(jnp.asarray(test_functions)), delta)
    m = jnp.mean(every.reshape(-1, every.shape[-1]), axis=0)
    if weight is None:
        return 0.5 * m @ m
    _checks.floating(weight=weight)
    if np.shape(weight) != (m.size, m.size):
        raise ValueError(f"weight: expected shape {(m.size, m.size)}, got {np.shape(weight)}")
    return 0.5 * m @ widened(weight) @ m


def gram_of_test_functions(
    test_functions: Float[Array, "*B n P"], *, dt: float
) -> Float[Array, "P P"]:
    """`E ∫ ξ ξᵀ dt` over the paths, `[P, P]`: the Gram matrix of the test functions.

    Raises:
      ValueError: wrong shapes or dtypes, dt ≤ 0.
    """
    xi = _vectors("test_functions", test_functions)
    _checks.in_range("dt", dt, 0.0, low_open=True)
    rows = xi.reshape(-1, xi.shape[-1])
    return rows.T @ rows * (dt * xi.shape[-2] / rows.shape[0])


def _moment(test_functions: Any, delta: Any) -> Array:
    xi, d = _vectors("test_functions", test_functions), _series("delta", delta)
    if xi.shape[:-1] != d.shape:
        raise ValueError(f"test_functions: expected shape {(*d.shape, 'P')}, got {xi.shape}")
    return jnp.einsum("...ip,...i->...p", xi, d)


def _path(values: Any, rewards: Any, dt: Any, rho: Any) -> tuple[Array, Array]:
    v, r = _series("values", values), _series("rewards", rewards)
    _step(dt, rho)
    if v.shape != (*r.shape[:-1], r.shape[-1] + 1):
        wanted = (*r.shape[:-1], r.shape[-1] + 1)
        raise ValueError(f"values: expected shape {wanted}, one more than rewards, got {v.shape}")
    return v, r


def _step(dt: Any, rho: Any) -> None:
    _checks.in_range("dt", dt, 0.0, low_open=True)
    _checks.in_range("rho", rho, 0.0)


def _series(name: str, x: Any) -> Array:
    if np.ndim(x) < 1 or np.shape(x)[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., n] with n ≥ 1, got {np.shape(x)}")
    _checks.floating(**{name: x})
    return widened(x)


def _vectors(name: str, x: Any) -> Array:
    if np.ndim(x) < 2 or np.shape(x)[-2] < 1:
        raise ValueError(f"{name}: expected shape [..., n, P] with n ≥ 1, got {np.shape(x)}")
    _checks.floating(**{name: x})
    return widened(x)
