"""What an agent's actions are worth when it does not explore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from pgjax import envs, sampling


def mean_return(
    env: envs.Environment,
    act: Callable[[Any, Any], Any],
    key: Array,
    *,
    episodes: int,
    length: int,
) -> Float[Array, ""]:
    """Mean undiscounted return of so many episodes that all last so many steps.

    Args:
      env: whose episodes end by a time limit only.
      act: `(key, observations [N, ...]) -> actions [N, ...]`.
      key: of the starts and the worlds.
      episodes: N.
      length: steps of the time limit.
    """
    start, key = jax.random.split(key)
    running = sampling.start_environments(env, start, episodes)
    _, _, found = sampling.unroll_environments(
        env, lambda key, x: sampling.Decision(act(key, x)), running, key, num_steps=length
    )
    return found.returns[-1].mean()
