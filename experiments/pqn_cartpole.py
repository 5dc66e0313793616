"""Does Q-learning do without replay buffer and target network, if its layers are normalised?

PQN on CartPole-v1 by its authors' numbers (32 environments, 64 steps, rewards times 0.1), with
learning rate and exploration scheduled over the run's own length, against the same without
LayerNorm and against DQN with a replay buffer and a target network, all at equal environment
steps. Each seed is one run of the compiled program; then it acts greedily, one episode in each of
64 environments.

Exits 0 if PQN comes to a greedy return of 475, is not below the same without LayerNorm, and takes
less processor time than DQN on the same hidden layers. Time is the processor's, compilation left
out, for that of the clock depends on what else runs. The DQN of CleanRL has smaller layers, and so
less to compute for each sample: it is a row of its own, and not judged.

The authors' code takes time limits for ends, and so does PQN here (`agents.pqn` need not); DQN
bootstraps from them.

Source: PQN, Gallici et al. 2024, arXiv 2407.04811; DQN's numbers: CleanRL's for CartPole.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction
from pgjax import agents, envs, sampling
from pgjax.envs import control

PQN, PLAIN = "PQN", "without LayerNorm"
DQN, SMALL = "DQN", "DQN, CleanRL's layers"
POINTS = 25  # of a curve


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    steps: int = 250_000
    """Environment steps of each run, DQN's random start included."""
    seeds: int = 5
    """Independent runs of PQN, with LayerNorm and without."""
    dqn_seeds: int = 3
    """Independent runs of DQN, the first of them; it takes longer."""
    first_seed: int = 0
    """The others follow it."""
    hidden: tuple[int, ...] = (256, 256)
    """Hidden layers of PQN and DQN."""
    episodes: int = 64
    """Greedy ones, of each run."""
    goal: float = 475.0
    """Mean greedy return that counts as solved; that of CartPole-v1."""
    out: pathlib.Path = pathlib.Path("runs/pqn_cartpole")
    """Directory for results."""
    quick: bool = False
    """Three seeds of a few updates, layers of 16, one DQN."""


def scaled_rewards(env: envs.Environment, factor: float) -> envs.Environment:
    """The environment with its rewards times a factor."""

    def step(key: Array, state: Any, action: Any) -> envs.Step:
        found = env.step(key, state, action)
        return found._replace(reward=factor * found.reward)

    return dataclasses.replace(env, step=step)


