"""Very many agents alike: their distribution as the state, a decision rule as the action.

N exchangeable agents act by one rule π from private observations. As N grows, the empirical
distribution of their states follows a deterministic flow,

  μ'(x') = Σ_{x,y,u} μ(x) P^y(y|x, μ) π(u|y) P(x'|x, u, μ),

so that a team's problem becomes one of a single decision maker, with state μ and action π. This
file has the flow and its finite counterpart for finite spaces, backward induction on it, and the
`Environment` of a swarm in which an agent of this library chooses the rule's parameters.

Source: Dec-POMFC, Cui et al. 2023, arXiv 2307.06175.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step, with_time_limit


class FiniteModel(NamedTuple):
    """Agents with S states, Y observations and U actions; all may depend on the distribution μ.

    Attributes:
      observation: `μ [S] -> P^y [S, Y]`.
      transition: `μ [S] -> P [S, U, S]`, from a state by an action to a state.
      reward: `μ [S] -> f32`, of the whole team.
    """

    observation: Callable[[Float[Array, " S"]], Float[Array, "S Y"]]
    transition: Callable[[Float[Array, " S"]], Float[Array, "S U S"]]
    reward: Callable[[Float[Array, " S"]], Float[Array, ""]]


def flow(
    model: FiniteModel, distribution: Float[Array, " S"], rule: Float[Array, "Y U"]
) -> Float[Array, " S"]:
    """The next distribution of infinitely many agents that act by the rule.

    Args:
      model: of one agent.
      distribution: μ, sums to 1.
      rule: π(u|y), rows sum to 1.

    Raises:
      ValueError: spaces of sizes that do not fit.
    """
    observation, transition = _parts(model, distribution, rule)
    return jnp.einsum("x,xy,yu,xuz->z", distribution, observation, rule, transition)


def agents_step(
    key: PRNGKeyArray,
    model: FiniteModel,
    states: Int[Array, " N"],
    rule: Float[Array, "Y U"],
    *,
    num_states: int,
) -> Int[Array, " N"]:
    """The next states of N agents, each of which observes, acts and moves by chance of its own.

    Args:
      key: of all chance.
      model: of one agent; sees their empirical distribution.
      states: int32 `[N]`, N ≥ 1.
      rule: π(u|y).
      num_states: S.

    Raises:
      ValueError: no agents, spaces of sizes that do not fit.
    """
    distribution = empirical(states, num_states=num_states)
    observation, transition = _parts(model, distribution, rule)
    keys = jax.random.split(key, 3)
    seen = jax.random.categorical(keys[0], jnp.log(observation)[states])
    action = jax.random.categorical(keys[1], jnp.log(rule)[seen])
    return jax.random.categorical(keys[2], jnp.log(transition)[states, action]).astype(jnp.int32)


def empirical(states: Int[Array, " N"], *, num_states: int) -> Float[Array, " S"]:
    """Share of the agents in each state.

    Raises:
      ValueError: no agents, states that are not integers or, where they can be looked at, not
        below `num_states`.
    """
    _checks.in_range("number of agents", jnp.shape(states)[0] if jnp.ndim(states) else 0, 1)
    _checks.segment_ids("states", states, num_states)
    return jnp.bincount(states, length=num_states) / states.shape[0]


def backward_induction(
    model: FiniteModel,
    grid: Float[Array, "G S"],
    rules: Float[Array, "K Y U"],
    *,
    horizon: int,
    discount: float = 1.0,
) -> tuple[Float[Array, "T G"], Int[Array, "T G"]]:
    """Largest Σ_t γ^t R(μ_t) from each distribution, and the rule to begin with.

    V_t(μ) = R(μ) + γ max_k V_{t+1}(flow(μ, π_k)), V_T = 0, where a distribution counts as the
    nearest one of the grid: exact where the flow never leaves the grid.

    Args:
      model: of one agent.
      grid: G distributions.
      rules: K of them to choose from.
      horizon: T ≥ 1, rewards that count.
      discount: γ in [0, 1].

    Returns:
      V_t f32 `[T, G]` and argmax_k int32 `[T, G]`, the first of equals.

    Raises:
      ValueError: a number out of range, spaces of sizes that do not fit.
    """
    _checks.in_range("horizon", horizon, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.rank("grid", grid, 2)
    _checks.rank("rules", rules, 3)
    to = jax.vmap(lambda mu: jax.vmap(lambda rule: flow(model, mu, rule))(rules))(grid)
    nearest = jnp.argmin(jnp.square(to[:, :, None] - grid).sum(-1), axis=-1)
    reward = jax.vmap(model.reward)(grid)

    def one(following: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        each = discount * following[nearest]
        value = reward + each.max(-1)
        return value, (value, jnp.argmax(each, axis=-1).astype(jnp.int32))

    _, (values, rule) = jax.lax.scan(one, jnp.zeros_like(reward), None, length=horizon)
    return values[::-1], rule[::-1]


class Swarm(NamedTuple):
    """Agents in a continuous space, as functions of all of them at once.

    Attributes:
      reset: `(key, N) -> states`, a pytree of arrays `[N, ...]`.
      observe: `(key, states) -> observations [N, D]`, each agent's own.
      step: `(key, states, actions [N, A]) -> states`.
      reward: `(states, actions) -> f32`, of the new states and of the actions that led there.
      coordinates: `states -> [N, C]`, of what the mean field is a distribution.
      actions: A.
      name: for tables and messages.
    """

    reset: Callable[[PRNGKeyArray, int], Any]
    observe: Callable[[PRNGKeyArray, Any], Float[Array, "N D"]]
    step: Callable[[PRNGKeyArray, Any, Float[Array, "N A"]], Any]
    reward: Callable[[Any, Float[Array, "N A"]], Float[Array, ""]]
    coordinates: Callable[[Any], Float[Array, "N C"]]
    actions: int
    name: str


def mean_field_environment(
    swarm: Swarm,
    decide: Callable[[PRNGKeyArray, Float[Array, " P"], Float[Array, "N D"]], Float[Array, "N A"]],
    features: Callable[[Float[Array, "N C"]], Float[Array, " F"]],
    *,
    num_agents: int,
    num_parameters: int,
    num_features: int,
    max_steps: int = 100,
) -> Environment:
    """A swarm as the world of one decision maker, who gives all agents their rule in each step.

    It sees features of the agents' distribution, f32 `[F]`, and acts by a rule's parameters ξ, f32
    `[P]`; every agent draws from the rule by itself, as part of the world. So neither size depends
    on the number of agents, and any agent of this library learns it, with log-probs of ξ alone.

    Args:
      swarm: the agents.
      decide: `(key, ξ, observations) -> actions`, cut off at ±1 here: a rule, such as
        `policies.kernel_rule` builds.
      features: of `swarm.coordinates`.
      num_agents: N.
      num_parameters: P.
      num_features: F.
      max_steps: after which an episode is truncated; nothing terminates it.

    Raises:
      ValueError: a count below 1; as it is traced, actions or features of another shape.
    """
    counts = {
        "num_agents": num_agents,
        "num_parameters": num_parameters,
        "num_features": num_features,
    }
    for name, count in counts.items():
        _checks.in_range(name, count, 1)

    def seen(states: Any) -> Array:
        found = features(swarm.coordinates(states))
        if found.shape != (num_features,):
            raise ValueError(f"features: expected shape {(num_features,)}, got {found.shape}")
        return found

    def reset(key: PRNGKeyArray) -> tuple[Any, Array]:
        states = swarm.reset(key, num_agents)
        return states, seen(states)

    def step(key: PRNGKeyArray, states: Any, xi: Float[Array, " P"]) -> Step:
        observe_key, act_key, move_key = jax.random.split(key, 3)
        actions = decide(act_key, xi, swarm.observe(observe_key, states))
        if actions.shape != (num_agents, swarm.actions):
            raise ValueError(
                f"decide: expected actions of shape {(num_agents, swarm.actions)}, "
                f"got {actions.shape}"
            )
        actions = jnp.clip(actions, -1.0, 1.0)
        states = swarm.step(move_key, states, actions)
        reward = swarm.reward(states, actions)
        return Step(states, seen(states), reward, jnp.bool_(False), jnp.bool_(False))

    env = Environment(reset, step, Box((num_features,)), Box((num_parameters,)), swarm.name)
    return with_time_limit(env, max_steps)


def _parts(model: FiniteModel, distribution: Array, rule: Array) -> tuple[Array, Array]:
    """P^y and P, whose sizes fit each other, the distribution and the rule."""
    _checks.rank("distribution", distribution, 1)
    _checks.rank("rule", rule, 2)
    observation, transition = model.observation(distribution), model.transition(distribution)
    size = distribution.shape[0]
    for name, found, wanted in (
        ("observation", observation.shape, (size, rule.shape[0])),
        ("transition", transition.shape, (size, rule.shape[1], size)),
    ):
        if found != wanted:
            raise ValueError(
                f"model.{name}: expected shape {wanted} for {size} states and a rule "
                f"{rule.shape}, got {found}"
            )
    return observation, transition
