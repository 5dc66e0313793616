"""Natural policy gradient and trust region policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks, surrogates
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import ActorCritic, actor_critic
from pgjax.envs.core import Environment
from pgjax.optim import natural

Function = Callable[[Any], Float[Array, ""]]


def npg(env: Environment, network: ActorCritic | None = None, **options: Any) -> Agent:
    """Natural policy gradient: the step √(2 δ / x·F x) x, F x = g, whatever it leads to.

    Args:
      env, network, **options: of `trpo`, but for `backtracks`.

    Source: Kakade 2001; step sizes as of Rajeswaran et al. 2017, arXiv 1703.02660.
    """
    if "backtracks" in options:
        raise ValueError("backtracks: not an option of npg, which takes its step as it is")

    def step(objective: Function, distance: Function, params: Any, **given: Any) -> natural.Step:
        before, grads = jax.value_and_grad(objective)(params)
        update = natural.natural_step(grads, distance, params, **given)
        there = optax.apply_updates(params, update)
        return natural.Step(update, distance(there), objective(there) - before, jnp.bool_(True))

    return _agent(env, network, step, **options)


def trpo(
    env: Environment, network: ActorCritic | None = None, *, backtracks: int = 10, **options: Any
) -> Agent:
    """TRPO: the natural step, shortened until the surrogate gains and the mean KL is within δ.

    Args:
      env: the world; observations must be vectors where `network` is None.
      network: policy and value function with parameters `actor` and `critic`; None:
        `actor_critic(env)`.
      backtracks: steps tried, each half of the one before.
      **options: `num_envs` 8, `num_steps` 128, `discount` .99, `lambda_` .95, `radius` δ .01,
        `damping` .1, `num_cg_steps` 10, `value_epochs` 10 passes of `value_minibatches` 4 by Adam
        with `value_rate` 1e-3, `bootstrap_truncated` True.

    Returns:
      the agent. Metrics: `kl` and `improvement` of the step, `accepted`, `value_loss`, `entropy`,
      `explained_variance`, `return`, `length`, `episodes`.

    Raises:
      ValueError: a number out of range, an unknown option, counts that do not divide.

    Source: Schulman et al. 2015, arXiv 1502.05477.
    """

    def step(objective: Function, distance: Function, params: Any, **given: Any) -> natural.Step:
        return natural.trust_region_step(
            objective, distance, params, backtracks=backtracks, **given
        )

    return _agent(env, network, step, **options)


def _agent(
    env: Environment,
    network: ActorCritic | None,
    step: Callable[..., natural.Step],
    *,
    num_envs: int = 8,
    num_steps: int = 128,
    discount: float = 0.99,
    lambda_: float = 0.95,
    radius: float = 0.01,
    damping: float = 0.1,
    num_cg_steps: int = 10,
    value_epochs: int = 10,
    value_minibatches: int = 4,
    value_rate: float = 1e-3,
    bootstrap_truncated: bool = True,
) -> Agent:
    for name, count in {
        "num_envs": num_envs,
        "num_steps": num_steps,
        "value_epochs": value_epochs,
        "value_minibatches": value_minibatches,
    }.items():
        _checks.in_range(name, count, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("radius", radius, 0.0, low_open=True)
    size = num_envs * num_steps
    if size % value_minibatches:
        raise ValueError(
            f"value_minibatches: expected a divisor of {num_envs} x {num_steps} steps, "
            f"got {value_minibatches}"
        )
    net = actor_critic(env) if network is None else network
    divergence = net.distribution.kl
    if divergence is None:
        raise ValueError("network: expected a distribution with a closed-form `kl`, got None")
    adam = optax.adam(value_rate)

    def init(key: PRNGKeyArray) -> on_policy.State:
        return on_policy.initial(
            env, net, lambda params: adam.init(params["critic"]), key, num_envs=num_envs
        )

    def update(state: on_policy.State) -> tuple[on_policy.State, Metrics]:
        key, act_key, epoch_key = jax.random.split(state.key, 3)
        params = state.params
        running, seen, episodes, advantage, target = on_policy.collect(
            env,
            net,
            params,
            state.running,
            act_key,
            num_steps=num_steps,
            discount=discount,
            lambda_=lambda_,
            bootstrap_truncated=bootstrap_truncated,
        )
        assert seen.value is not None and seen.log_prob is not None
        behavior = seen.log_prob
        advantage = on_policy.standardize(advantage)
        old = net.actor(params, seen.observation)

        def objective(actor: Any) -> Float[Array, ""]:
            parameters = net.actor({**params, "actor": actor}, seen.observation)
            log_prob = net.distribution.log_prob(parameters, seen.action)
            ratio = surrogates.importance_ratio(log_prob, behavior)
            return (ratio * advantage).mean()

        def distance(actor: Any) -> Float[Array, ""]:
            new = net.actor({**params, "actor": actor}, seen.observation)
            return divergence(old, new).mean()

        found = step(
            objective,
            distance,
            params["actor"],
            radius=radius,
            damping=damping,
            num_steps=num_cg_steps,
        )
        actor = optax.apply_updates(params["actor"], found.update)
        observations, targets = jax.tree.map(
            lambda x: x.reshape(size, *x.shape[2:]), (seen.observation, target)
        )

        def fit(carry: Any, rows: Array) -> tuple[Any, Array]:
            critic, opt_state = carry

            def loss(critic: Any) -> Array:
                value = net.critic({**params, "critic": critic}, observations[rows])
                return surrogates.value_error(value[None], targets[rows][None]).mean()

            value_loss, grads = jax.value_and_grad(loss)(critic)
            updates, opt_state = adam.update(grads, opt_state, critic)
            return (optax.apply_updates(critic, updates), opt_state), value_loss

        parts = on_policy.minibatches(
            epoch_key, size, num_epochs=value_epochs, num_minibatches=value_minibatches
        )
        (critic, opt_state), losses = jax.lax.scan(fit, (params["critic"], state.opt_state), parts)
        metrics = {
            "kl": found.distance,
            "improvement": found.improvement,
            "accepted": found.accepted.astype(jnp.float32),
            "value_loss": losses.mean(),
            "entropy": on_policy.entropy_of(net, old, behavior),
            "explained_variance": on_policy.explained_variance(seen.value, target),
        }
        params = {**params, "actor": actor, "critic": critic}
        state = on_policy.State(params, opt_state, running, key, state.updates + 1)
        return state, metrics | on_policy.finished(episodes)

    return Agent(init, update, on_policy.greedy(net), size)
