"""Paths of diffusion processes `dX = b(t, X) dt + σ(t, X) dW` on an equidistant grid.

Time is the first axis of a path; `jax.vmap` over keys makes many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import widened

Coefficient = Callable[[Float[Array, ""], Float[Array, "*D"]], Float[Array, "*D"]]


def time_grid(horizon: float, dt: float) -> Float[np.ndarray, " n+1"]:
    """The times 0, dt, 2 dt, …, horizon, f64 `[n + 1]`, of a whole number n ≥ 1 of steps.

    Raises:
      ValueError: a horizon or step that is not above 0, a horizon that is no multiple of the step.
    """
    _checks.in_range("horizon", horizon, 0.0, low_open=True)
    _checks.in_range("dt", dt, 0.0, low_open=True)
    steps = round(horizon / dt)
    if steps < 1 or abs(steps * dt - horizon) > 1e-6 * horizon:
        raise ValueError(f"horizon: expected a multiple of dt = {dt}, got {horizon}")
    return np.linspace(0.0, horizon, steps + 1)


def euler_maruyama(
    key: PRNGKeyArray,
    drift: Coefficient,
    diffusion: Coefficient,
    start: Float[Array, "*D"],
    *,
    num_steps: int,
    dt: float,
) -> Float[Array, "n+1 ..."]:
    """`X_{i+1} = X_i + b(t_i, X_i) dt + σ(t_i, X_i) √dt ε`, ε ~ N(0, I).

    Args:
      key: of the noise.
      drift: b, `(t, x) -> [...]` of x's shape.
      diffusion: σ, likewise: each coordinate has its own noise.
      start: X_0, a scalar or `[...]`.
      num_steps: n ≥ 1.
      dt: > 0.

    Returns:
      X at the n + 1 times; differentiable in the start and in what the coefficients close over.

    Raises:
      ValueError: numbers out of range, a start that is not floating.

    Source: Maruyama 1955. The law at fixed times is right to order dt.
    """
    x = _started(start, num_steps, dt)
    noise = jnp.sqrt(dt) * jax.random.normal(key, (num_steps, *x.shape), x.dtype)

    def step(x: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        t, shock = given
        after = (x + drift(t, x) * dt + diffusion(t, x) * shock).astype(x.dtype)
        return after, after

    times = dt * jnp.arange(num_steps, dtype=x.dtype)
    return jnp.concatenate([x[None], jax.lax.scan(step, x, (times, noise))[1]])


def brownian_motion(
    key: PRNGKeyArray, start: Float[Array, "*D"], *, num_steps: int, dt: float
) -> Float[Array, "n+1 ..."]:
    """Standard Brownian motion from a start, exact at the times of the grid.

    Args, returns, raises: as `euler_maruyama`.
    """
    x = _started(start, num_steps, dt)
    noise = jnp.sqrt(dt) * jax.random.normal(key, (num_steps, *x.shape), x.dtype)
    return x + jnp.concatenate([jnp.zeros_like(x)[None], jnp.cumsum(noise, axis=0)])


def ornstein_uhlenbeck(
    key: PRNGKeyArray,
    start: Float[Array, "*D"],
    *,
    rate: float,
    volatility: float,
    num_steps: int,
    dt: float,
    mean: float = 0.0,
) -> Float[Array, "n+1 ..."]:
    """`dX = κ (m - X) dt + σ dW`, exact at the times of the grid.

    X_{i+1} is normal about `m + e^{-κ dt}(X_i - m)` with variance `σ² (1 - e^{-2κ dt}) / (2κ)`; the
    stationary variance is σ² / (2κ).

    Args:
      key, start, num_steps, dt: as in `euler_maruyama`.
      rate: κ > 0.
      volatility: σ ≥ 0.
      mean: m.

    Returns:
      X at the n + 1 times.

    Raises:
      ValueError: as `euler_maruyama`; a rate ≤ 0, a negative volatility.

    Source: Uhlenbeck and Ornstein 1930.
    """
    x = _started(start, num_steps, dt)
    _checks.in_range("rate", rate, 0.0, low_open=True)
    _checks.in_range("volatility", volatility, 0.0)
    decay = jnp.exp(-rate * jnp.asarray(dt, x.dtype))
    spread = volatility * jnp.sqrt(-jnp.expm1(-2 * rate * jnp.asarray(dt, x.dtype)) / (2 * rate))
    noise = spread * jax.random.normal(key, (num_steps, *x.shape), x.dtype)

    def step(x: Array, shock: Array) -> tuple[Array, Array]:
        after = mean + decay * (x - mean) + shock
        return after, after

    return jnp.concatenate([x[None], jax.lax.scan(step, x, noise)[1]])


def _started(start: Any, num_steps: int, dt: Any) -> Array:
    _checks.in_range("num_steps", num_steps, 1)
    _checks.in_range("dt", dt, 0.0, low_open=True)
    _checks.floating(start=start)
    return widened(start)
