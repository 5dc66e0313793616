"""Environments as pure functions: state in, state out, whole batches under `vmap`."""

from pgjax.envs import four_rooms, textquest

__all__ = ["four_rooms", "textquest"]
