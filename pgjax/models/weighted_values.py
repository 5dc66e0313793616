"""Sums of values weighted by a softmax, whose backward pass keeps no weights.

The gradient of a softmax holds a sum over the keys, `Σ_s w_s (g·v_s)`. It is `g · Σ_s w_s v_s`, a
sum over a head's dimensions, so beside the scores the backward pass needs of the forward one only
the result and a number per query.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

ATTENDED = "attended"
"""The name under which rematerialisation finds what the backward pass needs."""


@jax.custom_jvp
def attended(
    scores: Float[Array, "B kv r t S"],
    mask: Bool[Array, "*mask t S"],
    values: Float[Array, "B kv S D"],
    sinks: Float[Array, "kv r 1"] | None,
) -> Float[Array, "B kv r t D"]:
    """`Σ_s w_s v_s` with w the softmax of the scores where `mask` is true, in float32.

    Args:
      scores: of t queries for each of r heads that share keys and values; float32.
      mask: what a query sees, of each at least one key; broadcastable against `scores`.
      values: any floating dtype.
      sinks: a score that takes part in the denominator alone; None: none.

    Returns:
      the sums, in the dtype of `values`. Both modes of differentiation pass through.

    Source of the backward pass: Dao et al., "FlashAttention", 2022, arXiv:2205.14135, section 3.1.
    """
    return _attended_in_float32(scores, mask, values, sinks)[0].astype(values.dtype)


def _attended_in_float32(
    scores: Array, mask: Array, values: Array, sinks: Array | None
) -> tuple[Array, Array]:
    """The result, and the log of the weights' denominator `[B, kv, r, t, 1]`."""
    scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, _column(sinks))
    unscaled = jnp.exp(scores - top)
    total = jnp.sum(unscaled, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(_column(sinks) - top)
    return _weighted(unscaled, values) / total, top + jnp.log(total)


@attended.defjvp
def _attended_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    scores, mask, values, sinks = primals
    out, log_total = _attended_in_float32(*primals)
    out, log_total = checkpoint_name(out, ATTENDED), checkpoint_name(log_total, ATTENDED)
    weights = jnp.exp(jnp.where(mask, scores - log_total, -jnp.inf))
    changes = weights * tangents[0]
    total_change = jnp.sum(changes, axis=-1, keepdims=True)
    if sinks is not None:
        total_change += jnp.exp(_column(sinks) - log_total) * _column(tangents[3])
    change = _weighted(changes, values) - total_change * out + _weighted(weights, tangents[2])
    return out.astype(values.dtype), change.astype(values.dtype)


def _column(sinks: Array) -> Array:
    return sinks.astype(jnp.float32)[..., None]


def _weighted(weights: Float[Array, "B kv r t S"], values: Float[Array, "B kv S D"]) -> Array:
    # Queries of one key-value head as one axis, as for the scores.
    flat = weights.astype(values.dtype).reshape(*weights.shape[:2], -1, weights.shape[-1])
    out = jnp.einsum("bkqs,bksd->bkqd", flat, values, preferred_element_type=jnp.float32)
    return out.reshape(*weights.shape[:-1], -1)
