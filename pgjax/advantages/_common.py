"""Steps that the advantage functions share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pgjax import _checks


def finite_part(values: Any, where: Any = None) -> tuple[Array, Array, Array]:
    """Values in at least float32 with 0 for what is not finite, what is finite, and what counts."""
    _checks.floating(rewards=values)
    values = jnp.asarray(values)
    finite = jnp.isfinite(values)
    counted = finite
    if where is not None:
        _checks.boolean(where=where)
        _checks.same_shape(rewards=values, where=where)
        counted = finite & where
    x = jnp.where(finite, values, 0.0)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), finite, counted


def deviations_and_std(x: Array, counted: Array, ddof: int) -> tuple[Array, Array]:
    """`x - mean` in the shape of `x`, and the standard deviation, over all counted entries.

    Both are exactly 0 where the counted entries are equal; the spread also where at most `ddof` of
    them count. As `segments.deviations` and `segments.std` with one segment, without the scatters
    that many segments need.
    """
    low = jax.lax.stop_gradient(jnp.min(jnp.where(counted, x, jnp.inf), initial=jnp.inf))
    x = x - jnp.where(low == jnp.inf, 0.0, low)
    n = jnp.sum(counted.astype(x.dtype))
    deviation = x - jnp.sum(jnp.where(counted, x, 0.0)) / jnp.maximum(n, 1.0)
    inside = jnp.where(counted, deviation, 0.0)
    # Squares of the deviations themselves may overflow or vanish.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(inside), initial=0.0))
    scale = jnp.where(scale > 0, scale, 1.0)
    square = jnp.sum((inside / scale) ** 2) / jnp.maximum(n - ddof, 1.0)
    positive = (square > 0) & (n > ddof)
    return deviation, jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def divided(deviation: Array, spread: Array, scale: Array) -> Array:
    """`deviation / scale`, 0 where the spread is 0: without spread there is nothing to compare."""
    none = spread == 0
    return jnp.where(none, 0.0, deviation / jnp.where(none, 1.0, scale))


def check_scale(epsilon: Any, ddof: int) -> None:
    _checks.in_range("epsilon", epsilon, 0.0, high_open=True)
    _checks.one_of("ddof", ddof, (0, 1))
