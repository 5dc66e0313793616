"""Which input channels to protect, read off the change that fine-tuning made (QuantLRM).

The entries that moved least and most are protected, and channels with many entries that did not
move at all. `channels.awq_search` makes scales of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pgjax import _checks


class UpdateStats(NamedTuple):
    """Least, median and largest of the positive |W_tuned - W_base| of a whole model."""

    low: Float[Array, ""]
    middle: Float[Array, ""]
    high: Float[Array, ""]


def update_sizes(base: Any, tuned: Any) -> Any:
    """`|W_tuned - W_base|` of every leaf, float32; exactly 0 where the stored numbers are equal.

    Raises:
      ValueError: trees or leaves of different shapes.
    """
    same: Any = jax.tree.structure(base)
    if same != jax.tree.structure(tuned):
        raise ValueError("tuned: expected a tree like base, got one of another structure")

    def size(a: Array, b: Array) -> Array:
        _checks.same_shape(base=a, tuned=b)
        return jnp.abs(jnp.asarray(b, jnp.float32) - jnp.asarray(a, jnp.float32))

    return jax.tree.map(size, base, tuned)


def update_stats(deltas: Any, *, streaming: bool = False, bins: int = 4096) -> UpdateStats:
    """Least, median and largest of all strictly positive entries of all matrices together.

    Args:
      deltas: a pytree of arrays, each at least 0.
      streaming: static; the median comes from a histogram with `bins` bins of equal ratio between
        low and high, one leaf at a time, and is right to within its bin. Otherwise all entries
        are sorted together.
      bins: static.

    Returns:
      f32 scalars; all 0 where no entry is positive, which only happens under `jit`.

    Raises:
      ValueError: no leaves, no positive entry, a negative or NaN entry.

    Source: QuantLRM, 2026, arXiv:2602.02581. Its released code takes an arbitrary entry for the
    median (a partition whose result is dropped); this is the median.
    """
    leaves = [jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(deltas)]
    if not leaves:
        raise ValueError("deltas: expected at least one array, got none")
    if _checks.is_concrete(*leaves):
        for x in leaves:
            _check_sizes(x)
        if not any(bool((x > 0).any()) for x in leaves):
            raise ValueError("deltas: no entry is positive, so nothing was fine-tuned")
    low = jnp.stack([jnp.min(x, where=x > 0, initial=jnp.inf) for x in leaves]).min()
    high = jnp.stack([jnp.max(x, initial=0.0) for x in leaves]).max()
    if streaming:
        middle = _histogram_median(leaves, low, high, bins)
    else:
        every = jnp.concatenate(leaves)
        middle = jnp.nanmedian(jnp.where(every > 0, every, jnp.nan))
    some = high > 0
    return UpdateStats(*(jnp.where(some, x, 0.0) for x in (low, middle, high)))


def protect_ends(
    delta: Float[Array, "*s"], stats: UpdateStats, *, ratio: float = 10.0
) -> Float[Array, "*s"]:
    """A weight in [1, R] for each entry: 1 at the median update, R at the least and the largest.

        y = 1                                       where D = 0
        y = 1 + (R-1) clip((mid-D)/(mid-lo), -1, 1)²  where D <= mid
        y = 1 + (R-1) clip((D-mid)/(hi-mid), -1, 1)²  elsewhere

    Args:
      delta: D, at least 0.
      stats: of the whole model.
      ratio: R, at least 1.

    Raises:
      ValueError: R below 1, a negative or NaN entry.
    """
    _checks.in_range("ratio", ratio, 1.0)
    if _checks.is_concrete(delta):
        _check_sizes(delta)
    delta = jnp.asarray(delta, jnp.float32)
    tiny = jnp.finfo(jnp.float32).tiny
    below = (stats.middle - delta) / jnp.maximum(stats.middle - stats.low, tiny)
    above = (delta - stats.middle) / jnp.maximum(stats.high - stats.middle, tiny)
    distance = jnp.clip(jnp.where(delta <= stats.middle, below, above), -1.0, 1.0)
    return jnp.where(delta == 0, 1.0, 1.0 + (ratio - 1.0) * jnp.square(distance))


def channel_importance(
    delta: Float[Array, "r c"], stats: UpdateStats, *, ratio: float = 10.0
) -> Float[Array, " c"]:
    """`I_j = mean_i y_ij · (#{i: D_ij = 0} + 1)`, at least 1.

    Args:
      delta: `|W_tuned - W_base|` `[out, in]`, exactly 0 where a weight did not move.
      stats: of the whole model.
      ratio: R of `protect_ends`.

    Raises:
      ValueError: wrong rank, and as `protect_ends`.

    Source: QuantLRM, 2026, arXiv:2602.02581.
    """
    _checks.rank("delta", delta, 2)
    zeros = jnp.sum(jnp.asarray(delta) == 0, axis=0)
    return jnp.mean(protect_ends(delta, stats, ratio=ratio), axis=0) * (zeros + 1)


def _histogram_median(leaves: list[Array], low: Array, high: Array, bins: int) -> Array:
    _checks.in_range("bins", bins, 2)
    safe_low = jnp.where(high > 0, low, 1.0)
    span = jnp.log(jnp.maximum(high, safe_low) / safe_low)
    counts = jnp.zeros(bins, jnp.int32)
    for x in leaves:
        place = jnp.log(jnp.maximum(x, safe_low) / safe_low) / jnp.where(span > 0, span, 1.0)
        index = jnp.clip((place * bins).astype(jnp.int32), 0, bins - 1)
        counts = counts.at[index].add((x > 0).astype(jnp.int32))
    running = jnp.cumsum(counts)
    found = jnp.argmax(2 * running >= running[-1])
    return safe_low * jnp.exp((found + 0.5) / bins * span)


def _check_sizes(x: Array) -> None:
    if not bool((jnp.asarray(x) >= 0).all()):
        raise ValueError("delta: expected sizes of at least 0, got a negative or NaN entry")
