"""A mixture's grouped product beside `jax.lax.ragged_dot`, forward and both gradients.

`python -m experiments.benchmarks.experts` prints the table. Times are medians of runs taken in
turn, given as ratios (ours / theirs); memory is the compiled programs' temporary memory.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from pgjax.models.grouped import grouped_matmul

# In and out are half of those of a 30B mixture.
ROWS, INNER, OUT = 4096, 1024, 384
Product = Callable[..., jax.Array]


def sizes_of(groups: int, *, skewed: bool) -> np.ndarray:
    """Rows of each group: even, or halved from one to the next until each has one."""
    if not skewed:
        return np.full(groups, ROWS // groups)
    left, sizes = ROWS, []
    for group in range(groups):
        size = max(1, min(left // 2, left - (groups - group - 1)))
        sizes.append(size if group < groups - 1 else left)
        left -= sizes[-1]
    return np.array(sizes)


def compiled(product: Product, *arguments: jax.Array) -> Any:
    """A value and both gradients, of rows, matrices and sizes."""

    def loss(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return jnp.mean(product(x, weights, sizes) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()


def compared(groups: int, *, skewed: bool, runs: int) -> list[harness.Row]:
    """Time and temporary memory."""
    rng = np.random.default_rng(0)
    arguments = (
        jnp.asarray(rng.normal(size=(ROWS, INNER)), jnp.float32),
        jnp.asarray(rng.normal(size=(groups, INNER, OUT)) / INNER**0.5, jnp.float32),
        jnp.asarray(sizes_of(groups, skewed=skewed), jnp.int32),
    )
    ours, theirs = (compiled(p, *arguments) for p in (grouped_matmul, jax.lax.ragged_dot))
    error = max(
        float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        for a, b in zip(
            jax.tree.leaves(ours(*arguments)), jax.tree.leaves(theirs(*arguments)), strict=True
        )
    )
    name = f"[{ROWS}, {INNER}] by {groups} groups' [{INNER}, {OUT}]"
    name += ", half of the rows in one group" if skewed else ""
    held = [program.memory_analysis().temp_size_in_bytes for program in (ours, theirs)]
    return [
        harness.paired(
            f"{name}, time",
            "jax.lax.ragged_dot",
            functools.partial(ours, *arguments),
            functools.partial(theirs, *arguments),
            runs=runs,
            shown=harness.milliseconds,
            max_abs_error=error,
            limit=1.0,
        ),
        harness.Row(
            name=f"{name}, temporary memory",
            peer="jax.lax.ragged_dot",
            ours=f"{held[0] / 2**20:.3g} MiB",
            theirs=f"{held[1] / 2**20:.3g} MiB",
            ratio=held[0] / held[1],
            limit=1.0,
        ),
    ]


def rows(*, groups: tuple[int, ...] = (8, 32, 128), runs: int = 3) -> list[harness.Row]:
    """For each number of groups, even and skewed."""
    return [
        row
        for count in groups
        for skewed in (False, True)
        for row in compared(count, skewed=skewed, runs=runs)
    ]


def main(arguments: list[str] | None = None) -> int:
    return harness.main("experts", __doc__, rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
