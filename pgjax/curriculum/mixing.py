"""Mixing coefficients that follow the policy's accuracy or the step."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, aggregate


def accuracy_mix(
    rewards: Float[Array, " B"],
    *,
    success_threshold: float = 0.5,
    where: Bool[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """The batch's accuracy as a coefficient: 0 while nothing succeeds, 1 once everything does.

    One minus it goes the other way.

    Args:
      rewards: one per sample; those that are not finite do not count.
      success_threshold: a sample succeeds if its reward is above.
      where: rows that count, such as the first row of each trajectory; None for all.

    Returns:
      f32 in [0, 1]; 0 if no row counts.

    Raises:
      ValueError: wrong rank, dtype or unequal lengths.

    Source: the accuracy-driven schedule of CANON, 2025, arXiv 2509.23962.
    """
    _checks.rank("rewards", rewards, 1)
    _checks.floating(rewards=rewards)
    _checks.in_range("success_threshold", success_threshold)
    _checks.same_shape(rewards=rewards, where=where)
    counted = jnp.isfinite(rewards) if where is None else jnp.isfinite(rewards) & where
    success = (jnp.asarray(rewards) > success_threshold).astype(jnp.float32)
    return aggregate.masked_mean(success, counted)


def cosine_restarts(
    step: int | Int[Array, ""],
    *,
    total: int = 150,
    warmup: int = 30,
    cycles: int = 3,
    peak: float = 0.6,
    floor: float = 0.0,
) -> Float[Array, ""]:
    """Linear from 0 to `peak`, then cosines from `peak` to `floor`, one after the other.

        peak step / warmup                                       step < warmup
        floor + (peak - floor) (1 + cos(π x)) / 2                after it
        floor                                                    from step `total` on

    with x in [0, 1) the position within the current one of `cycles` equal cycles.

    Args:
      step: ≥ 0; may be traced.
      total: steps of all, more than `warmup`.
      warmup: steps of the linear part, ≥ 0.
      cycles: ≥ 1.
      peak, floor: in [0, 1], `floor` at most `peak`.

    Returns:
      f32 scalar in [0, 1].

    Raises:
      ValueError: a number out of range.

    Source: CANON, 2025, arXiv 2509.23962, whose numbers are the defaults.
    """
    _checks.in_range("step", step, 0)
    _checks.in_range("warmup", warmup, 0)
    _checks.in_range("total", total, warmup, low_open=True)
    _checks.in_range("cycles", cycles, 1)
    _checks.in_range("peak", peak, 0.0, 1.0)
    _checks.in_range("floor", floor, 0.0, peak)
    rise = peak * jnp.asarray(step) / max(warmup, 1)
    cycle = jnp.maximum(jnp.asarray(step) - warmup, 0) * (cycles / (total - warmup))
    wave = floor + (peak - floor) * 0.5 * (1 + jnp.cos(jnp.pi * (cycle - jnp.floor(cycle))))
    value = jnp.where(step < warmup, rise, jnp.where(step < total, wave, floor))
    return value.astype(jnp.float32)
