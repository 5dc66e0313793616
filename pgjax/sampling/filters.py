"""Which tokens may be sampled, as thresholds on the tempered logits.

The order is that of Hugging Face transformers: temperature, then top-k, top-p among what is left,
then min-p. Each filter keeps the tokens whose logit reaches a threshold, so tokens of equal logit
share their fate and the result does not depend on the order of the vocabulary. (Where equal
logits straddle the cut, implementations that drop sorted positions keep an arbitrary subset of
them; here all are kept.) The most probable token is always kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax import _checks


def top_k_threshold(
    descending: Float[Array, "*batch V"], k: int | Int[Array, ""]
) -> Float[Array, "*batch 1"]:
    """The k-th largest logit; with k ≥ V the smallest, so that all tokens are kept.

    Args:
      descending: logits sorted in descending order.
      k: at least 1; may be traced.

    Source: Fan et al., "Hierarchical Neural Story Generation", 2018, arXiv:1805.04833.
    """
    index = jnp.clip(k, 1, descending.shape[-1]) - 1
    return jax.lax.dynamic_slice_in_dim(descending, index, 1, axis=-1)


def top_p_threshold(
    descending: Float[Array, "*batch V"], p: float | Float[Array, ""]
) -> Float[Array, "*batch 1"]:
    """The smallest logit of the nucleus: the fewest most probable tokens with mass at least p.

    A token is in the nucleus when the mass of the tokens before it is below p. With p ≥ 1 every
    token is kept (rounding in the sum cannot drop the tail), with p ≤ 0 only the largest.

    Args:
      descending: logits sorted in descending order, -inf for tokens already removed.
      p: in [0, 1]; may be traced.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019,
    arXiv:1904.09751.
    """
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < p).at[..., 0].set(True)
    smallest = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(jnp.asarray(p) >= 1.0, -jnp.inf, smallest)


def min_p_threshold(
    logits: Float[Array, "*batch V"], p: float | Float[Array, ""]
) -> Float[Array, "*batch 1"]:
    """The logit of a token p times as probable as the most probable one: `max + log p`.

    The ratio of two probabilities does not change when others are removed, so no
    renormalisation, and no sorting, is needed. With p = 0 every token is kept.

    Args:
      logits: in any order.
      p: in [0, 1]; may be traced.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024, arXiv:2407.01082.
    """
    return jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype))


def filter_logits(
    logits: Float[Array, "*batch V"],
    *,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    min_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch V"]:
    """Sets the logits of tokens that may not be sampled to -inf.

    Args:
      logits: already divided by the temperature.
      top_k: keep the k most probable tokens, at least 1; None: off.
      top_p: of those, keep the nucleus of this mass, in [0, 1]; None: off.
      min_p: of those, keep the tokens at least this fraction as probable as the most probable
        one, in [0, 1]; None: off.

    Returns:
      float32 logits; their softmax is the renormalised sampling distribution. Filters that are
      off cost nothing, and those that are on share one sort (`min_p` alone needs none).

    Raises:
      ValueError: a filter's value is outside its range (checked where it is not traced).
    """
    logits = logits.astype(jnp.float32)
    threshold = None
    if top_k is not None or top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        if top_k is not None:
            _checks.in_range("top_k", top_k, 1)
            threshold = top_k_threshold(descending, top_k)
            descending = jnp.where(descending >= threshold, descending, -jnp.inf)
        if top_p is not None:
            _checks.in_range("top_p", top_p, 0.0, 1.0)
            nucleus = top_p_threshold(descending, top_p)
            threshold = nucleus if threshold is None else jnp.maximum(threshold, nucleus)
    if min_p is not None:
        _checks.in_range("min_p", min_p, 0.0, 1.0)
        relative = min_p_threshold(logits, min_p)
        threshold = relative if threshold is None else jnp.maximum(threshold, relative)
    return logits if threshold is None else jnp.where(logits >= threshold, logits, -jnp.inf)
