"""A game in which agents have to agree: each sets its own bit, and the crowd's bits are paid.

With z zeros and o ones among the n bits, and a slack l: where z and o differ by at most l the state
pays 1 if ones prevail, else 0; beyond that 3 for zeros and 2 for ones. All zeros is best, all ones
a trap, and what lies between pays least, so that agents which act alone stay where they began.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step, with_time_limit

SLACK = {2: 1, 3: 1, 5: 2, 10: 3}


class Game(NamedTuple):
    """The game as tables; states and joint actions are numbers whose bits are the agents'.

    Attributes:
      bits: of each state, or joint action, the last agent's fastest, int32 `[S, n]`, S = 2^n.
      transitions: P(s'|a), the same in all states, f32 `[S, S]`, rows are joint actions.
      rewards: of each state, f32 `[S]`.
    """

    bits: Int[Array, "S n"]
    transitions: Float[Array, "S S"]
    rewards: Float[Array, " S"]


def reward(bits: Int[Array, "*B n"], *, slack: int) -> Float[Array, "*B"]:
    """What a state pays, f32 `[...]`."""
    ones = jnp.sum(bits, axis=-1)
    ahead = 2 * ones - np.shape(bits)[-1]
    close = jnp.where(ahead > 0, 1.0, 0.0)
    return jnp.where(jnp.abs(ahead) <= slack, close, jnp.where(ahead < 0, 3.0, 2.0))


def tables(num_agents: int, *, error: float = 0.1, slack: int | None = None) -> Game:
    """The whole game, for exact values.

    Args:
      num_agents: n, 1 to 10.
      error: chance that a bit is not what its agent wanted, in [0, 1].
      slack: l ≥ 0; None: the paper's for 2, 3, 5 and 10 agents.

    Raises:
      ValueError: a number out of range, another number of agents without a slack.
    """
    _checks.in_range("num_agents", num_agents, 1, 10)
    width = _slack(num_agents, slack)
    _checks.in_range("error", error, 0.0, 1.0)
    states = np.arange(2**num_agents)
    bits = (states[:, None] >> np.arange(num_agents)[::-1]) & 1
    missed = (bits[:, None] != bits[None]).sum(-1)
    chance = error**missed * (1.0 - error) ** (num_agents - missed)
    found = jnp.asarray(bits, jnp.int32)
    return Game(found, jnp.asarray(chance), reward(found, slack=width))


def expected_return(
    game: Game, policy: Float[Array, "S S"], *, discount: float = 0.95
) -> Float[Array, ""]:
    """J = mean_s V(s) of a joint policy, V = (I - γ π P)⁻¹ r, differentiable.

    Args:
      game: of `tables`.
      policy: π(a|s), rows are states.
      discount: γ in [0, 1).

    Raises:
      ValueError: a policy of another shape, γ out of range.
    """
    _checks.in_range("discount", discount, 0.0, 1.0, high_open=True)
    _checks.same_shape(transitions=game.transitions, policy=policy)
    move = policy @ game.transitions
    return jnp.linalg.solve(jnp.eye(len(move)) - discount * move, game.rewards).mean()


def best_return(
    game: Game, *, discount: float = 0.95, num_iterations: int = 1000
) -> Float[Array, ""]:
    """J* of the best joint policy, by value iteration."""

    def step(v: Array, _: None) -> tuple[Array, None]:
        return game.rewards + discount * jnp.max(game.transitions @ v), None

    return jax.lax.scan(step, jnp.zeros_like(game.rewards), None, length=num_iterations)[0].mean()


def coordination_game(
    num_agents: int, *, error: float = 0.1, slack: int | None = None, max_steps: int = 50
) -> Environment:
    """The game as an environment; never terminates, starts anywhere.

    State: bits int32 `[n]`; observation: the same, f32 `[n]`, for all to see; action: integers
    `[n]` in {0, 1}, of which the kind says `Box((n,), 0, 1)`; reward of the state before the step,
    shared.

    Args:
      num_agents, error, slack: of `tables`.
      max_steps: after which an episode is truncated.

    Source: the coordination game of BN-MAPPO, Chen and Zhang 2023, arXiv 2306.01920.
    """
    _checks.in_range("num_agents", num_agents, 1)
    _checks.in_range("error", error, 0.0, 1.0)
    width = _slack(num_agents, slack)

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        state = jax.random.bernoulli(key, 0.5, (num_agents,)).astype(jnp.int32)
        return state, state.astype(jnp.float32)

    def step(key: PRNGKeyArray, state: Int[Array, " n"], action: Int[Array, " n"]) -> Step:
        missed = jax.random.bernoulli(key, error, (num_agents,))
        after = jnp.where(missed, 1 - action, action).astype(jnp.int32)
        paid = reward(state, slack=width)
        return Step(after, after.astype(jnp.float32), paid, jnp.bool_(False), jnp.bool_(False))

    env = Environment(
        reset, step, Box((num_agents,), 0, 1), Box((num_agents,), 0, 1), "coordination game"
    )
    return with_time_limit(env, max_steps)


def _slack(num_agents: int, slack: int | None) -> int:
    if slack is None:
        if num_agents not in SLACK:
            raise ValueError(f"slack: expected a number for {num_agents} agents, got None")
        return SLACK[num_agents]
    _checks.in_range("slack", slack, 0)
    return slack
