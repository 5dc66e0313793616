"""Spectra of gradients: what a matrix optimizer removes, and what it leaves."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks


def _values(g: Array) -> Array:
    _checks.floating(g=g)
    if jnp.ndim(g) < 2:
        raise ValueError(f"g: expected rank 2 or more, got shape {jnp.shape(g)}")
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    return jnp.linalg.svd(wide, compute_uv=False)


def condition_number(g: Float[Array, "*b m n"]) -> Float[Array, "*b"]:
    """`σ_max / σ_min` of each matrix; 1 for an orthogonal one, infinite for one without full rank.

    A zero matrix has 1.
    """
    values = _values(g)
    return jnp.where(values[..., 0] > 0, values[..., 0] / values[..., -1], 1.0)


def nuclear_norm(g: Float[Array, "*b m n"]) -> Float[Array, "*b"]:
    """`Σ σ_i` of each matrix."""
    return _values(g).sum(-1)


def effective_rank(g: Float[Array, "*b m n"]) -> Float[Array, "*b"]:
    """`exp(-Σ p_i log p_i)` with `p = σ / Σσ`: the rank, were all values equal; 0 for zero.

    Source: Roy and Vetterli, The effective rank, 2007.
    """
    values = _values(g)
    total = values.sum(-1, keepdims=True)
    p = values / jnp.where(total > 0, total, 1.0)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), -1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)
