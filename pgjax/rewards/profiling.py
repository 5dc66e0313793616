"""Rewards for code that must not only be correct but be fast, by its own doing."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks


def profiling_reward(
    correct: Bool[Array, "*S"],
    speedup: Float[Array, "*S"],
    coverage: Float[Array, "*S"],
    *,
    correct_weight: float = 0.5,
    speedup_weight: float = 0.5,
    speedup_cap: float = 3.0,
    coverage_weight: float = 0.5,
    decoy: Bool[Array, "*S"] | None = None,
    penalty: float = 0.0,
) -> Float[Array, "*S"]:
    """`w_correct + w_speedup min(speedup, cap) + w_coverage coverage` where correct, else penalty.

    Args:
      correct: whether the tests passed.
      speedup: of the reference's run time over the solution's; below 0 counts as 0. Not read where
        incorrect.
      coverage: share in [0, 1] of the run time that the solution's own work accounts for, see
        `time_coverage`. Not read where incorrect.
      correct_weight, speedup_weight, coverage_weight: ≥ 0.
      speedup_cap: ≥ 0; more earns nothing.
      decoy: solutions that pass without doing the work (their own code never runs); these count as
        incorrect. None: none.
      penalty: the reward of what is incorrect.

    Returns:
      f32, of the same shape; NaN where a correct solution's speed-up or coverage is not finite: its
      measurement failed, which is not the policy's doing.

    Raises:
      ValueError: unequal shapes, wrong dtypes, options out of range.

    Source: profiling reward of Dr. Kernel, 2026, arXiv 2602.05885; w_coverage is 0.5 in the scripts
    for the 14B model, 0 in other configurations.
    """
    _checks.boolean(correct=correct)
    _checks.floating(speedup=speedup, coverage=coverage)
    _checks.same_shape(correct=correct, speedup=speedup, coverage=coverage, decoy=decoy)
    for name, value in {
        "correct_weight": correct_weight,
        "speedup_weight": speedup_weight,
        "speedup_cap": speedup_cap,
        "coverage_weight": coverage_weight,
    }.items():
        _checks.in_range(name, value, 0.0, high_open=True)
    passed = jnp.asarray(correct)
    if decoy is not None:
        _checks.boolean(decoy=decoy)
        passed = passed & ~decoy
    measured = jnp.isfinite(speedup) & jnp.isfinite(coverage)
    score = (
        correct_weight
        + speedup_weight * jnp.clip(speedup, 0.0, speedup_cap)
        + coverage_weight * coverage
    )
    score = jnp.where(measured, score, jnp.nan)
    return jnp.where(passed, score, penalty).astype(jnp.promote_types(score.dtype, jnp.float32))


def time_coverage(own_time: Float[Array, "*S"], total_time: Float[Array, "*S"]) -> Array:
    """Share of the device time spent in the solution's own kernels, `own / total`, in [0, 1].

    Args:
      own_time, total_time: ≥ 0, in one unit; counts of kernel launches do as well.

    Returns:
      f32, of the same shape; 0 where the total is 0.

    Raises:
      ValueError: unequal shapes or wrong dtypes.

    Source: as `profiling_reward`.
    """
    _checks.floating(own_time=own_time, total_time=total_time)
    _checks.same_shape(own_time=own_time, total_time=total_time)
    ran = total_time > 0
    share = own_time / jnp.where(ran, total_time, 1.0)
    return jnp.where(ran, jnp.clip(share, 0.0, 1.0), 0.0)
