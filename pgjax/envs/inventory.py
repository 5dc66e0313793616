"""Supply networks: stock that arrives later than ordered, and what holding and lacking it costs.

```
network = supply_network.warehouse_and_stores((2, 3), holding=(1.0, 0.8), penalty=(9.0, 7.0))
stock, trace = inventory.unroll(network, policy, stock, demand)  # policy: (stock, t) -> orders
gradient = jax.grad(lambda params: inventory.hindsight_cost(network, policy_of(params), ...))
```

Everything is linear but for the kinks of max(·, 0), so that costs are differentiable in orders, and
through whole recorded demands in whatever parameters a policy has. One period: the policy sees the
stock and orders; goods leave the suppliers; demand comes; what is left or lacking costs; what is on
its way comes one period nearer. Amounts are real numbers, not integers.

Source: Alvo et al. 2023, arXiv 2306.11246, and its reference code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step
from pgjax.envs.supply_network import SupplyNetwork

Policy = Callable[[Float[Array, "*B N L"], Int[Array, ""]], Float[Array, "*B E"]]
Rule = Callable[[SupplyNetwork, Array, Array, Array], tuple[Array, Array]]


class Trace(NamedTuple):
    """What happened, time-major.

    Attributes:
      stock: what the policy saw, `[T, *B, N, L]`.
      orders: what it ordered, `[T, *B, E]`.
      cost: of each period, over the whole network, `[T, *B]`.
    """

    stock: Float[Array, "T *B N L"]
    orders: Float[Array, "T *B E"]
    cost: Float[Array, " T *B"]


def backlog_step(
    network: SupplyNetwork,
    stock: Float[Array, "*B N L"],
    orders: Float[Array, "*B E"],
    demand: Float[Array, "*B S"],
) -> tuple[Float[Array, "*B N L"], Float[Array, "*B"]]:
    """One period in which customers wait for what is lacking.

    left = stock[0] - Σ orders out of the node - demand;
    cost = Σ_nodes h max(left, 0) + p max(-left, 0) + Σ_edges c order;
    stock'[0] = left + stock[1], stock'[j] = stock[j + 1], stock'[lead time - 1] += order.

    Args:
      network: who supplies whom, and costs.
      stock: `stock[..., n, 0]` is on hand at node n, what has just arrived included; `[..., n, j]`
        arrives j periods later. Floating.
      orders: of each edge, ≥ 0. Nothing holds them to what the supplier has: without
        `models.inventory.proportional_allocation` or the like a supplier's stock turns negative,
        and costs its `penalty`, which is 0 by default.
      demand: at each of `network.stores`.

    Returns:
      the stock of the next period; the cost, float32 or as wide as the stock.

    Raises:
      ValueError: shapes that do not fit the network, integer stock or orders.
    """
    left = _left(network, stock, orders, demand)
    return _next(network, stock, orders, left), _cost(network, orders, left)


def lost_sales_step(
    network: SupplyNetwork,
    stock: Float[Array, "*B N L"],
    orders: Float[Array, "*B E"],
    demand: Float[Array, "*B S"],
) -> tuple[Float[Array, "*B N L"], Float[Array, "*B"]]:
    """One period in which customers leave whom there is nothing for.

    As `backlog_step`, but stores go on from max(left, 0).

    Raises:
      ValueError: as there; negative demand, which would be stock out of nothing.
    """
    _nonnegative(demand)
    left = _left(network, stock, orders, demand)
    at_store = np.isin(np.arange(network.num_nodes), network.stores)
    kept = jnp.where(at_store, jnp.maximum(left, 0.0), left)
    return _next(network, stock, orders, kept), _cost(network, orders, left)


def revenue_step(
    network: SupplyNetwork,
    stock: Float[Array, "*B N L"],
    orders: Float[Array, "*B E"],
    demand: Float[Array, "*B S"],
) -> tuple[Float[Array, "*B N L"], Float[Array, "*B"]]:
    """One period of lost sales in which units sold earn p, instead of lost ones costing p.

    cost = Σ_nodes h max(left, 0) - p min(stock[0] - orders out, demand) + Σ_edges c order, which is
    that of `lost_sales_step` less Σ p demand: the same gradient, another zero.

    Raises:
      ValueError: as `lost_sales_step`.
    """
    stock, cost = lost_sales_step(network, stock, orders, demand)
    return stock, cost - jnp.sum(network.penalty[np.array(network.stores)] * demand, axis=-1)


def unroll(
    network: SupplyNetwork,
    policy: Policy,
    stock: Float[Array, "*B N L"],
    demand: Float[Array, "T *B S"],
    *,
    rule: Rule = backlog_step,
) -> tuple[Float[Array, "*B N L"], Trace]:
    """A policy on given demands, differentiable from end to end.

    Args:
      network: who supplies whom, and costs.
      policy: `(stock [*B, N, L], period) -> orders [*B, E]`; the period is an int32 scalar from 0.
      stock: before the first period.
      demand: recorded or sampled, time-major.
      rule: one period: `backlog_step`, `lost_sales_step`, `revenue_step` or one of the same form.

    Returns:
      the stock after the last period; what happened.

    Raises:
      ValueError: shapes that do not fit, integer dtypes, negative demand where sales are lost.
    """
    _checks.floating(stock=stock, demand=demand)
    if np.ndim(demand) < 2 or np.shape(demand)[0] < 1:
        raise ValueError(f"demand: expected shape [T, ..., stores], got {np.shape(demand)}")
    _fits("stock", stock, (*np.shape(demand)[1:-1], network.num_nodes, network.pipeline))
    if rule in (lost_sales_step, revenue_step):  # the scan hides the values from the rule's check
        _nonnegative(demand)

    def one(stock: Array, given: tuple[Array, Array]) -> tuple[Array, Trace]:
        period, wanted = given
        orders = policy(stock, period)
        after, cost = rule(network, stock, orders, wanted)
        return after, Trace(stock, orders, cost)

    periods = jnp.arange(np.shape(demand)[0], dtype=jnp.int32)
    return jax.lax.scan(one, jnp.asarray(stock), (periods, jnp.asarray(demand)))


def hindsight_cost(
    network: SupplyNetwork,
    policy: Policy,
    stock: Float[Array, "*B N L"],
    demand: Float[Array, "T *B S"],
    *,
    rule: Rule = backlog_step,
    ignore: int = 0,
) -> Float[Array, ""]:
    """Mean cost a store and period on recorded demands: the loss of hindsight policy optimisation.

    L = mean_{t ≥ ignore, b} cost[t, b] / number of stores. Its gradient by reverse mode is the
    pathwise gradient of the expected cost: no score function, no critic.

    Args:
      network, policy, stock, demand, rule: as of `unroll`.
      ignore: first periods that do not count, for reports; training counts all.

    Raises:
      ValueError: as `unroll`; an `ignore` that leaves no period.

    Source: HDPO, Alvo et al. 2023, arXiv 2306.11246.
    """
    _, trace = unroll(network, policy, stock, demand, rule=rule)
    _checks.in_range("ignore", ignore, 0, len(trace.cost) - 1)
    return trace.cost[ignore:].mean() / len(network.stores)


def environment(
    network: SupplyNetwork,
    reset: Callable[[PRNGKeyArray], Float[Array, "N L"]],
    demand: Callable[[PRNGKeyArray], Float[Array, " S"]],
    *,
    rule: Rule = backlog_step,
) -> Environment:
    """A network as an `Environment`, for agents that do not know its dynamics; never ends.

    State: the stock; observation: the stock, flat, f32 `[N L]`; action: orders `[E]`, of which
    negative ones count as 0; reward: minus the cost of the period. See `envs.with_time_limit`. An
    order from another node is not held to what that has: only for networks whose edges all come
    from outside, or agents whose actions are allocated.

    Args:
      network: who supplies whom, and costs.
      reset: `key -> stock` to start with.
      demand: `key -> demand` of a period.
      rule: one period, see `unroll`.
    """

    def start(key: PRNGKeyArray) -> tuple[Array, Array]:
        stock = reset(key)
        return stock, stock.reshape(-1)

    def step(key: PRNGKeyArray, stock: Array, action: Array) -> Step:
        after, cost = rule(network, stock, jnp.maximum(action, 0.0), demand(key))
        return Step(after, after.reshape(-1), -cost, jnp.bool_(False), jnp.bool_(False))

    size = network.num_nodes * network.pipeline
    return Environment(start, step, Box((size,)), Box((network.num_edges,), 0.0), "Inventory")


def normal_demand(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    mean: Float[Array, " S"],
    deviation: Float[Array, " S"],
    *,
    correlation: float = 0.0,
    lowest: float = 0.0,
) -> Float[Array, "*T S"]:
    """Normal demand of every store, equally correlated between any two, cut off below.

    mean + deviation (√ρ z₀ + √(1 - ρ) z_s), z independent standard normals, at least `lowest`.

    Args:
      key: of the noise.
      shape: in front of the stores, say (T, B).
      mean, deviation: of each store, deviation ≥ 0.
      correlation: ρ in [0, 1].
      lowest: 0, or -inf to keep returns (negative demand).

    Raises:
      ValueError: unequal shapes, a correlation out of range.
    """
    _checks.rank("mean", mean, 1)
    _checks.same_shape(mean=mean, deviation=deviation)
    _checks.in_range("correlation", correlation, 0.0, 1.0)
    common_key, own_key = jax.random.split(key)
    common = jax.random.normal(common_key, (*shape, 1))
    own = jax.random.normal(own_key, (*shape, np.shape(mean)[0]))
    noise = correlation**0.5 * common + (1.0 - correlation) ** 0.5 * own
    return jnp.maximum(jnp.asarray(mean) + jnp.asarray(deviation) * noise, lowest)


def _left(network: SupplyNetwork, stock: Any, orders: Any, demand: Any) -> Array:
    """On hand after what was sent and what was asked for, `[*B, N]`."""
    _checks.floating(stock=stock, orders=orders, demand=demand)
    if np.ndim(stock) < 2:
        raise ValueError(f"stock: expected shape [..., nodes, periods], got {np.shape(stock)}")
    front = np.shape(stock)[:-2]
    _fits("stock", stock, (*front, network.num_nodes, network.pipeline))
    _fits("orders", orders, (*front, network.num_edges))
    _fits("demand", demand, (*front, len(network.stores)))
    at = np.eye(network.num_nodes, dtype=np.float32)[list(network.stores)]
    return stock[..., 0] - orders @ network.leaving - demand @ at


def _next(network: SupplyNetwork, stock: Array, orders: Array, left: Array) -> Array:
    """The stock a period later."""
    nearer = jnp.concatenate([stock[..., 1:], jnp.zeros_like(stock[..., :1])], axis=-1)
    coming = (orders @ network.placing).reshape(stock.shape)
    return (nearer + coming).at[..., 0].add(left)


def _cost(network: SupplyNetwork, orders: Array, left: Array) -> Array:
    over = network.holding * jnp.maximum(left, 0.0) + network.penalty * jnp.maximum(-left, 0.0)
    return over.sum(-1) + jnp.sum(network.ordering * orders, axis=-1)


def _fits(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if np.shape(value) != shape:
        raise ValueError(f"{name}: expected shape {shape} by the network, got {np.shape(value)}")


def _nonnegative(demand: Any) -> None:
    if _checks.is_concrete(demand) and np.size(demand):
        lowest = float(np.asarray(demand).min())
        if lowest < 0:
            raise ValueError(f"demand: expected none below 0 where sales are lost, got {lowest:g}")
