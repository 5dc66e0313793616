"""The pieces of a decoder layer as functions of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], *, epsilon: float
) -> Float[Array, "*batch D"]:
    """`scale · x / sqrt(mean(x²) + epsilon)` over the last axis.

    Args:
      x: any floating dtype; the statistics and the product are computed in float32.
      scale: learned, one per feature.
      epsilon: positive.

    Returns:
      the normalised array, in the dtype of `x`.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype)


def rotary_tables(
    positions: Int[Array, "*batch"], *, head_dim: int, theta: float
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Cosine and sine of `position · theta^(-2i/head_dim)` for i in [0, head_dim/2), float32.

    Source: Su et al., "RoFormer", 2021, arXiv:2104.09864.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[..., None] * jnp.power(theta, -exponents)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "*batch heads D"],
    tables: tuple[Float[Array, "*positions half"], Float[Array, "*positions half"]],
) -> Float[Array, "*batch heads D"]:
    """Rotates feature i together with feature i + D/2, as Llama and its relatives do.

        out[i] = x[i]·cos - x[i+D/2]·sin,   out[i+D/2] = x[i+D/2]·cos + x[i]·sin

    Args:
      x: queries or keys.
      tables: from `rotary_tables`; their leading axes broadcast against `batch`.

    Returns:
      the rotated array, in the dtype of `x`; the arithmetic is float32.
    """
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attendable(
    query_positions: Int[Array, "*q"], key_positions: Int[Array, "*k"]
) -> Bool[Array, "*qk"]:
    """True where a query at one position may see a key at another: `key <= query`.

    Every mask of the decoder is made here from positions; the arguments broadcast.
    """
    return key_positions <= query_positions


def masked_softmax(
    scores: Float[Array, "*batch S"], mask: Bool[Array, "*mask S"]
) -> Float[Array, "*batch S"]:
    """Softmax over the last axis in float32, exactly 0 where `mask` is false.

    Every row needs at least one true entry, which a causal mask with itself always has.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def causal_attention(
    query: Float[Array, "B T heads D"],
    key: Float[Array, "B T kv_heads D"],
    value: Float[Array, "B T kv_heads D"],
) -> Float[Array, "B T heads D"]:
    """Grouped-query attention of each position over itself and those before it.

    Query head h reads key and value head `h // (heads / kv_heads)`; scores are divided by sqrt(D).

    Args:
      query, key, value: projected, with rotation applied.

    Returns:
      the attended values, in the dtype of `value`.

    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245.
    """
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim) * dim**-0.5
    scores = jnp.einsum("btkrd,bskd->bkrts", grouped, key, preferred_element_type=jnp.float32)
    positions = jnp.arange(length)
    weights = masked_softmax(scores, attendable(positions[:, None], positions))
    out = jnp.einsum("bkrts,bskd->btkrd", weights.astype(value.dtype), value)
    return out.reshape(batch, length, heads, dim)


def cached_attention(
    query: Float[Array, "P G heads D"],
    prefix_key: Float[Array, "P Tp kv_heads D"],
    prefix_value: Float[Array, "P Tp kv_heads D"],
    key: Float[Array, "N P G kv_heads D"],
    value: Float[Array, "N P G kv_heads D"],
    *,
    prefix_lengths: Int[Array, " P"],
    step: Int[Array, ""],
) -> Float[Array, "P G heads D"]:
    """Attention of each sequence's newest token over its prompt and its own completion.

    One softmax over the concatenated scores of both parts. The prompt's part is read by all G
    sequences of that prompt without being copied.

    Args:
      query: of the token at position `prefix_lengths[p] + step`.
      prefix_key, prefix_value: of the prompts, right-padded.
      key, value: of the completions, slot n holding position `prefix_lengths[p] + n`; slots after
        `step` are ignored.
      prefix_lengths: real tokens of each prompt.
      step: slot of the newest token, already written.

    Returns:
      the attended values, in the dtype of `value`.
    """
    prompts, samples, heads, dim = query.shape
    prefix_size, slots = prefix_key.shape[1], key.shape[0]
    grouped = query.reshape(prompts, samples, prefix_key.shape[2], -1, dim) * dim**-0.5
    scores = jnp.concatenate(
        [
            jnp.einsum(
                "pgkrd,pskd->pgkrs", grouped, prefix_key, preferred_element_type=jnp.float32
            ),
            jnp.einsum("pgkrd,npgkd->pgkrn", grouped, key, preferred_element_type=jnp.float32),
        ],
        axis=-1,
    )
    lengths = prefix_lengths[:, None]
    prefix_positions, offsets = jnp.arange(prefix_size), jnp.arange(slots)
    visible = attendable(
        lengths + step,
        jnp.concatenate(
            [jnp.broadcast_to(prefix_positions, (prompts, prefix_size)), lengths + offsets], axis=-1
        ),
    )
    real = jnp.concatenate([prefix_positions < lengths, jnp.ones((prompts, slots), bool)], axis=-1)
    weights = masked_softmax(scores, (visible & real)[:, None, None, None, :])
    weights = weights.astype(value.dtype)
    out = jnp.einsum("pgkrs,pskd->pgkrd", weights[..., :prefix_size], prefix_value)
    out += jnp.einsum("pgkrn,npgkd->pgkrd", weights[..., prefix_size:], value)
    return out.reshape(prompts, samples, heads, dim)
