"""Advantages relative to the other samples of the same prompt."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.advantages import _common


def centered(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward minus the mean reward of the group, `A_i = R_i - mean_g R`.

    The mean contains the sample itself, so with one on-policy step and groups of G the expected
    gradient is `(1 - 1/G)` times the true one.

    Args:
      rewards: one per sample; not finite where the verifier failed.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      where: rows that count in the statistics, such as the first row of each trajectory; None for
        all. The others still get an advantage relative to the statistics.

    Returns:
      f32 `[B]`; 0 in a group of one, for equal rewards (exactly) and for non-finite rewards. In a
      group where no row counts the mean is 0.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range.

    Source: Dr. GRPO, Liu et al. 2025, arXiv 2503.20783.
    """
    x, finite, counted = _prepared(rewards, group_ids, num_groups, where)
    deviation = segments.deviations(x, group_ids, num_segments=num_groups, where=counted)
    return jnp.where(finite, deviation, 0.0)


def group_normalize(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    epsilon: float = 1e-6,
    ddof: int = 1,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward normalised within the group, `A_i = (R_i - mean_g R) / (std_g R + ε)`.

    Args:
      rewards, group_ids, num_groups, where: as in `centered`.
      epsilon: ε ≥ 0.
      ddof: 1 for the sample standard deviation, 0 for the population's; static.

    Returns:
      f32 `[B]`; the raw reward in a group of at most one counted row (mean 0 and scale 1, as widely
      used code has it); exactly 0 where all counted rewards of the group are equal (for rows that
      do not count, too) and for non-finite rewards.

    Raises:
      ValueError: as `centered`; `epsilon` < 0, `ddof` neither 0 nor 1.

    Source: GRPO, Shao et al. 2024, arXiv 2402.03300. The paper does not say which standard
    deviation; implementations use `ddof=1`.
    """
    _common.check_scale(epsilon, ddof)
    x, finite, counted = _prepared(rewards, group_ids, num_groups, where)
    options: dict[str, Any] = {"num_segments": num_groups, "where": counted}
    deviation = segments.deviations(x, group_ids, **options)
    spread = segments.per_row(segments.std(x, group_ids, ddof=ddof, **options), group_ids)
    n = segments.per_row(segments.count(group_ids, **options), group_ids)
    normal = _common.divided(deviation, spread, spread + epsilon)
    return jnp.where(finite, jnp.where(n <= 1, x, normal), 0.0)


def leave_one_out(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward minus the mean of the group's other rewards, `A_i = R_i - mean_{j≠i} R_j`.

    Equal to `n/(n-1) (R_i - mean_g R)` for n counted rows. The baseline does not depend on the
    sample, so with one on-policy step the expected gradient is the true one.

    Args:
      rewards, group_ids, num_groups: as in `centered`.
      where: rows that count, such as the first row of each trajectory; None for all. The others are
        taken for further rows of a trajectory that counts, with that trajectory's reward, and get
        what its counted row gets: `n/(n-1) (R_i - mean_g R)`. Only so does no row's baseline
        contain its own reward.

    Returns:
      f32 `[B]`; the raw reward in a group of at most one counted row, whose baseline is empty; 0
      for equal rewards (exactly) and for non-finite rewards.

    Raises:
      ValueError: as `centered`.

    Source: RLOO, Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019.
    """
    x, finite, counted = _prepared(rewards, group_ids, num_groups, where)
    options: dict[str, Any] = {"num_segments": num_groups, "where": counted}
    deviation = segments.deviations(x, group_ids, **options)
    n = segments.per_row(segments.count(group_ids, **options).astype(x.dtype), group_ids)
    advantage = jnp.where(n <= 1, x, n / jnp.maximum(n - 1, 1) * deviation)
    return jnp.where(finite, advantage, 0.0)


def _prepared(
    rewards: Any, group_ids: Any, num_groups: int, where: Any
) -> tuple[Array, Array, Array]:
    _checks.rank("rewards", rewards, 1)
    _checks.same_shape(rewards=rewards, group_ids=group_ids)
    return _common.finite_part(rewards, where)
