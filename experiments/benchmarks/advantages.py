"""Group advantages against a loop over groups on the host, the way trainers often write them.

`python -m experiments.benchmarks.advantages` prints the table.
"""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Callable

import jax
import numpy as np

from experiments.benchmarks.harness import Row, main, milliseconds, paired
from pgjax import advantages

SIZE, GROUP = 4096, 16
EPSILON = 1e-6


def _groups(rewards: np.ndarray, group_ids: np.ndarray) -> dict[int, list[float]]:
    groups: dict[int, list[float]] = collections.defaultdict(list)
    for reward, group in zip(rewards.tolist(), group_ids.tolist(), strict=True):
        groups[group].append(reward)
    return groups


def normalize_by_loop(rewards: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """`(R - mean) / (std + ε)`, one group at a time, in float64."""
    statistics = {
        group: (np.mean(members), np.std(members, ddof=1) if len(members) > 1 else 1.0)
        for group, members in _groups(rewards, group_ids).items()
    }
    out = np.empty(len(rewards))
    for row, group in enumerate(group_ids.tolist()):
        mean, std = statistics[group]
        out[row] = (rewards[row] - mean) / (std + EPSILON)
    return out


def leave_one_out_by_loop(rewards: np.ndarray, group_ids: np.ndarray) -> np.ndarray:
    """`R - (Σ R - R) / (n - 1)`, one group at a time, in float64."""
    statistics = {
        group: (np.sum(members), len(members))
        for group, members in _groups(rewards, group_ids).items()
    }
    out = np.empty(len(rewards))
    for row, group in enumerate(group_ids.tolist()):
        total, n = statistics[group]
        own = float(rewards[row])
        out[row] = own - (total - own) / max(n - 1, 1)
    return out


def rows(*, size: int = SIZE, group: int = GROUP, runs: int = 15) -> list[Row]:
    """Time and largest difference of `group_normalize` and `leave_one_out`.

    `size` rewards in shuffled groups of `group`. Both sides start from host arrays and end with
    one; ours is jitted.
    """
    rng = np.random.default_rng(0)
    count = size // group
    group_ids = rng.permutation(np.repeat(np.arange(count, dtype=np.int32), group))
    rewards = rng.normal(size=count * group).astype(np.float32)

    pairs: list[tuple[str, Callable[..., jax.Array], Callable[..., np.ndarray]]] = [
        (
            "group_normalize",
            functools.partial(advantages.group_normalize, num_groups=count, epsilon=EPSILON),
            normalize_by_loop,
        ),
        (
            "leave_one_out",
            functools.partial(advantages.leave_one_out, num_groups=count),
            leave_one_out_by_loop,
        ),
    ]
    out = []
    for name, function, loop in pairs:
        compiled = jax.jit(function)

        def ours(compiled: Callable[..., jax.Array] = compiled) -> np.ndarray:
            return np.asarray(compiled(rewards, group_ids))

        theirs = functools.partial(loop, rewards, group_ids)
        error = float(np.max(np.abs(ours() - theirs())))
        out.append(
            paired(
                f"advantages.{name} [{size}] in groups of {group}, time",
                "NumPy, loop over groups",
                ours,
                theirs,
                runs=runs,
                shown=milliseconds,
                max_abs_error=error,
                limit=1.0,
            )
        )
    return out


if __name__ == "__main__":
    sys.exit(main("advantages", __doc__, rows, None))
