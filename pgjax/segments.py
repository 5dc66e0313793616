"""Statistics by id: sums, means, spreads and extremes of rows that share an integer.

Ids are `int32[B]` in `[0, num_segments)`, in any order, with segments of any size, also empty ones.
`where` says which rows count; whatever the others hold (NaN and infinity included) reaches neither
values nor gradients of a statistic. Values may have trailing axes, `[B, ...]`: each is its own.

Concrete ids out of range raise. Traced ones cannot: there, such a row counts nowhere, functions
that return one number per row give it NaN, and under `jax.experimental.checkify` it is an error.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks


def total(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "S ..."]:
    """Sum of each segment's counted rows, `Σ_{i: id_i = s} x_i`.

    Args:
      values: real, `[B]` or `[B, ...]`; computed in at least float32.
      ids: in `[0, num_segments)`.
      num_segments: S, static.
      where: rows that count; None for all.

    Returns:
      `[S, ...]`, 0 for empty segments.

    Raises:
      ValueError: wrong rank, dtype or length; concrete ids out of range.
    """
    x, counted = _prepared(values, ids, num_segments, where)
    return _sum(jnp.where(_like(counted, x), x, 0.0), ids, num_segments)


def count(
    ids: Int[Array, " B"], *, num_segments: int, where: Bool[Array, " B"] | None = None
) -> Int[Array, " S"]:
    """Number of each segment's counted rows, int32 `[S]`. Arguments and errors as in `total`."""
    _check_ids(ids, num_segments)
    return _sum(_counted(ids, where).astype(jnp.int32), ids, num_segments)


def mean(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "S ..."]:
    """Mean of each segment's counted rows.

    Computed as `x_min + mean(x - x_min)`, so that a large common offset costs no precision and
    equal values have exactly that value as their mean.

    Args, raises: as in `total`.

    Returns:
      `[S, ...]`, 0 for empty segments.
    """
    x, counted = _prepared(values, ids, num_segments, where)
    reference, offset = _split_mean(x, ids, num_segments, counted)
    return reference + offset


def deviations(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "B ..."]:
    """Each row minus the mean of its segment's counted rows, `x_i - mean_{id_i}`.

    More precise than subtracting `mean`: exactly 0 where all counted rows are equal, and exact to
    the segment's own range however large the values are.

    Args, raises: as in `total`.

    Returns:
      `[B, ...]`, also for rows that do not count; `x_i` itself in segments where no row counts.
    """
    x, counted = _prepared(values, ids, num_segments, where)
    reference, offset = _split_mean(x, ids, num_segments, counted)
    return (x - _rows(reference, ids)) - _rows(offset, ids)


def variance(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    ddof: int = 0,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "S ..."]:
    """Variance of each segment's counted rows, `Σ (x_i - mean)² / (n - ddof)`, in two passes.

    Args, raises: as in `total`; `ddof` ≥ 0 is static.

    Returns:
      `[S, ...]`, 0 for segments with at most `ddof` counted rows.
    """
    deviation, scale = _scaled_deviations(values, ids, num_segments, where)
    return scale**2 * _mean_square(deviation, ids, num_segments, ddof, where)


def std(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    ddof: int = 0,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "S ..."]:
    """Standard deviation of each segment's counted rows, the root of `variance`.

    Neither overflows nor vanishes where the squares of the deviations would.

    Args, raises: as in `variance`.

    Returns:
      `[S, ...]`, 0 (with gradient 0) where the variance is 0.
    """
    deviation, scale = _scaled_deviations(values, ids, num_segments, where)
    square = _mean_square(deviation, ids, num_segments, ddof, where)
    positive = square > 0
    return jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def leave_one_out_mean(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "B ..."]:
    """For each row, the mean of the *other* counted rows of its segment.

    `(Σ_{j≠i} x_j) / (n - 1)` for a row that counts; a row that does not count is no part of the sum
    anyway and gets the mean of all that do.

    Args, raises: as in `total`.

    Returns:
      `[B, ...]`, 0 where no other row counts.
    """
    x, counted = _prepared(values, ids, num_segments, where)
    keep = _like(counted, x)
    low = _reference(x, ids, num_segments, counted)
    shifted = jnp.where(keep, x - _rows(low, ids), 0.0)
    others = _rows(_sum(shifted, ids, num_segments), ids) - shifted
    n = _rows(_sum(counted.astype(x.dtype), ids, num_segments), ids) - counted
    n = _like(n, x)
    result = _rows(low, ids) + others / jnp.maximum(n, 1.0)
    # Not `n > 0`: a row whose id is out of range has n = NaN and must stay visible.
    return jnp.where(n == 0, 0.0, result)


