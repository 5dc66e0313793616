"""Who attends to whom, and the one place where an implementation of attention is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pgjax.models import weighted_values

QUERY_BLOCK = 512
"""Rows of scores held at a time by the portable implementation."""
MAX_STAGES = 4
"""It takes the queries of a row that is not longer than a block in so many stages at most, each
over the keys up to its end: four do 5/8 of the work of one."""
LEAST_STAGE = 64
"""Queries of a stage where there are several."""


class AttentionSettings(NamedTuple):
    """What is static about a layer's attention.

    Attributes:
      scale: multiplies the queries.
      window: positions a query sees, itself included; None: all before it.
      soft_cap: c in `c · tanh(score / c)`; None: none.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


def attendable(
    query_positions: Int[Array, "*q"],
    key_positions: Int[Array, "*k"],
    *,
    window: int | None = None,
) -> Bool[Array, "*qk"]:
    """True where a query at one position may see a key at another: `q - window < k <= q`.

    Every mask of the decoder is made here from positions; the arguments broadcast.
    """
    seen = key_positions <= query_positions
    return seen if window is None else seen & (key_positions > query_positions - window)


def masked_softmax(
    scores: Float[Array, "*batch S"],
    mask: Bool[Array, "*mask S"],
    sinks: Float[Array, "*sinks"] | None = None,
) -> Float[Array, "*batch S"]:
    """Softmax over the last axis in float32, exactly 0 where `mask` is false.

    Every row needs at least one true entry, which a causal mask with itself always has.

    Args:
      scores: any floating dtype.
      mask: broadcastable against `scores`.
      sinks: a score per row, broadcastable against `batch`, that takes part in the denominator
        alone; None: none.
    """
    scores = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), scores.shape[:-1])[..., None]
    return jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]


def sequence_attention(
    query: Float[Array, "B T heads D"],
    key: Float[Array, "B kv_heads T D"],
    value: Float[Array, "B kv_heads T D"],
    *,
    settings: AttentionSettings,
    segment_ids: Int[Array, "B T"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "B T heads D"]:
    """Grouped-query attention of each token over itself and those before it in its segment.

    Query head h reads key and value head `h // (heads / kv_heads)`. Scores of more than
    `QUERY_BLOCK` queries are never held at once: longer rows go through in blocks whose scores are
    computed again in the backward pass, so memory grows linearly in T.

    Args:
      query: projected and rotated.
      key, value: projected, keys rotated, heads in front of time.
      settings: scale, window and soft cap.
      segment_ids: tokens see only their own segment, whose tokens are next to each other; None:
        the row is one segment.
      sinks: see `masked_softmax`.

    Returns:
      the attended values, in the dtype of `value`.

    Source: Ainslie et al., "GQA", 2023, arXiv:2305.13245; blocks after Rabe & Staats,
    "Self-attention does not need O(n²) memory", 2021, arXiv:2112.05682.
    """
    chosen = implementation(query, settings, segment_ids=segment_ids, sinks=sinks)
    return chosen(query, key, value)


def implementation(
    query: Float[Array, "B T heads D"],
    settings: AttentionSettings,
    *,
    segment_ids: Int[Array, "B T"] | None,
    sinks: Float[Array, " heads"] | None,
) -> Callable[[Array, Array, Array], Array]:
    """The best implementation for the backend that can do what is asked.

    cuDNN's fused kernel on NVIDIA GPUs, splash attention on TPUs, XLA in blocks elsewhere and for
    whatever those two cannot do (sinks; a soft cap or packed rows under cuDNN; other dtypes than
    bfloat16 and float16; odd sizes).
    """
    backend = jax.default_backend()
    length, dim = query.shape[1], query.shape[3]
    plain = sinks is None and settings.soft_cap is None and segment_ids is None
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and dim % 8 == 0 and dim <= 128
    if backend == "gpu" and plain and fits:
        return functools.partial(_cudnn, settings=settings)
    if backend == "tpu" and sinks is None and length % 128 == 0 and dim % 64 == 0:
        return functools.partial(_splash, settings=settings, segment_ids=segment_ids)
    return functools.partial(_blockwise, settings=settings, segment_ids=segment_ids, sinks=sinks)


def _cudnn(query: Array, key: Array, value: Array, *, settings: AttentionSettings) -> Array:
    window = None if settings.window is None else (settings.window - 1, 0)
    return jax.nn.dot_product_attention(
        query,
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        scale=settings.scale,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )


def _splash(
    query: Array,
    key: Array,
    value: Array,
    *,
    settings: AttentionSettings,
    segment_ids: Array | None,
    interpret: bool = False,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = query.shape[2], query.shape[1]
    shape = (length, length)
    if settings.window is None:
        mask: masks.Mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (settings.window - 1, 0), offset=0)
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        attn_logits_soft_cap=settings.soft_cap,
        interpret=interpret,
    )
    repeats = heads // key.shape[1]
    key, value = (jnp.repeat(x, repeats, axis=1) for x in (key, value))
    query = (query * settings.scale).swapaxes(1, 2)
    if segment_ids is None:
        out = jax.vmap(attend)(query, key, value)
    else:
        ids = kernel.SegmentIds(q=segment_ids, kv=segment_ids)
        out = jax.vmap(attend)(query, key, value, ids)
    return out.swapaxes(1, 2).astype(value.dtype)


