"""Action values of low rank: whole matrices from a few of their rows and columns.

    Q̄ = Q[:, A#] (Q[S#, A#])⁺ Q[S#, :]

If Q and the block Q[S#, A#] both have rank r, this is Q. So an iteration of value iteration need
sample only the states S# and the actions A# in full: |S#| n + m |A#| - |S#| |A#| entries of m n.

Source: Sample Efficient Reinforcement Learning via Low-Rank Matrix Estimation, Shah, Song, Xu and
Yang 2020, arXiv 2006.06135.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import widened


class Completion(NamedTuple):
    """A matrix completed from anchors.

    Attributes:
      matrix: f32 `[m, n]`.
      condition: largest by smallest singular value of the block that were inverted, f32: errors of
        the entries grow with it; 0 where the block is 0 and so is the matrix.
    """

    matrix: Float[Array, "m n"]
    condition: Float[Array, ""]


def anchor_complete(
    columns: Float[Array, "m k"],
    block: Float[Array, "l k"],
    rows: Float[Array, "l n"],
    *,
    rank: int | None = None,
    rcond: float = 1e-6,
) -> Completion:
    """`columns block⁺ rows`, exact for a matrix whose rank is that of the block.

    Args:
      columns: Q[:, A#], `[m, k]`.
      block: Q[S#, A#], `[l, k]`.
      rows: Q[S#, :], `[l, n]`.
      rank: singular values of the block to invert, at most min(l, k), static; None: all. Where the
        entries are noisy and there are more anchors than the rank, the true rank is far better than
        all: the small singular values are noise, and their inverses large.
      rcond: those below this part of the largest are not inverted, so a singular block has a finite
        result.

    Returns:
      a `Completion`; f32, or wider with its arguments.

    Raises:
      ValueError: shapes that do not fit, a `rank` above the number of anchors or below 1, a
        negative `rcond`.

    Source: Shah et al. 2020, arXiv 2006.06135; with all singular values it is the pseudo-skeleton
    of Goreinov, Tyrtyshnikov and Zamarashkin 1997.
    """
    arrays = {"columns": columns, "block": block, "rows": rows}
    for name, array in arrays.items():
        _checks.rank(name, array, 2)
    _checks.floating(**arrays)
    shape = jnp.shape(rows)[0], jnp.shape(columns)[1]
    if jnp.shape(block) != shape:
        raise ValueError(
            f"block: expected shape {shape}, of rows and columns, got {jnp.shape(block)}"
        )
    count = min(shape)
    if rank is not None and not 1 <= rank <= count:
        raise ValueError(f"rank: expected 1 to {count}, the number of anchors, got {rank}")
    _checks.in_range("rcond", rcond, 0.0)
    columns, block, rows = widened(columns), widened(block), widened(rows)
    u, s, vh = jnp.linalg.svd(block, full_matrices=False)
    kept = (jnp.arange(count) < (rank or count)) & (s > rcond * s[0])
    inverse = jnp.where(kept, 1.0 / jnp.where(kept, s, 1.0), 0.0)
    with jax.default_matmul_precision("highest"):
        matrix = (columns @ vh.T * inverse) @ (u.T @ rows)
    smallest = jnp.min(jnp.where(kept, s, jnp.inf))
    return Completion(matrix, jnp.where(kept.any(), s[0] / smallest, 0.0))


def random_anchors(key: PRNGKeyArray, num: int, *, count: int) -> Int[Array, " k"]:
    """`count` of the indices below `num`, none twice, int32.

    Raises:
      ValueError: a `count` outside [1, num].
    """
    _checks.in_range("count", count, 1, num)
    return jax.random.permutation(key, num)[:count].astype(jnp.int32)


def chebyshev_anchors(num: int, *, count: int) -> Int[Array, " k"]:
    """Indices of a grid of `num` points spaced as Chebyshev's extrema, both ends among them, int32.

    Good columns for what is smooth in the action.

    Raises:
      ValueError: a `count` outside [1, num].
    """
    _checks.in_range("count", count, 1, num)
    if count == 1:
        return jnp.array([num // 2], jnp.int32)
    at = np.round((num - 1) / 2 * (1 - np.cos(np.pi * np.arange(count) / (count - 1)))).astype(int)
    # Near the ends of a coarse grid neighbours may round to one point: the later ones move on.
    for i in range(1, count):
        at[i] = max(at[i], at[i - 1] + 1)
    for i in range(count - 1, -1, -1):
        at[i] = min(at[i], num - count + i)
    return jnp.asarray(at, jnp.int32)


def pivoted_anchors(columns: Float[Array, "m k"], *, count: int) -> Int[Array, " l"]:
    """Rows that span the others well: each the farthest from the span of those before it.

    The pivots of a QR decomposition of the transpose: in each step the row of largest norm is
    taken, and its direction out of all rows.

    Args:
      columns: f32 `[m, k]`.
      count: l in [1, m], static. Behind the k-th, or the rank, rows are taken in the order of what
        rounding leaves of them.

    Returns:
      indices, int32 `[l]`, none twice.

    Raises:
      ValueError: not a matrix, wrong dtype, a `count` out of range.

    Source: Businger and Golub 1965.
    """
    _checks.rank("columns", columns, 2)
    _checks.floating(columns=columns)
    _checks.in_range("count", count, 1, jnp.shape(columns)[0])

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        left, taken = state
        square = jnp.where(taken, -1.0, jnp.sum(jnp.square(left), axis=1))
        row = jnp.argmax(square).astype(jnp.int32)
        length = jnp.sqrt(square[row])
        direction = left[row] / jnp.where(length > 0, length, 1.0)
        left = left - jnp.outer(left @ direction, direction)
        return (left, taken.at[row].set(True)), row

    start = widened(columns), jnp.zeros(jnp.shape(columns)[0], bool)
    return jax.lax.scan(step, start, None, length=count)[1]


def observed_entries(num_states: int, num_actions: int, *, rows: int, columns: int) -> int:
    """Entries of so many whole rows and columns together: `rows n + columns m - rows columns`.

    Raises:
      ValueError: more rows or columns than there are, or fewer than none.
    """
    _checks.in_range("rows", rows, 0, num_states)
    _checks.in_range("columns", columns, 0, num_actions)
    return rows * num_actions + columns * num_states - rows * columns
