"""Normalisation in two steps, as parts to choose: what is subtracted, and what that is divided by.

Centres take `(rewards, group_ids, *, num_groups, where)`, as `centered` does; scales take the
deviations in front. `objectives.normalized` joins one of each.

Args, returns, raises of all: rewards f32 `[B]`, not finite where the verifier failed; `group_ids`
int32 `[B]` in `[0, num_groups)`; `where` bool `[B]`, rows that count. f32 `[B]`. ValueError for
wrong ranks, dtypes or unequal lengths.

Source: the ablation in "Tricks or Traps?", Liu et al. 2025, arXiv 2508.08221.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import segments
from pgjax.advantages import _common
from pgjax.advantages.group import centered


def batch_centered(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Reward minus the batch's mean, whatever the group; 0 for non-finite rewards."""
    del num_groups
    return centered(rewards, jnp.zeros_like(group_ids), num_groups=1, where=where)


def uncentered(
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The reward itself; 0 where it is not finite."""
    del group_ids, num_groups
    return _common.finite_part(rewards, where)[0]


def by_group_std(
    deviations: Float[Array, " B"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """Over the group's sample standard deviation, `x / (std_g R + ε)`; 0 where that is 0."""
    _common.check_scale(epsilon, 1)
    x, _, counted = _common.finite_part(rewards, where)
    spread = segments.per_row(
        segments.std(x, group_ids, num_segments=num_groups, ddof=1, where=counted), group_ids
    )
    return _common.divided(deviations, spread, spread + epsilon)


def by_batch_std(
    deviations: Float[Array, " B"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """Over the batch's sample standard deviation of raw rewards, `x / (std R + ε)`; 0 if that is 0.

    So 0 also for a batch of a single sample.
    """
    del num_groups
    zeros = jnp.zeros_like(group_ids)
    return by_group_std(deviations, rewards, zeros, num_groups=1, where=where, epsilon=epsilon)


def by_centered_batch_std(
    deviations: Float[Array, " B"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, " B"]:
    """As `by_batch_std`, of rewards less their group's mean: how groups differ does not matter."""
    within = centered(rewards, group_ids, num_groups=num_groups, where=where)
    within = jnp.where(jnp.isfinite(rewards), within, jnp.nan)
    return by_batch_std(
        deviations, within, group_ids, num_groups=num_groups, where=where, epsilon=epsilon
    )


def unscaled(
    deviations: Float[Array, " B"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    num_groups: int,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """The deviations as they are."""
    del rewards, group_ids, num_groups, where
    return deviations
