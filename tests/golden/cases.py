"""Tiny models of every family with all its features on, and weights that follow from their names.

Nothing but NumPy is needed here. `make.py` writes the golden files with transformers.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

DIRECTORY = Path(__file__).parent
LENGTHS = (24, 17)  # real tokens of the two rows, right-padded to the longer
VOCAB = 64

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}
_SLIDING, _FULL = "sliding_attention", "full_attention"

# Name of the case: (transformers' prefix of the classes, options of its configuration class).
CASES = {
    "llama": (
        "Llama",
        {
            **_SMALL,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-4,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_yarn": (
        "Llama",
        {
            **_SMALL,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 3.0,
                "beta_slow": 0.3,
                "mscale": 1.5,
                "mscale_all_dim": 0.5,
            },
        },
    ),
    "llama_linear": (
        "Llama",
        {**_SMALL, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "llama_dynamic": (
        "Llama",
        {
            **_SMALL,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            **_SMALL,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "qwen2": (
        "Qwen2",
        {**_SMALL, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": (
        "Qwen3",
        {
            **_SMALL,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": [_FULL, _SLIDING, _SLIDING, _FULL],
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {**_SMALL, "head_dim": 12, "sliding_window": 6}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_SMALL,
            **_MOE,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_SMALL,
            **_MOE,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "olmoe": ("Olmoe", {**_SMALL, **_MOE, "attention_bias": True, "intermediate_size": 24}),
    "gpt_oss": (
        "GptOss",
        {
            **_SMALL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "intermediate_size": 24,
            "sliding_window": 5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            **_SMALL,
            "head_dim": 16,
            "attention_bias": True,
            "rms_norm_eps": 1e-2,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **_SMALL,
            "head_dim": 16,
            "rms_norm_eps": 1e-2,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "final_logit_softcapping": 3.0,
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
            "rope_parameters": {
                _FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                _SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCAB,
            "n_positions": 128,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_inner": 56,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
}


def tokens() -> np.ndarray:
    """Two rows of ids, the shorter padded with zeros."""
    raw = np.random.PCG64(1).random_raw(len(LENGTHS) * max(LENGTHS)) % (VOCAB - 1) + 1
    rows = raw.reshape(len(LENGTHS), -1).astype(np.int32)
    return np.where(np.arange(rows.shape[1]) < np.array(LENGTHS)[:, None], rows, 0)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that depends on its name and shape alone; norms and biases are not trivial.

    The bits come from the generator itself, which never changes, unlike NumPy's distributions.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((raw >> 40).astype(np.float64) / 2**23 - 1).reshape(shape)  # in [-1, 1)
    if len(shape) == 1:
        offset = 1.0 if "norm" in name or ".ln_" in name else 0.0
        offset *= not name.endswith("bias")
        return (offset + 0.5 * uniform).astype(np.float32)
    scale = 0.5 if "embed" in name or "wte" in name or "wpe" in name else 2 * shape[-1] ** -0.5
    return (scale * uniform).astype(np.float32)


def weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    return {name: weight(name, tuple(shape)) for name, shape in shapes.items()}


def read(case: str) -> dict:
    """A golden file: config.json's text, the tensors' shapes by name, and the logits."""
    with np.load(DIRECTORY / f"{case}.npz") as data:
        return {
            "config": str(data["config"]),
            "shapes": json.loads(str(data["shapes"])),
            "logits": data["logits"],
        }
