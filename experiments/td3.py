"""Trains TD3 on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import off_policy, run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(off_policy.Config):
    """TD3's numbers."""

    noise: float = 0.1
    """Of exploration, as a share of the largest action."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    return agents.td3(
        env,
        agents.deterministic_policy(env, hidden=config.hidden),
        agents.critics(env, hidden=config.hidden),
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        gradient_steps=config.gradient_steps,
        batch_size=config.batch_size,
        capacity=config.capacity,
        start_steps=config.start_steps,
        discount=config.discount,
        tau=config.tau,
        learning_rate=config.learning_rate,
        noise=config.noise,
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("td3", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
