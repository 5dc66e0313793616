"""One decoder-only transformer, and the pure functions through which the library uses it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.models import functional
from pgjax.models.cache import CompletionCache, PrefixCache
from pgjax.models.config import DecoderConfig
from pgjax.models.layers import Layer, kernel, norm_scale

Params = dict[str, Any]

_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nnx.Module):
    """Embedding, `num_layers` layers stacked on a leading axis and scanned, final norm.

    Source of the block: Touvron et al., "LLaMA", 2023, arXiv:2302.13971.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        hidden, vocab = config.hidden_size, config.vocab_size
        self.config = config
        self.embedding = kernel(config, rngs, (vocab, hidden), ("vocab", "embed"), fan_in=hidden)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs)

        self.layers = stacked(rngs)
        self.norm = norm_scale(config, hidden, "embed")
        if not config.tied_embeddings:
            self.unembedding = kernel(
                config, rngs, (hidden, vocab), ("embed", "vocab"), fan_in=hidden
            )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        rotary = self._rotary(jnp.arange(tokens.shape[1]))

        def layer(x: Array, state: Any) -> tuple[Array, None]:
            def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
                key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
                return functional.causal_attention(query, key, value), None

            return nnx.merge(graphdef, state)(x, rotary, attend)

        graphdef, states = nnx.split(self.layers)
        if self.config.remat is not None:
            policy = _REMAT_POLICIES[self.config.remat]
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x, _ = jax.lax.scan(layer, self._embed(tokens), states)
        return self._final_norm(x)

    def prefill(
        self, tokens: Int[Array, "P Tp"], lengths: Int[Array, " P"]
    ) -> tuple[Float[Array, "P H"], PrefixCache]:
        rotary = self._rotary(jnp.arange(tokens.shape[1]))

        def layer(x: Array, state: Any) -> tuple[Array, tuple[Array, Array]]:
            def attend(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
                key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
                return functional.causal_attention(query, key, value), (key, value)

            return nnx.merge(graphdef, state)(x, rotary, attend)

        graphdef, states = nnx.split(self.layers)
        x, (keys, values) = jax.lax.scan(layer, self._embed(tokens), states)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._final_norm(last), PrefixCache(keys=keys, values=values, lengths=lengths)

    def decode_step(
        self,
        tokens: Int[Array, "P G"],
        prefix: PrefixCache,
        completion: CompletionCache,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "P G H"], CompletionCache]:
        rotary = self._rotary((prefix.lengths + step)[:, None])

        # The whole stacked cache is carried and only one slot of it written, in place; as an
        # output of the scan it would be copied at every step.
        def layer(
            carry: tuple[Array, Array, Array], scanned: tuple[Any, Array, Array, Array]
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            state, prefix_keys, prefix_values, index = scanned

            def write(cache: Array, new: Array) -> Array:
                new = new.swapaxes(1, 2)[None, :, :, :, None]  # [1, P, kv_heads, G, 1, D]
                return jax.lax.dynamic_update_slice(cache, new, (index, 0, 0, 0, step, 0))

            def attend(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
                new_keys, new_values = write(keys, key), write(values, value)
                attended = functional.cached_attention(
                    query,
                    prefix_keys,
                    prefix_values,
                    jax.lax.dynamic_index_in_dim(new_keys, index, keepdims=False),
                    jax.lax.dynamic_index_in_dim(new_values, index, keepdims=False),
                    prefix_lengths=prefix.lengths,
                    step=step,
                )
                return attended, (new_keys, new_values)

            x, (keys, values) = nnx.merge(graphdef, state)(x, rotary, attend)
            return (x, keys, values), None

        graphdef, states = nnx.split(self.layers)
        (x, keys, values), _ = jax.lax.scan(
            layer,
            (self._embed(tokens), completion.keys, completion.values),
            (states, prefix.keys, prefix.values, jnp.arange(self.config.num_layers)),
        )
        return self._final_norm(x), CompletionCache(keys=keys, values=values)

    def _embed(self, tokens: Array) -> Array:
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.config.dtype)

    def _rotary(self, positions: Array) -> tuple[Array, Array]:
        assert self.config.head_dim is not None
        return functional.rotary_tables(
            positions, head_dim=self.config.head_dim, theta=self.config.rope_theta
        )

    def _final_norm(self, x: Array) -> Array:
        return functional.rms_norm(x, self.norm[...], epsilon=self.config.norm_epsilon)


@dataclasses.dataclass(frozen=True)
class FunctionalDecoder:
    """A decoder as pure functions of its parameters, a nested dict of arrays.

    Hashable and equal by its configuration, so it can be a static argument of `jax.jit`.

    Attributes:
      config: what the decoder is.
    """

    config: DecoderConfig

    def apply(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T H"]:
        """Hidden states after the final norm, before the unembedding.

        Row b, position t depends on `tokens[b, :t + 1]` alone (causal, positions from 0), so
        padding on the right changes nothing before it.

        Args:
          params: from `init`.
          tokens: ids in [0, vocab_size), right-padded with any id. Larger ids give NaN.

        Returns:
          hidden states in the configuration's `dtype`.

        Raises:
          ValueError: wrong rank or dtype of `tokens`, or rows longer than `max_length`.
        """
        self._check_rows(tokens)
        return self._merge(params)(tokens)

    def unembedding(self, params: Params) -> Float[Array, "H V"]:
        """The matrix from hidden states to logits; the embedding transposed where tied."""
        if self.config.tied_embeddings:
            return params["embedding"].T
        return params["unembedding"]

    def logits(self, params: Params, hidden: Float[Array, "*batch H"]) -> Float[Array, "*batch V"]:
        """Logits of the next token, float32: `hidden @ unembedding`, then the soft cap if any.

        Args:
          params: from `init`.
          hidden: from `apply`, `prefill` or `decode_step`.

        Returns:
          `c · tanh(logits / c)` with `logit_soft_cap` c, else the product itself.
        """
        unembedding = self.unembedding(params).astype(self.config.dtype)
        logits = jnp.matmul(
            hidden.astype(self.config.dtype), unembedding, preferred_element_type=jnp.float32
        )
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def prefill(
        self, params: Params, tokens: Int[Array, "P Tp"], lengths: Int[Array, " P"]
    ) -> tuple[Float[Array, "P H"], PrefixCache]:
        """Runs the prompts once.

        Args:
          params: from `init`.
          tokens: prompts, right-padded.
          lengths: real tokens of each prompt, in [1, Tp].

        Returns:
          the hidden state of each prompt's last real token (it predicts the first new token), and
          the prompts' keys and values.
        """
        self._check_rows(tokens)
        _checks.integer(lengths=lengths)
        if jnp.shape(lengths) != (tokens.shape[0],):
            raise ValueError(
                f"lengths: expected shape {(tokens.shape[0],)}, got {jnp.shape(lengths)}"
            )
        return self._merge(params).prefill(tokens, lengths)

    def decode_step(
        self,
        params: Params,
        tokens: Int[Array, "P G"],
        prefix: PrefixCache,
        completion: CompletionCache,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "P G H"], CompletionCache]:
        """Runs one new token of every sequence.

        Args:
          params: from `init`.
          tokens: token `step` of each completion, at position `prefix.lengths[p] + step`.
          prefix: from `prefill`.
          completion: the slots before `step` are filled.
          step: in [0, number of slots).

        Returns:
          the tokens' hidden states, and the cache with slot `step` filled.
        """
        _checks.rank("tokens", tokens, 2)
        _checks.integer(tokens=tokens)
        return self._merge(params).decode_step(tokens, prefix, completion, step)

    def logical_axes(self) -> Params:
        """A tree like the parameters with the logical names of each array's axes, as tuples."""
        _, state = _skeleton(self.config)
        tree: Params = {}
        for path, param in nnx.to_flat_state(state):
            *branches, leaf = map(str, path)
            branch = tree
            for name in branches:
                branch = branch.setdefault(name, {})
            axes = param.get_metadata("axes")
            branch[leaf] = ("layers", *axes) if path[0] == "layers" else axes
        return tree

    def _merge(self, params: Params) -> Decoder:
        return nnx.merge(_skeleton(self.config)[0], params)

    def _check_rows(self, tokens: Any) -> None:
        _checks.rank("tokens", tokens, 2)
        _checks.integer(tokens=tokens)
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"tokens: expected rows of at most max_length {self.config.max_length} tokens, "
                f"got shape {tokens.shape}"
            )


def init(config: DecoderConfig, key: PRNGKeyArray) -> tuple[FunctionalDecoder, Params]:
    """A decoder and fresh parameters.

    Args:
      config: what the decoder is.
      key: randomness of the initial values.

    Returns:
      the decoder's functions, and its parameters as a nested dict of arrays; arrays of the layers
      have the layer as leading axis.
    """
    return FunctionalDecoder(config), _init_params(config, key)


def abstract_params(config: DecoderConfig) -> Params:
    """The parameters' tree of `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return nnx.to_pure_dict(_skeleton(config)[1])


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: DecoderConfig, key: PRNGKeyArray) -> Params:
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key))))


@functools.lru_cache(maxsize=64)
def _skeleton(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's static part and the shapes of its parameters."""
    module = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=jax.random.key(0))))
    return nnx.split(module)
