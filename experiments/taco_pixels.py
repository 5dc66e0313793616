"""Does finding what actions lead to make features of control where much on the image is noise?

A spot on an image of 16 x 16 pixels is moved by the actions; two others, half as bright, move by
themselves. Three agents, on the same seeds: one in the way of DrQ-v2; that with CURL's loss, which
finds another view of the same image; and TACO, which adds to it the loss of finding the image three
steps later by the actions between, and a prediction of the reward. The authors' losses and weights;
networks, batch and learning rate are smaller, larger and the same for all.

With spots of one brightness, tried first, no features of a single image can explain the place, and
no agent got far.

How well the encoder's features tell the spot's place is measured by ridge regression, R² on images
not regressed on: 1000 each, of random actions. A random encoder is shown beside.

Exits 0 if

* R² of TACO is above CURL's, and CURL's above the plain agent's, by a standard error each, paired;
* TACO's return is at least the plain agent's for four seeds of five.

Source: TACO, Zheng et al. 2023, arXiv 2306.13229; the task and its numbers are chosen here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import greedy, reproduction
from pgjax import agents, envs, sampling
from pgjax.agents import off_policy
from pgjax.models import pixels

PLAIN, CURL, TACO, RANDOM = "DrQ-style", "with CURL", "TACO", "random encoder"
WEIGHTS = {PLAIN: (0.0, 0.0, 0.0), CURL: (0.0, 1.0, 0.0), TACO: (1.0, 1.0, 1.0)}
STRIDES, LENGTH, WORLDS, PROBED, EPISODES = (2, 1), 25, 4, 1_000, 40


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    seeds: int = 5
    """Runs of each agent."""
    steps: int = 8_000
    """Environment steps of each, four a gradient step."""
    parts: int = 5
    """After each of which R² and return are taken."""
    batch_size: int = 64
    """Sequences of a gradient step."""
    learning_rate: float = 1e-3
    """Of Adam, for all parts of all agents."""
    out: pathlib.Path = pathlib.Path("runs/taco_pixels")
    """Directory for results."""
    quick: bool = False
    """A few steps of three seeds."""


def agent_of(config: Config, env: envs.Environment, weights: Array) -> agents.Agent:
    """By the weights of the three losses, `[3]`."""
    temporal, view, reward = weights
    return agents.taco(
        env,
        temporal_weight=temporal,  # arrays: one program for all agents
        view_weight=view,
        reward_weight=reward,
        channels=8,
        strides=STRIDES,
        feature_size=24,
        hidden=64,
        pad=1,
        num_envs=WORLDS,
        num_steps=1,
        batch_size=config.batch_size,
        capacity=config.steps + 1_000,
        start_steps=400 if not config.quick else 40,
        noise_steps=config.steps // 2,
        learning_rate=config.learning_rate,
    )


def pictures(env: envs.Environment, key: Array) -> tuple[Array, Float[Array, "N 2"]]:
    """Images that random actions lead to, and where the spot is on each."""
    start, key = jax.random.split(key)
    running = sampling.start_environments(env, start, 2 * PROBED)
    running, _, _ = sampling.unroll_environments(
        env,
        lambda key, _: sampling.Decision(off_policy.random_actions(env, key, 2 * PROBED)),
        running,
        key,
        num_steps=3,
    )
    return running.observation, running.state.state.point


def explained(encoder: Any, seen: Array, places: Array) -> Float[Array, ""]:
    """R² of a ridge regression of the places, on the second half of the images."""
    x = pixels.apply(encoder, seen, strides=STRIDES)
    x = (x - x[:PROBED].mean(0)) / (x[:PROBED].std(0) + 1e-3)
    x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
    known, own = x[:PROBED], jnp.eye(x.shape[1])
    slope = jnp.linalg.solve(known.T @ known + 10.0 * own, known.T @ places[:PROBED])
    missed = jnp.square(places[PROBED:] - x[PROBED:] @ slope).sum()
    return 1.0 - missed / jnp.square(places[PROBED:] - places[PROBED:].mean(0)).sum()


def learnt(config: Config, env: envs.Environment, weights: Array, seed: Array) -> dict[str, Array]:
    """R² and greedy return after each part, `[parts + 1]`, the untrained agent first."""
    agent = agent_of(config, env, weights)
    run_key, seen_key, test_key = jax.random.split(jax.random.key(seed), 3)
    seen, places = pictures(env, seen_key)
    updates = math.ceil(config.steps / agent.steps / config.parts)

    def measured(state: Any) -> dict[str, Array]:
        return {
            "R²": explained(state.learner.params["encoder"]["image"], seen, places),
            "return": greedy.mean_return(
                env,
                lambda key, x: agent.act(state, key, x),
                test_key,
                episodes=EPISODES,
                length=LENGTH,
            ),
        }

    def part(state: Any, _: None) -> tuple[Any, dict[str, Array]]:
        state = pg.agents.train(agent, state, num_updates=updates)[0]
        return state, measured(state)

    state = agent.init(run_key)
    first = measured(state)
    _, rest = jax.lax.scan(part, state, None, length=config.parts)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def run(config: Config) -> reproduction.Findings:
    """All agents."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, steps=80, parts=1, batch_size=8)
    env = envs.pixels.rendered_point(LENGTH, brightness=0.5)
    curves = {}
    # One seed after the other: convolutions with a kernel for each are slow.
    one = jax.jit(functools.partial(learnt, config, env))
    for name, weights in reproduction.track(WEIGHTS.items()):
        found = [one(jnp.array(weights), jnp.int32(seed)) for seed in range(config.seeds)]
        curves[name] = {column: np.stack([x[column] for x in found]) for column in found[0]}
    last = {
        name: {column: x[:, -1] for column, x in columns.items()}
        for name, columns in curves.items()
    }
    gains = [last[CURL]["R²"] - last[PLAIN]["R²"], last[TACO]["R²"] - last[CURL]["R²"]]
    better = int(np.sum(last[TACO]["return"] >= last[PLAIN]["return"]))
    steps = np.arange(config.parts + 1) * config.steps / config.parts
    return reproduction.Findings(
        title="A spot among others, from pixels",
        table=last | {RANDOM: {"R²": curves[PLAIN]["R²"][:, 0]}},
        claims=[
            reproduction.Claim(
                f"R² of {b} is above that of {a} by a standard error",
                bool(gain.mean() > reproduction.standard_error(gain)),
                reproduction.with_error(gain, "+.3f"),
            )
            for (a, b), gain in zip(((PLAIN, CURL), (CURL, TACO)), gains, strict=True)
        ]
        + [
            reproduction.Claim(
                "TACO's return is at least the plain agent's for four seeds of five",
                better >= 0.8 * config.seeds,
                f"{better} of {config.seeds}",
            )
        ],
        panels={
            column: {name: reproduction.band(steps, curves[name][column]) for name in WEIGHTS}
            for column in ("R²", "return")
        },
        x_label="environment steps",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("taco_pixels", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
