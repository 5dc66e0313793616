"""Step sizes as functions of the count of updates so far, which starts at 0.

Papers count from t = 1: their t is `count + 1`. Each function here returns a schedule for
`optax.scale_by_schedule` or `optax.scale_by_learning_rate`: count, which may be traced, to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks

Schedule = Callable[[Array | int], Float[Array, ""]]


class GradientSchedules(NamedTuple):
    """The step size γ_t, and the weight η_t of the newest gradient in the average."""

    learning_rate: Schedule
    eta: Schedule


def last_iterate_linear(base: float, total: int, smoothness: float | None = None) -> Schedule:
    """`min(1 / (2 L), base (T - count) / T^(3/2))`: down to nearly 0 over a known horizon T.

    The last iterate then has no log factor: O(L / T + (M + σ) / √T) for convex functions.

    Args:
      base: above 0; about D / (M + σ), with D² the Bregman distance to the optimum, M the
        Lipschitz constant and σ the noise.
      total: T, at least 1. Later counts keep the last value, `base / T^(3/2)`.
      smoothness: L above 0; None for no cap.

    Raises:
      ValueError: a number out of range.

    Source: Liu and Zhou, Revisiting the last-iterate convergence, 2024, arXiv 2312.08531.
    """
    _checks.in_range("base", base, 0, math.inf, low_open=True, high_open=True)
    _check_total(total)
    cap = _cap(smoothness)

    def schedule(count: Array | int) -> Array:
        left = total - jnp.minimum(jnp.asarray(count), total - 1)
        return jnp.minimum(cap, base * left.astype(jnp.float32) / total**1.5)

    return schedule


def last_iterate_sqrt(base: float, smoothness: float | None = None) -> Schedule:
    """`min(1 / (2 L), base / √(count + 1))`, for a horizon that is not known.

    The last iterate is O(L / T + (M + σ) log T / √T) for convex functions.

    Args:
      base: above 0; see `last_iterate_linear`.
      smoothness: L above 0; None for no cap.

    Raises:
      ValueError: a number out of range.

    Source: Liu and Zhou, Revisiting the last-iterate convergence, 2024, arXiv 2312.08531.
    """
    _checks.in_range("base", base, 0, math.inf, low_open=True, high_open=True)
    cap = _cap(smoothness)
    return lambda count: jnp.minimum(cap, base / jnp.sqrt(_time(count)))


def strongly_convex_decay(mu: float, kappa: float = 0.0, *, variant: int = 1) -> Schedule:
    """For μ-strongly convex functions and a horizon that is not known, t = count + 1.

        1: 1 / (μ (t + 2 κ))          2: 2 / (μ (t + 1 + 4 κ))

    Args:
      mu: above 0.
      kappa: L / μ, at least 0; 0 where the function is not smooth.
      variant: static.

    Raises:
      ValueError: a number out of range, another variant.

    Source: Liu and Zhou, Revisiting the last-iterate convergence, 2024, arXiv 2312.08531; the
    constants are reconstructed.
    """
    _check_convex(mu, kappa)
    _checks.one_of("variant", variant, (1, 2))
    if variant == 1:
        return lambda count: 1 / (mu * (_time(count) + 2 * kappa))
    return lambda count: 2 / (mu * (_time(count) + 1 + 4 * kappa))


def strongly_convex_two_phase(mu: float, kappa: float, total: int) -> Schedule:
    """For μ-strongly convex functions and a known horizon T, with τ = ⌈T / 2⌉ and t = count + 1:

        1 / (μ (1 + 2 κ))             t ≤ τ
        2 / (μ (t - τ + 2 + 4 κ))     after it

    The second formula has the first's value at t = τ, so the steps do not jump.

    Args:
      mu: above 0.
      kappa: L / μ, at least 0; 0 where the function is not smooth.
      total: T, at least 1. Later counts go on by the second formula.

    Raises:
      ValueError: a number out of range.

    Source: Liu and Zhou, Revisiting the last-iterate convergence, 2024, arXiv 2312.08531; the
    constants are reconstructed.
    """
    _check_convex(mu, kappa)
    _check_total(total)
    half = math.ceil(total / 2)
    return lambda count: 2 / (mu * (jnp.maximum(_time(count) - half, 0) + 2 + 4 * kappa))


def igt_schedules(gamma0: float) -> GradientSchedules:
    """For N-PG-IGT, with q_t = 2 / (t + 2), t = count: γ = γ₀ q and η = q^(4/5).

    Raises:
      ValueError: γ₀ not above 0.

    Source: Fatkhullin et al., Stochastic policy gradient methods, 2023, arXiv 2302.01734.
    """
    return _powers(gamma0, 1.0, 0.8)


def harpg_schedules(gamma0: float) -> GradientSchedules:
    """For HARPG, with q_t = 2 / (t + 2), t = count: γ = γ₀ √q and η = q.

    Raises:
      ValueError: γ₀ not above 0.

    Source: Fatkhullin et al., Stochastic policy gradient methods, 2023, arXiv 2302.01734.
    """
    return _powers(gamma0, 0.5, 1.0)


def normalized_harpg_schedules(gamma0: float) -> GradientSchedules:
    """For N-HARPG, with q_t = 2 / (t + 2), t = count: γ = γ₀ q and η = q.

    Raises:
      ValueError: γ₀ not above 0.

    Source: Fatkhullin et al., Stochastic policy gradient methods, 2023, arXiv 2302.01734.
    """
    return _powers(gamma0, 1.0, 1.0)


def normalized_momentum_schedules(gamma0: float) -> GradientSchedules:
    """For normalised momentum, with q_t = 2 / (t + 2), t = count: γ = γ₀ q and η = q^(2/3).

    Raises:
      ValueError: γ₀ not above 0.

    Source: Fatkhullin et al., Stochastic policy gradient methods, 2023, arXiv 2302.01734.
    """
    return _powers(gamma0, 1.0, 2 / 3)


def plain_gradient_schedules(gamma0: float) -> GradientSchedules:
    """For the gradient without averaging, q_t = 2 / (t + 2), t = count: γ = γ₀ q^(2/3) and η = 1.

    Raises:
      ValueError: γ₀ not above 0.

    Source: Fatkhullin et al., Stochastic policy gradient methods, 2023, arXiv 2302.01734.
    """
    return _powers(gamma0, 2 / 3, 0.0)


def _powers(gamma0: float, step: float, weight: float) -> GradientSchedules:
    _checks.in_range("gamma0", gamma0, 0, math.inf, low_open=True, high_open=True)

    def q(count: Array | int) -> Array:
        return 2 / (_time(count) + 1)

    return GradientSchedules(lambda t: gamma0 * q(t) ** step, lambda t: q(t) ** weight)


def _time(count: Array | int) -> Array:
    return jnp.asarray(count, jnp.float32) + 1


def _cap(smoothness: float | None) -> float:
    if smoothness is None:
        return math.inf
    _checks.in_range("smoothness", smoothness, 0, math.inf, low_open=True, high_open=True)
    return 1 / (2 * smoothness)


def _check_convex(mu: float, kappa: float) -> None:
    _checks.in_range("mu", mu, 0, math.inf, low_open=True, high_open=True)
    _checks.in_range("kappa", kappa, 0, math.inf, high_open=True)


def _check_total(total: int) -> None:
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        raise ValueError(f"total: expected an integer of at least 1, got {total!r}")
