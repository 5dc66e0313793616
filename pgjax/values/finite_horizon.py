"""Planning and evaluation in a tabular world of H steps, by going backwards once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened


class Plan(NamedTuple):
    """Values by step.

    Attributes:
      action_values: Q_h(s, a), f32 `[H, S, A]`; greedy actions are its argmax.
      values: V_h(s), f32 `[H, S]`.
    """

    action_values: Float[Array, "H S A"]
    values: Float[Array, "H S"]


def optimistic_values(
    transitions: Float[Array, "H S A S"],
    rewards: Float[Array, "H S A"],
    bonuses: Float[Array, "H S A"] | None = None,
    *,
    cap: float = float("inf"),
) -> Plan:
    """Q_h = min(r_h + β_h + Σ_s' P_h(s'|·) V_{h+1}(s'), cap), V_h = max_a Q_h, V_H = 0.

    Without bonuses and cap it is the optimum of the model. With bonuses that exceed the model's
    error, and a cap of at least the optimum, it is at least the optimum of the world.

    Args:
      transitions: P, `[H, S, A, S]`.
      rewards: r, `[H, S, A]`.
      bonuses: β ≥ 0, `[H, S, A]`, such as `uncertainty.elliptical_bonus`; None for 0.
      cap: Contrastive UCB: 2 H.

    Returns:
      the values.

    Raises:
      ValueError: wrong shapes or dtypes, a horizon below 1, a cap that is not above 0.

    Source: finite-horizon value iteration, Bellman 1957; with bonus and cap Qiu et al. 2022
    (Contrastive UCB), arXiv 2207.14800.
    """
    _checks.in_range("cap", cap, 0.0, low_open=True)
    p, r = _world(transitions, rewards)
    if bonuses is not None:
        _checks.floating(bonuses=bonuses)
        _checks.same_shape(rewards=rewards, bonuses=bonuses)
        r = r + widened(bonuses)

    def back(following: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        p, r = now
        q = jnp.minimum(r + p @ following, cap)
        v = q.max(axis=-1)
        return v, (q, v)

    _, found = jax.lax.scan(back, jnp.zeros(p.shape[1], r.dtype), (p, r), reverse=True)
    return Plan(*found)


def policy_values(
    transitions: Float[Array, "H S A S"],
    rewards: Float[Array, "H S A"],
    policy: Float[Array, "H S A"],
) -> Plan:
    """Q and V of a policy: Q_h = r_h + Σ_s' P_h(s'|·) V_{h+1}(s'), V_h = Σ_a π_h(a|·) Q_h, V_H = 0.

    Args:
      transitions: P, `[H, S, A, S]`.
      rewards: r, `[H, S, A]`.
      policy: π_h(a|s), `[H, S, A]`, differentiable.

    Raises:
      ValueError: wrong shapes or dtypes, a horizon below 1.
    """
    p, r = _world(transitions, rewards)
    _checks.floating(policy=policy)
    _checks.same_shape(rewards=rewards, policy=policy)

    def back(
        following: Array, now: tuple[Array, Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        p, r, chance = now
        q = r + p @ following
        v = jnp.sum(chance * q, axis=-1)
        return v, (q, v)

    start = jnp.zeros(p.shape[1], r.dtype)
    _, found = jax.lax.scan(back, start, (p, r, widened(policy)), reverse=True)
    return Plan(*found)


def _world(transitions: Array, rewards: Array) -> tuple[Array, Array]:
    _checks.rank("rewards", rewards, 3)
    _checks.floating(transitions=transitions, rewards=rewards)
    horizon, states, actions = np.shape(rewards)
    if horizon < 1:
        raise ValueError("rewards: expected a horizon of at least 1, got 0 steps")
    wanted = (horizon, states, actions, states)
    if np.shape(transitions) != wanted:
        raise ValueError(f"transitions: expected shape {wanted}, got {np.shape(transitions)}")
    dtype = jnp.promote_types(jnp.result_type(transitions, rewards), jnp.float32)
    return jnp.asarray(transitions, dtype), jnp.asarray(rewards, dtype)
