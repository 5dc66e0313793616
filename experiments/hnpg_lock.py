"""Does a policy gradient that also learns from old data open a lock that neither opens alone?

The combination lock of `envs.continuous_lock`: five steps, actions in ten dimensions, 1 for the
right action at the last step after only right ones, and .1 half of the time for everything else. A
random policy succeeds once in 100,000 episodes. The data are episodes of a guide that errs one time
in five; corrupted data are as many with uniform actions only. TRPO on its own episodes with critics
of their returns, an actor on fitted Q-evaluation of the data alone, and HNPG, which is both at once
with one critic; networks, trust regions and number of updates are the same.

Exits 0 if the mean test return of HNPG is above .9 and TRPO's below .2, and with corrupted data
HNPG is at most .1 below TRPO.

The guide's data cover the optimum, so that the offline actor may open the lock as well; the row is
there, nothing is claimed of it. What it cannot do is fall back on its own episodes.

Source: HNPG, Zhou et al. 2023, arXiv 2311.08384.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction
from pgjax import agents
from pgjax.envs import continuous_lock

TRPO, OFFLINE, HNPG = "TRPO", "data alone", "HNPG"
HNPG_BAD = "HNPG, corrupted data"


@dataclasses.dataclass(frozen=True)
class Config:
    """How to learn."""

    horizon: int = 5
    """Steps of the lock."""
    actions: int = 10
    """Dimensions of an action."""
    data: int = 5_000
    """Recorded episodes."""
    steps: int = 50_000
    """Environment steps of the methods that play."""
    episodes: int = 200
    """Of an update; as many recorded transitions are drawn for each step."""
    critic_hidden: tuple[int, ...] = (32, 32)
    """Hidden layers of the critics; the paper's are twice as wide."""
    radius: float = 0.01
    """Of the trust region."""
    tests: int = 1_000
    """Episodes of the final policy, with its exploration."""
    seeds: int = 3
    """Locks, each with its data and one run of every method."""
    out: pathlib.Path = pathlib.Path("runs/hnpg_lock")
    """Directory for results."""
    quick: bool = False
    """Three locks of two steps, three updates."""


def learn(
    config: Config, online: bool, offline: bool, key: Array, share: Array
) -> tuple[Float[Array, ""], Float[Array, " U"], Float[Array, ""]]:
    """Test return, return of each update, and the data's, of one seed.

    `share` is that of random actions in the data.
    """
    code_key, data_key, init_key, test_key = jax.random.split(key, 4)
    codes = continuous_lock.random_codes(
        code_key, horizon=config.horizon, num_actions=config.actions
    )
    env = continuous_lock.continuous_lock(codes, num_actions=config.actions)
    data = continuous_lock.record(
        data_key,
        codes,
        num_episodes=config.data,
        num_actions=config.actions,
        random_share=share,  # type: ignore[arg-type]
    )
    net = agents.actor_q(env, critic_hidden=config.critic_hidden)
    agent = agents.hybrid_npg(
        env,
        data,
        net,
        horizon=config.horizon,
        num_episodes=config.episodes if online else 0,
        offline_batch=config.episodes if offline else 0,
        radius=config.radius,
    )
    updates = max(1, config.steps // (config.episodes * config.horizon))
    state, metrics = pg.agents.train(agent, agent.init(init_key), num_updates=updates)
    seen = agents.play(env, net, state.params, test_key, num_episodes=config.tests)
    return seen.reward.sum(0).mean(), metrics["return"], data.reward.sum(0).mean()


def run(config: Config) -> reproduction.Findings:
    """All methods on the same locks."""
    if config.quick:
        steps = 3 * config.episodes * 2
        config = dataclasses.replace(config, seeds=3, horizon=2, data=50, tests=50)
        config = dataclasses.replace(config, steps=steps)
    usual = 1.0 / config.horizon
    methods: dict[str, tuple[bool, bool, float]] = {
        TRPO: (True, False, usual),
        OFFLINE: (False, True, usual),
        HNPG: (True, True, usual),
        HNPG_BAD: (True, True, 1.0),
    }
    # Seeds one after the other: the program of all at once takes minutes to compile.
    one = jax.jit(learn, static_argnums=(0, 1, 2))
    keys = [jax.random.key(seed) for seed in range(config.seeds)]
    table: dict[str, dict[str, Float[np.ndarray, " S"]]] = {}
    curves: dict[str, Any] = {}
    for name, (online, offline, share) in reproduction.track(methods.items()):
        found = [one(config, online, offline, key, jnp.float32(share)) for key in keys]
        last, returns, recorded = (np.stack(x) for x in zip(*found, strict=True))
        table[name] = {"test return": last}
        if offline:
            table[name]["return of the data"] = recorded
        if online:
            met = config.episodes * config.horizon * (1 + np.arange(returns.shape[1]))
            curves[name] = reproduction.band(met, returns)
    tested = {name: columns["test return"] for name, columns in table.items()}
    trpo = float(tested[TRPO].mean())
    worse = tested[TRPO] - tested[HNPG_BAD]
    return reproduction.Findings(
        title=f"A lock of {config.horizon} steps, {config.steps} environment steps",
        table=table,
        claims=[
            reproduction.above("HNPG opens the lock", tested[HNPG], 0.9),
            reproduction.Claim("TRPO's test return stays below .2", trpo < 0.2, f"{trpo:.3f}"),
            reproduction.Claim(
                "with corrupted data HNPG is at most .1 below TRPO",
                bool(worse.mean() <= 0.1),
                f"{-worse.mean():+.3f}",
            ),
        ],
        panels={"return while learning": curves},
        x_label="environment steps",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("hnpg_lock", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
