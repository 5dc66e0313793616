"""Does an upper expectile find in recorded walks a way that none of them took?

A grid of 10 x 10 cells; 300 walks each from corner A to the centre B, from B to the opposite corner
C, where a reward of 1 ends the episode, and from B to a third corner D, a distraction; 30% of the
moves are random. Hardly a walk goes from A to C: the way has to be put together of two.

Tables instead of networks, the whole data in each step; the policy is the exact minimiser of the
weighted regression, π(a|s) ∝ Σ of the weights of a in s. What tells expectiles apart is the value
of A: .95^17 = .418 is the best within the data.

Exits 0 if the value of A grows with the expectile for every seed and is never above the best within
the data, the policy reaches C within 40 steps in 95% of the walks, and behaviour cloning in less
than half of them.

Source: IQL, Kostrikov et al. 2021, arXiv 2110.06169.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from experiments.shared import reproduction
from pgjax import values

SIDE, DISCOUNT = 10, 0.95
A, B, C, D = (0, 0), (5, 5), (9, 9), (0, 9)
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])
CLONING = "behaviour cloning"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    seeds: int = 5
    """Data sets."""
    walks: int = 300
    """Recorded on each of the three ways."""
    expectiles: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Tried; the last one's policy is judged."""
    beta: float = 10.0
    """Inverse temperature of the policy."""
    iterations: int = 3_000
    """Full-batch steps."""
    out: pathlib.Path = pathlib.Path("runs/iql_grid")
    """Directory for results."""
    quick: bool = False
    """Fifty steps on three small data sets."""


def move(cell: Int[np.ndarray, "W 2"], action: Int[np.ndarray, " W"]) -> Int[np.ndarray, "W 2"]:
    """One step of every walker; walls hold."""
    return np.clip(cell + MOVES[action], 0, SIDE - 1)


