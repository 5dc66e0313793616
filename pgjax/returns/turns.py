"""Turns: what a turn of several tokens, spread over the rows of a trajectory, adds up to.

`turn_ids` are int32 `[B, T]`, counted from 0 within a trajectory, -1 outside the policy's own
turns. A grid `[B, M]` holds one number a turn: its row s is the trajectory with the s-th smallest
id (see `segments.dense_ids`; rows beyond the number of trajectories are empty), or row s of the
batch where each row is its own trajectory. M, the number of columns, is static; concrete turn ids
beyond it raise, traced ones count in no grid and read NaN from it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.returns.on_policy import discounted


def turn_totals(
    values: Float[Array, "B T"],
    turn_ids: Int[Array, "B T"],
    *,
    num_turns: int,
    trajectory_ids: Int[Array, " B"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B M"]:
    """Sum over each turn's tokens, `Σ_{t in turn} x_t`.

    Args:
      values: one per token, such as rewards.
      turn_ids: turn of each token, -1 outside.
      num_turns: M, static.
      trajectory_ids: rows of one trajectory share an id, and their turns one grid row; None: each
        row is its own trajectory.
      mask: tokens that count; None: all inside turns.

    Returns:
      `[B, M]`, 0 for turns without tokens.

    Raises:
      ValueError: wrong rank, dtype or unequal shapes; concrete turn ids of `num_turns` or more.
    """
    _checks.floating(values=values)
    _checks.same_shape(turn_ids=turn_ids, values=values)
    flat, counted = _cells(turn_ids, num_turns, trajectory_ids, mask)
    total = segments.total(
        jnp.asarray(values).reshape(-1),
        flat,
        num_segments=turn_ids.shape[0] * num_turns,
        where=counted,
    )
    return total.reshape(-1, num_turns)


def turn_sizes(
    turn_ids: Int[Array, "B T"],
    *,
    num_turns: int,
    trajectory_ids: Int[Array, " B"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> Int[Array, "B M"]:
    """Number of each turn's tokens, int32 `[B, M]`; a turn exists where it is above 0.

    Args, raises: as in `turn_totals`.
    """
    flat, counted = _cells(turn_ids, num_turns, trajectory_ids, mask)
    size = turn_ids.shape[0] * num_turns
    return segments.count(flat, num_segments=size, where=counted).reshape(-1, num_turns)


def at_turns(
    grid: Float[Array, "B M"],
    turn_ids: Int[Array, "B T"],
    *,
    trajectory_ids: Int[Array, " B"] | None = None,
) -> Float[Array, "B T"]:
    """Each token's turn's number: the way back from a grid to tokens.

    Args:
      grid: one number a turn, `[B, M]`.
      turn_ids, trajectory_ids: as in `turn_totals`.

    Returns:
      `[B, T]`; 0 outside the turns, NaN for traced turn ids of M or more.

    Raises:
      ValueError: as `turn_totals`; a grid with another number of rows.
    """
    _checks.rank("grid", grid, 2)
    _checks.floating(grid=grid)
    rows = trajectory_rows(turn_ids, trajectory_ids)
    _check_turns(turn_ids, grid.shape[1])
    if grid.shape[0] != turn_ids.shape[0]:
        raise ValueError(
            f"grid: expected {turn_ids.shape[0]} rows like turn_ids, got {grid.shape[0]}"
        )
    inside = (turn_ids >= 0) & (turn_ids < grid.shape[1])
    found = jnp.asarray(grid)[rows[:, None], jnp.where(inside, turn_ids, 0)]
    return jnp.where(turn_ids < 0, 0.0, jnp.where(inside, found, jnp.nan))


def turn_returns(
    turn_rewards: Float[Array, "*B M"],
    valid: Bool[Array, "*B M"],
    *,
    gamma: float = 1.0,
    allow_holes: bool = False,
) -> Float[Array, "*B M"]:
    """Discounted return to go, turn by turn: `G_m = r_m + γ G_{m+1}` over the valid turns.

    Args:
      turn_rewards: one per turn.
      valid: turns that took place.
      gamma: γ in [0, 1], per turn.
      allow_holes: also accept invalid turns between valid ones. They are cut out: their rewards
        count nowhere and they discount nothing.

    Returns:
      `[..., M]`, 0 at invalid turns. A reward that is not finite makes its own turn's return and
      those before it NaN, which the advantage functions leave out.

    Raises:
      ValueError: unequal shapes, wrong dtypes, M = 0, `gamma` out of range, concrete `valid` with
        holes that are not allowed.

    Source: Dr. Kernel, 2026, arXiv 2602.05885.
    """
    _checks.in_range("gamma", gamma, 0.0, 1.0)
    _checks.boolean(valid=valid)
    _checks.same_shape(turn_rewards=turn_rewards, valid=valid)
    if not allow_holes and _checks.is_concrete(valid):
        grid = np.asarray(valid)
        if np.any(grid[..., 1:] & ~grid[..., :-1]):
            raise ValueError("valid: expected no invalid turn before a valid one, got a hole")
    finite = jnp.isfinite(turn_rewards)
    rewards = jnp.where(finite, turn_rewards, 0.0)
    result = discounted(rewards, jnp.full_like(rewards, gamma), mask=valid)
    failed = jnp.where(finite, 0.0, 1.0).astype(rewards.dtype)
    ahead = discounted(failed, jnp.ones_like(rewards), mask=valid)
    return jnp.where(ahead > 0, jnp.nan, result)


def trajectory_rows(
    turn_ids: Int[Array, "B T"], trajectory_ids: Int[Array, " B"] | None = None
) -> Int[Array, " B"]:
    """The row of a trajectory's grid `[B, M]` of turns that each row of the batch belongs to.

    Args:
      turn_ids: turn of each token.
      trajectory_ids: rows of one trajectory share an id; None: each row is its own.

    Returns:
      int32 `[B]` in [0, B).

    Raises:
      ValueError: wrong rank or unequal lengths.
    """
    _checks.rank("turn_ids", turn_ids, 2)
    if trajectory_ids is None:
        return jnp.arange(turn_ids.shape[0], dtype=jnp.int32)
    if np.shape(trajectory_ids) != turn_ids.shape[:1]:
        raise ValueError(
            f"trajectory_ids: expected shape {turn_ids.shape[:1]}, got {np.shape(trajectory_ids)}"
        )
    return segments.dense_ids(trajectory_ids)


def _cells(turn_ids: Any, num_turns: int, trajectory_ids: Any, mask: Any) -> tuple[Array, Array]:
    """Each token's cell in the flattened grid, and which tokens count."""
    rows = trajectory_rows(turn_ids, trajectory_ids)
    _check_turns(turn_ids, num_turns)
    # Ids beyond the grid would land in the next trajectory's cells.
    counted = (turn_ids >= 0) & (turn_ids < num_turns)
    flat = rows[:, None] * num_turns + jnp.where(counted, turn_ids, 0)
    if mask is not None:
        _checks.boolean(mask=mask)
        _checks.same_shape(turn_ids=turn_ids, mask=mask)
        counted = counted & mask
    return flat.reshape(-1), counted.reshape(-1)


def _check_turns(turn_ids: Any, num_turns: int) -> None:
    _checks.integer(turn_ids=turn_ids)
    if num_turns < 1:
        raise ValueError(f"num_turns: expected at least 1, got {num_turns}")
    readable = _checks.is_concrete(turn_ids) and getattr(turn_ids, "is_fully_addressable", True)
    if readable and np.size(turn_ids):
        low, high = int(np.min(turn_ids)), int(np.max(turn_ids))
        if low < -1 or high >= num_turns:
            raise ValueError(
                f"turn_ids: expected ids in [-1, {num_turns}), got values in [{low}, {high}]"
            )
