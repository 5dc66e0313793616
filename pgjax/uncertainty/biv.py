"""Weights of a batch by how sure an ensemble is of each sample: inverse variances of its errors."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened
from pgjax.uncertainty.ggd import ggd_linear_loss, risk_averse_weights

SMALLEST = 1e-6  # variance, of members that agree
_HALVINGS = 50


def biev_variance(errors: Float[Array, "*B M"]) -> Float[Array, "*B"]:
    """s² / (k/M + (M + 1)/(M - 1)), at least 1e-6: how uncertain the errors of M members are.

    s² is their variance with divisor M, k their excess kurtosis without bias,
    k = (M - 1)((M + 1)(m₄/s⁴ - 3) + 6) / ((M - 2)(M - 3)). The divisor is what a sample variance's
    own variance is proportional to: heavy tails make it smaller.

    Args:
      errors: δ, members last, `[..., M]`.

    Returns:
      f32 `[...]`; 1e-6 where the members agree.

    Raises:
      ValueError: fewer than four members, for which k does not exist; a wrong dtype.

    Source: Kim et al. 2024 (BIEV in GGD-TD), arXiv 2408.02295.
    """
    members = _members("errors", errors, 4)
    x = widened(errors)
    away = x - x.mean(-1, keepdims=True)
    spread = jnp.mean(jnp.square(away), axis=-1)
    alike = spread <= SMALLEST**2
    fourth = jnp.mean(away**4, axis=-1) / jnp.square(jnp.where(alike, 1.0, spread))
    excess = jnp.where(alike, 0.0, fourth - 3.0)
    k = (members - 1) * ((members + 1) * excess + 6.0) / ((members - 2) * (members - 3))
    found = spread / (k / members + (members + 1) / (members - 1))
    return jnp.where(alike, SMALLEST, jnp.maximum(found, SMALLEST))


def biv_variance(values: Float[Array, "*B M"], *, discount: float) -> Float[Array, "*B"]:
    """γ² times the sample variance of M values of the next state, at least 1e-6.

    Args:
      values: the members' values that targets are made of, `[..., M]`.
      discount: γ in [0, 1].

    Returns:
      f32 `[...]`.

    Raises:
      ValueError: fewer than two members, a wrong dtype, γ outside [0, 1].

    Source: Mai et al. 2022 (inverse-variance reinforcement learning), arXiv 2201.01666.
    """
    _checks.in_range("discount", discount, 0.0, 1.0)
    _members("values", values, 2)
    return jnp.maximum(discount**2 * jnp.var(widened(values), axis=-1, ddof=1), SMALLEST)


def effective_batch_size(weights: Float[Array, " B"]) -> Float[Array, ""]:
    """(Σ ω)² / Σ ω²: B for equal weights, 1 where a single one counts.

    Raises:
      ValueError: a wrong rank or dtype.

    Source: Kish 1965, "Survey Sampling".
    """
    _checks.rank("weights", weights, 1)
    _checks.floating(weights=weights)
    # Of weights of one largest 1: the sum of squares of small numbers would be 0.
    w = widened(weights) / jnp.max(widened(weights))
    return jnp.square(w.sum()) / jnp.square(w).sum()


def min_ess_shift(variances: Float[Array, " B"], *, min_effective: int) -> Float[Array, ""]:
    """The smallest ξ ≥ 0 for which weights 1/(v + ξ) have an effective batch size of so many.

    The effective size grows with ξ, so that halving an interval finds it: above max v √B / 2 it is
    at least B - 1.

    Args:
      variances: v > 0, `[B]`.
      min_effective: wanted effective size, ≥ 1; above B - 1, which no finite ξ need reach, B - 1
        is taken and warned of.

    Returns:
      f32 scalar; 0 where that is enough.

    Raises:
      ValueError: a wrong rank or dtype, concrete variances not above 0, `min_effective` < 1.

    Source: Mai et al. 2022, arXiv 2201.01666, who search by the simplex method.
    """
    _checks.in_range("min_effective", min_effective, 1)
    _variances(variances)
    size = np.shape(variances)[0]
    if min_effective > max(size - 1, 1):
        warnings.warn(
            f"min_effective: {min_effective} is above B - 1 = {size - 1}, which is taken instead",
            stacklevel=2,
        )
    wanted = min(min_effective, max(size - 1, 1))
    v = widened(variances)

    def enough(shift: Array) -> Array:
        return effective_batch_size(1.0 / (v + shift)) >= wanted

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        found = enough(middle)
        return jnp.where(found, low, middle), jnp.where(found, middle, high)

    ends = jnp.zeros((), v.dtype), jnp.max(v) * size**0.5
    _, high = jax.lax.fori_loop(0, _HALVINGS, halve, ends)
    return jnp.where(enough(jnp.zeros((), v.dtype)), 0.0, high)


def biv_weights(variances: Float[Array, " B"], *, min_effective: int = 16) -> Float[Array, " B"]:
    """ω_b = (v_b + ξ)⁻¹ / Σ_b' (v_b' + ξ)⁻¹ with the ξ of `min_ess_shift`.

    Args:
      variances: v > 0, `[B]`: of `biev_variance` or `biv_variance`.
      min_effective: least effective batch size.

    Returns:
      f32 `[B]`, summing to 1; no gradient flows through it.

    Raises:
      ValueError: as `min_ess_shift`.

    Source: Mai et al. 2022, arXiv 2201.01666.
    """
    shift = min_ess_shift(variances, min_effective=min_effective)
    v = widened(variances) + shift
    w = jnp.min(v) / v
    return jax.lax.stop_gradient(w / w.sum())


def ggd_td_losses(
    errors: Float[Array, "B M"],
    shapes: Float[Array, "B M"],
    *,
    epistemic_weight: float = 0.1,
    min_effective: int = 16,
) -> Float[Array, " B"]:
    """Σ_m w_m l_m + λ ω_b Σ_m |δ_m|, l = `ggd_linear_loss`, w = `risk_averse_weights`.

    ω are the `biv_weights` of the `biev_variance`; they sum to 1 over the batch, so that in the
    mean of these losses the second term has a further 1/B, as in the authors' code.

    Args:
      errors: δ_bm = target - value of each member, `[B, M]`, differentiable in the values; the
        targets must be detached.
      shapes: β_bm > 0, `[B, M]`, differentiable, also through w.
      epistemic_weight: λ ≥ 0.
      min_effective: least effective batch size of ω.

    Returns:
      f32 `[B]`.

    Raises:
      ValueError: unequal shapes, wrong rank or dtype, fewer than four members, λ below 0.

    Source: Kim et al. 2024 (GGD-TD), arXiv 2408.02295.
    """
    _checks.in_range("epistemic_weight", epistemic_weight, 0.0)
    _checks.rank("errors", errors, 2)
    aleatoric = jnp.sum(risk_averse_weights(shapes) * ggd_linear_loss(errors, shapes), axis=-1)
    weights = biv_weights(biev_variance(errors), min_effective=min_effective)
    return aleatoric + epistemic_weight * weights * jnp.abs(widened(errors)).sum(-1)


def _members(name: str, x: Array, least: int) -> int:
    _checks.floating(**{name: x})
    shape = np.shape(x)
    if not shape or shape[-1] < least:
        raise ValueError(f"{name}: expected at least {least} members on the last axis, got {shape}")
    return shape[-1]


def _variances(variances: Array) -> None:
    _checks.rank("variances", variances, 1)
    _checks.floating(variances=variances)
    if np.shape(variances)[0] < 1:
        raise ValueError("variances: expected at least one, got none")
    if _checks.is_concrete(variances) and not np.all(np.asarray(variances, np.float64) > 0):
        raise ValueError(f"variances: expected numbers > 0, got {np.min(np.asarray(variances))}")
