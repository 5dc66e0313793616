"""Many environments stepped through at once: what a policy met, time-major."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Environment, step_or_reset
from pgjax.types import Transition


class Decision(NamedTuple):
    """What a policy says of N observations; None for what it does not know.

    Attributes:
      action: `[N, ...]`.
      log_prob: of the actions, f32 `[N]`.
      value: of the observations, f32 `[N]`.
    """

    action: Any
    log_prob: Float[Array, " N"] | None = None
    value: Float[Array, " N"] | None = None


class Running(NamedTuple):
    """Environments in the middle of their episodes.

    Attributes:
      state, observation: of each, `[N, ...]`.
      returns: undiscounted reward of the episode so far, f32 `[N]`.
      lengths: its steps so far, int32 `[N]`.
    """

    state: Any
    observation: Any
    returns: Float[Array, " N"]
    lengths: Int[Array, " N"]


class Episodes(NamedTuple):
    """Where episodes ended in an unroll, `[T, N]`; the others are meaningful where `ended` is.

    Attributes:
      ended: terminated or truncated by this step.
      returns: undiscounted reward of the whole episode.
      lengths: its steps.
    """

    ended: Bool[Array, "T N"]
    returns: Float[Array, "T N"]
    lengths: Int[Array, "T N"]


def start_environments(env: Environment, key: PRNGKeyArray, num_envs: int) -> Running:
    """So many environments at the beginning of an episode.

    Raises:
      ValueError: a `num_envs` below 1.
    """
    _checks.in_range("num_envs", num_envs, 1)
    state, observation = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    observation = jax.tree.map(jnp.copy, observation)  # may be the state: no buffer is given twice
    return Running(state, observation, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))


def unroll_environments(
    env: Environment,
    act: Callable[[PRNGKeyArray, Any], Decision],
    running: Running,
    key: PRNGKeyArray,
    *,
    num_steps: int,
) -> tuple[Running, Transition, Episodes]:
    """Steps through all environments, each of which starts anew where its episode ends.

    Args:
      env: the world.
      act: `(key, observations [N, ...]) -> Decision`.
      running: from `start_environments`, or an earlier call.
      key: of the policy and the worlds.
      num_steps: T, ≥ 1.

    Returns:
      the environments after the last step; what happened, `[T, N, ...]`, with observations before
      any reset in `next_observation`; the episodes that ended.

    Raises:
      ValueError: a `num_steps` below 1.
    """
    _checks.in_range("num_steps", num_steps, 1)
    num_envs = running.returns.shape[0]
    many = jax.vmap(functools.partial(step_or_reset, env))
    # All at once: many small calls of the generator, one after the other, cost more than the steps.
    act_key, env_key = jax.random.split(key)
    keys = jax.random.split(act_key, num_steps), jax.random.split(env_key, (num_steps, num_envs))

    def one(running: Running, keys: Any) -> tuple[Running, tuple[Transition, Episodes]]:
        act_key, env_keys = keys
        decision = act(act_key, running.observation)
        step, state, observation = many(env_keys, running.state, decision.action)
        returns, lengths = running.returns + step.reward, running.lengths + 1
        ended = step.terminated | step.truncated
        transition = Transition(
            observation=running.observation,
            action=decision.action,
            reward=step.reward,
            terminated=step.terminated,
            truncated=step.truncated,
            next_observation=step.observation,
            log_prob=decision.log_prob,
            value=decision.value,
        )
        running = Running(
            state, observation, jnp.where(ended, 0.0, returns), jnp.where(ended, 0, lengths)
        )
        return running, (transition, Episodes(ended, returns, lengths))

    running, (transitions, episodes) = jax.lax.scan(one, running, keys)
    return running, transitions, episodes
