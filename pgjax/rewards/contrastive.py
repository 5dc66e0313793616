"""A bonus for an optional action only where it helps: tool calls, searches, scratch work.

Per prompt, samples that took the action are contrasted with samples that did not. The bonus for
taking it is positive where they did better, negative where they did worse, and nothing where the
difference is within a margin.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments

ROUNDING = 1e-6  # of a difference of two means of zeros and ones


def contrastive_mask(
    correct: Float[Array, " B"],
    used: Bool[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    margin: float = 0.1,
    where: Bool[Array, " B"] | None = None,
) -> Int[Array, " S"]:
    """Sign of each group's bonus: whether the action raises the share of correct samples.

        Δ = mean(correct | used) - mean(correct | not used)
        M = +1 if Δ > margin, -1 if Δ < -margin, 0 otherwise

    Args:
      correct: 0 or 1; not finite where unknown, and then not counted.
      used: whether the sample took the action; bool, or 0 and 1.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      num_groups: S, static.
      margin: ≥ 0.
      where: samples that are contrasted: None for all; or those drawn for the purpose, with the
        action forced or forbidden.

    Returns:
      int32 `[S]` in {-1, 0, 1}; 0 where one side is empty.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range, or `correct` or
        `used` neither 0 nor 1; `margin` < 0.

    Source: GCPO in GeometryZero, 2025, arXiv 2506.07160; the margin's value is chosen here.
    """
    _checks.in_range("margin", margin, 0.0)
    correct, used, counted = _prepared(correct, used, group_ids, where)
    sides = []
    for side in (used, ~used):
        options: dict[str, Any] = {"num_segments": num_groups, "where": counted & side}
        sides.append(
            (
                segments.total(correct, group_ids, **options),
                segments.count(group_ids, **options).astype(correct.dtype),
            )
        )
    (right_with, n_with), (right_without, n_without) = sides
    # Both sides of Δ > margin times both counts: whole numbers on the left, so that a difference
    # of exactly the margin is one.
    pairs = n_with * n_without
    difference = right_with * n_without - right_without * n_with
    exceeds = jnp.abs(difference) - margin * pairs > ROUNDING * pairs
    return jnp.where(exceeds & (pairs > 0), jnp.sign(difference), 0.0).astype(jnp.int32)


def length_reward(lengths: Int[Array, "*N"], *, reference: float) -> Float[Array, "*N"]:
    """Grows with the length up to a reference, `min(length / reference, 1)`.

    Args:
      lengths: tokens, at least 0.
      reference: > 0.

    Returns:
      f32 in [0, 1].

    Raises:
      ValueError: `reference` ≤ 0, concrete lengths below 0.

    Source: GCPO rewards length in a form not stated in what is known of it; this one is chosen.
    """
    _checks.in_range("reference", reference, 0.0, low_open=True, high_open=True)
    _checks.integer(lengths=lengths)
    if _checks.is_concrete(lengths) and np.any(np.asarray(lengths) < 0):
        raise ValueError(f"lengths: expected numbers ≥ 0, got {np.min(np.asarray(lengths))}")
    return jnp.minimum(jnp.asarray(lengths).astype(jnp.float32) / reference, 1.0)


def gcpo_reward(
    rewards: Float[Array, " B"],
    used: Bool[Array, " B"],
    lengths: Int[Array, " B"],
    signs: Int[Array, " S"],
    group_ids: Int[Array, " B"],
    *,
    use_weight: float = 0.5,
    length_weight: float = 0.1,
    length_reference: float,
) -> Float[Array, " B"]:
    """`R_i = r_i + use_weight M_g u_i + length_weight min(length_i / length_reference, 1)`.

    Args:
      rewards: correctness, with whatever the task adds to it for form.
      used: whether the sample took the action; bool, or 0 and 1.
      lengths: tokens of each sample.
      signs: M of each group, from `contrastive_mask`; ones reward the action unconditionally.
      group_ids: int32 in `[0, S)`.
      use_weight, length_weight: ≥ 0.
      length_reference: > 0.

    Returns:
      f32 `[B]`; not finite where `rewards` is not.

    Raises:
      ValueError: as `contrastive_mask` and `length_reward`; weights below 0.

    Source: GCPO in GeometryZero, 2025, arXiv 2506.07160; weights are chosen here.
    """
    _checks.in_range("use_weight", use_weight, 0.0, high_open=True)
    _checks.in_range("length_weight", length_weight, 0.0, high_open=True)
    _checks.rank("rewards", rewards, 1)
    _checks.rank("signs", signs, 1)
    _checks.floating(rewards=rewards)
    _checks.same_shape(rewards=rewards, used=used, lengths=lengths, group_ids=group_ids)
    _check_binary(used=used)
    bonus = segments.per_row(signs, group_ids) * jnp.asarray(used, jnp.float32)
    length = length_reward(lengths, reference=length_reference)
    return jnp.asarray(rewards) + use_weight * bonus + length_weight * length


def _prepared(correct: Any, used: Any, ids: Any, where: Any) -> tuple[Array, Array, Array]:
    _checks.rank("correct", correct, 1)
    _checks.same_shape(correct=correct, used=used, group_ids=ids, where=where)
    _checks.boolean(where=where)
    _check_binary(correct=correct, used=used)
    x = jnp.asarray(correct)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    counted = jnp.isfinite(x)
    if where is not None:
        counted = counted & where
    return jnp.where(jnp.isfinite(x), x, 0.0), jnp.asarray(used) != 0, counted


def _check_binary(**arrays: Any) -> None:
    for name, a in arrays.items():
        if _checks.is_concrete(a) and getattr(a, "is_fully_addressable", True):
            values = np.asarray(a).astype(np.float64)
            if np.any(np.isfinite(values) & (values != 0) & (values != 1)):
                raise ValueError(f"{name}: expected zeros and ones, got {values}")
