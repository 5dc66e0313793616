"""What agents share that learn from the batch they have just collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks, advantages, returns
from pgjax.agents.agent import Metrics
from pgjax.agents.networks import ActorCritic
from pgjax.envs.core import Environment
from pgjax.sampling import random_order
from pgjax.sampling.environments import (
    Decision,
    Episodes,
    Running,
    start_environments,
    unroll_environments,
)
from pgjax.types import Transition

_ROWS = 4096  # of observations that are judged at once
_BLOCK = 2048  # rows whose activations, of small networks, stay in a CPU's cache


class State(NamedTuple):
    """Of an on-policy agent."""

    params: Any
    opt_state: Any
    running: Running
    key: PRNGKeyArray
    updates: Array


def decide(net: ActorCritic, params: Any) -> Any:
    """`act` of `unroll_environments`."""

    def act(key: PRNGKeyArray, observation: Any) -> Decision:
        parameters = net.actor(params, observation)
        action = net.distribution.sample(key, parameters)
        log_prob = net.distribution.log_prob(parameters, action)
        return Decision(action, log_prob, net.critic(params, observation))

    return act


def greedy(net: ActorCritic) -> Any:
    """`Agent.act` by the distribution's mode."""

    def act(state: State, key: PRNGKeyArray, observation: Any) -> Any:
        del key
        return net.distribution.mode(net.actor(state.params, observation))

    return act


class Collected(NamedTuple):
    """A fresh batch `[T, N]`, judged by the policy and values that it was collected with.

    Attributes:
      running: the environments after it.
      seen: with `log_prob` and `value`.
      episodes: those that ended.
      advantage, target: f32, of `estimate`.
    """

    running: Running
    seen: Transition
    episodes: Episodes
    advantage: Float[Array, "T N"]
    target: Float[Array, "T N"]


def collect(
    env: Environment,
    net: ActorCritic,
    params: Any,
    running: Running,
    key: PRNGKeyArray,
    *,
    num_steps: int,
    discount: float,
    lambda_: float,
    bootstrap_truncated: bool,
) -> Collected:
    """So many steps of every environment, and `estimate` of them.

    Args:
      env: the world.
      net, params: act and judge.
      running: N environments.
      key: of actions and environments.
      num_steps: T.
      discount, lambda_, bootstrap_truncated: of `estimate`.

    Raises:
      ValueError: as `returns.gae`.
    """
    running, seen, episodes = unroll_environments(
        env, decide(net, params), running, key, num_steps=num_steps
    )
    advantage, target = estimate(
        net,
        params,
        seen,
        running.observation,
        discount=discount,
        lambda_=lambda_,
        bootstrap_truncated=bootstrap_truncated,
    )
    return Collected(running, seen, episodes, advantage, target)


def estimate(
    net: ActorCritic,
    params: Any,
    seen: Transition,
    last_observation: Any,
    *,
    discount: float,
    lambda_: float,
    bootstrap_truncated: bool,
) -> tuple[Float[Array, "T N"], Float[Array, "T N"]]:
    """Advantages by GAE, and the targets A + V of the value function."""
    assert seen.value is not None
    truncated = seen.truncated
    if bootstrap_truncated:
        # Some thousand rows at a time: hidden layers of a whole batch would be its largest arrays.
        following = jax.lax.map(
            lambda observation: net.critic(params, observation),
            seen.next_observation,
            batch_size=max(1, _ROWS // seen.reward.shape[1]),
        )
        ended = seen.terminated
    else:  # the next step's value is that of another episode, and hidden by a discount of 0
        last = net.critic(params, last_observation)
        following = jnp.concatenate([seen.value[1:], last[None]])
        ended, truncated = seen.terminated | truncated, jnp.zeros_like(truncated)
    found = returns.gae(
        seen.reward.T,
        seen.value.T,
        following.T,
        discount * (1.0 - ended.T),
        lambda_=lambda_,
        truncated=truncated.T,
    ).T
    return found, found + seen.value


def initial(
    env: Environment,
    net: Any,
    optimizer_init: Callable[[Any], Any],
    key: PRNGKeyArray,
    *,
    num_envs: int,
) -> State:
    """The state before the first update; `net` is anything with an `init`."""
    net_key, env_key, key = jax.random.split(key, 3)
    params = net.init(net_key)
    running = start_environments(env, env_key, num_envs)
    return State(params, optimizer_init(params), running, key, jnp.int32(0))


def minibatches(
    key: PRNGKeyArray, size: int, *, num_epochs: int, num_minibatches: int
) -> Int[Array, "P B"]:
    """Rows of each minibatch, P = epochs x minibatches; every epoch has all rows in a new order."""
    orders = jax.vmap(lambda key: random_order(key, size))(jax.random.split(key, num_epochs))
    return orders.reshape(num_epochs * num_minibatches, size // num_minibatches)


def gradient_in_blocks(
    loss: Callable[[Any, Any], tuple[Array, Metrics]],
    params: Any,
    rows: Any,
    *,
    block_size: int | None = None,
) -> tuple[Any, Metrics]:
    """Gradient and metrics of a mean over rows, a block of them at a time.

    The mean of the blocks' gradients is that of all rows, where the loss and its metrics are means
    over rows and no row's term depends on another's. Activations are then those of a block. On CPUs
    these stay in the cache, where a large minibatch's go through memory at every layer.

    Args:
      loss: `(params, rows) -> (mean, means)`.
      params: differentiable.
      rows: leaves `[B, ...]`.
      block_size: of `block_of`.

    Returns:
      the gradient, like `params`, and the metrics over all rows.

    Raises:
      ValueError: as `block_of`.
    """
    gradient = jax.grad(loss, has_aux=True)
    size = jax.tree.leaves(rows)[0].shape[0]
    block = block_of(size, block_size)
    if block == size:
        return gradient(params, rows)
    number = size // block
    blocks = jax.tree.map(lambda x: x.reshape(number, block, *x.shape[1:]), rows)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], blocks))

    def add(total: Any, block: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, block)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zero, blocks)
    return jax.tree.map(lambda x: x / number, total)


