"""Rewards for getting nearer, which leave the best policy as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import widened

if TYPE_CHECKING:
    from pgjax.envs.core import Environment, Step


def potential_shaping(
    potentials: Float[Array, "*B"],
    next_potentials: Float[Array, "*B"],
    terminated: Bool[Array, "*B"] | None = None,
    *,
    discount: float,
) -> Float[Array, "*B"]:
    """F = γ Φ(s') - Φ(s), with Φ = 0 where an episode has terminated.

    Over an episode γ^t F_t adds up to -Φ(s₀), so that all policies' returns change alike, and the
    best one stays best.

    Args:
      potentials: Φ(s), `[...]`.
      next_potentials: Φ(s') before any reset, of the same shape.
      terminated: no state follows; of the same shape. None counts Φ(s') everywhere, also at the
        end, where what an episode gets then depends on where it ends.
      discount: γ in [0, 1], the one that returns are discounted by.

    Returns:
      f32 of the same shape.

    Raises:
      ValueError: unequal shapes, wrong dtypes, γ outside [0, 1].

    Source: Ng, Harada and Russell 1999, "Policy invariance under reward transformations"; on web
    forms QWeb, Gur et al. 2018, arXiv 1812.09195.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _checks.floating(potentials=potentials, next_potentials=next_potentials)
    _checks.same_shape(
        potentials=potentials, next_potentials=next_potentials, terminated=terminated
    )
    following = widened(next_potentials)
    if terminated is not None:
        _checks.boolean(terminated=terminated)
        following = jnp.where(terminated, 0.0, following)
    return discount * following - widened(potentials)


def with_potential(
    env: Environment,
    potential: Callable[[Any], Float[Array, ""]],
    *,
    discount: float,
    scale: float | Float[Array, ""] = 1.0,
    counts_at_end: bool = False,
) -> Environment:
    """The environment with `potential_shaping` added to its rewards.

    Args:
      env: the world.
      potential: `state -> Φ`, f32.
      discount: γ in [0, 1].
      scale: of what is added; it may be traced, so that one program serves with and without.
      counts_at_end: what an episode got to when it terminates stays its own, Φ(s') being counted
        there as well. Returns then change by γ^T Φ(s_T) - Φ(s₀): the best policy is the same only
        if its episodes end in states of the highest potential, as those do that reach a goal.

    Raises:
      ValueError: γ outside [0, 1].
    """
    _checks.in_range("discount", discount, 0.0, 1.0)

    def step(key: PRNGKeyArray, state: Any, action: Any) -> Step:
        found = env.step(key, state, action)
        over = None if counts_at_end else found.terminated
        extra = potential_shaping(potential(state), potential(found.state), over, discount=discount)
        return found._replace(reward=found.reward + scale * extra)

    return dataclasses.replace(env, step=step)
