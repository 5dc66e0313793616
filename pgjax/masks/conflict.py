"""Tokens on which good and bad completions of a prompt agree.

A group's completions often begin and end alike. Where a rewarded and a punished one share a token
at the same place, their gradients on it cancel or, worse, push down what both need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks


class Conflicts(NamedTuple):
    """Conflict tokens counted from the completions' beginnings and from their ends."""

    forward: Bool[Array, "B T"]
    backward: Bool[Array, "B T"]


def conflict_tokens(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    signs: Int[Array, " B"],
    group_ids: Int[Array, " B"],
) -> Conflicts:
    """Leading and trailing tokens that completions of both signs share.

    A token is in conflict, counted forward, if at its place among its row's chosen tokens and at
    every place before some completion of its group with sign +1 and some with sign -1 hold the
    token that this row holds there. Counted backward, places are numbered from the last token.

    Costs a sort of every column: O(T B log B) time, O(T B) memory, whatever the vocabulary.

    Args:
      tokens: any integers.
      mask: tokens the policy chose; only these have a place and are compared.
      signs: of the advantages, -1, 0 or 1; rows of sign 0 neither make conflicts nor have any.
      group_ids: any integers, any order; one group's rows are compared with each other.

    Returns:
      bool `[B, T]` each, false off the mask. A group without both signs, of one row for instance,
      has no conflicts.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete signs other than -1, 0, 1.

    Source: GTPO, 2025, arXiv 2508.03772.
    """
    _checks.rank("tokens", tokens, 2)
    _checks.integer(tokens=tokens, group_ids=group_ids)
    _checks.boolean(mask=mask)
    _checks.same_shape(tokens=tokens, mask=mask)
    _check_signs(signs, tokens)
    _checks.same_shape(signs=signs, group_ids=group_ids)
    tokens, mask, group_ids = jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(group_ids)
    signs = jnp.asarray(signs)
    place = jnp.cumsum(mask, axis=1) - 1
    from_the_end = mask.sum(axis=1, keepdims=True) - 1 - place
    return Conflicts(
        *(_leading_run(tokens, mask, signs, group_ids, x) for x in (place, from_the_end))
    )


def conflict_weights(
    conflicts: Conflicts,
    signs: Int[Array, " B"],
    *,
    boost: float = 2.0,
    suppress: float = 0.0,
) -> Float[Array, "B T"]:
    """Factors of the tokens' losses: `boost` on conflicts of good rows, `suppress` of bad ones.

    Forward and backward factors multiply: a token in conflict both ways has `boost²`.

    Args:
      conflicts: from `conflict_tokens`.
      signs: -1, 0 or 1 as there.
      boost: ≥ 0.
      suppress: ≥ 0; the shared token is then not pushed down at all.

    Returns:
      f32 `[B, T]`, 1 where there is no conflict.

    Raises:
      ValueError: a negative factor, concrete signs other than -1, 0, 1, unequal lengths.

    Source: GTPO, 2025, arXiv 2508.03772.
    """
    _checks.in_range("boost", boost, 0.0, high_open=True)
    _checks.in_range("suppress", suppress, 0.0, high_open=True)
    _check_signs(signs, conflicts.forward)
    signs = jnp.asarray(signs)[:, None]
    factor = jnp.where(signs > 0, boost, jnp.where(signs < 0, suppress, 1.0)).astype(jnp.float32)
    forward, backward = (jnp.where(found, factor, 1.0) for found in conflicts)
    return forward * backward


def _leading_run(
    tokens: Array, mask: Array, signs: Array, group_ids: Array, place: Array
) -> Bool[Array, "B T"]:
    """Conflicts up to the first place without one, places being numbered by `place`."""
    length = tokens.shape[1]
    rows = jnp.arange(tokens.shape[0])[:, None]
    place = jnp.where(mask, place, length)  # out of bounds: dropped
    aligned = jnp.zeros_like(tokens).at[rows, place].set(tokens, mode="drop")
    present = jnp.zeros_like(mask).at[rows, place].set(True, mode="drop")
    positive = present & (signs > 0)[:, None]
    negative = present & (signs < 0)[:, None]
    shared = jax.vmap(_shared, in_axes=(1, 1, 1, None), out_axes=1)(
        aligned, positive, negative, group_ids
    )
    run = jnp.cumprod(shared.astype(jnp.int8), axis=1).astype(bool)
    return mask & jnp.take_along_axis(run, jnp.minimum(place, length - 1), axis=1)


def _shared(
    tokens: Int[Array, " B"],
    positive: Bool[Array, " B"],
    negative: Bool[Array, " B"],
    group_ids: Int[Array, " B"],
) -> Bool[Array, " B"]:
    """Rows of either kind whose group holds their token in a row of each kind."""
    order = jnp.lexsort((tokens, group_ids))
    ids, ranked = group_ids[order], tokens[order]
    changes = (ids[1:] != ids[:-1]) | (ranked[1:] != ranked[:-1])
    labels = jnp.cumsum(jnp.concatenate([jnp.zeros((1,), jnp.int32), changes]))
    labels = jnp.zeros_like(labels).at[order].set(labels)

    def held(by: Array) -> Array:
        return jax.ops.segment_max(by.astype(jnp.int8), labels, tokens.shape[0])[labels] > 0

    return (positive | negative) & held(positive) & held(negative)


def _check_signs(signs: Any, rows: Any) -> None:
    _checks.rank("signs", signs, 1)
    _checks.integer(signs=signs)
    if jnp.shape(signs)[0] != jnp.shape(rows)[0]:
        raise ValueError(
            f"signs: expected {jnp.shape(rows)[0]} rows like tokens, got {jnp.shape(signs)[0]}"
        )
    if _checks.is_concrete(signs) and getattr(signs, "is_fully_addressable", True):
        wrong = np.setdiff1d(np.asarray(signs), (-1, 0, 1))
        if wrong.size:
            raise ValueError(f"signs: expected -1, 0 or 1, got {wrong[0]}")
