"""A dictionary of points that stand for all others, by approximate linear dependence (ALD).

A point whose feature vector is nearly a combination of those kept is not kept, only the combination
is: `k(x, ·) ≈ Σ_c a_c k(x_c, ·)`. Posteriors then cost the cube of the dictionary's size and not of
the data's. Memory is fixed: arrays are of `capacity` points, of which the first `used` are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.uncertainty import gp

Kernel = Callable[[Float[Array, "M F"], Float[Array, "P F"]], Float[Array, "M P"]]


class Dictionary(NamedTuple):
    """Points kept, and the factor of their Gram matrix.

    Attributes:
      points: `[C, F]`; zeros from `used` on.
      factor: lower triangular L with L Lᵀ = K(points, points), `[C, C]`; the identity from `used`
        on.
      used: how many there are.
      refused: how many more a larger dictionary would have kept.
    """

    points: Float[Array, "C F"]
    factor: Float[Array, "C C"]
    used: Int[Array, ""]
    refused: Int[Array, ""]


class Projection(NamedTuple):
    """A point in terms of the dictionary.

    Attributes:
      coefficients: a, f32 `[C]`; 0 where no point stands.
      residual: `k(x, x) - k̃ᵀ K̃⁻¹ k̃` before the update, the squared distance from what the
        dictionary spans.
    """

    coefficients: Float[Array, " C"]
    residual: Float[Array, ""]


def ald_init(capacity: int, size: int, *, dtype: jnp.dtype | type = jnp.float32) -> Dictionary:
    """An empty dictionary.

    Args:
      capacity: C, the most points that it can hold, ≥ 1; static.
      size: F, entries of a point, ≥ 1.
      dtype: float32 or float64.

    Raises:
      ValueError: a number below 1.
    """
    _checks.in_range("capacity", capacity, 1)
    _checks.in_range("size", size, 1)
    return Dictionary(
        jnp.zeros((capacity, size), dtype),
        jnp.eye(capacity, dtype=dtype),
        jnp.int32(0),
        jnp.int32(0),
    )


def ald_update(
    state: Dictionary, point: Float[Array, " F"], *, kernel: Kernel, threshold: float
) -> tuple[Dictionary, Projection]:
    """Keeps a point that the others do not span, and expresses it by what is kept.

    With k̃ its kernel values with the dictionary, `a = K̃⁻¹ k̃` and `δ = k(x, x) - k̃ᵀ a`: if
    δ > threshold the point is added and its coefficients are 1 at its own place, else they are a.
    The factor grows by one row, so an update costs O(C²).

    Args:
      state: from `ald_init` or an earlier update.
      point: x.
      kernel: `(x [M, F], y [P, F]) -> [M, P]`, such as `gp.linear_kernel`; the same every time.
      threshold: ≥ 0. Rounding leaves residuals of about the dtype's epsilon times k(x, x), so in
        float32 a threshold below 1e-5 of that keeps copies.

    Returns:
      the dictionary; the point's coefficients. A full dictionary adds nothing, counts the point as
      `refused` and projects it as well as it can. Under `scan` the coefficients of all points are
      `[M, C]` and belong to the last dictionary.

    Raises:
      ValueError: a point of another shape or dtype, a threshold below 0.

    Source: Engel, Mannor and Meir 2004, "The kernel recursive least-squares algorithm". They update
    the inverse; a triangular factor loses less to rounding when residuals are small.
    """
    capacity, size = state.points.shape
    _checks.in_range("threshold", threshold, 0.0)
    _checks.floating(point=point)
    if np.shape(point) != (size,):
        raise ValueError(f"point: expected shape {(size,)}, got {np.shape(point)}")
    dtype = state.points.dtype
    x = jnp.asarray(point, dtype)
    places = jnp.arange(capacity)
    there = places < state.used
    own = kernel(x[None], x[None])[0, 0].astype(dtype)
    others = jnp.where(there, kernel(x[None], state.points)[0].astype(dtype), 0)
    row = jax.scipy.linalg.solve_triangular(state.factor, others, lower=True)
    combination = jax.scipy.linalg.solve_triangular(state.factor.T, row, lower=False)
    residual = jnp.maximum(own - row @ row, 0)
    new = residual > threshold
    add = new & (state.used < capacity)
    here = add & (places == state.used)
    # The root is taken of 1 where nothing is added, so that its slope at 0 is never met.
    scale = jnp.sqrt(jnp.where(add, residual, 1))
    line = row + scale * (places == state.used)
    state = Dictionary(
        points=jnp.where(here[:, None], x, state.points),
        factor=jnp.where(here[:, None], line, state.factor),
        used=state.used + add,
        refused=state.refused + (new & ~add),
    )
    coefficients = jnp.where(add, here.astype(dtype), combination)
    return state, Projection(coefficients, residual)


def ald_posterior(
    state: Dictionary,
    coefficients: Float[Array, "M C"],
    targets: Float[Array, "M ..."],
    cross: Float[Array, "C E"],
    prior: Float[Array, "E E"],
    *,
    noise: float,
) -> gp.GaussianPosterior:
    """`gp.linear_gp_posterior` with every point replaced by its projection, K ≈ A K̃ Aᵀ.

        E[ρ | y] = b̃ᵀ (AᵀA K̃ + s²)⁻¹ Aᵀ y,
        Cov[ρ | y] = b₀ - b̃ᵀ (AᵀA K̃ + s²)⁻¹ AᵀA b̃.

    Args:
      state: the last dictionary.
      coefficients: A, of all points; rows of 0 (and targets of 0) count for nothing.
      targets: y.
      cross: b̃, the covariance of f at the dictionary's points with ρ; rows from `used` on are
        not read.
      prior: b₀.
      noise: s², ≥ 0.

    Raises:
      ValueError: wrong ranks, shapes or dtypes, a negative variance.

    Source: as `ald_update`; Ghavamzadeh, Engel and Valko 2016, arXiv 2604.27563.
    """
    capacity = state.points.shape[0]
    _checks.rank("coefficients", coefficients, 2)
    _checks.rank("targets", targets, 1, 2)
    _checks.rank("cross", cross, 2)
    if np.shape(coefficients)[1] != capacity or np.shape(cross)[0] != capacity:
        raise ValueError(
            f"coefficients, cross: expected [M, {capacity}] and [{capacity}, E], got "
            f"{np.shape(coefficients)} and {np.shape(cross)}"
        )
    if np.shape(targets)[0] != np.shape(coefficients)[0]:
        raise ValueError(
            f"targets: expected {np.shape(coefficients)[0]} rows like coefficients, got "
            f"{np.shape(targets)}"
        )
    there = jnp.arange(capacity) < state.used
    features = widened(coefficients) @ jnp.where(there[:, None], state.factor, 0)
    b = jax.scipy.linalg.solve_triangular(
        state.factor, jnp.where(there[:, None], cross, 0), lower=True
    )
    gram = features.T @ features + jnp.diag((~there).astype(features.dtype))
    return gp.weight_space_posterior(
        gram, features.T @ jnp.asarray(targets, features.dtype), b, prior, noise=noise
    )
