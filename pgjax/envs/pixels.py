"""Tasks that are seen as images."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step, with_time_limit


class Scene(NamedTuple):
    """Where everything is, in [-1, 1]².

    Attributes:
      point: what the actions move, f32 `[2]`.
      others: what moves by itself, f32 `[M, 2]`.
    """

    point: Float[Array, 2]
    others: Float[Array, "M 2"]


def rendered_point(
    max_steps: int = 25,
    *,
    side: int = 16,
    distractors: int = 2,
    speed: float = 0.2,
    wander: float = 0.3,
    brightness: float = 1.0,
) -> Environment:
    """A spot on a grey image, to be moved to the middle, among others that move by themselves.

    The point moves by `speed` times the action, in [-1, 1]²; the others by Gaussian steps, and
    nothing depends on them. All stay within [-1, 1]². With a `brightness` of 1 they look alike, and
    only what an action does to it tells the point from the others. Reward: minus the point's
    distance from the middle before the step. Everything starts anywhere; never terminates.

    Observations are uint8 `[side, side, 1]`, spots with a standard deviation of .8 pixels.

    Args:
      max_steps: after which an episode is truncated.
      side: of the image, in pixels.
      distractors: M ≥ 0.
      speed: > 0.
      wander: standard deviation of the distractors' steps, ≥ 0.
      brightness: of the distractors as a share of the point's, in [0, 1].

    Raises:
      ValueError: a number out of range.
    """
    _checks.in_range("side", side, 2)
    _checks.in_range("distractors", distractors, 0)
    _checks.in_range("speed", speed, 0.0, low_open=True)
    _checks.in_range("wander", wander, 0.0)
    _checks.in_range("brightness", brightness, 0.0, 1.0)

    def reset(key: PRNGKeyArray) -> tuple[Scene, Array]:
        places = jax.random.uniform(key, (1 + distractors, 2), minval=-1.0, maxval=1.0)
        scene = Scene(places[0], places[1:])
        return scene, picture(scene, side=side, brightness=brightness)

    def step(key: PRNGKeyArray, scene: Scene, action: Float[Array, 2]) -> Step:
        reward = -jnp.sqrt(jnp.sum(jnp.square(scene.point)))
        point = jnp.clip(scene.point + speed * jnp.clip(action, -1.0, 1.0), -1.0, 1.0)
        others = scene.others + wander * jax.random.normal(key, (distractors, 2))
        scene = Scene(point, jnp.clip(others, -1.0, 1.0))
        never = jnp.bool_(False)
        return Step(scene, picture(scene, side=side, brightness=brightness), reward, never, never)

    image = Box((side, side, 1), 0, 255)
    env = Environment(reset, step, image, Box((2,), -1.0, 1.0), "RenderedPoint")
    return with_time_limit(env, max_steps)


def picture(scene: Scene, *, side: int, brightness: float = 1.0) -> UInt8[Array, "side side 1"]:
    """The scene from above, the first coordinate downwards; spots that overlap add up to white."""
    spots = jnp.concatenate([scene.point[None], scene.others])
    middle = 0.5 * (spots + 1.0) * (side - 1)
    away = jnp.square(jnp.arange(side)[None, :, None] - middle[:, None, :]) / (2 * 0.8**2)
    rows, columns = jnp.exp(-away[..., 0]), jnp.exp(-away[..., 1])
    strength = jnp.full(len(spots), brightness).at[0].set(1.0)
    light = jnp.einsum("m,mi,mj->ij", strength, rows, columns)
    return jnp.round(255.0 * jnp.minimum(light, 1.0)).astype(jnp.uint8)[..., None]
