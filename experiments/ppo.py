"""Trains PPO on an environment, many seeds at once in one compiled program.

Ends with a table over seeds, the learning curve, a drawn episode, and where they lie. Exits 0; 1
where the environment has a return from which it counts as solved and the mean over seeds of the
last tenth of training is below it; 2 where something is wrong with what was given; 3 where numbers
ceased to be finite; 128 + n after signal n.
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.control import run
from pgjax import agents, envs


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """PPO's numbers; the defaults are PureJaxRL's for CartPole."""

    num_envs: int = 4
    """Environments of each seed."""
    num_steps: int = 128
    """Steps of each environment in a batch."""
    epochs: int = 4
    """Passes over a batch."""
    minibatches: int = 4
    """Optimizer steps of a pass."""
    learning_rate: float = 2.5e-4
    """Of Adam."""
    anneal: bool = True
    """The rate falls to 0 over the run."""
    discount: float = 0.99
    """Of rewards."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation."""
    clip: float = 0.2
    """Of the ratio."""
    value_clip: float | None = 0.2
    """Around old values; None: errors are not clipped."""
    value_coefficient: float = 0.5
    """Of the value error."""
    entropy_coefficient: float = 0.01
    """Of the bonus."""
    normalize_advantages: bool = True
    """In each minibatch."""
    bootstrap_truncated: bool = True
    """Time limits are no ends of the world."""
    max_gradient_norm: float = 0.5
    """Larger gradients are scaled down to it."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers, of actor and critic each."""


def make_agent(env: envs.Environment, updates: int, config: Config) -> agents.Agent:
    return agents.ppo(
        env,
        agents.actor_critic(env, hidden=config.hidden),
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        num_epochs=config.epochs,
        num_minibatches=config.minibatches,
        discount=config.discount,
        lambda_=config.gae_lambda,
        clip=config.clip,
        value_clip=config.value_clip,
        value_coefficient=config.value_coefficient,
        entropy_coefficient=config.entropy_coefficient,
        normalize_advantages=config.normalize_advantages,
        bootstrap_truncated=config.bootstrap_truncated,
        learning_rate=config.learning_rate,
        anneal_over=updates if config.anneal else None,
        max_gradient_norm=config.max_gradient_norm,
    )


def main(arguments: list[str] | None = None) -> int:
    return run.main("ppo", Config(), make_agent, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
