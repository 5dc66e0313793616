"""One layer of a decoder run by itself, with what each of its matrices reads."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from pgjax.models import attention, functional
from pgjax.models.interface import FunctionalDecoder, Params
from pgjax.models.layers import Layer
from pgjax.models.rotary import rotate


@functools.partial(jax.jit, static_argnames=("decoder", "kind", "batch_size"))
def moments(
    params: Params,
    whole: Any,
    now: Any,
    full: Array,
    given: Array,
    mask: Array,
    *,
    decoder: FunctionalDecoder,
    kind: int,
    batch_size: int | None,
) -> dict[str, tuple[Array, Array]]:
    """H and D of each stage's input; `now` is the layer as far as it is quantised."""

    def sums(rows: tuple[Array, Array, Array]) -> dict[str, tuple[Array, Array]]:
        full, given, mask = rows
        wanted, _ = traced(decoder, params, whole, full, kind)
        got, _ = traced(decoder, params, now, given, kind)
        weight = mask.reshape(-1, 1)
        found = {}
        for name in wanted:
            x, y = (
                jnp.where(weight, v.reshape(weight.shape[0], -1).astype(jnp.float32), 0.0)
                for v in (got[name], wanted[name])
            )
            found[name] = tuple(
                jnp.matmul(z.T, x, precision=jax.lax.Precision.HIGHEST) for z in (x, y - x)
            )
        return found  # type: ignore[return-value]

    totals = jax.tree.map(
        lambda x: 2 * x.sum(0) / jnp.maximum(mask.sum(), 1),
        jax.lax.map(sums, _batched((full, given, mask), batch_size)),
    )
    return totals


@functools.partial(jax.jit, static_argnames=("decoder", "kind", "batch_size"))
def outputs(
    params: Params,
    layer: Any,
    x: Array,
    *,
    decoder: FunctionalDecoder,
    kind: int,
    batch_size: int | None,
) -> Array:
    rows = jax.lax.map(
        lambda part: traced(decoder, params, layer, part[0], kind)[1], _batched((x,), batch_size)
    )
    return rows.reshape(x.shape)


def traced(
    decoder: FunctionalDecoder, params: Params, state: Any, x: Array, kind: int
) -> tuple[dict[str, Array], Array]:
    """What goes into each stage of one layer, and what comes out of the layer."""
    model = decoder._merge(params)
    config = decoder.config
    table = model._tables(jnp.arange(x.shape[1]))[kind]
    layer: Layer = nnx.merge(nnx.split(model.layers)[0], state)
    seen: dict[str, Array] = {}

    def attend(query: Array, key: Array, value: Array, sinks: Any) -> tuple[Array, None]:
        if table is not None:
            query, key = rotate(query, table), rotate(key, table)
        seen["attention/output"] = attention.sequence_attention(
            query,
            key.swapaxes(1, 2),
            value.swapaxes(1, 2),
            settings=model._settings(kind),
            sinks=sinks,
        )
        return seen["attention/output"], None

    seen["attention/query"] = layer._normed(x, "attention_norm")
    update, _ = layer.attention(seen["attention/query"], attend)
    if config.post_norms:
        update = layer._normed(update, "attention_post_norm")
    middle = x + update
    normed = layer._normed(middle, "mlp_norm")
    if config.gated:
        seen["mlp/gate"] = normed
        inner = functional.gated(config.activation, *layer.mlp._projected(normed, "gate", "up"))
    else:
        seen["mlp/gate"] = normed  # by the stage's first name, though there is no gate
        inner = functional.activated(config.activation, *layer.mlp._projected(normed, "up"))
    seen["mlp/down"] = inner
    update = layer.mlp._projected(inner, "down")[0]
    if config.post_norms:
        update = layer._normed(update, "mlp_post_norm")
    return seen, middle + update


@functools.partial(jax.jit, static_argnames="decoder")
def embedded(decoder: FunctionalDecoder, params: Params, tokens: Array) -> Array:
    return decoder._merge(params)._embed(tokens, jnp.arange(tokens.shape[1]))


def _batched(arrays: tuple[Array, ...], batch_size: int | None) -> tuple[Array, ...]:
    rows = arrays[0].shape[0]
    size = rows if batch_size is None else batch_size
    return tuple(a.reshape(rows // size, size, *a.shape[1:]) for a in arrays)
