"""GPT-2: LayerNorm, learned positions, biases everywhere, fused and transposed projections."""

from __future__ import annotations

from typing import Any

from pgjax.models.config import AttentionKind, DecoderConfig
from pgjax.models.pretrained import common, keys
from pgjax.models.pretrained.family import Family
from pgjax.models.pretrained.options import Options


def _read(options: Options, theta: float) -> dict[str, Any]:
    del theta  # nothing is rotated
    why = "the decoder has no such part"
    options.only("scale_attn_by_inverse_layer_idx", False, why=why)
    options.only("add_cross_attention", False, why=why)
    hidden = options.integer("n_embd", "hidden_size")
    heads = options.integer("n_head", "num_attention_heads")
    if hidden % heads:
        raise ValueError(f"n_embd {hidden} is not a multiple of n_head {heads}")
    scales = options.flag("scale_attn_weights")
    return {
        "vocab_size": options.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": options.integer("n_layer", "num_hidden_layers"),
        "num_heads": heads,
        "mlp_size": options.take("n_inner") or 4 * hidden,
        "max_length": options.integer("n_positions", "max_position_embeddings"),
        "activation": common.activation(options, "activation_function"),
        "gated": False,
        "norm": "layer",
        "norm_epsilon": options.take("layer_norm_epsilon"),
        "tied_embeddings": options.flag("tie_word_embeddings"),
        "learned_positions": True,
        "attention_kinds": (AttentionKind(rotary=None),),
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "query_scale": None if scales else 1.0,
    }


def _write(config: DecoderConfig) -> dict[str, Any]:
    name = common.activation_name(config)
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_size,
        "n_positions": config.max_length,
        "activation_function": "gelu_new" if name == "gelu_pytorch_tanh" else name,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "scale_attn_weights": config.query_scale != 1.0,
    }


GPT2 = Family(
    name="gpt2",
    causal="GPT2LMHeadModel",
    sequence="GPT2ForSequenceClassification",
    base="GPT2Model",
    prefix="transformer.",
    anchor="wte.weight",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    read=_read,
    write=_write,
    keys=keys.GPT2,
    # The causal mask, kept as a buffer by older versions.
    skipped=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    # reorder_and_upcast_attn: the softmax is in float32 anyway. summary_*: of heads not loaded.
    harmless=frozenset(
        {
            *("n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj"),
            *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        }
    ),
)
