"""Transition models out of contrastive scores, for planning and for bonuses.

Told apart by `contrastive.binary_nce`, true next states and states from a fixed law P⁻ give a score
f(s, a, s') = P(s'|s, a) / P⁻(s'). If f = φ(s, a)ᵀ ψ(s') is of low rank, so is the model, and φ is
the feature that `uncertainty.elliptical_bonus` measures novelty in.

Source: Contrastive UCB, Qiu et al. 2022, arXiv 2207.14800. The game version is not here, and deep
agents add the bonus of a network's features to the reward instead of planning.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pgjax import _checks
from pgjax._arrays import widened


class LowRankModel(NamedTuple):
    """P̂(s'|s, a) = Σ_d features_d(s, a) measures_d(s').

    Attributes:
      features: φ̂, `[..., D]`, ≥ 0 and summing to 1 over D.
      measures: ψ̂, `[S, D]`, each column a distribution over s'.
    """

    features: Float[Array, "*B D"]
    measures: Float[Array, "S D"]

    @property
    def transitions(self) -> Float[Array, "*B S"]:
        """P̂, `[..., S]`."""
        return self.features @ self.measures.T


def low_rank_log_scores(
    log_phi: Float[Array, "*B D"], log_psi: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """log f = log Σ_d φ_d ψ_d of factors above 0, from their logarithms.

    Args:
      log_phi: log φ(s, a), `[..., D]`; any real numbers.
      log_psi: log ψ(s'), `[..., D]`; both broadcast.

    Returns:
      f32 `[...]`, for `contrastive.binary_nce`.

    Raises:
      ValueError: unequal D, shapes that do not broadcast, wrong dtypes.
    """
    _checks.floating(log_phi=log_phi, log_psi=log_psi)
    if np.ndim(log_phi) < 1 or np.shape(log_phi)[-1:] != np.shape(log_psi)[-1:]:
        raise ValueError(
            f"log_psi: expected [..., D] with D of log_phi {np.shape(log_phi)}, got "
            f"{np.shape(log_psi)}"
        )
    return jax.nn.logsumexp(widened(log_phi) + widened(log_psi), axis=-1)


def recover_model(
    log_phi: Float[Array, "*B D"], log_psi: Float[Array, "S D"], negative: Float[Array, " S"]
) -> LowRankModel:
    """The low-rank transition model that factors of a contrastive score stand for.

    ψ̂_d(s') = P⁻(s') ψ_d(s') / c_d with c_d = Σ_s' P⁻(s') ψ_d(s'), and φ̂_d ∝ φ_d c_d, which are
    the factors of P⁻ f, normalised over s'. Fixing the sums also fixes the scale of each factor,
    that the score leaves open and a bonus depends on.

    Args:
      log_phi: log φ of state-action pairs, `[..., D]`.
      log_psi: log ψ of all S states, `[S, D]`.
      negative: P⁻, f32 `[S]`, above 0 and summing to 1.

    Returns:
      the model, f32.

    Raises:
      ValueError: wrong ranks, shapes or dtypes, a concrete P⁻ that is no distribution of full
        support.
    """
    _checks.rank("log_psi", log_psi, 2)
    _checks.floating(log_phi=log_phi, log_psi=log_psi)
    states, size = np.shape(log_psi)
    if np.ndim(log_phi) < 1 or np.shape(log_phi)[-1] != size:
        raise ValueError(f"log_phi: expected shape [..., {size}], got {np.shape(log_phi)}")
    law = _full_support(negative, states)
    weighted = jnp.log(law)[:, None] + widened(log_psi)
    return LowRankModel(
        jax.nn.softmax(widened(log_phi) + jax.nn.logsumexp(weighted, axis=0), axis=-1),
        jax.nn.softmax(weighted, axis=0),
    )


def transitions_from_scores(
    scores: Float[Array, "*B S"], negative: Float[Array, " S"]
) -> Float[Array, "*B S"]:
    """P̂(s'|s, a) = P⁻(s') f(s, a, s') / Σ_s' P⁻ f, of scores of any form.

    Args:
      scores: f, `[..., S]`, above 0: not their logarithms.
      negative: P⁻, f32 `[S]`, above 0 and summing to 1.

    Returns:
      f32 `[..., S]`.

    Raises:
      ValueError: shapes that do not fit, wrong dtypes, concrete scores that are not above 0, a
        concrete P⁻ that is no distribution of full support.
    """
    _checks.floating(scores=scores)
    if np.ndim(scores) < 1:
        raise ValueError("scores: expected shape [..., S], got a scalar")
    law = _full_support(negative, np.shape(scores)[-1])
    if _checks.is_concrete(scores) and not (np.asarray(scores) > 0).all():
        raise ValueError(f"scores: expected numbers above 0, got {float(np.min(scores)):g}")
    joint = law * widened(scores)
    return joint / joint.sum(axis=-1, keepdims=True)


def _full_support(negative: Array, states: int) -> Array:
    _checks.floating(negative=negative)
    if np.shape(negative) != (states,):
        raise ValueError(f"negative: expected shape {(states,)}, got {np.shape(negative)}")
    if _checks.is_concrete(negative):
        law = np.asarray(negative, np.float64)
        if not ((law > 0).all() and abs(law.sum() - 1.0) < 1e-4):
            raise ValueError(
                "negative: expected numbers above 0 that sum to 1, got a smallest of "
                f"{law.min():g} and a sum of {law.sum():g}"
            )
    return widened(negative)
