"""Environments as pure functions: state in, state out, whole batches under `vmap`."""

from pgjax.envs import control, four_rooms, inventory, puzzles, sde, supply_network, textquest
from pgjax.envs.adapters import from_brax, from_gymnax, from_jumanji, from_navix
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
    "from_brax",
    "from_gymnax",
    "from_jumanji",
    "from_navix",
    "inventory",
    "puzzles",
    "sde",
    "step_or_reset",
    "supply_network",
    "textquest",
    "with_flat_observations",
    "with_scaled_actions",
    "with_time_limit",
]
