"""Pieces that several recipes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from pgjax import _checks, segments, surrogates
from pgjax.objectives.objective import Regularizer
from pgjax.objectives.regularizers import kl_to_reference
from pgjax.types import PolicyOutputs, Rollout


def by_group(function: Callable[..., Array], **options: float) -> Callable[[Rollout], Array]:
    """An advantage function of `(rewards, group_ids)` as a function of the rollout.

    Statistics count each trajectory once, by its first row, and all its rows get that row's
    advantage.
    """

    def advantage(rollout: Rollout) -> Array:
        ids, first = rollout.trajectory_ids, None
        if ids is not None:
            first = segments.first_rows(ids)
        result = function(
            rollout.rewards,
            rollout.group_ids,
            num_groups=rollout.rewards.shape[0],
            where=first,
            **options,
        )
        if ids is None:
            return result
        by_trajectory = segments.total(
            result, segments.dense_ids(ids), num_segments=ids.shape[0], where=first
        )
        return by_trajectory[segments.dense_ids(ids)]

    return advantage


def advantages_of(rollout: Rollout) -> Array:
    assert rollout.advantages is not None  # the objective has checked it
    return rollout.advantages


def clipped(low: float, high: float) -> Callable[[PolicyOutputs, Rollout], Array]:
    """PPO's clipped surrogate on token ratios."""
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("high", high, 0.0)

    def surrogate(outputs: PolicyOutputs, rollout: Rollout) -> Array:
        ratio = surrogates.importance_ratio(outputs.logprobs, rollout.behavior_logprobs)
        return surrogates.clipped(ratio, advantages_of(rollout), low=low, high=high)

    return surrogate


def score_function(outputs: PolicyOutputs, rollout: Rollout) -> Array:
    return surrogates.score_function(outputs.logprobs, advantages_of(rollout))


def kl_penalty(coefficient: float) -> tuple[Regularizer, ...]:
    _checks.in_range("kl_coefficient", coefficient, 0.0)
    return (kl_to_reference(coefficient),) if coefficient else ()


def memory_of(rollout: Rollout) -> Any:
    """What the objective kept from earlier batches."""
    assert rollout.memory is not None  # the objective has filled it
    return rollout.memory
