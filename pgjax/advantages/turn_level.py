"""Group statistics turn by turn: each turn is compared with the same turn of the other samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.advantages.group import leave_one_out


def turn_level(
    function: Callable[..., Array],
    returns: Float[Array, "N M"],
    group_ids: Int[Array, " N"],
    valid: Bool[Array, "N M"],
    *,
    num_groups: int,
    **options: Any,
) -> Float[Array, "N M"]:
    """A group advantage in which turn m of group g is a group of its own, with id `g M + m`.

    Args:
      function: `(rewards[R], group_ids[R], *, num_groups, where, ...) -> [R]`, such as
        `leave_one_out`, `centered` or `group_normalize`.
      returns: return to go of each turn of each trajectory, see `returns.turn_returns`.
      group_ids: int32 in `[0, num_groups)`, of each trajectory.
      valid: turns that took place; the others are in no statistic.
      num_groups: static.
      **options: of the function.

    Returns:
      `[N, M]`; 0 at turns that are not valid.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths; concrete ids out of range.
    """
    _checks.rank("returns", returns, 2)
    _checks.boolean(valid=valid)
    _checks.same_shape(returns=returns, valid=valid)
    _checks.segment_ids("group_ids", group_ids, num_groups)
    turns = returns.shape[1]
    if group_ids.shape[0] != returns.shape[0]:
        raise ValueError(
            f"group_ids: expected {returns.shape[0]} ids like returns, got {group_ids.shape[0]}"
        )
    ids = jnp.asarray(group_ids)[:, None] * turns + jnp.arange(turns)
    found = function(
        jnp.asarray(returns).reshape(-1),
        ids.reshape(-1),
        num_groups=num_groups * turns,
        where=jnp.asarray(valid).reshape(-1),
        **options,
    )
    return jnp.where(valid, found.reshape(returns.shape), 0.0)


def turn_leave_one_out(
    returns: Float[Array, "N M"],
    group_ids: Int[Array, " N"],
    valid: Bool[Array, "N M"],
    *,
    num_groups: int,
) -> Float[Array, "N M"]:
    """TRLOO: a turn's return minus the mean return of the same turn of the group's other samples.

    `A_{i,m} = G_{i,m} - mean_{j≠i in V_m} G_{j,m} = N_m/(N_m - 1) (G_{i,m} - mean_{V_m} G)`, with
    V_m the N_m samples of the group whose turn m took place.

    Whether turn m takes place is settled before its action is drawn, so the baseline does not
    depend on that action, and with γ = 1 the expected gradient is the policy gradient exactly, also
    where N_m = 1. With the sample in its own baseline turn m's gradient shrinks to
    `E[1 - 1/N_m]` of it, later turns more than earlier ones. A `valid` that depends on the turn's
    own action (rejected turns left out) gives this up.

    Args:
      returns, group_ids, valid, num_groups: as in `turn_level`.

    Returns:
      `[N, M]`; the return itself where N_m = 1, 0 at turns that are not valid and for returns that
      are not finite.

    Raises:
      ValueError: as `turn_level`.

    Source: TRLOO in Dr. Kernel, 2026, arXiv 2602.05885.
    """
    return turn_level(leave_one_out, returns, group_ids, valid, num_groups=num_groups)
