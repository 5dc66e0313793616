"""Trains PQN on an environment, many seeds at once in one compiled program.

Ends and exits as `experiments.ppo` does.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """PQN's numbers; the defaults are the authors' for CartPole."""

    num_envs: int = 32
    """Environments of each seed."""
    num_steps: int = 64
    """Steps of each environment in a batch."""
    epochs: int = 4
    """Passes over a batch."""
    minibatches: int = 16
    """Optimizer steps of a pass."""
    discount: float = 0.99
    """Of rewards."""
    q_lambda: float = 0.95
    """Of the targets."""
    explore_share: float = 0.2
    """Of the run over which exploration falls from 1 to its last value."""
    last_epsilon: float = 0.2
    """Its last value."""
    learning_rate: float = 1e-4
    """Of RAdam."""
    anneal: bool = True
    """The rate falls to 0 over the run."""
    hidden: tuple[int, ...] = (128, 128)
    """Sizes of the hidden layers."""


def make_agent(
    env: envs.Environment,
    updates: int,
    config: Config,
    network: agents.Network | None = None,
) -> agents.Agent:
    return agents.pqn(
        env,
        network or agents.layer_norm_q_network(env, hidden=config.hidden),
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        num_epochs=config.epochs,
        num_minibatches=config.minibatches,
        discount=config.discount,
        lambda_=config.q_lambda,
        epsilon=(1.0, config.last_epsilon),
        explore_over=max(1, int(config.explore_share * config.steps)),
        learning_rate=config.learning_rate,
        anneal_over=updates if config.anneal else None,
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("pqn", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
