"""Networks: built as Flax NNX modules, used as pure functions of a pytree of parameters."""

from __future__ import annotations

from pgjax.models import (
    dag,
    inventory,
    layer_norm_mlp,
    lora,
    low_bit,
    mlp,
    pixels,
    quantization,
    qweb,
    single_layer,
    supply_graph,
    taco,
)
from pgjax.models.cache import (
    CompletionCache,
    PrefixCache,
    SlotCache,
    empty_completion_cache,
    empty_slot_cache,
    insert_prefix,
)
from pgjax.models.config import AttentionKind, DecoderConfig, MoEConfig
from pgjax.models.heads import (
    score_head_apply,
    score_head_init,
    score_head_logical_axes,
    value_head_apply,
    value_head_init,
    value_head_logical_axes,
)
from pgjax.models.interface import FunctionalDecoder, abstract_params, init
from pgjax.models.moe import Routing, load_balancing_loss, router_z_loss
from pgjax.models.pretrained import load as from_pretrained
from pgjax.models.pretrained import load_head, load_reward_model, save_head
from pgjax.models.pretrained import save as save_pretrained
from pgjax.models.rotary import Rotary

__all__ = [
    "AttentionKind",
    "CompletionCache",
    "DecoderConfig",
    "FunctionalDecoder",
    "MoEConfig",
    "PrefixCache",
    "Rotary",
    "Routing",
    "SlotCache",
    "abstract_params",
    "dag",
    "empty_completion_cache",
    "empty_slot_cache",
    "from_pretrained",
    "init",
    "insert_prefix",
    "inventory",
    "layer_norm_mlp",
    "load_balancing_loss",
    "load_head",
    "load_reward_model",
    "lora",
    "low_bit",
    "mlp",
    "pixels",
    "quantization",
    "qweb",
    "router_z_loss",
    "save_head",
    "save_pretrained",
    "score_head_apply",
    "score_head_init",
    "score_head_logical_axes",
    "single_layer",
    "supply_graph",
    "taco",
    "value_head_apply",
    "value_head_init",
    "value_head_logical_axes",
]
