"""The maps of keys, as data."""

from __future__ import annotations

from pgjax.models.pretrained.family import Key

_QUERY = "(heads head_dim) hidden -> hidden heads head_dim"
_KEY = "(kv_heads head_dim) hidden -> hidden kv_heads head_dim"
_OUTPUT = "hidden (heads head_dim) -> heads head_dim hidden"
_VECTOR = "hidden -> hidden"
_IN = "inner hidden -> hidden inner"
_OUT = "hidden inner -> inner hidden"
_MATRIX = "vocab hidden -> vocab hidden"

_LAYER = "model.layers.{layer}."

EMBEDDING = (
    Key("embedding", "model.embed_tokens.weight", _MATRIX),
    Key("unembedding", "lm_head.weight", "vocab hidden -> hidden vocab"),
    Key("norm", "model.norm.weight", _VECTOR),
)

NORMS = (
    Key("layers/attention_norm", _LAYER + "input_layernorm.weight", _VECTOR),
    Key("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight", _VECTOR),
)

# Gemma 2 and 3: norms before and after each half of the layer.
FOUR_NORMS = (
    Key("layers/attention_norm", _LAYER + "input_layernorm.weight", _VECTOR),
    Key("layers/attention_post_norm", _LAYER + "post_attention_layernorm.weight", _VECTOR),
    Key("layers/mlp_norm", _LAYER + "pre_feedforward_layernorm.weight", _VECTOR),
    Key("layers/mlp_post_norm", _LAYER + "post_feedforward_layernorm.weight", _VECTOR),
)

_ATTENTION = _LAYER + "self_attn."
ATTENTION = (
    Key("layers/attention/query", _ATTENTION + "q_proj.weight", _QUERY),
    Key("layers/attention/key", _ATTENTION + "k_proj.weight", _KEY),
    Key("layers/attention/value", _ATTENTION + "v_proj.weight", _KEY),
    Key("layers/attention/output", _ATTENTION + "o_proj.weight", _OUTPUT),
    Key(
        "layers/attention/query_bias",
        _ATTENTION + "q_proj.bias",
        "(heads head_dim) -> heads head_dim",
    ),
    Key(
        "layers/attention/key_bias",
        _ATTENTION + "k_proj.bias",
        "(kv_heads head_dim) -> kv_heads head_dim",
    ),
    Key(
        "layers/attention/value_bias",
        _ATTENTION + "v_proj.bias",
        "(kv_heads head_dim) -> kv_heads head_dim",
    ),
    Key("layers/attention/output_bias", _ATTENTION + "o_proj.bias", _VECTOR),
    Key("layers/attention/sinks", _ATTENTION + "sinks", "heads -> heads"),
)

HEAD_NORMS = (
    Key("layers/attention/query_norm", _ATTENTION + "q_norm.weight", "head_dim -> head_dim"),
    Key("layers/attention/key_norm", _ATTENTION + "k_norm.weight", "head_dim -> head_dim"),
)

PROJECTION_NORMS = (
    Key("layers/attention/query_norm", _ATTENTION + "q_norm.weight", "all_heads -> all_heads"),
    Key("layers/attention/key_norm", _ATTENTION + "k_norm.weight", "all_kv_heads -> all_kv_heads"),
)

_MLP = _LAYER + "mlp."
MLP = (
    Key("layers/mlp/gate", _MLP + "gate_proj.weight", _IN),
    Key("layers/mlp/up", _MLP + "up_proj.weight", _IN),
    Key("layers/mlp/down", _MLP + "down_proj.weight", _OUT),
    Key("layers/mlp/gate_bias", _MLP + "gate_proj.bias", "inner -> inner"),
    Key("layers/mlp/up_bias", _MLP + "up_proj.bias", "inner -> inner"),
    Key("layers/mlp/down_bias", _MLP + "down_proj.bias", _VECTOR),
)

_EXPERT = _MLP + "experts.{expert}."
_ROUTER = "expert hidden -> hidden expert"
EXPERTS = (
    Key("layers/moe/router", _MLP + "gate.weight", _ROUTER),
    Key("layers/moe/gate", _EXPERT + "gate_proj.weight", _IN),
    Key("layers/moe/up", _EXPERT + "up_proj.weight", _IN),
    Key("layers/moe/down", _EXPERT + "down_proj.weight", _OUT),
    # As transformers 5 holds them: all experts in one tensor, gate above up.
    Key(
        "layers/moe/gate",
        _MLP + "experts.gate_up_proj",
        "expert (0:2 inner) hidden -> expert hidden inner",
    ),
    Key(
        "layers/moe/up",
        _MLP + "experts.gate_up_proj",
        "expert (1:2 inner) hidden -> expert hidden inner",
    ),
    Key(
        "layers/moe/down",
        _MLP + "experts.down_proj",
        "expert hidden inner -> expert inner hidden",
    ),
)

