"""Twin delayed DDPG: two critics, of which the lower counts, and a policy that moves less often.

Source: Fujimoto et al. 2018, arXiv 1802.09477.
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
from pgjax.agents.networks import Network, critics, deterministic_policy
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.types import Transition


def td3(
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
    target_noise: float = 0.2,
    target_noise_clip: float = 0.5,
    policy_delay: int = 2,
    learning_rate: float = 3e-4,
) -> Agent:
    """TD3: y = r + γ(1 - terminated) min_i Q'_i(s', a'), a' a noisy action of the policy's copy.

    a' = clip(μ'(s') + clip(ε, ±c), ±1), ε ~ N(0, σ²); L_Q = Σ_i mean (Q_i(s, a) - y)² / 2. On
    every second step the policy ascends mean Q_1(s, μ(s)), with the Q_1 this step has brought, and
    all copies follow, θ' ← θ' + τ (θ - θ').

    Args:
      env: the world, with actions in [-1, 1] (`envs.with_scaled_actions`); observations must be
        vectors where a network is None.
      policy: `(params, observation) -> action`; None: `deterministic_policy(env)`.
      critic: `(params, observation, action) -> [2, ...]`; None: `critics(env)`.
      optimizer: of each network; None: Adam.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`.
      discount: γ in [0, 1].
      tau: τ in (0, 1].
      noise: standard deviation of the exploring noise, as a part of the actions' half range.
      target_noise: σ, likewise.
      target_noise_clip: c > 0, likewise.
      policy_delay: critic steps for each step of the policy and the copies.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: `critic_loss`, `policy_loss` (NaN where an update had no step of the
      policy), and of the episodes that ended `return`, `length` (means, NaN where none did) and
      `episodes`.

    Raises:
      ValueError: a number out of range, actions outside [-1, 1], observations that are not vectors.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("noise", noise, 0.0)
    _checks.in_range("target_noise", target_noise, 0.0)
    _checks.in_range("target_noise_clip", target_noise_clip, 0.0, low_open=True)
    _checks.in_range("policy_delay", policy_delay, 1)
    actor = deterministic_policy(env) if policy is None else policy
    judge = critics(env) if critic is None else critic
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
        old = learner.targets
        later = off_policy.with_noise(
            key,
            actor.apply(old["actor"], batch.next_observation),
            scale=target_noise,
            clip=target_noise_clip,
        )
        following = judge.apply(old["critic"], batch.next_observation, later).min(0)
        target = values.one_step_targets(
            batch.reward, following, off_policy.discounts(batch, discount)
        )

        def critic_loss(critic: Any) -> Array:
            found = judge.apply(critic, batch.observation, batch.action)
            both = jnp.broadcast_to(target, found.shape)
            return values.value_error(found, both).mean(-1).sum()

        loss, grads = jax.value_and_grad(critic_loss)(learner.params["critic"])
        critic, critic_state = off_policy.descend(
            descent, grads, learner.opt_state["critic"], learner.params["critic"]
        )
        learner = Learner(
            {**learner.params, "critic": critic},
            old,
            {**learner.opt_state, "critic": critic_state},
            learner.taken + 1,
        )
        learner, policy_loss = jax.lax.cond(
            learner.taken % policy_delay == 0,
            lambda: improve(learner, batch),
            lambda: (learner, jnp.float32(jnp.nan)),
        )
        return learner, {"critic_loss": loss, "policy_loss": policy_loss}

    def improve(learner: Learner, batch: Transition) -> tuple[Learner, Array]:
        params = learner.params

        def loss_of(policy: Any) -> Array:
            action = actor.apply(policy, batch.observation)
            return -judge.apply(params["critic"], batch.observation, action)[0].mean()

        loss, grads = jax.value_and_grad(loss_of)(params["actor"])
        changed, state = off_policy.descend(
            descent, grads, learner.opt_state["actor"], params["actor"]
        )
        params = {**params, "actor": changed}
        return Learner(
            params,
            optax.incremental_update(params, learner.targets, tau),
            {**learner.opt_state, "actor": state},
            learner.taken,
        ), loss

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
