"""A lock of H digits behind rich observations: exploration without a hint, in a low-rank world."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Discrete, Environment, Step

LOST = 2
NUM_LATENT = 3


class FiniteMdp(NamedTuple):
    """A tabular world of H steps.

    Attributes:
      start: of the first state, f32 `[S]`.
      transitions: P_h(s'|s, a), f32 `[H, S, A, S]`; the last step's matter for nothing.
      rewards: r_h(s, a), f32 `[H, S, A]`.
    """

    start: Float[Array, " S"]
    transitions: Float[Array, "H S A S"]
    rewards: Float[Array, "H S A"]


def combination_lock(
    key: PRNGKeyArray,
    *,
    horizon: int = 6,
    num_actions: int = 4,
    observations_per_latent: int = 10,
) -> FiniteMdp:
    """A world in which one action of each step goes on, all others are lost for good.

    Three latent states, two good ones and a lost one, each seen as one of so many observations that
    are its own, drawn uniformly. In a good one a secret action, of the step and the state, leads to
    either good one with probability 1/2, any other to the lost one, which stays. The secret action
    of the last step gives reward 1; so the best value is 1, the uniform policy's A^-H. Transitions
    of each step have rank 3 at most.

    Args:
      key: of the secret actions.
      horizon: H ≥ 1.
      num_actions: A ≥ 2.
      observations_per_latent: ≥ 1; S is three times that.

    Raises:
      ValueError: a number out of range.

    Source: the rich-observation combination lock of Misra et al. 2020 (HOMER), arXiv 1911.05815,
    without its rewards that lead astray.
    """
    _checks.in_range("horizon", horizon, 1)
    _checks.in_range("num_actions", num_actions, 2)
    _checks.in_range("observations_per_latent", observations_per_latent, 1)
    secret = jax.random.randint(key, (horizon, LOST), 0, num_actions)
    right = jax.nn.one_hot(secret, num_actions)  # [H, 2, A]
    good = jnp.array([0.5, 0.5, 0.0])
    lost = jnp.array([0.0, 0.0, 1.0])
    moves = jnp.where(right[..., None] > 0, good, lost)  # [H, 2, A, 3]
    stays = jnp.broadcast_to(lost, (horizon, 1, num_actions, NUM_LATENT))
    latent = jnp.concatenate([moves, stays], axis=1)
    each = observations_per_latent
    seen = jnp.repeat(jnp.eye(NUM_LATENT), each, axis=1) / each  # [3, S]
    paid = jnp.concatenate([right[-1], jnp.zeros((1, num_actions))])
    rewards = jnp.zeros((horizon, NUM_LATENT * each, num_actions))
    return FiniteMdp(
        start=good @ seen,
        transitions=jnp.repeat(latent @ seen, each, axis=1),
        rewards=rewards.at[-1].set(jnp.repeat(paid, each, axis=0)),
    )


class Stage(NamedTuple):
    """Where an episode is.

    Attributes:
      state: int32 in [0, S).
      time: steps so far, int32.
    """

    state: Int[Array, ""]
    time: Int[Array, ""]


def as_environment(mdp: FiniteMdp, *, name: str = "FiniteMDP") -> Environment:
    """The world as an environment of integers, time · S + state, which terminates after H steps.

    Raises:
      ValueError: shapes that do not fit.
    """
    _checks.rank("mdp.rewards", mdp.rewards, 3)
    horizon, states, actions = np.shape(mdp.rewards)
    if np.shape(mdp.transitions) != (horizon, states, actions, states):
        raise ValueError(
            f"mdp.transitions: expected shape {(horizon, states, actions, states)}, got "
            f"{np.shape(mdp.transitions)}"
        )

    def observe(at: Stage) -> Array:
        return at.time * states + at.state

    def reset(key: PRNGKeyArray) -> tuple[Any, Any]:
        state = jax.random.categorical(key, jnp.log(mdp.start)).astype(jnp.int32)
        at = Stage(state, jnp.int32(0))
        return at, observe(at)

    def step(key: PRNGKeyArray, at: Stage, action: Array) -> Step:
        time = jnp.minimum(at.time, horizon - 1)  # behind the end nobody looks
        chances = mdp.transitions[time, at.state, action]
        state = jax.random.categorical(key, jnp.log(chances)).astype(jnp.int32)
        later = Stage(state, time + 1)
        return Step(
            later,
            observe(later),
            mdp.rewards[time, at.state, action],
            later.time >= horizon,
            jnp.bool_(False),
        )

    kind = Discrete((horizon + 1) * states)
    return Environment(reset, step, kind, Discrete(actions), name)
