"""Does differentiating a simulator beat the score function where the best policy is known?

One store, normal demand (mean 5, deviation 1.6), lead time 4, holding cost 1, penalty 9, customers
wait. The best policy orders up to 29.585 and costs 6.279 a period, in closed form.

1. The level is learned by Adam through rollouts of 50 periods: right if it ends within 0.1, its
   closed-form cost within 0.1% of the optimum, for every seed.
2. A perceptron (3 x 32) with unit normal noise on its orders has one smoothed objective with two
   unbiased gradients: pathwise, and score function (cost to come less the mean of the other
   scenarios). On the same batches their means must agree, with a cosine of at least 0.999 after
   taking out of it what noise alone explains, and the pathwise variance, relative to the squared
   mean, be at least 20 times smaller. This is the decisive part.
3. The perceptron is trained by both, at the same three learning rates. The claim is robustness, not
   a large gap: over all rates and seeds the worst run and the mean of the pathwise gradient are
   below those of the score function. The pathwise runs train without noise, as published; all are
   judged without it.

Initial weights are orthogonal, with a small last layer; rates fall to 0 along a cosine in part 3.

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

MEAN, DEVIATION, LEAD_TIME, PENALTY = 5.0, 1.6, 4, 9.0
DEMAND: dict[str, Any] = {"mean": MEAN, "deviation": DEVIATION, "lead_time": LEAD_TIME}
Loss = Callable[[Any, PRNGKeyArray], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Config:
    """How much to simulate."""

    periods: int = 50
    """Of a training rollout."""
    scenarios: int = 256
    """Demand traces of a batch, for the level and for the variances."""
    level_steps: int = 300
    """Adam steps on the level, at rate 0.5."""
    gradients: int = 100
    """Batches to compare the two gradients on, for each seed's network."""
    steps: int = 600
    """Adam steps of a perceptron."""
    training_scenarios: int = 128
    """Demand traces of a batch for the perceptrons."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Of the perceptrons, for both gradients."""
    seeds: int = 3
    """Networks, and independent runs at each rate."""
    out: pathlib.Path = pathlib.Path("runs/hdpo_base_stock")
    """Directory for results."""
    quick: bool = False
    """Short rollouts, few steps."""


def network() -> supply_network.SupplyNetwork:
    """The store."""
    return supply_network.single_store(LEAD_TIME, penalty=PENALTY)


def sample(key: PRNGKeyArray, periods: int, scenarios: int) -> tuple[Array, Array]:
    """Stock to start with and demand."""
    stock_key, demand_key = jax.random.split(key)
    mean = jnp.array([MEAN])
    stock = inventory_runs.first_stock(stock_key, network(), mean, scenarios)
    demand = inventory.normal_demand(demand_key, (periods, scenarios), mean, jnp.array([DEVIATION]))
    return stock, demand


def level_loss(config: Config) -> Loss:
    """Of the order-up-to level `[1]`."""

    def loss(level: Array, key: PRNGKeyArray) -> Array:
        stock, demand = sample(key, config.periods, config.scenarios)
        store = network()
        return inventory.hindsight_cost(
            store, lambda stock, t: policies.base_stock(store, level, stock), stock, demand
        )

    return loss


def pathwise(config: Config, scenarios: int, *, noise: float) -> Loss:
    """Of the perceptron, by hindsight."""
    store = network()
    policy = policies.store_mlp(store)

    def loss(params: Any, key: PRNGKeyArray) -> Array:
        sample_key, noise_key = jax.random.split(key)
        stock, demand = sample(sample_key, config.periods, scenarios)
        shaken = noise * jax.random.normal(noise_key, demand.shape)
        return inventory.hindsight_cost(
            store, inventory_runs.noisy(policy, params, shaken), stock, demand
        )

    return loss


def score_function(config: Config, scenarios: int) -> Loss:
    """Of the perceptron, by REINFORCE, on the batches of `pathwise`."""
    store = network()
    policy = policies.store_mlp(store)

    def loss(params: Any, key: PRNGKeyArray) -> Array:
        sample_key, noise_key = jax.random.split(key)
        stock, demand = sample(sample_key, config.periods, scenarios)
        noise = jax.random.normal(noise_key, demand.shape)
        return inventory_runs.score_function_loss(store, policy, params, stock, demand, noise)

    return loss


def moments(loss: Loss, params: Any, keys: PRNGKeyArray) -> tuple[Array, Array, Array]:
    """Mean of the gradients `[D]`, their variance, the squared norm of the true mean, unbiased."""

    def one(key: PRNGKeyArray) -> Array:
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(params, key))])

    gradients = jax.lax.map(one, keys)
    mean = gradients.mean(0)
    variance = jnp.sum(jnp.square(gradients - mean)) / (len(keys) - 1)
    return mean, variance, jnp.sum(jnp.square(mean)) - variance / len(keys)


def compared(config: Config, seed: int) -> dict[str, float]:
    """The two gradients of one perceptron at its start."""
    params = policies.store_mlp(network()).init(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(1000 + seed), config.gradients)

    @jax.jit
    def both(params: Any, keys: PRNGKeyArray) -> Any:
        a = moments(pathwise(config, config.scenarios, noise=1.0), params, keys)
        # Other batches, so that the two errors are independent.
        others = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        b = moments(score_function(config, config.scenarios), params, others)
        return a, b, jnp.vdot(a[0], b[0])

    (_, path, path_norm), (_, score, score_norm), product = jax.device_get(both(params, keys))
    return {
        "cosine": float(product / np.sqrt(path_norm * score_norm)),
        "pathwise": float(path / path_norm),
        "score": float(score / score_norm),
        "ratio": float((score / score_norm) / (path / path_norm)),
    }


