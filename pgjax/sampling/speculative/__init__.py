"""Speculative sampling: a small model drafts, the target checks, the result is the target's."""

from __future__ import annotations

from pgjax.sampling.speculative.acceptance import accept, acceptance
from pgjax.sampling.speculative.generation import SpeculationStats, generate

__all__ = ["SpeculationStats", "accept", "acceptance", "generate"]
