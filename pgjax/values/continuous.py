"""Temporal differences in continuous time, learnt along a path or solved for linear values.

Each finds the parameters at which test functions are orthogonal to the increments of
`values.martingale`; those of a whole path at once are `martingale.orthogonality`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.values import martingale

ValueFunction = Callable[[Any, Float[Array, ""], Any], Float[Array, ""]]


def ctd_online(
    value: ValueFunction,
    params: Any,
    states: Any,
    rewards: Float[Array, " n"],
    *,
    learning_rate: float,
    dt: float,
    rho: float = 0.0,
    terminal: float | Float[Array, ""] | None = None,
) -> tuple[Any, Float[Array, " n"]]:
    """CTD(0) along one path: `θ ← θ + α ∇J(t_i, X_i) δ_i` at every step, with δ at the current θ.

    The increments shrink like √dt by themselves, so α does not depend on dt.

    Args:
      value: `(params, t, x) -> J`, a scalar.
      params: pytree of floating arrays.
      states: X at the times 0, dt, …, n dt: pytree with leaves `[n + 1, ...]`.
      rewards: r, rates, at the first n times.
      learning_rate: α > 0.
      dt: > 0.
      rho: discount rate ≥ 0.
      terminal: h, in the place of the last value; None where the family gives it or the path is a
        piece of one that goes on.

    Returns:
      the parameters after the path; δ as it was met, f32 `[n]`.

    Raises:
      ValueError: not one state more than rewards, wrong dtypes, numbers out of range.

    Source: Jia and Zhou 2022, arXiv 2108.06655; Doya 2000.
    """
    options = {"learning_rate": learning_rate, "dt": dt, "rho": rho, "terminal": terminal}
    return _online(value, params, states, rewards, decay=0.0, gain=1.0, **options)


def ctd_lambda_online(
    value: ValueFunction,
    params: Any,
    states: Any,
    rewards: Float[Array, " n"],
    *,
    lambda_: float,
    learning_rate: float,
    dt: float,
    rho: float = 0.0,
    terminal: float | Float[Array, ""] | None = None,
) -> tuple[Any, Float[Array, " n"]]:
    """CTD(λ) along one path: `z ← λ^dt z + ∇J dt`, `θ ← θ + α z δ_i`, from z = 0.

    Args:
      value, params, states, rewards, learning_rate, dt, rho, terminal: as in `ctd_online`.
      lambda_: λ in (0, 1], of a unit of time.

    Returns, raises: as `ctd_online`.

    Source: as `ctd_online`.
    """
    _checks.in_range("lambda_", lambda_, 0.0, 1.0, low_open=True)
    options = {"learning_rate": learning_rate, "dt": dt, "rho": rho, "terminal": terminal}
    decay = jnp.asarray(lambda_, jnp.result_type(float)) ** dt
    return _online(value, params, states, rewards, decay=decay, gain=dt, **options)


def clstd(
    features: Float[Array, "*B n+1 P"],
    rewards: Float[Array, "*B n"],
    *,
    dt: float,
    rho: float = 0.0,
    known: Float[Array, "*B n+1"] | None = None,
    test_functions: Float[Array, "*B n P"] | None = None,
) -> Float[Array, " P"]:
    """The θ at which `J = J_known + θᵀφ` has `Σ ξ_i δ_i = 0` over all steps of all paths.

        θ = (Σ ξ_i (φ_i - φ_{i+1} + ρ φ_i dt)ᵀ)⁻¹ Σ ξ_i (r_i dt + δ_i of J_known).

    Exact on any sample where no noise enters the increments, else of order 1 / √paths.

    Args:
      features: φ at the n + 1 times. Where a path ends with a known value, they are 0 in the last
        place and the value stands in that of `known`.
      rewards: r, rates, at the first n times.
      dt: > 0.
      rho: ρ ≥ 0.
      known: a part of J without parameters; None for 0.
      test_functions: ξ; None for φ. `trace_test_functions` of φ makes it LSTD(λ).

    Returns:
      f32 `[P]`.

    Raises:
      ValueError: wrong shapes or dtypes, numbers out of range; concrete features that do not
        determine θ, such as fewer steps than features.

    Source: Jia and Zhou 2022, arXiv 2108.06655; LSTD by Bradtke and Barto 1996.
    """
    _checks.floating(features=features, known=known, test_functions=test_functions)
    wanted = (*np.shape(rewards)[:-1], *(x + 1 for x in np.shape(rewards)[-1:]))
    if np.ndim(features) != len(wanted) + 1 or np.shape(features)[:-1] != wanted:
        raise ValueError(
            f"features: expected shape {(*wanted, 'P')}, one more than rewards, "
            f"got {np.shape(features)}"
        )
    phi = widened(features)
    size = phi.shape[-1]
    xi = phi[..., :-1, :] if test_functions is None else widened(test_functions)
    if xi.shape != (*np.shape(rewards), size):
        raise ValueError(
            f"test_functions: expected shape {(*np.shape(rewards), size)}, got {xi.shape}"
        )
    columns, none = jnp.moveaxis(phi, -1, 0), jnp.zeros((size, *np.shape(rewards)), phi.dtype)
    slopes = martingale.increments(columns, none, dt=dt, rho=rho).reshape(size, -1)
    offset = jnp.zeros(wanted, phi.dtype) if known is None else known
    rest = martingale.increments(offset, rewards, dt=dt, rho=rho).reshape(-1)
    rows = xi.reshape(-1, size)
    matrix = -rows.T @ slopes.T
    _determined(matrix)
    return jnp.linalg.solve(matrix, rows.T @ rest)


def _online(
    value: ValueFunction,
    params: Any,
    states: Any,
    rewards: Any,
    *,
    decay: Any,
    gain: Any,
    learning_rate: Any,
    dt: Any,
    rho: Any,
    terminal: Any,
) -> tuple[Any, Array]:
    _checks.rank("rewards", rewards, 1)
    _checks.floating(rewards=rewards)
    _checks.in_range("learning_rate", learning_rate, 0.0, low_open=True)
    _checks.in_range("dt", dt, 0.0, low_open=True)
    _checks.in_range("rho", rho, 0.0)
    r = widened(rewards)
    steps = r.size
    for leaf in jax.tree.leaves(states):
        if np.ndim(leaf) < 1 or np.shape(leaf)[0] != steps + 1:
            raise ValueError(
                f"states: expected {steps + 1} rows, one more than rewards, got {np.shape(leaf)}"
            )
    params = jax.tree.map(widened, params)
    last = jnp.arange(steps) == steps - 1
    end = jnp.zeros((), r.dtype) if terminal is None else jnp.asarray(terminal, r.dtype)

    def step(carry: tuple[Any, Any], given: Any) -> tuple[tuple[Any, Any], Array]:
        params, trace = carry
        i, x, after, reward, at_end = given
        now, slope = jax.value_and_grad(value)(params, i * dt, x)
        then = value(params, (i + 1) * dt, after)
        if terminal is not None:
            then = jnp.where(at_end, end, then)
        delta = then - now + (reward - rho * now) * dt
        trace = jax.tree.map(lambda z, g: (decay * z + gain * g).astype(z.dtype), trace, slope)
        params = jax.tree.map(
            lambda p, z: (p + learning_rate * delta * z).astype(p.dtype), params, trace
        )
        return (params, trace), delta

    before = jax.tree.map(lambda x: jnp.asarray(x)[:-1], states)
    after = jax.tree.map(lambda x: jnp.asarray(x)[1:], states)
    start = (params, jax.tree.map(jnp.zeros_like, params))
    steps_of = (jnp.arange(steps, dtype=r.dtype), before, after, r, last)
    (params, _), delta = jax.lax.scan(step, start, steps_of)
    return params, delta


def _determined(matrix: Array) -> None:
    if _checks.is_concrete(matrix):
        least = 1.0 / np.finfo(matrix.dtype).eps
        found = np.linalg.cond(np.asarray(matrix))
        if not found < least:
            raise ValueError(
                f"features: expected steps that determine all {matrix.shape[0]} of them, got a "
                f"system of condition number {found:.2g}"
            )
