"""Llama and its dense relatives: SmolLM3, Qwen2, Qwen3, Mistral."""

from __future__ import annotations

from typing import Any

from pgjax.models.config import AttentionKind, DecoderConfig
from pgjax.models.pretrained import common, keys, rope
from pgjax.models.pretrained.family import Family
from pgjax.models.pretrained.options import Options

INV_FREQ = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
_SIZES = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}


def _read_llama(options: Options, theta: float) -> dict[str, Any]:
    return {
        **common.llama_like(options, theta),
        **common.attention_bias(options),
        "mlp_bias": options.flag("mlp_bias"),
    }


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        **common.llama_options(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


LLAMA = Family(
    name="llama",
    causal="LlamaForCausalLM",
    sequence="LlamaForSequenceClassification",
    base="LlamaModel",
    defaults=common.defaults(
        **_SIZES,
        intermediate_size=11008,
        num_attention_heads=32,
        max_position_embeddings=2048,
    ),
    read=_read_llama,
    write=_write_llama,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.MLP),
    skipped=(INV_FREQ,),
)


def _read_mistral(options: Options, theta: float) -> dict[str, Any]:
    slides = options.take("sliding_window") is not None
    windows = rope.window(options, [slides] * common.num_layers(options))
    return common.llama_like(options, theta, windows)


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {**common.llama_options(config), "sliding_window": rope.common_window(config)}


MISTRAL = Family(
    name="mistral",
    causal="MistralForCausalLM",
    sequence="MistralForSequenceClassification",
    base="MistralModel",
    defaults=common.defaults(
        **_SIZES,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ),
    read=_read_mistral,
    write=_write_mistral,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.MLP),
    skipped=(INV_FREQ,),
)


def _upper_layers_slide(options: Options) -> list[int | None]:
    """Qwen: with `use_sliding_window` the layers from `max_window_layers` on."""
    uses, layers = options.flag("use_sliding_window"), common.num_layers(options)
    lowest = layers
    if uses and options.take("sliding_window") is not None:
        lowest = options.integer("max_window_layers", minimum=0)
    options.take("max_window_layers")
    sliding = rope.layer_types(options, [i >= lowest for i in range(layers)])
    if any(sliding) and not uses:
        raise ValueError("layer_types: sliding layers, but use_sliding_window is false")
    return rope.window(options, sliding)


def _sliding_options(config: DecoderConfig) -> dict[str, Any]:
    return {
        **rope.type_options(config),
        "use_sliding_window": rope.common_window(config) is not None,
        "max_window_layers": config.num_layers,
    }


def _read_qwen2(options: Options, theta: float) -> dict[str, Any]:
    return {**common.llama_like(options, theta, _upper_layers_slide(options)), "qkv_bias": True}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {**common.llama_options(config), **_sliding_options(config)}


_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768}

QWEN2 = Family(
    name="qwen2",
    causal="Qwen2ForCausalLM",
    sequence="Qwen2ForSequenceClassification",
    base="Qwen2Model",
    defaults=common.defaults(
        **_QWEN,
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=22016,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    read=_read_qwen2,
    write=_write_qwen2,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.MLP),
    skipped=(INV_FREQ,),
)


def _read_qwen3(options: Options, theta: float) -> dict[str, Any]:
    return {
        **common.llama_like(options, theta, _upper_layers_slide(options)),
        **common.attention_bias(options),
        "qk_norm": "head",
    }


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_write_qwen2(config), "attention_bias": config.qkv_bias}


QWEN3 = Family(
    name="qwen3",
    causal="Qwen3ForCausalLM",
    sequence="Qwen3ForSequenceClassification",
    base="Qwen3Model",
    defaults=common.defaults(
        **_QWEN,
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=22016,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    ),
    read=_read_qwen3,
    write=_write_qwen3,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.HEAD_NORMS, *keys.MLP),
    skipped=(INV_FREQ,),
)


def _read_smollm3(options: Options, theta: float) -> dict[str, Any]:
    fields = _read_llama(options, theta)
    layers, rotary = fields["num_layers"], fields["attention_kinds"][0].rotary
    interval = options.integer("no_rope_layer_interval")
    rotated = options.take("no_rope_layers", default=None)
    if rotated is None:
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise ValueError(f"no_rope_layers: expected one for each of {layers} layers, got {rotated}")
    # Where the file lists no layer_types, the layers without rotation are those that slide.
    slides = options.flag("use_sliding_window") and options.take("sliding_window") is not None
    sliding = rope.layer_types(options, [slides and not r for r in rotated[:layers]])
    windows = rope.window(options, sliding)
    per_layer = [
        AttentionKind(window=window, rotary=rotary if rotates else None)
        for window, rotates in zip(windows, rotated, strict=False)
    ]
    return {**fields, **rope.kinds(per_layer)}


def _write_smollm3(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_write_llama(config),
        **rope.type_options(config),
        "use_sliding_window": rope.common_window(config) is not None,
        "no_rope_layers": [int(kind.rotary is not None) for kind in rope.per_layer(config)],
    }


SMOLLM3 = Family(
    name="smollm3",
    causal="SmolLM3ForCausalLM",
    sequence="SmolLM3ForSequenceClassification",
    base="SmolLM3Model",
    theta=2_000_000.0,
    defaults=common.defaults(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=36,
        intermediate_size=11008,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        sliding_window=None,
        no_rope_layer_interval=4,
    ),
    read=_read_smollm3,
    write=_write_smollm3,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.MLP),
    skipped=(INV_FREQ,),
    harmless=frozenset({"max_window_layers"}),
)
