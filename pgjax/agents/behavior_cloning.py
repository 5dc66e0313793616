"""Imitation of whatever was recorded, good or bad: what offline methods have to beat."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax.agents import off_policy, offline
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, bounded_mean_policy
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.policies.distributions import gaussian
from pgjax.types import Transition


def behavior_cloning(
    env: Environment,
    data: Transition,
    policy: Network | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    gradient_steps: int = 1,
    batch_size: int = 256,
    learning_rate: float = 3e-4,
) -> Agent:
    """L = -mean log π(a|s) over the data: `iql` with β = 0 and nothing else learnt.

    Args:
      env: what the data are from, for the sizes; actions in [-1, 1].
      data: transitions `[B, ...]` or `[T, N, ...]`.
      policy: `(params, observation) -> (mean, log_std)`; None: `bounded_mean_policy(env)`.
      optimizer: None: Adam.
      gradient_steps: of an update.
      batch_size: of each, with replacement.
      learning_rate: of the default optimizer.

    Returns:
      the agent, which takes no steps in the world. Metrics: `policy_loss`.

    Raises:
      ValueError: a count below 1, data that `offline.checked` refuses, actions outside [-1, 1],
        observations that are not vectors.

    Source: Pomerleau 1988 (ALVINN).
    """
    actor = bounded_mean_policy(env) if policy is None else policy
    descent = optax.adam(learning_rate) if optimizer is None else optimizer

    def new(key: PRNGKeyArray) -> Learner:
        params = {"actor": actor.init(key)}
        return Learner(params, {}, {"actor": descent.init(params["actor"])}, jnp.int32(0))

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        del key

        def loss_of(own: Any) -> Array:
            log_prob = gaussian().log_prob(actor.apply(own, batch.observation), batch.action)
            return -log_prob.mean()

        own = learner.params["actor"]
        loss, grads = jax.value_and_grad(loss_of)(own)
        own, state = off_policy.descend(descent, grads, learner.opt_state["actor"], own)
        learner = Learner({"actor": own}, {}, {"actor": state}, learner.taken + 1)
        return learner, {"policy_loss": loss}

    return offline.agent(
        data,
        new=new,
        step=step,
        greedy=lambda learner, observation: actor.apply(learner.params["actor"], observation)[0],
        gradient_steps=gradient_steps,
        batch_size=batch_size,
    )
