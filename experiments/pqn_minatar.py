"""Trains PQN with a convolution on a MinAtar game (needs gymnax), many seeds at once.

The numbers are the authors' for MinAtar; they train for ten million steps. Ends and exits as
`experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments import pqn
from experiments.control import run, worlds
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(pqn.Config):
    """PQN's numbers for MinAtar."""

    env: str = "gymnax:Breakout-MinAtar"
    """An environment's name, of one whose observations are images."""
    steps: int = 10_000_000
    """Environment steps of each seed; rounded up to whole parts."""
    num_envs: int = 128
    """Environments of each seed."""
    num_steps: int = 32
    """Steps of each environment in a batch."""
    epochs: int = 2
    """Passes over a batch."""
    minibatches: int = 32
    """Optimizer steps of a pass."""
    q_lambda: float = 0.65
    """Of the targets."""
    explore_share: float = 0.1
    """Of the run over which exploration falls from 1 to its last value."""
    last_epsilon: float = 0.05
    """Its last value."""
    learning_rate: float = 5e-4
    """Of RAdam."""
    channels: int = 16
    """Of the convolution."""
    hidden: tuple[int, ...] = (128,)
    """Sizes of the hidden layers behind it."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    network = agents.convolutional_q_network(env, channels=config.channels, hidden=config.hidden)
    return pqn.make_agent(env, updates, config, network)


def main(arguments: list[str] | None = None) -> int:
    return run.main(
        "pqn_minatar",
        Config(),
        make_agent,
        description=__doc__,
        arguments=arguments,
        load=worlds.images,
    )


if __name__ == "__main__":
    sys.exit(main())
