"""Does a penalty that the Bellman equation bounds raise the rank of features, and no further?

First a random walk on a grid of 10 x 10 cells, each with a reward drawn from N(0, 1), γ = .9: the
values, which are known, by temporal differences from the two coordinates, φ(s)ᵀw + c with 32
features, an averaged copy in the targets, 64 transitions a step, Adam. No penalty; BEER; and a
penalty on every likeness of consecutive features, the mean of cos²; on the same grids. Then
Pendulum-v1: DDPG, and DDPG with BEER at its authors' weight of .001, and what rank features have.

A move goes up to three cells each way. Consecutive features can all be orthogonal in as few
dimensions as the graph of moves asks for: two with the four moves to neighbours (`--four`), whose
graph is a checkerboard; 16 here, where the cells of a 4 x 4 block all follow each other, which is
more than features have without a penalty. And hidden units are tangents, which cannot die; with
ReLUs (`--relu`) both penalties kill units, and the rank falls (column "units that are 0").

Each penalty has three weights. Judged is each at the weight that was best on other grids in value
error, BEER at 3 and the mean of cos² at .1. Exits 0 if

* BEER raises the effective rank by two standard errors;
* the mean of cos² raises it further, by two standard errors;
* BEER's value error is within a standard error of the least of the three;
* on the pendulum its return is not below DDPG's by more than a standard error.

It exits 1: BEER raises the rank and lowers the error at every weight, but so does the mean of cos²,
whose error at its best weight is the lowest; on the pendulum one run of ten does not learn, and the
rank is DDPG's.

Differences are paired by seed. The effective rank is asked of in place of the number of singular
values above .01, which is shown beside it and is near its ceiling of 32.

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

SIDE, REACH, GAMMA, TAU = 10, 3, 0.9, 0.01
NONE, BEER, EVERY = "none", "BEER", "mean cos²"
LENGTH, EPISODES, WORLDS = 200, 20, 4


@dataclasses.dataclass(frozen=True)
class Config:
    """A grid and a pendulum."""

    seeds: int = 20
    """Grids."""
    steps: int = 4_000
    """Gradient steps on the grid."""
    bounded: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Weights of BEER; the last is judged."""
    unbounded: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Weights of the mean of cos²; the second is judged."""
    first_seed: int = 100
    """The others follow it."""
    four: bool = False
    """Moves to the four neighbours only."""
    relu: bool = False
    """Hidden units of the grid's network that can die."""
    pendulum_seeds: int = 10
    """Runs of each agent on the pendulum."""
    pendulum_steps: int = 20_000
    """Environment steps of each, four a gradient step."""
    out: pathlib.Path = pathlib.Path("runs/beer_rank")
    """Directory for results."""
    quick: bool = False
    """A few steps on three seeds."""


class Grid(NamedTuple):
    """Where a cell's moves lead, `[100, M]`; coordinates in [-1, 1], `[100, 2]`."""

    following: Int[np.ndarray, "S M"]
    coordinates: Float[np.ndarray, "S 2"]


def grid(reach: int = REACH) -> Grid:
    """Moves of up to so many cells each way; 0: to the four neighbours. The border cuts them."""
    cells = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1).reshape(
        -1, 2
    )
    moves = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
    if reach:
        ways = np.arange(-reach, reach + 1)
        moves = np.stack(np.meshgrid(ways, ways, indexing="ij"), -1).reshape(-1, 2)
        moves = moves[moves.any(-1)]
    after = np.clip(cells[:, None] + moves, 0, SIDE - 1)
    return Grid(after @ np.array([SIDE, 1]), (2 * cells / (SIDE - 1) - 1).astype(np.float32))


def true_values(rewards: Array, reach: int = REACH) -> Float[Array, " S"]:
    """(1 - γP)⁻¹ r of the random walk."""
    chance = np.zeros((SIDE**2, SIDE**2), np.float32)
    following = grid(reach).following
    np.add.at(chance, (np.arange(SIDE**2)[:, None], following), 1 / following.shape[1])
    return jnp.linalg.solve(jnp.eye(SIDE**2) - GAMMA * chance, rewards)


