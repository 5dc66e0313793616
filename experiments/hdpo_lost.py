"""Does a perceptron trained in hindsight find near-optimal orders where sales are lost?

One store, Poisson demand (mean 5), lead times 1 and 2, holding cost 1, penalty 9, customers leave.
No simple rule is optimal; the optimum comes from value iteration over everything on hand and on its
way (5.438 and 6.094 a period). A perceptron (3 x 32), a base-stock level and a capped base stock
are trained by differentiating the simulator on the same sampled demands, with real-valued orders;
all are judged on long demand traces with orders rounded to whole units. Near-optimal is taken as
within 3% of the optimum on average over seeds: the paper reports gaps, but none of its numbers was
available, so this threshold is ours.

Adam at the reference code's rates (0.003, 0.5, 1.0), which fall to 0 along a cosine here.

Source: HDPO, Alvo et al. 2023, arXiv 2306.11246.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from experiments.shared import inventory_runs, reproduction
from pgjax.envs import inventory, supply_network
from pgjax.models import inventory as policies
from pgjax.values import inventory as closed_forms

MEAN, PENALTY = 5.0, 9.0


@dataclasses.dataclass(frozen=True)
class Config:
    """How much to simulate."""

    lead_times: tuple[int, ...] = (1, 2)
    """Of the store's orders."""
    periods: int = 50
    """Of a training rollout."""
    scenarios: int = 128
    """Demand traces of a batch."""
    steps: int = 1000
    """Adam steps."""
    test_scenarios: int = 1024
    """Demand traces to judge on, of 400 periods of which 100 are ignored."""
    seeds: int = 3
    """Independent runs."""
    out: pathlib.Path = pathlib.Path("runs/hdpo_lost")
    """Directory for results."""
    quick: bool = False
    """Three steps on short rollouts."""


def sample(
    key: PRNGKeyArray, store: supply_network.SupplyNetwork, periods: int, scenarios: int
) -> tuple[Array, Array]:
    """Stock to start with and demand."""
    stock_key, demand_key = jax.random.split(key)
    stock = inventory_runs.first_stock(stock_key, store, jnp.array([MEAN]), scenarios)
    demand = jax.random.poisson(demand_key, MEAN, (periods, scenarios, 1)).astype(jnp.float32)
    return stock, demand


def contestants(
    store: supply_network.SupplyNetwork,
) -> dict[str, tuple[policies.OrderPolicy, float]]:
    """Policies and their learning rates. Levels start between one and two periods' demand."""

    def start(size: int) -> Callable[[PRNGKeyArray], Any]:
        return lambda key: MEAN * (1.0 + jax.random.uniform(key, (size,)))

    def level(params: Array, stock: Array) -> Array:
        return policies.base_stock(store, params, stock)

    def capped(params: Array, stock: Array) -> Array:
        return policies.capped_base_stock(store, params[:1], params[1:], stock)

    return {
        "perceptron": (policies.store_mlp(store), 3e-3),
        "base stock": (policies.OrderPolicy(start(1), level), 0.5),
        "capped": (policies.OrderPolicy(start(2), capped), 1.0),
    }


def optimum(lead_time: int) -> Float[Array, ""]:
    """Of all policies with whole orders."""
    counts = jnp.arange(31)
    chances = jax.scipy.stats.poisson.pmf(counts, MEAN)
    return closed_forms.lost_sales_optimum(
        chances / chances.sum(), lead_time=lead_time, penalty=PENALTY
    ).cost


def trained(config: Config, lead_time: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cost over the optimum's by policy and seed, rounded orders and not; training curves."""
    store = supply_network.single_store(lead_time, penalty=PENALTY)
    stock, demand = sample(
        jax.random.key(77), store, 40 if config.quick else 400, config.test_scenarios
    )
    best = float(optimum(lead_time))
    found, curves = {}, {}
    rule = inventory.lost_sales_step
    for name, (policy, rate) in contestants(store).items():

        def cost(
            params: Any, key: PRNGKeyArray, seed: Array, policy: policies.OrderPolicy = policy
        ) -> Array:
            stock, demand = sample(key, store, config.periods, config.scenarios)
            order = inventory_runs.fixed(policy, params)
            return inventory.hindsight_cost(store, order, stock, demand, rule=rule)

        params, losses = inventory_runs.fit(
            policy.init,
            cost,
            learning_rates=jnp.full(config.seeds, rate),
            seeds=jnp.arange(config.seeds),
            steps=config.steps,
        )

        @jax.jit
        def judged(params: Any, policy: policies.OrderPolicy = policy) -> Array:
            def one(own: Any) -> Array:
                order = inventory_runs.fixed(policy, own)
                whole = lambda stock, t: jnp.round(order(stock, t))  # noqa: E731
                return jnp.stack(
                    [
                        inventory.hindsight_cost(
                            store, how, stock, demand, rule=rule, ignore=len(demand) // 4
                        )
                        for how in (whole, order)
                    ]
                )

            return jax.lax.map(one, params)

        costs = np.asarray(judged(params))
        found[name] = {
            "cost": costs[:, 0],
            "% above": 100 * (costs[:, 0] / best - 1),
            "not rounded": costs[:, 1],
        }
        curves[name] = reproduction.band(
            np.arange(config.steps), np.minimum(np.asarray(losses), 3 * best)
        )
    return found, curves


def run(config: Config) -> reproduction.Findings:
    """All lead times."""
    if config.quick:
        config = dataclasses.replace(
            config, periods=10, scenarios=16, steps=3, test_scenarios=16, lead_times=(1,)
        )
    table: dict[str, Any] = {}
    panels: dict[str, Any] = {}
    claims: list[reproduction.Claim] = []
    for lead_time in reproduction.track(config.lead_times, "lead times"):
        found, curves = trained(config, lead_time)
        table |= {f"L={lead_time} {name}": columns for name, columns in found.items()}
        table[f"L={lead_time} optimum"] = {"cost": np.array([float(optimum(lead_time))])}
        panels[f"training cost, lead time {lead_time}"] = curves
        above = found["perceptron"]["% above"]
        claims.append(
            reproduction.Claim(
                f"lead time {lead_time}: the perceptron is within 3% of the optimum on average",
                bool(above.mean() <= 3.0),
                f"{above.mean():.2f}% above, by seed {', '.join(f'{x:.2f}' for x in above)}",
            )
        )
    return reproduction.Findings(
        title="Lost sales, trained in hindsight", table=table, claims=claims, panels=panels
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("hdpo_lost", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
