"""Environments as pure functions: state in, state out, whole batches under `vmap`."""

from pgjax.envs import control, four_rooms, textquest
from pgjax.envs.core import (
    Box,
    Discrete,
    Environment,
    Step,
    step_or_reset,
    with_flat_observations,
    with_scaled_actions,
    with_time_limit,
)

__all__ = [
    "Box",
    "Discrete",
    "Environment",
    "Step",
    "control",
    "four_rooms",
    "step_or_reset",
    "textquest",
    "with_flat_observations",
    "with_scaled_actions",
    "with_time_limit",
]
