"""Advantages scaled by the whole batch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.advantages import _common
from pgjax.advantages.group import centered


def batch_normalize(
    rewards: Float[Array, " B"],
    *,
    epsilon: float = 1e-6,
    ddof: int = 1,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward normalised over the batch, `A_i = (R_i - mean R) / (std R + ε)`.

    Args:
      rewards: one per sample; not finite where the verifier failed.
      epsilon: ε ≥ 0.
      ddof: 1 for the sample standard deviation, 0 for the population's; static.
      where: rows that count in the statistics; None for all. The others still get an advantage.

    Returns:
      f32 `[B]`; 0 everywhere if fewer than two rows count or all their rewards are equal, and for
      non-finite rewards.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; `epsilon` < 0, `ddof` neither 0 nor 1.
    """
    _common.check_scale(epsilon, ddof)
    _checks.rank("rewards", rewards, 1)
    x, finite, counted = _common.finite_part(rewards, where)
    deviation, spread = _common.deviations_and_std(x, counted, ddof)
    return jnp.where(finite, _common.divided(deviation, spread, spread + epsilon), 0.0)


def group_mean_batch_std(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    epsilon: float = 1e-6,
    ddof: int = 1,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Group mean, batch scale: `A_i = (R_i - mean_g R) / (std_batch R + ε)`.

    The standard deviation is that of the batch's raw rewards, not of the centred ones, so it also
    contains how much the groups' means differ.

    Args:
      rewards, epsilon, ddof: as in `batch_normalize`.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      where: rows that count in both statistics; None for all. The others still get an advantage.

    Returns:
      f32 `[B]`; 0 in a group of one, where all rewards of a group are equal, and for non-finite
      rewards; 0 everywhere if fewer than two rows count or all their rewards are equal.

    Raises:
      ValueError: as `batch_normalize`; concrete ids out of range.

    Source: Lite PPO in "Tricks or Traps?", Liu et al. 2025, arXiv 2508.08221.
    """
    _common.check_scale(epsilon, ddof)
    deviation = centered(rewards, group_ids, num_groups=num_groups, where=where)
    x, _, counted = _common.finite_part(rewards, where)
    _, spread = _common.deviations_and_std(x, counted, ddof)
    return _common.divided(deviation, spread, spread + epsilon)
