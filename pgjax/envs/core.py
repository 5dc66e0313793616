"""What an environment is: two pure functions of one episode, and the kinds of their arrays.

```
state, observation = env.reset(key)
step = env.step(key, state, action)    # state, observation, reward, terminated, truncated
```

Nothing resets by itself: the observation of a step belongs to the episode that it ends, and
`step_or_reset` tells the first of the next one apart from it. All functions are of one environment;
`jax.vmap` makes thousands, `sampling.unroll_environments` steps through them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks


class Discrete(NamedTuple):
    """One of the integers 0 to `num` - 1, as an int32 scalar."""

    num: int


class Box(NamedTuple):
    """Real numbers of this shape, f32; `low` and `high` are scalars or arrays of the shape."""

    shape: tuple[int, ...]
    low: Any = -np.inf
    high: Any = np.inf


class Step(NamedTuple):
    """What an action led to.

    Attributes:
      state: after it.
      observation: of that state, before any reset.
      reward: f32.
      terminated: the episode is over, and nothing that might have come after counts.
      truncated: the episode was cut off here and might have gone on.
    """

    state: Any
    observation: Any
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Environment:
    """A world in two pure functions.

    Attributes:
      reset: `key -> (state, observation)`.
      step: `(key, state, action) -> Step`; does not reset.
      observation: kind of the observations.
      action: kind of the actions.
      name: for tables and messages.
    """

    reset: Callable[[PRNGKeyArray], tuple[Any, Any]]
    step: Callable[[PRNGKeyArray, Any, Any], Step]
    observation: Discrete | Box
    action: Discrete | Box
    name: str = "environment"


def step_or_reset(
    env: Environment, key: PRNGKeyArray, state: Any, action: Any
) -> tuple[Step, Any, Any]:
    """A step, and from where to go on: a new episode where this one has ended.

    Args:
      env: the world.
      key: of the step and of the next episode's start.
      state: before the step.
      action: of the kind `env.action`.

    Returns:
      the step; the next state; its observation. The last two are those of the step, or of a reset
      where it terminated or truncated the episode.
    """
    step_key, reset_key = jax.random.split(key)
    step = env.step(step_key, state, action)
    ended = step.terminated | step.truncated
    fresh = env.reset(reset_key)
    state, observation = jax.tree.map(
        lambda new, old: jnp.where(ended, new, old), fresh, (step.state, step.observation)
    )
    return step, state, observation


class Timed(NamedTuple):
    """A state and how many steps led to it."""

    state: Any
    steps: Int[Array, ""]


def with_time_limit(env: Environment, max_steps: int) -> Environment:
    """The environment whose episodes are truncated after so many steps, unless they terminate.

    Raises:
      ValueError: a `max_steps` below 1.
    """
    _checks.in_range("max_steps", max_steps, 1)

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        state, observation = env.reset(key)
        return Timed(state=state, steps=jnp.int32(0)), observation

    def step(key: PRNGKeyArray, timed: Any, action: Any) -> Step:
        found = env.step(key, timed.state, action)
        steps = timed.steps + 1
        cut = found.truncated | (steps >= max_steps)
        return found._replace(
            state=Timed(state=found.state, steps=steps), truncated=cut & ~found.terminated
        )

    return dataclasses.replace(env, reset=reset, step=step)


def with_scaled_actions(env: Environment) -> Environment:
    """The environment with actions in [-1, 1], stretched over its own bounds; clipped outside.

    Raises:
      ValueError: discrete actions, or bounds that are not finite.
    """
    kind = env.action
    if not isinstance(kind, Box):
        raise ValueError(f"env.action: expected a Box, got {kind}")
    low, high = np.asarray(kind.low, np.float32), np.asarray(kind.high, np.float32)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"env.action: expected finite bounds, got {kind.low} to {kind.high}")

    def step(key: PRNGKeyArray, state: Any, action: Any) -> Step:
        unit = 0.5 * (jnp.clip(action, -1.0, 1.0) + 1.0)
        return env.step(key, state, low + unit * (high - low))

    return dataclasses.replace(env, step=step, action=Box(kind.shape, -1.0, 1.0))


def with_flat_observations(env: Environment) -> Environment:
    """The environment whose observations are f32 vectors: arrays made flat, integers one-hot."""
    kind = env.observation
    size = kind.num if isinstance(kind, Discrete) else int(np.prod(kind.shape))

    def flat(observation: Any) -> Array:
        if isinstance(kind, Discrete):
            return jax.nn.one_hot(observation, kind.num)
        return jnp.asarray(observation, jnp.float32).reshape(size)

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        state, observation = env.reset(key)
        return state, flat(observation)

    def step(key: PRNGKeyArray, state: Any, action: Any) -> Step:
        found = env.step(key, state, action)
        return found._replace(observation=flat(found.observation))

    return dataclasses.replace(env, reset=reset, step=step, observation=Box((size,)))
