"""Families with a mixture of experts in every layer: Qwen2-MoE, Qwen3-MoE, OLMoE, gpt-oss."""

from __future__ import annotations

from typing import Any

from pgjax.models.config import DecoderConfig, MoEConfig
from pgjax.models.pretrained import common, keys, rope
from pgjax.models.pretrained.dense import INV_FREQ
from pgjax.models.pretrained.family import Family
from pgjax.models.pretrained.options import Options


def _moe(config: DecoderConfig) -> MoEConfig:
    if config.moe is None:
        raise ValueError("every layer is a mixture of experts, but moe is None")
    return config.moe


def _take_moe(options: Options, size: str, **fields: Any) -> MoEConfig:
    return MoEConfig(
        num_experts=options.integer("num_experts", "num_local_experts"),
        experts_per_token=options.integer("num_experts_per_tok"),
        expert_size=options.integer(size),
        **fields,
    )


def _all_layers_mix(options: Options) -> None:
    why = "every layer has to be a mixture of experts, since all layers are stacked"
    options.only("decoder_sparse_step", 1, why=why)
    options.only("mlp_only_layers", None, [], why=why)


def _moe_options(config: DecoderConfig, experts: str = "num_experts") -> dict[str, Any]:
    moe = _moe(config)
    return {experts: moe.num_experts, "num_experts_per_tok": moe.experts_per_token}


def _qwen_options(config: DecoderConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        **common.llama_options(config),
        **_moe_options(config),
        "moe_intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.normalize_weights,
        "use_sliding_window": rope.common_window(config) is not None,
        "sliding_window": rope.common_window(config),
    }


def _read_qwen3_moe(options: Options, theta: float) -> dict[str, Any]:
    _all_layers_mix(options)
    slides = options.flag("use_sliding_window") and options.take("sliding_window") is not None
    windows = rope.window(options, [slides] * common.num_layers(options))
    return {
        **common.llama_like(options, theta, windows),
        **common.attention_bias(options),
        "qk_norm": "head",
        "moe": _take_moe(
            options, "moe_intermediate_size", normalize_weights=options.flag("norm_topk_prob")
        ),
    }


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    return {**_qwen_options(config), "attention_bias": config.qkv_bias}


QWEN3_MOE = Family(
    name="qwen3_moe",
    causal="Qwen3MoeForCausalLM",
    sequence="Qwen3MoeForSequenceClassification",
    base="Qwen3MoeModel",
    defaults=common.defaults(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=24,
        intermediate_size=6144,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        moe_intermediate_size=768,
        num_experts_per_tok=8,
        num_experts=128,
        norm_topk_prob=False,
    ),
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.HEAD_NORMS, *keys.EXPERTS),
    skipped=(INV_FREQ,),
    harmless=frozenset({"max_window_layers"}),
)


def _read_qwen2_moe(options: Options, theta: float) -> dict[str, Any]:
    _all_layers_mix(options)
    uses, layers = options.flag("use_sliding_window"), common.num_layers(options)
    highest = options.integer("max_window_layers", minimum=0) if uses else 0
    # Every other layer from the first on, below `max_window_layers`, as transformers has it.
    sliding = rope.layer_types(options, [i % 2 == 0 and i < highest for i in range(layers)])
    options.take("max_window_layers")
    if any(sliding) and not uses:
        raise ValueError("layer_types: sliding layers, but use_sliding_window is false")
    return {
        **common.llama_like(options, theta, rope.window(options, sliding)),
        "qkv_bias": options.flag("qkv_bias"),
        "moe": _take_moe(
            options,
            "moe_intermediate_size",
            normalize_weights=options.flag("norm_topk_prob"),
            shared_size=options.integer("shared_expert_intermediate_size"),
            shared_gate=True,
        ),
    }


def _write_qwen2_moe(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_qwen_options(config),
        **rope.type_options(config),
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": _moe(config).shared_size,
    }


