"""Training ordering policies, many runs in one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import pgjax as pg
from pgjax.envs.inventory import Policy
from pgjax.envs.supply_network import SupplyNetwork
from pgjax.models.inventory import OrderPolicy


def first_stock(
    key: PRNGKeyArray, network: SupplyNetwork, mean: Float[Array, " S"], batch: int
) -> Float[Array, "B N L"]:
    """Uniform between none and a period's mean demand, for each period on a store's way; else none.

    As in the reference code of hindsight policy optimisation.
    """
    leads = jnp.zeros(network.num_nodes).at[jnp.array(network.receivers)].max(network.lead_times)
    means = jnp.zeros(network.num_nodes).at[jnp.array(network.stores)].set(mean)
    shape = (batch, network.num_nodes, network.pipeline)
    used = jnp.arange(network.pipeline) < leads[:, None]
    return jax.random.uniform(key, shape) * means[:, None] * used


def fixed(policy: OrderPolicy, params: Any) -> Policy:
    """What `envs.inventory.unroll` takes."""
    return lambda stock, period: policy.apply(params, stock)


def fit(
    init: Callable[[PRNGKeyArray], Any],
    loss: Callable[[Any, PRNGKeyArray, Int[Array, ""]], Float[Array, ""]],
    *,
    learning_rates: Float[Array, " R"],
    seeds: Int[Array, " R"],
    steps: int,
    decay: bool = True,
    clip: float | None = None,
) -> tuple[Any, Float[Array, "R steps"]]:
    """Adam with a rate that falls to 0 along a cosine, or a constant one, one run after the other.

    Args:
      init: `key -> params`.
      loss: `(params, key, seed) -> loss`; the key is of the step, the seed that of the run.
      learning_rates, seeds: of each run; a seed has the same start and demands at every rate.
      steps: of each run.
      decay: of the rate.
      clip: largest global norm of a gradient; None: any.

    Returns:
      the params and losses of all runs, stacked.
    """

    def run(given: tuple[Array, Array]) -> tuple[Any, Array]:
        rate, seed = given
        init_key, key = jax.random.split(jax.random.key(seed))
        schedule = optax.cosine_decay_schedule(1.0, steps)
        parts = [] if clip is None else [optax.clip_by_global_norm(clip)]
        parts += [optax.scale_by_adam()]
        parts += [optax.scale_by_schedule(schedule)] if decay else []
        optimizer = optax.chain(*parts)
        params = init(init_key)

        def one(carry: Any, key: PRNGKeyArray) -> tuple[Any, Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key, seed)
            updates, state = optimizer.update(grads, state, params)
            return (jax.tree.map(lambda p, u: p - rate * u, params, updates), state), value

        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(one, start, jax.random.split(key, steps))
        return params, losses

    return jax.jit(lambda: jax.lax.map(run, (learning_rates, seeds)))()


def score_function_loss(
    network: SupplyNetwork,
    policy: OrderPolicy,
    params: Any,
    stock: Float[Array, "B N L"],
    demand: Float[Array, "T B S"],
    noise: Float[Array, "T B E"],
) -> Float[Array, ""]:
    """REINFORCE on orders max(policy + noise, 0), unit normal noise: its gradient, not its value.

    Advantages are costs to come, less their mean over the other scenarios of the batch.
    """
    _, trace = pg.envs.inventory.unroll(
        network, noisy(policy, jax.lax.stop_gradient(params), noise), stock, demand
    )
    costs = jax.lax.stop_gradient(trace.cost.T)
    to_come = pg.returns.discounted(costs, jnp.ones_like(costs))
    scenarios = len(costs)
    centred = (to_come - to_come.mean(0)) * scenarios / (scenarios - 1)
    means = policy.apply(params, jax.lax.stop_gradient(trace.stock))
    actions = jax.lax.stop_gradient(means) + noise
    logprobs = pg.policies.gaussian().log_prob((means, jnp.zeros_like(means)), actions)
    # A cost is a negative reward; a mean over periods, as of the pathwise loss.
    return pg.surrogates.score_function(logprobs.T, -centred).mean()


def noisy(policy: OrderPolicy, params: Any, noise: Float[Array, "T B E"]) -> Policy:
    """Orders with noise, never below 0."""
    return lambda stock, period: jnp.maximum(policy.apply(params, stock) + noise[period], 0.0)
