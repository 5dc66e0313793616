"""Rejecting whole trajectories, or turns, on which sampler and learner disagree too much.

The functions of `masks.mismatch` judge a row; these judge all rows of a trajectory together, or
each turn by itself. Log-ratios of single tokens are held within ±20; one that is NaN rejects.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.masks.mismatch import _log_ratio, veto
from pgjax.returns.turns import at_turns, turn_sizes, turn_totals

LOG_RATIO_LIMIT = 20.0


def trajectory_geometric_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    trajectory_ids: Int[Array, " B"],
    *,
    low: float = 0.999,
    high: float = 1.001,
) -> Bool[Array, "B T"]:
    """True for whole trajectories with `low <= exp(mean log π_old/μ) <= high`, over all tokens.

    Args:
      logprobs: the learner's log-probs of the tokens, before the update.
      behavior_logprobs: the sampler's.
      mask: the policy's tokens; the others count for nothing.
      trajectory_ids: rows of one trajectory share an id; any integers.
      low, high: accepted range of the geometric mean ratio, 0 < `low` < `high`.

    Returns:
      bool `[B, T]`, the same for all tokens of a trajectory; true for one without tokens.

    Raises:
      ValueError: unequal shapes, wrong dtypes, bounds out of order.

    Source: mismatch rejection in Dr. Kernel, 2026, arXiv 2602.05885.
    """
    total, count = _by_trajectory(_limited(logprobs, behavior_logprobs, mask), mask, trajectory_ids)
    return _within(total / jnp.maximum(count, 1.0), low, high, mask)


def trajectory_sequence_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    trajectory_ids: Int[Array, " B"],
    *,
    low: float = 0.5,
    high: float = 2.0,
) -> Bool[Array, "B T"]:
    """True for whole trajectories with `low <= Π π_old/μ <= high`, over all tokens.

    Longer trajectories are rejected sooner; see `trajectory_geometric_mismatch`, also for the
    arguments.
    """
    total, _ = _by_trajectory(_limited(logprobs, behavior_logprobs, mask), mask, trajectory_ids)
    return _within(total, low, high, mask)


def turn_geometric_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    turn_ids: Int[Array, "B T"],
    *,
    num_turns: int,
    trajectory_ids: Int[Array, " B"] | None = None,
    low: float = 0.999,
    high: float = 1.001,
) -> Bool[Array, "B T"]:
    """True for whole turns whose geometric mean ratio per token lies in `[low, high]`.

    Args:
      logprobs, behavior_logprobs, mask, low, high: as in `trajectory_geometric_mismatch`.
      turn_ids: turn of each token, -1 outside.
      num_turns: more than the largest turn id; static.
      trajectory_ids: as there; None: each row is its own trajectory.

    Returns:
      bool `[B, T]`; true outside the turns. With one turn a row it is `geometric_mismatch`.

    Raises:
      ValueError: as there; concrete turn ids out of range.
    """
    total, count = _by_turn(
        _limited(logprobs, behavior_logprobs, mask), mask, turn_ids, num_turns, trajectory_ids
    )
    mean = total / jnp.maximum(count, 1)
    return _within(at_turns(mean, turn_ids, trajectory_ids=trajectory_ids), low, high, mask)


def turn_sequence_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    turn_ids: Int[Array, "B T"],
    *,
    num_turns: int,
    trajectory_ids: Int[Array, " B"] | None = None,
    low: float = 0.5,
    high: float = 2.0,
) -> Bool[Array, "B T"]:
    """True for whole turns with `low <= Π π_old/μ <= high`, over the turn's tokens.

    Arguments, result and errors as in `turn_geometric_mismatch`.
    """
    total, _ = _by_turn(
        _limited(logprobs, behavior_logprobs, mask), mask, turn_ids, num_turns, trajectory_ids
    )
    return _within(at_turns(total, turn_ids, trajectory_ids=trajectory_ids), low, high, mask)


def trajectory_veto(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    trajectory_ids: Int[Array, " B"],
    *,
    threshold: float = 1e-4,
) -> Bool[Array, "B T"]:
    """False for all rows of a trajectory that holds a token with `π_old/μ < threshold`.

    `masks.veto` drops only the row that holds it. Arguments as in
    `trajectory_geometric_mismatch`; `threshold` > 0.
    """
    rows = veto(logprobs, behavior_logprobs, mask, threshold=threshold).all(-1)
    ids = _trajectories(trajectory_ids, mask)
    bad = segments.count(ids, num_segments=ids.shape[0], where=~rows)
    return jnp.broadcast_to((bad[ids] == 0)[:, None], mask.shape)


def _limited(logprobs: Array, behavior_logprobs: Array, mask: Array) -> Array:
    return jnp.clip(
        _log_ratio(logprobs, behavior_logprobs, mask), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
    )


def _trajectories(trajectory_ids: Array, mask: Array) -> Array:
    ids = segments.dense_ids(trajectory_ids)
    if ids.shape[0] != mask.shape[0]:
        raise ValueError(
            f"trajectory_ids: expected {mask.shape[0]} ids like mask, got {ids.shape[0]}"
        )
    return ids


def _by_trajectory(log_ratio: Array, mask: Array, trajectory_ids: Array) -> tuple[Array, Array]:
    """Sum of the log-ratios and number of tokens of each row's trajectory, `[B, 1]`."""
    ids = _trajectories(trajectory_ids, mask)
    both = jnp.stack([log_ratio.sum(-1), mask.sum(-1).astype(log_ratio.dtype)], axis=-1)
    total = segments.total(both, ids, num_segments=ids.shape[0])[ids]
    return total[:, :1], total[:, 1:]


def _by_turn(
    log_ratio: Array, mask: Array, turn_ids: Array, num_turns: int, trajectory_ids: Array | None
) -> tuple[Array, Array]:
    total = turn_totals(
        log_ratio, turn_ids, num_turns=num_turns, trajectory_ids=trajectory_ids, mask=mask
    )
    count = turn_sizes(turn_ids, num_turns=num_turns, trajectory_ids=trajectory_ids, mask=mask)
    return total, count


def _within(log_ratio: Array, low: float, high: float, mask: Array) -> Array:
    _checks.in_range("low", low, 0.0, low_open=True)
    _checks.in_range("high", high, low, low_open=True)
    ratio = jnp.exp(log_ratio)
    return jnp.broadcast_to((ratio >= low) & (ratio <= high), mask.shape)
