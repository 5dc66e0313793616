"""Further statistics of the distribution a token was drawn from, without its logits.

None of them is meant to be differentiated; each costs passes over the unembedding like those of
`from_hidden`, on whose blocks they are built.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax import _checks
from pgjax.logprobs.hidden import from_hidden


def power_sum(
    hidden: Float[Array, "B T H"],
    unembedding: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "B T"],
    *,
    power: int,
    temperature: float = 1.0,
    logprobs: Float[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, "B T"]:
    """`Σ_v p(v)^k` of the distribution each token was drawn from, at the token's own index.

    With `ℓ_τ` the log-prob of the token at temperature τ, `Σ_v p^k = exp(k ℓ_T - ℓ_{T/k})`: the
    token's own logit cancels. k = 2 is the chance that two draws agree, `exp(-H_2)` with the Rényi
    entropy of order 2. Costs two forward passes of `from_hidden`, one where `logprobs` are known:
    2·B·T·H·V FLOPs each, and the memory of a block of logits.

    Args:
      hidden, unembedding, tokens: as `from_hidden`.
      power: k, at least 1.
      temperature: T > 0 of the distribution.
      logprobs: what `from_hidden` gives for these arguments, if it was computed already.
      **options: further options of `from_hidden`.

    Returns:
      f32 `[B, T]` in (0, 1], without gradient; 1 at index 0, where nothing is drawn.

    Raises:
      ValueError: power below 1; `logprobs` of another shape; as `from_hidden`.
    """
    _checks.in_range("power", power, 1)
    if logprobs is None:
        logprobs = from_hidden(hidden, unembedding, tokens, temperature=temperature, **options)
    _checks.same_shape(tokens=tokens, logprobs=logprobs)
    sharper = from_hidden(hidden, unembedding, tokens, temperature=temperature / power, **options)
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(power * logprobs - sharper, 0.0)))


def score_features(
    hidden: Float[Array, "B T H"],
    unembedding: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float = 1.0,
    **options: Any,
) -> Float[Array, "B H"]:
    """Mean over a sequence's tokens of `φ_t = T ∂ log p(y_t) / ∂h_t = W (e(y_t) - p_t)`.

    The direction in which the sequence pulls the last hidden states, so cosines between sequences
    say how alike their updates are. Costs a forward and a backward pass of `from_hidden` without
    the unembedding's gradient: 6·B·T·H·V FLOPs, and the memory of a block of logits and of two
    copies of the hidden states.

    Args:
      hidden, unembedding, tokens: as `from_hidden`.
      mask: tokens that count.
      temperature: T > 0 of the distribution.
      **options: further options of `from_hidden`.

    Returns:
      f32 `[B, H]`, without gradient; 0 for a sequence without tokens.

    Raises:
      ValueError: a mask of wrong dtype or shape; as `from_hidden`.

    Source: G2RL, "Can LLMs Guide Their Own Exploration?", 2025, arXiv 2512.15687.
    """
    _checks.boolean(mask=mask)
    _checks.same_shape(tokens=tokens, mask=mask)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    length = jnp.maximum(mask.sum(-1, keepdims=True), 1)
    share = jnp.where(mask, temperature / length, 0.0).astype(wide)

    def total(offset: Array) -> Array:
        # A step shared by all positions of a row: its gradient is the sum over them.
        moved = hidden.astype(wide) + offset[:, None]
        found = from_hidden(moved, unembedding, tokens, temperature=temperature, **options)
        return jnp.sum(jnp.where(mask, found, 0.0) * share)

    zero = jnp.zeros((hidden.shape[0], hidden.shape[2]), wide)
    return jax.lax.stop_gradient(jax.grad(total)(zero))
