"""Gradient sliding: few gradients of a smooth part, many cheap steps on a part that is not.

Minimises `f + h + χ`: f convex and L-smooth, and dear; h convex and M-Lipschitz, by subgradients
that may be noisy; χ μ-strongly convex, by its proximal step `prox_chi(v, w)`, the u that minimises
`χ(u) + (w/2) ‖u - v‖²`. In reinforcement learning f's gradient costs rollouts, h regularises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks

Prox = Callable[[Any, Any], Any]


class SlidingSchedule(NamedTuple):
    """Each outer step's weight γ of the newest point, stiffness β, and number T of inner steps."""

    gamma: Float[np.ndarray, " K"]
    beta: Float[np.ndarray, " K"]
    inner: Int[np.ndarray, " K"]


class SlidingTrace(NamedTuple):
    """After each outer step: `metric` of the result so far, and how often each part was called."""

    metric: Any
    gradients: Int[np.ndarray, " K"]
    inner: Int[np.ndarray, " K"]


Policy = Callable[[int], SlidingSchedule]
"""The number of outer steps to their parameters."""


def sliding_rate(mu: float, smoothness: float) -> float:
    """The γ in (0, 1) with `L γ² = μ (1 - γ)`; errors shrink by 1 - γ each outer step.

    Raises:
      ValueError: μ or L not above 0.
    """
    _checks.in_range("mu", mu, 0, math.inf, low_open=True, high_open=True)
    _checks.in_range("smoothness", smoothness, 0, math.inf, low_open=True, high_open=True)
    root = math.sqrt(mu * mu + 4 * smoothness * mu)
    return 2 * mu / (mu + root)  # (√(μ² + 4 L μ) - μ) / (2 L) without its cancellation


def lan_convex(
    smoothness: float, lipschitz: float, distance: float, *, most_inner: int = 10_000_000
) -> Policy:
    """Lan's steps for convex problems and a known number N of outer ones, k from 1:

        γ = 2 / (k + 1),   β = 2 L / k,   T = ⌈M² N k² / (D L²)⌉

    Args:
      smoothness: L above 0.
      lipschitz: M of h, with its noise, at least 0.
      distance: D above 0, of the order of `‖x_0 - x*‖²`.
      most_inner: all T together at most.

    Raises:
      ValueError: a number out of range; of the policy, more inner steps than that.

    Source: Lan, Gradient sliding for composite optimization, 2016, arXiv 1406.0919.
    """
    _checks.in_range("smoothness", smoothness, 0, math.inf, low_open=True, high_open=True)
    _checks.in_range("lipschitz", lipschitz, 0, math.inf, high_open=True)
    _checks.in_range("distance", distance, 0, math.inf, low_open=True, high_open=True)

    def policy(n_outer: int) -> SlidingSchedule:
        k = outer_steps(n_outer)
        inner = lipschitz**2 * n_outer * k**2 / (distance * smoothness**2)
        return SlidingSchedule(2 / (k + 1), 2 * smoothness / k, inner_steps(inner, most_inner))

    return policy


def restart_free(
    mu: float, smoothness: float, *, inner0: float = 2.0, most_inner: int = 10_000_000
) -> Policy:
    """Constant γ and β and inner steps that grow as errors shrink, so that nothing is restarted:

        L γ² = μ (1 - γ),   β = L γ,   T_k = ⌈T_0 (1 - γ)^(-k)⌉,   k from 1

    For errors of ε, O(log 1/ε) gradients of f and O(1/ε) subgradients of h.

    Args:
      mu: of χ, above 0.
      smoothness: L above 0.
      inner0: T_0 above 0.
      most_inner: all T together at most.

    Raises:
      ValueError: a number out of range; of the policy, more inner steps than that.

    Source: the problem and the orders are those of RF-SGS, Wu, Xu and Zhang, 2026,
    arXiv 2602.04161; these constants are derived here and may differ from theirs: telescoping
    needs L γ ≤ β ≤ (β + μ) (1 - γ), and inner errors of 1/T have to shrink like (1 - γ)^k.
    """
    gamma = sliding_rate(mu, smoothness)
    _checks.in_range("inner0", inner0, 0, math.inf, low_open=True, high_open=True)

    def policy(n_outer: int) -> SlidingSchedule:
        k = outer_steps(n_outer)
        with np.errstate(over="ignore"):  # infinity is too many, and said so
            inner = inner_steps(inner0 * (1 - gamma) ** -k, most_inner)
        return SlidingSchedule(np.full(k.shape, gamma), np.full(k.shape, smoothness * gamma), inner)

    return policy


