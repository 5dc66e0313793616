"""The polar factor U of a matrix X = U H: the nearest (semi-)orthogonal matrix, and the step that
a spectral norm calls steepest.

Iterations act on the short side: a tall matrix is transposed, iterated and transposed back. The
norm that starts an iteration is float32 whatever its dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.optim import coefficients as sets
from pgjax.optim.matrix import frobenius_norm
from pgjax.optim.zolo import zolo

METHODS = ("ns", "polar_express", "gram_ns", "qdwh", "svd", "eigh", "zolo")
ITERATIVE = ("ns", "polar_express", "gram_ns")
SYMMETRIC_BLOCK = 256
"""Symmetric products are cut into blocks no narrower than this."""


def polar(
    x: Float[Array, "*b m n"],
    *,
    method: str = "polar_express",
    steps: int | None = None,
    coefficients: Sequence[sets.Triple] | None = None,
    eps: float = 1e-7,
    dtype: Any = None,
    precision: Any = None,
) -> Float[Array, "*b m n"]:
    """`U = X (XᵀX)^(-1/2)` of each matrix: all singular values become 1.

    A zero matrix gives zeros. Directions in which X has no content stay 0 under the polynomial
    iterations, `svd` and `eigh`; `qdwh` and `zolo` complete them by arbitrary orthonormal ones.
    `<X, U>`, the nuclear norm, is the same.

    Args:
      x: floating `[..., m, n]`.
      method: static.
        `ns`: Newton-Schulz with any quintics, by default Keller's, five steps. Approximate.
        `polar_express`: the same with `coefficients.polar_express()`, by default eight steps, which
          bring singular values above a thousandth of `‖X‖_F` within 1e-4 of 1.
        `gram_ns`: the same polynomials on `X Xᵀ` (Gram Newton-Schulz) where that takes fewer FLOPs,
          for n > 1.5 m (8 m² n + 28 m³ instead of 20 m² n + 10 m³ for five steps); the Gram matrix
          is formed anew after two steps, without which half precision makes it indefinite. Other
          matrices take plain steps with the same coefficients.
        `qdwh`: QR-based dynamically weighted Halley iteration to convergence. Exact; has no
          reverse-mode derivative.
        `svd`, `eigh`: by decomposition. Exact; `eigh` on `X Xᵀ`, so only for condition numbers
          below about 1e3 in float32.
        `zolo`: Zolotarev's rational iteration, float64 and concrete arrays only: a reference.
      steps: static, iterations. For `qdwh`, at most so many: two, as released code of PolarGrad
        has it, are far from a polar factor. None: the method's own number.
      coefficients: for `ns`, `polar_express` and `gram_ns`.
      eps: added to the norm that X is divided by.
      dtype: what the polynomial iterations compute in; None: bfloat16 for float32 and narrower on
        accelerators, else x's own, float32 at least.
      precision: of matrix products; None: the default for polynomial iterations, the highest for
        exact methods.

    Returns:
      U, of x's shape and dtype.

    Raises:
      ValueError: an unknown method, steps below 1, a rank below 2, a dtype that is not floating;
        `coefficients` or `dtype` with a method that has none; `zolo` otherwise than in float64.

    Source: Higham, Functions of Matrices, ch. 8; Jordan et al., Muon, 2024; Amsel et al., arXiv
    2505.16932; Nakatsukasa, Bai and Gygi, QDWH, 2010; Nakatsukasa and Freund, Zolo-PD, 2016.
    """
    _checks.one_of("method", method, METHODS)
    _checks.floating(x=x)
    if jnp.ndim(x) < 2:
        raise ValueError(f"x: expected rank 2 or more, got shape {jnp.shape(x)}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps: expected an integer of at least 1, got {steps!r}")
    for name, value in {"coefficients": coefficients, "dtype": dtype}.items():
        if value is not None and method not in ITERATIVE:
            raise ValueError(f"{name}: {method!r} takes none, got {value!r}")
    if steps is not None and method not in (*ITERATIVE, "qdwh"):
        raise ValueError(f"steps: {method!r} is not iterated, got {steps!r}")
    tall = x.shape[-2] > x.shape[-1]
    wide = jnp.swapaxes(x, -1, -2) if tall else x
    if method in ITERATIVE:
        u = _iterate(wide, method, steps, coefficients, eps, dtype, precision)
    elif method == "zolo":
        u = zolo(wide)
    else:
        kept = wide.astype(jnp.promote_types(x.dtype, jnp.float32))
        # A decomposition of zeros has no derivative; one of distinct singular values has.
        empty = frobenius_norm(kept) == 0
        spare = jnp.eye(kept.shape[-2], kept.shape[-1], dtype=kept.dtype) * jnp.arange(
            1, kept.shape[-1] + 1
        )
        kept = jnp.where(empty, spare, kept)
        with jax.default_matmul_precision("highest" if precision is None else str(precision)):
            u = (
                _svd(kept)
                if method == "svd"
                else _eigh(kept)
                if method == "eigh"
                else (_qdwh(kept, steps))
            )
        u = jnp.where(empty, 0.0, u)
    return (jnp.swapaxes(u, -1, -2) if tall else u).astype(x.dtype)


def _iterate(
    x: Array,
    method: str,
    steps: int | None,
    coefficients: Sequence[sets.Triple] | None,
    eps: float,
    dtype: Any,
    precision: Any,
) -> Array:
    # Quintics whose safety is above 1 were made for a start that much smaller.
    start = 1.0
    restarts: tuple[int, ...] = ()
    if coefficients is not None:
        rows = sets.take(coefficients, steps)
    elif method == "ns":
        rows = sets.take(sets.KELLER, steps or 5)
    elif method == "polar_express":
        rows, start = sets.polar_express(steps=steps or 8), 1.01
    else:
        rows, start = sets.polar_express(steps=steps or 5, safety=1.05), 1.05
    if method == "gram_ns":
        restarts = tuple(range(2, len(rows), 3))
    norm = start * frobenius_norm(x) + eps
    begun = (x / norm).astype(_compute_dtype(x.dtype) if dtype is None else dtype)
    table = np.asarray(rows)
    m, n = x.shape[-2:]
    if method == "gram_ns" and n > 1.5 * m:
        return _gram_newton_schulz(begun, table, restarts, precision)
    return _newton_schulz(begun, table, precision)


def _compute_dtype(dtype: Any) -> Any:
    if dtype == jnp.float64:
        return dtype
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def symmetric_matmul(
    a: Float[Array, "*b m k"], b: Float[Array, "*b m k"], *, precision: Any = None
) -> Float[Array, "*b m m"]:
    """`A Bᵀ` where it is known to be symmetric, without the blocks below the diagonal.

    Wide ones are cut into four by four blocks, or two by two, of which the lower are mirrors:
    5/8 or 3/4 of the FLOPs. For `A Aᵀ`, and for products of polynomials of one symmetric matrix.
    """
    m = a.shape[-2]
    count = next((p for p in (4, 2) if m % p == 0 and m // p >= SYMMETRIC_BLOCK), 1)
    if count == 1:
        return _times_transpose(a, b, precision)
    left = jnp.split(a, count, -2)
    right = left if a is b else jnp.split(b, count, -2)
    upper = {
        (i, j): _times_transpose(left[i], right[j], precision)
        for i, j in itertools.combinations_with_replacement(range(count), 2)
    }

    def block(i: int, j: int) -> Array:
        return upper[i, j] if i <= j else jnp.swapaxes(upper[j, i], -1, -2)

    every = range(count)
    return jnp.concatenate([jnp.concatenate([block(i, j) for j in every], -1) for i in every], -2)


def _times_transpose(a: Array, b: Array, precision: Any) -> Array:
    return jnp.einsum("...ik,...jk->...ij", a, b, precision=precision)


def _newton_schulz(x: Array, table: np.ndarray, precision: Any) -> Array:
    def step(x: Array, row: Array) -> tuple[Array, None]:
        a, b, c = row
        gram = symmetric_matmul(x, x, precision=precision)
        square = symmetric_matmul(gram, gram, precision=precision)
        return a * x + jnp.matmul(b * gram + c * square, x, precision=precision), None

    return jax.lax.scan(step, x, jnp.asarray(table, x.dtype))[0]


def _gram_newton_schulz(
    x: Array, table: np.ndarray, restarts: Sequence[int], precision: Any
) -> Array:
    """The same polynomials as one factor Q of X, found from `R = X Xᵀ` alone between restarts."""
    symmetric = functools.partial(symmetric_matmul, precision=precision)
    bounds = [0, *restarts, len(table)]
    for start, stop in itertools.pairwise(bounds):
        gram = symmetric(x, x)
        identity = jnp.eye(gram.shape[-1], dtype=x.dtype)
        factor = None
        for k in range(start, stop):
            a, b, c = (jnp.asarray(value, x.dtype) for value in table[k])
            poly = b * gram + c * symmetric(gram, gram)
            factor = poly + a * identity if factor is None else symmetric(factor, poly) + a * factor
            if k + 1 < stop:
                once = symmetric(gram, poly) + a * gram
                gram = symmetric(poly, once) + a * once
        assert factor is not None
        x = jnp.matmul(factor, x, precision=precision)
    return x


def _svd(x: Array) -> Array:
    left, values, right = jnp.linalg.svd(x, full_matrices=False)
    kept = values > values[..., :1] * x.shape[-1] * jnp.finfo(x.dtype).eps
    return (left * kept[..., None, :].astype(x.dtype)) @ right


def _eigh(x: Array) -> Array:
    values, vectors = jnp.linalg.eigh(x @ jnp.swapaxes(x, -1, -2))
    floor = values[..., -1:] * x.shape[-1] * jnp.finfo(x.dtype).eps
    inverse = jnp.where(values > floor, jax.lax.rsqrt(jnp.maximum(values, floor)), 0.0)
    return (vectors * inverse[..., None, :]) @ jnp.swapaxes(vectors, -1, -2) @ x


def _qdwh(x: Array, steps: int | None) -> Array:
    def one(matrix: Array) -> Array:
        # JAX's own wants at least as many rows as columns.
        return jax.lax.linalg.qdwh(matrix.T, max_iterations=steps)[0].T

    flat = x.reshape(-1, *x.shape[-2:])
    return (one(flat[0])[None] if flat.shape[0] == 1 else jax.vmap(one)(flat)).reshape(x.shape)


def inverse_sqrt(
    a: Float[Array, "*b n n"],
    *,
    eps: float = 1e-8,
    steps: int = 8,
    coefficients: Sequence[sets.Triple] | None = None,
    precision: Any = "highest",
) -> Float[Array, "*b n n"]:
    """`(A + eps I)^(-1/2)` of symmetric positive semi-definite matrices, in float32 or wider.

    The coupled iteration of a quintic: with `Y = A / α`, `Z = I` and residual `r = I - Z Y`,
    `M = (a + b + c) I - (b + 2c) r + c r²`, `Y ← Y M`, `Z ← M Z`; then `Z / √α`. Eigenvalues below
    about 1e-6 of the norm α are not resolved in eight steps.

    Args:
      coefficients: triples (a, b, c) of `a s + b s³ + c s⁵`; None: `polar_express(steps=steps)`.
      steps: static.
    """
    _checks.floating(a=a)
    if jnp.ndim(a) < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a: expected square matrices, got shape {jnp.shape(a)}")
    _checks.in_range("eps", eps, 0)
    wide = a.astype(jnp.promote_types(a.dtype, jnp.float32))
    identity = jnp.eye(a.shape[-1], dtype=wide.dtype)
    wide = wide + eps * identity
    scale = 1.02 * frobenius_norm(wide) + eps
    scale = jnp.where(scale > 0, scale, 1.0)
    matmul = functools.partial(jnp.matmul, precision=precision)

    def step(pair: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
        y, z = pair
        a0, b0, c0 = row
        rest = identity - matmul(z, y)
        rest = (rest + jnp.swapaxes(rest, -1, -2)) / 2
        poly = (a0 + b0 + c0) * identity - (b0 + 2 * c0) * rest + c0 * matmul(rest, rest)
        return (matmul(y, poly), matmul(poly, z)), None

    rows = sets.polar_express(steps=steps) if coefficients is None else coefficients
    table = jnp.asarray(sets.take(rows, steps), wide.dtype)
    z0 = jnp.broadcast_to(identity, wide.shape)
    (_, z), _ = jax.lax.scan(step, (wide / scale, z0), table)
    return z / jnp.sqrt(scale)
