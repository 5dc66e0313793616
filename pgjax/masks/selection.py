"""Which samples of a batch are used at all."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, segments


def finite_rewards(rewards: Float[Array, " B"] | Float[Array, "B T"]) -> Bool[Array, " B"]:
    """True for rows whose reward (every one of them, if per token) is a finite number."""
    _checks.rank("rewards", rewards, 1, 2)
    finite = jnp.isfinite(rewards)
    return finite if finite.ndim == 1 else jnp.all(finite, axis=-1)


def informative_groups(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], *, num_groups: int
) -> Bool[Array, " B"]:
    """True for rows of groups whose finite rewards are not all equal.

    DAPO's filter `0 < #correct < G`, for rewards of any kind: a group whose rewards agree has no
    advantage signal. Rows with non-finite rewards do not count and are false.

    Args:
      rewards: one per sample.
      group_ids: int32, in [0, `num_groups`).
      num_groups: static.

    Returns:
      bool `[B]`.

    Raises:
      ValueError: wrong rank or unequal lengths; concrete ids out of range.

    Source: dynamic sampling of DAPO, Yu et al. 2025, arXiv 2503.14476. There, filtered prompts are
    replaced by newly sampled ones; here the rest of the batch simply remains.
    """
    _checks.rank("rewards", rewards, 1)
    _checks.same_shape(rewards=rewards, group_ids=group_ids)
    counted = jnp.isfinite(rewards)
    low = segments.minimum(rewards, group_ids, num_segments=num_groups, where=counted)
    high = segments.maximum(rewards, group_ids, num_segments=num_groups, where=counted)
    return counted & (high > low)[group_ids]


def overlong_filter(truncated: Bool[Array, " B"]) -> Bool[Array, " B"]:
    """False for samples cut off by the length budget, whose reward says little about them.

    Source: overlong filtering of DAPO, Yu et al. 2025, arXiv 2503.14476.
    """
    _checks.rank("truncated", truncated, 1)
    _checks.boolean(truncated=truncated)
    return ~truncated
