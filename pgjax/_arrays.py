"""Float32 or wider, and a root whose derivative at 0 is not NaN."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def widened(x: Any) -> Array:
    """The array in float32, or in its own dtype where that is wider."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def safe_sqrt(square: Array) -> Array:
    """The root; 0 at 0 and below, and of derivative 0 there."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
