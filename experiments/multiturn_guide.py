"""Which recipe and which reward for agents of many turns: a small comparison on a token quest.

A recurrent policy reads and writes the tokens of `envs.textquest`. Its base, which stands for a
pretrained language model, knows how commands are spelt and nothing of quests. Every recipe gets the
same episodes per update, once with a reward at every sub-goal (dense) and once for success alone
(sparse). Trained on a small map, tested there and on a larger one with more objects. Shows the
claims, and exits 0, if RLOO beats the base policy by 10 points (so the gain comes from the
multi-turn formulation, not from PPO's additions), PPO is at least as good as RLOO on the larger
map, and dense rewards help PPO more than RLOO. How to split a budget between demonstrations and
reinforcement learning is `experiments.multiturn_budget`.

Source: Wang and Ammanabrolu 2025, arXiv 2510.01132 (language models on TextWorld).
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
from pgjax.objectives import agentic
from pgjax.rewards import density
from pgjax.sampling import multiturn


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    updates: int = 600
    """Batches of each run."""
    tasks: int = 8
    """Different starts in a batch."""
    group_size: int = 8
    """Episodes from the same start."""
    reading: int = 200
    """Updates that make the base policy."""
    hidden: int = 32
    """Units of the recurrent policy."""
    learning_rate: float = 3e-3
    """Of Adam, the same for all."""
    seeds: int = 8
    """Independent runs."""
    out: pathlib.Path = pathlib.Path("runs/multiturn_guide")
    """Directory for results."""
    quick: bool = False
    """Two updates of two small runs, PPO and RLOO alone."""


def train(config: Config, objective: pg.Objective) -> dict[str, dict[str, Any]]:
    """For both rewards: success in training, and on both maps before and after, by seed."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    update = pg.train.make_update(quest.outputs, objective, optimizer)
    tasks, group_size = (2, 2) if config.quick else (config.tasks, config.group_size)
    updates, tests, seeds = (2, 4, 2) if config.quick else (config.updates, 256, config.seeds)
    reading = 2 if config.quick else config.reading

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def learn(dense: Array, key: PRNGKeyArray) -> dict[str, Array]:
        init_key, test_key, key = jax.random.split(key, 3)
        params = quest.pretrained(init_key, config.hidden, updates=reading)
        state = pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
        )

        def step(state: Any, _: None) -> tuple[Any, Array]:
            record, groups = quest.episodes(
                quest.EASY,
                state.params,
                jax.random.fold_in(key, state.step),
                tasks=tasks,
                group_size=group_size,
            )
            rewards = record["turn_rewards"]
            done = jnp.mean(rewards.sum(-1) > 0.99)
            sparse = density.only_complete(rewards, record["action_lengths"] > 0, goal=1.0)
            record["turn_rewards"] = jnp.where(dense, rewards, sparse)
            rollout = multiturn.flatten_turns(**record, group_ids=groups, eos=textquest.EOS)
            return update(state, rollout)[0], done

        state, curve = jax.lax.scan(step, state, None, length=updates)
        both = jax.tree.map(lambda *x: jnp.stack(x), params, state.params)
        base, small = jax.vmap(lambda p: quest.success(quest.EASY, p, test_key, tests))(both)
        return {
            "training": curve,
            "small map": small,
            "large map": quest.success(quest.HARD, state.params, test_key, tests),
            "base": base,
        }

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    found = jax.tree.map(np.asarray, learn(jnp.array([False, True]), keys))
    return {
        reward: {name: x[i] for name, x in found.items()}
        for i, reward in enumerate(("sparse", "dense"))
    }


def run(config: Config) -> reproduction.Findings:
    """All recipes with both rewards."""
    recipes = {
        "PPO": objectives.ppo(),
        "RLOO": agentic.with_total_rewards(objectives.rloo()),
        "GRPO": agentic.with_total_rewards(objectives.grpo()),
        "REINFORCE++": agentic.with_total_rewards(objectives.reinforce_pp()),
    }
    if config.quick:
        recipes = {name: recipes[name] for name in ("PPO", "RLOO")}
    found = {
        (name, reward): result
        for name, objective in reproduction.track(recipes.items())
        for reward, result in train(config, objective).items()
    }

    def mean(name: str, reward: str, column: str) -> float:
        return float(found[name, reward][column].mean())

    gain = mean("RLOO", "dense", "small map") - mean("RLOO", "dense", "base")
    lead = mean("PPO", "dense", "large map") - mean("RLOO", "dense", "large map")
    helps = {
        name: mean(name, "dense", "small map") - mean(name, "sparse", "small map")
        for name in ("PPO", "RLOO")
    }
    claims = [
        reproduction.Claim("RLOO beats the base policy by 10 points", gain >= 0.1, f"{gain:+.3f}"),
        reproduction.Claim(
            "PPO is at least as good as RLOO on the larger map", lead >= 0, f"{lead:+.3f}"
        ),
        reproduction.Claim(
            "dense rewards help PPO more than RLOO",
            helps["PPO"] > helps["RLOO"],
            f"{helps['PPO']:+.3f} against {helps['RLOO']:+.3f}",
        ),
    ]
    return reproduction.Findings(
        title="Recipes and rewards for many turns",
        table={
            f"{name}, {reward}": {
                column: result[column] for column in ("small map", "large map", "base")
            }
            for (name, reward), result in found.items()
        },
        claims=claims,
        panels={
            f"success in training, {reward}": {
                name: reproduction.band(
                    np.arange(found[name, reward]["training"].shape[1]),
                    found[name, reward]["training"],
                )
                for name in recipes
            }
            for reward in ("sparse", "dense")
        },
        x_label="update",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "multiturn_guide", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
