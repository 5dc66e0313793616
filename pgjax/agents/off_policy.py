"""What agents share that learn from what they, or others, have met at any time before.

An agent is its networks, how it explores, and one gradient step on a batch; the loop around them
is the same for all: some steps in the environments, into a replay buffer, and some gradient steps
on samples of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.envs.core import Discrete, Environment
from pgjax.sampling import replay
from pgjax.sampling.environments import (
    Decision,
    Running,
    start_environments,
    unroll_environments,
)
from pgjax.types import Transition


class Learner(NamedTuple):
    """What gradient steps change.

    Attributes:
      params: by network.
      targets: older or averaged copies of some of them.
      opt_state: by network.
      taken: gradient steps so far, int32.
    """

    params: dict[str, Any]
    targets: dict[str, Any]
    opt_state: dict[str, Any]
    taken: Array


class State(NamedTuple):
    """Of an agent that learns from a replay buffer."""

    learner: Learner
    running: Running
    replay: replay.Replay
    key: PRNGKeyArray
    updates: Array


Step = Callable[[Learner, PRNGKeyArray, Any], tuple[Learner, Metrics]]
Sample = Callable[[replay.Replay, PRNGKeyArray], Any]


def agent(
    env: Environment,
    *,
    new: Callable[[PRNGKeyArray], Learner],
    explore: Callable[[Learner, Array, PRNGKeyArray, Any], Any],
    step: Step,
    greedy: Callable[[Learner, Any], Any],
    num_envs: int,
    num_steps: int,
    gradient_steps: int,
    batch_size: int,
    capacity: int,
    start_steps: int,
    sample: Sample | None = None,
) -> Agent:
    """The loop around networks, exploration and one gradient step.

    `init` meets `start_steps` transitions with uniformly random actions, so that there is something
    to sample from at the first update; they are not counted by `Agent.steps`.

    Args:
      env: the world.
      new: `key -> Learner`.
      explore: `(learner, updates so far, key, observations [N, ...]) -> actions [N, ...]`.
      step: `(learner, key, transitions [B, ...]) -> (learner, metrics)`.
      greedy: `(learner, observations) -> actions`, without exploration.
      num_envs: N.
      num_steps: T of each environment in an update.
      gradient_steps: of an update, after its environment steps.
      batch_size: B, with replacement.
      capacity: transitions remembered.
      start_steps: environment steps before the first update, rounded up to a multiple of N.
      sample: `(buffer, key) -> batch` that a gradient step takes; None: B transitions. Rows of the
        buffer are in the order of time, the N environments by turns.

    Raises:
      ValueError: a count below 1, a capacity that one update or the start overfills.
    """
    counts = {
        "num_envs": num_envs,
        "num_steps": num_steps,
        "gradient_steps": gradient_steps,
        "batch_size": batch_size,
        "start_steps": start_steps,
    }
    for name, count in counts.items():
        _checks.in_range(name, count, 1)
    before = -(-start_steps // num_envs)
    _checks.in_range("capacity", capacity, max(num_steps, before) * num_envs)

    def init(key: PRNGKeyArray) -> State:
        new_key, env_key, start_key, key = jax.random.split(key, 4)
        running, seen, _ = unroll_environments(
            env,
            lambda key, observation: Decision(random_actions(env, key, num_envs)),
            start_environments(env, env_key, num_envs),
            start_key,
            num_steps=before,
        )
        batch = flat(seen)
        buffer = replay.init(jax.tree.map(lambda x: x[0], batch), capacity=capacity)
        return State(new(new_key), running, replay.add(buffer, batch), key, jnp.int32(0))

    def update(state: State) -> tuple[State, Metrics]:
        key, act_key, learn_key = jax.random.split(state.key, 3)
        running, seen, episodes = unroll_environments(
            env,
            lambda key, observation: Decision(
                explore(state.learner, state.updates, key, observation)
            ),
            state.running,
            act_key,
            num_steps=num_steps,
        )
        buffer = replay.add(state.replay, flat(seen))
        learner, metrics = learn(
            step,
            state.learner,
            buffer,
            learn_key,
            number=gradient_steps,
            batch_size=batch_size,
            sample=sample,
        )
        state = State(learner, running, buffer, key, state.updates + 1)
        return state, metrics | on_policy.finished(episodes)

    def act(state: State, key: PRNGKeyArray, observation: Any) -> Any:
        del key
        return greedy(state.learner, observation)

    return Agent(init, update, act, num_envs * num_steps)


def learn(
    step: Step,
    learner: Learner,
    buffer: replay.Replay,
    key: PRNGKeyArray,
    *,
    number: int,
    batch_size: int,
    sample: Sample | None = None,
) -> tuple[Learner, Metrics]:
    """So many gradient steps, each on a sample of its own; means of their metrics."""
    take = functools.partial(replay.sample, batch_size=batch_size) if sample is None else sample

    def one(learner: Learner, key: PRNGKeyArray) -> tuple[Learner, Metrics]:
        sample_key, step_key = jax.random.split(key)
        return step(learner, step_key, take(buffer, sample_key))

    learner, stacked = jax.lax.scan(one, learner, jax.random.split(key, number))
    # Steps that leave a network alone report NaN for its loss.
    return learner, {name: jnp.nanmean(x) for name, x in stacked.items()}


def descend(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """One step of the optimizer: parameters and its state."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def flat(seen: Transition) -> Transition:
    """Time and environments as one axis, `[T N, ...]`, without what the policy said."""
    bare = seen.replace(log_prob=None, value=None)
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), bare)


def discounts(batch: Transition, discount: float) -> Float[Array, " B"]:
    """γ(1 - terminated): a time limit is no end."""
    return discount * (1.0 - batch.terminated)


def random_actions(env: Environment, key: PRNGKeyArray, number: int) -> Array:
    """Uniform ones, `[number, ...]`.

    Raises:
      ValueError: actions without bounds.
    """
    kind = env.action
    if isinstance(kind, Discrete):
        return jax.random.randint(key, (number,), 0, kind.num)
    low, high = np.asarray(kind.low, np.float32), np.asarray(kind.high, np.float32)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"env.action: expected finite bounds, got {kind.low} to {kind.high}")
    return jax.random.uniform(key, (number, *kind.shape), minval=low, maxval=high)


def with_noise(
    key: PRNGKeyArray,
    action: Float[Array, "*B"],
    *,
    scale: float | Array,
    clip: float = float("inf"),
) -> Float[Array, "*B"]:
    """Actions with Gaussian noise of this scale, itself cut off at `clip`, kept in [-1, 1]."""
    noise = jnp.clip(scale * jax.random.normal(key, action.shape), -clip, clip)
    return jnp.clip(action + noise, -1.0, 1.0)
