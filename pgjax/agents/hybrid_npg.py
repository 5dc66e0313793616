"""Hybrid natural policy gradient: on-policy steps whose critic and states also come from old data.

One policy and one critic for each of the H steps of an episode; all parameters have H in front.

Source: HNPG, Zhou et al. 2023, arXiv 2311.08384; numbers of the authors' code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, returns, surrogates, values
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.finite_horizon import ActorQ, actor_q, fit_critics, play
from pgjax.envs.core import Discrete, Environment
from pgjax.optim import natural
from pgjax.types import Transition


class State(NamedTuple):
    """Of the agent; leaves of `params` are `[H, ...]`."""

    params: Any
    key: PRNGKeyArray
    updates: Array


def policy_steps(
    net: ActorQ,
    params: Any,
    key: PRNGKeyArray,
    online: Transition,
    offline: Transition,
    *,
    discount: float = 1.0,
    lambda_: float = 0.97,
    num_samples: int = 10,
    radius: float = 0.01,
    damping: float = 0.1,
    num_cg_steps: int = 10,
    backtracks: int = 10,
) -> natural.Step:
    """A TRPO step at each step of the episode, on states of both kinds.

    On-policy advantages are GAE with V(s) = mean f(s, a_i), a_i ~ π; recorded states get a new
    action a ~ π(·|s) with A = f(s, a) - V(s). The surrogate and the mean KL are those of all rows
    together; nothing is normalised.

    Args:
      net, params, key, online, offline, discount: of `fit_critics`, with the critics it gave.
      lambda_: of GAE.
      num_samples: actions in V.
      radius, damping, num_cg_steps, backtracks: of `optim.natural.trust_region_step`.

    Returns:
      its `Step` for each step of the episode, `[H, ...]`; the update is of `params["actor"]`.
    """
    divergence = net.distribution.kl
    assert divergence is not None

    def value(own: Any, key: PRNGKeyArray, observation: Any) -> Array:
        parameters = net.actor(own, observation)
        return values.sampled_values(
            key,
            lambda key: net.distribution.sample(key, parameters),
            lambda action: net.q(own, observation, action),
            number=num_samples,
        )

    horizon = online.reward.shape[0]
    online_key, offline_key, action_key = jax.random.split(key, 3)
    value_on = jax.vmap(value)(params, jax.random.split(online_key, horizon), online.observation)
    following = jnp.concatenate([value_on[1:], jnp.zeros_like(value_on[:1])])
    advantage_on = returns.gae(
        online.reward.T,
        value_on.T,
        following.T,
        discount * (1.0 - online.terminated.T),
        lambda_=lambda_,
    ).T

    def resampled(own: Any, keys: Any, observation: Any) -> tuple[Any, Array]:
        action = net.distribution.sample(keys[0], net.actor(own, observation))
        worth = net.q(own, observation, action)
        return action, worth - value(own, keys[1], observation)

    keys = tuple(jax.random.split(k, horizon) for k in (action_key, offline_key))
    action_off, advantage_off = jax.vmap(resampled)(params, keys, offline.observation)
    observation, action, advantage = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1),
        (online.observation, online.action, advantage_on),
        (offline.observation, action_off, advantage_off),
    )

    def one(own: Any, observation: Any, action: Any, advantage: Array) -> natural.Step:
        old = net.actor(own, observation)
        before = net.distribution.log_prob(old, action)

        def parameters_of(actor: Any) -> Any:
            return net.actor({**own, "actor": actor}, observation)

        def objective(actor: Any) -> Float[Array, ""]:
            log_prob = net.distribution.log_prob(parameters_of(actor), action)
            return (surrogates.importance_ratio(log_prob, before) * advantage).mean()

        return natural.trust_region_step(
            objective,
            lambda actor: divergence(old, parameters_of(actor)).mean(),
            own["actor"],
            radius=radius,
            damping=damping,
            num_steps=num_cg_steps,
            backtracks=backtracks,
        )

    return jax.vmap(one)(params, observation, action, advantage)


def hybrid_npg(
    env: Environment,
    data: Transition,
    network: ActorQ | None = None,
    *,
    horizon: int,
    num_episodes: int = 200,
    offline_batch: int = 200,
    weight: float = 1.0,
    discount: float = 1.0,
    critic_steps: int = 30,
    critic_rate: float = 3e-4,
    **options: Any,
) -> Agent:
    """HNPG: each update plays episodes, draws recorded transitions, fits critics, steps policies.

    Args:
      env: the world, whose episodes all last `horizon` steps.
      data: recorded transitions of each step, `[H, M, ...]`, the last ones terminated.
      network: of one step, made for each with a key of its own; None: `actor_q(env)`.
      horizon: H ≥ 1.
      num_episodes: of an update; 0 learns from data alone: an actor on fitted Q-evaluation.
      offline_batch: recorded transitions of each step in an update, with replacement; 0 learns from
        its own episodes alone: TRPO with a Monte-Carlo critic. Not both can be 0.
      weight, discount: of `fit_critics`; `critic_steps` and `critic_rate` are its others.
      **options: of `policy_steps`.

    Returns:
      the agent. `act` takes, in the observation's place, a pair of the step (int32 scalar) and the
      observations `[N, ...]` met there, and gives modes. Metrics: `return` (NaN without episodes),
      `critic_loss`, `kl`, `accepted`, `improvement`, means over the steps of the episode.

    Raises:
      ValueError: data of another horizon or with other actions, without an end or a finite reward;
        a number out of range; a distribution without closed-form `kl`.

    Departs from the paper: its analysis takes discounted fitted-Q steps and a compatible
    regression; this is the finite-horizon algorithm of its code.

    Source: Zhou et al. 2023, arXiv 2311.08384.
    """
    _checks.in_range("horizon", horizon, 1)
    _checks.in_range("num_episodes", num_episodes, 0)
    _checks.in_range("offline_batch", offline_batch, 0)
    _checks.in_range("weight", weight, 0.0)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("critic_steps", critic_steps, 1)
    _checks.in_range("radius", options.get("radius", 0.01), 0.0, low_open=True)
    if num_episodes + offline_batch == 0:
        raise ValueError("num_episodes, offline_batch: expected one of them above 0, got 0 and 0")
    _check_data(data, env, horizon)
    net = actor_q(env) if network is None else network
    if net.distribution.kl is None:
        raise ValueError("network: expected a distribution with a closed-form `kl`, got None")
    rows = data.replace(log_prob=None, value=None)

    def init(key: PRNGKeyArray) -> State:
        key, net_key = jax.random.split(key)
        return State(jax.vmap(net.init)(jax.random.split(net_key, horizon)), key, jnp.int32(0))

    def update(state: State) -> tuple[State, Metrics]:
        key, play_key, pick_key, critic_key, policy_key = jax.random.split(state.key, 5)
        if num_episodes:
            online = play(env, net, state.params, play_key, num_episodes=num_episodes)
        else:
            online = jax.tree.map(lambda x: x[:, :0], rows)
        picked = jax.random.randint(pick_key, (horizon, offline_batch), 0, rows.reward.shape[1])
        offline = jax.tree.map(lambda x: x[jnp.arange(horizon)[:, None], picked], rows)
        params, losses = fit_critics(
            net,
            state.params,
            critic_key,
            online,
            offline,
            weight=weight,
            discount=discount,
            num_steps=critic_steps,
            learning_rate=critic_rate,
        )
        found = policy_steps(net, params, policy_key, online, offline, discount=discount, **options)
        params = {**params, "actor": optax.apply_updates(params["actor"], found.update)}
        metrics = {
            "return": online.reward.sum(0).mean(),
            "critic_loss": losses.mean(),
            "kl": found.distance.mean(),
            "accepted": found.accepted.astype(jnp.float32).mean(),
            "improvement": found.improvement.mean(),
        }
        return State(params, key, state.updates + 1), metrics

    def act(state: State, key: PRNGKeyArray, seen: tuple[Array, Any]) -> Any:
        del key
        step, observation = seen
        own = jax.tree.map(lambda x: x[step], state.params)
        return net.distribution.mode(net.actor(own, observation))

    return Agent(init, update, act, num_episodes * horizon)


def _check_data(data: Transition, env: Environment, horizon: int) -> None:
    if data.reward is None:
        raise ValueError("data.reward: expected an array [H, M], got None")
    _checks.rank("data.reward", data.reward, 2)
    _checks.boolean(**{"data.terminated": data.terminated})
    front = np.shape(data.reward)
    if front[0] != horizon or front[1] < 1:
        raise ValueError(f"data: expected shape [{horizon}, M, ...] with M >= 1, got {front}")
    for name in ("observation", "action", "terminated", "next_observation"):
        if np.shape(getattr(data, name))[:2] != front:
            got = np.shape(getattr(data, name))
            raise ValueError(f"data.{name}: expected shape {front} in front, got {got}")
    wanted = () if isinstance(env.action, Discrete) else tuple(env.action.shape)
    if np.shape(data.action)[2:] != wanted:
        got = np.shape(data.action)[2:]
        raise ValueError(f"data.action: expected actions of shape {wanted}, got {got}")
    if _checks.is_concrete(data.reward, data.terminated):
        if not np.all(np.isfinite(data.reward)):
            raise ValueError("data.reward: expected finite numbers at every step")
        if not np.all(np.asarray(data.terminated)[-1]):
            raise ValueError("data.terminated: expected true at the last step of every row")
