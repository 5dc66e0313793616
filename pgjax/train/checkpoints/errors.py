"""What can be wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be read."""


class CheckpointWarning(UserWarning):
    """A checkpoint was ignored; the message says which and why."""


class Damaged(Exception):
    """Why one checkpoint cannot be used."""