QWEN2_MOE = Family(
    name="qwen2_moe",
    causal="Qwen2MoeForCausalLM",
    sequence="Qwen2MoeForSequenceClassification",
    base="Qwen2MoeModel",
    defaults=common.defaults(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=24,
        intermediate_size=5632,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=32768,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_experts_per_tok=4,
        num_experts=60,
        norm_topk_prob=False,
        qkv_bias=True,
    ),
    read=_read_qwen2_moe,
    write=_write_qwen2_moe,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.EXPERTS, *keys.SHARED_EXPERT),
    skipped=(INV_FREQ,),
)


def _read_olmoe(options: Options, theta: float) -> dict[str, Any]:
    options.only("clip_qkv", None, why="queries, keys and values are not clipped")
    fields = common.llama_like(options, theta)
    if fields["head_dim"] * fields["num_heads"] != fields["hidden_size"]:
        raise ValueError(
            f"head_dim {fields['head_dim']} is not supported: OLMoE's is hidden_size / "
            "num_attention_heads"
        )
    return {
        **fields,
        **common.attention_bias(options),
        "qk_norm": "projection",
        "moe": _take_moe(
            options, "intermediate_size", normalize_weights=options.flag("norm_topk_prob")
        ),
    }


def _write_olmoe(config: DecoderConfig) -> dict[str, Any]:
    moe = _moe(config)
    return {
        **common.llama_options(config),
        **_moe_options(config),
        "intermediate_size": moe.expert_size,
        "norm_topk_prob": moe.normalize_weights,
        "attention_bias": config.qkv_bias,
    }


OLMOE = Family(
    name="olmoe",
    causal="OlmoeForCausalLM",
    sequence=None,
    base="OlmoeModel",
    defaults=common.defaults(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        intermediate_size=2048,
        num_attention_heads=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        num_experts_per_tok=8,
        num_experts=64,
        norm_topk_prob=False,
    ),
    read=_read_olmoe,
    write=_write_olmoe,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.PROJECTION_NORMS, *keys.EXPERTS),
    skipped=(INV_FREQ,),
)


def _read_gpt_oss(options: Options, theta: float) -> dict[str, Any]:
    options.only("swiglu_alpha", 1.702, why="it is fixed in the activation")
    options.only("swiglu_limit", 7.0, why="it is fixed in the activation")
    options.only("hidden_act", "silu", why="the experts' activation is a clamped SwiGLU")
    given = options.values
    if given.get("rope_parameters") is None and not given.get("rope_scaling"):
        given["rope_parameters"] = _GPT_OSS_ROPE
    layers = common.num_layers(options)
    sliding = rope.layer_types(options, [i % 2 == 0 for i in range(layers)])
    return {
        **common.llama_like(options, theta, rope.window(options, sliding)),
        **common.attention_bias(options),
        "activation": "clamped_swiglu",
        "attention_sinks": True,
        "moe": _take_moe(
            options,
            "intermediate_size",
            normalize_weights=True,
            router_bias=True,
            expert_bias=True,
        ),
    }


def _write_gpt_oss(config: DecoderConfig) -> dict[str, Any]:
    words = rope.rope_options(rope.common_rotary(config))
    if words["rope_scaling"] is None:  # which would mean YaRN
        words = {"rope_parameters": {"rope_type": "default", "rope_theta": words["rope_theta"]}}
    return {
        **common.size_options(config),
        **_moe_options(config, "num_local_experts"),
        **rope.type_options(config),
        **words,
        "intermediate_size": _moe(config).expert_size,
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
    }


_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

GPT_OSS = Family(
    name="gpt_oss",
    causal="GptOssForCausalLM",
    sequence="GptOssForSequenceClassification",
    base="GptOssModel",
    theta=150_000.0,
    defaults=common.defaults(
        vocab_size=201088,
        hidden_size=2880,
        num_hidden_layers=36,
        intermediate_size=2880,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        sliding_window=128,
        num_experts_per_tok=4,
        num_local_experts=128,
        attention_bias=True,
    ),
    read=_read_gpt_oss,
    write=_write_gpt_oss,
    keys=(*keys.EMBEDDING, *keys.NORMS, *keys.ATTENTION, *keys.GPT_OSS_EXPERTS),
    skipped=(INV_FREQ,),
    # What OpenAI's own code calls num_experts_per_tok and original_max_position_embeddings.
    harmless=frozenset({"experts_per_token", "initial_context_length"}),
)
