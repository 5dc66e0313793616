"""PolarGrad's three matrix problems, with every optimizer of its figures.

`quadratic`: ½‖AXB - C‖². `logistic`: regression through a bilinear form, on minibatches.
`completion`: a low-rank matrix from some of its entries, both factors at once. Each seed is a
problem of its own. Momentum in matrices keeps the gradient's scale except in Muon, which therefore
stalls at a constant rate: that is the claim.

Problems and steps are those of experiments.shared.matrix_problems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from experiments.shared.descent import descend
from experiments.shared.matrix_problems import (
    PROVEN,
    Method,
    Problem,
    completion,
    factors,
    logistic,
    quadratic,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to solve, how large, and how often."""

    problem: Literal["quadratic", "logistic", "completion"] = "quadratic"
    """which of the three"""
    size: Literal["small", "paper"] = "small"
    """small: about a minute; paper: the published sizes and numbers of steps, tens of minutes"""
    seeds: int = 5
    """problems, each with its own data and start"""
    steps: int | None = None
    """None: 1000, 600 and 600; at the paper's sizes 4000, 1500 and 1000"""
    oracle: Literal["qdwh", "qdwh_2", "svd", "eigh", "polar_express"] = "qdwh"
    """how polar factors are computed; qdwh_2: two steps in float32 as in the published figures,
    exact for Muon; eigh is the fastest here, and exact enough for gradients whose condition number
    stays below 1e6"""
    around: tuple[float, ...] = ()
    """multiples of their published steps at which the logistic problem's methods are tried, 1 among
    them; none: 0.1, 0.3, 1 and 3, at the published size 1"""
    only: tuple[str, ...] = ()
    """of the logistic problem, methods of these names alone, PolarSGD and Muon among them"""
    quick: bool = False
    """two seeds and 120 steps, to see that it runs"""
    out: str = "results/polar_grad"
    """directory for table, plot and numbers, in which each problem has its own"""


class Curves(NamedTuple):
    """Over seeds and records: what is measured, and of the first factor's gradient its spectrum."""

    value: Float[np.ndarray, "S K"]
    nuclear: Float[np.ndarray, "S K"]
    condition: Float[np.ndarray, "S K"]
    residual: Float[np.ndarray, "S K"]


class Started(NamedTuple):
    """A problem with the data and the start of every seed."""

    problem: Problem
    params: Any
    data: Any
    measure: Callable[[Any, Any], Array]


def start(problem: Problem, seeds: int) -> Started:
    """Draws all seeds; what depends on data alone is compiled once, not for every method."""
    keys = jax.random.split(jax.random.key(0), seeds)
    params, data = jax.jit(jax.vmap(problem.init))(keys)
    over_records = jax.vmap(problem.measure, (0, None))
    return Started(problem, params, data, jax.jit(jax.vmap(over_records)))


def solve(begun: Started, method: Method, steps: int, every: int) -> Curves:
    """All seeds of one method under one `jit`; a record every so many steps, before them."""
    transform, loss = method.transform, begun.problem.loss

    def one(params: Any, data: Any, key: Array) -> Any:
        def gradient(params: Any, key: Array) -> Any:
            g = jax.grad(loss)(params, data, key)
            if method.units:
                g = jax.tree.map(lambda x: x / data["smooth"], g)
            if method.newton:
                g = {"x": data["left"] @ g["x"] @ data["right"]}
            return g

        def record(params: Any) -> Any:
            return params, jax.grad(loss)(params, data, key)["x"]

        keys = jax.random.split(key, steps)
        return descend(gradient, transform, params, keys, record, every)

    seeds = len(jax.tree.leaves(begun.params)[0])
    keys = jax.random.split(jax.random.key(1), seeds)
    params, gradients = jax.jit(jax.vmap(one))(begun.params, begun.data, keys)
    value = np.asarray(begun.measure(params, begun.data))
    over_records = jax.vmap(jax.vmap(begun.problem.residual, (0, None)))
    residuals = np.asarray(over_records(params, begun.data))
    spectrum = np.linalg.svd(np.asarray(gradients), compute_uv=False)
    with np.errstate(divide="ignore", invalid="ignore"):  # at the minimum there is nothing left
        condition = spectrum[..., 0] / spectrum[..., -1]
        return Curves(value, spectrum.sum(-1), condition, np.linalg.cond(residuals))


