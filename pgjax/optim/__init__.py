"""Optax transformations and schedules; nothing here knows of reinforcement learning."""

from pgjax.optim.snr import (
    GradientMoments,
    SnrState,
    gradient_moments,
    gradient_moments_from_norms,
    scale_by_gradient_snr,
    snr_factor,
)

__all__ = [
    "GradientMoments",
    "SnrState",
    "gradient_moments",
    "gradient_moments_from_norms",
    "scale_by_gradient_snr",
    "snr_factor",
]
