"""Pseudo-inverses of truncated rank, by three routes to the largest singular values."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks

METHODS = ("gram", "svd", "randomized")
SMALLEST = 1e-10
OVERSAMPLING = 5


class PinvInfo(NamedTuple):
    """Of one direction.

    Attributes:
      singular_values: the k largest, descending, 0 where they were cut off.
      rank: how many were used.
      residual_norm: `‖R‖₂` before the step.
    """

    singular_values: Float[Array, " k"]
    rank: Int[Array, ""]
    residual_norm: Float[Array, ""]


class Pieces(NamedTuple):
    """`s_i`, `<u_i, R>`, and right vectors `v_i = rowsᵀ mix_i` with mix `[k, r]`, rows `[r, P]`."""

    values: Array
    left: Array
    mix: Array
    rows: Array


def pinv_direction(
    jac: Float[Array, "B P"],
    resid: Float[Array, " B"],
    *,
    k: int | None = None,
    rtol: float = 1e-3,
    method: str = "gram",
    key: PRNGKeyArray | None = None,
    power_steps: int = 2,
) -> tuple[Float[Array, " P"], PinvInfo]:
    """`V_k diag(1/s) U_kᵀ R`: what to subtract from the parameters.

    Args:
      jac: `M`, derivatives of the residuals; a zero Jacobian gives a zero direction.
      resid: `R`.
      k: largest rank, at least 1, static; None for `ceil(B / 2)`, at most `min(B, P)`.
      rtol: in [0, 1); smaller singular values, relative to the largest, are cut off. The Gram
        matrix squares them: in float32 it takes those below 7e-4 of the largest for 0.
      method: static. `gram`: eigenvectors of `M Mᵀ`, or of `Mᵀ M` if that is smaller; the fast
        choice for few rows. `svd`: of M itself, exact. `randomized`: of M on the span of
        `M (Mᵀ M)^q Ω` with k + 5 random columns; the fast choice for a small k.
      key: for `randomized`.
      power_steps: q, at least 0, static.

    Returns:
      the direction, float32 or wider, and a `PinvInfo`.

    Raises:
      ValueError: wrong ranks or lengths (a scalar loss, say), an unknown method, numbers out of
        range, no key for `randomized`.

    Warns:
      UserWarning: k above `min(B, P)`, which is taken instead.
    """
    _checks.rank("jac", jac, 2)
    if jnp.ndim(resid) == 0:
        raise ValueError("resid: expected one number per sample, got a scalar; do not average")
    _checks.rank("resid", resid, 1)
    _checks.floating(jac=jac, resid=resid)
    count, width = jnp.shape(jac)
    if jnp.shape(resid) != (count,) or 0 in (count, width):
        raise ValueError(
            f"resid: expected one for each of the rows of jac, {(count, width)}, "
            f"and neither empty, got shape {jnp.shape(resid)}"
        )
    _checks.one_of("method", method, METHODS)
    _checks.in_range("rtol", rtol, 0, 1, high_open=True)
    _checks.in_range("power_steps", power_steps, 0)
    wide = jnp.promote_types(jnp.result_type(jac, resid), jnp.float32)
    jac, resid = jnp.asarray(jac, wide), jnp.asarray(resid, wide)
    rank = rank_of(k, count, width)
    pieces = pieces_of(jac, resid, rank, method, key, power_steps)
    weights, info = cut(pieces, resid, rtol)
    return times(times(weights, pieces.mix), pieces.rows), info


def rank_of(k: int | None, count: int, width: int) -> int:
    """The rank to use; a warning for one too large, ValueError for one below 1."""
    most = min(count, width)
    if k is None:
        return min(math.ceil(count / 2), most)
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if k > most:
        warnings.warn(f"k: {k} is above min(B, P), {most}, which is taken instead", stacklevel=3)
    return min(k, most)


def pieces_of(
    jac: Array, resid: Array, k: int, method: str, key: PRNGKeyArray | None, power_steps: int
) -> Pieces:
    """The k largest singular values with what `pinv_direction` needs of their vectors."""
    if method == "svd":
        u, s, vt = jnp.linalg.svd(jac, full_matrices=False)
        return Pieces(s[:k], times(resid, u[:, :k]), jnp.eye(k, dtype=jac.dtype), vt[:k])
    if method == "randomized":
        if key is None:
            raise ValueError("key: method 'randomized' needs one, got None")
        columns = min(k + OVERSAMPLING, *jac.shape)
        span = times(jac, jax.random.normal(key, (jac.shape[1], columns), jac.dtype))
        for _ in range(power_steps):
            # An orthogonal basis in between, or the small directions would drown in rounding.
            span = times(jac, times(jac.T, jnp.linalg.qr(span)[0]))
        basis = jnp.linalg.qr(span)[0]
        # Of a thin matrix by way of its triangular factor: exact, and an order faster.
        right, factor = jnp.linalg.qr(times(jac.T, basis))
        u, s, vt = jnp.linalg.svd(factor.T, full_matrices=False)
        return Pieces(s[:k], times(times(resid, basis), u[:, :k]), vt[:k], right.T)
    if jac.shape[0] <= jac.shape[1]:
        values, u = _largest(times(jac, jac.T), k)
        return Pieces(values, times(resid, u), _over(u, values).T, jac)
    values, v = _largest(times(jac.T, jac), k)
    left = _over(times(times(resid, jac), v), values)
    return Pieces(values, left, jnp.eye(k, dtype=jac.dtype), v.T)


def _largest(gram: Array, k: int) -> tuple[Array, Array]:
    squares, vectors = jnp.linalg.eigh(gram)
    squares, vectors = squares[::-1][:k], vectors[:, ::-1][:, :k]
    rounding = 4 * jnp.finfo(gram.dtype).eps * squares[0]
    real = squares > rounding
    return jnp.where(real, jnp.sqrt(jnp.where(real, squares, 1)), 0), vectors


def _over(x: Array, values: Array) -> Array:
    return jnp.where(values > SMALLEST, x / jnp.where(values > SMALLEST, values, 1), 0)


def cut(pieces: Pieces, resid: Array, rtol: float) -> tuple[Array, PinvInfo]:
    """`<u_i, R> / s_i`, 0 for the singular values that are cut off."""
    values = pieces.values
    kept = (values > rtol * values[0]) & (values > SMALLEST)
    weights = jnp.where(kept, _over(pieces.left, values), 0)
    info = PinvInfo(jnp.where(kept, values, 0), jnp.sum(kept), jnp.linalg.norm(resid))
    return weights, info


def times(a: Array, b: Array) -> Array:
    """The product in full precision, also on devices that would round float32."""
    return jnp.matmul(a, b, precision="highest")
