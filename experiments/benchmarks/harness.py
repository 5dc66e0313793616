"""What every benchmark shares: fair timing of two callables in turn, and rows of one table."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: `ratio` is our figure divided by the peer's (below 1 is better for us)."""

    name: str
    peer: str
    ours: str
    theirs: str
    ratio: float
    max_abs_error: float | None = None
    limit: float | None = None

    @property
    def within_limit(self) -> bool:
        return self.limit is None or self.ratio <= self.limit


def paired_seconds(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, runs: int = 15
) -> tuple[float, float, float]:
    """Median seconds of each callable, run in turn A B A B ..., and the median of paired ratios."""

    def once(f: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(f())
        return time.perf_counter() - start

    once(ours), once(theirs), once(ours), once(theirs)  # compile, then warm the caches
    pairs = np.array([(once(ours), once(theirs)) for _ in range(runs)])
    a, b = np.median(pairs, axis=0)
    return float(a), float(b), float(np.median(pairs[:, 0] / pairs[:, 1]))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