def prox_sliding(
    gradient: Any,
    subgrad_h: Callable[..., Any],
    prox_chi: Prox,
    x: Any,
    *,
    beta: Any,
    inner: Any,
    key: Array | None = None,
) -> tuple[Any, Any]:
    """T steps on `<G, u> + h(u) + χ(u) + (β/2) ‖u - x‖²`, with h linearised anew in each:

        u_t = argmin <G + h'(u_{t-1}), u> + (β/2) ‖u - x‖² + (β p_t / 2) ‖u - u_{t-1}‖² + χ(u)
        ũ_t = (1 - θ_t) ũ_{t-1} + θ_t u_t,   p_t = t / 2,   θ_t = 2 (t + 1) / (t (t + 3))

    Args:
      gradient: G, a pytree like x.
      subgrad_h: u to a subgradient, or (u, key) to a noisy one if there is a key.
      prox_chi: (v, w) to the u that minimises `χ(u) + (w/2) ‖u - v‖²`.
      x: pytree of floating arrays.
      beta: above 0; may be traced.
      inner: T at least 1; may be traced.
      key: for noisy subgradients.

    Returns:
      `(u_T, ũ_T)`, the last point and the average.

    Raises:
      ValueError: β not above 0, T below 1.

    Source: Lan, Gradient sliding for composite optimization, 2016, arXiv 1406.0919.
    """
    _checks.in_range("beta", beta, 0, low_open=True)
    _checks.in_range("inner", inner, 1)

    def step(t: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        u, average = carry
        slope = subgrad_h(u) if key is None else subgrad_h(u, jax.random.fold_in(key, t))
        time = t.astype(jnp.float32)  # products of large counts overflow int32
        p, theta = time / 2, 2 * (time + 1) / (time * (time + 3))
        weight = beta * (1 + p)

        def center(x: Array, u: Array, g: Array, s: Array) -> Array:
            return ((beta * x + beta * p * u - g - s) / weight).astype(u.dtype)

        u = like(u, prox_chi(jax.tree.map(center, x, u, gradient, slope), weight))
        return u, mix(average, u, theta)

    x = jax.tree.map(jnp.asarray, x)
    return jax.lax.fori_loop(1, jnp.asarray(inner, jnp.int32) + 1, step, (x, x))


def gradient_sliding(
    grad_f: Callable[[Any], Any],
    subgrad_h: Callable[..., Any],
    prox_chi: Prox,
    x0: Any,
    *,
    policy: Policy,
    n_outer: int,
    key: Array | None = None,
    metric: Callable[[Any], Any] | None = None,
) -> tuple[Any, SlidingTrace]:
    """Minimises f + h + χ with one gradient of f per outer step:

        G = ∇f((1 - γ) x̄ + γ x),   (x, x̃) = prox_sliding(G, x, β, T),   x̄ ← (1 - γ) x̄ + γ x̃

    One compiled program for all outer steps, whatever the T are. No reverse derivative.

    Args:
      grad_f: x to ∇f.
      subgrad_h: u to a subgradient, or (u, key) to a noisy one if there is a key.
      prox_chi: (v, w) to the u that minimises `χ(u) + (w/2) ‖u - v‖²`.
      x0: pytree of floating arrays.
      policy: `restart_free(...)`, `lan_convex(...)`, or any function like them.
      n_outer: at least 1, static.
      key: for noisy subgradients.
      metric: of x̄, kept after each outer step; None: nothing is kept.

    Returns:
      x̄, and a `SlidingTrace`; `inner` in it counts subgradients of h.

    Raises:
      ValueError: `n_outer` below 1; a proximal step that is not finite at a finite, concrete x0.

    Source: Lan, 2016, arXiv 1406.0919; without restarts, Wu, Xu and Zhang, 2026, arXiv 2602.04161.
    """
    schedule = policy(n_outer)
    x0 = jax.tree.map(jnp.asarray, x0)
    check_prox(prox_chi, x0, float(schedule.beta[0]))

    def outer(carry: tuple[Any, Any], now: Any) -> tuple[Any, Any]:
        x, average = carry
        gamma, beta, inner, index = now
        gradient = grad_f(mix(average, x, gamma))
        noise = None if key is None else jax.random.fold_in(key, index)
        x, steady = prox_sliding(
            gradient, subgrad_h, prox_chi, x, beta=beta, inner=inner, key=noise
        )
        average = mix(average, steady, gamma)
        return (x, average), None if metric is None else metric(average)

    steps = jax.tree.map(jnp.asarray, (*schedule, np.arange(n_outer)))
    (_, average), found = jax.lax.scan(outer, (x0, x0), steps)
    return average, SlidingTrace(found, np.arange(1, n_outer + 1), np.cumsum(schedule.inner))


def check_prox(prox_chi: Prox, x0: Any, weight: float) -> None:
    """Raises ValueError if the proximal step at a concrete finite x0 is not finite."""
    leaves = jax.tree.leaves(x0)
    if not _checks.is_concrete(*leaves) or not all(np.isfinite(x).all() for x in leaves):
        return
    found = jax.tree.leaves(prox_chi(x0, weight))
    if _checks.is_concrete(*found) and not all(np.isfinite(x).all() for x in found):
        raise ValueError("prox_chi: expected finite values, got some that are not at x0")


def outer_steps(n_outer: int) -> Float[np.ndarray, " K"]:
    if isinstance(n_outer, bool) or not isinstance(n_outer, int) or n_outer < 1:
        raise ValueError(f"n_outer: expected an integer of at least 1, got {n_outer!r}")
    return np.arange(1, n_outer + 1, dtype=np.float64)


def inner_steps(wanted: Any, most_inner: int) -> Int[np.ndarray, " K"]:
    """At least 1 each, rounded up; ValueError where they are too many."""
    total = float(np.sum(np.maximum(np.ceil(wanted), 1)))
    if not total <= most_inner:
        raise ValueError(
            f"n_outer: expected at most most_inner = {most_inner} inner steps in all, got {total:g}"
        )
    return np.maximum(np.ceil(wanted), 1).astype(np.int32)


def mix(a: Any, b: Any, share: Any) -> Any:
    return jax.tree.map(lambda p, q: ((1 - share) * p + share * q).astype(p.dtype), a, b)


def like(want: Any, tree: Any) -> Any:
    return jax.tree.map(lambda w, x: jnp.asarray(x, w.dtype), want, tree)