def judged(params: Any, *, quick: bool) -> Float[np.ndarray, " R"]:
    """Long-run cost of each perceptron, without noise, over the optimum's on the same demand."""
    store = network()
    policy = policies.store_mlp(store)
    stock, demand = sample(jax.random.key(77), *((60, 32) if quick else (300, 512)))
    best = closed_forms.base_stock_level(**DEMAND, penalty=PENALTY)[None]

    def cost(order: Any) -> Array:
        return inventory.hindsight_cost(store, order, stock, demand, ignore=len(demand) // 3)

    @jax.jit
    def all_costs(params: Any) -> tuple[Array, Array]:
        costs = jax.lax.map(lambda own: cost(inventory_runs.fixed(policy, own)), params)
        return costs, cost(lambda stock, t: policies.base_stock(store, best, stock))

    costs, optimum = all_costs(params)
    return np.asarray(costs / optimum)


def run(config: Config) -> reproduction.Findings:
    """All three parts."""
    if config.quick:
        config = dataclasses.replace(
            config, periods=12, scenarios=32, level_steps=5, gradients=3, steps=3
        )
    best = float(closed_forms.base_stock_level(**DEMAND, penalty=PENALTY))
    optimum = float(closed_forms.base_stock_cost(best, **DEMAND, penalty=PENALTY))
    to_level = level_loss(config)
    levels, losses = inventory_runs.fit(
        lambda key: jnp.array([MEAN]) + jax.random.uniform(key, (1,)),
        lambda level, key, seed: to_level(level, key),
        learning_rates=jnp.full(config.seeds, 0.5),
        seeds=jnp.arange(config.seeds),
        steps=config.level_steps,
        decay=False,
    )
    level = np.asarray(levels)[:, 0]
    cost = np.asarray(closed_forms.base_stock_cost(jnp.asarray(level), **DEMAND, penalty=PENALTY))
    found = [compared(config, seed) for seed in reproduction.track(range(config.seeds), "variance")]
    columns = {name: np.array([one[name] for one in found]) for name in found[0]}
    trained, curves = perceptrons(config)
    shown = {"rel. variance": "score", "times": "ratio", "cosine": "cosine"}
    table: dict[str, Any] = {
        "level": {"level": level, "cost": cost},
        "optimum": {"level": np.array([best]), "cost": np.array([optimum])},
        "pathwise": {"rel. variance": columns["pathwise"]},
        "score": {name: columns[old] for name, old in shown.items()},
    }
    for name, ratios in trained.items():
        for i, rate in enumerate(config.learning_rates):
            table[f"{name} {rate:g}"] = {"cost": ratios[i] * optimum}
    by_path, by_score = trained["pathwise"], trained["score"]
    error, excess = np.abs(level - best).max(), cost.max() / optimum - 1
    claims = [
        reproduction.Claim(
            "the level ends within 0.1 of the best one and 0.1% of its cost, for every seed",
            bool(error <= 0.1 and excess <= 1e-3),
            f"{error:.3f}, {100 * excess:.3f}%",
        ),
        reproduction.above("the two gradients have one mean (cosine)", columns["cosine"], 0.999),
        reproduction.Claim(
            "the score function's relative variance is at least 20 times larger, for every seed",
            bool(columns["ratio"].min() >= 20),
            f"{columns['ratio'].min():.0f} to {columns['ratio'].max():.0f} times",
        ),
        reproduction.Claim(
            "trained at all rates, the pathwise gradient has the lower mean cost and worst run",
            bool(by_path.mean() < by_score.mean() and by_path.max() < by_score.max()),
            f"of the optimum's cost {by_path.mean():.3f} (worst {by_path.max():.3f}), score "
            f"function {by_score.mean():.3f} (worst {by_score.max():.3f})",
        ),
    ]
    steps = np.arange(config.level_steps)
    return reproduction.Findings(
        title="A simulator's derivative against the score function",
        table=table,
        claims=claims,
        panels={
            "training cost of a level": {"pathwise": reproduction.band(steps, np.asarray(losses))},
            "training cost of perceptrons, rate by rate (pathwise)": curves,
        },
    )


def perceptrons(config: Config) -> tuple[dict[str, Float[np.ndarray, "K S"]], dict[str, Any]]:
    """Cost over the optimum's by learning rate and seed; training curves of the pathwise runs."""
    rates = np.repeat(config.learning_rates, config.seeds)
    seeds = np.tile(np.arange(config.seeds), len(config.learning_rates))
    init = policies.store_mlp(network()).init
    losses = {
        "pathwise": pathwise(config, config.training_scenarios, noise=0.0),
        "score": score_function(config, config.training_scenarios),
    }
    found, curves = {}, {}
    for name, loss in reproduction.track(losses.items(), "perceptrons"):

        def own(params: Any, key: PRNGKeyArray, seed: Array, loss: Loss = loss) -> Array:
            return loss(params, key)

        params, history = inventory_runs.fit(
            init,
            own,
            learning_rates=jnp.asarray(rates, jnp.float32),
            seeds=jnp.asarray(seeds),
            steps=config.steps,
        )
        shape = (len(config.learning_rates), config.seeds)
        found[name] = judged(params, quick=config.quick).reshape(shape)
        if name == "pathwise":
            every = np.minimum(np.asarray(history).reshape(*shape, -1), 50.0)
            for i, rate in enumerate(config.learning_rates):
                curves[f"rate {rate:g}"] = reproduction.band(np.arange(config.steps), every[i])
    return found, curves


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "hdpo_base_stock", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
