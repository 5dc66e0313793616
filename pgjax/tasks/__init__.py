"""Prompt tasks: what is asked, what the right answer is, and how often it was given.

A task is two things: items in random access (`PromptSource`), and a verifier of a completion
(`Verifier`). Tasks that can be judged inside a compiled step offer the same judgement on token
rows; `random_calculation.parse_answer` is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pgjax.tasks import metrics, random_calculation
from pgjax.tasks.loaders import PromptSource, prompt_arrays, prompts_loader, sft_loader
from pgjax.tasks.metrics import accuracy_interval, majority_at_k, pass_at_k


class Verifier(Protocol):
    """Judges one completion of one item; may raise, see `pgjax.rewards.call_verifier`."""

    def __call__(self, completion: Any, example: Mapping[str, Any], /) -> float: ...


__all__ = [
    "PromptSource",
    "Verifier",
    "accuracy_interval",
    "majority_at_k",
    "metrics",
    "pass_at_k",
    "prompt_arrays",
    "prompts_loader",
    "random_calculation",
    "sft_loader",
]
