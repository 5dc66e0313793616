"""Checkpoints of a run: asynchronous, atomic, verified; the last ones and the best.

A directory holds one sub-directory per saved step, written by Orbax: `<step>/state` (arrays,
readable with Orbax alone) and `<step>/info` (JSON). A list of its files with their sizes and
checksums is part of each, so that damage is recognised before anything is read into a run.
"""

from __future__ import annotations

from pgjax.train.checkpoints.errors import CheckpointError, CheckpointWarning
from pgjax.train.checkpoints.handle import Checkpoints
from pgjax.train.checkpoints.opening import open, open_readonly

__all__ = ["CheckpointError", "CheckpointWarning", "Checkpoints", "open", "open_readonly"]
