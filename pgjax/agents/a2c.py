"""Advantage actor-critic: one gradient a batch, synchronous environments."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks, surrogates
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import ActorCritic, actor_critic
from pgjax.envs.core import Environment


def a2c(
    env: Environment,
    network: ActorCritic | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    num_envs: int = 16,
    num_steps: int = 5,
    discount: float = 0.99,
    lambda_: float = 1.0,
    value_coefficient: float = 0.5,
    entropy_coefficient: float = 0.01,
    normalize_advantages: bool = False,
    bootstrap_truncated: bool = True,
    learning_rate: float = 7e-4,
    anneal_over: int | None = None,
    max_gradient_norm: float = 0.5,
) -> Agent:
    """A2C: the score function with advantages, value error and entropy, one step a batch.

    L = -mean[log π(a) A] + c_v mean[(V - A_old - V_old)²] / 2 - c_e mean[H]. With `lambda_` 1 the
    advantages are those of returns over what is left of the batch, n-step ones.

    Args:
      env: the world; observations must be vectors where `network` is None.
      network: policy and value function; None: `actor_critic(env)`.
      optimizer: None: RMSProp with decay .99 and ε = 1e-5 behind a clip of the gradient's norm.
      num_envs: N ≥ 1.
      num_steps: T ≥ 1 of each environment in a batch.
      discount, lambda_, value_coefficient, entropy_coefficient, normalize_advantages,
        bootstrap_truncated: as of `ppo`; the half of the squared error is counted once.
      learning_rate, anneal_over, max_gradient_norm: of the default optimizer, as of `ppo`.

    Returns:
      the agent. Metrics: `loss`, `policy_loss`, `value_loss`, `entropy`, `explained_variance`,
      `return`, `length`, `episodes`.

    Raises:
      ValueError: a number out of range, observations that are not vectors and no `network`.

    Source: Mnih et al. 2016, arXiv 1602.01783, in its synchronous form.
    """
    _checks.in_range("num_envs", num_envs, 1)
    _checks.in_range("num_steps", num_steps, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    net = actor_critic(env) if network is None else network
    if optimizer is None:
        rate = on_policy.annealed(learning_rate, anneal_over, 1)
        optimizer = optax.chain(
            optax.clip_by_global_norm(max_gradient_norm),
            optax.rmsprop(rate, decay=0.99, eps=1e-5),
        )
    transform = optimizer

    def init(key: PRNGKeyArray) -> on_policy.State:
        return on_policy.initial(env, net, transform.init, key, num_envs=num_envs)

    def update(state: on_policy.State) -> tuple[on_policy.State, Metrics]:
        key, act_key = jax.random.split(state.key)
        running, seen, episodes, advantage, target = on_policy.collect(
            env,
            net,
            state.params,
            state.running,
            act_key,
            num_steps=num_steps,
            discount=discount,
            lambda_=lambda_,
            bootstrap_truncated=bootstrap_truncated,
        )
        if normalize_advantages:
            advantage = on_policy.standardize(advantage)

        def loss_of(params: Any) -> tuple[Array, Metrics]:
            parameters = net.actor(params, seen.observation)
            log_prob = net.distribution.log_prob(parameters, seen.action)
            policy_loss = surrogates.score_function(log_prob, advantage).mean()
            value_loss = surrogates.value_error(net.critic(params, seen.observation), target).mean()
            entropy = on_policy.entropy_of(net, parameters, log_prob)
            loss = policy_loss + value_coefficient * value_loss - entropy_coefficient * entropy
            return loss, {
                "loss": loss,
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": entropy,
            }

        grads, metrics = jax.grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        assert seen.value is not None
        metrics["explained_variance"] = on_policy.explained_variance(seen.value, target)
        state = on_policy.State(params, opt_state, running, key, state.updates + 1)
        return state, metrics | on_policy.finished(episodes)

    return Agent(init, update, on_policy.greedy(net), num_envs * num_steps)
