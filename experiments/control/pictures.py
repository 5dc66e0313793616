"""An episode drawn: a strip of frames, and the same as an animation."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from pgjax import envs, sampling

Draw = Callable[[Any, Float[np.ndarray, " O"]], None]


def episode(
    env: envs.Environment,
    act: Callable[[Any, Any], Any],
    path: pathlib.Path,
    *,
    max_steps: int = 500,
    frames: int = 8,
) -> list[pathlib.Path]:
    """Runs one episode and draws it, for environments whose observations can be drawn.

    Args:
      env: whose `name` says how it looks.
      act: `(key, observations [1, O]) -> actions [1, ...]`.
      path: without an ending; `.png` and `.gif` are written.
      max_steps: after which the episode is left.
      frames: of the strip.

    Returns:
      the files, none for an environment that cannot be drawn.
    """
    if env.name not in DRAWN:
        return []
    import matplotlib.pyplot as plt
    from matplotlib import animation

    start, key = jax.random.split(jax.random.key(0))

    def decide(key: Any, observation: Any) -> sampling.Decision:
        return sampling.Decision(act(key, observation))

    @jax.jit
    def steps(running: Any, key: Any) -> Any:
        return sampling.unroll_environments(env, decide, running, key, num_steps=max_steps)

    _, seen, episodes = steps(sampling.start_environments(env, start, 1), key)
    ended = np.flatnonzero(np.asarray(episodes.ended)[:, 0])
    count = int(ended[0]) + 1 if ended.size else max_steps
    observations = np.asarray(seen.observation)[:count, 0]
    draw, (low, high) = DRAWN[env.name]

    def frame(axes: Any, at: int) -> None:
        axes.clear()
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        axes.set_aspect("equal")
        axes.set_title(f"step {at}", fontsize=9)
        draw(axes, observations[at])

    shown = np.unique(np.linspace(0, count - 1, frames).astype(int))
    figure, every = plt.subplots(
        1, len(shown), figsize=(1.8 * len(shown), 2.0), squeeze=False, layout="constrained"
    )
    for axes, at in zip(every[0], shown, strict=True):
        frame(axes, int(at))
    strip = path.with_suffix(".png")
    figure.savefig(strip, dpi=110)
    plt.close(figure)
    figure, axes = plt.subplots(figsize=(2.4, 2.4), layout="constrained")
    stride = max(1, count // 60)
    moving = animation.FuncAnimation(
        figure, lambda i: frame(axes, int(i)), frames=range(0, count, stride), interval=50
    )
    film = path.with_suffix(".gif")
    moving.save(film, writer=animation.PillowWriter(fps=20))
    plt.close(figure)
    return [strip, film]


def _rod(axes: Any, *points: tuple[float, float]) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(x, y, "-o", color="tab:blue", linewidth=3, markersize=4)


def _cart_pole(axes: Any, o: Float[np.ndarray, 4]) -> None:
    x, angle = float(o[0]), float(o[2])
    axes.plot([-2.4, 2.4], [0, 0], color="0.7", linewidth=1)
    axes.plot([x - 0.25, x + 0.25], [0, 0], color="0.2", linewidth=6)
    _rod(axes, (x, 0.0), (x + np.sin(angle), np.cos(angle)))


def _mountain_car(axes: Any, o: Float[np.ndarray, 2]) -> None:
    x = np.linspace(-1.2, 0.6, 100)
    axes.plot(x, np.sin(3 * x) * 0.45, color="0.7")
    axes.plot(o[0], np.sin(3 * o[0]) * 0.45 + 0.05, "o", color="tab:blue")
    axes.plot(0.5, np.sin(1.5) * 0.45 + 0.1, "^", color="tab:green")


def _acrobot(axes: Any, o: Float[np.ndarray, 6]) -> None:
    one, two = np.arctan2(o[1], o[0]), np.arctan2(o[3], o[2])
    joint = (np.sin(one), -np.cos(one))
    tip = (joint[0] + np.sin(one + two), joint[1] - np.cos(one + two))
    axes.axhline(1.0, color="tab:green", linewidth=1)
    _rod(axes, (0.0, 0.0), joint, tip)


def _pendulum(axes: Any, o: Float[np.ndarray, 3]) -> None:
    _rod(axes, (0.0, 0.0), (-float(o[1]), float(o[0])))


def _point_mass(axes: Any, o: Float[np.ndarray, 4]) -> None:
    axes.plot(0, 0, "+", color="tab:green")
    axes.plot(o[0], o[1], "o", color="tab:blue")


DRAWN: dict[str, tuple[Draw, tuple[tuple[float, float], tuple[float, float]]]] = {
    "CartPole-v1": (_cart_pole, ((-2.6, -0.8), (2.6, 1.6))),
    "MountainCar-v0": (_mountain_car, ((-1.3, -0.6), (0.7, 0.8))),
    "Acrobot-v1": (_acrobot, ((-2.2, -2.2), (2.2, 2.2))),
    "Pendulum-v1": (_pendulum, ((-1.2, -1.2), (1.2, 1.2))),
    "PointMass": (_point_mass, ((-1.5, -1.5), (1.5, 1.5))),
}
