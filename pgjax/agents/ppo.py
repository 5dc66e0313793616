"""Proximal policy optimisation on many environments, the whole loop in one program.

Sources: Schulman et al. 2017, arXiv 1707.06347, and its reference implementation; the default
numbers are PureJaxRL's for CartPole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pgjax import _checks, advantages, aggregate, surrogates
from pgjax.agents import on_policy
from pgjax.agents.agent import Agent, Metrics
from pgjax.agents.networks import ActorCritic, actor_critic
from pgjax.envs.core import Environment


class Batch(NamedTuple):
    """What minibatches are taken of, `[T N, ...]`."""

    observation: Any
    action: Any
    log_prob: Array
    value: Array
    advantage: Array
    target: Array


Auxiliary = Callable[[Any, Batch, PRNGKeyArray], tuple[Array, Metrics]]


def clipped_loss(
    net: ActorCritic,
    params: Any,
    part: Batch,
    *,
    clip: float,
    value_clip: float | None,
    value_coefficient: float,
    entropy_coefficient: float,
    normalize_advantages: bool,
    where: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """L of `ppo` on a minibatch, and its metrics.

    Args:
      net: policy and value function.
      params: of both, differentiable.
      part: the minibatch, leaves `[B, ...]`.
      clip, value_clip, value_coefficient, entropy_coefficient, normalize_advantages: of `ppo`.
      where: rows that count, in means and in the normalisation; None: all. Of no rows all is 0.

    Returns:
      f32 scalars: the loss, and `loss`, `policy_loss`, `value_loss`, `entropy`, `kl`, `clipped`.

    Raises:
      ValueError: as `surrogates.clipped` and `aggregate.masked_mean`.
    """

    def mean(x: Array) -> Array:
        return x.mean() if where is None else aggregate.masked_mean(x.reshape(-1), where)

    parameters = net.actor(params, part.observation)
    log_prob = net.distribution.log_prob(parameters, part.action)
    advantage = part.advantage
    if normalize_advantages:
        advantage = advantages.batch_normalize(advantage, ddof=0, epsilon=1e-8, where=where)
    ratio = surrogates.importance_ratio(log_prob[None], part.log_prob[None])
    policy_loss = mean(surrogates.clipped(ratio, advantage[None], low=clip, high=clip))
    value = net.critic(params, part.observation)[None]
    if value_clip is None:
        error = mean(surrogates.value_error(value, part.target[None]))
    else:
        error = mean(
            surrogates.clipped_value_error(
                value, part.target[None], part.value[None], width=value_clip
            )
        )
    known = net.distribution.entropy
    entropy = mean(-log_prob if known is None else known(parameters))
    loss = policy_loss + value_coefficient * error - entropy_coefficient * entropy
    return loss, {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": error,
        "entropy": entropy,
        "kl": mean(ratio - 1.0 - (log_prob - part.log_prob)),
        "clipped": mean((jnp.abs(ratio - 1.0) > clip).astype(jnp.float32)),
    }


def ppo(
    env: Environment,
    network: ActorCritic | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    num_envs: int = 4,
    num_steps: int = 128,
    num_epochs: int = 4,
    num_minibatches: int = 4,
    discount: float = 0.99,
    lambda_: float = 0.95,
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    value_coefficient: float = 0.5,
    entropy_coefficient: float = 0.01,
    normalize_advantages: bool = True,
    bootstrap_truncated: bool = True,
    learning_rate: float = 2.5e-4,
    anneal_over: int | None = None,
    max_gradient_norm: float = 0.5,
    max_kl: float | None = None,
    auxiliary: Auxiliary | None = None,
    block_size: int | None = None,
) -> Agent:
    """PPO: clipped surrogate, value error and entropy on minibatches of a fresh batch.

    L = mean[-min(r A, clip(r, 1 ± ε) A)] + c_v L_v - c_e mean[H], A from GAE and normalised in each
    minibatch, L_v the squared error to A + V, halved, clipped around the old value.

    Args:
      env: the world; observations must be vectors where `network` is None.
      network: policy and value function; None: `actor_critic(env)`.
      optimizer: None: Adam with ε = 1e-5 behind a clip of the gradient's norm.
      num_envs: N.
      num_steps: T of each environment in a batch.
      num_epochs: passes over a batch.
      num_minibatches: optimizer steps a pass; divides N T.
      discount: γ in [0, 1].
      lambda_: of GAE, in [0, 1].
      clip: ε > 0 of the ratio.
      value_clip: width around the old value; None: the error is not clipped.
      value_coefficient: c_v ≥ 0.
      entropy_coefficient: c_e.
      normalize_advantages: to mean 0 and (population) standard deviation 1 in each minibatch.
      bootstrap_truncated: where an episode was cut off, count on the value of its last observation;
        costs one more pass of the critic over the batch. False takes time limits for ends, as much
        published code does.
      learning_rate: of the default optimizer.
      anneal_over: updates over which it falls to 0, linearly and from update to update; None: it
        does not.
      max_gradient_norm: of the default optimizer.
      max_kl: > 0; after the first minibatch whose `kl` is above it, no more steps are taken on this
        batch. None: all are.
      auxiliary: `(params, minibatch, key) -> (loss, metrics)`, added to L: a penalty on the
        distribution's parameters, say, or the error of another network in `params`. None: nothing.
      block_size: rows of a minibatch whose gradient is computed at a time; the step is the same up
        to rounding. Bounds the memory of activations, those of `auxiliary` aside. None: all, on
        CPUs some 2,000 of a minibatch with more than twice as many. A network with statistics over
        rows needs all of them.

    Returns:
      the agent. Metrics: `loss`, `policy_loss`, `value_loss`, `entropy`, `kl` (mean of
      r - 1 - log r), `clipped` (share of ratios outside), `explained_variance`, and of the
      episodes that ended `return`, `length` (means, NaN where none did) and `episodes`; where there
      is a `max_kl`, `taken` (share of the steps); those of `auxiliary`.

    Raises:
      ValueError: a number out of range, a count or `block_size` that does not divide, observations
        that are not vectors and no `network`.
    """
    for name, count in {
        "num_envs": num_envs,
        "num_steps": num_steps,
        "num_epochs": num_epochs,
        "num_minibatches": num_minibatches,
    }.items():
        _checks.in_range(name, count, 1)
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.in_range("clip", clip, 0.0, low_open=True)
    if max_kl is not None:
        _checks.in_range("max_kl", max_kl, 0.0, low_open=True)
    size = num_envs * num_steps
    if size % num_minibatches:
        raise ValueError(
            f"num_minibatches: expected a divisor of {num_envs} x {num_steps} steps, "
            f"got {num_minibatches}"
        )
    block_size = on_policy.block_of(size // num_minibatches, block_size)
    net = actor_critic(env) if network is None else network
    if optimizer is None:
        rate = on_policy.annealed(learning_rate, anneal_over, num_epochs * num_minibatches)
        # One vector: a handful of small arrays would be a kernel each, many times an update.
        optimizer = optax.flatten(
            optax.chain(optax.clip_by_global_norm(max_gradient_norm), optax.adam(rate, eps=1e-5))
        )
    adam = optimizer

    def init(key: PRNGKeyArray) -> on_policy.State:
        return on_policy.initial(env, net, adam.init, key, num_envs=num_envs)

    def loss_of(params: Any, part: Batch) -> tuple[Array, Metrics]:
        return clipped_loss(
            net,
            params,
            part,
            clip=clip,
            value_clip=value_clip,
            value_coefficient=value_coefficient,
            entropy_coefficient=entropy_coefficient,
            normalize_advantages=False,
        )

    def gradient(params: Any, part: Batch, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        counted = part
        if normalize_advantages:
            counted = part._replace(advantage=on_policy.standardize(part.advantage))
        grads, metrics = on_policy.gradient_in_blocks(
            loss_of, params, counted, block_size=block_size
        )
        if auxiliary is None:
            return grads, metrics
        (extra, more), further = jax.value_and_grad(auxiliary, has_aux=True)(params, part, key)
        return jax.tree.map(jnp.add, grads, further), (
            more | metrics | {"loss": metrics["loss"] + extra}
        )

    def update(state: on_policy.State) -> tuple[on_policy.State, Metrics]:
        key, act_key, epoch_key = jax.random.split(state.key, 3)
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
        assert seen.log_prob is not None and seen.value is not None
        batch = Batch(seen.observation, seen.action, seen.log_prob, seen.value, advantage, target)
        batch = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), batch)

        def minibatch(carry: Any, given: Any) -> tuple[Any, Metrics]:
            params, opt_state = carry
            rows, key = given
            part = jax.tree.map(lambda x: x[rows], batch)
            grads, metrics = gradient(params, part, key)
            updates, opt_state = adam.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics

        parts = on_policy.minibatches(
            epoch_key, size, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        keys = jax.random.split(jax.random.fold_in(epoch_key, 0), len(parts))
        begun = (state.params, state.opt_state)
        if max_kl is None:
            carry, stacked = jax.lax.scan(minibatch, begun, (parts, keys))
            metrics = {name: x.mean() for name, x in stacked.items()}
        else:
            carry, metrics = on_policy.scan_until(
                minibatch, begun, (parts, keys), lambda found: found["kl"] > max_kl
            )
        metrics["explained_variance"] = on_policy.explained_variance(batch.value, batch.target)
        state = on_policy.State(*carry, running, key, state.updates + 1)
        return state, metrics | on_policy.finished(episodes)

    return Agent(init, update, on_policy.greedy(net), size)
