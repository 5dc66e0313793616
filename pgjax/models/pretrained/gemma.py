"""Gemma 2 and the text model of Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgjax.models.config import AttentionKind, DecoderConfig
from pgjax.models.pretrained import common, keys, rope
from pgjax.models.pretrained.dense import INV_FREQ
from pgjax.models.pretrained.family import Family
from pgjax.models.pretrained.options import Options

_DEFAULTS = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}


def _read(options: Options, sliding: list[bool]) -> tuple[dict[str, Any], list[int | None]]:
    """What both have in common, and each layer's window."""
    options.only("use_bidirectional_attention", None, False, why="attention is causal")
    fields = common.take_sizes(options)
    scalar = options.optional("query_pre_attn_scalar")
    if scalar is None or scalar <= 0:
        raise ValueError(f"query_pre_attn_scalar: expected a positive number, got {scalar}")
    fields |= {
        **common.attention_bias(options),
        "activation": common.activation(options, "hidden_activation"),
        "norm_scale_offset": 1.0,
        "post_norms": True,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "query_scale": scalar**-0.5,
        "logit_soft_cap": options.optional("final_logit_softcapping"),
    }
    return fields, rope.window(options, rope.layer_types(options, sliding))


def _write(config: DecoderConfig) -> dict[str, Any]:
    assert config.head_dim is not None
    scalar = (config.query_scale or config.head_dim**-0.5) ** -2
    return {
        **common.size_options(config),
        **rope.type_options(config),
        "hidden_activation": common.activation_name(config),
        "query_pre_attn_scalar": round(scalar),  # an int in transformers
        "final_logit_softcapping": config.logit_soft_cap,
        "attention_bias": config.qkv_bias,
    }


def _read_gemma2(options: Options, theta: float) -> dict[str, Any]:
    fields, windows = _read(options, [i % 2 == 0 for i in range(common.num_layers(options))])
    rotary = rope.take_rotary(options, theta=theta, max_length=fields["max_length"])
    return {
        **fields,
        **rope.kinds([AttentionKind(window=w, rotary=rotary) for w in windows]),
        "attention_soft_cap": options.optional("attn_logit_softcapping"),
    }


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_write(config),
        **rope.rope_options(rope.common_rotary(config)),
        "attn_logit_softcapping": config.attention_soft_cap,
    }


GEMMA2 = Family(
    name="gemma2",
    causal="Gemma2ForCausalLM",
    sequence="Gemma2ForSequenceClassification",
    base="Gemma2Model",
    defaults=common.defaults(
        **_DEFAULTS,
        vocab_size=256000,
        max_position_embeddings=8192,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    ),
    read=_read_gemma2,
    write=_write_gemma2,
    keys=(*keys.EMBEDDING, *keys.FOUR_NORMS, *keys.ATTENTION, *keys.MLP),
    skipped=(INV_FREQ,),
    harmless=frozenset({"hidden_act"}),  # transformers reads hidden_activation
)


def _read_gemma3(options: Options, theta: float) -> dict[str, Any]:
    options.only("attn_logit_softcapping", None, why="transformers does not apply it in Gemma 3")
    pattern = options.take("sliding_window_pattern", default=6)
    if "layer_types" in options.values:
        options.take("_sliding_window_pattern", default=None)
    layers = common.num_layers(options)
    fields, windows = _read(options, [(i + 1) % pattern != 0 for i in range(layers)])
    rotaries = _take_rotaries(options, theta, fields["max_length"])
    per_layer = [AttentionKind(window=w, rotary=rotaries[w is not None]) for w in windows]
    return {**fields, **rope.kinds(per_layer), "qk_norm": "head"}


def _take_rotaries(options: Options, theta: float, max_length: int) -> dict[bool, rope.Rotary]:
    """The rotary embeddings of the layers with a window (True) and without."""
    parameters = options.take("rope_parameters", default=None) or {}
    if set(parameters) - {rope.FULL, rope.SLIDING}:
        raise ValueError(
            f"rope_parameters: expected those of {rope.FULL} and {rope.SLIDING}, got {parameters}"
        )
    scaling = options.take("rope_scaling", default=None) or {}
    full = {**(parameters.get(rope.FULL) or {}), **scaling}
    theta = options.take("rope_theta", default=theta)
    local = options.take("rope_local_base_freq", default=10_000.0)
    return {
        False: rope.rotary(full, theta=theta, max_length=max_length),
        True: rope.rotary(parameters.get(rope.SLIDING) or {}, theta=local, max_length=max_length),
    }


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    rotaries = {kind.window is not None: kind.rotary for kind in rope.per_layer(config)}
    full, local = rotaries.get(False), rotaries.get(True)
    if local is None or local.scaling is None:
        return {
            **_write(config),
            **rope.rope_options(full),
            "rope_local_base_freq": 10_000.0 if local is None else local.theta,
        }
    named = {rope.FULL: full or rope.Rotary(), rope.SLIDING: local}
    return {
        **_write(config),
        "rope_parameters": {
            name: {
                "rope_type": "default",
                **(rope.scaling_options(value) or {}),
                "rope_theta": value.theta,
            }
            for name, value in named.items()
        },
    }


GEMMA3 = Family(
    name="gemma3_text",
    causal="Gemma3ForCausalLM",
    sequence="Gemma3TextForSequenceClassification",
    base="Gemma3TextModel",
    theta=1_000_000.0,
    defaults=common.defaults(
        **_DEFAULTS,
        vocab_size=262208,
        max_position_embeddings=131072,
        final_logit_softcapping=None,
    ),
    read=_read_gemma3,
    write=_write_gemma3,
    keys=(*keys.EMBEDDING, *keys.FOUR_NORMS, *keys.ATTENTION, *keys.HEAD_NORMS, *keys.MLP),
    skipped=(INV_FREQ, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    # The text model inside the one that also sees, in the layouts of transformers 4 and 5.
    renamed={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    harmless=frozenset({"hidden_act"}),
)

CONDITIONAL, CONDITIONAL_CLASS = "gemma3", "Gemma3ForConditionalGeneration"


def text_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's options among those of the Gemma 3 that also sees."""
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config: expected an object, got {text!r}")
    if text.get("final_logit_softcapping") is not None:
        raise ValueError(
            "text_config: final_logit_softcapping is not supported: transformers does not apply it "
            f"in {CONDITIONAL_CLASS}"
        )
    outer = {
        name: values[name]
        for name in ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
        if name in values
    }
    names = {"model_type": GEMMA3.name, "architectures": [GEMMA3.causal]}
    return {**outer, **text, **names}