def maximum(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "S ..."]:
    """Largest counted value of each segment; its gradient is shared equally among ties.

    Args, raises: as in `total`.

    Returns:
      `[S, ...]`, 0 for empty segments.
    """
    x, counted = _prepared(values, ids, num_segments, where)
    return _extreme(jax.ops.segment_max, -jnp.inf, x, ids, num_segments, counted)


def minimum(
    values: Float[Array, "B ..."],
    ids: Int[Array, " B"],
    *,
    num_segments: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, "S ..."]:
    """Smallest counted value of each segment; its gradient is shared equally among ties.

    Args, raises: as in `total`.

    Returns:
      `[S, ...]`, 0 for empty segments.
    """
    x, counted = _prepared(values, ids, num_segments, where)
    return _extreme(jax.ops.segment_min, jnp.inf, x, ids, num_segments, counted)


def per_row(statistic: Float[Array, "S ..."], ids: Int[Array, " B"]) -> Float[Array, "B ..."]:
    """Each row's own segment's statistic, `statistic[ids]`.

    Args:
      statistic: one per segment, real; returned in at least float32.
      ids: in `[0, S)`.

    Returns:
      `[B, ...]`; NaN for traced ids out of range, where indexing would give another segment's.

    Raises:
      ValueError: wrong rank or dtype; concrete ids out of range.
    """
    if np.ndim(statistic) < 1:
        raise ValueError("statistic: expected at least one axis, got a scalar")
    _check_ids(ids, np.shape(statistic)[0])
    x = jnp.asarray(statistic)
    return _rows(x.astype(jnp.promote_types(x.dtype, jnp.float32)), ids)


def dense_ids(ids: Int[Array, " B"]) -> Int[Array, " B"]:
    """Relabels arbitrary integers as consecutive ones from 0, keeping their order.

    Equal ids stay equal; with B rows there are at most B labels, so `num_segments=B` always fits.

    Args:
      ids: any integers.

    Returns:
      int32 `[B]` in `[0, B)`.

    Raises:
      ValueError: wrong rank or dtype.
    """
    order, starts = _runs(ids)
    labels = jnp.cumsum(starts.astype(jnp.int32)) - 1
    return jnp.zeros(starts.shape, jnp.int32).at[order].set(labels)


def first_rows(ids: Int[Array, " B"]) -> Bool[Array, " B"]:
    """True on the first row that carries each id: one representative row per trajectory or prompt.

    Args:
      ids: any integers.

    Returns:
      bool `[B]`.

    Raises:
      ValueError: wrong rank or dtype.
    """
    order, starts = _runs(ids)
    return jnp.zeros(starts.shape, bool).at[order].set(starts)


def _runs(ids: Array) -> tuple[Array, Array]:
    """Rows sorted by id (stably), and which of them start a new id."""
    _checks.rank("ids", ids, 1)
    _checks.integer(ids=ids)
    ids = jnp.asarray(ids)
    order = jnp.argsort(ids, stable=True)
    ranked = ids[order]
    changes = ranked[1:] != ranked[:-1]
    return order, jnp.concatenate([jnp.ones(ids.shape, bool)[:1], changes])


def _check_ids(ids: Any, num_segments: int) -> None:
    # Only what this process can read: an array spread over hosts is concrete but not readable, and
    # min() of a device array would be traced inside someone's jit.
    readable = _checks.is_concrete(ids) and getattr(ids, "is_fully_addressable", True)
    if readable:
        _checks.segment_ids("ids", np.asarray(ids), num_segments)
        return
    _checks.rank("ids", ids, 1)
    _checks.integer(ids=ids)
    if num_segments < 1:
        raise ValueError(f"num_segments: expected at least 1, got {num_segments}")
    if ids.size:
        _checks.traced(
            jnp.all((ids >= 0) & (ids < num_segments)), f"ids: expected ids in [0, {num_segments})"
        )


def _counted(ids: Any, where: Any) -> Array:
    if where is None:
        return jnp.ones(np.shape(ids), bool)
    _checks.boolean(where=where)
    _checks.same_shape(ids=ids, where=where)
    return jnp.asarray(where)


