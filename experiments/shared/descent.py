"""Stochastic gradient steps and what is recorded on the way, all in one compiled loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray


def descend(
    gradient: Callable[[Any, PRNGKeyArray], Any],
    transform: optax.GradientTransformation,
    params: Any,
    keys: PRNGKeyArray,
    record: Callable[[Any], Any],
    every: int,
) -> Any:
    """Records along `params ← params + update(gradient(params, key))`, one step for each key.

    Args:
      keys: `[K]`, K a multiple of `every`.
      record: of parameters, a tree of arrays.

    Returns:
      `record`'s tree, leaves `[K / every + 1, ...]`: before the first step and after each `every`.
    """
    if len(keys) % every:
        raise ValueError(f"steps: expected a multiple of {every}, got {len(keys)}")

    def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = transform.update(gradient(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    def block(carry: tuple[Any, Any], keys: Array) -> tuple[tuple[Any, Any], Any]:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, record(carry[0])

    first = record(params)
    _, seen = jax.lax.scan(
        block, (params, transform.init(params)), keys.reshape(-1, every, *keys.shape[1:])
    )
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, seen)
