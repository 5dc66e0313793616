"""Composite mirror descent: gradient steps in the geometry that a set of parameters has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks

GEOMETRIES = ("euclid", "simplex")


def mirror_step(
    x: Float[Array, "*b n"],
    gradient: Float[Array, "*b n"],
    learning_rate: Any,
    *,
    geometry: str = "euclid",
    prox: Callable[[Array, Any], Array] | None = None,
) -> Float[Array, "*b n"]:
    """One step of `argmin_u h(u) + <g, u> + D(u, x) / η`.

        euclid:   D = ½ ‖u - x‖²,        prox(x - η g, η)
        simplex:  D = KL(u ‖ x),         u ∝ x exp(-η g) over the last axis, then prox(u, η)

    On the simplex this is the exact step of policy mirror ascent for tabular policies when g holds
    the negative action values: `log x - η g` up to a constant. Zeros stay zeros.

    Args:
      x: the point; on the simplex, at least 0 with sum 1 over the last axis.
      gradient: of x's shape.
      learning_rate: η, at least 0; may be traced, may broadcast.
      geometry: one of `GEOMETRIES`, static.
      prox: (point, η) to the proximal step of h in the same geometry, such as a projection,
        `optax.projections`, or `soft_threshold`; None: h = 0.

    Returns:
      Like x, in its dtype; the arithmetic is float32 or wider.

    Raises:
      ValueError: unequal shapes, another geometry, η below 0, a concrete x off the simplex.

    Source: as in Liu and Zhou, Revisiting the last-iterate convergence, 2024, arXiv 2312.08531.
    """
    _checks.one_of("geometry", geometry, GEOMETRIES)
    _checks.same_shape(x=x, gradient=gradient)
    if np.ndim(learning_rate) == 0:
        _checks.in_range("learning_rate", learning_rate, 0)
    dtype = jnp.result_type(x)
    wide = jnp.promote_types(dtype, jnp.float32)
    point, g = jnp.asarray(x, wide), jnp.asarray(gradient, wide)
    if geometry == "simplex":
        _check_simplex(x)
        logits = jnp.where(point > 0, jnp.log(jnp.where(point > 0, point, 1.0)), -jnp.inf)
        moved = jax.nn.softmax(logits - learning_rate * g, axis=-1)
    else:
        moved = point - learning_rate * g
    if prox is not None:
        moved = prox(moved, learning_rate)
    return moved.astype(dtype)


def soft_threshold(x: Float[Array, "*n"], threshold: Any) -> Float[Array, "*n"]:
    """The proximal step of `threshold ‖x‖₁`: `sign(x) max(|x| - threshold, 0)`.

    As `prox` of `mirror_step`, for h = λ ‖.‖₁: `lambda x, lr: soft_threshold(x, lam * lr)`.

    Raises:
      ValueError: a concrete scalar threshold below 0.
    """
    if np.ndim(threshold) == 0:
        _checks.in_range("threshold", threshold, 0)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0.0)


def _check_simplex(x: Array) -> None:
    if not _checks.is_concrete(x):
        return
    values = np.asarray(x, np.float64)
    # Rounding of n numbers to the dtype; bfloat16 has an epsilon of 2^-7.
    slack = 4 * float(jnp.finfo(jnp.result_type(x)).eps) * max(values.shape[-1], 8)
    sums = values.sum(-1)
    if not (np.all(values >= 0) and np.all(np.abs(sums - 1) <= slack)):
        raise ValueError(
            "x: expected points of the simplex, at least 0 with sums of 1, got sums from "
            f"{sums.min()} to {sums.max()} and a least entry of {values.min()}"
        )
