"""A combination lock for vectors: one right action at each step, and only the last one tells.

Two good latent states, 0 and 1, each with a right action of its own at every step; a right action
leads to one of the two by a coin, a wrong one to state 2, from which nothing leads back. At the
last step a right action pays 1; everything else pays .1 half of the time, so that whoever learns
from the reward alone is content with giving up. All episodes have the same length.

Actions are vectors, of which an index is drawn by their softmax at temperature .1. Observations are
noisy one-hot codes of latent state and step, mixed by a Hadamard matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step
from pgjax.types import Transition

LOST, TEMPERATURE, CONSOLATION = 2, 0.1, 0.1


class State(NamedTuple):
    """Latent state 0, 1 or 2, and steps taken; int32 scalars."""

    latent: Int[Array, ""]
    steps: Int[Array, ""]


def random_codes(key: PRNGKeyArray, *, horizon: int, num_actions: int = 10) -> Int[Array, "H 2"]:
    """Right action at each step in states 0 and 1, uniform and independent.

    Raises:
      ValueError: a `horizon` below 1, fewer than two actions.
    """
    _checks.in_range("horizon", horizon, 1)
    _checks.in_range("num_actions", num_actions, 2)
    return jax.random.randint(key, (horizon, 2), 0, num_actions)


def continuous_lock(
    codes: Int[Array, "H 2"], *, num_actions: int = 10, noise: float = 0.1
) -> Environment:
    """A lock with this code; terminates after H steps.

    Observations are f32 `[D]`, D the smallest power of two that holds H + 4 entries: one-hot of the
    latent state and of 3 + steps taken, Gaussian noise on the first H + 3, times the Sylvester
    Hadamard matrix (entries ±1). Actions are f32 `[A]`, best between 0 and 1, not bounded.

    Args:
      codes: right actions in states 0 and 1 by step, integers `[H, 2]`.
      num_actions: A ≥ 2.
      noise: standard deviation ≥ 0.

    Raises:
      ValueError: codes of another shape, dtype or range; a number out of range.

    Departs from the paper: its lock pays less for wrong actions before the end as well, which its
    code computes and then does not return; neither is it here.

    Source: Du et al. 2019, arXiv 1901.09018; in this form with vectors as actions HNPG, Zhou et al.
    2023, arXiv 2311.08384, and its code.
    """
    _checks.rank("codes", codes, 2)
    _checks.integer(codes=codes)
    _checks.in_range("num_actions", num_actions, 2)
    _checks.in_range("noise", noise, 0.0)
    horizon, states = np.shape(codes)
    if states != 2 or horizon < 1:
        raise ValueError(f"codes: expected shape [H, 2] with H >= 1, got {np.shape(codes)}")
    if _checks.is_concrete(codes):
        low, high = int(np.min(codes)), int(np.max(codes))
        if low < 0 or high >= num_actions:
            raise ValueError(f"codes: expected actions in [0, {num_actions}), got {low} to {high}")
    size = 2 ** int(np.ceil(np.log2(horizon + 4)))
    mixing = jnp.asarray(hadamard(size), jnp.float32)
    code = jnp.asarray(codes, jnp.int32)

    def observe(key: PRNGKeyArray, state: State) -> Float[Array, " D"]:
        clear = jax.nn.one_hot(state.latent, size) + jax.nn.one_hot(3 + state.steps, size)
        shaken = noise * jax.random.normal(key, (size,))
        return mixing @ (clear + jnp.where(jnp.arange(size) < horizon + 3, shaken, 0.0))

    def reset(key: PRNGKeyArray) -> tuple[State, Array]:
        latent_key, key = jax.random.split(key)
        state = State(jax.random.randint(latent_key, (), 0, 2), jnp.int32(0))
        return state, observe(key, state)

    def step(key: PRNGKeyArray, state: State, action: Float[Array, " A"]) -> Step:
        index_key, coin_key, luck_key, key = jax.random.split(key, 4)
        index = jax.random.categorical(index_key, action / TEMPERATURE)
        wanted = code[jnp.minimum(state.steps, horizon - 1), jnp.minimum(state.latent, 1)]
        right = (state.latent != LOST) & (index == wanted)
        latent = jnp.where(right, jax.random.randint(coin_key, (), 0, 2), LOST)
        after = State(latent, state.steps + 1)
        last = after.steps >= horizon
        luck = CONSOLATION * jax.random.bernoulli(luck_key)
        reward = jnp.where(last, jnp.where(right, 1.0, luck), 0.0)
        return Step(after, observe(key, after), reward, last, jnp.bool_(False))

    return Environment(
        reset, step, Box((size,)), Box((num_actions,)), "continuous combination lock"
    )


def hadamard(size: int) -> Float[np.ndarray, "D D"]:
    """Sylvester's matrix, entries ±1 and M Mᵀ = D I.

    Raises:
      ValueError: a size that is not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"size: expected a power of two, got {size}")
    found = np.ones((1, 1))
    while len(found) < size:
        found = np.block([[found, found], [found, -found]])
    return found


def optimal_action(
    codes: Int[Array, "H 2"], state: State, *, num_actions: int = 10
) -> Float[Array, " A"]:
    """The right action in a state, one-hot; in state 2 all are alike, and it is that of state 1.

    It is right with chance e¹⁰ / (e¹⁰ + A - 1); actions beyond [0, 1] can do better.
    """
    code = jnp.asarray(codes)
    wanted = code[jnp.minimum(state.steps, len(code) - 1), jnp.minimum(state.latent, 1)]
    return jax.nn.one_hot(wanted, num_actions)


def record(
    key: PRNGKeyArray,
    codes: Int[Array, "H 2"],
    *,
    num_episodes: int,
    random_share: float | None = None,
    num_actions: int = 10,
    noise: float = 0.1,
) -> Transition:
    """Episodes of a guide that knows the code and errs, time-major `[H, num_episodes, ...]`.

    Args:
      key: of guide and lock.
      codes, num_actions, noise: of `continuous_lock`.
      num_episodes: ≥ 1.
      random_share: chance that an action is uniform in [0, 1]^A instead of the right one; None:
        1/H, the paper's; 1: data without a guide.

    Raises:
      ValueError: as `continuous_lock`, and a share outside [0, 1].
    """
    env = continuous_lock(codes, num_actions=num_actions, noise=noise)
    horizon = len(codes)
    share = 1.0 / horizon if random_share is None else random_share
    _checks.in_range("random_share", share, 0.0, 1.0)
    _checks.in_range("num_episodes", num_episodes, 1)

    def episode(key: PRNGKeyArray) -> Transition:
        start_key, key = jax.random.split(key)

        def one(now: Any, key: PRNGKeyArray) -> tuple[Any, Transition]:
            state, observation = now
            err_key, draw_key, step_key = jax.random.split(key, 3)
            right = optimal_action(codes, state, num_actions=num_actions)
            errs = jax.random.bernoulli(err_key, share)
            action = jnp.where(errs, jax.random.uniform(draw_key, right.shape), right)
            found = env.step(step_key, state, action)
            seen = Transition(
                observation=observation,
                action=action,
                reward=found.reward,
                terminated=found.terminated,
                truncated=found.truncated,
                next_observation=found.observation,
            )
            return (found.state, found.observation), seen

        return jax.lax.scan(one, env.reset(start_key), jax.random.split(key, horizon))[1]

    return jax.vmap(episode, out_axes=1)(jax.random.split(key, num_episodes))
