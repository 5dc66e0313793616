"""Contrastive learning: scores of pairs, and losses by which true pairs win."""

from __future__ import annotations

from pgjax.contrastive.contrastive_ucb import (
    LowRankModel,
    low_rank_log_scores,
    recover_model,
    transitions_from_scores,
)
from pgjax.contrastive.nce import bilinear_logits, binary_nce, info_nce, matched
from pgjax.contrastive.taco import TacoLosses, TacoOutputs, taco_losses

__all__ = [
    "LowRankModel",
    "TacoLosses",
    "TacoOutputs",
    "bilinear_logits",
    "binary_nce",
    "info_nce",
    "low_rank_log_scores",
    "matched",
    "recover_model",
    "taco_losses",
    "transitions_from_scores",
]
