"""What agents share that learn from a data set and never act while they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.off_policy import Learner, Step, flat, learn
from pgjax.sampling import replay
from pgjax.types import Transition


class State(NamedTuple):
    """Of an agent that learns from data; what is added to `replay` later is learnt from as well."""

    learner: Learner
    replay: replay.Replay
    key: PRNGKeyArray
    updates: Array


def agent(
    data: Transition,
    *,
    new: Callable[[PRNGKeyArray], Learner],
    step: Step,
    greedy: Callable[[Learner, Any], Any],
    gradient_steps: int,
    batch_size: int,
) -> Agent:
    """Gradient steps on samples of the data; `Agent.steps` is 0.

    Args:
      data: transitions `[B, ...]` or `[T, N, ...]`, see `checked`.
      new: `key -> Learner`.
      step: `(learner, key, transitions [B, ...]) -> (learner, metrics)`.
      greedy: `(learner, observations) -> actions`, without exploration.
      gradient_steps: of an update.
      batch_size: B, with replacement.

    Raises:
      ValueError: a count below 1, data that `checked` refuses.
    """
    _checks.in_range("gradient_steps", gradient_steps, 1)
    _checks.in_range("batch_size", batch_size, 1)
    rows = checked(data)

    def init(key: PRNGKeyArray) -> State:
        new_key, key = jax.random.split(key)
        number = jnp.int32(rows.reward.shape[0])
        return State(new(new_key), replay.Replay(rows, jnp.int32(0), number), key, jnp.int32(0))

    def update(state: State) -> tuple[State, Metrics]:
        key, learn_key = jax.random.split(state.key)
        learner, metrics = learn(
            step,
            state.learner,
            state.replay,
            learn_key,
            number=gradient_steps,
            batch_size=batch_size,
        )
        return State(learner, state.replay, key, state.updates + 1), metrics

    def act(state: State, key: PRNGKeyArray, observation: Any) -> Any:
        del key
        return greedy(state.learner, observation)

    return Agent(init, update, act, 0)


def checked(data: Transition) -> Transition:
    """The data as `[B, ...]`, with actions kept within ±(1 - 1e-5).

    Raises:
      ValueError: no transitions, fields of unequal length or missing, actions that are not vectors
        in [-1, 1], `terminated` that is not bool.
    """
    for name in ("observation", "action", "reward", "terminated", "next_observation"):
        if getattr(data, name) is None:
            raise ValueError(
                f"data.{name}: expected an array, got None"
                + ("; a time limit is no end" if name == "terminated" else "")
            )
    _checks.rank("data.reward", data.reward, 1, 2)
    _checks.boolean(**{"data.terminated": data.terminated})
    front = np.shape(data.reward)
    if 0 in front:
        raise ValueError(f"data: expected at least one transition, got rewards of shape {front}")
    for path, x in jax.tree_util.tree_leaves_with_path(data):
        if np.shape(x)[: len(front)] != front:
            raise ValueError(
                f"data{jax.tree_util.keystr(path)}: expected shape {front} like the rewards and "
                f"what one transition has, got {np.shape(x)}"
            )
    _checks.rank("data.action", data.action, len(front) + 1)
    if _checks.is_concrete(data.action):
        largest = float(np.max(np.abs(data.action)))
        if not largest <= 1.0:  # NaN also lands here
            raise ValueError(f"data.action: expected numbers in [-1, 1], got up to ±{largest:g}")
    data = jax.tree.map(jnp.asarray, data)
    rows = flat(data) if len(front) == 2 else data.replace(log_prob=None, value=None)
    bound = 1.0 - 1e-5
    return rows.replace(action=jnp.clip(rows.action, -bound, bound))
