"""Deep deterministic policy gradients: the critic's slope in the action moves the policy.

Source: Lillicrap et al. 2015, arXiv 1509.02971; the gradient is that of Silver et al. 2014. The
default numbers are those of Fujimoto et al. 2018, arXiv 1802.09477.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, values
from pgjax.agents import off_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, critics, deterministic_policy
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.types import Transition

CriticPenalty = Callable[[Any, Learner, Transition], Float[Array, ""]]


def ddpg(
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
    noise: float = 0.1,
    learning_rate: float = 3e-4,
    critic_penalty: CriticPenalty | None = None,
) -> Agent:
    """DDPG: y = r + γ(1 - terminated) Q'(s', μ'(s')); the policy ascends mean Q(s, μ(s)).

    L_Q = mean (Q(s, a) - y)² / 2, L_μ = -mean Q(s, μ(s)) with the Q from before this step; both
    copies follow by Polyak averaging, θ' ← θ' + τ (θ - θ').

    Args:
      env: the world, with actions in [-1, 1] (`envs.with_scaled_actions`); observations must be
        vectors where a network is None.
      policy: `(params, observation) -> action`; None: `deterministic_policy(env)`.
      critic: `(params, observation, action) -> [1, ...]`; None: `critics(env, num=1)`.
      optimizer: of each network; None: Adam.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`.
      discount: γ in [0, 1].
      tau: τ in (0, 1].
      noise: standard deviation of the exploring noise, as a part of the actions' half range.
      learning_rate: of the default optimizer.
      critic_penalty: `(critic's params, learner before the step, transitions [B, ...]) -> scalar`,
        differentiable in the first, added to L_Q.

    Returns:
      the agent. Metrics: `critic_loss`, `policy_loss`, and of the episodes that ended `return`,
      `length` (means, NaN where none did) and `episodes`.

    Raises:
      ValueError: a number out of range, actions outside [-1, 1], observations that are not vectors.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("noise", noise, 0.0)
    actor = deterministic_policy(env) if policy is None else policy
    judge = critics(env, num=1) if critic is None else critic
    descent = optax.adam(learning_rate) if optimizer is None else optimizer

    def new(key: PRNGKeyArray) -> Learner:
        actor_key, critic_key = jax.random.split(key)
        params = {"actor": actor.init(actor_key), "critic": judge.init(critic_key)}
        opt_state = {name: descent.init(x) for name, x in params.items()}
        return Learner(params, params, opt_state, jnp.int32(0))

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        del updates
        action = actor.apply(learner.params["actor"], observation)
        return off_policy.with_noise(key, action, scale=noise)

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        del key
        params, old = learner.params, learner.targets
        following = judge.apply(
            old["critic"],
            batch.next_observation,
            actor.apply(old["actor"], batch.next_observation),
        )[0]
        target = values.one_step_targets(
            batch.reward, following, off_policy.discounts(batch, discount)
        )

        def critic_loss(critic: Any) -> Array:
            value = judge.apply(critic, batch.observation, batch.action)[0]
            error = values.value_error(value, target).mean()
            if critic_penalty is None:
                return error
            return error + critic_penalty(critic, learner, batch)

        def policy_loss(policy: Any) -> Array:
            action = actor.apply(policy, batch.observation)
            return -judge.apply(params["critic"], batch.observation, action)[0].mean()

        losses, changed, states = {}, {}, {}
        for name, loss_of in {"critic": critic_loss, "actor": policy_loss}.items():
            losses[name], grads = jax.value_and_grad(loss_of)(params[name])
            changed[name], states[name] = off_policy.descend(
                descent, grads, learner.opt_state[name], params[name]
            )
        copies = optax.incremental_update(changed, old, tau)
        return Learner(changed, copies, states, learner.taken + 1), {
            "critic_loss": losses["critic"],
            "policy_loss": losses["actor"],
        }

    return off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=lambda learner, observation: actor.apply(learner.params["actor"], observation),
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
    )
