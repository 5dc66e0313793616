"""Weights that multiply the finished advantages of a whole group."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments


class RolloutUtility(NamedTuple):
    """What the current samples of each group say about learning from it.

    Attributes:
      success_rate: share of samples that succeed.
      longest_success: length of the longest sample that succeeds; 0 if none does.
      mean_failure: mean length of the failures that ended by themselves; 0 if there are none.
      has_success, has_failure: whether there are any of either.
    """

    success_rate: Float[Array, " S"]
    longest_success: Float[Array, " S"]
    mean_failure: Float[Array, " S"]
    has_success: Bool[Array, " S"]
    has_failure: Bool[Array, " S"]


def rollout_utility(
    rewards: Float[Array, " B"],
    lengths: Int[Array, " B"] | Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    max_length: float,
    success_threshold: float = 0.5,
    where: Bool[Array, " B"] | None = None,
) -> RolloutUtility:
    """Success rate and lengths of successes and failures, by group.

    A sample succeeds if its reward is above the threshold. A failure of `max_length` or more was
    cut off and counts in no mean length, though it counts in the success rate.

    Args:
      rewards: one per sample; those that are not finite count nowhere.
      lengths: tokens of each response, ≥ 0.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: static.
      max_length: > 0; released code takes the generation budget less 2.
      success_threshold: of the reward.
      where: rows that count, such as the first row of each trajectory; None for all.

    Returns:
      statistics `[S]`; those of an empty group are 0 and false.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids or lengths out of range.
    """
    _checks.rank("rewards", rewards, 1)
    _checks.floating(rewards=rewards)
    _checks.same_shape(rewards=rewards, lengths=lengths, group_ids=group_ids, where=where)
    _checks.in_range("max_length", max_length, 0.0, low_open=True)
    _checks.in_range("success_threshold", success_threshold)
    if _checks.is_concrete(lengths) and np.any(np.asarray(lengths) < 0):
        raise ValueError(f"lengths: expected numbers of at least 0, got {np.min(lengths)}")
    counted = jnp.isfinite(rewards) if where is None else jnp.isfinite(rewards) & where
    success = counted & (jnp.asarray(rewards) > success_threshold)
    failure = counted & ~success & (jnp.asarray(lengths) < max_length)
    options: dict[str, Any] = {"num_segments": num_groups}
    successes = segments.count(group_ids, where=success, **options)
    samples = segments.count(group_ids, where=counted, **options)
    return RolloutUtility(
        success_rate=successes / jnp.maximum(samples, 1),
        longest_success=segments.maximum(lengths, group_ids, where=success, **options),
        mean_failure=segments.mean(lengths, group_ids, where=failure, **options),
        has_success=successes > 0,
        has_failure=segments.count(group_ids, where=failure, **options) > 0,
    )


def success_is_longer(
    utility: RolloutUtility, *, without_success: bool = False, without_failure: bool = False
) -> Bool[Array, " S"]:
    """True where the longest success is longer than the mean failure.

    Args:
      utility: from `rollout_utility`.
      without_success: the answer for groups without success.
      without_failure: the answer for groups with success but no failure that counts.

    Returns:
      bool `[S]`.

    Source: ADORA, 2026, arXiv 2602.10019. The two released programs answer in opposite ways where
    there is nothing to compare: (true, false) in that for vision models, (false, true) in that for
    text. It matters with shaped rewards only; otherwise such groups have no advantages.
    """
    longer = utility.longest_success > utility.mean_failure
    longer = jnp.where(utility.has_failure, longer, without_failure)
    return jnp.where(utility.has_success, longer, without_success)


def success_is_rare(utility: RolloutUtility, *, rate: float = 0.5) -> Bool[Array, " S"]:
    """True where the success rate is at most `rate`, groups without any success included.

    Args:
      utility: from `rollout_utility`.
      rate: in [0, 1].

    Returns:
      bool `[S]`.

    Raises:
      ValueError: `rate` out of range.

    Source: ADORA, 2026, arXiv 2602.10019.
    """
    _checks.in_range("rate", rate, 0.0, 1.0)
    return utility.success_rate <= rate


def utility_weights(
    advantageous: Bool[Array, " S"], *, low: float = 1.0, high: float = 2.0
) -> Float[Array, " S"]:
    """`high` for groups whose samples are worth learning from at present, `low` for the others.

    Multiply the advantages of all samples of a group by its weight: neither their signs nor their
    proportions within the group change.

    Args:
      advantageous: from `success_is_longer`, `success_is_rare`, or both combined by `&` or `|`.
      low, high: ≥ 0. (1, 2) amplifies, as the paper does for text; (0.1, 1) attenuates, as it
        does for vision.

    Returns:
      f32 `[S]`.

    Raises:
      ValueError: wrong rank or dtype, negative weights.

    Source: ADORA, 2026, arXiv 2602.10019.
    """
    _checks.rank("advantageous", advantageous, 1)
    _checks.boolean(advantageous=advantageous)
    _checks.in_range("low", low, 0.0, high_open=True)
    _checks.in_range("high", high, 0.0, high_open=True)
    return jnp.where(advantageous, high, low).astype(jnp.float32)
