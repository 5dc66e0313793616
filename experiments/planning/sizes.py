"""Models and accelerators that are known by name."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax

from pgjax import models
from pgjax.models import DecoderConfig, MoEConfig
from pgjax.models.pretrained.checkpoint import read_config


class Accelerator(NamedTuple):
    """From the makers' data sheets: GB (1e9 bytes) of memory, dense bfloat16 FLOP/s of one."""

    memory: float
    flops: float


ACCELERATORS = {
    "a100-40": Accelerator(40e9, 312e12),
    "a100-80": Accelerator(80e9, 312e12),
    "h100": Accelerator(80e9, 989e12),
    "h200": Accelerator(141e9, 989e12),
    "b200": Accelerator(180e9, 2250e12),
    "tpu-v4": Accelerator(32e9, 275e12),
    "tpu-v5e": Accelerator(16e9, 197e12),
    "tpu-v5p": Accelerator(95e9, 459e12),
    "tpu-v6e": Accelerator(32e9, 918e12),
}

_QWEN3: dict[str, Any] = {"vocab_size": 151_936, "head_dim": 128, "qk_norm": "head"}
# Sizes as in the released configurations.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "vocab_size": 151_936, "hidden_size": 896, "num_layers": 24, "num_heads": 14,
        "num_kv_heads": 2, "mlp_size": 4864, "qkv_bias": True, "tied_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936, "hidden_size": 1536, "num_layers": 28, "num_heads": 12,
        "num_kv_heads": 2, "mlp_size": 8960, "qkv_bias": True, "tied_embeddings": True,
    },
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "num_layers": 28, "num_heads": 16, "num_kv_heads": 8,
        "mlp_size": 3072, "tied_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "num_layers": 36, "num_heads": 32, "num_kv_heads": 8,
        "mlp_size": 12_288, "tied_embeddings": False,
    },
    "llama-3.1-8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "num_layers": 32, "num_heads": 32,
        "num_kv_heads": 8, "mlp_size": 14_336, "tied_embeddings": False,
    },
    "qwen3-30b-a3b": {
        **_QWEN3, "hidden_size": 2048, "num_layers": 48, "num_heads": 32, "num_kv_heads": 4,
        "mlp_size": 6144,
        "tied_embeddings": False,
        "moe": MoEConfig(
            num_experts=128, experts_per_token=8, expert_size=768, normalize_weights=True
        ),
    },
}  # fmt: skip


def decoder_config(model: str, **changes: Any) -> DecoderConfig:
    """The configuration of a known name, or of a directory's `config.json`.

    Raises:
      ValueError: neither.
    """
    if model in MODELS:
        return DecoderConfig(**{**MODELS[model], **changes})
    if pathlib.Path(model).is_dir():
        return dataclasses.replace(read_config(model)[-1], **changes)
    raise ValueError(f"model: expected a directory or one of {', '.join(MODELS)}, got {model!r}")


def count(config: DecoderConfig) -> tuple[int, int]:
    """Parameters, and those that a token meets in matrix products."""
    shapes = models.abstract_params(config)
    total = sum(x.size for x in jax.tree.leaves(shapes))
    active = total - (0 if config.tied_embeddings else shapes["embedding"].size)
    if config.moe is not None:
        experts = sum(
            x.size
            for x in jax.tree.leaves(shapes["layers"]["moe"])
            if config.moe.num_experts in x.shape[1:2] and len(x.shape) > 3
        )
        active -= round(experts * (1 - config.moe.experts_per_token / config.moe.num_experts))
    return total, active
