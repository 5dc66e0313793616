"""Scores of pairs, and the losses by which the pairs that belong together outscore the others.

Losses are one a row and never reduced here: take their mean, or `aggregate.masked_mean` where some
rows do not count.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pgjax import _checks
from pgjax._arrays import widened


def bilinear_logits(
    queries: Float[Array, "B D"],
    keys: Float[Array, "N E"],
    weight: Float[Array, "D E"] | None = None,
    *,
    temperature: float = 1.0,
) -> Float[Array, "B N"]:
    """l_ij = q_iᵀ W k_j / τ, of every query with every key.

    Args:
      queries: q, `[B, D]`.
      keys: k, `[N, E]`; detach those that are to be predicted, `jax.lax.stop_gradient(keys)`.
      weight: W, `[D, E]`; None for the identity.
      temperature: τ > 0.

    Returns:
      f32 `[B, N]`.

    Raises:
      ValueError: wrong rank or dtype, sizes that do not fit, τ not above 0.

    Source: van den Oord et al. 2018 (CPC), arXiv 1807.03748; between embeddings of one encoder
    Srinivas et al. 2020 (CURL), arXiv 2004.04136.
    """
    _checks.in_range("temperature", temperature, 0.0, low_open=True)
    arrays = {"queries": queries, "keys": keys, "weight": weight}
    for name, a in arrays.items():
        if a is not None:
            _checks.rank(name, a, 2)
    _checks.floating(**arrays)
    q, k = widened(queries), widened(keys)
    if weight is not None:
        if np.shape(weight) != (q.shape[1], k.shape[1]):
            raise ValueError(
                f"weight: expected shape {(q.shape[1], k.shape[1])}, got {np.shape(weight)}"
            )
        q = q @ widened(weight)
    elif q.shape[1] != k.shape[1]:
        raise ValueError(
            f"keys: expected rows of {q.shape[1]} entries like queries, got shape {k.shape}"
        )
    return q @ k.T / temperature


def info_nce(
    logits: Float[Array, "B B"], *, mask: Bool[Array, " B"] | None = None
) -> Float[Array, " B"]:
    """-l_ii + log Σ_j exp l_ij: which of the batch's keys belongs to a query, as a classification.

    Row i's key is column i; the other columns are its negatives. log B minus the mean is a lower
    bound of the mutual information of query and key.

    Args:
      logits: l, `[B, B]`, differentiable; the row's largest may be anything, it is subtracted.
      mask: true where a pair counts, as a query and as a negative of the others; None for all.

    Returns:
      f32 `[B]`, at least 0; 0 with gradient 0 where the mask is false, and for a single pair, which
      has no negatives (warned of where the batch is one).

    Raises:
      ValueError: logits that are not square, of a wrong dtype, or concrete and NaN; a mask of
        another length or dtype.

    Source: van den Oord et al. 2018 (CPC), arXiv 1807.03748.
    """
    x, counted = _square(logits, mask)
    if x.shape[0] < 2:
        warnings.warn(
            "logits: a batch of one pair has no negatives, and loss and gradient 0", stacklevel=2
        )
    x = _without(x, counted)
    return jnp.where(counted, jax.nn.logsumexp(x, axis=1) - jnp.diagonal(x), 0.0)


def matched(
    logits: Float[Array, "B B"], *, mask: Bool[Array, " B"] | None = None
) -> Bool[Array, " B"]:
    """Whether a query's own key has the largest logit: of the mean, the accuracy of `info_nce`.

    Args:
      logits: `[B, B]`, a query's own key on the diagonal.
      mask: as in `info_nce`.

    Returns:
      bool `[B]`; false where the mask is, and where another key's logit is as large.

    Raises:
      ValueError: as `info_nce`.
    """
    x, counted = _square(logits, mask)
    x = _without(x, counted)
    others = jnp.where(jnp.eye(x.shape[0], dtype=bool), -jnp.inf, x)
    return counted & (jnp.diagonal(x) > others.max(axis=1, initial=-jnp.inf))


def binary_nce(
    positive_scores: Float[Array, "*B"], negative_scores: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """log(1 + 1/f⁺) + log(1 + f⁻) of log-scores s = log f: softplus(-s⁺) + softplus(s⁻).

    With positives from P and negatives from Q its expectation is smallest for f = P/Q, and is twice
    the binary cross-entropy of telling one from the other.

    Args:
      positive_scores: s⁺ = log f of pairs that belong together, `[...]`, differentiable.
      negative_scores: s⁻ = log f of pairs with a key from elsewhere, of the same shape.

    Returns:
      f32 of the same shape, at least 0; finite for finite scores, however large f is, or small.

    Raises:
      ValueError: unequal shapes, wrong dtypes.

    Source: Gutmann and Hyvärinen 2010, "Noise-contrastive estimation"; for transitions Qiu et al.
    2022 (Contrastive UCB), arXiv 2207.14800.
    """
    arrays = {"positive_scores": positive_scores, "negative_scores": negative_scores}
    _checks.floating(**arrays)
    _checks.same_shape(**arrays)
    return jax.nn.softplus(-widened(positive_scores)) + jax.nn.softplus(widened(negative_scores))


def _square(logits: Array, mask: Array | None) -> tuple[Array, Array]:
    _checks.rank("logits", logits, 2)
    _checks.floating(logits=logits)
    rows, columns = np.shape(logits)
    if rows != columns or not rows:
        raise ValueError(f"logits: expected shape [B, B] with B ≥ 1, got {np.shape(logits)}")
    counted = np.ones(rows, bool) if mask is None else mask
    _checks.boolean(mask=counted)
    if np.shape(counted) != (rows,):
        raise ValueError(f"mask: expected shape {(rows,)}, got {np.shape(counted)}")
    if _checks.is_concrete(logits, counted):
        used = np.asarray(logits, np.float64)[np.ix_(counted, counted)]
        if np.isnan(used).any():
            raise ValueError(f"logits: expected numbers, got NaN in {np.isnan(used).sum()} places")
    return widened(logits), jnp.asarray(counted)


def _without(x: Array, counted: Array) -> Array:
    """-∞ in columns that do not count; rows that do not are 0, lest a log-sum-exp meets only -∞."""
    return jnp.where(counted[:, None], jnp.where(counted[None, :], x, -jnp.inf), 0.0)
