"""Corrections of a policy that stays as it is: residual actions, and plans of several actions.

A base policy plans a chunk of H actions from one observation, as diffusion policies and other
imitators do; in every step a learner adds a small correction to the chunk's next action. What a
learner sees and what is executed are these functions; `agents.with_base_policy` puts them around an
environment, so that any agent learns the corrections.

Source: ResiP, Ankile et al. 2024, arXiv 2407.16677.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks

USUAL = 1.5  # normalised actions are within ±1, and a little more where a plan overshoots

Plan = Callable[[PRNGKeyArray, Any], Float[Array, "*B H A"]]


def residual_action(
    base_action: Float[Array, "*B A"], correction: Float[Array, "*B A"], *, scale: float = 0.1
) -> Float[Array, "*B A"]:
    """What is executed, a = a_base + α δ; no gradient reaches the base.

    A Gaussian log-prob of δ and that of a, with mean a_base + α m and deviation α σ, differ by the
    constant A log α, so that ratios of either are the same.

    Args:
      base_action: a_base, normalised.
      correction: δ, of the same shape.
      scale: α ≥ 0.

    Raises:
      ValueError: unequal shapes, a scale below 0.
    """
    _checks.same_shape(base_action=base_action, correction=correction)
    _checks.in_range("scale", scale, 0.0)
    return jax.lax.stop_gradient(base_action) + scale * correction


def residual_observation(
    observation: Float[Array, "*B O"], base_action: Float[Array, "*B A"], *, clip: float = 3.0
) -> Float[Array, "*B O+A"]:
    """What the correction depends on: [clip(s, ±c), a_base]; no gradient reaches the base.

    Args:
      observation: s, normalised.
      base_action: a_base, batched like s.
      clip: c > 0.

    Raises:
      ValueError: axes in front of the last that differ, a `clip` of 0 or below.
    """
    _checks.in_range("clip", clip, 0.0, low_open=True)
    front, other = np.shape(observation)[:-1], np.shape(base_action)[:-1]
    if front != other:
        raise ValueError(f"base_action: expected axes {front} in front of the last, got {other}")
    kept = jnp.clip(observation, -clip, clip)
    return jnp.concatenate([kept, jax.lax.stop_gradient(base_action)], axis=-1)


def residual_target(
    action: Float[Array, "*B A"], base_action: Float[Array, "*B A"], *, scale: float = 0.1
) -> Float[Array, "*B A"]:
    """The correction that executes an expert's action, δ = (a - a_base)/α: to imitate it first.

    Raises:
      ValueError: unequal shapes, a scale of 0 or below.
    """
    _checks.same_shape(action=action, base_action=base_action)
    _checks.in_range("scale", scale, 0.0, low_open=True)
    return jax.lax.stop_gradient((action - base_action) / scale)


def residual_penalty(
    mean: Float[Array, "*B A"], *, l1: float = 0.0, l2: float = 0.0
) -> Float[Array, "*B"]:
    """What large corrections cost, l₁ mean_d |m_d| + l₂ mean_d m_d², for each sample.

    Its slope is 0 at m = 0, where corrections start.

    Raises:
      ValueError: a weight below 0.
    """
    _checks.in_range("l1", l1, 0.0)
    _checks.in_range("l2", l2, 0.0)
    # JAX takes the slope of |m| at 0 to be 1, which would push corrections away from their start.
    size = mean * jax.lax.stop_gradient(jnp.sign(mean))
    return l1 * size.mean(-1) + l2 * jnp.square(mean).mean(-1)


class Chunk(NamedTuple):
    """Planned actions, and how many of them have been taken.

    Attributes:
      actions: f32 `[..., H, A]`.
      taken: int32 `[...]`; H where a new plan is due.
    """

    actions: Float[Array, "*B H A"]
    taken: Int[Array, "*B"]


def chunk_init(*batch: int, horizon: int, size: int) -> Chunk:
    """Used-up chunks, so that the next step plans: of H = `horizon` actions with `size` entries.

    Raises:
      ValueError: a horizon or a size below 1.
    """
    _checks.in_range("horizon", horizon, 1)
    _checks.in_range("size", size, 1)
    return Chunk(jnp.zeros((*batch, horizon, size)), jnp.full(batch, horizon, jnp.int32))


def chunk_step(
    key: PRNGKeyArray, chunk: Chunk, plan: Plan, observation: Any
) -> tuple[Float[Array, "*B A"], Chunk]:
    """The next planned action; where a chunk is used up, a new plan's first.

    `plan` is asked where any chunk of the batch is used up, and then of the whole batch; the others
    keep theirs. Under `vmap` it is asked in every step, for a condition becomes a choice there.

    Args:
      key: of the plan.
      chunk: `[..., H, A]`.
      plan: `(key, observation [..., O]) -> actions [..., H, A]`.
      observation: of now.

    Returns:
      a_base `[..., A]`, without a gradient; the chunk after it.

    Raises:
      ValueError: a plan of another shape; where values can be looked at, one that is not finite.
        Under `jax.experimental.checkify` the latter is an error in compiled code as well.

    Warns:
      where values can be looked at and lie outside ±1.5: the plan is not in normalised units.
    """
    due = chunk.taken >= chunk.actions.shape[-2]
    wanted = chunk.actions.shape
    found = jax.eval_shape(plan, key, observation)
    if found.shape != wanted:
        raise ValueError(f"plan: expected actions of shape {wanted}, got {found.shape}")

    def renew(key: PRNGKeyArray, observation: Any) -> Array:
        return jnp.where(due[..., None, None], plan(key, observation), chunk.actions)

    actions = jax.lax.cond(
        due.any(), renew, lambda key, observation: chunk.actions, key, observation
    )
    actions = jax.lax.stop_gradient(actions)
    _check_plan(actions)
    at = jnp.where(due, 0, chunk.taken)
    action = jnp.take_along_axis(actions, at[..., None, None], axis=-2)[..., 0, :]
    return action, Chunk(actions, at + 1)


def chunk_reset(chunk: Chunk, ended: Array) -> Chunk:
    """The chunk with a new plan due where an episode has ended, bool `[...]`.

    Raises:
      ValueError: flags that are not bool, or not one for each chunk.
    """
    _checks.boolean(ended=ended)
    _checks.same_shape(taken=chunk.taken, ended=ended)
    return chunk._replace(taken=jnp.where(ended, chunk.actions.shape[-2], chunk.taken))


def _check_plan(actions: Array) -> None:
    _checks.traced(jnp.isfinite(actions).all(), "plan: expected finite actions")
    if not _checks.is_concrete(actions):
        return
    largest = float(np.max(np.abs(np.asarray(actions)), initial=0.0))
    if not np.isfinite(largest):
        raise ValueError("plan: expected finite actions, got NaN or infinity")
    if largest > USUAL:
        warnings.warn(
            f"plan: actions up to ±{largest:g}; normalised ones are within ±{USUAL}", stacklevel=3
        )
