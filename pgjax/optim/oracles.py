"""Oracles: for a matrix W, the U of a unit ball with the largest `<W, U>`.

A matrix optimizer is mostly the choice of one. Any function of `[..., m, n]` to the same shape is
an oracle; one that commutes with transposition says so, which lets leaves of shapes (m, n) and
(n, m) share a call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax.optim import coefficients as sets
from pgjax.optim.matrix import frobenius_norm, row_normalize
from pgjax.optim.polar import METHODS, inverse_sqrt
from pgjax.optim.polar import polar as polar_factor


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A direction `[..., m, n] → [..., m, n]`.

    Attributes:
      direction: pure; treats leading axes as a batch; a zero matrix gives zeros.
      transposes: whether `direction(Wᵀ) = direction(W)ᵀ`.
    """

    direction: Callable[[Array], Array]
    transposes: bool = False

    def __call__(self, w: Float[Array, "*b m n"]) -> Float[Array, "*b m n"]:
        return self.direction(w)


def polar(
    method: str = "polar_express",
    *,
    steps: int | None = None,
    coefficients: Sequence[sets.Triple] | None = None,
    eps: float = 1e-7,
    dtype: Any = None,
    precision: Any = None,
) -> Oracle:
    """The spectral norm's: `pgjax.optim.polar` with these options."""
    _checks.one_of("method", method, METHODS)
    fixed = functools.partial(
        polar_factor,
        method=method,
        steps=steps,
        coefficients=coefficients,
        eps=eps,
        dtype=dtype,
        precision=precision,
    )
    return Oracle(fixed, transposes=True)


def rows(*, eps: float = 1e-8) -> Oracle:
    """The largest row norm's: each row over its length."""
    return Oracle(functools.partial(row_normalize, eps=eps))


def columns(*, eps: float = 1e-8) -> Oracle:
    """The largest column norm's: each column over its length."""

    def direction(w: Array) -> Array:
        return jnp.swapaxes(row_normalize(jnp.swapaxes(w, -1, -2), eps=eps), -1, -2)

    return Oracle(direction)


def sign() -> Oracle:
    """The largest entry's: the sign of each."""
    return Oracle(jnp.sign, transposes=True)


def frobenius(*, eps: float = 1e-8) -> Oracle:
    """Frobenius': the matrix over its norm."""
    _checks.in_range("eps", eps, 0, low_open=True)
    return Oracle(lambda w: (w / (frobenius_norm(w) + eps)).astype(w.dtype), transposes=True)


def right_spectral(*, eps: float = 1e-8, iterate: bool = False) -> Oracle:
    """The polar factor from the Gram matrix of columns, `W (WᵀW + eps I)^(-1/2)`: n × n work.

    For matrices whose side n is short. eps damps singular values below its root.

    Args:
      iterate: the root by `inverse_sqrt`, products alone, in place of an eigendecomposition. For
        well-conditioned matrices only: in float32 it is unstable where a singular value is below
        about a thousandth of the largest, and a Gram matrix squares what is left.
    """
    _checks.in_range("eps", eps, 0, low_open=True)

    def direction(w: Array) -> Array:
        wide = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        gram = jnp.matmul(jnp.swapaxes(wide, -1, -2), wide, precision="highest")
        if iterate:
            root = inverse_sqrt(gram, eps=eps)
            return jnp.matmul(wide, root, precision="highest").astype(w.dtype)
        values, vectors = jnp.linalg.eigh(gram)
        # Never the root itself: where W has no content it is 1 / sqrt(eps), and would be rounded
        # by as much as all that W has.
        seen = jnp.matmul(wide, vectors, precision="highest")
        seen = seen * jax.lax.rsqrt(jnp.maximum(values, 0.0) + eps)[..., None, :]
        back = jnp.swapaxes(vectors, -1, -2)
        return jnp.matmul(seen, back, precision="highest").astype(w.dtype)

    return Oracle(direction)


def left_spectral(*, eps: float = 1e-8, iterate: bool = False) -> Oracle:
    """The same from the Gram matrix of rows, `(WWᵀ + eps I)^(-1/2) W`: m × m work."""
    right = right_spectral(eps=eps, iterate=iterate)

    def direction(w: Array) -> Array:
        return jnp.swapaxes(right(jnp.swapaxes(w, -1, -2)), -1, -2)

    return Oracle(direction)


def as_oracle(value: Oracle | Callable[[Array], Array]) -> Oracle:
    """An oracle as it is; a plain function as one that does not transpose."""
    if isinstance(value, Oracle):
        return value
    if not callable(value):
        raise ValueError(f"oracle: expected a function of matrices, got {value!r}")
    return Oracle(value)
