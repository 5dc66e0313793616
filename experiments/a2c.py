"""Trains A2C on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """A2C's numbers."""

    env: str = "CartPole-v1"
    """An environment's name; an unknown one lists those there are."""
    num_envs: int = 16
    """Environments of each seed."""
    num_steps: int = 8
    """Steps of each environment in a batch."""
    learning_rate: float = 7e-4
    """Of RMSProp."""
    anneal: bool = True
    """The rate falls to 0 over the run."""
    discount: float = 0.99
    """Of rewards."""
    gae_lambda: float = 1.0
    """Of generalised advantage estimation; 1: n-step returns."""
    value_coefficient: float = 0.5
    """Of the value error."""
    entropy_coefficient: float = 0.01
    """Of the bonus."""
    max_gradient_norm: float = 0.5
    """Larger gradients are scaled down to it."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    return agents.a2c(
        env,
        agents.actor_critic(env, hidden=config.hidden),
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        learning_rate=config.learning_rate,
        discount=config.discount,
        value_coefficient=config.value_coefficient,
        entropy_coefficient=config.entropy_coefficient,
        max_gradient_norm=config.max_gradient_norm,
        lambda_=config.gae_lambda,
        anneal_over=updates if config.anneal else None,
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("a2c", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
