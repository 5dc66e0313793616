"""Soft actor-critic whose critics are ensembles, trained by generalised Gaussian errors.

Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from pgjax import _checks, values
from pgjax.agents import off_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import Network, squashed_gaussian_policy, unit_actions, vector_size
from pgjax.agents.off_policy import Learner
from pgjax.envs.core import Environment
from pgjax.models import mlp
from pgjax.policies.distributions import sample_tanh_gaussian
from pgjax.types import Transition
from pgjax.uncertainty.biv import ggd_td_losses


def ggd_critics(
    env: Environment,
    *,
    num: int = 2,
    members: int = 5,
    hidden: Sequence[int] = (256, 256),
    activation: Callable[[Any], Any] = jax.nn.relu,
) -> Network:
    """Critics of several heads: `(params, observation, action) -> (Q, β)`, `[num, ..., M]` each.

    The heads of a critic share its hidden layers; β = softplus of a head of its own, for each Q.

    Raises:
      ValueError: observations that are not vectors, actions outside [-1, 1], a `num` below 1, fewer
        than four members.
    """
    _checks.in_range("num", num, 1)
    _checks.in_range("members", members, 4)
    sizes = (vector_size(env) + unit_actions(env), *hidden, 2 * members)

    def apply(params: Any, observation: Array, action: Array) -> tuple[Array, Array]:
        both = jnp.concatenate([observation, action], axis=-1)
        found = jax.vmap(lambda one: mlp.apply(one, both, activation=activation))(params)
        return found[..., :members], jax.nn.softplus(found[..., members:])

    return Network(
        init=lambda key: jax.vmap(lambda key: mlp.init(key, sizes))(jax.random.split(key, num)),
        apply=apply,
    )


def ggd_sac(
    env: Environment,
    policy: Network | None = None,
    critic: Network | None = None,
    *,
    epistemic_weight: float = 0.1,
    min_effective: int = 16,
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
    """SAC with y_m = r + γ(1 - terminated)(min_i Q'_im(s', a') - α log π(a'|s')) for each member m.

    L_Q = Σ_i mean `uncertainty.ggd_td_losses`(y - Q_i, β_i) / 2; the policy descends
    mean[α log π(a|s) - min_i mean_m Q_im(s, a)]; temperature and copies are those of `sac`.

    Args:
      env: the world, with actions in [-1, 1] (`envs.with_scaled_actions`); observations must be
        vectors where a network is None.
      policy: `(params, observation) -> (mean, log_std)` before the tangent; None:
        `squashed_gaussian_policy(env)`.
      critic: `(params, observation, action) -> (Q, β)`, both `[2, ..., M]`; None:
        `ggd_critics(env)`.
      epistemic_weight: λ ≥ 0, of the errors weighed by inverse variances.
      min_effective: least effective batch size of these weights.
      optimizer: of each network and of log α; None: Adam.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`.
      discount: γ in [0, 1].
      tau: τ in (0, 1].
      initial_temperature: α > 0 at the start.
      target_entropy: in nats; None: minus the number of the action's entries.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: those of `sac`, and `shape`, the mean β.

    Raises:
      ValueError: a number out of range, actions outside [-1, 1], observations that are not vectors.

    Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
    """
    _checks.in_range("epistemic_weight", epistemic_weight, 0.0)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("initial_temperature", initial_temperature, 0.0, low_open=True)
    wanted = -float(unit_actions(env)) if target_entropy is None else target_entropy
    net = squashed_gaussian_policy(env) if policy is None else policy
    judge = ggd_critics(env) if critic is None else critic
    descent = optax.adam(learning_rate) if optimizer is None else optimizer

    def new(key: PRNGKeyArray) -> Learner:
        actor_key, critic_key = jax.random.split(key)
        params = {
            "actor": net.init(actor_key),
            "critic": judge.init(critic_key),
            "log_temperature": jnp.log(jnp.float32(initial_temperature)),
        }
        opt_state = {name: descent.init(x) for name, x in params.items()}
        return Learner(params, {"critic": params["critic"]}, opt_state, jnp.int32(0))

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        del updates
        return sample_tanh_gaussian(key, net.apply(learner.params["actor"], observation))[0]

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        next_key, own_key = jax.random.split(key)
        params, states = dict(learner.params), dict(learner.opt_state)
        temperature = jnp.exp(params["log_temperature"])
        later, later_log_prob = sample_tanh_gaussian(
            next_key, net.apply(params["actor"], batch.next_observation)
        )
        following, _ = judge.apply(learner.targets["critic"], batch.next_observation, later)
        lower = following.min(0) - (temperature * later_log_prob)[:, None]
        rewards, fades = (
            jnp.broadcast_to(x[:, None], lower.shape)
            for x in (batch.reward, off_policy.discounts(batch, discount))
        )
        target = values.one_step_targets(rewards, lower, fades)

        def critic_loss(critic: Any) -> tuple[Array, Array]:
            found, shapes = judge.apply(critic, batch.observation, batch.action)
            losses = [
                ggd_td_losses(
                    target - q,
                    shape,
                    epistemic_weight=epistemic_weight,
                    min_effective=min_effective,
                ).mean()
                for q, shape in zip(found, shapes, strict=True)
            ]
            return 0.5 * jnp.stack(losses).sum(), shapes.mean()

        def policy_loss(policy: Any) -> tuple[Array, Array]:
            action, log_prob = sample_tanh_gaussian(own_key, net.apply(policy, batch.observation))
            found, _ = judge.apply(params["critic"], batch.observation, action)
            return (temperature * log_prob - found.mean(-1).min(0)).mean(), log_prob

        def descend(name: str, grads: Any) -> None:
            params[name], states[name] = off_policy.descend(
                descent, grads, states[name], params[name]
            )

        (loss, shape), grads = jax.value_and_grad(critic_loss, has_aux=True)(params["critic"])
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
            "shape": shape,
        }

    return off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=lambda learner, observation: jnp.tanh(
            net.apply(learner.params["actor"], observation)[0]
        ),
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
    )
