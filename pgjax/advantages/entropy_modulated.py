"""Advantages scaled by how sure the policy was at each step.

A step is a segment of tokens (a turn, a thought, one decision); grids `[B, S]` hold one number a
step, and `valid` says which steps exist. Minima, maxima and means run over all valid steps.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks, aggregate
from pgjax.returns import next_values_within
from pgjax.returns.turns import turn_sizes, turn_totals


def step_entropy(
    entropy: Float[Array, "B T"],
    step_ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    num_steps: int,
    trajectory_ids: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Mean entropy of each step's tokens, and which steps have tokens.

    Args:
      entropy: of the distribution each token was drawn from, in nats, ≥ 0.
      step_ids: step of each token, -1 outside, not decreasing along a row; masked tokens inside a
        step do not count.
      mask: the policy's tokens.
      num_steps: S, static.
      trajectory_ids: rows of one trajectory share an id, and their steps one row of the grid;
        None: each row is its own trajectory.

    Returns:
      f32 `[B, S]`, 0 at steps without tokens, and bool `[B, S]`.

    Raises:
      ValueError: unequal shapes, wrong dtypes; concrete entropies below 0, concrete step ids out of
        range or decreasing.

    Source: EMPG, Wang et al. 2025, arXiv 2509.09265.
    """
    _checks.boolean(mask=mask)
    _checks.same_shape(entropy=entropy, step_ids=step_ids, mask=mask)
    if _checks.is_concrete(entropy, step_ids, mask):
        _check_values(entropy, step_ids, mask)
    options: dict[str, Any] = {
        "num_turns": num_steps, "trajectory_ids": trajectory_ids, "mask": mask
    }  # fmt: skip
    count = turn_sizes(step_ids, **options)
    return turn_totals(entropy, step_ids, **options) / jnp.maximum(count, 1), count > 0


def normalized_entropy(
    entropy: Float[Array, "B S"], valid: Bool[Array, "B S"], *, epsilon: float = 1e-8
) -> Float[Array, "B S"]:
    """`(H - min H) / (max H - min H + ε)` over all valid steps: in [0, 1], 0 if all are equal.

    Args:
      entropy: one a step.
      valid: steps that exist; the others get 0.
      epsilon: ε > 0.

    Raises:
      ValueError: unequal shapes, wrong dtypes, `epsilon` ≤ 0.
    """
    _checks.in_range("epsilon", epsilon, 0.0, low_open=True, high_open=True)
    _checks.floating(entropy=entropy)
    low, high = aggregate.masked_min(entropy, valid), aggregate.masked_max(entropy, valid)
    return jnp.where(valid, (entropy - low) / (high - low + epsilon), 0.0)


def entropy_scale(
    entropy: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    k: float = 1.0,
    epsilon: float = 1e-8,
) -> Float[Array, "B S"]:
    """Self-calibrating scale `g_s = exp(-k Hn_s) / (mean exp(-k Hn) + ε)`, of mean 1.

    Sure steps learn faster, right or wrong; unsure ones, whose score function is large, slower.

    Args:
      entropy, valid, epsilon: as in `normalized_entropy`.
      k: ≥ 0; 0 gives 1 everywhere.

    Returns:
      f32 `[B, S]`, 0 at steps that are not valid.

    Raises:
      ValueError: as `normalized_entropy`; `k` < 0.

    Source: EMPG, Wang et al. 2025, arXiv 2509.09265.
    """
    _checks.in_range("k", k, 0.0, high_open=True)
    weight = jnp.exp(-k * normalized_entropy(entropy, valid, epsilon=epsilon))
    return jnp.where(valid, weight / (aggregate.masked_mean(weight, valid) + epsilon), 0.0)


