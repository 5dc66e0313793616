"""Does a penalty that the Bellman equation bounds raise the rank of features, and no further?

First a random walk on a grid of 10 x 10 cells, each with a reward drawn from N(0, 1), γ = .9: the
values, which are known, by temporal differences from the two coordinates, φ(s)ᵀw + c with 32
features, an averaged copy in the targets, 64 transitions a step, Adam. No penalty; BEER; and a
penalty on every likeness of consecutive features, the mean of cos²; both at the same four weights,
on the same grids. Then Pendulum-v1: DDPG, and DDPG with BEER at its authors' weight of .001.

Exits 0 if

* on the grid BEER raises the effective rank by two standard errors at one of the weights;
* at the largest weight its rank lies between that without a penalty and that with the penalty on
  every likeness, by two standard errors from the latter;
* at every weight its value error is within a standard error of the least of the three;
* on the pendulum its return is not below DDPG's by more than a standard error.

Differences are paired by seed. The effective rank is asked of in place of the number of singular
values above .01, which is shown beside it and is near its ceiling of 32 without any penalty.

Source: BEER, He et al. 2024, arXiv 2404.12754; the grid and its numbers are chosen here.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import pgjax as pg
from experiments.shared import greedy, reproduction
from pgjax import agents, diagnostics, envs, values
from pgjax.diagnostics import spectra
from pgjax.envs import control
from pgjax.models import mlp

SIDE, GAMMA, TAU = 10, 0.9, 0.01
NONE, BEER, EVERY = "none", "BEER", "mean cos²"
LENGTH, EPISODES, WORLDS = 200, 20, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """A grid and a pendulum."""

    seeds: int = 20
    """Grids."""
    steps: int = 3_000
    """Gradient steps on the grid."""
    weights: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Of both penalties, growing."""
    pendulum_seeds: int = 10
    """Runs of each agent on the pendulum."""
    pendulum_steps: int = 20_000
    """Environment steps of each, four a gradient step."""
    out: pathlib.Path = pathlib.Path("runs/beer_rank")
    """Directory for results."""
    quick: bool = False
    """A few steps on three seeds."""


class Grid(NamedTuple):
    """Where a cell's four moves lead, `[100, 4]`; coordinates in [-1, 1], `[100, 2]`."""

    following: Int[np.ndarray, "S 4"]
    coordinates: Float[np.ndarray, "S 2"]


def grid() -> Grid:
    """Moves against the border stay."""
    cells = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1).reshape(
        -1, 2
    )
    moves = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
    after = np.clip(cells[:, None] + moves, 0, SIDE - 1)
    return Grid(after @ np.array([SIDE, 1]), (2 * cells / (SIDE - 1) - 1).astype(np.float32))


def true_values(rewards: Array) -> Float[Array, " S"]:
    """(1 - γP)⁻¹ r of the random walk."""
    chance = np.zeros((SIDE**2, SIDE**2), np.float32)
    np.add.at(chance, (np.arange(SIDE**2)[:, None], grid().following), 0.25)
    return jnp.linalg.solve(jnp.eye(SIDE**2) - GAMMA * chance, rewards)


def features(params: Any, x: Array) -> Array:
    """The last hidden layer."""
    return jax.nn.relu(mlp.apply(params[:-1], x, activation=jax.nn.relu))


