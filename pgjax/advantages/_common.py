"""Steps that the advantage functions share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from pgjax import _checks, segments


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

    Both are exactly 0 where the counted entries are equal.
    """
    flat, ids = x.reshape(-1), jnp.zeros(x.size, jnp.int32)
    where = counted.reshape(-1)
    deviation = segments.deviations(flat, ids, num_segments=1, where=where)
    spread = segments.std(flat, ids, num_segments=1, ddof=ddof, where=where)
    return deviation.reshape(x.shape), spread[0]


def divided(deviation: Array, spread: Array, scale: Array) -> Array:
    """`deviation / scale`, 0 where the spread is 0: without spread there is nothing to compare."""
    none = spread == 0
    return jnp.where(none, 0.0, deviation / jnp.where(none, 1.0, scale))


def check_scale(epsilon: Any, ddof: int) -> None:
    _checks.in_range("epsilon", epsilon, 0.0, high_open=True)
    _checks.one_of("ddof", ddof, (0, 1))
