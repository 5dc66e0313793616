"""Is implicit Q-learning better than imitation on data of mixed quality?

Pendulum-v1, and all transitions that soft actor-critic met while it learnt in four environments,
its random start and its poor beginnings included. IQL by its authors' numbers for locomotion but
for the size of the networks and their learning rate, rewards scaled by 1000 over the range of the
returns; behaviour cloning with the same policy, rate, batch and steps. The pendulum never
terminates: its time limit ends no value.

Scores are 0 for uniformly random actions and 1 for what soft actor-critic does greedily in the end;
a seed is a data set and a run of each method on it. Exits 0 if IQL's score is .3 above behaviour
cloning's.

Source: IQL, Kostrikov et al. 2021, arXiv 2110.06169.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction
from pgjax import agents, envs, sampling
from pgjax.agents import off_policy
from pgjax.envs import control

WORLDS, LENGTH, EPISODES = 4, 200, 20
NAMES = ("random actions", "the data", "soft actor-critic", "behaviour cloning", "IQL")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    seeds: int = 5
    """Data sets."""
    collect: int = 5_000
    """Updates of soft actor-critic, four environment steps each, after 4000 random steps."""
    learn: int = 15_000
    """Gradient steps of IQL and of behaviour cloning."""
    out: pathlib.Path = pathlib.Path("runs/iql_pendulum")
    """Directory for results."""
    quick: bool = False
    """A few steps of each on three small data sets."""


class Networks(NamedTuple):
    """Sizes and numbers that all share."""

    env: envs.Environment
    sizes: dict[str, Any]
    rate: float
    batch: int


def networks(config: Config) -> Networks:
    """As the config says."""
    env = envs.with_scaled_actions(control.pendulum())
    if config.quick:
        return Networks(env, {"hidden": (8,)}, 1e-3, 16)
    return Networks(env, {"hidden": (64, 64)}, 1e-3, 256)


def mean_return(env: envs.Environment, act: Any, key: Array) -> Float[Array, ""]:
    """Of 20 episodes, `act` being `(key, observations) -> actions`."""
    start, key = jax.random.split(key)
    running = sampling.start_environments(env, start, EPISODES)
    _, _, episodes = sampling.unroll_environments(
        env, lambda key, x: sampling.Decision(act(key, x)), running, key, num_steps=LENGTH
    )
    return episodes.returns[-1].mean()


def collected(config: Config, key: Array) -> tuple[pg.Transition, dict[str, Array]]:
    """All that soft actor-critic met, rewards scaled, and returns of what is known by then."""
    net = networks(config)
    before = WORLDS * LENGTH * (1 if config.quick else 5)
    agent = agents.sac(
        net.env,
        agents.squashed_gaussian_policy(net.env, **net.sizes),
        agents.critics(net.env, **net.sizes),
        num_envs=WORLDS,
        start_steps=before,
        batch_size=net.batch // 2,
        learning_rate=net.rate,
    )
    key, test_key, random_key = jax.random.split(key, 3)
    state, _ = pg.agents.train(agent, agent.init(key), num_updates=config.collect)
    data = jax.tree.map(lambda x: x[: before + WORLDS * config.collect], state.replay.items)
    # Rows are in the order of time, the worlds by turns.
    returns = data.reward.reshape(-1, LENGTH, WORLDS).sum(1)
    factor = 1000.0 / (returns.max() - returns.min())
    found = {
        "random actions": mean_return(
            net.env,
            lambda key, x: off_policy.random_actions(net.env, key, EPISODES),
            random_key,
        ),
        "the data": returns.mean(),
        "soft actor-critic": mean_return(
            net.env, lambda key, x: agent.act(state, key, x), test_key
        ),
    }
    return data.replace(reward=factor * data.reward), found


def learnt(config: Config, make: Any, data: pg.Transition, key: Array) -> Float[Array, ""]:
    """Return of what `make(net, policy, optimizer, data)` learns."""
    net = networks(config)
    falling = optax.adam(optax.cosine_decay_schedule(net.rate, config.learn))
    policy = agents.bounded_mean_policy(net.env, **net.sizes)
    agent = make(net, policy, falling, data)
    key, test_key = jax.random.split(key)
    state, _ = pg.agents.train(agent, agent.init(key), num_updates=config.learn)
    return mean_return(net.env, lambda key, x: agent.act(state, key, x), test_key)


def iql(net: Networks, policy: Any, falling: Any, data: pg.Transition) -> agents.Agent:
    """With the authors' cosine for the policy."""
    return agents.iql(
        net.env,
        data,
        policy,
        agents.critics(net.env, **net.sizes),
        agents.value_network(net.env, **net.sizes),
        optimizer=optax.adam(net.rate),
        policy_optimizer=falling,
        batch_size=net.batch,
    )


def cloning(net: Networks, policy: Any, falling: Any, data: pg.Transition) -> agents.Agent:
    """With the same policy and optimizer."""
    return agents.behavior_cloning(net.env, data, policy, optimizer=falling, batch_size=net.batch)


def run(config: Config) -> reproduction.Findings:
    """All data sets."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, collect=200, learn=20)
    collect = jax.jit(functools.partial(collected, config))
    methods = {
        "behaviour cloning": jax.jit(functools.partial(learnt, config, cloning)),
        "IQL": jax.jit(functools.partial(learnt, config, iql)),
    }
    runs = []
    for seed in reproduction.track(range(config.seeds), "data sets"):
        keys = jax.random.split(jax.random.key(seed))
        data, found = collect(keys[0])
        found |= {name: method(data, keys[1]) for name, method in methods.items()}
        runs.append({name: float(x) for name, x in found.items()})
    by_name = {name: np.array([x[name] for x in runs]) for name in NAMES}
    width = by_name["soft actor-critic"] - by_name["random actions"]
    table = {
        name: {"return": found, "score": (found - by_name["random actions"]) / width}
        for name, found in by_name.items()
    }
    gain = table["IQL"]["score"] - table["behaviour cloning"]["score"]
    return reproduction.Findings(
        title="Pendulum-v1, learnt from what another agent met while it learnt",
        table=table,
        claims=[
            reproduction.Claim(
                "IQL's score is .3 above behaviour cloning's on average",
                bool(gain.mean() >= 0.3),
                f"{gain.mean():+.3f}, by seed " + ", ".join(f"{x:+.2f}" for x in gain),
            )
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("iql_pendulum", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
