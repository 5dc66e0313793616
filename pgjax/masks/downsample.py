"""Training on the most informative part of a batch: rows that differ most, tokens in doubt.

How many are kept is data, not shape: sizes and shares may be traced, so a schedule compiles once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, returns, segments

_ROUNDING = 3e-7  # of float32 products, relative


def max_variance_subset(
    values: Float[Array, " B"],
    size: int | Int[Array, ""],
    *,
    where: Bool[Array, " B"] | None = None,
) -> Bool[Array, " B"]:
    """The `size` rows whose values have the largest variance, `argmax_{|S| = n} Var(x_S)`.

    The best set is always the j smallest and n - j largest values for some 1 ≤ j < n: as a function
    of one member the variance is convex, so every member can be moved to one end. All j are
    compared with sums over both ends, after one sort.

    Args:
      values: one per row, such as advantages.
      size: n ≥ 2, may be traced; more than there are rows means all of them, a traced n below 2
        means 2.
      where: rows that may be chosen; None for all. Values that are not finite never are.

    Returns:
      bool `[B]`, true in min(n, eligible rows) places. Of equal values the choice goes by row: the
      first among the smallest, the last among the largest; of equally good j by the smallest.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; `size` below 2.

    Source: D3S, 2025, arXiv 2509.22115; the form of the best set as in PODS, Xu et al. 2025,
    arXiv 2504.13818.
    """
    _checks.rank("values", values, 1)
    ids = jnp.zeros(jnp.shape(values), jnp.int32)
    return max_variance_subset_by_group(values, ids, size, num_groups=1, where=where)


def max_variance_subset_by_group(
    values: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    size: int | Int[Array, ""] | Int[Array, " G"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Bool[Array, " B"]:
    """`max_variance_subset` of each group on its own.

    Args:
      values, where: as in `max_variance_subset`.
      group_ids: int32 in `[0, num_groups)`; any order, groups of any size.
      size: rows to keep in every group, or in each, `[num_groups]`; may be traced.
      num_groups: static.

    Returns:
      bool `[B]`.

    Raises:
      ValueError: as `max_variance_subset`; concrete ids out of range.
    """
    _checks.rank("values", values, 1)
    _checks.floating(values=values)
    _checks.same_shape(values=values, group_ids=group_ids, where=where)
    _check_size(size, num_groups)
    group_ids, eligible = jnp.asarray(group_ids), jnp.isfinite(values)
    if where is not None:
        _checks.boolean(where=where)
        eligible = eligible & where
    options: dict[str, Any] = {"num_segments": num_groups, "where": eligible}
    x = segments.deviations(values, group_ids, **options)
    spread = segments.maximum(jnp.abs(x), group_ids, **options)  # squares of 1e-30 would vanish
    x = jnp.where(eligible, x / jnp.where(spread > 0, spread, 1.0)[group_ids], 0.0)
    count = segments.count(group_ids, **options)
    rows = segments.count(group_ids, num_segments=num_groups)

    # Groups one after the other, smallest value first, what is not eligible at each group's end.
    order = jnp.lexsort((x, ~eligible, group_ids))
    x, ids = x[order], group_ids[order]
    position = jnp.arange(x.shape[0])
    rank = position - (jnp.cumsum(rows) - rows)[ids]
    n = jnp.minimum(jnp.maximum(jnp.broadcast_to(size, count.shape), 2), count)[ids]
    j = rank + 1  # a set of the j smallest, up to this row, and the n - j largest
    begin = jnp.clip(position + 1 + count[ids] - n, 0, x.shape[0] - 1)
    powers = jnp.stack([x, x**2])
    lowest, highest = _sums_from_both_ends(powers, rank == 0, rank == rows[ids] - 1)
    mean, square = (lowest + highest[:, begin]) / jnp.maximum(n, 1)
    variance = jnp.where(j < n, square - mean**2, -jnp.inf)
    top = jax.ops.segment_max(variance, ids, num_groups)[ids]
    split = jax.ops.segment_min(jnp.where(variance == top, j, x.shape[0]), ids, num_groups)[ids]
    split = jnp.minimum(split, n)  # of at most one row there is no set of two ends
    chosen = (rank < split) | (rank >= count[ids] - (n - split))
    chosen = chosen & (rank < count[ids])
    return jnp.zeros(chosen.shape, bool).at[order].set(chosen)


def topk_token_mask(
    scores: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    fraction: float | Float[Array, ""],
) -> Bool[Array, "B T"]:
    """The `fraction` of the batch's tokens with the highest scores, in one ranking over all rows.

    Args:
      scores: what tokens are ranked by; those that are not a number rank last.
      mask: tokens that take part.
      fraction: in (0, 1], may be traced; traced values beyond it count as its ends.

    Returns:
      bool `[B, T]`, true on exactly `ceil(fraction * M)` of the M tokens of the mask; of equal
      scores those earlier in the batch, row by row, come first.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes; a fraction outside (0, 1].

    Source: D3S, 2025, arXiv 2509.22115.
    """
    _checks.rank("scores", scores, 2)
    _checks.floating(scores=scores)
    _checks.boolean(mask=mask)
    _checks.same_shape(scores=scores, mask=mask)
    _checks.in_range("fraction", fraction, 0.0, 1.0, low_open=True)
    total = jnp.sum(mask)
    keep = jnp.where(fraction >= 1, total, _ceil(jnp.asarray(fraction) * total))
    order = jnp.lexsort((-jnp.asarray(scores).reshape(-1), ~jnp.asarray(mask).reshape(-1)))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return jnp.asarray(mask) & (rank < keep).reshape(mask.shape)


def token_uncertainty(
    advantages: Float[Array, " B"] | Float[Array, "B T"], entropy: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """How much a token matters to the update and is in doubt, `|A_{i,t}| H_{i,t}`.

    Args:
      advantages: one per sequence or per token.
      entropy: in nats, ≥ 0, of the distribution each token was drawn from.

    Returns:
      `[B, T]`, the score by which D3S keeps tokens.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete negative entropy.

    Source: D3S, 2025, arXiv 2509.22115.
    """
    _checks.rank("advantages", advantages, 1, 2)
    _checks.rank("entropy", entropy, 2)
    _checks.floating(advantages=advantages, entropy=entropy)
    if jnp.ndim(advantages) == 1:
        advantages = jnp.asarray(advantages)[:, None]
    if jnp.shape(advantages) not in (jnp.shape(entropy), (jnp.shape(entropy)[0], 1)):
        raise ValueError(
            f"advantages: expected {jnp.shape(entropy)[0]} rows like entropy, one number a row or "
            f"a token, got shape {jnp.shape(advantages)}"
        )
    if _readable(entropy) and np.any(np.asarray(entropy) < 0):
        raise ValueError(f"entropy: expected numbers of at least 0, got {np.min(entropy)}")
    return jnp.abs(advantages) * entropy


def rows_to_keep(share: float | Float[Array, ""], count: Int[Array, ...]) -> Int[Array, ...]:
    """`floor(share * count)`, but at least 2: sizes for `max_variance_subset`.

    Args:
      share: in (0, 1], may be traced.
      count: eligible rows, of the batch or of each group.

    Returns:
      int32, in the shape of `count`.

    Raises:
      ValueError: a share outside (0, 1].
    """
    _checks.in_range("share", share, 0.0, 1.0, low_open=True)
    return jnp.maximum(-_ceil(-jnp.asarray(share) * jnp.asarray(count)), 2)


def _sums_from_both_ends(
    powers: Float[Array, "2 B"], first: Bool[Array, " B"], last: Bool[Array, " B"]
) -> tuple[Float[Array, "2 B"], Float[Array, "2 B"]]:
    """Sums within the group from its first row up to each row, and from each row to its last.

    Recurrences that start anew in every group, not differences of sums over the batch: those would
    round like the whole batch.
    """

    def inside(edge: Array) -> Array:
        return jnp.broadcast_to(jnp.where(edge, 0.0, 1.0).astype(powers.dtype), powers.shape)

    return (
        returns.linear_recurrence(inside(first), powers),
        returns.linear_recurrence(inside(last), powers, reverse=True),
    )


def _ceil(product: Float[Array, ...]) -> Int[Array, ...]:
    """The next whole number, the same one where only float32's rounding lies between."""
    whole = jnp.round(product)
    same = jnp.abs(product - whole) <= _ROUNDING * jnp.abs(product)
    return jnp.where(same, whole, jnp.ceil(product)).astype(jnp.int32)


def _check_size(size: Any, num_groups: int) -> None:
    _checks.rank("size", size, 0, 1)
    _checks.integer(size=size)
    if jnp.ndim(size) == 1 and jnp.shape(size) != (num_groups,):
        raise ValueError(
            f"size: expected one number or {num_groups}, one a group, got shape {jnp.shape(size)}"
        )
    if _readable(size):
        _checks.in_range("size", np.min(size), 2)


def _readable(x: Any) -> bool:
    return _checks.is_concrete(x) and getattr(x, "is_fully_addressable", True)
