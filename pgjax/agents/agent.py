"""What every agent is: an `init`/`update` pair whose whole state is a pytree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks

Metrics = dict[str, Array]


class Agent(NamedTuple):
    """A way to learn in an environment.

    Attributes:
      init: `key -> state`: parameters, optimizer state, environments, and whatever else the agent
        remembers, as one pytree, which can be checkpointed and mapped over.
      update: `state -> (state, metrics)`: collects and learns once; metrics are f32 scalars.
      act: `(state, key, observation) -> action`, `[N, ...]`: what it would do now that it need not
        explore.
      steps: environment steps of one update.
    """

    init: Callable[[PRNGKeyArray], Any]
    update: Callable[[Any], tuple[Any, Metrics]]
    act: Callable[[Any, PRNGKeyArray, Any], Any]
    steps: int


def train(agent: Agent, state: Any, *, num_updates: int) -> tuple[Any, Metrics]:
    """So many updates, one after the other inside one program.

    Under `jax.vmap` over states it trains many seeds at once, under `jax.pmap` or `jax.shard_map`
    one part of them on each device. Called again on what it returned, it goes on: a run in parts is
    the run at once, to the bit.

    Args:
      agent: what learns.
      state: from `agent.init`, or an earlier call.
      num_updates: ≥ 1.

    Returns:
      the state, and each metric by update, `[num_updates]`.

    Raises:
      ValueError: a `num_updates` below 1.
    """
    _checks.in_range("num_updates", num_updates, 1)

    def one(state: Any, _: None) -> tuple[Any, Metrics]:
        return agent.update(state)

    return jax.lax.scan(one, state, None, length=num_updates)
