"""SGD-SaI: momentum SGD whose step in each tensor is scaled once, by its first gradient.

    gSNR = ‖g‖₂ / (std(g) + ε),   std over the tensor's d entries with d - 1 in the denominator

With ρ = d ḡ² / ‖g‖² in [0, 1], ḡ the mean entry, this is √((d - 1) / (1 - ρ)): the root of the
tensor's size for a gradient of mean zero, more where entries share a sign. There is no second
moment to keep.

Source: No More Adam (SGD-SaI), 2024, arXiv 2412.11768.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from pgjax import _checks, _paths


class SaiState(NamedTuple):
    """How many updates there were, the momentum, and each tensor's gSNR (0: not measured yet)."""

    step: Int[Array, ""]
    mu: Any
    gsnr: Any


def gradient_snr(
    gradient: Float[Array, "*shape"], *, eps: float = 1e-8, guard: bool = True
) -> Float[Array, ""]:
    """`‖g‖₂ / (std(g) + ε)` of one tensor, in float32 or wider; 0 for a gradient of 0.

    Args:
      gradient: of any shape.
      eps: at least 0.
      guard: static; gives √max(d - 1, 1) where the deviation says nothing: a tensor of one entry,
        or entries that are equal to within 1e-6 of their root mean square.

    Raises:
      ValueError: an integer gradient, ε below 0.

    Without the guard, as in the released code, equal entries give `‖g‖ / ε`, and one entry has no
    deviation, which counts as 0 with ε above 0.
    """
    _checks.floating(gradient=gradient)
    _checks.in_range("eps", eps, 0)
    size = max(math.prod(jnp.shape(gradient)), 1)
    wide = jnp.asarray(gradient, jnp.promote_types(jnp.result_type(gradient), jnp.float32))
    # By the largest entry, so that squares of small or large gradients stay in range.
    largest = jnp.max(jnp.abs(wide), initial=0.0)
    unit = wide / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.where(largest > 0, jnp.sum(jnp.square(unit)), 1.0))
    spread = jnp.sum(jnp.square(unit - jnp.mean(unit))) / max(size - 1, 1) if size > 1 else 0.0
    std = jnp.where(spread > 0, jnp.sqrt(jnp.where(spread > 0, spread, 1.0)), 0.0)
    usable = std >= 1e-6 * norm / size**0.5
    divisor = std * largest + eps
    ratio = norm * largest / jnp.where(divisor > 0, divisor, 1.0)
    if guard:
        ratio = jnp.where(usable & (size > 1), ratio, max(size - 1, 1) ** 0.5)
    return jnp.where(largest == 0, 0.0, ratio)


def scale_by_gsnr(
    *, beta: float = 0.9, eps: float = 1e-8, guard: bool = True
) -> optax.GradientTransformation:
    """`gSNR · M` with `M ← β M + (1 - β) g`; the first gradient is M_0 itself and sets gSNR.

    A tensor whose gradient is 0 (an expert that was not used) is measured at its first gradient
    that is not; the momentum does not wait for that. The state is one copy of the parameters and
    one number a tensor. Under data parallelism gradients have to be averaged before.

    Args:
      beta: in [0, 1).
      eps, guard: of `gradient_snr`.

    Raises:
      ValueError: an option out of range; on init, parameters that are not floating.
    """
    _checks.in_range("beta", beta, 0, 1, high_open=True)
    _checks.in_range("eps", eps, 0)

    def init(params: Any) -> SaiState:
        _checks.floating(**_paths.named_leaves(params))
        return SaiState(
            jnp.zeros((), jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            jax.tree.map(lambda p: jnp.zeros((), _wide_dtype(p)), params),
        )

    def update(updates: Any, state: SaiState, params: Any = None) -> tuple[Any, SaiState]:
        del params
        first = state.step == 0

        def moved(g: Array, m: Array) -> Array:
            wide = _wide_dtype(g)
            new = beta * m.astype(wide) + (1 - beta) * g.astype(wide)
            return jnp.where(first, g.astype(wide), new)

        def measured(g: Array, known: Array) -> Array:
            found = gradient_snr(g, eps=eps, guard=guard).astype(known.dtype)
            return jnp.where(known > 0, known, found)

        gsnr = jax.tree.map(measured, updates, state.gsnr)
        scaled = jax.tree.map(
            lambda g, m, s: (s * moved(g, m)).astype(g.dtype), updates, state.mu, gsnr
        )
        mu = jax.tree.map(lambda g, m: moved(g, m).astype(m.dtype), updates, state.mu)
        return scaled, SaiState(optax.safe_increment(state.step), mu, gsnr)

    return optax.GradientTransformation(init, update)


def sgd_sai(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    *,
    beta: float = 0.9,
    weight_decay: float = 1e-2,
    eps: float = 1e-8,
    guard: bool = True,
    mask: Any = None,
) -> optax.GradientTransformation:
    """`W ← (1 - η λ) W - η gSNR M`: `scale_by_gsnr` with decoupled weight decay.

    Args:
      learning_rate: η, at least 0, or a schedule. The paper tunes it for each task.
      weight_decay: λ, at least 0.
      beta, eps, guard: of `scale_by_gsnr`.
      mask: which parameters decay, as in `optax.add_decayed_weights`.

    Raises:
      ValueError: an option out of range.
    """
    if not callable(learning_rate):
        _checks.in_range("learning_rate", learning_rate, 0)
    _checks.in_range("weight_decay", weight_decay, 0)
    return optax.chain(
        scale_by_gsnr(beta=beta, eps=eps, guard=guard),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _wide_dtype(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)
