"""REINFORCE on whole episodes, with or without a learnt baseline."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks, aggregate, returns, surrogates
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import ActorCritic, actor_critic
from pgjax.envs.core import Environment
from pgjax.sampling.environments import Episodes, start_environments, unroll_environments


def reinforce(
    env: Environment,
    network: ActorCritic | None = None,
    *,
    max_steps: int,
    optimizer: optax.GradientTransformation | None = None,
    num_envs: int = 16,
    discount: float = 0.99,
    baseline: bool = True,
    value_coefficient: float = 0.5,
    entropy_coefficient: float = 0.0,
    learning_rate: float = 1e-3,
    anneal_over: int | None = None,
) -> Agent:
    """REINFORCE: L = -mean[log π(a_t) (G_t - V(s_t))], G the discounted return to go.

    Every update begins `num_envs` new episodes and looks at each until it ends, for `max_steps` at
    most, so that no return is cut short but by that; what comes behind an end is not counted.

    Args:
      env: the world; observations must be vectors where `network` is None.
      network: policy and value function; None: `actor_critic(env)`.
      max_steps: of an episode; the environment's own limit, where it has one.
      optimizer: None: Adam.
      num_envs: episodes of an update, ≥ 1.
      discount: γ in [0, 1] of returns; as usual the states' own weights γ^t are left out.
      baseline: subtract a learnt V(s_t), and learn it; False: G_t alone.
      value_coefficient: of the baseline's squared error, halved.
      entropy_coefficient: of the bonus.
      learning_rate, anneal_over: of the default optimizer.

    Returns:
      the agent; it counts `num_envs max_steps` environment steps an update, those behind the ends
      included. Metrics: `loss`, `entropy`, `return`, `length`, `episodes`.

    Raises:
      ValueError: a number out of range, observations that are not vectors and no `network`.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """
    _checks.in_range("max_steps", max_steps, 1)
    _checks.in_range("num_envs", num_envs, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    net = actor_critic(env) if network is None else network
    rate = on_policy.annealed(learning_rate, anneal_over, 1)
    transform = optax.adam(rate) if optimizer is None else optimizer

    def init(key: PRNGKeyArray) -> on_policy.State:
        return on_policy.initial(env, net, transform.init, key, num_envs=num_envs)

    def update(state: on_policy.State) -> tuple[on_policy.State, Metrics]:
        key, env_key, act_key = jax.random.split(state.key, 3)
        running, seen, episodes = unroll_environments(
            env,
            on_policy.decide(net, state.params),
            start_environments(env, env_key, num_envs),
            act_key,
            num_steps=max_steps,
        )
        ended = episodes.ended
        mask = jnp.cumsum(ended, axis=0) - ended == 0
        to_go = returns.discounted(
            seen.reward.T, discount * (1.0 - ended.T.astype(jnp.float32)), mask=mask.T
        ).T

        def loss_of(params: Any) -> tuple[Array, Metrics]:
            parameters = net.actor(params, seen.observation)
            log_prob = net.distribution.log_prob(parameters, seen.action)
            value = net.critic(params, seen.observation)
            weight = to_go - jax.lax.stop_gradient(value) if baseline else to_go
            term = surrogates.score_function(log_prob, weight)
            if baseline:
                term = term + value_coefficient * surrogates.value_error(value, to_go)
            if net.distribution.entropy is None:
                entropy = -aggregate.token_mean(log_prob, mask)
            else:
                entropy = aggregate.token_mean(net.distribution.entropy(parameters), mask)
            loss = aggregate.token_mean(term, mask) - entropy_coefficient * entropy
            return loss, {"loss": loss, "entropy": entropy}

        grads, metrics = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = on_policy.State(params, opt_state, running, key, state.updates + 1)
        first = Episodes(ended & mask, episodes.returns, episodes.lengths)
        return state, metrics | on_policy.finished(first)

    return Agent(init, update, on_policy.greedy(net), num_envs * max_steps)
