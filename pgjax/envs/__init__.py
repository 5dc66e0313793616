"""Environments as pure functions: state in, state out, whole batches under `vmap`."""

from pgjax.envs import textquest

__all__ = ["textquest"]
