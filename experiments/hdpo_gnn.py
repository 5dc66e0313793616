"""Does a policy that knows the supply graph need fewer recorded scenarios than one that does not?

One warehouse and five stores with different demand (means 2.5 to 7.5, coefficients of variation
0.25 to 0.5, correlation 0.5), costs and lead times; sales are lost. All policies are trained in
hindsight on the same 64 recorded demand traces of 30 periods, over and over, by Adam on batches of
16, at the same two learning rates of which each seed's is chosen on other traces, and are judged on
long new ones. A seed is another set of traces and other initial weights; the network is the same.

The claim: the graph policy has the lower test cost, on every seed. The perceptron, which comes to
fit its traces too well, may be trained for a quarter to twice as many steps instead, chosen in the
same way, in place of early stopping; it is trained on 1024 traces as well, to tell what part of the
gap is lack of data. Base-stock levels (six numbers, proportional allocation) say what is easy to
reach.

The reference code trains on 50 periods, its perceptron has layers of 512 (128 here).

Source: HDPO, Alvo et al. 2023, arXiv 2306.11246.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.shared import inventory_runs, reproduction
from pgjax.envs import inventory, supply_network
from pgjax.models import inventory as policies
from pgjax.models import supply_graph

LEAD_TIMES = (2, 3, 2, 3, 2)
CORRELATION = 0.5
CURVE = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """How much to train and on what."""

    traces: int = 64
    """Recorded demand traces to train on."""
    more_traces: int = 1024
    """What the perceptron is given as well."""
    periods: int = 30
    """Of a trace."""
    batch: int = 16
    """Traces of an Adam step."""
    steps: int = 300
    """Adam steps."""
    perceptron_steps: tuple[int, ...] = (75, 150, 300, 600)
    """Of the perceptron, to choose from."""
    learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """To choose from, for each policy and seed; a hundred times that for base-stock levels."""
    width: int = 128
    """Of the perceptron's three hidden layers."""
    seeds: int = 3
    """Independent runs."""
    out: pathlib.Path = pathlib.Path("runs/hdpo_gnn")
    """Directory for results."""
    quick: bool = False
    """Two steps on short traces, small networks."""


class Stores(NamedTuple):
    """The demand of every store `[5]`."""

    mean: Float[Array, " S"]
    deviation: Float[Array, " S"]


class Contestant(NamedTuple):
    """A policy and how it is trained."""

    policy: policies.OrderPolicy
    traces: int
    steps: tuple[int, ...]
    rate_factor: float = 1.0


def problem() -> tuple[supply_network.SupplyNetwork, Stores]:
    """The network, drawn once from the ranges of the reference code."""
    keys = jax.random.split(jax.random.key(2023), 4)
    low, high = [2.5, 0.25, 0.7, 6.3], [7.5, 0.5, 1.3, 11.7]
    mean, variation, holding, penalty = (
        jax.random.uniform(key, (len(LEAD_TIMES),), minval=a, maxval=b)
        for key, a, b in zip(keys, low, high, strict=True)
    )
    network = supply_network.warehouse_and_stores(LEAD_TIMES, holding=holding, penalty=penalty)
    return network, Stores(mean, variation * mean)


def sample(key: PRNGKeyArray, periods: int, traces: int) -> tuple[Array, Array]:
    """Stock to start with and demand."""
    network, stores = problem()
    stock_key, demand_key = jax.random.split(key)
    stock = inventory_runs.first_stock(stock_key, network, stores.mean, traces)
    demand = inventory.normal_demand(
        demand_key, (periods, traces), *stores, correlation=CORRELATION
    )
    return stock, demand


def contestants(config: Config) -> dict[str, Contestant]:
    """All that are compared."""
    network, stores = problem()
    total = float(stores.mean.sum())
    statics = jnp.stack([network.holding, network.penalty], axis=-1)
    demand = jnp.pad(jnp.stack(stores, axis=-1), ((1, 0), (0, 0)))
    features = jnp.concatenate([statics, demand], axis=-1)
    small = {"hidden": (8,), "width": 8} if config.quick else {}
    graph = supply_graph.graph_policy(network, features=features, **small)  # type: ignore[arg-type]
    perceptron = policies.network_mlp(network, largest_order=4 * total, hidden=(config.width,) * 3)
    lead = jnp.array([3.0, *LEAD_TIMES]) + 1.0
    levels = lead * jnp.concatenate([jnp.array([total]), stores.mean])

    def start(key: PRNGKeyArray) -> Array:
        return levels * jax.random.uniform(key, levels.shape, minval=0.8, maxval=1.2)

    base_stock = policies.OrderPolicy(
        start, lambda params, stock: policies.base_stock(network, params, stock)
    )
    steps, traces = (config.steps,), config.traces
    return {
        "graph": Contestant(graph, traces, steps),
        "perceptron": Contestant(perceptron, traces, config.perceptron_steps),
        "more data": Contestant(perceptron, config.more_traces, config.perceptron_steps),
        "base stock": Contestant(base_stock, traces, steps, 100.0),
    }


