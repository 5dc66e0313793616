"""AdaGrad-Norm: one step size for all parameters, from the gradients' norms so far."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from pgjax import _checks
from pgjax._arrays import widened


class AdagradNormState(NamedTuple):
    """Sums of squared gradient norms: one float32 scalar, or a tree with one number per output."""

    sums: Any


def scale_by_adagrad_norm(
    *, initial: float = 1e-2, per_row: bool = False
) -> optax.GradientTransformation:
    """Divides updates by the root of all squared norms so far: `v ← v + ‖g‖²`, `g / √v`.

    The norm is that of the whole tree, in float32 or wider. Where v is 0, updates are 0.

    Args:
      initial: v before the first update, at least 0.
      per_row: static; one sum for each output (last axis) of each leaf instead of one in all, as
        in AdAdaGrad's released class. A leaf of rank 1 is then plain AdaGrad.

    Raises:
      ValueError: `initial` below 0.

    Source: Ward, Wu and Bottou, AdaGrad stepsizes, 2019, arXiv 1806.01811; AdAdaGrad, 2024,
    arXiv 2402.11215.
    """
    _checks.in_range("initial", initial, 0, math.inf, high_open=True)

    def init(params: Any) -> AdagradNormState:
        if not per_row:
            return AdagradNormState(jnp.full((), initial, jnp.float32))
        return AdagradNormState(
            jax.tree.map(lambda p: jnp.full(jnp.shape(p)[-1:], initial, jnp.float32), params)
        )

    def update(
        updates: Any, state: AdagradNormState, params: Any = None
    ) -> tuple[Any, AdagradNormState]:
        del params
        squares = jax.tree.map(lambda g: jnp.square(widened(g)), updates)
        if per_row:
            sums = jax.tree.map(
                lambda v, s: v + jnp.sum(s, axis=tuple(range(s.ndim - 1))), state.sums, squares
            )
            scales = jax.tree.map(_inverse_root, sums)
        else:
            sums = state.sums + optax.tree.sum(squares)
            scales = jax.tree.map(lambda _: _inverse_root(sums), updates)
        scaled = jax.tree.map(lambda g, s: (widened(g) * s).astype(g.dtype), updates, scales)
        return scaled, AdagradNormState(sums)

    return optax.GradientTransformation(init, update)


def adagrad_norm(
    learning_rate: optax.ScalarOrSchedule, *, initial: float = 1e-2, per_row: bool = False
) -> optax.GradientTransformation:
    """Descent by AdaGrad-Norm: `v ← v + ‖g‖²`, `x ← x - lr g / √v`; see `scale_by_adagrad_norm`.

    For AdaGrad itself, with a sum for each coordinate, use `optax.adagrad`.

    Args:
      learning_rate: a number or a schedule.
      initial: v before the first update, at least 0.
      per_row: static; one sum for each output of each leaf.

    Raises:
      ValueError: `initial` below 0.
    """
    return optax.chain(
        scale_by_adagrad_norm(initial=initial, per_row=per_row),
        optax.scale_by_learning_rate(learning_rate),
    )


def _inverse_root(v: Array) -> Array:
    return jnp.where(v > 0, jax.lax.rsqrt(jnp.where(v > 0, v, 1.0)), 0.0)
