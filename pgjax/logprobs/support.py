"""The likely part of the distribution that a token was drawn from."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pgjax import _checks
from pgjax.logprobs import hidden as blocks
from pgjax.logprobs._common import constant_temperature
from pgjax.types import TokenSupport


def token_support(
    hidden: Float[Array, "B T H"],
    unembedding: Float[Array, "H V"] | Float[Array, "V H"],
    tokens: Int[Array, "B T"],
    *,
    size: int,
    temperature: float = 1.0,
    logprobs: Float[Array, "B T"] | None = None,
    soft_cap: float | None = None,
    vocab_axis: int = 1,
    block_size: int | None = None,
) -> TokenSupport:
    """The `size` most likely tokens of the distribution each token was drawn from, and that token.

    The drawn token takes the last place if it is not among them. Blocks of the vocabulary are gone
    through one after the other, so that no `[B, T, V]` is made: one pass of `from_hidden`
    (2·B·T·H·V FLOPs), two where `logprobs` are not known, and a selection among V logits a token.

    Args:
      hidden, unembedding, tokens, temperature, soft_cap, vocab_axis, block_size: as `from_hidden`.
      size: K, static, in [1, V].
      logprobs: what `from_hidden` gives for these arguments, if it was computed already.

    Returns:
      probabilities out of the whole vocabulary, ids, and where the drawn token is among them, at
      the token's own index and without gradient. At index 0, where nothing is drawn, the
      probabilities are 0.

    Raises:
      ValueError: K outside [1, V]; `logprobs` of another shape; as `from_hidden`.
    """
    static = blocks._checked(
        hidden, unembedding, tokens, soft_cap, vocab_axis, block_size, entropy=False
    )
    _checks.in_range("size", size, 1, unembedding.shape[vocab_axis])
    if logprobs is None:
        logprobs = blocks.from_hidden(
            hidden,
            unembedding,
            tokens,
            temperature=temperature,
            soft_cap=soft_cap,
            vocab_axis=vocab_axis,
            block_size=block_size,
        )
    _checks.same_shape(tokens=tokens, logprobs=logprobs)
    divisor = jnp.asarray(constant_temperature(temperature), jnp.float32)
    arrays = blocks._equally_varying(jnp.asarray(hidden), jnp.asarray(unembedding), divisor)
    probabilities, ids = _most_likely(static, size, *arrays)
    # The hidden state of one position is that of the next token's distribution.
    blank = ((0, 0), (1, 0), (0, 0))
    probabilities = jnp.pad(probabilities[:, :-1], blank)
    ids = jnp.pad(ids[:, :-1], blank)
    ids = ids.at[:, 0].set(jnp.arange(size))
    drawn = jnp.asarray(tokens, jnp.int32)[..., None]
    inside = jnp.any(ids == drawn, axis=-1, keepdims=True)
    replaced = ~inside & (jnp.arange(size) == size - 1)
    ids = jnp.where(replaced, drawn, ids)
    own = jnp.exp(logprobs)[..., None]
    probabilities = jnp.where(replaced, own, probabilities).at[:, 0].set(0.0)
    return lax.stop_gradient(
        TokenSupport(probabilities.astype(jnp.float32), ids, jnp.argmax(ids == drawn, axis=-1))
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _most_likely(
    static: Any, size: int, hidden: Array, unembedding: Array, temperature: Array
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    dtype = blocks._operand_dtype(hidden, unembedding)
    h = hidden.astype(dtype)

    def step(carry: Any, start: Any, columns: int) -> Any:
        values, ids, top, total = carry
        w = blocks._read(unembedding, start, columns, static.vocab_axis).astype(dtype)
        z = blocks._capped(blocks._logits(h, w, static), static.soft_cap) / temperature
        new_top = jnp.maximum(top, z.max(-1))
        total = jnp.exp(top - new_top) * total + jnp.exp(z - new_top[..., None]).sum(-1)
        best, places = lax.top_k(z, min(size, columns))
        values = jnp.concatenate([values, best], axis=-1)
        ids = jnp.concatenate([ids, places + start], axis=-1)
        values, places = lax.top_k(values, size)
        return values, jnp.take_along_axis(ids, places, axis=-1), new_top, total

    lead = (*hidden.shape[:-1], size)
    low = jnp.full(lead, -1e30, jnp.promote_types(dtype, jnp.float32))
    zeros = jnp.zeros(hidden.shape[:-1], low.dtype)
    low, none, zeros, _ = blocks._equally_varying(low, jnp.zeros(lead, jnp.int32), zeros, h)
    init = (low, none, zeros - 1e30, zeros)
    values, ids, top, total = blocks._over_blocks(step, init, static, unembedding)
    log_normaliser = top + jnp.log(total)
    return jnp.exp(values - log_normaliser[..., None]), ids