def block_of(size: int, wanted: int | None) -> int:
    """Rows of a minibatch of `size` whose gradient is computed at a time.

    Args:
      size: B.
      wanted: so many; None: on CPUs, of a large minibatch, the largest divisor of B from `_BLOCK`
        down to its half, and all where there is none.

    Raises:
      ValueError: `wanted` does not divide B.
    """
    if wanted is not None:
        _checks.in_range("block_size", wanted, 1)
        if size % wanted:
            raise ValueError(
                f"block_size: expected a divisor of the minibatch's {size} rows, got {wanted}"
            )
        return wanted
    if jax.default_backend() != "cpu" or size <= 2 * _BLOCK:
        return size
    return next((n for n in range(_BLOCK, _BLOCK // 2, -1) if size % n == 0), size)


def scan_until(
    step: Callable[[Any, Any], tuple[Any, Metrics]],
    carry: Any,
    given: Any,
    enough: Callable[[Metrics], Array],
) -> tuple[Any, Metrics]:
    """`jax.lax.scan` whose steps leave the carry alone after the first with `enough(metrics)`.

    Returns:
      the carry; means of the metrics over the steps taken, and `taken`, their share of all.
    """
    first = jax.tree.map(lambda x: x[0], given)
    shapes = jax.eval_shape(step, carry, first)[1]

    def skip(carry: Any, now: Any) -> tuple[Any, Metrics]:
        del now
        return carry, jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)

    def one(state: Any, now: Any) -> tuple[Any, Any]:
        carry, going = state
        carry, metrics = jax.lax.cond(going, step, skip, carry, now)
        return (carry, going & ~enough(metrics)), (metrics, going)

    (carry, _), (stacked, taken) = jax.lax.scan(one, (carry, jnp.bool_(True)), given)
    number = taken.sum()
    metrics = {name: jnp.where(taken, x, 0.0).sum() / number for name, x in stacked.items()}
    return carry, metrics | {"taken": taken.mean()}


def annealed(rate: float, over: int | None, steps: int) -> optax.ScalarOrSchedule:
    """Falls to 0 over so many updates of `steps` optimizer steps, and within none of them."""
    if over is None:
        return rate
    _checks.in_range("anneal_over", over, 1)
    return lambda count: rate * jnp.maximum(0.0, 1.0 - count // steps / over)


def standardize(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`advantages.batch_normalize` over all axes, by the population's standard deviation."""
    return advantages.batch_normalize(x.reshape(-1), ddof=0, epsilon=1e-8).reshape(x.shape)


def entropy_of(net: ActorCritic, parameters: Any, log_prob: Array) -> Float[Array, ""]:
    """Mean entropy; where it has no closed form, that of the actions taken."""
    if net.distribution.entropy is None:
        return -log_prob.mean()
    return net.distribution.entropy(parameters).mean()


def explained_variance(value: Array, target: Array) -> Float[Array, ""]:
    """1 - Var(target - value) / Var(target), 0 where the target does not vary."""
    variance = target.var()
    return jnp.where(variance > 0, 1.0 - (target - value).var() / jnp.maximum(variance, 1e-12), 0.0)


def finished(episodes: Episodes) -> Metrics:
    """Means over the episodes that ended, and how many did."""
    number = episodes.ended.sum()
    return {
        "return": jnp.where(episodes.ended, episodes.returns, 0.0).sum() / number,
        "length": jnp.where(episodes.ended, episodes.lengths, 0).sum() / number,
        "episodes": number.astype(jnp.float32),
    }
