"""Trains TRPO on an environment, many seeds at once in one compiled program.

Or the natural policy gradient, with `--no-line-search`.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """TRPO's numbers."""

    num_envs: int = 8
    """Environments of each seed."""
    num_steps: int = 128
    """Steps of each environment in a batch."""
    radius: float = 0.01
    """Mean divergence of a step."""
    damping: float = 0.1
    """Added to the Fisher matrix."""
    discount: float = 0.99
    """Of rewards."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation."""
    value_rate: float = 1e-3
    """Of Adam on the value network."""
    value_epochs: int = 10
    """Passes of it over a batch."""
    line_search: bool = True
    """Shorten steps that do not help or go too far; without it: natural policy gradient."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    make = agents.trpo if config.line_search else agents.npg
    return make(
        env,
        agents.actor_critic(env, hidden=config.hidden),
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        radius=config.radius,
        damping=config.damping,
        discount=config.discount,
        lambda_=config.gae_lambda,
        value_rate=config.value_rate,
        value_epochs=config.value_epochs,
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("trpo", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
