"""What the families' mappings have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pgjax.models.config import DecoderConfig
from pgjax.models.pretrained import rope
from pgjax.models.pretrained.options import Options

# transformers' names; the first of each kind is the one written.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}


def activation(options: Options, *names: str) -> str:
    """The activation, in our words."""
    value = options.take(*names)
    if value not in _ACTIVATIONS:
        raise ValueError(f"{names[0]} {value!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    return _ACTIVATIONS[value]


def activation_name(config: DecoderConfig) -> str:
    """The activation, in transformers' words."""
    names = [name for name, ours in _ACTIVATIONS.items() if ours == config.activation]
    if not names:
        raise ValueError(f"activation {config.activation!r} is not one of this family")
    return names[0]


def take_sizes(options: Options) -> dict[str, Any]:
    """The fields that say how large a decoder of Llama's words is."""
    heads = options.integer("num_attention_heads")
    hidden = options.integer("hidden_size")
    head_dim = options.take("head_dim", default=None)
    kv_heads = options.take("num_key_value_heads")
    if head_dim is None and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return {
        "vocab_size": options.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": options.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": hidden // heads if head_dim is None else head_dim,
        "mlp_size": options.integer("intermediate_size"),
        "max_length": options.integer("max_position_embeddings"),
        "norm_epsilon": options.take("rms_norm_eps"),
        "tied_embeddings": options.flag("tie_word_embeddings"),
    }


def size_options(config: DecoderConfig) -> dict[str, Any]:
    """The options that `take_sizes` reads, and the rotary ones of all layers."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "max_position_embeddings": max_positions(config),
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
    }


def max_positions(config: DecoderConfig) -> int:
    """`max_position_embeddings`, which dynamic scaling takes for the trained length."""
    rotary = rope.common_rotary(config)
    if rotary is not None and rotary.scaling == "dynamic":
        assert rotary.original_max_length is not None
        return rotary.original_max_length
    return config.max_length


def llama_like(
    options: Options, theta: float, windows: list[int | None] | None = None
) -> dict[str, Any]:
    """Sizes, activation and one rotary embedding with each layer's window."""
    fields = take_sizes(options)
    rotary = rope.take_rotary(options, theta=theta, max_length=fields["max_length"])
    windows = windows or [None] * fields["num_layers"]
    per_layer = [rope.AttentionKind(window=window, rotary=rotary) for window in windows]
    return {**fields, **rope.kinds(per_layer), "activation": activation(options, "hidden_act")}


def llama_options(config: DecoderConfig) -> dict[str, Any]:
    """The options that `llama_like` reads."""
    return {
        **size_options(config),
        **rope.rope_options(rope.common_rotary(config)),
        "hidden_act": activation_name(config),
    }


def attention_bias(options: Options) -> dict[str, Any]:
    """One option for the biases of all four projections."""
    return dict.fromkeys(("qkv_bias", "output_bias"), options.flag("attention_bias"))


def num_layers(options: Options) -> int:
    return options.integer("num_hidden_layers")


def defaults(**values: Any) -> Mapping[str, Any]:
    """Options as transformers' configuration class has them where a file does not say."""
    return {
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        **values,
    }
