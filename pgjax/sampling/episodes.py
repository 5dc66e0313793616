"""What a policy is worth: returns of whole episodes, each counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Environment
from pgjax.sampling.environments import Decision, start_environments, unroll_environments


def episode_returns(
    env: Environment,
    act: Callable[[PRNGKeyArray, Any], Any],
    key: PRNGKeyArray,
    *,
    num_episodes: int,
    max_steps: int = 100_000,
) -> Float[Array, " N"]:
    """Undiscounted return of the first episode of each of N environments.

    The first ones alone: of what so many steps bring to an end, short episodes are more. It runs
    until the last has ended; under `vmap`, until the last of all has.

    Args:
      env: the world.
      act: `(key, observations [N, ...]) -> actions [N, ...]`.
      key: of the policy and the worlds.
      num_episodes: N, ≥ 1.
      max_steps: after which it is given up.

    Returns:
      f32 `[N]`; NaN for an episode that has not ended by then.

    Raises:
      ValueError: a number below 1.
    """
    _checks.in_range("num_episodes", num_episodes, 1)
    _checks.in_range("max_steps", max_steps, 1)
    start, key = jax.random.split(key)

    def is_open(carry: Any) -> Array:
        _, returns, _, steps = carry
        return jnp.any(jnp.isnan(returns)) & (steps < max_steps)

    def one(carry: Any) -> Any:
        running, returns, key, steps = carry
        key, step_key = jax.random.split(key)
        running, _, episodes = unroll_environments(
            env, lambda key, x: Decision(act(key, x)), running, step_key, num_steps=1
        )
        first = episodes.ended[0] & jnp.isnan(returns)
        return running, jnp.where(first, episodes.returns[0], returns), key, steps + 1

    begun = start_environments(env, start, num_episodes)
    unknown = jnp.full(num_episodes, jnp.nan)
    return jax.lax.while_loop(is_open, one, (begun, unknown, key, jnp.int32(0)))[1]
