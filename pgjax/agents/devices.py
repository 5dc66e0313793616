"""One agent on several devices, each with environments of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from pgjax import _checks
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent


def init_on_devices(agent: Agent, key: PRNGKeyArray, num_devices: int) -> on_policy.State:
    """States of one agent whose environments are split over devices, stacked in front.

    Parameters and optimizer state are those of `agent.init(key)` on every device; environments and
    keys are each device's own. With `optim.average_over` first in the agent's optimizer they stay
    alike, and D devices of N environments learn as one with D N would, but that advantages are
    normalised on each device::

        average = optim.average_over("devices")
        agent = agents.ppo(env, num_envs=512, optimizer=optax.chain(average, optax.adam(3e-4)))
        states = agents.init_on_devices(agent, key, jax.local_device_count())
        train = functools.partial(agents.train, agent, num_updates=100)
        states, metrics = jax.pmap(train, axis_name="devices")(states)

    Under `jax.shard_map` with `check_vma=False` and specs of the same axis it is the same. A KL
    limit, which lets each device stop by itself, would let them wait for each other forever.

    Args:
      agent: one that learns from the batch it has just collected (PPO, A2C, PQN).
      key: of all.
      num_devices: D ≥ 1.

    Returns:
      the states, each leaf `[D, ...]`.

    Raises:
      ValueError: a `num_devices` below 1.
      TypeError: an agent whose state is another, such as one with a replay buffer.
    """
    _checks.in_range("num_devices", num_devices, 1)
    one = agent.init(key)
    if not isinstance(one, on_policy.State):
        raise TypeError(
            f"agent: expected one that learns from fresh batches, got a state of {type(one)}"
        )
    keys = jax.random.split(key, num_devices)
    states: on_policy.State = jax.vmap(agent.init)(keys)

    def everywhere(x: Any) -> Any:
        return jnp.broadcast_to(x, (num_devices, *x.shape))

    return states._replace(
        params=jax.tree.map(everywhere, one.params),
        opt_state=jax.tree.map(everywhere, one.opt_state),
    )