def methods(config: Config) -> dict[str, agents.Agent]:
    """What is compared."""
    env = control.cart_pole()
    scaled = scaled_rewards(env, 0.1)
    normalized = agents.layer_norm_q_network(env, hidden=config.hidden)
    plain = agents.q_network(env, hidden=config.hidden)
    few = {"num_envs": 8, "num_steps": 16, "num_minibatches": 4} if config.quick else {}
    size = 128 if config.quick else 32 * 64
    schedule: dict[str, Any] = {
        "explore_over": max(1, config.steps // 5),
        "anneal_over": max(1, config.steps // size),
        "bootstrap_truncated": False,
        **few,
    }
    start = min(10_000, config.steps // 4)
    replayed: dict[str, Any] = {
        "start_steps": start,
        "explore_over": max(1, config.steps // 5),
        "batch_size": 16 if config.quick else 128,
    }
    found = {
        PQN: agents.pqn(scaled, normalized, **schedule),
        PLAIN: agents.pqn(scaled, plain, **schedule),
        DQN: agents.dqn(env, plain, **replayed),
    }
    if not config.quick:
        found[SMALL] = agents.dqn(env, agents.q_network(env, hidden=(120, 84)), **replayed)
    return found


def greedy_return(
    agent: agents.Agent, state: Any, key: Array, *, episodes: int
) -> Float[Array, ""]:
    """Mean return of one episode in each of so many environments, without exploration."""
    env = control.cart_pole()
    start, key = jax.random.split(key)

    def act(key: Array, observation: Any) -> sampling.Decision:
        return sampling.Decision(agent.act(state, key, observation))

    _, _, found = sampling.unroll_environments(
        env, act, sampling.start_environments(env, start, episodes), key, num_steps=500
    )
    first = jnp.argmax(found.ended, axis=0)
    return jnp.take_along_axis(found.returns, first[None], axis=0).mean()


def learn(
    agent: agents.Agent, config: Config, *, seeds: int, before: int
) -> tuple[dict[str, Float[np.ndarray, " S"]], Float[np.ndarray, "S P"]]:
    """Columns of the table, and the returns met while learning, of all seeds."""
    updates = max(1, (config.steps - before) // agent.steps)
    run = jax.jit(lambda state: pg.agents.train(agent, state, num_updates=updates))
    init = jax.jit(agent.init)
    judge = jax.jit(lambda state, key: greedy_return(agent, state, key, episodes=config.episodes))
    compiled = run.lower(init(jax.random.key(0))).compile()
    columns: dict[str, list[float]] = {"greedy": [], "cpu seconds": []}
    curves = []
    for seed in range(config.first_seed, config.first_seed + seeds):
        key, test_key = jax.random.split(jax.random.key(seed))
        state = jax.block_until_ready(init(key))
        began = time.process_time()
        state, metrics = jax.block_until_ready(compiled(state))
        columns["cpu seconds"].append(time.process_time() - began)
        columns["greedy"].append(float(judge(state, test_key)))
        parts = zip(
            np.array_split(np.asarray(metrics["return"] * metrics["episodes"]), POINTS),
            np.array_split(np.asarray(metrics["episodes"]), POINTS),
            strict=True,
        )
        curves.append([np.nansum(x) / max(number.sum(), 1) for x, number in parts])
    return {name: np.array(x) for name, x in columns.items()}, np.array(curves)


def run(config: Config) -> reproduction.Findings:
    """All methods at equal environment steps."""
    if config.quick:
        config = dataclasses.replace(config, steps=4_000, seeds=3, hidden=(16,), episodes=4)
    table: dict[str, dict[str, Float[np.ndarray, " S"]]] = {}
    curves: dict[str, Any] = {}
    for name, agent in reproduction.track(methods(config).items()):
        replayed = name in (DQN, SMALL)
        before = min(10_000, config.steps // 4) if replayed else 0
        seeds = min(config.seeds, config.dqn_seeds) if replayed else config.seeds
        table[name], found = learn(agent, config, seeds=seeds, before=before)
        scale = 1.0 if replayed else 10.0
        steps = before + (config.steps - before) * (np.arange(POINTS) + 1) / POINTS
        curves[name] = reproduction.band(steps, scale * found)
    greedy = {name: columns["greedy"] for name, columns in table.items()}
    seconds = {name: columns["cpu seconds"] for name, columns in table.items()}
    difference = greedy[PQN] - greedy[PLAIN]
    ratio = seconds[DQN] / seconds[PQN][: len(seconds[DQN])]
    return reproduction.Findings(
        title=f"CartPole-v1 after {config.steps} environment steps",
        table=table,
        claims=[
            reproduction.above(
                "PQN solves CartPole without replay buffer and target network",
                greedy[PQN],
                config.goal,
                format=".1f",
            ),
            reproduction.Claim(
                "it does not do worse than without LayerNorm",
                bool(difference.mean() >= 0),
                f"{difference.mean():+.1f} on average, by seed "
                + ", ".join(f"{x:+.0f}" for x in difference),
            ),
            reproduction.Claim(
                "it takes less processor time than DQN on the same hidden layers, for every seed",
                bool((ratio > 1).all()),
                f"DQN takes {ratio.mean():.2f} times as much ({ratio.min():.2f} to "
                f"{ratio.max():.2f})",
            ),
        ],
        panels={"return while exploring": curves},
        x_label="environment steps",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("pqn_cartpole", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
