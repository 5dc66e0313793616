"""One decoder-only transformer as an NNX module: whole rows, prompts, and steps over a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pgjax.models import attention, split_rows
from pgjax.models.attention import AttentionSettings, CachePart
from pgjax.models.cache import (
    CompletionCache,
    PrefixCache,
    SlotCache,
    as_ring,
    layers_of_kind,
    ring_positions,
)
from pgjax.models.config import DecoderConfig
from pgjax.models.layers import Layer, add_norm, kernel, normed, value
from pgjax.models.moe import Routing
from pgjax.models.rotary import rotary_tables, rotate
from pgjax.models.weighted_values import ATTENDED
from pgjax.parallel.sharding import batch_sharding, gather, row_ways, token_sharding

Tables = tuple[Array, Array] | None
# (kind, number of its cache array and index in it, query, key, value, sinks, cached keys, cached
# values) -> (attended, new cached keys, new cached values)
CachedAttend = Callable[..., tuple[Array, Array, Array]]
_Place = tuple[int, Any]  # index None: the array is one layer's

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}


class Decoder(nnx.Module):
    """Embedding, `num_layers` layers stacked on a leading axis and scanned, final norm.

    Source of the block: Touvron et al., "LLaMA", 2023, arXiv:2302.13971.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        self.config = config
        self.embedding = kernel(config, rngs, (vocab, hidden), ("vocab", "embed"), fan_in=hidden)
        if config.learned_positions:
            shape = (config.max_length, hidden)
            self.position_embedding = kernel(config, rngs, shape, (None, "embed"), fan_in=hidden)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.layers = stacked(rngs)
        self.single_layers: tuple[Any, ...] | None = None
        self.mesh: Mesh | None = None  # of whole rows
        add_norm(self, config, "norm")
        if not config.tied_embeddings:
            self.unembedding = kernel(
                config, rngs, (hidden, vocab), ("embed", "vocab"), fan_in=hidden
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        segment_ids: Int[Array, "B T"] | None,
        experts: Int[Array, "L B T k"] | None,
    ) -> tuple[Float[Array, "B T H"], Routing | None]:
        x, _, routing = self._rows(tokens, positions, segment_ids, experts, keep=False)
        return self._with_rows(self._final_norm(x)), routing

    def prefill(
        self, tokens: Int[Array, "P Tp"], lengths: Int[Array, " P"]
    ) -> tuple[Float[Array, "P H"], PrefixCache, Routing | None]:
        x, (keys, values), routing = self._rows(tokens, None, None, None, keep=True)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]

        def by_kind(rows: Array) -> tuple[Array, ...]:
            result = []
            for index, kind in enumerate(self.config.kinds):
                chosen = rows
                if len(self.config.kinds) > 1:
                    chosen = rows[jnp.array(layers_of_kind(self.config, index))]
                if kind.window is not None and kind.window < rows.shape[3]:
                    chosen = as_ring(chosen, lengths - 1, kind.window)
                result.append(chosen)
            return tuple(result)

        cache = PrefixCache(keys=by_kind(keys), values=by_kind(values), lengths=lengths)
        return self._final_norm(last), cache, routing

    def decode_step(
        self,
        tokens: Int[Array, "P G"],
        prefix: PrefixCache,
        completion: CompletionCache,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "P G H"], CompletionCache, Array | None]:
        newest = prefix.lengths + step
        positions = newest[:, None]
        tables = self._tables(positions)

        def attend(
            kind: int,
            place: _Place,
            query: Array,
            key: Array,
            new: Array,
            sinks: Any,
            *cache: Array,
        ) -> tuple[Array, Array, Array]:
            settings = self._settings(kind)
            array, index = place
            query, key = _rotated(query, key, tables[kind])

            def write(cached: Array, rows: Array, axis: int) -> Array:
                rows = rows.swapaxes(1, 2)  # [P, kv_heads, G, D]
                if index is None and cached.ndim == 4:
                    rows = rows[:, :, 0]
                slot = jnp.expand_dims(rows, axis)
                start: list[Any] = [0] * slot.ndim
                start[axis] = step % cached.shape[axis]
                if index is None:
                    return jax.lax.dynamic_update_slice(cached, slot, start)
                return jax.lax.dynamic_update_slice(cached, slot[None], [index, *start])

            by_layer = index is None
            keys, values = write(cache[0], key, -1 if by_layer else -2), write(cache[1], new, -2)
            prompt_keys = _at(prefix.keys[array], index)
            prompt_values = _at(prefix.values[array], index)
            held, real = ring_positions(prefix.lengths - 1, prompt_values.shape[2])
            # Slots of a prompt's padding hold nothing, whatever position they stand for.
            seen = real & attention.attendable(positions, held, window=settings.window)
            steps, taken = ring_positions(step, values.shape[-2])
            own = taken & attention.attendable(
                positions, prefix.lengths[:, None] + steps, window=settings.window
            )
            attended = attention.cached_attention(
                query,
                (
                    CachePart(prompt_keys, prompt_values, seen[:, None], by_layer),
                    CachePart(_at(keys, index), _at(values, index), own[:, None], by_layer),
                ),
                settings=settings,
                sinks=sinks,
            )
            return attended, keys, values

        x, cache, experts = self._cached(
            self._embed(tokens, positions),
            completion.keys,
            completion.values,
            attend,
            each=completion.keys[0].ndim < 6,
        )
        return self._final_norm(x), CompletionCache(keys=cache[0], values=cache[1]), experts

    def extend(
        self, tokens: Int[Array, "S K"], cache: SlotCache, lengths: Int[Array, " S"]
    ) -> tuple[Float[Array, "S K H"], SlotCache, Array | None]:
        count = tokens.shape[1]
        positions = lengths[:, None] + jnp.arange(count)  # [S, K]
        newest = lengths + count - 1
        tables = self._tables(positions)
        slots = jnp.arange(tokens.shape[0])[:, None]

        def attend(
            kind: int,
            place: _Place,
            query: Array,
            key: Array,
            new: Array,
            sinks: Any,
            *cache: Array,
        ) -> tuple[Array, Array, Array]:
            settings = self._settings(kind)
            query, key = _rotated(query, key, tables[kind])
            index = place[1]
            by_layer = index is None
            capacity = cache[1].shape[-2]
            # A ring wraps around; a cache of whole rows does not, and drops what is beyond it.
            column = positions if settings.window is None else positions % capacity

            def write(cached: Array, rows: Array, *before: Any) -> Array:
                where = (slots, slice(None), *before, column)
                return cached.at[where if by_layer else (index, *where)].set(rows, mode="drop")

            keys = write(cache[0], key, *((slice(None),) if by_layer else ()))
            values = write(cache[1], new)
            held, real = ring_positions(newest, capacity)
            mask = real[:, None] & attention.attendable(
                positions[:, :, None], held[:, None], window=settings.window
            )
            part = CachePart(_at(keys, index), _at(values, index), mask, by_layer)
            attended = attention.cached_attention(query, (part,), settings=settings, sinks=sinks)
            return attended, keys, values

        x, arrays, experts = self._cached(
            self._embed(tokens, positions),
            cache.keys,
            cache.values,
            attend,
            each=cache.keys[0].ndim < 5,
        )
        return self._final_norm(x), SlotCache(keys=arrays[0], values=arrays[1]), experts

    def _rows(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        experts: Array | None,
        *,
        keep: bool,
    ) -> tuple[Array, Any, Routing | None]:
        """All layers over whole rows; their keys and values `[L, B, kv_heads, T, D]` on demand."""
        if positions is None:
            positions = jnp.arange(tokens.shape[1])
        tables = self._tables(positions)
        attend_rows: Callable[..., Array] = attention.sequence_attention
        if self.mesh is not None and split_rows.splits(self.mesh, tokens.shape[1]):
            attend_rows = functools.partial(split_rows.split_attention, mesh=self.mesh)

        def of_kind(kind: int) -> Callable[..., tuple[Array, Any]]:
            def attend(query: Array, key: Array, new: Array, sinks: Any) -> tuple[Array, Any]:
                query, key = _rotated(query, key, tables[kind])
                key, new = key.swapaxes(1, 2), new.swapaxes(1, 2)
                attended = attend_rows(
                    query,
                    key,
                    new,
                    settings=self._settings(kind),
                    segment_ids=segment_ids,
                    sinks=sinks,
                )
                return attended, (key, new) if keep else None

            return attend

        branches = [of_kind(kind) for kind in range(len(self.config.kinds))]

        def layer(x: Array, scanned: Any) -> tuple[Array, Any]:
            state, kind, forced = scanned

            def attend(*projected: Any) -> tuple[Array, Any]:
                if len(branches) == 1:
                    return branches[0](*projected)
                return jax.lax.switch(kind, branches, *projected)

            module = nnx.merge(graphdef, self._gathered(state))
            x, kept, routing = module(self._with_rows(x), attend, forced, self.mesh)
            return self._with_rows(x), (kept, routing)

        graphdef, states = nnx.split(self.layers)
        if self.config.remat is not None:
            policy = _REMAT_POLICIES[self.config.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        kinds = jnp.array(self.config.kind_indices)
        x, (kept, routing) = jax.lax.scan(
            layer, self._with_rows(self._embed(tokens, positions)), (states, kinds, experts)
        )
        if routing is None:
            return x, kept, None
        return x, kept, Routing(logits=routing[0], experts=routing[1])

    def _cached(
        self,
        x: Array,
        keys: tuple[Array, ...],
        values: tuple[Array, ...],
        attend: CachedAttend,
        *,
        each: bool,
    ) -> tuple[Array, tuple[tuple[Array, ...], tuple[Array, ...]], Array | None]:
        """All layers over a cache, whose arrays (`each` layer's or kind's) are written in place.

        The loop's body holds one period of the layers' kinds, so each layer's cache array, and
        its window, is known when the program is made.
        """
        kinds = self.config.kind_indices
        layers = self.config.num_layers
        period = next(
            p for p in range(1, layers + 1) if all(k == kinds[i % p] for i, k in enumerate(kinds))
        )
        graphdef, states = nnx.split(self.layers)
        single = self.single_layers
        sizes = self.config.moe
        chosen = (
            None
            if sizes is None
            else jnp.zeros((layers, *x.shape[:-1], sizes.experts_per_token), jnp.int32)
        )

        def run(carry: Any, layer: Any, kind: int, index: Any) -> Any:
            x, keys, values, chosen = carry
            array, index = (layer, None) if each else (kind, index)

            def attend_here(query: Array, key: Array, new: Array, sinks: Any) -> tuple[Array, Any]:
                arrays = (keys[array], values[array])
                attended, *written = attend(kind, (array, index), query, key, new, sinks, *arrays)
                return attended, written

            if single is None:
                state = jax.tree.map(functools.partial(_at, index=layer), states)
            else:
                state = single[layer]
            module = nnx.merge(graphdef, state)
            x, (new_keys, new_values), routing = module(x, attend_here, mesh=self.mesh)
            if routing is not None:
                chosen = jax.lax.dynamic_update_index_in_dim(chosen, routing[1], layer, 0)
            keys = (*keys[:array], new_keys, *keys[array + 1 :])
            values = (*values[:array], new_values, *values[array + 1 :])
            return x, keys, values, chosen

        def block(i: Any, carry: Any) -> Any:
            for j, kind in enumerate(kinds[:period]):
                index = i * kinds[:period].count(kind) + kinds[:j].count(kind)
                carry = run(carry, i * period + j, kind, index)
            return carry

        carry, whole = (x, keys, values, chosen), 0
        if single is None:
            whole = layers // period
            carry = jax.lax.fori_loop(0, whole, block, carry)
        for layer in range(whole * period, layers):
            carry = run(carry, layer, kinds[layer], kinds[:layer].count(kinds[layer]))
        x, keys, values, chosen = carry
        return x, (keys, values), chosen

    def _with_rows(self, x: Array) -> Array:
        """Activations `[B, T, H]` on the devices of their rows and tokens, all else whole."""
        if self.mesh is None or self.mesh.size == 1 or x.shape[0] % row_ways(self.mesh):
            return x
        split = split_rows.splits(self.mesh, x.shape[1])
        where = token_sharding(self.mesh) if split else batch_sharding(self.mesh)
        return jax.lax.with_sharding_constraint(x, where)

    def _gathered(self, state: nnx.State) -> nnx.State:
        """One layer's matrices, gathered here and once for all that read them."""
        if self.mesh is None or self.mesh.size == 1:
            return state
        flat = []
        for path, param in nnx.to_flat_state(state):
            held, axes = value(param), param.get_metadata("axes")
            if isinstance(held, jax.Array):  # not what stands for one, low-rank or quantised
                param = param.replace(gather(held, axes, self.mesh))
            flat.append((path, param))
        return nnx.from_flat_state(flat)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        x = jnp.take(value(self.embedding), tokens, axis=0).astype(self.config.dtype)
        if self.config.embedding_scale is not None:
            x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.config.learned_positions:
            x += jnp.take(value(self.position_embedding), positions, axis=0).astype(x.dtype)
        return x

    def _tables(self, positions: Array) -> list[Tables]:
        """The rotation of these positions, for each kind of attention."""
        dim = self.config.head_dim
        assert dim is not None
        tables = [
            None if kind.rotary is None else rotary_tables(positions, kind.rotary, head_dim=dim)
            for kind in self.config.kinds
        ]
        # Or XLA computes their sines anew in every layer, inside whatever reads them.
        return jax.lax.optimization_barrier(tables)

    def _settings(self, kind: int) -> AttentionSettings:
        scale = self.config.query_scale
        assert self.config.head_dim is not None
        return AttentionSettings(
            scale=self.config.head_dim**-0.5 if scale is None else scale,
            window=self.config.kinds[kind].window,
            soft_cap=self.config.attention_soft_cap,
        )

    def _final_norm(self, x: Array) -> Array:
        return normed(self, self.config, x, "norm")


def _rotated(query: Array, key: Array, tables: Tables) -> tuple[Array, Array]:
    return (query, key) if tables is None else (rotate(query, tables), rotate(key, tables))


def _at(stack: Array, index: Any) -> Array:
    """An entry of the stack; the array itself where it is no stack."""
    if index is None:
        return stack
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
