"""Soft actor-critic: returns and entropy together, with a temperature that finds itself.

Source: Haarnoja et al. 2018, arXiv 1801.01290 and 1812.05905 (temperature, no value network).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


class Actor(NamedTuple):
    """How SAC acts by its policy's parameters, and what these descend.

    Attributes:
      sample: `(key, parameters) -> (action [B, D], log_prob [B])`, to explore and in targets.
      loss: `(key, parameters, value, temperature) -> (loss [B], log_prob [B])`, where `value` takes
        actions `[B, D]` to their values `[B]`, and the temperature follows `log_prob`.
      mode: `parameters -> action`, without exploration.
    """

    sample: Callable[[PRNGKeyArray, Any], tuple[Array, Array]]
    loss: Callable[[PRNGKeyArray, Any, Callable[[Array], Array], Array], tuple[Array, Array]]
    mode: Callable[[Any], Array]


def reparametrized() -> Actor:
    """The actor of SAC itself: α log π(a|s) - Q(s, a) of one action of a tanh-Gaussian."""

    def loss(
        key: PRNGKeyArray, parameters: Any, value: Callable[[Array], Array], temperature: Array
    ) -> tuple[Array, Array]:
        action, log_prob = sample_tanh_gaussian(key, parameters)
        return temperature * log_prob - value(action), log_prob

    return Actor(sample_tanh_gaussian, loss, lambda parameters: jnp.tanh(parameters[0]))


class Judge(NamedTuple):
    """How SAC reads its critics' output, f `[2, ...]` of a network of one's own, and fits it.

    Attributes:
      lower: `output -> [B]`, or `[B, M]` for M members with a target each: values of next actions.
      value: `output -> [B]`, what the policy climbs.
      loss: `(output, target) -> (loss, metrics)`, targets as `lower` has values.
    """

    lower: Callable[[Any], Array]
    value: Callable[[Any], Array]
    loss: Callable[[Any, Array], tuple[Array, Metrics]]


def lower_of_two() -> Judge:
    """The critics of SAC itself: the least of their values, and squared errors of each."""

    def least(found: Array) -> Array:
        return found.min(0)

    def loss(found: Array, target: Array) -> tuple[Array, Metrics]:
        both = jnp.broadcast_to(target, found.shape)
        return values.value_error(found, both).mean(-1).sum(), {}

    return Judge(least, least, loss)


def sac(
    env: Environment,
    policy: Network | None = None,
    critic: Network | None = None,
    *,
    actor: Actor | None = None,
    judge: Judge | None = None,
    optimizer: optax.GradientTransformation
    | Mapping[str, optax.GradientTransformation]
    | None = None,
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
      policy: `(params, observation) -> parameters` of the actor; None:
        `squashed_gaussian_policy(env)`, mean and log standard deviation before the tangent.
      critic: `(params, observation, action) -> [2, ...]`; None: `critics(env)`.
      actor: what the policy's parameters mean and descend; None: `reparametrized()`, as above.
      judge: what the critics' outputs mean and descend; None: `lower_of_two()`, as above.
      optimizer: of each network and of log α, or one for each of `actor`, `critic` and
        `log_temperature` (`optax.set_to_zero()` leaves that as it is); None: Adam.
      num_envs, num_steps, gradient_steps, batch_size, capacity, start_steps: as
        `off_policy.agent`.
      discount: γ in [0, 1].
      tau: τ in (0, 1].
      initial_temperature: α > 0 at the start.
      target_entropy: H̄, in nats; None: minus the number of the action's entries.
      learning_rate: of the default optimizer.

    Returns:
      the agent. Metrics: `critic_loss`, `policy_loss`, `temperature`, `entropy` (of the samples),
      and of the episodes that ended `return`, `length` (means, NaN where none did), `episodes`;
      and those of a `judge`.

    Raises:
      ValueError: a number out of range, actions outside [-1, 1], observations that are not vectors,
        optimizers of other names.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("tau", tau, 0.0, 1.0, low_open=True)
    _checks.in_range("initial_temperature", initial_temperature, 0.0, low_open=True)
    wanted = -float(unit_actions(env)) if target_entropy is None else target_entropy
    net = squashed_gaussian_policy(env) if policy is None else policy
    acting = reparametrized() if actor is None else actor
    judging = lower_of_two() if judge is None else judge
    twins = critics(env) if critic is None else critic
    names = ("actor", "critic", "log_temperature")
    descent: Mapping[str, Any]
    if isinstance(optimizer, Mapping):
        if set(optimizer) != set(names):
            raise ValueError(f"optimizer: expected one for each of {names}, got {set(optimizer)}")
        descent = optimizer
    else:
        descent = dict.fromkeys(
            names, optax.adam(learning_rate) if optimizer is None else optimizer
        )

    def new(key: PRNGKeyArray) -> Learner:
        actor_key, critic_key = jax.random.split(key)
        params = {
            "actor": net.init(actor_key),
            "critic": twins.init(critic_key),
            "log_temperature": jnp.log(jnp.float32(initial_temperature)),
        }
        opt_state = {name: descent[name].init(x) for name, x in params.items()}
        return Learner(params, {"critic": params["critic"]}, opt_state, jnp.int32(0))

    def explore(learner: Learner, updates: Array, key: PRNGKeyArray, observation: Any) -> Array:
        del updates
        return acting.sample(key, net.apply(learner.params["actor"], observation))[0]

    def step(learner: Learner, key: PRNGKeyArray, batch: Transition) -> tuple[Learner, Metrics]:
        next_key, own_key = jax.random.split(key)
        params, states = dict(learner.params), dict(learner.opt_state)
        temperature = jnp.exp(params["log_temperature"])
        later, later_log_prob = acting.sample(
            next_key, net.apply(params["actor"], batch.next_observation)
        )
        following = judging.lower(
            twins.apply(learner.targets["critic"], batch.next_observation, later)
        )

        def of_members(x: Array) -> Array:
            return jnp.broadcast_to(
                x.reshape(x.shape + (1,) * (following.ndim - 1)), following.shape
            )

        target = values.one_step_targets(
            of_members(batch.reward),
            following - of_members(temperature * later_log_prob),
            of_members(off_policy.discounts(batch, discount)),
        )

        def critic_loss(critic: Any) -> tuple[Array, Metrics]:
            return judging.loss(twins.apply(critic, batch.observation, batch.action), target)

        def policy_loss(policy: Any) -> tuple[Array, Array]:
            def value(action: Array) -> Array:
                return judging.value(twins.apply(params["critic"], batch.observation, action))

            parameters = net.apply(policy, batch.observation)
            loss, log_prob = acting.loss(own_key, parameters, value, temperature)
            return loss.mean(), log_prob

        def descend(name: str, grads: Any) -> None:
            params[name], states[name] = off_policy.descend(
                descent[name], grads, states[name], params[name]
            )

        (loss, more), grads = jax.value_and_grad(critic_loss, has_aux=True)(params["critic"])
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
            **more,
        }

    return off_policy.agent(
        env,
        new=new,
        explore=explore,
        step=step,
        greedy=lambda learner, observation: acting.mode(
            net.apply(learner.params["actor"], observation)
        ),
        num_envs=num_envs,
        num_steps=num_steps,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        capacity=capacity,
        start_steps=start_steps,
    )
