"""Random orders without sorting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from pgjax import _checks

_ROUNDS = 8


def random_order(key: PRNGKeyArray, size: int) -> Int[Array, " size"]:
    """A pseudo-random permutation of 0, ..., size - 1, in time proportional to the size.

    Each index goes by itself through a Feistel network, a bijection of the smallest power of two
    that holds them all whatever its round functions are; one that lands outside goes through again
    until it is inside. `jax.random.permutation` sorts instead, which for the half million
    transitions of a large batch takes a hundred times as long on a CPU; below 128 it is what is
    used, since so small a network knows too few permutations. Not for cryptography.

    Args:
      key: of the round functions.
      size: n ≥ 1.

    Returns:
      int32 `[size]`.

    Raises:
      ValueError: a `size` below 1, or above 2³⁰.

    Source: Luby and Rackoff 1988; cycle walking: Black and Rogaway 2002.
    """
    _checks.in_range("size", size, 1, 2**30)
    if size < 128:
        return jax.random.permutation(key, size).astype(jnp.int32)
    bits = (size - 1).bit_length()
    low = bits // 2
    high = bits - low
    secrets = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def shuffled(x: UInt32[Array, " size"]) -> UInt32[Array, " size"]:
        left, right = x >> low, x & ((1 << low) - 1)
        for i in range(0, _ROUNDS, 2):
            left = left ^ (_mixed(right, secrets[i]) >> (32 - high))
            right = right ^ (_mixed(left, secrets[i + 1]) >> (32 - low))
        return (left << low) | right

    order = shuffled(jnp.arange(size, dtype=jnp.uint32))
    if size < 2**bits:
        order = jax.lax.while_loop(
            lambda x: jnp.any(x >= size), lambda x: jnp.where(x >= size, shuffled(x), x), order
        )
    return order.astype(jnp.int32)


def _mixed(x: UInt32[Array, "*N"], secret: UInt32[Array, ""]) -> UInt32[Array, "*N"]:
    """A hash of 32 bits, of which the upper ones are the best."""
    x = (x + secret) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
