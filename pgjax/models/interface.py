"""The pure functions through which the library uses a decoder."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.models import decoding
from pgjax.models.attention import soft_capped
from pgjax.models.cache import AnyCache, CompletionCache, PrefixCache, SlotCache, by_layer
from pgjax.models.config import DecoderConfig
from pgjax.models.decoder import Decoder
from pgjax.models.moe import Routing

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FunctionalDecoder:
    """A decoder as pure functions of its parameters, a nested dict of arrays.

    Hashable and equal by its configuration, so it can be a static argument of `jax.jit`.

    Attributes:
      config: what the decoder is.
      mesh: on which its parameters are spread. `apply` then keeps what it computes of a row on
        that row's devices, and gathers a layer's parameters when it comes to the layer; without
        a mesh the compiler, which sees parameters spread over `fsdp`, may compute every row on
        every device instead. Rows that `data` x `fsdp` does not divide are left to it.
    """

    config: DecoderConfig
    mesh: Mesh | None = None

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        experts: Int[Array, "L B T k"] | None = None,
    ) -> Float[Array, "B T H"]:
        """Hidden states after the final norm, before the unembedding.

        Row b, position t depends on `tokens[b, :t + 1]` alone (causal), so padding on the right
        changes nothing before it.

        Args:
          params: from `init`.
          tokens: ids in [0, vocab_size), right-padded with any id. Larger ids give NaN.
          positions: of each token, for rows that hold several sequences; None: 0, 1, 2, ...
          segment_ids: tokens attend to their own segment alone, whose tokens are next to each
            other; None: each row is one. With `positions` that start anew in each segment, packed
            sequences give what they give in rows of their own.
          experts: the experts to use instead of the routers' own choice, from `Routing.experts`;
            their weights are computed from the current routers (routing replay).

        Returns:
          hidden states in the configuration's `dtype`.

        Raises:
          ValueError: wrong rank, dtype or shape of an argument, rows longer than `max_length`,
            positions without segments, `experts` for a decoder without a mixture, and concrete
            ones that are out of range or not distinct.
        """
        self._check_rows(tokens, positions, segment_ids, experts)
        return self._merge(params)(tokens, positions, segment_ids, experts)[0]

    def apply_with_routing(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        experts: Int[Array, "L B T k"] | None = None,
    ) -> tuple[Float[Array, "B T H"], Routing]:
        """`apply`, and the routers' logits and the experts used, of every layer.

        Raises:
          ValueError: as `apply`, and where the decoder has no mixture of experts.
        """
        self._check_moe("apply_with_routing")
        self._check_rows(tokens, positions, segment_ids, experts)
        hidden, routing = self._merge(params)(tokens, positions, segment_ids, experts)
        assert routing is not None
        return hidden, routing

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
        hidden = hidden.astype(self.config.dtype)
        few = isinstance(params["layers"], tuple)
        table = params["embedding" if self.config.tied_embeddings else "unembedding"]
        if few:  # rows of the table in order of memory; see `for_many_steps`
            table = table if self.config.tied_embeddings else table.matrix
            logits = decoding.few_rows(hidden, table)
        else:
            unembedding = self.unembedding(params).astype(self.config.dtype)
            logits = jnp.matmul(hidden, unembedding, preferred_element_type=jnp.float32)
        return soft_capped(logits, self.config.logit_soft_cap)

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
        return self._merge(params).prefill(tokens, lengths)[:2]

    def prefill_with_routing(
        self, params: Params, tokens: Int[Array, "P Tp"], lengths: Int[Array, " P"]
    ) -> tuple[Float[Array, "P H"], PrefixCache, Routing]:
        """`prefill`, and the routers' logits and the experts used.

        Raises:
          ValueError: the decoder has no mixture of experts.
        """
        self._check_moe("prefill_with_routing")
        self._check_rows(tokens)
        hidden, cache, routing = self._merge(params).prefill(tokens, lengths)
        assert routing is not None
        return hidden, cache, routing

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
        return self._merge(params).decode_step(tokens, prefix, completion, step)[:2]

    def decode_step_with_routing(
        self,
        params: Params,
        tokens: Int[Array, "P G"],
        prefix: PrefixCache,
        completion: CompletionCache,
        step: Int[Array, ""],
    ) -> tuple[Float[Array, "P G H"], CompletionCache, Int[Array, "L P G k"]]:
        """`decode_step`, and the experts used.

        Raises:
          ValueError: the decoder has no mixture of experts.
        """
        self._check_moe("decode_step_with_routing")
        hidden, cache, experts = self._merge(params).decode_step(tokens, prefix, completion, step)
        assert experts is not None
        return hidden, cache, experts

    def extend(
        self,
        params: Params,
        tokens: Int[Array, "S K"],
        cache: SlotCache,
        lengths: Int[Array, " S"],
    ) -> tuple[Float[Array, "S K H"], SlotCache]:
        """Runs K new tokens of every slot, each slot being at a position of its own.

        Tokens are taken back by passing smaller lengths the next time, as long as K is the same
        and at most the cache's `lookahead`: what was written beyond is overwritten then.

        Args:
          params: from `init`.
          tokens: those at positions `lengths[s]`, ..., `lengths[s] + K - 1`.
          cache: from `empty_slot_cache`, its first `lengths[s]` positions filled.
          lengths: tokens each slot holds so far.

        Returns:
          the tokens' hidden states, and the cache with them in it.

        Raises:
          ValueError: wrong ranks, dtypes or shapes.
        """
        _check_slots(tokens, cache, lengths)
        return self._merge(params).extend(tokens, cache, lengths)[:2]

    def extend_with_routing(
        self,
        params: Params,
        tokens: Int[Array, "S K"],
        cache: SlotCache,
        lengths: Int[Array, " S"],
    ) -> tuple[Float[Array, "S K H"], SlotCache, Int[Array, "L S K k"]]:
        """`extend`, and the experts used.

        Raises:
          ValueError: as `extend`, and where the decoder has no mixture of experts.
        """
        self._check_moe("extend_with_routing")
        _check_slots(tokens, cache, lengths)
        hidden, cache, experts = self._merge(params).extend(tokens, cache, lengths)
        assert experts is not None
        return hidden, cache, experts

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

    def for_many_steps(self, params: Params) -> Params:
        """The parameters as a long loop of `decode_step` or `extend` should hold them.

        On CPUs a copy, laid out for products with few rows (see `decoding`), made once before the
        loop; elsewhere the parameters as they are. Only those two functions and `logits` take it.
        """
        if jax.default_backend() != "cpu":
            return params
        changed = decoding.unstacked(params, self.config.num_layers)
        if not self.config.tied_embeddings:
            changed["unembedding"] = decoding.transposed(params["unembedding"], in_axes=1)
        return changed

    def caches_for_many_steps(self, cache: AnyCache) -> AnyCache:
        """The cache as a loop over `for_many_steps`'s parameters should hold it."""
        return by_layer(cache, self.config) if jax.default_backend() == "cpu" else cache

    def _merge(self, params: Params) -> Decoder:
        layers = params["layers"]
        if isinstance(layers, dict):
            decoder = nnx.merge(_skeleton(self.config)[0], params)
            decoder.mesh = self.mesh
            return decoder
        unused = {} if self.config.tied_embeddings else {"unembedding": None}
        decoder = nnx.merge(_skeleton(self.config)[0], {**params, **unused, "layers": layers[0]})
        decoder.single_layers = nnx.data(layers) if hasattr(nnx, "data") else layers
        return decoder

    def _check_moe(self, name: str) -> None:
        if self.config.moe is None:
            raise ValueError(f"{name}: this decoder has no mixture of experts")

    def _check_rows(
        self,
        tokens: Any,
        positions: Any | None = None,
        segment_ids: Any | None = None,
        experts: Any | None = None,
    ) -> None:
        _checks.rank("tokens", tokens, 2)
        _checks.integer(tokens=tokens, positions=positions, segment_ids=segment_ids)
        _checks.same_shape(tokens=tokens, positions=positions, segment_ids=segment_ids)
        if tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"tokens: expected rows of at most max_length {self.config.max_length} tokens, "
                f"got shape {tokens.shape}"
            )
        if positions is not None and segment_ids is None:
            raise ValueError("positions: need segment_ids beside them, got None")
        if experts is None:
            return
        self._check_moe("experts")
        assert self.config.moe is not None
        _checks.integer(experts=experts)
        wanted = (self.config.num_layers, *tokens.shape, self.config.moe.experts_per_token)
        if jnp.shape(experts) != wanted:
            raise ValueError(f"experts: expected shape {wanted}, got {jnp.shape(experts)}")
        if _checks.is_concrete(experts) and getattr(experts, "is_fully_addressable", True):
            ids = np.sort(np.asarray(experts), axis=-1)
            count = self.config.moe.num_experts
            if ids.size and (ids.min() < 0 or ids.max() >= count):
                raise ValueError(
                    f"experts: expected ids in [0, {count}), got values in "
                    f"[{ids.min()}, {ids.max()}]"
                )
            if (ids[..., 1:] == ids[..., :-1]).any():
                raise ValueError("experts: expected distinct ids for each token, got repeated ones")


def _check_slots(tokens: Any, cache: SlotCache, lengths: Any) -> None:
    _checks.rank("tokens", tokens, 2)
    _checks.integer(tokens=tokens, lengths=lengths)
    slots = cache.keys[0].shape[-4]
    if tokens.shape[0] != slots or jnp.shape(lengths) != (slots,):
        raise ValueError(
            f"tokens, lengths: expected one row for each of {slots} slots, got shapes "
            f"{tokens.shape} and {jnp.shape(lengths)}"
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
