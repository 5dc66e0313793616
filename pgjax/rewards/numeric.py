"""Rewards of numeric answers."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from pgjax import _checks


def _check(pred: Array, ref: Array, ok: Array) -> tuple[Array, Array, Array]:
    _checks.boolean(ok=ok)
    _checks.same_shape(pred=pred, ok=ok)
    pred, ref, ok = jnp.asarray(pred), jnp.asarray(ref), jnp.asarray(ok)
    try:
        shape = jnp.broadcast_shapes(pred.shape, ref.shape)
    except ValueError:
        shape = None
    if shape != pred.shape:
        raise ValueError(
            f"ref: expected a shape that broadcasts to pred's {pred.shape}, got {ref.shape}"
        )
    return pred, ref, ok


def exact_reward(
    pred: Shaped[Array, "*N"], ref: Shaped[Array, "*N"], ok: Bool[Array, "*N"]
) -> Float[Array, "*N"]:
    """1 where the answer equals the reference, else 0.

    Args:
      pred: answers, integers or floats of any shape.
      ref: references, broadcastable to `pred`.
      ok: whether there is an answer at all.

    Returns:
      f32 of `pred`'s shape, in {0, 1}; 0 where not `ok` and where either number is NaN.

    Raises:
      ValueError: unequal shapes, or `ok` that is not bool.
    """
    pred, ref, ok = _check(pred, ref, ok)
    return (ok & (pred == ref)).astype(jnp.float32)


def numeric_reward(
    pred: Shaped[Array, "*N"],
    ref: Shaped[Array, "*N"],
    ok: Bool[Array, "*N"],
    *,
    epsilon: float = 1e-6,
) -> Float[Array, "*N"]:
    """Credit for coming near, half by absolute and half by relative distance.

        r(a, b) = 1 - min(|a-b|, 1)/2 - min(|a-b| / (|b| + epsilon), 1)/2

    Args:
      pred: a, answers, integers or floats of any shape.
      ref: b, references, broadcastable to `pred`.
      ok: whether there is an answer at all.
      epsilon: keeps the relative distance finite at b = 0; above 0.

    Returns:
      f32 (f64 for f64 inputs) of `pred`'s shape, in [0, 1]; 0 where not `ok` and where either
      number is NaN or infinite. Two different integers count as at least 1 apart even where f32
      cannot tell them apart.

    Raises:
      ValueError: unequal shapes, `ok` that is not bool, or epsilon not above 0.

    Source: "Reasoning or Memorization? Unreliable Results of Reinforcement Learning Due to Data
    Contamination" (2025, arXiv:2507.10532).
    """
    _checks.in_range("epsilon", epsilon, 0, low_open=True)
    pred, ref, ok = _check(pred, ref, ok)
    dtype = jnp.promote_types(jnp.promote_types(pred.dtype, ref.dtype), jnp.float32)
    a, b = pred.astype(dtype), ref.astype(dtype)
    valid = ok & jnp.isfinite(a) & jnp.isfinite(b)
    a, b = jnp.where(valid, a, 0), jnp.where(valid, b, 0)
    distance = jnp.abs(a - b)
    if jnp.issubdtype(pred.dtype, jnp.integer) and jnp.issubdtype(ref.dtype, jnp.integer):
        distance = jnp.where(pred == ref, 0, jnp.maximum(distance, 1))
    relative = distance / (jnp.abs(b) + epsilon)
    reward = 1 - 0.5 * jnp.minimum(distance, 1) - 0.5 * jnp.minimum(relative, 1)
    return jnp.where(valid, reward, 0)