def cost(
    policy: policies.OrderPolicy, params: Any, stock: Array, demand: Array, ignore: int = 0
) -> Float[Array, ""]:
    """A store and period."""
    return inventory.hindsight_cost(
        problem()[0],
        inventory_runs.fixed(policy, params),
        stock,
        demand,
        rule=inventory.lost_sales_step,
        ignore=ignore,
    )


def learn(
    config: Config, one: Contestant, steps: int
) -> tuple[dict[str, Float[np.ndarray, "R S"]], Float[np.ndarray, "R S K"]]:
    """Costs on the traces trained on, other traces and long ones, and training curves."""

    def recorded(seed: Int[Array, ""]) -> tuple[Array, Array]:
        return sample(jax.random.key(seed + 500), config.periods, one.traces)

    def loss(params: Any, key: PRNGKeyArray, seed: Int[Array, ""]) -> Array:
        stock, demand = recorded(seed)
        rows = jax.random.choice(key, one.traces, (min(config.batch, one.traces),), replace=False)
        return cost(one.policy, params, stock[rows], demand[:, rows])

    rates = np.repeat(config.learning_rates, config.seeds) * one.rate_factor
    seeds = jnp.asarray(np.tile(np.arange(config.seeds), len(config.learning_rates)))
    params, losses = inventory_runs.fit(
        one.policy.init,
        loss,
        learning_rates=jnp.asarray(rates, jnp.float32),
        seeds=seeds,
        steps=steps,
        clip=1.0,
    )
    held_out = sample(jax.random.key(88), config.periods, 128)
    new = sample(jax.random.key(99), *((20, 8) if config.quick else (200, 256)))

    @jax.jit
    def judged(params: Any) -> dict[str, Array]:
        def of(given: tuple[Any, Array]) -> dict[str, Array]:
            own, seed = given
            return {
                "trained on": cost(one.policy, own, *recorded(seed)),
                "held out": cost(one.policy, own, *held_out),
                "test cost": cost(one.policy, own, *new, ignore=len(new[1]) // 2),
            }

        return jax.lax.map(of, (params, seeds))

    shape = (len(config.learning_rates), config.seeds)
    found = {name: np.asarray(x).reshape(shape) for name, x in judged(params).items()}
    return found, np.asarray(losses).reshape(*shape, -1)


def learn_and_choose(
    config: Config, one: Contestant
) -> tuple[dict[str, Float[np.ndarray, " S"]], Float[np.ndarray, "S K"]]:
    """Of all rates and numbers of steps, each seed's best by the held-out cost."""
    tried: list[dict[str, Any]] = []
    curves = []
    for steps in one.steps:
        found, losses = learn(config, one, steps)
        rates = np.array(config.learning_rates)[:, None] * one.rate_factor
        found["rate"] = np.broadcast_to(rates, losses.shape[:2])
        found["steps"] = np.full(losses.shape[:2], steps)
        tried.append(found)
        shown = np.linspace(0, steps - 1, CURVE).astype(int)
        curves.append(np.minimum(losses[..., shown], 40.0))
    every = {column: np.concatenate([x[column] for x in tried]) for column in tried[0]}
    best, seeds = np.argmin(every["held out"], axis=0), np.arange(config.seeds)
    return {name: x[best, seeds] for name, x in every.items()}, np.concatenate(curves)[best, seeds]


def run(config: Config) -> reproduction.Findings:
    """All policies; the learning rate of each seed by the held-out cost."""
    if config.quick:
        config = dataclasses.replace(
            config,
            traces=8,
            more_traces=16,
            periods=8,
            batch=4,
            steps=2,
            perceptron_steps=(2, 3),
            width=8,
        )
    table: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, one in reproduction.track(contestants(config).items(), "policies"):
        found, chosen = learn_and_choose(config, one)
        table[name] = found
        curves[name] = reproduction.band(np.linspace(0.0, 1.0, CURVE), chosen)
    graph, other = table["graph"]["test cost"], table["perceptron"]["test cost"]
    claim = reproduction.Claim(
        f"trained on {config.traces} traces, the graph policy beats the perceptron on every seed",
        bool((graph < other).all()),
        f"{graph.mean():.2f} against {other.mean():.2f}, ratios "
        f"{', '.join(f'{x:.3f}' for x in graph / other)}",
    )
    return reproduction.Findings(
        title="A warehouse and five stores, trained on few demand traces",
        table=table,
        claims=[claim],
        panels={"training cost": curves},
        x_label="part of the training",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("hdpo_gnn", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
