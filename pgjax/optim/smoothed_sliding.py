"""Gradient sliding where the non-smooth part has a structure: smoothed, it is accelerated too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pgjax import _checks
from pgjax.optim import sliding
from pgjax.optim.sliding import Prox, SlidingTrace

DualOracle = Callable[[Any, Any], Any]
"""`(v, η)` to the y that maximises `<v, y> - J(y) - (η/2) ‖y‖²`."""


def accelerated_sliding(
    grad_f: Callable[[Any], Any],
    operator: Callable[[Any], Any],
    adjoint: Callable[[Any], Any],
    dual: DualOracle,
    prox_chi: Prox,
    x0: Any,
    *,
    mu: float,
    smoothness: float,
    operator_norm: float,
    eta0: float,
    n_outer: int,
    inner_factor: float = 2.0,
    most_inner: int = 10_000_000,
    metric: Callable[[Any], Any] | None = None,
) -> tuple[Any, SlidingTrace]:
    """Minimises `f + h + χ` with `h(u) = max_y <K u, y> - J(y)`, without restarts.

    Outer step k from 1, with γ and β as in `sliding.restart_free`, smooths h by `η = η₀ (1 - γ)^k`
    and minimises

        <∇f((1 - γ) x̄ + γ x), u> + h_η(u) + (β/2) ‖u - x‖² + χ(u),   ∇h_η(u) = Kᵀ y_η(u)

    by T accelerated proximal steps from x; then `x̄ ← (1 - γ) x̄ + γ x`. For errors of ε these are
    O(log 1/ε) gradients of f and O(1/√ε) pairs of K and Kᵀ:

        T = ⌈c √(‖K‖² / (η (β + μ)) + 1)⌉

    Args:
      grad_f: x to ∇f, L-smooth.
      operator: K, linear. adjoint: Kᵀ.
      dual: `(v, η)` to the y that maximises `<v, y> - J(y) - (η/2) ‖y‖²`.
      prox_chi: (v, w) to the u that minimises `χ(u) + (w/2) ‖u - v‖²`.
      x0: pytree of floating arrays.
      mu: of χ, above 0.
      smoothness: L above 0.
      operator_norm: ‖K‖ above 0, its largest singular value.
      eta0: η₀ above 0; such that `η₀ diam(Y)² / 2` is about the first gap.
      n_outer: at least 1, static.
      inner_factor: c above 0.
      most_inner: all T together at most.
      metric: of x̄, kept after each outer step; None: nothing is kept.

    Returns:
      x̄, and a `SlidingTrace`; `inner` in it counts pairs of K and Kᵀ.

    Raises:
      ValueError: a number out of range, more inner steps than `most_inner`, a proximal step that is
        not finite at a finite, concrete x0.

    Source: the problem and the orders are those of RF-ASGS, Wu, Xu and Zhang, 2026,
    arXiv 2602.04161; the constants are derived here and may differ from theirs.
    """
    gamma = sliding.sliding_rate(mu, smoothness)
    for name, value in {
        "operator_norm": operator_norm,
        "eta0": eta0,
        "inner_factor": inner_factor,
    }.items():
        _checks.in_range(name, value, 0, math.inf, low_open=True, high_open=True)
    beta = smoothness * gamma
    etas = eta0 * (1 - gamma) ** sliding.outer_steps(n_outer)
    wanted = inner_factor * np.sqrt(operator_norm**2 / (etas * (beta + mu)) + 1)
    inner = sliding.inner_steps(wanted, most_inner)
    x0 = jax.tree.map(jnp.asarray, x0)
    sliding.check_prox(prox_chi, x0, beta)

    def solve(x: Any, gradient: Any, eta: Array, count: Array) -> Any:
        """Nesterov's method, the strong convexity of χ moved to the smooth part."""
        steep = operator_norm**2 / eta
        root = jnp.sqrt(steep / (beta + mu) + 1)
        momentum = (root - 1) / (root + 1)

        def step(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            u, before = carry
            z = jax.tree.map(lambda p, q: (p + momentum * (p - q)).astype(p.dtype), u, before)
            slope = adjoint(dual(operator(z), eta))

            def center(z: Array, x: Array, g: Array, s: Array) -> Array:
                return ((steep * z + beta * x - g - s) / (steep + beta)).astype(z.dtype)

            moved = prox_chi(jax.tree.map(center, z, x, gradient, slope), steep + beta)
            return sliding.like(u, moved), u

        return jax.lax.fori_loop(0, count, step, (x, x))[0]

    def outer(carry: tuple[Any, Any], now: Any) -> tuple[Any, Any]:
        x, average = carry
        eta, count = now
        x = solve(x, grad_f(sliding.mix(average, x, gamma)), eta, count)
        average = sliding.mix(average, x, gamma)
        return (x, average), None if metric is None else metric(average)

    steps = jax.tree.map(jnp.asarray, (etas, inner))
    (_, average), found = jax.lax.scan(outer, (x0, x0), steps)
    return average, SlidingTrace(found, np.arange(1, n_outer + 1), np.cumsum(inner))
