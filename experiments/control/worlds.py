"""Environments by name: the library's own, and `library:name` of those that it adapts."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

import numpy as np

from pgjax import envs
from pgjax.envs import control


@dataclasses.dataclass(frozen=True)
class World:
    """An environment, and the mean return from which it counts as solved, where there is one."""

    make: Callable[[], envs.Environment]
    solved: float | None = None


OWN = {
    "CartPole-v1": World(control.cart_pole, 475.0),
    "Acrobot-v1": World(control.acrobot, -100.0),
    "MountainCar-v0": World(control.mountain_car, -110.0),
    "Pendulum-v1": World(control.pendulum, -200.0),
    "PointMass": World(control.point_mass),
}
ADAPTED: dict[str, Callable[[str], envs.Environment]] = {
    "gymnax": lambda name: envs.from_gymnax(name),
    "brax": lambda name: envs.from_brax(name),
    "jumanji": lambda name: envs.from_jumanji(name),
    "navix": lambda name: envs.from_navix(name),
}


def find(name: str) -> World:
    """The world of a name.

    Raises:
      ValueError: an unknown name; says which there are.
      ImportError: a library that is not installed; says what installs it.
    """
    if name in OWN:
        return OWN[name]
    library, _, rest = name.partition(":")
    if rest and library in ADAPTED:
        made = ADAPTED[library](rest)
        return World(lambda: made)
    near = difflib.get_close_matches(name, OWN, n=1, cutoff=0.6)
    hint = f", perhaps {near[0]}?" if near else ";"
    raise ValueError(
        f"env: {name!r} is not known{hint} there are {', '.join(OWN)}, and those of other "
        f"libraries as {', '.join(f'{x}:NAME' for x in ADAPTED)}"
    )


def vectors(name: str) -> tuple[envs.Environment, float | None]:
    """The environment as the agents here take it, and the return at which it is solved.

    Observations are vectors, and bounded actions are stretched from [-1, 1].
    """
    world = find(name)
    env = world.make()
    kind = env.observation
    if not (isinstance(kind, envs.Box) and len(kind.shape) == 1):
        env = envs.with_flat_observations(env)
    action = env.action
    if isinstance(action, envs.Box) and np.isfinite(action.low).all():
        env = envs.with_scaled_actions(env)
    return env, world.solved


def images(name: str) -> tuple[envs.Environment, float | None]:
    """The environment as agents with a convolution take it, and the return at which it is solved.

    Raises:
      ValueError: also an environment whose observations are not images.
    """
    world = find(name)
    env = world.make()
    kind = env.observation
    if not (isinstance(kind, envs.Box) and len(kind.shape) == 3):
        raise ValueError(f"env: expected one whose observations are images, {name} has {kind}")
    return env, world.solved
