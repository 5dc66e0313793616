"""Trains DQN on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """DQN's numbers."""

    num_envs: int = 1
    """Environments of each seed."""
    num_steps: int = 10
    """Steps of each environment between gradient steps."""
    batch_size: int = 128
    """Transitions of a gradient step."""
    capacity: int = 10_000
    """Transitions remembered."""
    start_steps: int = 10_000
    """Environment steps at random before the first update."""
    discount: float = 0.99
    """Of rewards."""
    double: bool = False
    """Let the network choose what its copy judges."""
    target_period: int = 50
    """Gradient steps from one copy to the next."""
    explore_share: float = 0.5
    """Of the run over which exploration falls from 1 to 0.05."""
    learning_rate: float = 2.5e-4
    """Of Adam."""
    hidden: tuple[int, ...] = (120, 84)
    """Sizes of the hidden layers."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    return agents.dqn(
        env,
        agents.q_network(env, hidden=config.hidden),
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        capacity=config.capacity,
        start_steps=config.start_steps,
        discount=config.discount,
        double=config.double,
        target_period=config.target_period,
        learning_rate=config.learning_rate,
        explore_over=max(1, int(config.explore_share * config.steps)),
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("dqn", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
