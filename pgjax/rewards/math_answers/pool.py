"""Comparing pairs of answers by math-verify in processes of their own."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from pgjax.rewards.isolated.workers import WorkerPool

_PROGRAM = pathlib.Path(__file__).with_name("worker.py")


class Outcome(NamedTuple):
    """Of one comparison: whether the two are the same, or why that is not known."""

    same: bool
    error: str | None = None


class Pool(WorkerPool):
    """Compares pairs of answers; no process runs before the first pair.

    Args:
      workers: most processes.
      memory_limit: bytes of address space of each.
    """

    def __init__(self, *, workers: int, memory_limit: int) -> None:
        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-P", str(_PROGRAM), str(memory_limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, which then ends its workers
            )

        super().__init__(start, workers=workers, name="math-verify")

    def run(self, pairs: Sequence[tuple[str, str]], *, timeout: float) -> list[Outcome]:
        """Compares every pair, each within `timeout` seconds. May be called from any thread.

        Raises:
          ImportError: math-verify is not installed.
          RuntimeError: a worker does not start.
        """
        if not pairs:
            return []
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("comparing these answers needs math-verify: pip install 'pgjax[hf]'")
        requests = [{"prediction": a, "reference": b} for a, b in pairs]
        answers = self.ask(requests, timeout=timeout)
        return [Outcome(a.get("same", False), a.get("error")) for a in answers]
