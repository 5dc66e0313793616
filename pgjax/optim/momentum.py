"""Momentum, in the conventions that matrix optimizers disagree about.

They differ by a factor 1 / (1 - β), which only a step that keeps the gradient's scale notices:

    ema                  M ← β M + (1 - β) G;   gives M
    ema_nesterov         the same M;            gives β M + (1 - β) G
    heavy_ball           M ← β M + G;           gives M
    heavy_ball_nesterov  the same M;            gives β M + G
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from pgjax import _checks
from pgjax._arrays import widened

KINDS = ("ema", "ema_nesterov", "heavy_ball", "heavy_ball_nesterov")


class MomentumState(NamedTuple):
    """How many updates there were, and the buffer M."""

    step: Int[Array, ""]
    buffer: Any


class DisplacementState(NamedTuple):
    """The parameters one update ago."""

    previous: Any


def momentum(
    beta: Any, kind: str = "ema", *, debias: bool = False, dtype: Any = None
) -> optax.GradientTransformation:
    """Momentum of one of the kinds above; the arithmetic is float32, the buffer starts at 0.

    Args:
      beta: in [0, 1); may be traced.
      kind: static.
      debias: for averages, divides M by `1 - β^t`, and for Nesterov's form as Optax does:
        `β M / (1 - β^(t+1)) + (1 - β) G / (1 - β^t)`.
      dtype: of the buffer; None: the parameter's.

    Raises:
      ValueError: another kind, β outside [0, 1), `debias` with a heavy ball.
    """
    _checks.one_of("kind", kind, KINDS)
    _checks.in_range("beta", beta, 0, 1, high_open=True)
    average = kind.startswith("ema")
    if debias and not average:
        raise ValueError(f"debias: only averages have a bias, got kind {kind!r}")

    def init(params: Any) -> MomentumState:
        buffer = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
        return MomentumState(jnp.zeros((), jnp.int32), buffer)

    def update(updates: Any, state: MomentumState, params: Any = None) -> tuple[Any, MomentumState]:
        del params
        count = optax.safe_increment(state.step)
        share = 1 - beta if average else 1.0

        def moved(g: Array, m: Array) -> Array:
            return beta * widened(m) + share * widened(g)

        def given(g: Array, m: Array) -> Array:
            now = moved(g, m)
            here, ahead = 1.0, 1.0
            if debias:
                t = count.astype(now.dtype)
                here, ahead = 1 - beta**t, 1 - beta ** (t + 1)
            if kind.endswith("nesterov"):
                now = beta * now / ahead + share * widened(g) / here
            else:
                now = now / here
            return now.astype(g.dtype)

        out = jax.tree.map(given, updates, state.buffer)
        buffer = jax.tree.map(lambda g, m: moved(g, m).astype(m.dtype), updates, state.buffer)
        return out, MomentumState(count, buffer)

    return optax.GradientTransformation(init, update)


def add_displacement(beta: Any) -> optax.GradientTransformation:
    """Polyak's heavy ball by the last step itself: adds `β (X_k - X_(k-1))`, which is 0 at first.

    Belongs behind the learning rate, so that a changing rate does not rescale the past.

    Raises:
      ValueError: β outside [0, 1), an update without `params`.
    """
    _checks.in_range("beta", beta, 0, 1, high_open=True)

    def init(params: Any) -> DisplacementState:
        return DisplacementState(jax.tree.map(jnp.array, params))

    def update(
        updates: Any, state: DisplacementState, params: Any = None
    ) -> tuple[Any, DisplacementState]:
        if params is None:
            raise ValueError("params: a heavy ball needs the parameters, got None")

        def moved(u: Array, now: Array, before: Array) -> Array:
            return (widened(u) + beta * (widened(now) - widened(before))).astype(u.dtype)

        return (
            jax.tree.map(moved, updates, params, state.previous),
            DisplacementState(jax.tree.map(lambda u, p: p, updates, params)),
        )

    return optax.GradientTransformation(init, update)
