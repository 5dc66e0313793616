"""Checks and small steps that the log-prob functions share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pgjax import _checks


def at_least_float32(x: Any) -> Array:
    """`x` as float32, or as float64 where it already is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def constant_temperature(temperature: Any) -> Array | float:
    """Checks a scalar temperature and cuts it from differentiation."""
    _checks.rank("temperature", temperature, 0)
    _checks.in_range("temperature", temperature, 0.0, low_open=True, high_open=True)
    return jax.lax.stop_gradient(temperature)


def next_tokens(tokens: Array) -> Array:
    """`tokens[b, t + 1]` at index t; the last column, which predicts nothing, is 0."""
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))


def token_range(tokens: Any, vocabulary: int) -> None:
    """Raises ValueError where concrete tokens lie outside [0, vocabulary)."""
    _checks.integer(tokens=tokens)
    if vocabulary < 1:
        raise ValueError(f"vocabulary: expected at least one token, got {vocabulary}")
    # An array spread over several processes is concrete, but no process can read all of it.
    readable = _checks.is_concrete(tokens) and getattr(tokens, "is_fully_addressable", True)
    if readable and np.size(tokens):
        ids = np.asarray(tokens)  # np.min of a jax array would be traced inside someone's jit
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"tokens: expected ids in [0, {vocabulary}), got values in [{low}, {high}]"
            )
