"""What value functions are to predict: one-step and λ-targets, detached from what they are made of.

`discounts` is γ(1 - terminated) throughout. A time limit ends no value: truncation never enters it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pgjax import _checks, returns
from pgjax._arrays import widened


def one_step_targets(
    rewards: Float[Array, "*B"],
    next_values: Float[Array, "*B"],
    discounts: Float[Array, "*B"],
) -> Float[Array, "*B"]:
    """r + γ V(s'), of transitions in any order: the axes mean nothing here.

    Args:
      rewards: `[...]`.
      next_values: V(s') of the state before any reset, of the same shape: `greedy_values` for
        Q-learning, the smaller of two critics for TD3 and SAC.
      discounts: γ(1 - terminated), of the same shape.

    Returns:
      f32 of the same shape; no gradient flows through it.

    Raises:
      ValueError: unequal shapes, wrong dtypes.

    Source: Sutton 1988, "Learning to predict by the methods of temporal differences".
    """
    arrays = {"rewards": rewards, "next_values": next_values, "discounts": discounts}
    _checks.floating(**arrays)
    _checks.same_shape(**arrays)
    found = widened(rewards) + widened(discounts) * widened(next_values)
    return jax.lax.stop_gradient(found)


def q_lambda_targets(
    rewards: Float[Array, "*B T"],
    next_action_values: Float[Array, "*B T A"],
    discounts: Float[Array, "*B T"],
    *,
    lambda_: float,
    truncated: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B T"]:
    """Q(λ): the λ-returns of the greedy value of what was met, exploration not cut.

    G_t = r_t + γ_t ((1 - λ) max_a Q(s_{t+1}, a) + λ G_{t+1}), and
    G_t = r_t + γ_t max_a Q(s_{t+1}, a) at truncated steps and at the last one.

    Args:
      rewards: `[..., T]`.
      next_action_values: Q(s_{t+1}, ·), `[..., T, A]`, that behind the last step included.
      discounts: γ(1 - terminated), `[..., T]`.
      lambda_: in [0, 1].
      truncated: bool `[..., T]`.

    Returns:
      f32 `[..., T]`; no gradient flows through it.

    Raises:
      ValueError: as `returns.lambda_returns`, and action values of another `[..., T]`.

    Source: Peng and Williams 1994; in this form PQN, Gallici et al. 2024, arXiv 2407.04811.
    """
    following = greedy_values(next_action_values)
    if following.shape != np.shape(rewards):
        raise ValueError(
            f"next_action_values: expected shape {np.shape(rewards)} like rewards and an axis of "
            f"actions, got {np.shape(next_action_values)}"
        )
    found = returns.lambda_returns(
        rewards, following, discounts, lambda_=lambda_, truncated=truncated
    )
    return jax.lax.stop_gradient(found)


def greedy_values(action_values: Float[Array, "*B A"]) -> Float[Array, "*B"]:
    """max_a Q(a), f32 `[...]`.

    Raises:
      ValueError: no axis of actions, a dtype that is not floating.
    """
    return jnp.max(_by_action("action_values", action_values), axis=-1)


def double_greedy_values(
    action_values: Float[Array, "*B A"], target_action_values: Float[Array, "*B A"]
) -> Float[Array, "*B"]:
    """Q'(argmax_a Q(a)): one network chooses, the other judges, so that noise is not maximised.

    Args:
      action_values: Q of the network that learns, `[..., A]`.
      target_action_values: Q' of its older copy, `[..., A]`.

    Returns:
      f32 `[...]`.

    Raises:
      ValueError: unequal shapes, no axis of actions, dtypes that are not floating.

    Source: van Hasselt et al. 2015, arXiv 1509.06461.
    """
    _checks.same_shape(action_values=action_values, target_action_values=target_action_values)
    best = jnp.argmax(_by_action("action_values", action_values), axis=-1)
    judged = _by_action("target_action_values", target_action_values)
    return taken_values(judged, best)


def taken_values(action_values: Float[Array, "*B A"], actions: Array) -> Float[Array, "*B"]:
    """Q(a) of the actions taken, differentiable; the others get no gradient.

    Args:
      action_values: Q, `[..., A]`.
      actions: integers `[...]` in [0, A).

    Returns:
      f32 `[...]`.

    Raises:
      ValueError: unequal shapes, actions that are not integers.
    """
    found = _by_action("action_values", action_values)
    _checks.integer(actions=actions)
    if np.shape(actions) != found.shape[:-1]:
        raise ValueError(f"actions: expected shape {found.shape[:-1]}, got {np.shape(actions)}")
    return jnp.take_along_axis(found, jnp.asarray(actions)[..., None], axis=-1)[..., 0]


def _by_action(name: str, action_values: Array) -> Array:
    if np.ndim(action_values) < 1:
        raise ValueError(f"{name}: expected shape [..., A], got a scalar")
    _checks.floating(**{name: action_values})
    return widened(action_values)
