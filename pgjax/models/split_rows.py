"""Attention of rows whose tokens are split over the `sequence` axis of a mesh."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pgjax.models.attention import AttentionSettings, rows_over_keys

AXIS = "sequence"


def splits(mesh: Mesh | None, length: int) -> bool:
    """Whether rows of so many tokens are split over the mesh."""
    return mesh is not None and mesh.shape[AXIS] > 1 and length % mesh.shape[AXIS] == 0


def split_attention(
    query: Float[Array, "B T heads D"],
    key: Float[Array, "B kv_heads T D"],
    value: Float[Array, "B kv_heads T D"],
    *,
    mesh: Mesh,
    settings: AttentionSettings,
    segment_ids: Int[Array, "B T"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
) -> Float[Array, "B T heads D"]:
    """`sequence_attention` where each device computes for the queries of its own tokens.

    The keys and values of a layer are gathered along the axis once forward and once backward, and
    their gradients are reduced and scattered once: 2 · B · T · kv_heads · D numbers each time,
    which grouped-query attention makes few beside the activations. Scores are held for a block of
    queries at a time, so a device's memory falls with the axis. Each device goes over all keys:
    none has more to do than others, but what causality would spare is not spared.

    Args:
      query, key, value: as for `sequence_attention`, tokens split over the axis, for use in `jit`.
      mesh: where `splits`.
      settings: scale, window and soft cap.
      segment_ids, sinks: as for `sequence_attention`.

    Source: the gathering form of context parallelism in Llama Team, "The Llama 3 Herd of Models",
    2024, arXiv:2407.21783, section 3.3.2.
    """
    heads, kv_heads = query.shape[2], key.shape[1]

    def own(
        query: Array, key: Array, value: Array, ids: Array | None, sinks: Array | None
    ) -> Array:
        batch, length, _, dim = query.shape
        keys, values = (jax.lax.all_gather(x, AXIS, axis=2, tiled=True) for x in (key, value))
        every = None if ids is None else (ids, jax.lax.all_gather(ids, AXIS, axis=1, tiled=True))
        grouped = query.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
        out = rows_over_keys(
            grouped * settings.scale,
            keys,
            values,
            first=jax.lax.axis_index(AXIS) * length,
            seen=0,
            settings=settings,
            ids=every,
            sinks=None if sinks is None else sinks.reshape(kv_heads, -1, 1),
        )
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)

    rows, behind = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS)
    mapped = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(
            rows,
            behind,
            behind,
            None if segment_ids is None else rows,
            None if sinks is None else PartitionSpec(),
        ),
        out_specs=rows,
        axis_names={AXIS},  # what else splits the arrays stays the compiler's
        check_vma=False,
    )
    return mapped(query, key, value, segment_ids, sinks)
