"""Log-probs and entropy of a categorical distribution given by its logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pgjax import _checks
from pgjax.logprobs._common import (
    at_least_float32,
    constant_temperature,
    next_tokens,
    token_range,
)
from pgjax.logprobs.sequences import shift_right


def centred(logits: Array) -> tuple[Array, Array]:
    """`d`, the logits less their row maximum, and `log Σ_v exp d`, both with the last axis kept.

    The log-softmax is d less that sum. A row of -inf only has a sum of 0, with a zero gradient.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    d = logits - jnp.where(top == -jnp.inf, 0.0, top)
    total = jnp.exp(d).sum(-1, keepdims=True)
    return d, jnp.log(jnp.where(total > 0, total, 1.0))


def from_logits(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float | Shaped[Array, ""] = 1.0,
) -> Float[Array, "B T"]:
    """Log-prob of each token given the past, stored at the token's own index.

        z = logits / temperature
        out[b, 0] = 0,   out[b, t] = z[b, t-1, tokens[b, t]] - log Σ_v exp z[b, t-1, v]

    Args:
      logits: `[B, T, V]` of any floating dtype; `logits[b, t-1]` predicts `tokens[b, t]`. -inf
        rules a token out.
      tokens: integer `[B, T]` in [0, V).
      temperature: positive scalar, treated as a constant: no gradient flows to it.

    Returns:
      f32 `[B, T]` (f64 from f64 logits). A ruled-out token has log-prob -inf. Where tokens are
      traced and cannot be checked, an id outside [0, V) gives NaN with a zero gradient.

    Raises:
      ValueError: on wrong ranks, shapes or dtypes, a non-positive temperature, or concrete tokens
        out of range.
    """
    _checks.rank("logits", logits, 3)
    _checks.rank("tokens", tokens, 2)
    _checks.floating(logits=logits)
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"tokens: expected shape {logits.shape[:2]}, got {tokens.shape}")
    vocabulary = logits.shape[-1]
    token_range(tokens, vocabulary)
    temperature = constant_temperature(temperature)
    targets = next_tokens(jnp.asarray(tokens))
    d, log_total = centred(at_least_float32(logits) / temperature)
    # A masked sum, not a gather: its transpose fuses with the softmax instead of scattering into
    # zeros of the logits' size, and it needs no gather where the vocabulary is sharded.
    chosen = jnp.where(jnp.arange(vocabulary) == targets[..., None], d, 0.0).sum(-1)
    valid = (targets >= 0) & (targets < vocabulary)
    out = jnp.where(valid, chosen - log_total[..., 0], jnp.nan)
    return shift_right(out)


def entropy_from_logits(
    logits: Float[Array, "*batch V"], *, temperature: float | Shaped[Array, ""] = 1.0
) -> Float[Array, "*batch"]:
    """Exact entropy, in nats, of softmax(logits / temperature); nothing is shifted.

        H = -Σ_v p_v log p_v,   p = softmax(logits / temperature),   0 log 0 = 0

    Computed as log Σ_v exp(d_v) - Σ_v p_v d_v with d the logits less their maximum: two
    non-negative terms, so the result is never negative and large logits lose no digits.

    Args:
      logits: `[..., V]` of any floating dtype. -inf rules a token out.
      temperature: positive scalar, treated as a constant: no gradient flows to it.

    Returns:
      f32 `[...]` (f64 from f64 logits) in [0, log V]; 0 for a row of -inf only. Gradients are
      finite, and zero at ruled-out tokens.

    Raises:
      ValueError: on a scalar, an empty vocabulary, a non-floating dtype or a non-positive
        temperature.
    """
    if jnp.ndim(logits) < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., V >= 1], got {jnp.shape(logits)}")
    _checks.floating(logits=logits)
    d, log_total = centred(at_least_float32(logits) / constant_temperature(temperature))
    p = jnp.exp(d - log_total)
    return log_total[..., 0] - (jnp.where(d == -jnp.inf, 0.0, d) * p).sum(-1)
