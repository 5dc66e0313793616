"""Advantages between and within the halves of a group, split at the median of a metric."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.advantages import _common


def median_split(
    metric: Float[Array, " B"] | Int[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Bool[Array, " B"]:
    """True for the upper half of each group by the metric.

    Of n counted rows, sorted ascending with ties in the batch's order, the first `floor(n/2)` are
    the lower half and the rest the upper.

    Args:
      metric: any numbers, integer or floating; only their order within a group matters.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      where: rows that count; None for all. The others are true where their metric is at least the
        least of their group's upper half.

    Returns:
      bool `[B]`; true in a group of one. Traced NaN counts as the largest number.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range; concrete NaN.

    Source: CANON, 2025, arXiv 2509.23962.
    """
    _checks.rank("metric", metric, 1)
    _checks.same_shape(metric=metric, group_ids=group_ids, where=where)
    if _checks.is_concrete(metric) and np.isnan(np.asarray(metric, float)).any():
        raise ValueError("metric: expected numbers, got NaN")
    x = jnp.asarray(metric)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    counted = jnp.ones(x.shape, bool) if where is None else jnp.asarray(where)
    options: dict[str, Any] = {"num_segments": num_groups}
    n = segments.per_row(segments.count(group_ids, where=counted, **options), group_ids)
    sizes = segments.count(group_ids, **options)
    start = segments.per_row(jnp.cumsum(sizes) - sizes, group_ids)
    order = jnp.lexsort((x, ~counted, jnp.asarray(group_ids)))
    position = jnp.zeros(x.shape, jnp.int32).at[order].set(jnp.arange(x.size, dtype=jnp.int32))
    upper = counted & (position - start >= jnp.floor(n / 2))
    least = segments.minimum(x, group_ids, where=upper, **options)
    return jnp.where(counted, upper, x >= segments.per_row(least, group_ids))


def conditional_advantage(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    high: Bool[Array, " B"],
    *,
    num_groups: int,
    mix: float | Float[Array, ""] = 1.0,
    high_discount: float | Float[Array, ""] = 1.0,
    low_discount: float | Float[Array, ""] = 1.0,
    offset: float | Float[Array, ""] = 0.0,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Rewards compared with the other half of the group and with the own half, mixed.

        inter_i = R_i - mean of the other half's R
        intra_i = R_i - mean of the own half's R
        A_i = μ inter_i + (1 - μ) intra_i

    With μ = 1/2 and halves of equal size this is `centered`; a larger μ amplifies whatever the
    metric has to do with the reward, in either direction. The direction may be tilted: discounts
    scale a half's rewards wherever they enter `inter`, and the offset is added to it on the upper
    half and subtracted on the lower.

    Args:
      rewards: one per sample; not finite where the verifier failed.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      high: the half of each sample, from `median_split`.
      num_groups: static.
      mix: μ in [0, 1]; may be traced.
      high_discount, low_discount: ≥ 0, 1 for none; may be traced. By length, `high_discount` < 1
        favours short responses; by entropy, `low_discount` < 1 favours uncertain ones.
      offset: 0 for none; may be traced.
      where: rows that count in the statistics, such as the first row of each trajectory; None for
        all.

    Returns:
      f32 `[B]`. In a group of at most one counted row there is no baseline, and the advantage is
      the raw reward; a half without counted rows has mean 0. Exactly 0 where all rewards of a group
      are equal and nothing is tilted; 0 for non-finite rewards.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids or concrete numbers out of
        range.

    Source: CANON, 2025, arXiv 2509.23962, equations 5 and 8.
    """
    _checks.in_range("mix", mix, 0.0, 1.0)
    _checks.in_range("high_discount", high_discount, 0.0, high_open=True)
    _checks.in_range("low_discount", low_discount, 0.0, high_open=True)
    _checks.rank("rewards", rewards, 1)
    _checks.same_shape(rewards=rewards, group_ids=group_ids, high=high)
    _checks.boolean(high=high)
    x, finite, counted = _common.finite_part(rewards, where)
    n = segments.per_row(
        segments.count(group_ids, num_segments=num_groups, where=counted), group_ids
    )
    own = 2 * jnp.asarray(group_ids) + high
    other = 2 * jnp.asarray(group_ids) + ~jnp.asarray(high)
    options: dict[str, Any] = {"num_segments": 2 * num_groups, "where": counted}
    intra = segments.deviations(x, own, **options)
    others = segments.per_row(segments.mean(x, own, **options), other)
    own_discount = jnp.where(high, high_discount, low_discount)
    other_discount = jnp.where(high, low_discount, high_discount)
    inter = own_discount * x - other_discount * others + jnp.where(high, offset, -offset)
    mixed = jnp.where(n <= 1, x, mix * inter + (1 - mix) * intra)
    return jnp.where(finite, mixed, 0.0)