def _prepared(values: Any, ids: Any, num_segments: int, where: Any) -> tuple[Array, Array]:
    """Checked arguments: values in at least float32, and which rows count."""
    _check_ids(ids, num_segments)
    if np.ndim(values) < 1 or np.shape(values)[0] != np.shape(ids)[0]:
        raise ValueError(
            f"values: expected {np.shape(ids)[0]} rows like ids, got shape {np.shape(values)}"
        )
    x = jnp.asarray(values)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), _counted(ids, where)


def _like(rows: Array, x: Array) -> Array:
    """`[B]` with as many axes of size 1 behind it as broadcast against `x[B, ...]`."""
    return rows.reshape(rows.shape + (1,) * (x.ndim - 1))


def _sum(x: Array, ids: Array, num_segments: int) -> Array:
    return jax.ops.segment_sum(x, jnp.asarray(ids), num_segments)


def _rows(statistic: Array, ids: Array) -> Array:
    """`statistic[ids]`, NaN for ids out of range instead of some other segment's number."""
    ids = jnp.asarray(ids)
    inside = (ids >= 0) & (ids < statistic.shape[0])
    taken = statistic[jnp.where(inside, ids, 0)]
    return jnp.where(_like(inside, taken), taken, jnp.nan)


def _reference(x: Array, ids: Array, num_segments: int, counted: Array) -> Array:
    """A value out of each segment to measure from: its smallest. A constant to differentiation."""
    x = jax.lax.stop_gradient(jnp.where(_like(counted, x), x, jnp.inf))
    low = jax.ops.segment_min(x, jnp.asarray(ids), num_segments)
    return jnp.where(low == jnp.inf, 0.0, low)


def _split_mean(x: Array, ids: Array, num_segments: int, counted: Array) -> tuple[Array, Array]:
    """The mean as reference + offset, the offset free of the reference's rounding."""
    low = _reference(x, ids, num_segments, counted)
    shifted = jnp.where(_like(counted, x), x - _rows(low, ids), 0.0)
    n = _sum(counted.astype(x.dtype), ids, num_segments)
    return low, _sum(shifted, ids, num_segments) / _like(jnp.maximum(n, 1.0), x)


def _scaled_deviations(values: Any, ids: Any, num_segments: int, where: Any) -> tuple[Array, Array]:
    """Counted deviations divided by their segment's largest, and that scale (a constant)."""
    x, counted = _prepared(values, ids, num_segments, where)
    keep = _like(counted, x)
    reference, offset = _split_mean(x, ids, num_segments, counted)
    x = jnp.where(keep, x, _rows(reference, ids))
    deviation = jnp.where(keep, (x - _rows(reference, ids)) - _rows(offset, ids), 0.0)
    magnitude = jax.lax.stop_gradient(jnp.abs(deviation))
    # segment_max gives -inf for empty segments, and 0 where all values are equal.
    scale = jax.ops.segment_max(magnitude, jnp.asarray(ids), num_segments)
    scale = jnp.where(scale > 0, scale, 1.0)
    return deviation / _rows(scale, ids), scale


def _mean_square(deviation: Array, ids: Array, num_segments: int, ddof: int, where: Any) -> Array:
    _checks.in_range("ddof", ddof, 0)
    counted = _counted(ids, where)
    n = _sum(counted.astype(deviation.dtype), ids, num_segments) - ddof
    n = _like(n, deviation)
    squares = _sum(deviation**2, ids, num_segments)
    return jnp.where(n > 0, squares / jnp.where(n > 0, n, 1.0), 0.0)


def _extreme(
    reduce: Any, empty: float, x: Array, ids: Array, num_segments: int, counted: Array
) -> Array:
    """Largest or smallest value by segment, with the gradient that JAX's scatter lacks."""
    keep = _like(counted, x)
    fixed = jax.lax.stop_gradient(jnp.where(keep, x, empty))
    best = reduce(fixed, jnp.asarray(ids), num_segments)
    n = _like(_sum(counted.astype(x.dtype), ids, num_segments), x)
    best = jnp.where(n > 0, best, 0.0)
    tied = keep & (fixed == _rows(best, ids)) & jnp.isfinite(fixed)
    slope = jnp.where(tied, x, 0.0) - jnp.where(tied, fixed, 0.0)  # 0, with gradient 1
    ties = _sum(tied.astype(x.dtype), ids, num_segments)
    return best + _sum(slope, ids, num_segments) / jnp.maximum(ties, 1.0)
