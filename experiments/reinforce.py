"""Trains REINFORCE on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """REINFORCE's numbers."""

    max_steps: int = 500
    """Of an episode: the environment's own limit."""
    num_envs: int = 8
    """Episodes of an update."""
    learning_rate: float = 3e-3
    """Of Adam."""
    anneal: bool = True
    """The rate falls to 0 over the run."""
    discount: float = 0.99
    """Of rewards."""
    baseline: bool = True
    """Subtract a learnt value."""
    entropy_coefficient: float = 0.0
    """Of the bonus."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    return agents.reinforce(
        env,
        agents.actor_critic(env, hidden=config.hidden),
        max_steps=config.max_steps,
        num_envs=config.num_envs,
        learning_rate=config.learning_rate,
        discount=config.discount,
        baseline=config.baseline,
        entropy_coefficient=config.entropy_coefficient,
        anneal_over=updates if config.anneal else None,
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("reinforce", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
