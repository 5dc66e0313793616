"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Retention:
    """Orbax's question of what to keep: the last ones, and those with the best scores."""

    def __init__(self, last: int, best: int, scores: Callable[[], Mapping[int, float]]) -> None:
        self._last, self._best, self._scores = last, best, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = set(sorted(steps)[-self._last :])
        keep |= set(best_first(steps, self._scores())[: self._best])
        return [step in keep for step in steps]


def best_first(steps: Sequence[int], scores: Mapping[int, float]) -> list[int]:
    """Steps that have a score, best first; of equals the earliest, which is the one measured."""
    return sorted((s for s in steps if s in scores), key=lambda s: (-scores[s], s))
