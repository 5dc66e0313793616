"""Optional: completions sampled by a server (vLLM, SGLang) that runs beside the trainer."""

from __future__ import annotations

from pgjax.sampling.engines.client import HttpEngine
from pgjax.sampling.engines.http import generate
from pgjax.sampling.engines.protocols import (
    COMPLETIONS,
    SGLANG,
    Choice,
    EngineError,
    Protocol,
    Request,
)

__all__ = [
    "COMPLETIONS",
    "SGLANG",
    "Choice",
    "EngineError",
    "HttpEngine",
    "Protocol",
    "Request",
    "generate",
]
