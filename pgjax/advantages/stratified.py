"""Advantages relative to samples of the same prompt *and* the same structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.advantages.group import group_normalize


def stratified_advantage(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    strata: Int[Array, " B"],
    *,
    num_groups: int,
    alpha: float | Float[Array, ""],
    epsilon: float = 1e-8,
    ddof: int = 0,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Rewards normalised within their stratum of the group, blended with GRPO's.

        A_SAN = (R_i - mean_{g,k} R) / (std_{g,k} R + ε)      k the stratum of sample i
        A_i = α A_SAN + (1 - α) (R_i - mean_g R) / (std_g R + ε)

    Samples of unlike structure (no search call, three of them) are not held against each other by
    the first term. For the same reason it says nothing of *which* structure is better: with the
    strata's true means as baselines, the expected centred gradient is `∇J - Σ_k mean_k ∇P(k)`. That
    signal comes from the second term alone, so α = 1 leaves the choice of structure unlearnt.

    Args:
      rewards: one per sample; not finite where the verifier failed.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      strata: any integers; samples of a group with equal ones are of one structure.
      num_groups: static.
      alpha: α in [0, 1]; may be traced. The paper's value is not known, so there is no default.
      epsilon: ε ≥ 0.
      ddof: 0 for the population standard deviation, 1 for the sample's; static.
      where: rows that count in the statistics, such as the first row of each trajectory; None for
        all.

    Returns:
      f32 `[B]`. The first term is 0 in a stratum of at most one counted row, and exactly 0 in one
      whose rewards are equal; the second is `group_normalize`, the raw reward in a group of one
      included. 0 for non-finite rewards.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids or a concrete α out of range;
        `epsilon` < 0, `ddof` neither 0 nor 1.

    Source: Stratified GRPO, 2025, arXiv 2510.06214. Which standard deviation is not said there;
    the population's is the default here.
    """
    _checks.in_range("alpha", alpha, 0.0, 1.0)
    _checks.same_shape(rewards=rewards, strata=strata)
    _checks.integer(strata=strata)
    scale: dict[str, Any] = {"epsilon": epsilon, "ddof": ddof, "where": where}
    overall = group_normalize(rewards, group_ids, num_groups=num_groups, **scale)
    ids, size = _joint_ids(group_ids, strata), np.shape(rewards)[0]
    within = group_normalize(rewards, ids, num_groups=size, **scale)
    counted = jnp.isfinite(rewards) if where is None else jnp.isfinite(rewards) & where
    alone = segments.per_row(segments.count(ids, num_segments=size, where=counted), ids) <= 1
    return alpha * jnp.where(alone, 0.0, within) + (1 - alpha) * overall


def stratum_of_count(
    counts: Int[Array, " B"], edges: Sequence[int] | Int[Array, " E"]
) -> Int[Array, " B"]:
    """Which bucket a structural count falls into: the number of edges at or below it.

    Args:
      counts: of search calls, turns, tokens, ...
      edges: ascending first counts of the buckets after the first; `(1, 3)` makes the strata
        {0 and below}, {1, 2}, {3 and more}.

    Returns:
      int32 `[B]` in `[0, E]`.

    Raises:
      ValueError: wrong rank or dtype, edges that do not ascend.
    """
    _checks.rank("counts", counts, 1)
    _checks.rank("edges", edges, 1)
    _checks.integer(counts=counts)
    if _checks.is_concrete(edges) and np.any(np.diff(np.asarray(edges)) <= 0):
        raise ValueError(f"edges: expected ascending numbers, got {np.asarray(edges).tolist()}")
    found = jnp.searchsorted(jnp.asarray(edges), jnp.asarray(counts), side="right")
    return found.astype(jnp.int32)


def _joint_ids(first: Any, second: Any) -> Array:
    """Consecutive ids from 0, one for each distinct pair; with no product that could overflow."""
    a, b = jnp.asarray(first), jnp.asarray(second)
    order = jnp.lexsort((b, a))
    changes = (a[order][1:] != a[order][:-1]) | (b[order][1:] != b[order][:-1])
    labels = jnp.cumsum(jnp.concatenate([jnp.zeros(a.shape, bool)[:1], changes]).astype(jnp.int32))
    return jnp.zeros(a.shape, jnp.int32).at[order].set(labels)