def walk(
    rng: np.random.Generator, start: tuple[int, int], goal: tuple[int, int], number: int
) -> dict[str, np.ndarray]:
    """Recorded steps of so many walkers, of whom each stops at its goal or in C."""
    cell = np.tile(start, (number, 1))
    going = np.ones(number, bool)
    rows = []
    for _ in range(200):
        away = np.array(goal) - cell
        helpful = np.stack([(away * step).sum(-1) > 0 for step in MOVES], axis=-1)
        chance = helpful / np.maximum(helpful.sum(-1, keepdims=True), 1)
        directed = np.argmax(np.cumsum(chance, -1) > rng.random((number, 1)), axis=-1)
        action = np.where(rng.random(number) < 0.3, rng.integers(0, 4, number), directed)
        later = move(cell, action)
        there = (later == C).all(-1)
        row = {"state": cell @ (SIDE, 1), "action": action, "next": later @ (SIDE, 1)}
        row |= {"reward": there.astype(np.float32), "terminated": there}
        rows.append({name: x[going] for name, x in row.items()})
        going &= ~there & ~(later == goal).all(-1)
        cell = later
        if not going.any():
            break
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def recorded(seed: int, walks: int) -> dict[str, np.ndarray]:
    """All three ways."""
    rng = np.random.default_rng(seed)
    parts = [walk(rng, *ends, walks) for ends in ((A, B), (B, C), (B, D))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def tabular_iql(
    data: dict[str, np.ndarray], expectile: float, iterations: int
) -> tuple[Array, Array]:
    """V, `[S]`, and the slow copy of Q, `[S, 4]`; each entry's gradient is a mean over its data."""
    state, action, later = (jnp.asarray(data[name]) for name in ("state", "action", "next"))
    reward = jnp.asarray(data["reward"])
    discounts = DISCOUNT * (1.0 - jnp.asarray(data["terminated"], jnp.float32))
    number = jnp.zeros((SIDE**2, 4)).at[state, action].add(1.0)

    def value_loss(v: Array, slow: Array) -> Array:
        return values.expectile_error(v[state], slow[state, action], expectile=expectile).sum()

    def critic_loss(q: Array, v: Array) -> Array:
        target = values.one_step_targets(reward, v[later], discounts)
        return values.value_error(q[state, action], target).sum()

    def step(tables: Any, _: None) -> tuple[Any, None]:
        v, q, slow = tables
        v = v - 0.5 * jax.grad(value_loss)(v, slow) / jnp.maximum(number.sum(-1), 1.0)
        q = q - 0.5 * jax.grad(critic_loss)(q, v) / jnp.maximum(number, 1.0)
        return (v, q, optax.incremental_update(q, slow, 0.1)), None

    start = jnp.zeros(SIDE**2), jnp.zeros((SIDE**2, 4)), jnp.zeros((SIDE**2, 4))
    (v, _, slow), _ = jax.lax.scan(step, start, None, length=iterations)
    return v, slow


def extracted(
    data: dict[str, np.ndarray], advantages: Float[Array, " B"], beta: float
) -> Float[np.ndarray, "S 4"]:
    """The policy that minimises -Σ w log π(a|s); uniform where nothing was recorded."""
    weight = np.asarray(values.advantage_weights(advantages, beta=beta))
    total = np.zeros((SIDE**2, 4))
    np.add.at(total, (data["state"], data["action"]), weight)
    known = total.sum(-1, keepdims=True)
    return np.where(known > 0, total / np.maximum(known, 1e-30), 0.25)


def success(policy: Float[np.ndarray, "S 4"], seed: int) -> float:
    """Share of 500 walks from A that reach C within 40 steps."""
    rng = np.random.default_rng(seed)
    cell, there = np.tile(A, (500, 1)), np.zeros(500, bool)
    for _ in range(40):
        chance = np.cumsum(policy[cell @ (SIDE, 1)], -1)
        chance /= chance[:, -1:]  # rounding must not leave a gap at the end
        action = np.argmax(chance > rng.random((500, 1)), axis=-1)
        cell = np.where(there[:, None], cell, move(cell, action))
        there |= (cell == C).all(-1)
    return float(there.mean())


def grid(config: Config) -> dict[str, dict[str, Float[np.ndarray, " S"]]]:
    """Value of A and success, of each expectile and of behaviour cloning."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(config.seeds):
        data = recorded(seed, config.walks)
        policies = {CLONING: extracted(data, jnp.zeros(len(data["state"])), 0.0)}
        worth = {}
        for expectile in config.expectiles:
            name = f"expectile {expectile:g}"
            v, slow = jax.jit(tabular_iql, static_argnums=(1, 2))(
                {k: jnp.asarray(x) for k, x in data.items()}, expectile, config.iterations
            )
            worth[name] = float(v[0])
            advantage = slow[data["state"], data["action"]] - v[data["state"]]
            policies[name] = extracted(data, advantage, config.beta)
        for name, policy in policies.items():
            columns = found.setdefault(name, {"success": [], "V(A)": []})
            columns["success"].append(success(policy, seed))
            columns["V(A)"].append(worth.get(name, np.nan))
    return {
        name: {
            column: np.array(x)
            for column, x in columns.items()
            if not (column == "V(A)" and name == CLONING)
        }
        for name, columns in found.items()
    }


def run(config: Config) -> reproduction.Findings:
    """All expectiles on all data sets."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, walks=20, iterations=50)
    table = grid(config)
    names = [f"expectile {x:g}" for x in config.expectiles]
    worth = np.stack([table[name]["V(A)"] for name in names])
    cloned = float(table[CLONING]["success"].mean())
    best = DISCOUNT**17
    return reproduction.Findings(
        title="From A to C, by walks that went half of the way",
        table=table,
        claims=[
            reproduction.Claim(
                "the value of A grows with the expectile, for every seed",
                bool((np.diff(worth, axis=0) > 0).all()),
                ", ".join(f"{x:.3f}" for x in worth.mean(1)),
            ),
            reproduction.Claim(
                f"it is never above the best within the data, {best:.3f}",
                bool((worth <= best + 1e-5).all()),
                f"at most {worth.max():.4f}",
            ),
            reproduction.above(
                "the policy reaches C within 40 steps", table[names[-1]]["success"], 0.95
            ),
            reproduction.Claim(
                "behaviour cloning does so in less than half of the walks",
                cloned < 0.5,
                f"{cloned:.3f}",
            ),
        ],
        panels={"value of A": {"IQL": reproduction.band(config.expectiles, worth.T)}},
        x_label="expectile",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("iql_grid", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
