"""Keys and values kept while sampling, in two parts: one per prompt, one per sequence."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgjax.models.config import DecoderConfig
from pgjax.types import pytree_dataclass


@pytree_dataclass
class PrefixCache:
    """The prompts' keys and values, shared by all sequences of a prompt.

    Attributes:
      keys, values: right-padded, in the model's compute dtype.
      lengths: real tokens of each prompt.
    """

    keys: Float[Array, "L P kv_heads Tp D"]
    values: Float[Array, "L P kv_heads Tp D"]
    lengths: Int[Array, " P"]


@pytree_dataclass
class CompletionCache:
    """The completions' keys and values; slot n is the same step of every sequence.

    The samples' axis lies behind the heads', so that samples of one prompt meet its shared prefix
    in one matrix product per prompt and head.

    Attributes:
      keys, values: slot n of sequence (p, g) holds position `lengths[p] + n`.
    """

    keys: Float[Array, "L P kv_heads G N D"]
    values: Float[Array, "L P kv_heads G N D"]


def empty_completion_cache(
    config: DecoderConfig, *, num_prompts: int, num_samples: int, num_slots: int
) -> CompletionCache:
    """Zeros with room for `num_slots` tokens of each of `num_prompts · num_samples` sequences."""
    assert config.num_kv_heads is not None and config.head_dim is not None
    shape = (
        *(config.num_layers, num_prompts, config.num_kv_heads),
        *(num_samples, num_slots, config.head_dim),
    )
    return CompletionCache(
        keys=jnp.zeros(shape, config.dtype), values=jnp.zeros(shape, config.dtype)
    )
