"""What the best policies of single-store inventory problems cost.

Timing as in `envs.inventory`: an order of this period arrives `lead_time` periods later, just
before that period's demand, so that it is the demand of lead_time + 1 periods that a stock position
has to last for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int

from pgjax import _checks


def base_stock_level(
    mean: Float[Array, "*B"] | float,
    deviation: Float[Array, "*B"] | float,
    lead_time: Int[Array, "*B"] | int,
    *,
    holding: Float[Array, "*B"] | float = 1.0,
    penalty: Float[Array, "*B"] | float,
) -> Float[Array, "*B"]:
    """The best level where customers wait and demand is normal and independent.

    S* = (L + 1) μ + z σ √(L + 1), Φ(z) = p / (p + h); ordering up to it is optimal among all
    policies. All arguments broadcast.

    Args:
      mean, deviation: of one period's demand, deviation ≥ 0.
      lead_time: L ≥ 1.
      holding: h > 0 a unit and period.
      penalty: p > 0 a unit and period of waiting.

    Returns:
      f32, or f64 where an argument is.

    Raises:
      ValueError: a concrete number out of range.

    Source: the newsvendor's critical ratio; Scarf 1960 for its optimality.
    """
    _parameters(deviation, lead_time, holding, penalty)
    periods = jnp.asarray(lead_time) + 1
    z = norm.ppf(jnp.asarray(penalty) / (jnp.asarray(penalty) + holding))
    return periods * jnp.asarray(mean) + z * jnp.asarray(deviation) * jnp.sqrt(periods)


def base_stock_cost(
    level: Float[Array, "*B"] | float,
    mean: Float[Array, "*B"] | float,
    deviation: Float[Array, "*B"] | float,
    lead_time: Int[Array, "*B"] | int,
    *,
    holding: Float[Array, "*B"] | float = 1.0,
    penalty: Float[Array, "*B"] | float,
) -> Float[Array, "*B"]:
    """What any level costs a period in the long run, where customers wait and demand is normal.

    s [h z + (h + p) (φ(z) - z (1 - Φ(z)))], s = σ √(L + 1), z = (S - (L + 1) μ) / s; at S* it is
    (h + p) φ(z) s. All arguments broadcast.

    Args:
      level: S.
      mean, deviation, lead_time, holding, penalty: as of `base_stock_level`, deviation > 0.

    Raises:
      ValueError: a concrete number out of range.
    """
    _parameters(deviation, lead_time, holding, penalty)
    periods = jnp.asarray(lead_time) + 1
    scale = jnp.asarray(deviation) * jnp.sqrt(periods)
    z = (jnp.asarray(level) - periods * jnp.asarray(mean)) / scale
    lacking = norm.pdf(z) - z * norm.sf(z)
    return scale * (jnp.asarray(holding) * z + (jnp.asarray(holding) + penalty) * lacking)


class LostSalesOptimum(NamedTuple):
    """The best policy among all where unserved customers leave, whole units.

    Attributes:
      cost: a period in the long run, f32.
      orders: int32 `[X + 1, (Q + 1,) * (L - 1)]`: what to order by the stock on hand and what
        arrives in 1, ..., L - 1 periods.
      span: within which `cost` is known; above the tolerance the iterations did not suffice.
    """

    cost: Float[Array, ""]
    orders: Int[Array, ...]
    span: Float[Array, ""]


def lost_sales_optimum(
    probabilities: Float[Array, " D"],
    *,
    lead_time: int,
    holding: float = 1.0,
    penalty: float,
    max_stock: int = 40,
    max_order: int = 15,
    tolerance: float = 5e-4,
    max_iterations: int = 1000,
) -> LostSalesOptimum:
    """By relative value iteration over everything on hand and on its way.

    V(x) ← E[h (x₀ - D)⁺ + p (D - x₀)⁺] + min_q E V((x₀ - D)⁺ + x₁, x₂, ..., q), less its value at
    0; the change of one iteration brackets the average cost.

    Args:
      probabilities: of a demand of 0, 1, ..., D - 1 units, sum 1.
      lead_time: L ≥ 1; states grow as (max_order + 1)^(L - 1), so up to 4 or so.
      holding, penalty: h ≥ 0 and p > 0, of a unit left, of a unit of demand lost.
      max_stock: X; what would exceed it is lost at no cost, so let it be well above the need.
      max_order: Q.
      tolerance: on the cost.
      max_iterations: after which it stops anyway.

    Raises:
      ValueError: a number out of range, probabilities that are concrete and do not sum to 1.

    Source: relative value iteration, White 1963; Zipkin 2008 for this problem and its table.
    """
    _checks.rank("probabilities", probabilities, 1)
    _checks.floating(probabilities=probabilities)
    _parameters(0.0, lead_time, holding, penalty)
    _checks.in_range("max_stock", max_stock, 1)
    _checks.in_range("max_order", max_order, 1)
    if _checks.is_concrete(probabilities):
        total = float(np.asarray(probabilities).sum())
        if np.asarray(probabilities).min() < 0 or not abs(total - 1.0) < 1e-3:
            raise ValueError(
                f"probabilities: expected numbers from 0 with sum 1, got the sum {total:g}"
            )
    chances = jnp.asarray(probabilities)
    stock, demand = np.arange(max_stock + 1), np.arange(len(chances))
    left = np.maximum(stock[:, None] - demand, 0)
    lost = np.maximum(demand - stock[:, None], 0)
    now = (holding * left + penalty * lost) @ chances
    remains = jnp.stack([(left == r) @ chances for r in stock], axis=1)
    arrives = np.minimum(stock[:, None] + np.arange(max_order + 1), max_stock)
    now = now.reshape(-1, *(1,) * (lead_time - 1))

    def with_order(value: Array) -> Array:
        """Cost to come by state and order: the order is the last axis."""
        return jnp.tensordot(remains, value[arrives], axes=1)

    def improve(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        value, _, _, count = carry
        after = now + with_order(value).min(-1)
        change = after - value
        low, high = change.min(), change.max()
        return after - after.ravel()[0], (low + high) / 2, high - low, count + 1

    def going(carry: tuple[Array, Array, Array, Array]) -> Array:
        return (carry[2] > tolerance) & (carry[3] < max_iterations)

    shape = (max_stock + 1, *(max_order + 1,) * (lead_time - 1))
    zero = jnp.zeros((), now.dtype)
    start = (jnp.zeros(shape, now.dtype), zero, zero + jnp.inf, jnp.int32(0))
    value, cost, span, _ = jax.lax.while_loop(going, improve, start)
    orders = with_order(value).argmin(-1).astype(jnp.int32)
    return LostSalesOptimum(cost, orders, span)


def _parameters(deviation: Any, lead_time: Any, holding: Any, penalty: Any) -> None:
    for name, value, low, open_ in (
        ("deviation", deviation, 0.0, False),
        ("lead_time", lead_time, 1.0, False),
        ("holding", holding, 0.0, False),
        ("penalty", penalty, 0.0, True),
    ):
        if _checks.is_concrete(value) and np.size(value):
            _checks.in_range(name, np.asarray(value).min(), low, low_open=open_)
