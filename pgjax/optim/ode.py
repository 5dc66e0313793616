"""Differential equations that accelerated methods follow as their steps shrink, and a solver.

One step of size s takes the time √s: iterate k is near `x(k √s)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.optim import points

KINDS = ("convex", "strongly_convex", "heavy_ball", "nesterov")
Motion = Callable[[Array, tuple[Any, Any]], tuple[Any, Any]]
"""Time and (position, velocity) to their derivatives."""


def accelerated_ode(
    grad_f: Callable[[Any], Any], kind: str, *, mu: float | None = None, step: float | None = None
) -> Motion:
    """The right-hand side of one of these:

        convex:            x'' + (3/t) x' + ∇f = 0
        strongly_convex:   x'' + 2 √μ x' + ∇f = 0
        heavy_ball:        x'' + 2 √μ x' + (1 + √(μ s)) ∇f = 0
        nesterov:          x'' + 2 √μ x' + √s ∇²f x' + (1 + √(μ s)) ∇f = 0

    The second is the limit of heavy ball and of Nesterov's method alike, with momentum
    `(1 - √(μ s)) / (1 + √(μ s))`; the last two are exact to the next order in √s. The Hessian's
    term, friction along steep directions, is what heavy ball lacks; the gradient's factor is the
    same for both.

    Args:
      grad_f: gradient of f, differentiable for `nesterov`.
      kind: static.
      mu: above 0; for all but `convex`.
      step: s above 0; for the last two.

    Returns:
      `motion(t, (x, v)) -> (v, x'')`, pytrees. At t = 0, `convex` takes the limit for v = 0,
      `x'' = -∇f / 4`.

    Raises:
      ValueError: another kind, a number out of range, missing, or given without use.

    Source: Su, Boyd and Candès, 2016, arXiv 1503.01243; Shi, Du, Jordan and Su, 2018,
    arXiv 1810.08907; compare Parimi et al., Dynamics of acceleration, 2025, arXiv 2509.18346.
    """
    _checks.one_of("kind", kind, KINDS)
    wanted = {"mu": kind != "convex", "step": kind in ("heavy_ball", "nesterov")}
    for name, value in {"mu": mu, "step": step}.items():
        if wanted[name] and value is None:
            raise ValueError(f"{name}: expected a number above 0 for kind {kind!r}, got None")
        if not wanted[name] and value is not None:
            raise ValueError(f"{name}: kind {kind!r} has none, got {value}")
        if value is not None:
            _checks.in_range(name, value, 0, math.inf, low_open=True, high_open=True)
    friction = 2 * math.sqrt(mu) if mu is not None else 0.0
    pull = 1 + math.sqrt(mu * step) if mu is not None and step is not None else 1.0

    def convex(t: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        x, v = state
        start = t <= 0
        damping = jnp.where(start, 0.0, 3 / jnp.where(start, 1.0, t))
        force = jnp.where(start, 0.25, 1.0)
        return v, jax.tree.map(lambda g, u: -force * g - damping * u, grad_f(x), v)

    def damped(t: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        del t
        x, v = state
        if kind != "nesterov":
            return v, jax.tree.map(lambda g, u: -pull * g - friction * u, grad_f(x), v)
        assert step is not None
        lag = math.sqrt(step)
        gradient, turning = jax.jvp(grad_f, (x,), (v,))
        return v, jax.tree.map(
            lambda g, h, u: -pull * g - lag * h - friction * u, gradient, turning, v
        )

    return convex if kind == "convex" else damped


def rk4(
    motion: Callable[[Array, Any], Any], state: Any, *, dt: float, steps: int, start: float = 0.0
) -> tuple[Float[Array, " K"], Any]:
    """The classical Runge-Kutta method of fourth order with steps of one size.

    Args:
      motion: time and state to the state's derivative.
      state: pytree of floating arrays at `start`.
      dt: above 0.
      steps: at least 1, static.
      start: the first time.

    Returns:
      Times `[steps + 1]`, and the states with a leading axis of that length, the first included.

    Raises:
      ValueError: a number out of range; a derivative of another structure or shapes than the state.
    """
    _checks.in_range("dt", dt, 0, math.inf, low_open=True, high_open=True)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")

    def moved(state: Any, speed: Any, time: float) -> Any:
        return jax.tree.map(lambda x, v: x + time * v, state, speed)

    def one(state: Any, index: Array) -> tuple[Any, Any]:
        t = start + dt * index
        k1 = motion(t, state)
        points.same_tree("motion", k1, "state", state)
        k2 = motion(t + dt / 2, moved(state, k1, dt / 2))
        k3 = motion(t + dt / 2, moved(state, k2, dt / 2))
        k4 = motion(t + dt, moved(state, k3, dt))
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        after = jax.tree.map(lambda x, new: new.astype(x.dtype), state, moved(state, mean, dt))
        return after, after

    state = jax.tree.map(jnp.asarray, state)
    _, states = jax.lax.scan(one, state, jnp.arange(steps))
    times = start + dt * jnp.arange(steps + 1)
    return times, jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), state, states)
