"""What the column-by-column quantisers know of a layer's inputs, and its factor.

The layer is `y = W x` with W `[out, in]` and calibration inputs X `[n, in]`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks

_HIGHEST = jax.lax.Precision.HIGHEST


def input_hessian(
    x: Float[Array, "n c"], *, damp: float = 0.0, mask: Bool[Array, " n"] | None = None
) -> Float[Array, "c c"]:
    """`H = (2/n) XᵀX`, then 1 on the diagonal of dead columns, then `damp · mean(diag H)` added.

    Args:
      x: inputs of the layer, a sample a row.
      damp: at least 0. At 0 the diagonal of dead columns stays 0 as well, for `gptq` to find.
      mask: rows that count; None: all. Without any, H is 0.

    Raises:
      ValueError: wrong rank, dtype or shape, no rows, a negative damp.
    """
    _checks.in_range("damp", damp, 0.0)
    h = _moment(x, x, mask, "x")
    if isinstance(damp, int | float) and damp == 0:
        return h
    return damped(h, damp)


def input_mismatch(
    x_full: Float[Array, "n c"],
    x_quantized: Float[Array, "n c"],
    *,
    mask: Bool[Array, " n"] | None = None,
) -> Float[Array, "c c"]:
    """`D = (2/n) (X_full - X_q)ᵀ X_q`: how inputs drifted because earlier layers were quantised.

    Args:
      x_full: inputs in the original network.
      x_quantized: of the same samples behind the layers quantised so far.
      mask: rows that count; None: all.

    Raises:
      ValueError: wrong ranks, dtypes or shapes, no rows.

    Source: Li et al., "GPTAQ", 2025, arXiv:2504.02692.
    """
    _checks.same_shape(x_full=x_full, x_quantized=x_quantized)
    _checks.floating(x_full=x_full, x_quantized=x_quantized)
    return _moment(wide(x_full) - wide(x_quantized), x_quantized, mask, "x_full")


def chol_inv_upper(h: Float[Array, "c c"]) -> Float[Array, "c c"]:
    """The upper triangular U with positive diagonal and `UᵀU = H⁻¹`.

    One Cholesky factorisation of H with its columns in reverse and one triangular solve; H⁻¹ is
    never formed.

    Raises:
      ValueError: h not square, not floating; a concrete h that is not symmetric, finite and
        positive definite. Under `jit` that gives NaN instead.
    """
    check_hessian(h, None)
    upper = factor(h)
    check_factor(upper, 0.0)
    return upper


def first_order_step(
    w_error: Float[Array, ""],
    gradient: Float[Array, " c"],
    h_inverse: Float[Array, "c c"],
    *,
    index: Int[Array, ""] | int,
) -> Float[Array, " c"]:
    """The best move δ of a row where entry i has to move by `qᵢ - wᵢ`:

        min_δ g·δ + ½ δᵀHδ,  δᵢ = qᵢ - wᵢ:
        δ = -gH⁻¹ - λ (H⁻¹)ᵢ,  λ = ((wᵢ - qᵢ) - (gH⁻¹)ᵢ) / (H⁻¹)ᵢᵢ

    With `g = β (w - w⁰) H` the product `gH⁻¹` is `β (w - w⁰)`, which is what `foem` uses.

    Args:
      w_error: `wᵢ - qᵢ`.
      gradient: g.
      h_inverse: H⁻¹, symmetric positive definite.
      index: i.

    Source: Zheng et al., "First-Order Error Matters", 2025, arXiv:2507.11017.
    """
    free = jnp.matmul(gradient, h_inverse, precision=_HIGHEST)
    multiplier = (w_error - free[index]) / h_inverse[index, index]
    return -free - multiplier * h_inverse[index]


@jax.jit
def quadratic_error(
    w: Float[Array, "r c"], q: Float[Array, "r c"], h: Float[Array, "c c"]
) -> Float[Array, ""]:
    """`½ tr (W - Q) H (W - Q)ᵀ`, which is `(1/n) ‖(W - Q) Xᵀ‖²` for `h = input_hessian(x)`."""
    _checks.same_shape(w=w, q=q)
    gap = wide(w) - wide(q)
    return 0.5 * jnp.sum(jnp.matmul(gap, wide(h), precision=_HIGHEST) * gap)


@jax.jit
def damped(h: Array, damp: float) -> Array:
    """H with 1 on the diagonal of dead columns and then the damping."""
    dead = jnp.diagonal(h) == 0
    h = h + jnp.diag(dead.astype(h.dtype))
    return h + damp * jnp.mean(jnp.diagonal(h)) * jnp.eye(h.shape[0], dtype=h.dtype)


@jax.jit
def factor(h: Array) -> Array:
    """U of `chol_inv_upper`, NaN where h is not positive definite."""
    h = wide(h)
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], eye, lower=False)


def check_factor(upper: Array, damp: float) -> None:
    """Raises ValueError, with a damp to try, if a concrete factor is not finite."""
    if _checks.is_concrete(upper) and not np.isfinite(np.asarray(upper)).all():
        raise ValueError(
            f"h: not positive definite with damp={damp}; try damp={10 * damp if damp else 0.01:g}"
        )


def _moment(x: Array, y: Array, mask: Array | None, name: str) -> Array:
    _checks.rank(name, x, 2)
    _checks.floating(**{name: x})
    if x.shape[0] < 1:
        raise ValueError(f"{name}: expected at least one row, got shape {x.shape}")
    if mask is not None and jnp.shape(mask) != x.shape[:1]:
        raise ValueError(f"mask: expected shape {x.shape[:1]}, got {jnp.shape(mask)}")
    return _second_moment(x, y, mask)


@jax.jit
def _second_moment(x: Array, y: Array, mask: Array | None) -> Array:
    x, y = wide(x), wide(y)
    count: Any = x.shape[0]
    if mask is not None:
        x, y = (jnp.where(mask[:, None], rows, 0.0) for rows in (x, y))
        count = jnp.maximum(mask.sum(), 1)
    return 2.0 * jnp.matmul(x.T, y, precision=_HIGHEST) / count


def wide(x: Any) -> Array:
    """In float32, or what it is if that is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_hessian(h: Any, columns: int | None) -> None:
    """Raises ValueError unless h is square, of that size if given, and symmetric if concrete."""
    _checks.floating(h=h)
    shape = jnp.shape(h)
    if len(shape) != 2 or shape[0] != shape[1] or columns not in (None, shape[0]):
        size = "c" if columns is None else columns
        raise ValueError(f"h: expected shape ({size}, {size}), got {shape}")
    if _checks.is_concrete(h):
        values = np.asarray(h)
        if not np.isfinite(values).all():
            raise ValueError("h: expected finite numbers, got NaN or infinity")
        if np.abs(values - values.T).max(initial=0) > 1e-4 * np.abs(values).max(initial=0):
            raise ValueError("h: expected a symmetric matrix, got one that is not")
