"""Rejecting tokens or sequences on which sampler and learner disagree too much.

`logprobs` are the learner's for the policy that was meant to sample (π_old), `behavior_logprobs`
the sampler's own (μ). Both hold 0 off `mask`, so a masked token never causes a rejection.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pgjax import _checks


def _log_ratio(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    _checks.rank("logprobs", logprobs, 2)
    _checks.same_shape(logprobs=logprobs, behavior_logprobs=behavior_logprobs, mask=mask)
    _checks.boolean(mask=mask)
    return jnp.where(mask, logprobs - behavior_logprobs, 0.0)


def _bounds(low: float, high: float) -> None:
    _checks.in_range("low", low, 0.0)
    _checks.in_range("high", high, low)


def token_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> Bool[Array, "B T"]:
    """True for tokens with `low <= π_old/μ <= high` (masked importance sampling).

    Args:
      logprobs: the learner's log-probs of the tokens, before the update.
      behavior_logprobs: the sampler's.
      mask: response tokens.
      low: smallest accepted ratio, ≥ 0.
      high: largest accepted ratio, ≥ `low`.

    Returns:
      bool `[B, T]`; true off `mask`.

    Raises:
      ValueError: unequal shapes, non-boolean mask, bounds out of order.

    Source: masked importance sampling for engine mismatch (IcePop, Ring Team 2025,
    arXiv 2510.18855).
    """
    _bounds(low, high)
    ratio = jnp.exp(_log_ratio(logprobs, behavior_logprobs, mask))
    return (ratio >= low) & (ratio <= high)


def sequence_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.0,
    high: float = 2.0,
) -> Bool[Array, "B T"]:
    """True for whole sequences with `low <= Π_t π_old/μ <= high`; arguments as `token_mismatch`."""
    _bounds(low, high)
    ratio = jnp.exp(_log_ratio(logprobs, behavior_logprobs, mask).sum(-1, keepdims=True))
    return jnp.broadcast_to((ratio >= low) & (ratio <= high), mask.shape)


def geometric_mismatch(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    low: float = 0.999,
    high: float = 1.001,
) -> Bool[Array, "B T"]:
    """True for whole sequences whose geometric-mean ratio per token lies in `[low, high]`.

    `low <= exp(mean_t log π_old/μ) <= high`; arguments as `token_mismatch`. A sequence without
    tokens has ratio 1.
    """
    _bounds(low, high)
    log_ratio = _log_ratio(logprobs, behavior_logprobs, mask)
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    ratio = jnp.exp(log_ratio.sum(-1, keepdims=True) / length)
    return jnp.broadcast_to((ratio >= low) & (ratio <= high), mask.shape)


def veto(
    logprobs: Float[Array, "B T"],
    behavior_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    threshold: float = 1e-4,
) -> Bool[Array, "B T"]:
    """False for every token of a sequence that holds a token with `π_old/μ < threshold`.

    Such a token is one the learner considers all but impossible: a sign of a numerical fault in
    the sampler. Arguments as `token_mismatch`; `threshold` > 0.
    """
    _checks.in_range("threshold", threshold, 0.0, low_open=True)
    log_ratio = _log_ratio(logprobs, behavior_logprobs, mask)
    accepted = jnp.all(log_ratio >= jnp.log(threshold), axis=-1, keepdims=True)
    return jnp.broadcast_to(accepted, mask.shape)
