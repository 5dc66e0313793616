"""Networks: built as Flax NNX modules, used as pure functions of a pytree of parameters."""

from __future__ import annotations

from pgjax.models.cache import CompletionCache, PrefixCache, empty_completion_cache
from pgjax.models.config import DecoderConfig
from pgjax.models.decoder import FunctionalDecoder, abstract_params, init
from pgjax.models.heads import value_head_apply, value_head_init, value_head_logical_axes

__all__ = [
    "CompletionCache",
    "DecoderConfig",
    "FunctionalDecoder",
    "PrefixCache",
    "abstract_params",
    "empty_completion_cache",
    "init",
    "value_head_apply",
    "value_head_init",
    "value_head_logical_axes",
]
