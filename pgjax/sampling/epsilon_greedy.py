"""The best action, or now and then any."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks


def epsilon_greedy(
    key: PRNGKeyArray,
    action_values: Float[Array, "*B A"],
    *,
    epsilon: Float[Array, ""] | float,
) -> Int[Array, "*B"]:
    """argmax_a Q(a), or with probability ε one of all A actions, the best among them.

    Args:
      key: of the choice.
      action_values: Q, `[..., A]`; of equal values the first is best.
      epsilon: in [0, 1].

    Returns:
      int32 `[...]`.

    Raises:
      ValueError: a concrete ε outside [0, 1], no axis of actions.
    """
    _checks.in_range("epsilon", epsilon, 0.0, 1.0)
    if jnp.ndim(action_values) < 1:
        raise ValueError("action_values: expected shape [..., A], got a scalar")
    which_key, any_key = jax.random.split(key)
    batch, actions = action_values.shape[:-1], action_values.shape[-1]
    explore = jax.random.uniform(which_key, batch) < epsilon
    other = jax.random.randint(any_key, batch, 0, actions)
    return jnp.where(explore, other, jnp.argmax(action_values, axis=-1)).astype(jnp.int32)