def evaluated(steps: int, seed: Array, bounded: Array, unbounded: Array) -> dict[str, Array]:
    """Ranks and value error after temporal differences with weights of the two penalties."""
    world = grid()
    reward_key, net_key, key = jax.random.split(jax.random.key(seed), 3)
    rewards = jax.random.normal(reward_key, (SIDE**2,))
    coordinates, following = jnp.asarray(world.coordinates), jnp.asarray(world.following)
    params = mlp.init(net_key, (2, 32, 32, 1))
    adam = optax.adam(3e-3)

    def loss(params: Any, copy: Any, key: Array) -> Array:
        cell_key, move_key = jax.random.split(key)
        cell = jax.random.randint(cell_key, (64,), 0, SIDE**2)
        after = following[cell, jax.random.randint(move_key, (64,), 0, 4)]
        x, y = coordinates[cell], coordinates[after]
        phi, later = features(params, x), features(copy, y)
        head, kept = params[-1], copy[-1]
        value = (phi @ head["kernel"] + head["bias"])[:, 0]
        target = rewards[cell] + GAMMA * (later @ kept["kernel"] + kept["bias"])[:, 0]
        bound = values.beer_bound(
            phi,
            features(params, y),
            rewards[cell],
            head_square_norm=jnp.sum(jnp.square(head["kernel"])),
            discount=GAMMA,
            scale_features=later,
        )
        cosine = values.beer_penalty(phi, later, -jnp.ones(64)) - 1.0
        likeness = bounded * values.beer_penalty(phi, later, bound) + unbounded * cosine**2
        return (values.value_error(value, target) + 0.5 * likeness).mean()

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, copy, state = carry
        updates, state = adam.update(jax.grad(loss)(params, copy, key), state)
        params = optax.apply_updates(params, updates)
        return (params, optax.incremental_update(params, copy, TAU), state), None

    start = params, params, adam.init(params)
    (params, _, _), _ = jax.lax.scan(step, start, jax.random.split(key, steps))
    found = mlp.apply(params, coordinates, activation=jax.nn.relu)[:, 0]
    phi = features(params, coordinates)
    truth = true_values(rewards)
    return {
        "effective rank": spectra.effective_rank(phi),
        "values above .01": diagnostics.representation_rank(phi).astype(jnp.float32),
        "value error": jnp.sqrt(jnp.mean(jnp.square(found - truth)) / jnp.var(truth)),
    }


def on_the_grid(config: Config) -> dict[tuple[str, float], dict[str, Any]]:
    """Every way's numbers, by its name and weight."""
    names = [(NONE, 0.0), *((name, x) for name in (BEER, EVERY) for x in config.weights)]
    arms = [(x * (name == BEER), x * (name == EVERY)) for name, x in names]
    many = jax.vmap(
        jax.vmap(lambda *given: evaluated(config.steps, *given), (0, None, None)), (None, 0, 0)
    )
    found = jax.jit(many)(jnp.arange(config.seeds), *jnp.asarray(arms).T)
    return {
        name: {column: np.asarray(x[i]) for column, x in found.items()}
        for i, name in enumerate(names)
    }


def on_the_pendulum(config: Config, name: str) -> dict[str, Float[np.ndarray, " S"]]:
    """Greedy return and ranks of the critic's features after training."""
    env = envs.with_scaled_actions(control.pendulum())
    hidden = (8,) if config.quick else (64, 64)
    critic = agents.linear_head_critic(env, hidden=hidden)
    agent = agents.beer(
        env,
        agents.deterministic_policy(env, hidden=hidden),
        critic,
        beta=1e-3 if name == BEER else 0.0,
        num_envs=WORLDS,
        batch_size=64,
        capacity=config.pendulum_steps + 1_000,
        learning_rate=1e-3,
    )
    updates = config.pendulum_steps // agent.steps

    def one(seed: Array) -> dict[str, Array]:
        run_key, test_key = jax.random.split(jax.random.key(seed))
        state, _ = pg.agents.train(agent, agent.init(run_key), num_updates=updates)
        met = pg.sampling.replay.sample(state.replay, test_key, batch_size=2048)
        phi = critic.features(state.learner.params["critic"], met.observation, met.action)
        return {
            "return": greedy.mean_return(
                env,
                lambda key, x: agent.act(state, key, x),
                test_key,
                episodes=EPISODES,
                length=LENGTH,
            ),
            "effective rank": spectra.effective_rank(phi),
            "values above .01": diagnostics.representation_rank(phi).astype(jnp.float32),
        }

    # One after the other: products of single matrices are faster than those of a batch of them.
    many = jax.jit(lambda seeds: jax.lax.map(one, seeds))
    return jax.tree.map(np.asarray, many(jnp.arange(config.pendulum_seeds)))


