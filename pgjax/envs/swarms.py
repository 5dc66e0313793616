"""Swarms: phases that fall into step, headings that align, places that gather.

Each is a `mean_field.Swarm`, with our own numbers: the paper's are not known in full.

Source: the tasks of Dec-POMFC, Cui et al. 2023, arXiv 2307.06175; Kuramoto 1975; Vicsek
et al. 1995.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.mean_field import Swarm

TURN = 2.0 * np.pi


def order(angles: Float[Array, " N"]) -> Float[Array, ""]:
    """|mean exp(i x)|²: 1 where all angles are one, 1/N on average where they are random."""
    return jnp.square(jnp.cos(angles).mean()) + jnp.square(jnp.sin(angles).mean())


def kuramoto(
    *,
    radius: float | None = None,
    stride: float = 0.2,
    noise: float = 0.2,
    observation_noise: float = 0.2,
    cost: float = 0.0,
) -> Swarm:
    """Phases x' = x + w u + e, to come to one: R = |mean exp(i x)|² - c mean |u|.

    States: phase in [0, 2π) and, where there is a radius, a place on the unit torus, which stays.
    An agent observes, with noise, its phase relative to the circular mean of its neighbours'
    (itself among them), in [-π, π). Starts: all uniform.

    Args:
      radius: within which others are neighbours, > 0; None: all are.
      stride: w.
      noise: standard deviation of e, ≥ 0.
      observation_noise: in radians, ≥ 0.
      cost: c ≥ 0.

    Raises:
      ValueError: a number out of range.
    """
    _check(radius, stride=stride, noise=noise, observation_noise=observation_noise, cost=cost)

    def reset(key: PRNGKeyArray, num: int) -> dict[str, Array]:
        _checks.in_range("num_agents", num, 1)
        phase_key, place_key = jax.random.split(key)
        states = {"angle": jax.random.uniform(phase_key, (num,), maxval=TURN)}
        if radius is not None:
            states["place"] = jax.random.uniform(place_key, (num, 2))
        return states

    def observe(key: PRNGKeyArray, states: Any) -> Float[Array, "N 1"]:
        return _relative(key, states, radius, observation_noise)

    def step(key: PRNGKeyArray, states: Any, actions: Float[Array, "N 1"]) -> dict[str, Array]:
        return states | {"angle": _turned(key, states["angle"], stride * actions[:, 0], noise)}

    return Swarm(
        reset, observe, step, _order_less_cost(cost), lambda x: x["angle"][:, None], 1, "Kuramoto"
    )


def vicsek(
    *,
    radius: float = 0.25,
    speed: float = 0.03,
    stride: float = 0.2,
    noise: float = 0.2,
    observation_noise: float = 0.2,
    cost: float = 0.0,
) -> Swarm:
    """As `kuramoto`, with headings for phases: agents fly on the unit torus at constant speed.

    Args:
      radius: within which others are neighbours, > 0.
      speed: length of a step, ≥ 0.
      stride, noise, observation_noise, cost: as there.

    Raises:
      ValueError: a number out of range.
    """
    still = kuramoto(
        radius=radius, stride=stride, noise=noise, observation_noise=observation_noise, cost=cost
    )
    _checks.in_range("speed", speed, 0.0)

    def step(key: PRNGKeyArray, states: Any, actions: Float[Array, "N 1"]) -> dict[str, Array]:
        states = still.step(key, states, actions)
        angle = states["angle"]
        ahead = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        return states | {"place": (states["place"] + speed * ahead) % 1.0}

    return still._replace(step=step, name="Vicsek")


def aggregation(
    *,
    stride: float = 0.1,
    noise: float = 0.02,
    observation_noise: float = 0.2,
    cost: float = 0.0,
) -> Swarm:
    """Places in [-2, 2]² that shall gather: R = -mean pairwise distance - c mean |u|.

    An agent observes its own place with noise, and moves by `stride` times its action, of length 1
    at most, with noise, within the square. Starts: uniform.

    Args:
      stride: longest move.
      noise: standard deviation of a move's noise, ≥ 0.
      observation_noise: ≥ 0.
      cost: c ≥ 0.

    Raises:
      ValueError: a number out of range.
    """
    _check(None, stride=stride, noise=noise, observation_noise=observation_noise, cost=cost)

    def reset(key: PRNGKeyArray, num: int) -> Float[Array, "N 2"]:
        _checks.in_range("num_agents", num, 1)
        return jax.random.uniform(key, (num, 2), minval=-2.0, maxval=2.0)

    def observe(key: PRNGKeyArray, states: Float[Array, "N 2"]) -> Float[Array, "N 2"]:
        return states + observation_noise * jax.random.normal(key, states.shape)

    def step(
        key: PRNGKeyArray, states: Float[Array, "N 2"], actions: Float[Array, "N 2"]
    ) -> Float[Array, "N 2"]:
        length = jnp.linalg.norm(actions, axis=-1, keepdims=True)
        move = stride * actions / jnp.maximum(length, 1.0)
        return jnp.clip(states + move + noise * jax.random.normal(key, states.shape), -2.0, 2.0)

    def reward(states: Float[Array, "N 2"], actions: Float[Array, "N 2"]) -> Array:
        squared = jnp.square(states[:, None] - states).sum(-1)
        distance = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
        return -distance.mean() - cost * jnp.linalg.norm(actions, axis=-1).mean()

    return Swarm(reset, observe, step, reward, lambda states: states, 2, "Aggregation")


def circular_mean(
    angles: Float[Array, " N"], near: Bool[Array, "N N"] | None = None
) -> Float[Array, " N"]:
    """arg Σ_j exp(i x_j) over each agent's neighbours, in (-π, π]; None: over all."""
    both = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    if near is None:
        total = jnp.broadcast_to(both.sum(0), both.shape)
    else:
        total = near.astype(both.dtype) @ both
    return jnp.arctan2(total[:, 1], total[:, 0])


def _relative(
    key: PRNGKeyArray, states: Any, radius: float | None, noise: float
) -> Float[Array, "N 1"]:
    near = None
    if radius is not None:
        away = states["place"][:, None] - states["place"]
        away = away - jnp.round(away)
        near = jnp.square(away).sum(-1) <= radius**2
    found = states["angle"] - circular_mean(states["angle"], near)
    found = found + noise * jax.random.normal(key, found.shape)
    return ((found + np.pi) % TURN - np.pi)[:, None]


def _turned(key: PRNGKeyArray, angle: Array, by: Array, noise: float) -> Array:
    return (angle + by + noise * jax.random.normal(key, angle.shape)) % TURN


def _order_less_cost(cost: float) -> Any:
    def reward(states: Any, actions: Float[Array, "N 1"]) -> Array:
        return order(states["angle"]) - cost * jnp.abs(actions).mean()

    return reward


def _check(radius: float | None, *, stride: float, **others: float) -> None:
    if radius is not None:
        _checks.in_range("radius", radius, 0.0, low_open=True)
    _checks.in_range("stride", stride, 0.0, low_open=True)
    for name, value in others.items():
        _checks.in_range(name, value, 0.0)
