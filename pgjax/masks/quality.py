"""Leaving out solutions that are correct without having done the work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pgjax import _checks


def coverage_keep_probability(
    coverage: Float[Array, "*S"],
    correct: Bool[Array, "*S"],
    *,
    low: float = 0.3,
    width: float = 0.1,
    speedup: Float[Array, "*S"] | None = None,
    min_speedup: float | None = None,
) -> Float[Array, "*S"]:
    """With what probability a turn is kept: `clip((coverage - low) / width, 0, 1)` if correct.

    Incorrect turns are always kept. Draw from it with `bernoulli_mask`.

    Args:
      coverage: share in [0, 1] of the run time that the turn's own work accounts for; not finite
        (no profile) counts as 0.
      correct: whether the turn's solution passed its tests.
      low: coverage up to which nothing is kept, in [0, 1].
      width: of the ramp above `low`, ≥ 0; 0 keeps exactly `coverage >= low`.
      speedup: measured speed-up; only with `min_speedup`.
      min_speedup: a speed-up of this or more is kept whatever its coverage; None: no exception.

    Returns:
      f32 in [0, 1], of the same shape.

    Raises:
      ValueError: unequal shapes, wrong dtypes, options or concrete coverage out of range, one of
        `speedup` and `min_speedup` without the other.

    Source: profiling-based rejection sampling in Dr. Kernel, 2026, arXiv 2602.05885.
    """
    _checks.in_range("low", low, 0.0, 1.0)
    _checks.in_range("width", width, 0.0, high_open=True)
    _checks.boolean(correct=correct)
    _checks.floating(coverage=coverage, speedup=speedup)
    _checks.same_shape(coverage=coverage, correct=correct, speedup=speedup)
    _check_share("coverage", coverage)
    if (speedup is None) != (min_speedup is None):
        raise ValueError("speedup and min_speedup: expected both or neither")
    x = jnp.where(jnp.isfinite(coverage), coverage, 0.0).astype(jnp.float32)
    keep = jnp.clip((x - low) / width, 0.0, 1.0) if width else jnp.where(x >= low, 1.0, 0.0)
    if speedup is not None and min_speedup is not None:
        keep = jnp.where(speedup >= min_speedup, 1.0, keep)
    return jnp.where(correct, keep, 1.0)


def bernoulli_mask(key: PRNGKeyArray, probability: Float[Array, "*S"]) -> Bool[Array, "*S"]:
    """Independent draws that are true with the given probability.

    Args:
      key: of the draws.
      probability: any shape; 0 is never true, 1 always.

    Returns:
      bool, of the same shape; false where the probability is NaN.

    Raises:
      ValueError: a wrong dtype or concrete values outside [0, 1].
    """
    _checks.floating(probability=probability)
    _check_share("probability", probability)
    # The uniform draw lies in [0, 1), so 1 is certain and 0 impossible.
    return jax.random.uniform(key, np.shape(probability)) < jnp.asarray(probability)


def geometric_coverage(
    coverage: Float[Array, "*B M"], valid: Bool[Array, "*B M"]
) -> Float[Array, "*B"]:
    """Geometric mean of the coverage over a trajectory's valid turns: one number a trajectory.

    Args:
      coverage: of each turn, in [0, 1].
      valid: turns that count.

    Returns:
      f32; 0 if any valid turn has coverage 0, and for a trajectory without valid turns.

    Raises:
      ValueError: unequal shapes, wrong dtypes, concrete coverage outside [0, 1].

    Source: as `coverage_keep_probability`.
    """
    _checks.floating(coverage=coverage)
    _checks.boolean(valid=valid)
    _checks.same_shape(coverage=coverage, valid=valid)
    _check_share("coverage", coverage)
    positive = valid & (coverage > 0)
    logs = jnp.where(positive, jnp.log(jnp.where(positive, coverage, 1.0)), 0.0)
    count = valid.sum(-1)
    mean = jnp.exp(logs.sum(-1) / jnp.maximum(count, 1))
    return jnp.where((count > 0) & (positive.sum(-1) == count), mean, 0.0)


def _check_share(name: str, values: Any) -> None:
    """Raises ValueError on concrete finite values outside [0, 1]."""
    if not _checks.is_concrete(values) or not getattr(values, "is_fully_addressable", True):
        return
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if known.size and (known.min() < 0 or known.max() > 1):
        raise ValueError(
            f"{name}: expected values in [0, 1], got values in [{known.min()}, {known.max()}]"
        )
