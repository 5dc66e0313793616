"""Peg in a hole, seen from the side: precise at the end, and no reward before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Environment, Step, with_time_limit


def peg_insertion(
    max_steps: int = 50, *, radius: float = 0.02, stride: float = 0.05, noise: float = 0.002
) -> Environment:
    """A peg above a table with a hole, pushed sideways and down; reward 1 once it is in, then over.

    State: place x and height z of the tip, place c of the hole. Observation, normalised to about
    ±1: 2x, 2z - 1, 2c and 2(c - x), f32 `[4]`. An action in [-1, 1]² moves the tip by `stride`
    times it, sideways with Gaussian noise. Beside the hole the tip cannot be below the table,
    z ≥ 0; where it goes down within `radius` of c, it is in the hole and slides between its walls,
    and at z = -0.05 it is inserted. Starts: x in ±.5, z in [.7, .9], c in ±.3.

    Args:
      max_steps: after which an episode is truncated.
      radius: play of the peg in the hole, > 0.
      stride: longest move, along each axis.
      noise: standard deviation of the sideways move, ≥ 0.

    Raises:
      ValueError: a number out of range.

    Source: our own, after the assembly tasks of ResiP, Ankile et al. 2024, arXiv 2407.16677.
    """
    _checks.in_range("radius", radius, 0.0, low_open=True)
    _checks.in_range("stride", stride, 0.0, low_open=True)
    _checks.in_range("noise", noise, 0.0)
    depth = 0.05

    def observe(state: Array) -> Array:
        x, z, hole = state
        return jnp.stack([2 * x, 2 * z - 1, 2 * hole, 2 * (hole - x)])

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        low, high = jnp.array([-0.5, 0.7, -0.3]), jnp.array([0.5, 0.9, 0.3])
        state = jax.random.uniform(key, (3,), minval=low, maxval=high)
        return state, observe(state)

    def step(key: PRNGKeyArray, state: Float[Array, 3], action: Float[Array, 2]) -> Step:
        x, z, hole = state
        move = stride * jnp.clip(action, -1.0, 1.0)
        moved = x + move[0] + noise * jax.random.normal(key)
        inside = z < 0
        walls = jnp.where(inside, hole - radius, -1.0), jnp.where(inside, hole + radius, 1.0)
        moved = jnp.clip(moved, *walls)
        height = jnp.clip(z + move[1], -depth, 1.0)
        fits = inside | (jnp.abs(moved - hole) <= radius)  # at a wall the distance may round up
        height = jnp.where(fits, height, jnp.maximum(height, 0.0))
        state = jnp.stack([moved, height, hole])
        done = height <= -depth
        return Step(state, observe(state), done.astype(jnp.float32), done, jnp.bool_(False))

    env = Environment(reset, step, Box((4,)), Box((2,), -1.0, 1.0), "PegInsertion")
    return with_time_limit(env, max_steps)
