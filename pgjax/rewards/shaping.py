"""Terms added to a reward."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax import _checks


def soft_overlong_penalty(
    lengths: Int[Array, "*N"], *, max_length: int, cache_length: int
) -> Float[Array, "*N"]:
    """A penalty that sets in shortly before the length limit.

        0                                              length <= max_length - cache_length
        (max_length - cache_length - length) / cache_length    in between
        -1                                             length > max_length

    Args:
      lengths: integer, any shape, tokens of each response.
      max_length: longest response without the full penalty, at least 1. DAPO: 20480.
      cache_length: width of the ramp, in [0, max_length]; 0 leaves only the step at `max_length`.
        DAPO: 4096.

    Returns:
      f32 of `lengths`' shape, in [-1, 0].

    Raises:
      ValueError: lengths that are not integers, or limits out of range.

    Source: DAPO (Yu et al., 2025, arXiv:2503.14476), soft overlong punishment.
    """
    _checks.integer(lengths=lengths)
    _checks.in_range("max_length", max_length, 1)
    _checks.in_range("cache_length", cache_length, 0, max_length)
    lengths = jnp.asarray(lengths)
    signed = lengths.astype(jnp.promote_types(lengths.dtype, jnp.int32))
    excess = signed - (max_length - cache_length)
    ramp = -excess.astype(jnp.float32) / max(cache_length, 1)
    over = jnp.where(excess > cache_length, -1.0, ramp)
    return jnp.where(excess <= 0, 0.0, over)