def error(x: Float[np.ndarray, " S"]) -> float:
    """Standard error of the mean."""
    return float(x.std(ddof=1) / len(x) ** 0.5)


def judged(
    config: Config, table: dict[tuple[str, float], dict[str, Any]], pendulum: dict[str, Any]
) -> list[reproduction.Claim]:
    """The four claims."""

    def rank(name: str, weight: float) -> Float[np.ndarray, " S"]:
        return table[name, weight]["effective rank"]

    raised = {x: rank(BEER, x) - rank(NONE, 0.0) for x in config.weights}
    top = config.weights[-1]
    other = rank(EVERY, top) - rank(BEER, top)
    between = raised[top].mean() * other.mean() >= 0
    behind = {}
    for x in config.weights:
        errors = [table[name]["value error"] for name in ((NONE, 0.0), (BEER, x), (EVERY, x))]
        behind[x] = errors[1] - min(errors, key=np.mean)
    gain = pendulum[BEER]["return"] - pendulum[NONE]["return"]
    return [
        reproduction.Claim(
            "grid: BEER raises the effective rank by two standard errors at one of the weights",
            any(x.mean() > 2 * error(x) for x in raised.values()),
            listed(raised, ".2f"),
        ),
        reproduction.Claim(
            f"grid: at weight {top:g} its rank is between none and mean cos²",
            bool(between and abs(other.mean()) > 2 * error(other)),
            f"{raised[top].mean():+.2f} ± {error(raised[top]):.2f} from none, mean cos² "
            f"{other.mean():+.2f} ± {error(other):.2f} further",
        ),
        reproduction.Claim(
            "grid: at every weight its value error is within a standard error of the least",
            all(x.mean() <= error(x) for x in behind.values()),
            listed(behind, ".4f"),
        ),
        reproduction.Claim(
            "pendulum: its return is not below DDPG's by more than a standard error",
            bool(gain.mean() >= -error(gain)),
            f"{gain.mean():+.1f} ± {error(gain):.1f}",
        ),
    ]


def listed(differences: dict[float, Float[np.ndarray, " S"]], form: str) -> str:
    """Each weight's mean and standard error."""
    return ", ".join(
        f"{k:g}: {x.mean():+{form}} ± {error(x):{form}}" for k, x in differences.items()
    )


def run(config: Config) -> reproduction.Findings:
    """Grid, then pendulum."""
    if config.quick:
        config = dataclasses.replace(
            config,
            seeds=3,
            steps=20,
            weights=(0.001, 0.1),
            pendulum_seeds=3,
            pendulum_steps=400,
        )
    table = on_the_grid(config)
    pendulum = {
        name: on_the_pendulum(config, name) for name in reproduction.track((NONE, BEER), "pendulum")
    }
    rows: dict[str, dict[str, Any]] = {}
    for (name, weight), columns in table.items():
        rows[f"grid: {name}" + (f", {weight:g}" if weight else "")] = columns
    for name, columns in pendulum.items():
        rows[f"pendulum: {'DDPG' if name == NONE else 'DDPG with BEER'}"] = columns
    first = table[NONE, 0.0]
    panels = {
        column: {
            name: reproduction.band(
                [config.weights[0] / 10, *config.weights],
                np.stack([first[column], *(table[name, x][column] for x in config.weights)], 1),
            )
            for name in (BEER, EVERY)
        }
        for column in ("effective rank", "value error")
    }
    return reproduction.Findings(
        title="Ranks of features, value errors, returns",
        table=rows,
        claims=judged(config, table, pendulum),
        panels=panels,
        x_label="weight of the penalty; none at the left end",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("beer_rank", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