def _blockwise(
    query: Array,
    key: Array,
    value: Array,
    *,
    settings: AttentionSettings,
    segment_ids: Array | None,
    sinks: Array | None,
) -> Array:
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped * settings.scale
    row_sinks = None if sinks is None else sinks.reshape(kv_heads, -1, 1)
    stages = 1  # the scores of several stages are all held
    if length <= QUERY_BLOCK:
        stages = max(min(MAX_STAGES, length // LEAST_STAGE), 1)
    size = -(-length // stages)
    parts = []
    for first in range(0, length, size):
        end = min(first + size, length)
        seen = 0 if settings.window is None else max(first - settings.window + 1, 0)
        ids = None
        if segment_ids is not None:
            ids = segment_ids[:, first:end], segment_ids[:, seen:end]
        part = rows_over_keys(
            grouped[:, :, :, first:end],
            key[:, :, seen:end],
            value[:, :, seen:end],
            first=first,
            seen=seen,
            settings=settings,
            ids=ids,
            sinks=row_sinks,
        )
        parts.append(part)
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def rows_over_keys(
    queries: Float[Array, "B kv r t D"],
    keys: Float[Array, "B kv s D"],
    values: Float[Array, "B kv s D"],
    *,
    first: int | Int[Array, ""],
    seen: int,
    settings: AttentionSettings,
    ids: tuple[Array, Array] | None,
    sinks: Array | None,
) -> Float[Array, "B kv r t D"]:
    """Queries at `first`, `first + 1`, ... over keys at `seen`, `seen + 1`, ..., in blocks.

    Args:
      queries: scaled.
      keys, values: up to the last of the queries at least.
      ids: segments of queries `[B, t]` and keys `[B, s]`.
      sinks: `[kv, r, 1]`.
    """
    length, end = queries.shape[3], seen + keys.shape[2]
    blocks = -(-length // QUERY_BLOCK)
    size = -(-length // blocks)
    padding = blocks * size - length
    positions = jnp.arange(seen, end)
    if ids is not None:
        padded_ids = jnp.pad(ids[0], ((0, 0), (0, padding)))

    def attend(block: Array, start: Array | int) -> Array:
        """Of this stage's queries `start`, `start + 1`, ..."""
        # Queries of one key-value head as one axis: with two, XLA transposes in the backward pass.
        flat = block.reshape(*block.shape[:2], -1, block.shape[-1])
        scores = _scores("bkqd,bksd->bkqs", flat, keys).reshape(*block.shape[:4], -1)
        scores = soft_capped(scores, settings.soft_cap)
        rows = first + start + jnp.arange(size)
        mask = attendable(rows[:, None], positions, window=settings.window)
        if ids is not None:
            own = jax.lax.dynamic_slice_in_dim(padded_ids, start, size, axis=1)
            same = own[:, :, None] == ids[1][:, None, :]
            mask = mask & same[:, None, None]
        if padding:  # padded queries see the last key, so that no row of weights is empty
            beyond = start + jnp.arange(size) >= length
            mask = mask | (beyond[:, None] & (positions == end - 1))
        return weighted_values.attended(scores, mask, values, sinks)

    if blocks == 1:
        return attend(queries, 0)
    padded = jnp.pad(queries, ((0, 0),) * 3 + ((0, padding), (0, 0)))
    stacked = jnp.moveaxis(padded.reshape(*padded.shape[:3], blocks, size, -1), 3, 0)
    starts = size * jnp.arange(blocks)
    step = jax.checkpoint(lambda part: attend(*part), prevent_cse=False)
    out = jnp.moveaxis(jax.lax.map(step, (stacked, starts)), 0, 3)
    return out.reshape(padded.shape)[:, :, :, :length]


class CachePart(NamedTuple):
    """Keys and values that queries of a row look at, and which of them each may see.

    Attributes:
      keys, values: `[P, kv_heads, C, D]` where a row's queries share them, `[P, kv_heads, G, C, D]`
        where each of its G queries has its own.
      mask: bool, `[P, G or 1, C]`.
      slots_last: keys are `[..., D, C]`, as products with few queries are fastest on CPUs.
    """

    keys: Array
    values: Array
    mask: Array
    slots_last: bool = False


def cached_attention(
    query: Float[Array, "P G heads D"],
    parts: tuple[CachePart, ...],
    *,
    settings: AttentionSettings,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "P G heads D"]:
    """Attention of G queries per row over cached keys: one softmax over all parts.

    A part that a row's queries share is read once for all of them, without being copied.

    Args:
      query: projected and rotated.
      parts: what is seen; of each query at least one key.
      settings: scale and soft cap; the window is in the masks.
      sinks: see `masked_softmax`.

    Returns:
      the attended values, in the dtype of the cached ones.
    """
    prompts, samples, heads, dim = query.shape
    kv_heads = parts[0].keys.shape[1]
    # Heads in front of samples, as in the caches: every product below is then a batch of plain
    # matrix products, for which no cache has to be transposed.
    grouped = query.reshape(prompts, samples, kv_heads, -1, dim).transpose(0, 2, 1, 3, 4)
    grouped = grouped * settings.scale
    owners = ["pk" if part.keys.ndim == 4 else "pkg" for part in parts]
    scores = jnp.concatenate(
        [
            _scores(f"pkgrd,{owner}{'ds' if part.slots_last else 'sd'}->pkgrs", grouped, part.keys)
            for part, owner in zip(parts, owners, strict=True)
        ],
        axis=-1,
    )
    scores = soft_capped(scores, settings.soft_cap)
    rows = max(part.mask.shape[1] for part in parts)
    mask = jnp.concatenate(
        [jnp.broadcast_to(p.mask, (prompts, rows, p.mask.shape[2])) for p in parts], axis=-1
    )
    row_sinks = None if sinks is None else sinks.reshape(kv_heads, 1, -1)
    weights = masked_softmax(scores, mask[:, None, :, None], row_sinks)
    weights = weights.astype(parts[0].values.dtype)
    out, start = None, 0
    for part, owner in zip(parts, owners, strict=True):
        end = start + part.mask.shape[2]
        attended = jnp.einsum(f"pkgrs,{owner}sd->pkgrd", weights[..., start:end], part.values)
        out, start = attended if out is None else out + attended, end
    assert out is not None
    return out.transpose(0, 2, 1, 3, 4).reshape(prompts, samples, heads, dim)


def soft_capped(scores: Float[Array, "*s"], cap: float | None) -> Float[Array, "*s"]:
    """`cap · tanh(scores / cap)`, or the scores where there is no cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _scores(subscripts: str, query: Array, key: Array) -> Array:
    return jnp.einsum(subscripts, query, key, preferred_element_type=jnp.float32)