def future_clarity(
    entropy: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    k: float = 1.0,
    epsilon: float = 1e-8,
) -> Float[Array, "B S"]:
    """How sure the policy is at the step that follows, `f_{s+1} = exp(-k Hn_{s+1})`.

    Args:
      entropy, valid, epsilon: as in `normalized_entropy`.
      k: ≥ 0.

    Returns:
      f32 `[B, S]` of the next valid step of the trajectory; 0 at its last one and at steps that
      are not valid.

    Raises:
      ValueError: as `normalized_entropy`; `k` < 0.

    Source: as `entropy_scale`.
    """
    _checks.in_range("k", k, 0.0, high_open=True)
    clarity = jnp.exp(-k * normalized_entropy(entropy, valid, epsilon=epsilon))
    return next_values_within(clarity, valid)


def modulate_by_entropy(
    advantages: Float[Array, " B"] | Float[Array, "B S"],
    entropy: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    k: float = 1.0,
    k_future: float = 1.0,
    zeta: float = 0.1,
) -> Float[Array, "B S"]:
    """Scaled by the step's own entropy, with a bonus for the next one's: `A g_s + ζ f_{s+1}`.

    Args:
      advantages: of each trajectory, or of each step.
      entropy, valid: from `step_entropy`.
      k, k_future: of `entropy_scale` and `future_clarity`, ≥ 0.
      zeta: ζ ≥ 0.

    Returns:
      f32 `[B, S]`, not centred (see `centered_steps`); 0 at steps that are not valid. With
      `k=0, zeta=0` the advantages themselves.

    Raises:
      ValueError: wrong ranks, unequal lengths, options out of range.

    Source: EMPG, Wang et al. 2025, arXiv 2509.09265.
    """
    _checks.in_range("zeta", zeta, 0.0, high_open=True)
    _checks.rank("advantages", advantages, 1, 2)
    _checks.floating(advantages=advantages)
    per_step = jnp.asarray(advantages)
    per_step = per_step[:, None] if per_step.ndim == 1 else per_step
    if per_step.shape not in (valid.shape, (valid.shape[0], 1)):
        raise ValueError(
            f"advantages: expected shape {valid.shape[:1]} or {valid.shape}, "
            f"got {np.shape(advantages)}"
        )
    scaled = jnp.where(valid, per_step, 0.0) * entropy_scale(entropy, valid, k=k)
    return scaled + zeta * future_clarity(entropy, valid, k=k_future)


def centered_steps(
    advantages: Float[Array, "B S"],
    valid: Bool[Array, "B S"],
    *,
    weights: Float[Array, "B S"] | Int[Array, "B S"] | None = None,
) -> Float[Array, "B S"]:
    """Less the mean over all valid steps, `A - Σ w A / Σ w`.

    Args:
      advantages: one a step.
      valid: steps that exist; the others get 0.
      weights: ≥ 0; each step's number of tokens for the mean over tokens; None: 1.

    Returns:
      f32 `[B, S]`.

    Raises:
      ValueError: wrong dtypes or unequal shapes.

    Source: EMPG, Wang et al. 2025, arXiv 2509.09265, which does not say over what the mean is
    taken.
    """
    _checks.boolean(valid=valid)
    _checks.floating(advantages=advantages)
    _checks.same_shape(advantages=advantages, valid=valid, weights=weights)
    w = jnp.where(valid, 1.0 if weights is None else weights, 0.0)
    x = jnp.where(valid, advantages, 0.0)
    total = w.sum()
    mean = jnp.sum(w * x) / jnp.where(total > 0, total, 1.0)
    return jnp.where(valid, x - mean, 0.0)


def _check_values(entropy: Any, step_ids: Any, mask: Any) -> None:
    kept, ids, inside = np.asarray(mask), np.asarray(step_ids), np.asarray(step_ids) >= 0
    values = np.asarray(entropy)[kept & inside]
    if values.size and values.min() < -1e-4:  # rounding may leave a sure step a little below 0
        raise ValueError(f"entropy: expected numbers of at least 0, got {values.min()}")
    reached = np.maximum.accumulate(np.where(inside, ids, -1), axis=1)
    if np.any(inside & (ids < reached)):
        raise ValueError("step_ids: expected ids that do not decrease along a row")