SHARED_EXPERT = (
    Key(
        "layers/moe/shared_gate_proj",
        _MLP + "shared_expert.gate_proj.weight",
        "shared hidden -> hidden shared",
    ),
    Key(
        "layers/moe/shared_up",
        _MLP + "shared_expert.up_proj.weight",
        "shared hidden -> hidden shared",
    ),
    Key(
        "layers/moe/shared_down",
        _MLP + "shared_expert.down_proj.weight",
        "hidden shared -> shared hidden",
    ),
    Key("layers/moe/shared_router", _MLP + "shared_expert_gate.weight", "0:1 hidden -> hidden"),
)

# gpt-oss: matrices that multiply from the right, gate and up in turn.
GPT_OSS_EXPERTS = (
    Key("layers/moe/router", _MLP + "router.weight", _ROUTER),
    Key("layers/moe/router_bias", _MLP + "router.bias", "expert -> expert"),
    Key(
        "layers/moe/gate",
        _MLP + "experts.gate_up_proj",
        "expert hidden (inner 0:2) -> expert hidden inner",
    ),
    Key(
        "layers/moe/up",
        _MLP + "experts.gate_up_proj",
        "expert hidden (inner 1:2) -> expert hidden inner",
    ),
    Key(
        "layers/moe/gate_bias",
        _MLP + "experts.gate_up_proj_bias",
        "expert (inner 0:2) -> expert inner",
    ),
    Key(
        "layers/moe/up_bias",
        _MLP + "experts.gate_up_proj_bias",
        "expert (inner 1:2) -> expert inner",
    ),
    Key(
        "layers/moe/down",
        _MLP + "experts.down_proj",
        "expert inner hidden -> expert inner hidden",
    ),
    Key("layers/moe/down_bias", _MLP + "experts.down_proj_bias", "expert hidden -> expert hidden"),
)

_BLOCK = "transformer.h.{layer}."
GPT2 = (
    Key("embedding", "transformer.wte.weight", _MATRIX),
    Key("position_embedding", "transformer.wpe.weight", "position hidden -> position hidden"),
    Key("unembedding", "lm_head.weight", "vocab hidden -> hidden vocab"),
    Key("norm", "transformer.ln_f.weight", _VECTOR),
    Key("norm_bias", "transformer.ln_f.bias", _VECTOR),
    Key("layers/attention_norm", _BLOCK + "ln_1.weight", _VECTOR),
    Key("layers/attention_norm_bias", _BLOCK + "ln_1.bias", _VECTOR),
    Key("layers/mlp_norm", _BLOCK + "ln_2.weight", _VECTOR),
    Key("layers/mlp_norm_bias", _BLOCK + "ln_2.bias", _VECTOR),
    *(
        Key(
            f"layers/attention/{name}",
            _BLOCK + "attn.c_attn.weight",
            f"hidden ({part}:3 heads head_dim) -> hidden heads head_dim",
        )
        for part, name in enumerate(("query", "key", "value"))
    ),
    *(
        Key(
            f"layers/attention/{name}_bias",
            _BLOCK + "attn.c_attn.bias",
            f"({part}:3 heads head_dim) -> heads head_dim",
        )
        for part, name in enumerate(("query", "key", "value"))
    ),
    Key(
        "layers/attention/output",
        _BLOCK + "attn.c_proj.weight",
        "(heads head_dim) hidden -> heads head_dim hidden",
    ),
    Key("layers/attention/output_bias", _BLOCK + "attn.c_proj.bias", _VECTOR),
    Key("layers/mlp/up", _BLOCK + "mlp.c_fc.weight", "hidden inner -> hidden inner"),
    Key("layers/mlp/up_bias", _BLOCK + "mlp.c_fc.bias", "inner -> inner"),
    Key("layers/mlp/down", _BLOCK + "mlp.c_proj.weight", "inner hidden -> inner hidden"),
    Key("layers/mlp/down_bias", _BLOCK + "mlp.c_proj.bias", _VECTOR),
)
