"""Implicit Q-learning: the best of what the data show, without asking about any other action.

Source: Kostrikov et al. 2021, arXiv 2110.06169; order of the steps and default numbers as in the
authors' code for locomotion.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks, surrogates, values
from pgjax.agents import off_policy, offline
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, bounded_mean_policy, critics, value_network
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.policies.distributions import gaussian
from pgjax.types import Transition


def iql(
    env: Environment,
    data: Transition,
    policy: Network | None = None,
    critic: Network | None = None,
    value: Network | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    policy_optimizer: optax.GradientTransformation | None = None,
    gradient_steps: int = 1,
    batch_size: int = 256,
    discount: float = 0.99,
    tau: float = 0.005,
    expectile: float = 0.7,
    beta: float = 3.0,
    weight_limit: float = 100.0,
    learning_rate: float = 3e-4,
) -> Agent:
    """IQL: V an upper expectile of Q over recorded actions, Q backed up through V alone.

    L_V = mean |η - 1{u ≤ 0}| u², u = min_i Q'_i(s, a) - V(s);
    L_π = -mean min(exp(β u), limit) log π(a|s), with the new V;
    L_Q = Σ_i mean (Q_i(s, a) - y)² / 2, y = r + γ(1 - terminated) V(s'), with the new V;
    in this order, then Q' ← Q' + τ (Q - Q'). η = 1/2 evaluates the policy that collected the data.

    Args:
      env: what the data are from, for the sizes; actions in [-1, 1].
      data: transitions `[B, ...]` or `[T, N, ...]`; `terminated` is no time limit.
      policy: `(params, observation) -> (mean, log_std)`; None: `bounded_mean_policy(env)`.
      critic: `(params, observation, action) -> [2, ...]`; None: `critics(env)`.
      value: `(params, observation) -> [...]`; None: `value_network(env)`.
      optimizer: of critic and value function; None: Adam.
      policy_optimizer: of the policy; None: that of the others. The authors let the policy's rate
        fall to 0 by a cosine over the whole run.
      gradient_steps: of an update.
      batch_size: of each, with replacement.
      discount: γ in [0, 1].
      tau: τ in (0, 1].
      expectile: η in (0, 1), the paper's τ.
      beta: β ≥ 0; 0 is behaviour cloning.
      weight_limit: > 0.
      learning_rate: of the default optimizer.

    Returns:
      the agent, which takes no steps in the world. Metrics: `value_loss`, `policy_loss`,
      `critic_loss`, `value` (mean V), `weight` (mean of the policy loss's weights). `act` gives the
      mean, the authors' evaluation.

    Raises:
      ValueError: a number out of range, data that `offline.checked` refuses, actions outside
        [-1, 1], observations that are not vectors.

    Departs from the paper: its critic loss is not halved, which Adam does not notice.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("expectile", expectile, 0.0, 1.0, low_open=True, high_open=True)
    _checks.in_range("beta", beta, 0.0)
    _checks.in_range("weight_limit", weight_limit, 0.0, low_open=True)
    actor = bounded_mean_policy(env) if policy is None else policy
    judge = critics(env) if critic is None else critic
    worth = value_network(env) if value is None else value
    descent = optax.adam(learning_rate) if optimizer is None else optimizer
    optimizers = {
        "actor": descent if policy_optimizer is None else policy_optimizer,
        "critic": descent,
        "value": descent,
    }

    def new(key: PRNGKeyArray) -> Learner:
        actor_key, critic_key, value_key = jax.random.split(key, 3)
        params = {
            "actor": actor.init(actor_key),
            "critic": judge.init(critic_key),
            "value": worth.init(value_key),
        }
        opt_state = {name: optimizers[name].init(x) for name, x in params.items()}
        return Learner(params, {"critic": params["critic"]}, opt_state, jnp.int32(0))

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        del key
        params, states = dict(learner.params), dict(learner.opt_state)
        recorded = judge.apply(learner.targets["critic"], batch.observation, batch.action).min(0)

        def value_loss(own: Any) -> tuple[Array, Array]:
            found = worth.apply(own, batch.observation)
            error = values.expectile_error(found, recorded, expectile=expectile)
            return error.mean(), found.mean()

        def policy_loss(own: Any) -> tuple[Array, Array]:
            log_prob = gaussian().log_prob(actor.apply(own, batch.observation), batch.action)
            advantage = recorded - worth.apply(params["value"], batch.observation)
            weight = values.advantage_weights(advantage, beta=beta, limit=weight_limit)
            return surrogates.score_function(log_prob, weight).mean(), weight.mean()

        def critic_loss(own: Any) -> tuple[Array, Array]:
            found = judge.apply(own, batch.observation, batch.action)
            target = values.one_step_targets(
                batch.reward,
                worth.apply(params["value"], batch.next_observation),
                off_policy.discounts(batch, discount),
            )
            both = jnp.broadcast_to(target, found.shape)
            return values.value_error(found, both).mean(-1).sum(), target.mean()

        losses, others = {}, {}
        parts = {"value": value_loss, "actor": policy_loss, "critic": critic_loss}
        for name, loss_of in parts.items():  # each with what the one before it has brought
            (losses[name], others[name]), grads = jax.value_and_grad(loss_of, has_aux=True)(
                params[name]
            )
            params[name], states[name] = off_policy.descend(
                optimizers[name], grads, states[name], params[name]
            )
        copies = optax.incremental_update(params["critic"], learner.targets["critic"], tau)
        return Learner(params, {"critic": copies}, states, learner.taken + 1), {
            "value_loss": losses["value"],
            "policy_loss": losses["actor"],
            "critic_loss": losses["critic"],
            "value": others["value"],
            "weight": others["actor"],
        }

    return offline.agent(
        data,
        new=new,
        step=step,
        greedy=lambda learner, observation: actor.apply(learner.params["actor"], observation)[0],
        gradient_steps=gradient_steps,
        batch_size=batch_size,
    )
