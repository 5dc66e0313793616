"""Vine sampling: several continuations from states in the middle of a trajectory.

It needs environments that can be put back into any state, which a functional one always can: its
state is a pytree of arrays that goes into `step` and comes out. All functions here are for one
trajectory; `jax.vmap` over keys and states gives many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.types import pytree_dataclass

State = Any
Step = Callable[[State, Any, PRNGKeyArray], tuple[State, Float[Array, ""], Bool[Array, ""]]]
Observe = Callable[[State], Any]
Policy = Callable[[Any, PRNGKeyArray], tuple[Any, Float[Array, ""]]]

_ARRAYS = (jax.Array, np.ndarray, np.generic, bool, int, float)


@pytree_dataclass
class Steps:
    """What happened, time first; behind the end of an episode the state stands still.

    Attributes:
      state: before each step.
      observation: of that state.
      action: drawn by the policy.
      log_prob: of the action, 0 behind the end.
      reward: of the step, 0 behind the end.
      terminated: whether the step ended the episode.
      mask: steps taken before the end.
      last_state: after the last step.
    """

    state: State
    observation: Any
    action: Any
    log_prob: Float[Array, " T"]
    reward: Float[Array, " T"]
    terminated: Bool[Array, " T"]
    mask: Bool[Array, " T"]
    last_state: State


@pytree_dataclass
class Vines:
    """A trajectory and what might have come instead from some of its states.

    Attributes:
      trunk: the trajectory, `[T, ...]`.
      starts: its steps before which the vines begin, int32 `[p]`.
      branches: the vines, `[p, N, W, ...]`.
    """

    trunk: Steps
    starts: Int[Array, " p"]
    branches: Steps


def unroll(
    step: Step,
    observe: Observe,
    policy: Policy,
    state: State,
    key: PRNGKeyArray,
    *,
    horizon: int,
    ended: Bool[Array, ""] | bool = False,
) -> Steps:
    """One trajectory of at most `horizon` steps.

    Args:
      step: `(state, action, key) -> (state, reward, terminated)`, with states of one structure.
      observe: `state -> observation`.
      policy: `(observation, key) -> (action, log_prob)`.
      state: pytree of arrays to begin with.
      key: of all randomness.
      horizon: T ≥ 1, static.
      ended: the episode is over already; then no step counts.

    Raises:
      ValueError: `horizon` < 1; a state that is no pytree of arrays, so that the environment cannot
        be put back into it.
    """
    _checks.in_range("horizon", horizon, 1)
    _check_state("state", state)

    def one(carry: tuple[State, Array], key: Array) -> tuple[Any, tuple[Any, ...]]:
        state, ended = carry
        action_key, step_key = jax.random.split(key)
        observation = observe(state)
        action, log_prob = policy(observation, action_key)
        moved, reward, terminated = step(state, action, step_key)
        following = jax.tree.map(lambda old, new: jnp.where(ended, old, new), state, moved)
        record = (
            state,
            observation,
            action,
            jnp.where(ended, 0.0, log_prob),
            jnp.where(ended, 0.0, reward),
            ~ended & terminated,
            ~ended,
        )
        return (following, ended | terminated), record

    state = jax.tree.map(jnp.asarray, state)
    start = (state, jnp.asarray(ended, bool))
    (last, _), record = jax.lax.scan(one, start, jax.random.split(key, horizon))
    names = ("state", "observation", "action", "log_prob", "reward", "terminated", "mask")
    return Steps(**dict(zip(names, record, strict=True)), last_state=last)


def evenly_spaced(mask: Bool[Array, " T"], *, num_states: int) -> Int[Array, " p"]:
    """Steps `⌊k n / p⌋` for k = 0 ... p - 1 of a trajectory of n steps: all within it, 0 first.

    Args:
      mask: true for the first n steps.
      num_states: p ≥ 1, static; with more states than steps some are taken twice.

    Raises:
      ValueError: wrong rank or dtype, p below 1.
    """
    _checks.rank("mask", mask, 1)
    _checks.boolean(mask=mask)
    _checks.in_range("num_states", num_states, 1)
    return (jnp.arange(num_states) * jnp.sum(mask) // num_states).astype(jnp.int32)


def vine_rollout(
    step: Step,
    observe: Observe,
    policy: Policy,
    state: State,
    key: PRNGKeyArray,
    *,
    num_states: int,
    num_vines: int,
    horizon: int,
    vine_horizon: int | None = None,
) -> Vines:
    """One trajectory, and N independent continuations from p states evenly spaced on it.

    The first of the states is the one the trajectory began in.

    Args:
      step, observe, policy, state, key: as in `unroll`.
      num_states: p ≥ 1, static.
      num_vines: N ≥ 1 continuations of each state, static.
      horizon: T ≥ 1 of the trajectory, static.
      vine_horizon: W ≥ 1, steps of each continuation; None: `horizon`.

    Returns:
      `Vines`. A set of continuations of one state is a set of independent samples from there, see
      `pgjax.advantages.sets`.

    Raises:
      ValueError: a size below 1; as `unroll`.

    Source: vine sampling, Schulman et al. 2015, arXiv 1502.05477; for sets in polychromic
    objectives, 2025, arXiv 2509.25424.
    """
    _checks.in_range("num_vines", num_vines, 1)
    trunk_key, vine_key = jax.random.split(key)
    trunk = unroll(step, observe, policy, state, trunk_key, horizon=horizon)
    starts = evenly_spaced(trunk.mask, num_states=num_states)

    def vine(state: State, ended: Array, key: Array) -> Steps:
        length = horizon if vine_horizon is None else vine_horizon
        return unroll(step, observe, policy, state, key, horizon=length, ended=ended)

    def from_state(start: Array, key: Array) -> Steps:
        state = jax.tree.map(lambda x: x[start], trunk.state)
        keys = jax.random.split(key, num_vines)
        return jax.vmap(vine, in_axes=(None, None, 0))(state, ~trunk.mask[start], keys)

    branches = jax.vmap(from_state)(starts, jax.random.split(vine_key, num_states))
    return Vines(trunk=trunk, starts=starts, branches=branches)


def _check_state(name: str, state: State) -> None:
    leaves = jax.tree.leaves(state)
    wrong = [type(x).__name__ for x in leaves if not isinstance(x, _ARRAYS)]
    if wrong or not leaves:
        raise ValueError(
            f"{name}: expected a pytree of arrays, so that the environment can be put back into "
            f"it, got {', '.join(wrong) or 'no arrays'}"
        )
