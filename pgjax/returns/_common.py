"""Checked arguments, masks and ends of the record, the same for every return."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pgjax import _checks


def checked(
    mask: Array | None = None, truncated: Array | None = None, **arrays: Array
) -> list[Array]:
    """Checks the time-indexed arguments; casts them and zeroes what the mask leaves out."""
    name, first = next(iter(arrays.items()))
    if np.ndim(first) < 1 or np.shape(first)[-1] < 1:
        raise ValueError(
            f"{name}: expected shape [..., T] with time on the last axis and T >= 1, "
            f"got shape {np.shape(first)}"
        )
    _checks.floating(**arrays)
    _checks.boolean(truncated=truncated, mask=mask)
    _checks.same_shape(**arrays, truncated=truncated, mask=mask)
    dtype = jnp.promote_types(jnp.result_type(*arrays.values()), jnp.float32)
    return [only(mask, jnp.asarray(x, dtype)) for x in arrays.values()]


def trace_weight(lambda_: Array | float, mask: Array | None, like: Array) -> Array:
    """`lambda_` checked and cast; zero where masked when it has a time axis."""
    if np.ndim(lambda_) == 0:
        _checks.in_range("lambda_", lambda_, 0.0, 1.0)
        return jnp.asarray(lambda_, like.dtype)
    if np.shape(lambda_) != like.shape:
        raise ValueError(
            f"lambda_: expected a scalar or shape {like.shape}, got {np.shape(lambda_)}"
        )
    _checks.floating(lambda_=lambda_)
    return only(mask, jnp.asarray(lambda_, like.dtype))


def only(mask: Array | None, x: Array) -> Array:
    """`x` where the mask is true, else 0."""
    return x if mask is None else jnp.where(mask, x, 0)


def skipping(mask: Array | None, a: Array) -> Array:
    """Coefficients that pass the carry through unchanged at masked steps (where inputs are 0)."""
    return a if mask is None else jnp.where(mask, a, 1)


def unless(cut: Array | None, x: Array) -> Array:
    """0 where the record is cut, else `x`."""
    return x if cut is None else jnp.where(cut, 0, x)


def after(x: Array, end: Array | float = 0.0) -> Array:
    """x_{t+1} at t, and `end` at the last position."""
    end = jnp.broadcast_to(jnp.asarray(end, x.dtype), x.shape[:-1])
    return jnp.concatenate([x[..., 1:], end[..., None]], -1)


def ends(truncated: Array | None, mask: Array | None, shape: tuple[int, ...]) -> Array:
    """True where the record ends: at truncations and at the last step that counts."""
    position = jnp.arange(shape[-1])
    if mask is None:
        last = jnp.broadcast_to(position == shape[-1] - 1, shape)
    else:
        last = position == jnp.max(jnp.where(mask, position, -1), -1, keepdims=True)
    return last if truncated is None else last | truncated


def initial_value(name: str, value: Array | float | None, like: Array) -> Array:
    """`value` as an array `[...]` of the dtype and batch shape of `like`, which is `[..., T]`."""
    batch = like.shape[:-1]
    if value is None:
        return jnp.zeros(batch, like.dtype)
    if np.shape(value) not in ((), batch):
        raise ValueError(f"{name}: expected a scalar or shape {batch}, got {np.shape(value)}")
    return jnp.broadcast_to(jnp.asarray(value, like.dtype), batch)
