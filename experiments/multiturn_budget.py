"""Demonstrations or reinforcement learning: how an agent's budget of many turns is best split.

A demonstration costs as much as many episodes. Every run starts from a policy that knows how
commands are spelt and nothing of quests, as a pretrained language model might, and has the same
budget: a share of it buys an expert's episodes, on which the policy is trained first; the rest buys
the episodes of PPO with dense rewards. All training is on a small map; tests are there and on a
larger one with more objects. Shows the claim, and exits 0, if a tenth of the budget in
demonstrations is better on the larger map than demonstrations alone and than reinforcement learning
alone, each time by two standard errors of the paired difference.

Source: Wang and Ammanabrolu 2025, arXiv 2510.01132 (language models on TextWorld, where 60
demonstrations and 400 episodes did best).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

import pgjax as pg
from experiments.shared import quest, reproduction
from pgjax import objectives
from pgjax.envs import textquest
from pgjax.sampling import multiturn

CLAIMED = 0.1  # the small share that is to beat both extremes


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    updates: int = 600
    """Batches of PPO that the whole budget buys."""
    tasks: int = 8
    """Different starts in a batch."""
    group_size: int = 8
    """Episodes from the same start."""
    demonstration_cost: float = 50.0
    """What a demonstration costs, in episodes."""
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
    """Shares of the budget for demonstrations, from 0 to 1."""
    epochs: int = 200
    """Steps on all demonstrations bought, at any share."""
    reading: int = 200
    """Updates that make the first policy."""
    hidden: int = 32
    """Units of the recurrent policy."""
    learning_rate: float = 3e-3
    """Of Adam, in both phases."""
    seeds: int = 5
    """Independent runs."""
    first_seed: int = 0
    """The others follow it."""
    out: pathlib.Path = pathlib.Path("runs/multiturn_budget")
    """Directory for results."""
    quick: bool = False
    """Two seeds, two updates and two epochs."""

    def __post_init__(self) -> None:
        outside = [share for share in self.shares if not 0 <= share <= 1]
        if outside or {0.0, CLAIMED, 1.0} - set(self.shares):
            raise ValueError(
                f"shares: expected numbers in [0, 1], 0, {CLAIMED:g} and 1 included: {self.shares}"
            )
        if self.demonstration_cost <= 0:
            raise ValueError(f"demonstration_cost: expected > 0, got {self.demonstration_cost}")


def split(config: Config, share: float) -> tuple[int, int]:
    """How many demonstrations and how many updates a share buys."""
    batch = config.tasks * config.group_size
    bought = int(share * config.updates * batch / config.demonstration_cost)
    left = config.updates * batch - bought * config.demonstration_cost
    return bought, int(left / batch)


def train(config: Config) -> dict[str, np.ndarray]:
    """Success on both maps, after the demonstrations and at the end, `[shares, seeds]`."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    imitate = pg.train.make_update(quest.outputs, objectives.supervised(), optimizer)
    reinforce = pg.train.make_update(quest.outputs, objectives.ppo(), optimizer)
    tests, reading = (16, 2) if config.quick else (512, config.reading)
    splits = np.array([split(config, share) for share in config.shares])
    most = max(int(splits[:, 0].max()), 1)

    def fresh(params: Any, key: PRNGKeyArray) -> Any:
        return pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
        )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def learn(bought: Array, updates: Array, key: PRNGKeyArray) -> dict[str, Array]:
        init_key, test_key, shown_key, key = jax.random.split(key, 4)
        rows = quest.demonstrate(quest.EASY, shown_key, most)
        rows = dataclasses.replace(rows, mask=rows.mask & (jnp.arange(most) < bought)[:, None])
        params = quest.pretrained(init_key, config.hidden, updates=reading)
        epochs = jnp.where(bought > 0, 2 if config.quick else config.epochs, 0)
        state = jax.lax.fori_loop(
            0, epochs, lambda _, state: imitate(state, rows)[0], fresh(params, key)
        )
        shown = state.params

        def step(_: Array, state: Any) -> Any:
            record, groups = quest.episodes(
                quest.EASY,
                state.params,
                jax.random.fold_in(key, state.step),
                tasks=config.tasks,
                group_size=config.group_size,
            )
            rollout = multiturn.flatten_turns(**record, group_ids=groups, eos=textquest.EOS)
            return reinforce(state, rollout)[0]

        state = jax.lax.fori_loop(0, updates, step, fresh(shown, key))
        return {
            f"{size} map{when}": quest.success(world, params, test_key, tests)
            for size, world in (("small", quest.EASY), ("large", quest.HARD))
            for when, params in ((", demonstrations only", shown), ("", state.params))
        }

    seeds = config.first_seed + jnp.arange(2 if config.quick else config.seeds)
    keys = jax.vmap(jax.random.key)(seeds)
    found = []
    for bought, updates in reproduction.track(splits, "shares"):
        updates = min(int(updates), 2) if config.quick else int(updates)
        found.append(learn(jnp.int32(bought), jnp.int32(updates), keys))
    return {name: np.stack([np.asarray(x[name]) for x in found]) for name in found[0]}


def run(config: Config) -> reproduction.Findings:
    """All shares."""
    found = train(config)
    large = found["large map"]
    claims = []
    for share, alone in ((0.0, "reinforcement learning"), (1.0, "demonstrations")):
        claims.append(
            reproduction.ahead(
                f"a share of {CLAIMED:g} beats {alone} alone on the larger map",
                large[config.shares.index(CLAIMED)],
                large[config.shares.index(share)],
            )
        )
    order = np.argsort(config.shares)
    shares = np.asarray(config.shares)[order]
    table = {}
    for i in order:
        bought, updates = split(config, config.shares[i])
        row = f"{config.shares[i]:g}: {bought} demonstrations, {updates} updates"
        table[row] = {name: values[i] for name, values in found.items()}
    return reproduction.Findings(
        title="One budget, split between demonstrations and reinforcement learning",
        table=table,
        claims=claims,
        panels={
            f"success on the {size} map": {
                when: reproduction.band(shares, found[f"{size} map{suffix}"][order].T)
                for when, suffix in (("at the end", ""), ("before", ", demonstrations only"))
            }
            for size in ("small", "large")
        },
        x_label="share of the budget for demonstrations",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "multiturn_budget", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
