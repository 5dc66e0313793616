"""What the agents with a replay buffer and continuous actions are told."""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.control import run

_OF_THE_AGENT = (
    *("num_envs", "num_steps", "gradient_steps", "batch_size", "capacity", "start_steps"),
    *("discount", "tau", "learning_rate"),
)


@dataclasses.dataclass(frozen=True)
class Config(run.Config):
    """Numbers that DDPG, TD3 and SAC share."""

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
    hidden: tuple[int, ...] = (256, 256)
    """Sizes of the hidden layers."""

    def options(self) -> dict[str, Any]:
        """Those that the three agents take by these names."""
        return {name: getattr(self, name) for name in _OF_THE_AGENT}


@dataclasses.dataclass(frozen=True)
class Noisy(Config):
    """And what DDPG and TD3 share."""

    noise: float = 0.1
    """Of exploration, as a share of the largest action."""

    def options(self) -> dict[str, Any]:
        """As of all three, and the noise."""
        return super().options() | {"noise": self.noise}
