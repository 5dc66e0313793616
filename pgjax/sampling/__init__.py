"""Where rollouts come from: completions of prompts by a language model."""

from __future__ import annotations

from pgjax.sampling.filters import (
    filter_logits,
    min_p_threshold,
    top_k_threshold,
    top_p_threshold,
)
from pgjax.sampling.prompts import pad_prompts
from pgjax.sampling.text import Samples, generate

__all__ = [
    "Samples",
    "filter_logits",
    "generate",
    "min_p_threshold",
    "pad_prompts",
    "top_k_threshold",
    "top_p_threshold",
]
