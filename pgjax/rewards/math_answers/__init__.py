r"""Verifying mathematical answers: extraction, exact and symbolic comparison, rewards.

A completion earns its reward through one final answer (`extract_final`), compared with the
reference exactly where both are numbers, by text, and only then symbolically by math-verify, in
processes that cannot hang or crash a run. Model output is never evaluated.
"""

from pgjax.rewards.math_answers.extraction import boxed, extract_final
from pgjax.rewards.math_answers.verifier import (
    THINK_THEN_ANSWER,
    MathVerifier,
    answer_ids,
    batch_reward,
    format_reward,
    grade,
)

__all__ = [
    "THINK_THEN_ANSWER",
    "MathVerifier",
    "answer_ids",
    "batch_reward",
    "boxed",
    "extract_final",
    "format_reward",
    "grade",
]
