"""Facts about each row of a rollout that several recipes read, trajectories counted as one."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments
from pgjax.types import Rollout


def extra(name: str) -> Callable[[Rollout], Array]:
    """`rollout.extras[name]` as a function of the rollout; ValueError where it is missing."""

    def read(rollout: Rollout) -> Array:
        if rollout.extras is None or name not in rollout.extras:
            raise ValueError(
                f"rollout.extras: expected {name!r}, got {sorted(rollout.extras or {})}"
            )
        return rollout.extras[name]

    return read


def trajectory_of(rollout: Rollout) -> Int[Array, " B"]:
    """Each row's trajectory, in `[0, B)`; rows are their own where the rollout names none."""
    if rollout.trajectory_ids is None:
        return jnp.arange(rollout.tokens.shape[0], dtype=jnp.int32)
    return segments.dense_ids(rollout.trajectory_ids)


def one_row_each(rollout: Rollout) -> Bool[Array, " B"]:
    """The first row of each trajectory, which stands for it in statistics."""
    if rollout.trajectory_ids is None:
        return jnp.ones(rollout.tokens.shape[0], bool)
    return segments.first_rows(rollout.trajectory_ids)


def trajectory_total(rollout: Rollout, values: Array) -> Array:
    """For each row of `[B, ...]`, the sum over the rows of its trajectory."""
    if rollout.trajectory_ids is None:
        return values
    ids = trajectory_of(rollout)
    return segments.total(values, ids, num_segments=ids.shape[0])[ids]


def row_mean(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over each row's true tokens; 0 where there is none."""
    return jnp.where(mask, values, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def number_of_turns(rollout: Rollout) -> Int[Array, " B"]:
    """Turns that the policy took, all rows of a trajectory together; int32 `[B]`.

    Raises:
      ValueError: `rollout.turn_ids` is None.
    """
    if rollout.turn_ids is None:
        raise ValueError(
            "rollout.turn_ids: needed to count turns, got None; give strata or bucket_width"
        )
    turns = jnp.max(jnp.where(rollout.mask, rollout.turn_ids, -1), axis=-1) + 1
    ids = trajectory_of(rollout)
    return segments.maximum(turns, ids, num_segments=ids.shape[0])[ids].astype(jnp.int32)


def response_length(rollout: Rollout) -> Int[Array, " B"]:
    """Tokens that the policy chose, all rows of a trajectory together; int32 `[B]`."""
    return trajectory_total(rollout, rollout.mask.sum(-1)).astype(jnp.int32)


def length_bucket(rollout: Rollout, *, width: int) -> Int[Array, " B"]:
    """`floor(response_length / width)`; int32 `[B]`.

    Raises:
      ValueError: a width below 1.
    """
    _checks.in_range("width", width, 1)
    return response_length(rollout) // width


def mean_entropy(rollout: Rollout) -> Float[Array, " B"]:
    """Mean over the response's tokens of the old policy's entropy, in nats; 0 without tokens."""
    assert rollout.old is not None and rollout.old.entropy is not None  # the objective's old_needs
    entropy = jnp.where(rollout.mask, rollout.old.entropy, 0.0).sum(-1)
    return trajectory_total(rollout, entropy) / jnp.maximum(response_length(rollout), 1)
