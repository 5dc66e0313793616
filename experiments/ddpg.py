"""Trains DDPG on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """DDPG's numbers."""

    env: str = "Pendulum-v1"
    """An environment's name, with continuous actions; an unknown one lists those there are."""
    steps: int = 20_000
    """Environment steps of each seed; rounded up to whole parts."""
    num_envs: int = 1
    """Environments of each seed."""
    num_steps: int = 1
    """Steps of each environment between gradient steps."""
    gradient_steps: int = 1
    """After them."""
    batch_size: int = 256
    """Transitions of a gradient step."""
    capacity: int = 100_000
    """Transitions remembered."""
    start_steps: int = 1_000
    """Environment steps at random before the first update."""
    discount: float = 0.99
    """Of rewards."""
    tau: float = 0.005
    """Share of the way that target networks follow in a step."""
    learning_rate: float = 1e-3
    """Of Adam, the same for all networks."""
    noise: float = 0.1
    """Of exploration, as a share of the largest action."""
    hidden: tuple[int, ...] = (256, 256)
    """Sizes of the hidden layers."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    return agents.ddpg(
        env,
        agents.deterministic_policy(env, hidden=config.hidden),
        agents.critics(env, num=1, hidden=config.hidden),
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
    return run.main("ddpg", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
