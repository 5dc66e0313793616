"""Bit-widths as gates: a quantiser whose 4, 8, 16, ... bit refinements switch on and off.

Gates are hard-concrete variables with a logit φ each: noisy in [0, 1] while training, 0 or 1
after it, and with a probability of being on that a penalty can push down.

Source: van Baalen et al., "Bayesian Bits", 2020, arXiv:2005.07093; Louizos et al., "Learning Sparse
Neural Networks through L0 Regularization", 2017, arXiv:1712.01312.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from pgjax import _checks
from pgjax._arrays import widened

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
THRESHOLD = 0.34
_SHIFT = TEMPERATURE * math.log(-LOW / HIGH)  # -1.5986
_REDUCTIONS = ("mean", "sum")


def hard_concrete_sample(key: PRNGKeyArray, phi: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`z = clip(1.2 σ((log u - log(1-u) + φ) / (2/3)) - 0.1, 0, 1)`, u uniform in (0, 1)."""
    _checks.floating(phi=phi)
    wide = widened(phi)
    noise = jax.random.logistic(key, wide.shape, wide.dtype)
    s = jax.nn.sigmoid((noise + wide) / TEMPERATURE)
    return jnp.clip((HIGH - LOW) * s + LOW, 0.0, 1.0)


def hard_concrete_prob(phi: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`P(z > 0) = σ(φ - (2/3) log(0.1 / 1.1)) = σ(φ + 1.5986)`."""
    _checks.floating(phi=phi)
    return jax.nn.sigmoid(widened(phi) - _SHIFT)


def hard_concrete_mode(phi: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The gate after training: 1 where `P(z = 0) < 0.34`, that is `φ > -0.9353`, else 0."""
    _checks.floating(phi=phi)
    wide = widened(phi)
    return (jax.nn.sigmoid(_SHIFT - wide) < THRESHOLD).astype(wide.dtype)


def bayesian_bits(
    x: Float[Array, "*s"],
    beta_q: Float[Array, "*g"] | float,
    gates: Sequence[Float[Array, "*g"] | float],
    *,
    signed: bool = True,
) -> Float[Array, "*s"]:
    """A quantiser of 2, 4, 8, ... bits whose refinements are each multiplied by a gate.

        s₂ = range / 3,  s₄ = s₂ / 5,  s₈ = s₄ / 17,  s₁₆ = s₈ / 257, ...
        x_b = s_b round((x - x₂ - ... - x_{b/2}) / s_b)
        Q(x) = z₂ [x₂ + z₄ (x₄ + z₈ (x₈ + ...))]

    With all gates up to b on and the rest off this is the grid of step `range / (2^b - 1)` through
    0; a signed one has `2^b - 1` levels. Rounding has the gradient of the identity, so that of Q to
    x is `z₂` inside the range and 0 outside, where β_q has it.

    Args:
      x: any floating array.
      beta_q: positive; x is held in ±β_q, or in [0, β_q] if not signed.
      gates: (z₂, z₄, z₈, ...), at least one, at most 5 (32 bits); each broadcasts to x.
      signed: static.

    Returns:
      in the dtype of x.

    Raises:
      ValueError: β_q not positive, no gates or more than 5.
    """
    _checks.floating(x=x)
    if _checks.is_concrete(beta_q) and not (np.asarray(beta_q) > 0).all():
        raise ValueError(f"beta_q: expected positive numbers, got {beta_q}")
    if not 1 <= len(gates) <= 5:
        raise ValueError(f"gates: expected 1 to 5 of them (2 to 32 bits), got {len(gates)}")
    return _gated(x, beta_q, tuple(gates), signed=signed)


@functools.partial(jax.jit, static_argnames="signed")
def _gated(x: Array, beta_q: Any, gates: tuple[Any, ...], *, signed: bool) -> Array:
    wide, bound = widened(x), jnp.asarray(beta_q, widened(x).dtype)
    end = bound * (1 - 1e-7)
    left = jnp.clip(wide, -end if signed else 0.0, end)
    step = (2 * bound if signed else bound) / 3
    parts = []
    for k in range(len(gates)):
        if k:
            step = step / (2 ** (2**k) + 1)
        # At the very ends rounding errors could reach the tie above, a level too many.
        most = (1 if signed else 3) if k == 0 else 2 ** (2**k) // 2
        parts.append(step * _round(left / step, most))
        left = left - parts[-1]
    total = jnp.zeros_like(wide)
    for part, gate in zip(reversed(parts), reversed(gates), strict=True):
        total = gate * (part + total)
    return total.astype(x.dtype)


def gate_penalty(
    phis: Sequence[Float[Array, "*g"] | None],
    weights: Sequence[float] | None = None,
    *,
    reduction: str = "mean",
) -> Float[Array, ""]:
    """What a quantiser's bits are expected to cost:

        w₂ q₂ + w₄ q₂ q₄ + w₈ q₂ q₄ q₈ + ...,   q_b = P(z_b > 0)

    Args:
      phis: (φ₂, φ₄, φ₈, ...); φ₂ may be None (always on) or a vector of rank gates `[r]`, the
        others are scalars.
      weights: w_b, positive; None: 1 each. See `bop_weights`.
      reduction: static; over rank gates, "mean" (the released code's) or "sum", which does not
        shrink each gate's share with r.

    Raises:
      ValueError: no logits, wrong shapes, another number of weights, a weight not positive, an
        unknown reduction.

    Source: B-LoRA, 2024, arXiv:2406.13046.
    """
    _checks.one_of("reduction", reduction, _REDUCTIONS)
    if not phis or any(phi is None for phi in phis[1:]):
        raise ValueError("phis: expected logits, of which only the first may be None")
    weights = (1.0,) * len(phis) if weights is None else weights
    if len(weights) != len(phis):
        raise ValueError(f"weights: expected {len(phis)} of them like phis, got {len(weights)}")
    for weight in weights:
        _checks.in_range("weights", weight, 0.0, low_open=True)
    for k, phi in enumerate(phis):
        allowed = (0, 1) if k == 0 else (0,)
        if phi is not None and jnp.ndim(phi) not in allowed:
            raise ValueError(
                f"phis: expected {'a scalar or a vector' if k == 0 else 'a scalar'} for "
                f"{2 ** (k + 1)} bits, got shape {jnp.shape(phi)}"
            )
    alive, total = jnp.ones([]), jnp.zeros([])
    for phi, weight in zip(phis, weights, strict=True):
        if phi is not None:
            alive = alive * hard_concrete_prob(jnp.asarray(phi))
        total = total + weight * alive
    return total.mean() if reduction == "mean" else total.sum()


def bop_weights(max_bits: int, macs: float, max_macs: float) -> tuple[float, ...]:
    """`b · MACs / max MACs` for b = 2, 4, ..., max_bits: a layer's share of bit operations.

    Raises:
      ValueError: `max_bits` not a power of two of 2 to 32, counts that are not positive.
    """
    count = num_gates(max_bits)
    _checks.in_range("macs", macs, 0.0, low_open=True)
    _checks.in_range("max_macs", max_macs, macs)
    return tuple(2 ** (k + 1) * macs / max_macs for k in range(count))


def num_gates(max_bits: int) -> int:
    """Gates of a quantiser of at most so many bits, that of 2 bits included.

    Raises:
      ValueError: not a power of two of 2 to 32.
    """
    powers = (2, 4, 8, 16, 32)
    if isinstance(max_bits, bool) or max_bits not in powers:
        raise ValueError(f"max_bits: expected a power of two of 2 to 32, got {max_bits!r}")
    return powers.index(max_bits) + 1


def _round(x: Array, most: int) -> Array:
    return x + jax.lax.stop_gradient(jnp.clip(jnp.round(x), -most, most) - x)