def linear_fit(curves: Float[np.ndarray, "S K"], every: int, start: int = 100) -> tuple[Any, Any]:
    """Of each seed's log gap from a step on: the factor it falls by a step, and R²."""
    rates, fits = [], []
    for curve in curves[:, start // every :]:
        kept = curve > 1e-10  # below, rounding is all there is
        x, y = every * np.arange(len(curve))[kept], np.log(curve[kept])
        slope, _ = np.polyfit(x, y, 1)
        rates.append(np.exp(slope))
        fits.append(np.corrcoef(x, y)[0, 1] ** 2)
    return np.array(rates), np.array(fits)


def quadratic_claims(
    found: Mapping[str, Curves], every: int, data: Any
) -> list[reproduction.Claim]:
    end = {name: curves.value[:, -1] for name, curves in found.items()}
    rates, fits = linear_fit(found["PolarGrad"].value, every)
    muon = found["Muon"].value
    quarters = [part.mean(1) for part in np.array_split(muon, 4, axis=1)]
    with_momentum = [end["PolarGradM"], end["PolarGradM, polar first"]]
    proven = found[PROVEN].value
    # 1 - μ / (L r), by nuclear norms that are at least the Frobenius norm
    bound = 1 - np.asarray(data["convex"] / data["smooth"]) / min(data["best"].shape[1:])
    held = proven[:, 1:] <= proven[:, :-1] * bound[:, None] ** every
    return [
        reproduction.Claim(
            "at 1/(L r) the gap falls by μ/(L r) of itself a step or more (every seed and record)",
            bool(held.all()),
            f"by {1 - linear_fit(proven, every)[0].mean():.2g} a step where {1 - bound.mean():.2g} "
            "is proven",
        ),
        reproduction.Claim(
            "PolarGrad's gap falls linearly (R² above .95 from step 100 on, every seed)",
            bool(fits.min() > 0.95 and rates.max() < 1),
            f"by {1 - rates.mean():.4f} ± {rates.std():.4f} of itself a step; R² "
            + ", ".join(f"{fit:.3f}" for fit in fits),
        ),
        reproduction.Claim(
            "Muon at a constant rate stalls above 1: never below it in the second half, and no "
            "lower in the last quarter than half of the third (every seed)",
            bool(
                muon[:, muon.shape[1] // 2 :].min() > 1 and np.all(quarters[3] > 0.5 * quarters[2])
            ),
            f"{quarters[2].mean():.3g} in the third quarter, {quarters[3].mean():.3g} in the last",
        ),
        reproduction.Claim(
            "momentum beats PolarGrad, which beats Muon at a constant rate (every seed)",
            bool(np.max(with_momentum) < end["PolarGrad"].min())
            and bool(end["PolarGrad"].max() < end["Muon"].min()),
            f"{np.max(with_momentum):.2g} < {end['PolarGrad'].mean():.2g} < "
            f"{end['Muon'].mean():.2g}",
        ),
        reproduction.Claim(
            "PolarGrad at a constant rate beats Muon at a falling one (every seed)",
            bool(end["PolarGrad"].max() < end["Muon, decayed"].min()),
            f"{end['PolarGrad'].mean():.2g} against {end['Muon, decayed'].mean():.2g}",
        ),
    ]


def best_of(found: Mapping[str, Curves], kind: str) -> tuple[str, Float[np.ndarray, " S"]]:
    """The step at which the method ends lowest on average, and its ends."""
    ends = {n: c.value[:, -1] for n, c in found.items() if n.startswith(kind + " @")}
    name = min(ends, key=lambda n: np.nan_to_num(ends[n], nan=np.inf).mean())
    return name, ends[name]


def logistic_claims(found: Mapping[str, Curves], every: int, data: Any) -> list[reproduction.Claim]:
    del every, data
    polar_name, ours = best_of(found, "PolarSGD")
    muon_name, theirs = best_of(found, "Muon")
    published = [n for n in found if n.startswith("Muon @")]
    usual = found["Muon @0.1"].value[:, -1]
    return [
        reproduction.Claim(
            "PolarSGD at its best step beats Muon at the published constant one (every seed)",
            bool(np.all(ours < usual)),
            f"{polar_name} {ours.mean():.4f} against {usual.mean():.4f}",
        ),
        reproduction.Claim(
            f"and at the best of {len(published)} constant ones (every seed)",
            bool(np.all(ours < theirs)),
            f"{muon_name} {theirs.mean():.4f}",
        ),
    ]


def completion_claims(
    found: Mapping[str, Curves], every: int, data: Any
) -> list[reproduction.Claim]:
    del every, data
    end = {name: curves.value[:, -1] for name, curves in found.items()}
    pairs = [("PolarGrad", "gradient descent")]
    if "PolarGrad, 4 times" in end:
        pairs.append(("PolarGrad, 4 times", "gradient descent, 4 times"))
    claims = []
    for ours, theirs in pairs:
        a, b = found[ours].value, found[theirs].value
        # Where both arrive, who does first: the first record with one below 1e-12, or the last.
        arrived = np.minimum(a, b) < 1e-12
        at = np.where(arrived.any(1), arrived.argmax(1), a.shape[1] - 1)[:, None]
        a, b = np.take_along_axis(a, at, 1), np.take_along_axis(b, at, 1)
        claims.append(
            reproduction.Claim(
                f"{ours} is below {theirs} at the same step at the end, or when one of them is "
                "below 1e-12 (every seed)",
                bool(np.all(a < b)),
                f"{a.mean():.2g} against {b.mean():.2g}",
            )
        )
    return [
        *claims,
        reproduction.Claim(
            "Muon at a constant rate stalls above 1e-4 (every seed)",
            bool(end["Muon"].min() > 1e-4),
            f"{end['Muon'].mean():.2g}",
        ),
    ]


PROBLEMS = {
    "quadratic": (quadratic, quadratic_claims, "gap to the minimum"),
    "logistic": (logistic, logistic_claims, "mean loss"),
    "completion": (completion, completion_claims, "mean squared error of seen entries"),
}


def run(config: Config) -> reproduction.Findings:
    """Solves one problem by every method and compares their ends."""
    if config.seeds < 2:
        raise ValueError(f"seeds: expected at least 2, got {config.seeds}")
    if config.problem != "logistic" and (config.around or config.only):
        raise ValueError(f"around, only: of the logistic problem, not of the {config.problem}")
    if config.only and not {"PolarSGD", "Muon"} <= set(config.only):
        raise ValueError(f"only: expected PolarSGD and Muon among them, got {config.only}")
    if config.around and 1 not in config.around:
        raise ValueError(f"around: expected 1 among them, got {config.around}")
    build, judge, measured = PROBLEMS[config.problem]
    with jax.enable_x64(True):
        more = {"around": config.around} if config.around else {}
        problem = build(config.size == "paper", factors(config.oracle), **more)
        chosen = [n for n in problem.methods if not config.only or n.split(" @")[0] in config.only]
        every = 20
        steps = config.steps or problem.steps
        seeds = config.seeds
        if config.quick:
            steps, seeds = 120, 2
        if steps < 120 or steps % every:
            raise ValueError(f"steps: expected a multiple of {every} of at least 120, got {steps}")
        begun = start(problem, seeds)
        found = {
            name: solve(begun, problem.methods[name], steps, every)
            for name in reproduction.track(chosen)
        }
    table = {
        name: {
            measured: curves.value[:, -1],
            "gradient's nuclear norm": curves.nuclear[:, -1],
            "its condition": curves.condition[:, -1],
        }
        for name, curves in found.items()
    }
    shown = dict(found)
    if config.problem == "logistic":
        kinds = dict.fromkeys(name.split(" @")[0] for name in found)
        best = [best_of(found, kind)[0] for kind in kinds]
        shown = {name: found[name] for name in best}
    x = every * np.arange(steps // every + 1)

    def curves(field: str) -> dict[str, tuple[Any, ...]]:
        out = {}
        for name, curve in shown.items():
            logs = np.log10(np.maximum(getattr(curve, field), 1e-16))
            out[name] = reproduction.band(x, logs)
        return out

    return reproduction.Findings(
        title=f"PolarGrad: {config.problem}, {config.size} size, {seeds} seeds",
        table=table,
        claims=judge(found, every, begun.data),
        panels={
            f"log10 of {measured}": curves("value"),
            "log10 of the gradient's nuclear norm": curves("nuclear"),
            "log10 of the residual's condition number": curves("residual"),
        },
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main(
        "polar_grad",
        Config,
        run,
        description=__doc__,
        arguments=arguments,
        part=lambda config: config.problem,
    )


if __name__ == "__main__":
    raise SystemExit(main())
