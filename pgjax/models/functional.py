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
    return _masked_softmax(scores.astype(jnp.float32), mask)


# With this rule the backward pass keeps the weights alone, not the intermediate arrays of their
# computation, each as large as the scores.
@jax.custom_jvp
def _masked_softmax(scores: Array, mask: Array) -> Array:
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)


@_masked_softmax.defjvp
def _masked_softmax_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    weights = _masked_softmax(*primals)
    weighted = weights * tangents[0]
    return weights, weighted - weights * jnp.sum(weighted, axis=-1, keepdims=True)


def causal_attention(
    query: Float[Array, "B T heads D"],
    key: Float[Array, "B kv_heads T D"],
    value: Float[Array, "B kv_heads T D"],
) -> Float[Array, "B T heads D"]:
    """Grouped-query attention of each position over itself and those before it.

    Query head h reads key and value head `h // (heads / kv_heads)`; scores are divided by sqrt(D).

    Args:
      query: projected and rotated.
      key, value: projected, keys rotated, heads in front of time.

    Returns:
      the attended values, in the dtype of `value`.

    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245.
    """
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[1], -1, dim).transpose(0, 2, 3, 1, 4)
    scores = _scores("bkrtd,bksd->bkrts", grouped * dim**-0.5, key)
    positions = jnp.arange(length)
    weights = masked_softmax(scores, attendable(positions[:, None], positions))
    out = jnp.einsum("bkrts,bksd->bkrtd", weights.astype(value.dtype), value)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def cached_attention(
    query: Float[Array, "P G heads D"],
    prefix_key: Float[Array, "P kv_heads Tp D"],
    prefix_value: Float[Array, "P kv_heads Tp D"],
    key: Float[Array, "P kv_heads G N D"],
    value: Float[Array, "P kv_heads G N D"],
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
    kv_heads, prefix_size = prefix_key.shape[1:3]
    # Heads in front of samples, as in the caches: every product below is then a batch of plain
    # matrix products, for which no cache has to be transposed.
    grouped = query.reshape(prompts, samples, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4)
    grouped = grouped * dim**-0.5
    scores = jnp.concatenate(
        [
            _scores("pkgrd,pksd->pkgrs", grouped, prefix_key),
            _scores("pkgrd,pkgnd->pkgrn", grouped, key),
        ],
        axis=-1,
    )
    lengths = prefix_lengths[:, None]
    prefix_positions = jnp.arange(prefix_size)
    completion_positions = lengths + jnp.arange(key.shape[3])
    now = lengths + step
    # Padding holds positions as well, which a causal mask alone would let through.
    mask = jnp.concatenate(
        [
            attendable(now, prefix_positions) & (prefix_positions < lengths),
            attendable(now, completion_positions),
        ],
        axis=-1,
    )
    weights = masked_softmax(scores, mask[:, None, None, None]).astype(value.dtype)
    out = jnp.einsum("pkgrs,pksd->pkgrd", weights[..., :prefix_size], prefix_value)
    out += jnp.einsum("pkgrn,pkgnd->pkgrd", weights[..., prefix_size:], value)
    return out.transpose(0, 2, 1, 3, 4).reshape(prompts, samples, heads, dim)


def _scores(subscripts: str, query: Array, key: Array) -> Array:
    return jnp.einsum(subscripts, query, key, preferred_element_type=jnp.float32)
