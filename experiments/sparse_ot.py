"""Transport plans of at most k entries a column: how sparse, how dear, how fast to find.

Twelve points are moved to six, squared distances as costs, on many random instances, in float64.
Plans of the sparsity-constrained problem must have at most k entries in every column; wherever one
is found, it must cost at least what the linear program costs and at most what quadratic transport
(k = 12) does; and L-BFGS must not need more iterations for larger k, on average over the instances
that are solved for every k. k = 1 cannot serve all twelve and must say so (arXiv 2209.15466). Where
the dual is best at a tie, no plan of k entries attains its value: that share is shown. Exits with 1
if that does not show.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Float

from experiments.shared import reproduction
from pgjax.optim import transport


@dataclasses.dataclass(frozen=True)
class Config:
    """Random instances."""

    seeds: int = 30
    """Instances."""
    sources: int = 12
    """Points that are moved: rows of the plan."""
    targets: int = 6
    """Points they are moved to: columns."""
    entries: tuple[int, ...] = (1, 2, 3, 4, 12)
    """Numbers k of entries in a column; the last one is quadratic transport."""
    gamma: float = 1.0
    """Of the quadratic term."""
    tolerance: float = 1e-8
    """Error of the plan's row sums."""
    quick: bool = False
    """Three instances, for tests."""
    out: pathlib.Path = pathlib.Path("runs/sparse_ot")
    """Directory for table and plot."""


def instance(config: Config, seed: int) -> Float[np.ndarray, "m n"]:
    """Squared distances between normal points of the plane."""
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(config.sources, 2)), rng.normal(size=(config.targets, 2))
    return ((source[:, None] - target) ** 2).sum(-1)


def linear_program(
    cost: Float[np.ndarray, "m n"], a: Float[np.ndarray, " m"], b: Float[np.ndarray, " n"]
) -> float:
    """The least cost of all plans."""
    rows, columns = cost.shape
    by_row = np.kron(np.eye(rows), np.ones(columns))
    by_column = np.kron(np.ones(rows), np.eye(columns))
    found = scipy.optimize.linprog(
        cost.ravel(), A_eq=np.concatenate([by_row, by_column]), b_eq=np.concatenate([a, b])
    )
    return float(found.fun)


def run(config: Config) -> reproduction.Findings:
    """Plans of every instance and k."""
    if config.quick:
        config = dataclasses.replace(config, seeds=3, entries=(1, 2, 12))
    a = np.full(config.sources, 1 / config.sources)
    b = np.full(config.targets, 1 / config.targets)
    costs = np.stack([instance(config, seed) for seed in range(config.seeds)])
    least = np.array([linear_program(cost, a, b) for cost in costs])
    rows: dict[int, dict[str, np.ndarray]] = {}
    with jax.enable_x64(True):
        for k in reproduction.track(config.entries, "k"):
            solve = jax.jit(
                functools.partial(
                    transport.sparse_plan, k=k, gamma=config.gamma, tol=config.tolerance
                )
            )
            found = [jax.device_get(solve(c, jnp.asarray(a), jnp.asarray(b))) for c in costs]
            plans = np.stack([plan for plan, _ in found])
            rows[k] = {
                "entries a column": (plans > 0).sum(1).max(1).astype(float),
                "cost over the least": (plans * costs).sum((1, 2)) - least,
                "row error": np.array([info.row_error for _, info in found], float),
                "solved": np.array([info.converged for _, info in found], float),
                "iterations": np.array([info.iterations for _, info in found], float),
            }
    served = [k for k in config.entries if k * config.targets >= config.sources]
    solved = {k: rows[k]["solved"] > 0 for k in served}
    all_solved = np.all([solved[k] for k in served], axis=0)
    dear = rows[served[-1]]["cost over the least"]
    between = [
        (rows[k]["cost over the least"] > -1e-6) & (rows[k]["cost over the least"] < dear + 1e-6)
        for k in served
    ]
    outside = [int(np.sum(~inside & solved[k])) for inside, k in zip(between, served, strict=True)]
    counts = {k: rows[k]["iterations"][all_solved] for k in served}
    steps = {k: float(x.mean()) if x.size else np.nan for k, x in counts.items()}
    grown = counts[served[-1]] - counts[served[0]]
    error = grown.std(ddof=1) / max(grown.size, 1) ** 0.5 if grown.size > 1 else np.nan
    claims = [
        reproduction.Claim(
            "never more than k entries",
            all(bool(np.all(row["entries a column"] <= k)) for k, row in rows.items()),
            ", ".join(f"k={k}: {row['entries a column'].max():g}" for k, row in rows.items()),
        ),
        reproduction.Claim(
            "solved plans cost between the linear program and quadratic transport",
            sum(outside) == 0,
            f"{sum(outside)} of {int(sum(x.sum() for x in solved.values()))} do not",
        ),
        reproduction.Claim(
            f"no more iterations with k = {served[-1]} than with k = {served[0]}",
            bool(grown.size and grown.mean() <= 0),
            ", ".join(f"k={k}: {x:.1f}" for k, x in steps.items())
            + f"; difference {grown.mean() if grown.size else np.nan:+.1f} ± {error:.1f} "
            f"on {int(all_solved.sum())} instances",
        ),
        reproduction.Claim(
            "k = 1 is told to be impossible",
            bool(not rows[1]["solved"].any() and rows[1]["row error"].min() > 0.01),
            f"row error at least {rows[1]['row error'].min():.3f}",
        ),
    ]
    ks = np.array(served)
    panels = {
        column: {
            "solved for all k": reproduction.band(
                ks, np.stack([rows[k][column][all_solved] for k in served], axis=1)
            )
        }
        for column in ("cost over the least", "iterations", "entries a column")
        if all_solved.any()
    }
    return reproduction.Findings(
        title=f"{config.sources} points to {config.targets}, at most k entries a column",
        table={f"k = {k}": row for k, row in rows.items()},
        claims=claims,
        panels=panels,
        x_label="k",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main("sparse_ot", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
