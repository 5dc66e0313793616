"""Checkpoints in Hugging Face's format, in and out."""

from __future__ import annotations

from pgjax.models.pretrained.heads import load_head, save_head
from pgjax.models.pretrained.loading import load, load_reward_model
from pgjax.models.pretrained.saving import save

__all__ = ["load", "load_head", "load_reward_model", "save", "save_head"]
