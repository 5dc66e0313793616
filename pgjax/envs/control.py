"""The classic control tasks: cart-pole, acrobot, mountain car, pendulum, point mass.

Dynamics and constants are those of Gymnasium's versions named at each function, so that returns can
be compared; the pendulum and the point mass are differentiable in state and action.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax.envs.core import Box, Discrete, Environment, Step, with_time_limit


def cart_pole(max_steps: int = 500) -> Environment:
    """A pole on a cart that is pushed left (0) or right (1); reward 1 a step while it stands.

    State and observation: position, velocity, angle, angular velocity, f32 `[4]`; an episode
    terminates 2.4 from the middle or 12 degrees from upright.

    Args:
      max_steps: after which an episode is truncated; 500 is CartPole-v1.

    Source: Barto, Sutton and Anderson 1983; Gymnasium's CartPole-v1.
    """
    gravity, cart, pole, half_length, push, tau = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    total, pole_moment = cart + pole, pole * half_length

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        state = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return state, state

    def step(key: PRNGKeyArray, state: Float[Array, 4], action: Int[Array, ""]) -> Step:
        _, velocity, angle, spin = state
        force = jnp.where(action == 1, push, -push)
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        pushed = (force + pole_moment * jnp.square(spin) * sine) / total
        spin_change = (gravity * sine - cosine * pushed) / (
            half_length * (4.0 / 3.0 - pole * jnp.square(cosine) / total)
        )
        change = pushed - pole_moment * spin_change * cosine / total
        state = state + tau * jnp.stack([velocity, change, spin, spin_change])
        fallen = (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 12 * np.pi / 180)
        return Step(state, state, jnp.float32(1.0), fallen, jnp.bool_(False))

    env = Environment(reset, step, Box((4,)), Discrete(2), "CartPole-v1")
    return with_time_limit(env, max_steps)


def mountain_car(max_steps: int = 200) -> Environment:
    """A car too weak for the hill, pushed left, not at all or right; reward -1 a step.

    State and observation: position, velocity, f32 `[2]`.

    Source: Moore 1990; Gymnasium's MountainCar-v0.
    """

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        state = jnp.stack([jax.random.uniform(key, minval=-0.6, maxval=-0.4), jnp.float32(0.0)])
        return state, state

    def step(key: PRNGKeyArray, state: Float[Array, 2], action: Int[Array, ""]) -> Step:
        x, velocity = state
        velocity = velocity + (action - 1) * 0.001 - 0.0025 * jnp.cos(3 * x)
        velocity = jnp.clip(velocity, -0.07, 0.07)
        x = jnp.clip(x + velocity, -1.2, 0.6)
        velocity = jnp.where((x == -1.2) & (velocity < 0), 0.0, velocity)
        state = jnp.stack([x, velocity])
        there = (x >= 0.5) & (velocity >= 0)
        return Step(state, state, jnp.float32(-1.0), there, jnp.bool_(False))

    env = Environment(reset, step, Box((2,)), Discrete(3), "MountainCar-v0")
    return with_time_limit(env, max_steps)


def acrobot(max_steps: int = 500) -> Environment:
    """Two links, of which the joint is driven by -1, 0 or 1, swing their tip up; reward -1 a step.

    State: the two angles and their velocities; observation: cosine and sine of both angles, and the
    velocities, f32 `[6]`. The tip is up when -cos θ₁ - cos(θ₁ + θ₂) > 1, which ends the episode
    with reward 0. One step is one Runge-Kutta step of 0.2 seconds.

    Source: Sutton 1996, with the book's equations; Gymnasium's Acrobot-v1.
    """
    gravity, mass, length, centre, inertia = 9.8, 1.0, 1.0, 0.5, 1.0
    limits = np.array([4 * np.pi, 9 * np.pi], np.float32)

    def observe(state: Array) -> Array:
        one, two = state[0], state[1]
        return jnp.stack(
            [jnp.cos(one), jnp.sin(one), jnp.cos(two), jnp.sin(two), state[2], state[3]]
        )

    def derivative(state: Array, torque: Array) -> Array:
        one, two, v1, v2 = state
        cosine, sine = jnp.cos(two), jnp.sin(two)
        d1 = mass * centre**2 + mass * (length**2 + centre**2 + 2 * length * centre * cosine)
        d1 = d1 + 2 * inertia
        d2 = mass * (centre**2 + length * centre * cosine) + inertia
        phi2 = mass * centre * gravity * jnp.cos(one + two - np.pi / 2)
        phi1 = (
            -mass * length * centre * jnp.square(v2) * sine
            - 2 * mass * length * centre * v2 * v1 * sine
            + (mass * centre + mass * length) * gravity * jnp.cos(one - np.pi / 2)
            + phi2
        )
        a2 = (torque + d2 / d1 * phi1 - mass * length * centre * jnp.square(v1) * sine - phi2) / (
            mass * centre**2 + inertia - jnp.square(d2) / d1
        )
        a1 = -(d2 * a2 + phi1) / d1
        return jnp.stack([v1, v2, a1, a2])

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        state = jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1)
        return state, observe(state)

    def step(key: PRNGKeyArray, state: Float[Array, 4], action: Int[Array, ""]) -> Step:
        torque, h = jnp.asarray(action - 1, jnp.float32), 0.2
        k1 = derivative(state, torque)
        k2 = derivative(state + h / 2 * k1, torque)
        k3 = derivative(state + h / 2 * k2, torque)
        k4 = derivative(state + h * k3, torque)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles = _wrapped(state[:2])
        state = jnp.concatenate([angles, jnp.clip(state[2:], -limits, limits)])
        up = -jnp.cos(angles[0]) - jnp.cos(angles[0] + angles[1]) > 1.0
        return Step(state, observe(state), jnp.where(up, 0.0, -1.0), up, jnp.bool_(False))

    env = Environment(reset, step, Box((6,)), Discrete(3), "Acrobot-v1")
    return with_time_limit(env, max_steps)


def pendulum(max_steps: int = 200) -> Environment:
    """A pendulum to swing up and hold with a torque in [-2, 2]; never terminates.

    State: angle from upright and velocity; observation: cosine, sine, velocity, f32 `[3]`; reward
    -(θ² + 0.1 v² + 0.001 u²), before the step, with θ in [-π, π).

    Source: Gymnasium's Pendulum-v1.
    """
    gravity, mass, length, tau = 10.0, 1.0, 1.0, 0.05

    def observe(state: Array) -> Array:
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        high = jnp.array([np.pi, 1.0])
        state = jax.random.uniform(key, (2,), minval=-high, maxval=high)
        return state, observe(state)

    def step(key: PRNGKeyArray, state: Float[Array, 2], action: Float[Array, 1]) -> Step:
        angle, velocity = state
        torque = jnp.clip(jnp.reshape(action, ()), -2.0, 2.0)
        cost = jnp.square(_wrapped(angle)) + 0.1 * jnp.square(velocity) + 0.001 * jnp.square(torque)
        change = 3 * gravity / (2 * length) * jnp.sin(angle) + 3.0 / (mass * length**2) * torque
        velocity = jnp.clip(velocity + tau * change, -8.0, 8.0)
        state = jnp.stack([angle + tau * velocity, velocity])
        return Step(state, observe(state), -cost, jnp.bool_(False), jnp.bool_(False))

    env = Environment(reset, step, Box((3,)), Box((1,), -2.0, 2.0), "Pendulum-v1")
    return with_time_limit(env, max_steps)


def point_mass(max_steps: int = 100, *, size: int = 2, noise: float = 0.0) -> Environment:
    """A mass in `size` dimensions, pushed towards the origin; never terminates.

    State and observation: position and velocity, f32 `[2 size]`. One step of 0.1 seconds: velocity
    += 0.1 u, position += 0.1 velocity, with the action u in [-1, 1]; reward
    -(|position|² + 0.1 |velocity|² + 0.01 |u|²), before the step. Starts in [-1, 1] at rest.

    Args:
      max_steps: after which an episode is truncated.
      size: dimensions.
      noise: standard deviation of what is added to the velocity each step.
    """

    def reset(key: PRNGKeyArray) -> tuple[Array, Array]:
        position = jax.random.uniform(key, (size,), minval=-1.0, maxval=1.0)
        state = jnp.concatenate([position, jnp.zeros(size)])
        return state, state

    def step(key: PRNGKeyArray, state: Float[Array, " S"], action: Float[Array, " A"]) -> Step:
        position, velocity = state[:size], state[size:]
        push = jnp.clip(action, -1.0, 1.0)
        cost = (
            jnp.sum(jnp.square(position))
            + 0.1 * jnp.sum(jnp.square(velocity))
            + 0.01 * jnp.sum(jnp.square(push))
        )
        shake = noise * jax.random.normal(key, (size,)) if noise else 0.0
        velocity = velocity + 0.1 * push + shake
        state = jnp.concatenate([position + 0.1 * velocity, velocity])
        return Step(state, state, -cost, jnp.bool_(False), jnp.bool_(False))

    env = Environment(reset, step, Box((2 * size,)), Box((size,), -1.0, 1.0), "PointMass")
    return with_time_limit(env, max_steps)


def _wrapped(angle: Any) -> Array:
    """In [-π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
