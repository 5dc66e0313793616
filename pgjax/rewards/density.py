"""How often an episode's rewards are paid out."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks


def sparsify(
    rewards: Float[Array, "*B M"], valid: Bool[Array, "*B M"], *, every: int
) -> Float[Array, "*B M"]:
    """Rewards saved up and paid out at every n-th valid step, and at the last one.

    The total is kept. `every=1` changes nothing (dense), `every >= M` pays all at the end (sparse),
    in between is in between.

    Args:
      rewards: one a step or turn.
      valid: steps that took place; rewards elsewhere count nowhere.
      every: n ≥ 1, static.

    Returns:
      `[..., M]`, 0 at steps that are not valid.

    Raises:
      ValueError: unequal shapes, wrong dtypes, `every` < 1.

    Source: reward densities of Wang and Ammanabrolu 2025, arXiv 2510.01132. There, sparse rewards
    are for success alone, see `only_complete`.
    """
    _checks.floating(rewards=rewards)
    _checks.boolean(valid=valid)
    _checks.same_shape(rewards=rewards, valid=valid)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    x = jnp.where(valid, rewards, 0.0)
    number = jnp.cumsum(valid, axis=-1)
    last = _last(valid)
    period = jnp.where(valid, (number - 1) // every, -1)
    # Sum of the step's own period up to it, which is the whole period where it is paid out.
    same = (period[..., :, None] == period[..., None, :]) & valid[..., None, :]
    total = jnp.sum(jnp.where(same, x[..., None, :], 0.0), axis=-1)
    return jnp.where(valid & ((number % every == 0) | last), total, 0.0)


def only_complete(
    rewards: Float[Array, "*B M"], valid: Bool[Array, "*B M"], *, goal: float
) -> Float[Array, "*B M"]:
    """The total at the last valid step if it reaches the goal, else nothing: reward for success.

    Args:
      rewards, valid: as in `sparsify`.
      goal: total of an episode that succeeded; reached to within rounding (1e-4 of it).

    Returns:
      `[..., M]`, 0 but for the last valid step.

    Raises:
      ValueError: unequal shapes or wrong dtypes.

    Source: as `sparsify`.
    """
    _checks.floating(rewards=rewards)
    _checks.boolean(valid=valid)
    _checks.same_shape(rewards=rewards, valid=valid)
    total = jnp.sum(jnp.where(valid, rewards, 0.0), axis=-1, keepdims=True)
    done = total >= goal - 1e-4 * abs(goal)
    return jnp.where(_last(valid) & done, total, 0.0)


def _last(valid: Array) -> Array:
    later = jnp.cumsum(valid[..., ::-1], axis=-1)[..., ::-1]
    return valid & (later == 1)