def evaluated(config: Config, seed: Array, bounded: Array, unbounded: Array) -> dict[str, Array]:
    """Ranks and value error after temporal differences with weights of the two penalties."""
    reach = 0 if config.four else REACH
    world = grid(reach)
    unit = jax.nn.relu if config.relu else jnp.tanh
    reward_key, net_key, key = jax.random.split(jax.random.key(seed), 3)
    rewards = jax.random.normal(reward_key, (SIDE**2,))
    coordinates, following = jnp.asarray(world.coordinates), jnp.asarray(world.following)
    params = mlp.init(net_key, (2, 32, 32, 1))
    adam = optax.adam(3e-3)

    def features(params: Any, x: Array) -> Array:
        return unit(mlp.apply(params[:-1], x, activation=unit))

    def loss(params: Any, copy: Any, key: Array) -> Array:
        cell_key, move_key = jax.random.split(key)
        cell = jax.random.randint(cell_key, (64,), 0, SIDE**2)
        after = following[cell, jax.random.randint(move_key, (64,), 0, following.shape[1])]
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
    (params, _, _), _ = jax.lax.scan(step, start, jax.random.split(key, config.steps))
    found = mlp.apply(params, coordinates, activation=unit)[:, 0]
    phi = features(params, coordinates)
    truth = true_values(rewards, reach)
    return {
        "effective rank": spectra.effective_rank(phi),
        "values above .01": diagnostics.representation_rank(phi).astype(jnp.float32),
        "units that are 0": jnp.sum(jnp.abs(phi).max(0) < 1e-6, dtype=jnp.float32),
        "value error": jnp.sqrt(jnp.mean(jnp.square(found - truth)) / jnp.var(truth)),
    }


def on_the_grid(config: Config) -> dict[tuple[str, float], dict[str, Any]]:
    """Every way's numbers, by its name and weight."""
    names = [(NONE, 0.0), *((BEER, x) for x in config.bounded)]
    names += [(EVERY, x) for x in config.unbounded]
    arms = [(x * (name == BEER), x * (name == EVERY)) for name, x in names]
    many = jax.vmap(
        jax.vmap(lambda *given: evaluated(config, *given), (0, None, None)), (None, 0, 0)
    )
    seeds = config.first_seed + jnp.arange(config.seeds)
    found = jax.jit(many)(seeds, *jnp.asarray(arms).T)
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
    return jax.tree.map(np.asarray, many(config.first_seed + jnp.arange(config.pendulum_seeds)))


def judged(
    config: Config, table: dict[tuple[str, float], dict[str, Any]], pendulum: dict[str, Any]
) -> list[reproduction.Claim]:
    """The four claims."""
    own, other = table[BEER, config.bounded[-1]], table[EVERY, config.unbounded[1]]
    plain = table[NONE, 0.0]
    least = min((plain, own, other), key=lambda x: x["value error"].mean())["value error"]
    behind = own["value error"] - least
    gained = own["value error"] - plain["value error"]
    gain = pendulum[BEER]["return"] - pendulum[NONE]["return"]
    error = reproduction.standard_error
    return [
        reproduction.ahead(
            "grid: BEER raises the effective rank by two standard errors",
            own["effective rank"],
            plain["effective rank"],
            format=".2f",
        ),
        reproduction.ahead(
            "grid: the mean of cos² raises it further, by two standard errors",
            other["effective rank"],
            own["effective rank"],
            format=".2f",
        ),
        reproduction.Claim(
            "grid: BEER's value error is within a standard error of the least",
            bool(behind.mean() <= error(behind)),
            f"{behind.mean():+.4f} ± {error(behind):.4f}; "
            f"from none {gained.mean():+.4f} ± {error(gained):.4f}",
        ),
        reproduction.Claim(
            "pendulum: its return is not below DDPG's by more than a standard error",
            bool(gain.mean() >= -error(gain)),
            f"{gain.mean():+.1f} ± {error(gain):.1f}",
        ),
    ]


def run(config: Config) -> reproduction.Findings:
    """Grid, then pendulum."""
    if config.quick:
        config = dataclasses.replace(
            config,
            seeds=3,
            steps=20,
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
                [weights[0] / 10, *weights],
                np.stack([first[column], *(table[name, x][column] for x in weights)], 1),
            )
            for name, weights in ((BEER, config.bounded), (EVERY, config.unbounded))
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
