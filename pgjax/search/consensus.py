"""Consensus-based optimisation: particles drawn to their weighted mean, by function values alone.

    v_α = Σ_i w_i x_i / Σ_i w_i,   w_i = exp(-α (E(x_i) - min_j E(x_j)))

The consensus point follows a perturbed gradient descent. That is plain to see in consensus hopping,
which draws all particles afresh from N(v, s² I) in every step: with τ = α s² the draws, weighted,
are a sample of a density whose mode is the proximal point `argmin_y E(y) + ‖y - v‖² / (2τ)`.
Parameters in a tree go through `jax.flatten_util.ravel_pytree`.

Source: Gradient is All You Need?, 2023, arXiv 2306.09778.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import safe_sqrt

NOISE_AT = ("pre_drift", "post_drift")
Objective = Callable[[Float[Array, " D"]], Array]


class ConsensusRun(NamedTuple):
    """Of a run.

    Attributes:
      centers: `[K + 1, D]`, the consensus point before each step and after the last.
      particles: `[N, D]`, the last ones.
    """

    centers: Float[Array, "K+1 D"]
    particles: Float[Array, "N D"]


def consensus_point(
    values: Float[Array, " N"], particles: Float[Array, "N D"], *, alpha: Any
) -> Float[Array, " D"]:
    """`Σ_i w_i x_i / Σ_i w_i` with `w_i = exp(-α (E_i - min_j E_j))`: a soft best particle.

    Args:
      values: `E_i`. Those that are NaN or infinite weigh nothing.
      particles: `x_i`, finite.
      alpha: inverse temperature, at least 0: 0 gives the mean, a large one the best particle. May
        be traced.

    Returns:
      the point; NaN if no value is finite.

    Raises:
      ValueError: wrong ranks or lengths, no particles, α below 0, and, outside of transformations,
        no finite value.
    """
    _check_particles(particles)
    _checks.rank("values", values, 1)
    if jnp.shape(values) != jnp.shape(particles)[:1]:
        raise ValueError(
            f"values: expected one for each of {jnp.shape(particles)[0]} particles, "
            f"got shape {jnp.shape(values)}"
        )
    _checks.floating(values=values)
    _checks.in_range("alpha", alpha, 0)
    finite = jnp.isfinite(values)
    if _checks.is_concrete(values) and not np.any(np.isfinite(values)):
        raise ValueError("values: expected at least one that is finite, got none")
    wide = jnp.promote_types(jnp.result_type(values, particles), jnp.float32)
    lowest = jnp.min(jnp.where(finite, values, jnp.inf))
    above = jnp.where(finite, values - lowest, 0.0).astype(wide)
    weights = jnp.where(finite, jnp.exp(-alpha * above), 0.0)
    total = jnp.where(jnp.any(finite), jnp.sum(weights), jnp.nan)
    return jnp.matmul(weights / total, jnp.asarray(particles, wide), precision="highest")


def cbo_step(
    key: PRNGKeyArray,
    particles: Float[Array, "N D"],
    values: Float[Array, " N"],
    *,
    alpha: Any = 100.0,
    lam: Any = 1.0,
    sigma: Any = 1.6,
    dt: Any = 0.01,
    anisotropic: bool = False,
    noise_at: str = "pre_drift",
) -> Float[Array, "N D"]:
    """`x_i - λ dt (x_i - v) + σ √dt D(x_i - v) ξ_i`, ξ_i ~ N(0, I), v the consensus point.

    Args:
      key: of the noise.
      particles, values: `x_i` and `E(x_i)`.
      alpha: of `consensus_point`.
      lam: drift λ, at least 0.
      sigma: noise, at least 0.
      dt: above 0. All four may be traced.
      anisotropic: static; the noise is `|x_i - v|` in each coordinate instead of `‖x_i - v‖` in
        all: coordinates on which the particles agree are left alone.
      noise_at: static; where its size is measured, before the drift (as in the text) or after it,
        as the released code does.

    Raises:
      ValueError: wrong ranks or lengths, options out of range, and what `consensus_point` raises.
    """
    _check_options(lam=lam, sigma=sigma, dt=dt, noise_at=noise_at)
    center = consensus_point(values, particles, alpha=alpha)
    return _moved(key, particles, center, lam, sigma, dt, anisotropic, noise_at)


def hopping_step(
    key: PRNGKeyArray,
    center: Float[Array, " D"],
    values_fn: Callable[[Float[Array, "N D"]], Float[Array, " N"]],
    *,
    n: int = 200,
    sigma: Any = 0.7,
    alpha: Any = 100.0,
) -> Float[Array, " D"]:
    """Draws `x_i ~ N(center, σ² I)` and returns their consensus point.

    Args:
      key: of the draws.
      center: the last consensus point.
      values_fn: from all particles to their values.
      n: particles, at least 1, static.
      sigma: width of the cloud, at least 0. May be traced.
      alpha: of `consensus_point`.

    Raises:
      ValueError: wrong rank, options out of range, and what `consensus_point` raises.
    """
    return consensus_point(*_cloud(key, center, values_fn, n=n, sigma=sigma), alpha=alpha)


def consensus_gradient(
    x: Float[Array, " D"], consensus: Float[Array, " D"], *, alpha: Any, sigma: Any
) -> Float[Array, " D"]:
    """`(x - v) / (α σ²)`: in the place of a gradient, for any Optax optimizer.

    For a cloud around x, many particles and `α σ² = τ` held while α grows, it is the gradient at
    the proximal point of x.

    Args:
      x: the centre of the cloud.
      consensus: v, from `hopping_step` at x.
      alpha, sigma: above 0, of that step.

    Raises:
      ValueError: unequal shapes, α or σ not above 0.
    """
    _checks.same_shape(x=x, consensus=consensus)
    _checks.in_range("alpha", alpha, 0, low_open=True)
    _checks.in_range("sigma", sigma, 0, low_open=True)
    return (jnp.asarray(x) - consensus) / (alpha * jnp.square(sigma))


def run_cbo(
    key: PRNGKeyArray,
    fn: Objective,
    particles: Float[Array, "N D"],
    *,
    steps: int = 250,
    alpha: Any = 100.0,
    lam: Any = 1.0,
    sigma: Any = 1.6,
    dt: Any = 0.01,
    anisotropic: bool = False,
    noise_at: str = "pre_drift",
    gradient_step: Any = 0.0,
) -> ConsensusRun:
    """`cbo_step` again and again.

    Args:
      fn: of one point; it is mapped over particles.
      particles: at the start.
      steps: K, at least 1, static.
      gradient_step: at least 0, static: above 0, particles also descend, by this times
        `dt ∇fn(x_i)` (the paper's γ times a learning rate; its figures have none).
      alpha, lam, sigma, dt, anisotropic, noise_at: of `cbo_step`.

    Returns:
      a `ConsensusRun`; NaN from the point on at which no particle has a finite value.
    """
    _check_options(lam=lam, sigma=sigma, dt=dt, noise_at=noise_at)
    _checks.in_range("steps", steps, 1)
    _checks.in_range("gradient_step", gradient_step, 0)
    _check_particles(particles)
    values_fn = jax.vmap(fn)

    def step(particles: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        center = consensus_point(values_fn(particles), particles, alpha=alpha)
        moved = _moved(key, particles, center, lam, sigma, dt, anisotropic, noise_at)
        if gradient_step != 0:
            moved = moved - gradient_step * dt * jax.vmap(jax.grad(fn))(particles)
        return moved, center

    last, centers = jax.lax.scan(step, jnp.asarray(particles), jax.random.split(key, steps))
    final = jax.jit(consensus_point)(values_fn(last), last, alpha=alpha)  # NaN, not an error
    return ConsensusRun(jnp.concatenate([centers, final[None]]), last)


def run_hopping(
    key: PRNGKeyArray,
    fn: Objective,
    center: Float[Array, " D"],
    *,
    steps: int = 250,
    n: int = 200,
    sigma: Any = 0.7,
    alpha: Any = 100.0,
    decay: float = 1.0,
    decay_every: int = 100,
) -> ConsensusRun:
    """`hopping_step` again and again, from a cloud around `center`.

    Args:
      fn: of one point; it is mapped over particles.
      center: of the first cloud, `[D]`.
      steps: K, at least 1, static: the number of clouds after the first.
      decay, decay_every: the width is multiplied by `decay`, in (0, 1], every so many steps.
      n, sigma, alpha: of `hopping_step`.

    Returns:
      a `ConsensusRun`, whose centers are the consensus points of the K + 1 clouds.
    """
    _checks.in_range("steps", steps, 1)
    _checks.in_range("decay", decay, 0, 1, low_open=True)
    _checks.in_range("decay_every", decay_every, 1)
    values_fn = jax.vmap(fn)
    widths = sigma * decay ** (jnp.arange(steps + 1) // decay_every).astype(jnp.float32)

    def step(state: tuple[Array, Array], inputs: Any) -> tuple[tuple[Array, Array], Array]:
        key, width = inputs
        values, particles = _cloud(key, state[0], values_fn, n=n, sigma=width)
        found = consensus_point(values, particles, alpha=alpha)
        return (found, particles), found

    dtype = jnp.promote_types(jnp.result_type(center), jnp.float32)
    start = jnp.asarray(center, dtype)
    _checks.rank("center", start, 1)
    state = (start, jnp.zeros((n, start.size), dtype))
    keys = jax.random.split(key, steps + 1)
    (_, last), centers = jax.lax.scan(step, state, (keys, widths))
    return ConsensusRun(centers, last)


def _cloud(
    key: PRNGKeyArray, center: Array, values_fn: Callable[[Array], Array], *, n: int, sigma: Any
) -> tuple[Array, Array]:
    """Values, and particles."""
    _checks.rank("center", center, 1)
    _checks.in_range("n", n, 1)
    _checks.in_range("sigma", sigma, 0)
    dtype = jnp.promote_types(jnp.result_type(center), jnp.float32)
    noise = jax.random.normal(key, (n, *jnp.shape(center)), dtype)
    particles = (center + sigma * noise).astype(dtype)
    return values_fn(particles), particles


def _moved(
    key: PRNGKeyArray,
    particles: Array,
    center: Array,
    lam: Any,
    sigma: Any,
    dt: Any,
    anisotropic: bool,
    noise_at: str,
) -> Array:
    away = particles - center
    drifted = particles - lam * dt * away
    if noise_at == "post_drift":
        away = drifted - center
    square = jnp.sum(jnp.square(away), axis=1, keepdims=True)
    length = safe_sqrt(square)
    size = jnp.abs(away) if anisotropic else length
    noise = jax.random.normal(key, particles.shape, particles.dtype)
    return (drifted + sigma * jnp.sqrt(dt) * size * noise).astype(particles.dtype)


def _check_particles(particles: Any) -> None:
    _checks.rank("particles", particles, 2)
    _checks.floating(particles=particles)
    if jnp.shape(particles)[0] < 1:
        raise ValueError(f"particles: expected at least 1, got shape {jnp.shape(particles)}")


def _check_options(*, lam: Any, sigma: Any, dt: Any, noise_at: str) -> None:
    _checks.in_range("lam", lam, 0)
    _checks.in_range("sigma", sigma, 0)
    _checks.in_range("dt", dt, 0, low_open=True)
    _checks.one_of("noise_at", noise_at, NOISE_AT)
