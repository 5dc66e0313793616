"""Gradient descent, heavy ball, Nesterov's and the triple momentum method as one family.

    x_{k+1} = (1 + b) x_k - b x_{k-1} - a ∇f(y_k)
    y_k     = (1 + c) x_k - c x_{k-1}                  where to evaluate
    z_k     = (1 + e) x_k - e x_{k-1}                  what to report

For μ-strongly convex f with L-smooth gradients, κ = L / μ. Their limits for small steps are in
`ode`. Source of the comparison: Parimi et al., Dynamics of acceleration, 2025, arXiv 2509.18346.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.optim import points

Coefficient = Any
"""A number, or a schedule: the count of updates so far to a number."""


class MomentumParams(NamedTuple):
    """Step a, momentum b, shift c of the query point, shift e of the output."""

    a: Coefficient
    b: Coefficient
    c: Coefficient
    e: Coefficient


class ThreeParameterState(NamedTuple):
    """How many updates there were, and the parameters one update ago."""

    step: Int[Array, ""]
    previous: Any


def gd_params(mu: float, smoothness: float) -> MomentumParams:
    """Gradient descent, a = 2 / (L + μ): rate (κ - 1) / (κ + 1) on quadratics.

    Args:
      mu: above 0.
      smoothness: L, at least μ.

    Raises:
      ValueError: a number out of range.
    """
    _kappa(mu, smoothness)
    return MomentumParams(2 / (smoothness + mu), 0.0, 0.0, 0.0)


def heavy_ball_params(mu: float, smoothness: float) -> MomentumParams:
    """Polyak's heavy ball: rate √b on quadratics; on other functions it may cycle.

        a = 4 / (√L + √μ)²,   b = ((√κ - 1) / (√κ + 1))²,   c = e = 0

    Args:
      mu: above 0.
      smoothness: L, at least μ.

    Raises:
      ValueError: a number out of range.

    Source: Polyak, 1964; the cycle: Lessard, Recht and Packard, 2016, arXiv 1408.3595.
    """
    root = math.sqrt(_kappa(mu, smoothness))
    step = 4 / (math.sqrt(smoothness) + math.sqrt(mu)) ** 2
    return MomentumParams(step, ((root - 1) / (root + 1)) ** 2, 0.0, 0.0)


def nesterov_params(mu: float, smoothness: float) -> MomentumParams:
    """Nesterov's method for strongly convex functions: rate 1 - 1/√κ on quadratics.

        a = 1 / L,   b = c = (√κ - 1) / (√κ + 1),   e = 0

    Distances shrink by at least √(1 - 1/√κ) a step, up to a constant, for every such f.

    Args:
      mu: above 0.
      smoothness: L, at least μ.

    Raises:
      ValueError: a number out of range.
    """
    root = math.sqrt(_kappa(mu, smoothness))
    weight = (root - 1) / (root + 1)
    return MomentumParams(1 / smoothness, weight, weight, 0.0)


def triple_momentum_params(mu: float, smoothness: float) -> MomentumParams:
    """The triple momentum method: rate ρ = 1 - 1/√κ for every such f, not only quadratics.

        a = (1 + ρ) / L,   b = ρ² / (2 - ρ),   c = ρ² / ((1 + ρ) (2 - ρ)),   e = ρ² / (1 - ρ²)

    Args:
      mu: above 0.
      smoothness: L, at least μ.

    Raises:
      ValueError: a number out of range.

    Source: Van Scoy, Freeman and Lynch, The fastest known globally convergent first-order method,
    2018.
    """
    rho = 1 - 1 / math.sqrt(_kappa(mu, smoothness))
    b = rho**2 / (2 - rho)
    return MomentumParams((1 + rho) / smoothness, b, b / (1 + rho), rho**2 / (1 - rho**2))


def convex_nesterov_params(smoothness: float, *, total: int) -> MomentumParams:
    """Nesterov's method for convex functions: `f(x_k) - f* ≤ 2 L ‖x_0 - x*‖² / (k + 1)²`.

        a = 1 / L,   b_k = c_k = (t_k - 1) / t_{k+1},   t_{k+1} = (1 + √(1 + 4 t_k²)) / 2,   t_1 = 1

    Args:
      smoothness: L above 0.
      total: how many updates there will be, at least 1, static: the b_k come from a table, whose
        last entry stays.

    Raises:
      ValueError: a number out of range.

    Source: Nesterov, 1983; Beck and Teboulle, 2009.
    """
    _checks.in_range("smoothness", smoothness, 0, math.inf, low_open=True, high_open=True)
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise ValueError(f"total: expected an integer of at least 1, got {total!r}")
    now, weights = 1.0, np.empty(total)
    for k in range(total):
        ahead = (1 + math.sqrt(1 + 4 * now * now)) / 2
        weights[k], now = (now - 1) / ahead, ahead

    def weight(count: Any) -> Array:
        return jnp.asarray(weights)[jnp.minimum(jnp.asarray(count), total - 1)]

    return MomentumParams(1 / smoothness, weight, weight, 0.0)


def three_parameter_method(coefficients: MomentumParams) -> optax.GradientTransformationExtraArgs:
    """The family's step: updates are x_{k+1} - x_k, to be added, from gradients at `query_point`.

        state = method.init(x)
        gradient = grad_f(query_point(coefficients, state, x))
        updates, state = method.update(gradient, state, x)

    With b = c = e = 0 it is `optax.sgd(a)`.

    Raises:
      ValueError: a step a that is not above 0; on update, no `params`, or another tree than at
        `init`.
    """
    if not callable(coefficients.a):
        _checks.in_range("a", coefficients.a, 0, low_open=True)

    def init(params: Any) -> ThreeParameterState:
        return ThreeParameterState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(
        updates: Any, state: ThreeParameterState, params: Any = None, **others: Any
    ) -> tuple[Any, ThreeParameterState]:
        del others
        if params is None:
            raise ValueError("params: expected the present parameters in update, got None")
        points.same_tree("params", params, "the state's previous", state.previous)
        points.same_tree("updates", updates, "params", params)
        a, b = _now(coefficients.a, state.step), _now(coefficients.b, state.step)

        def step(g: Array, x: Array, before: Array) -> Array:
            return (b * (widened(x) - widened(before)) - a * widened(g)).astype(jnp.result_type(g))

        steps = jax.tree.map(step, updates, params, state.previous)
        previous = jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), params, state.previous)
        return steps, ThreeParameterState(optax.safe_increment(state.step), previous)

    return optax.GradientTransformationExtraArgs(init, update)


def query_point(coefficients: MomentumParams, state: ThreeParameterState, params: Any) -> Any:
    """Where the next gradient belongs: `(1 + c) x_k - c x_{k-1}`.

    Raises:
      ValueError: another tree than at `init`.
    """
    return points.lookahead(params, state.previous, _now(coefficients.c, state.step))


def output_point(coefficients: MomentumParams, state: ThreeParameterState, params: Any) -> Any:
    """The estimate of the optimum: `(1 + e) x_k - e x_{k-1}`.

    Raises:
      ValueError: another tree than at `init`.
    """
    return points.lookahead(params, state.previous, _now(coefficients.e, state.step))


def quadratic_rate(
    coefficients: MomentumParams,
    eigenvalues: Float[Array, " n"],
    *,
    bounds: tuple[float, float] | None = None,
) -> Float[Array, ""]:
    """Factor by which errors shrink a step, in the long run, on a quadratic of these eigenvalues.

        max_λ spectral radius of [[1 + b - a λ (1 + c), -(b - a λ c)], [1, 0]]

    Args:
      coefficients: numbers, not schedules.
      eigenvalues: λ of the Hessian, `[n]`, n at least 1.
      bounds: (μ, L) that the coefficients were made for; None: not looked at.

    Returns:
      Scalar, float32 or wider; above 1 where the method diverges. Near double roots (the ends of
      the spectrum for heavy ball) only half the digits are right.

    Raises:
      ValueError: a wrong rank or dtype, no eigenvalue, a schedule among the coefficients.

    Warns:
      UserWarning: concrete eigenvalues outside the bounds.
    """
    _checks.rank("eigenvalues", eigenvalues, 1)
    _checks.floating(eigenvalues=eigenvalues)
    if not np.size(eigenvalues):
        raise ValueError("eigenvalues: expected at least one, got none")
    if any(callable(x) for x in coefficients):
        raise ValueError("coefficients: expected numbers, got a schedule")
    if bounds is not None and _checks.is_concrete(eigenvalues):
        low, high = float(np.min(eigenvalues)), float(np.max(eigenvalues))
        if low < bounds[0] * (1 - 1e-6) or high > bounds[1] * (1 + 1e-6):
            text = f"eigenvalues: the coefficients are for {bounds}, got values in {(low, high)}"
            warnings.warn(text, stacklevel=2)
    a, b, c, _ = coefficients
    values = widened(eigenvalues)
    trace = 1 + b - a * values * (1 + c)
    product = b - a * values * c
    square = trace**2 - 4 * product
    real = (jnp.abs(trace) + jnp.sqrt(jnp.maximum(square, 0.0))) / 2
    return jnp.max(jnp.where(square < 0, jnp.sqrt(jnp.maximum(product, 0.0)), real))


def _kappa(mu: float, smoothness: float) -> float:
    _checks.in_range("mu", mu, 0, math.inf, low_open=True, high_open=True)
    _checks.in_range("smoothness", smoothness, mu, math.inf, high_open=True)
    return smoothness / mu


def _now(coefficient: Coefficient, count: Array) -> Any:
    """The value at this count."""
    return coefficient(count) if callable(coefficient) else coefficient
