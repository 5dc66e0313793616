"""What to train on next, and how much of each signal to use by when."""

from __future__ import annotations

from pgjax.curriculum.mixing import accuracy_mix, cosine_restarts

__all__ = ["accuracy_mix", "cosine_restarts"]
