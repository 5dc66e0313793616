"""Soft actor-critic: returns and entropy together, with a temperature that finds itself.

Source: Haarnoja et al. 2018, arXiv 1801.01290 and 1812.05905 (temperature, no value network).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks, values
from pgjax.agents import off_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, critics, squashed_gaussian_policy, unit_actions
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.policies.distributions import sample_tanh_gaussian
from pgjax.types import Transition


def sac(
    env: Environment,
    policy: Network | None = None,
    critic: Network | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    num_envs: int = 1,
    num_steps: int = 1,
    gradient_steps: int = 1,
    batch_size: int = 256,
    capacity: int = 100_000,
    start_steps: int = 1_000,
    discount: float = 0.99,
    tau: float = 0.005,
    initial_temperature: float = 1.0,
    target_entropy: float | None = None,
    learning_rate: float = 3e-4,
) -> Agent:
    """SAC: y = r + γ(1 - terminated)(min_i Q'_i(s', a') - α log π(a'|s')), a' ~ π(·|s').

    L_Q = Σ_i mean (Q_i(s, a) - y)² / 2; L_π = mean[α log π(a|s) - min_i Q_i(s, a)], a ~ π(·|s) by
    reparametrisation, with the Q this step has brought; L_α = -mean[log α (log π(a|s) + H̄)]. The
    critics' copies follow, θ' ← θ' + τ (θ - θ').

    Args:
      env: the world, with actions in [-1, 1] (`envs.with_scaled_actions`); observations must be
        vectors where a network is None.
      policy: `(params, observation) -> (mean, log_std)` before the tangent; None:
        `squashed_gaussian_policy(env)`.
      critic: `(params, observation, action) -> [2, ...]`; None: `critics(env)`.
      optimizer: of each network and of log α; None: Adam.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`.
      discount: γ in [0, 1].
      tau: τ in (0, 1].
      initial_temperature: α > 0 at the start.
      target_entropy: H̄, in nats; None: minus the number of the action's entries.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: `critic_loss`, `policy_loss`, `temperature`, `entropy` (of the samples),
      and of the episodes that ended `return`, `length` (means, NaN where none did), `episodes`.

    Raises:
      ValueError: a number out of range, actions outside [-1, 1], observations that are not vectors.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("initial_temperature", initial_temperature, 0.0, low_open=True)
    wanted = -float(unit_actions(env)) if target_entropy is None else target_entropy
    actor = squashed_gaussian_policy(env) if policy is None else policy
    judge = critics(env) if critic is None else critic
    descent = optax.adam(learning_rate) if optimizer is None else optimizer

    def new(key: PRNGKeyArray) -> Learner:
        actor_key, critic_key = jax.random.split(key)
        params = {
            "actor": actor.init(actor_key),
            "critic": judge.init(critic_key),
            "log_temperature": jnp.log(jnp.float32(initial_temperature)),
        }
        opt_state = {name: descent.init(x) for name, x in params.items()}
        return Learner(params, {"critic": params["critic"]}, opt_state, jnp.int32(0))

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        del updates
        return sample_tanh_gaussian(key, actor.apply(learner.params["actor"], observation))[0]

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        next_key, own_key = jax.random.split(key)
        params, states = dict(learner.params), dict(learner.opt_state)
        temperature = jnp.exp(params["log_temperature"])
        later, later_log_prob = sample_tanh_gaussian(
            next_key, actor.apply(params["actor"], batch.next_observation)
        )
        following = judge.apply(learner.targets["critic"], batch.next_observation, later).min(0)
        target = values.one_step_targets(
            batch.reward,
            following - temperature * later_log_prob,
            off_policy.discounts(batch, discount),
        )

        def critic_loss(critic: Any) -> Array:
            found = judge.apply(critic, batch.observation, batch.action)
            both = jnp.broadcast_to(target, found.shape)
            return values.value_error(found, both).mean(-1).sum()

        def policy_loss(policy: Any) -> tuple[Array, Array]:
            action, log_prob = sample_tanh_gaussian(own_key, actor.apply(policy, batch.observation))
            value = judge.apply(params["critic"], batch.observation, action).min(0)
            return (temperature * log_prob - value).mean(), log_prob

        def descend(name: str, grads: Any) -> None:
            params[name], states[name] = off_policy.descend(
                descent, grads, states[name], params[name]
            )

        loss, grads = jax.value_and_grad(critic_loss)(params["critic"])
        descend("critic", grads)
        (actor_loss, log_prob), grads = jax.value_and_grad(policy_loss, has_aux=True)(
            params["actor"]
        )
        descend("actor", grads)
        descend("log_temperature", -(log_prob + wanted).mean())
        copies = optax.incremental_update(params["critic"], learner.targets["critic"], tau)
        return Learner(params, {"critic": copies}, states, learner.taken + 1), {
            "critic_loss": loss,
            "policy_loss": actor_loss,
            "temperature": temperature,
            "entropy": -log_prob.mean(),
        }

    return off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=lambda learner, observation: jnp.tanh(
            actor.apply(learner.params["actor"], observation)[0]
        ),
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
    )
