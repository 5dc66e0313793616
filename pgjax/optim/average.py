"""Gradients averaged over devices, as the first link of a chain."""

from __future__ import annotations

from typing import Any

import jax
import optax


def average_over(axis_name: str | tuple[str, ...]) -> optax.GradientTransformation:
    """Replaces each gradient by its mean over a named axis of `pmap`, `shard_map` or `vmap`.

    g ← (1/D) Σ_d g_d. Chained before anything that is not linear, such as a clip of the norm or
    Adam, it lets D devices with parameters alike and data of their own take one step together.

    Args:
      axis_name: of the surrounding map; using the transform outside of it is an error of JAX's.

    Returns:
      a transform without state.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: Any = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        return jax.lax.pmean(updates, axis_name), state

    return optax.GradientTransformation(init, update)
