"""PolarGrad's three matrix problems, with every optimizer of its figures.

`quadratic`: ½‖AXB - C‖². `logistic`: regression through a bilinear form, on minibatches.
`completion`: a low-rank matrix from some of its entries, both factors at once. Each seed is a
problem of its own. Momentum in matrices keeps the gradient's scale except in Muon, which therefore
stalls at a constant rate: that is the claim.

Steps at `--size paper` are the published ones; PolarGrad without momentum on the quadratic has the
one published for exact polar factors, 3e-8, since 4e-8 is for two steps of QDWH, which are far from
one, and diverges otherwise. At `--size small` those of PolarGrad on the quadratic are multiples of
1/(L r), L its smoothness and r the rank, and those of the completion scale with the observed
entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgjax as pg
from experiments.shared import reproduction
from experiments.shared.descent import descend
from pgjax.optim import MatrixSpec, oracles


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
    oracle: Literal["qdwh", "svd", "eigh", "polar_express"] = "qdwh"
    """how polar factors are computed; eigh is the fastest here, and exact enough for gradients
    whose condition number stays below 1e6"""
    quick: bool = False
    """two seeds and sixty steps, to see that it runs"""
    out: str = "results/polar_grad"
    """directory for table, plot and numbers, in which each problem has its own"""


class Method(NamedTuple):
    """A transformation of gradients; `units`: of gradients divided by the problem's L."""

    transform: optax.GradientTransformation
    units: bool = False
    newton: bool = False


class Problem(NamedTuple):
    """`init` draws data and a start; `loss` may draw a minibatch, `measure` takes everything."""

    init: Callable[[Array], tuple[Any, Any]]
    loss: Callable[[Any, Any, Array], Array]
    measure: Callable[[Any, Any], Array]
    residual: Callable[[Any, Any], Array]
    methods: Mapping[str, Method]
    steps: int


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda _: MatrixSpec(out_axes=(0,), in_axes=(1,)), tree)


def polar(config: Config, rate: Any, beta: float = 0.0, order: str = "momentum_first") -> Any:
    oracle = oracles.polar(config.oracle)
    return pg.optim.polar_grad(rate, beta=beta, order=order, oracle=oracle, specs=_specs)


def muon(rate: Any) -> optax.GradientTransformation:
    scaled = pg.optim.scale_by_muon(shape="none", specs=_specs)
    return optax.chain(scaled, optax.scale_by_learning_rate(rate))


def decayed(rate: float, factor: float) -> optax.Schedule:
    """The rate, times the factor after every 25 steps."""
    return lambda count: rate * factor ** (count // 25)


def uniform(key: Array, shape: tuple[int, int]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


PROVEN = "PolarGrad at 1/(L r)"


def quadratic(config: Config) -> Problem:
    paper = config.size == "paper"
    m, n, p, q = (500, 100, 1000, 250) if paper else (50, 10, 100, 25)

    def init(key: Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, 4)
        a, b = jax.random.normal(keys[0], (p, m)), jax.random.normal(keys[1], (n, q))
        c = jax.random.normal(keys[2], (p, q))
        best = jnp.linalg.lstsq(a, c)[0] @ jnp.linalg.pinv(b)
        # ‖AXB - C‖² is ‖R (X - best) Sᵀ‖² and a constant, by the triangles of A and Bᵀ.
        data = {"best": best, "r": jnp.linalg.qr(a, "r"), "s": jnp.linalg.qr(b.T, "r")}
        data["smooth"] = (jnp.linalg.norm(a, 2) * jnp.linalg.norm(b, 2)) ** 2
        data["convex"] = (jnp.linalg.norm(a, -2) * jnp.linalg.norm(b, -2)) ** 2
        data["left"], data["right"] = jnp.linalg.inv(a.T @ a), jnp.linalg.inv(b @ b.T)
        return {"x": uniform(keys[3], (m, n))}, data

    def gap(params: Any, data: Any) -> Array:
        return 0.5 * jnp.sum((data["r"] @ (params["x"] - data["best"]) @ data["s"].T) ** 2)

    # 3.56e-8 to 3e-8 is 4.75e-8 to 4e-8, as published.
    def rate(units: float, published: float) -> float:
        return published if paper else units / min(m, n)

    def later(config: Config, rate: Any) -> Any:
        return polar(config, rate, 0.95, "polar_first")

    own, slow = not paper, 0.99
    methods = {
        "PolarGrad": Method(polar(config, rate(3, 3e-8)), own),
        PROVEN: Method(polar(config, 1 / min(m, n)), units=True),
        "PolarGrad, decayed": Method(polar(config, decayed(rate(3.5, 3.56e-8), slow)), own),
        "PolarGradM": Method(polar(config, rate(6, 2e-7), 0.9), own),
        "PolarGradM, decayed": Method(polar(config, decayed(rate(7.5, 2.5e-7), slow), 0.9), own),
        "PolarGradM, polar first": Method(later(config, rate(10, 4e-7)), own),
        "PolarGradM, polar first, decayed": Method(
            later(config, decayed(rate(12.5, 5e-7), slow)), own
        ),
        "Muon": Method(muon(0.1)),
        "Muon, decayed": Method(muon(decayed(0.05 if paper else 0.1, slow if paper else 0.9))),
        "Adam": Method(optax.adam(0.05)),
        "Adam, decayed": Method(optax.adam(decayed(0.05, slow))),
        "gradient descent": Method(optax.sgd(1.0), units=True),
        "Newton": Method(optax.sgd(0.25), newton=True),
    }
    return Problem(
        init,
        lambda params, data, key: gap(params, data),
        gap,
        lambda params, data: params["x"] - data["best"],
        methods,
        4000 if paper else 1000,
    )


def logistic(config: Config) -> Problem:
    paper = config.size == "paper"
    count, m, n, q, batch = (10_000, 1000, 100, 400, 1000) if paper else (1000, 50, 10, 40, 200)

    def init(key: Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, 4)
        data = {
            "a": jax.random.normal(keys[0], (count, m)),
            "b": jax.random.normal(keys[1], (n, q)),
            "c": jnp.where(jax.random.normal(keys[2], (count, q)) > 0.5, 1.0, -1.0),
        }
        return {"x": uniform(keys[3], (m, n))}, data

    def loss(params: Any, data: Any, key: Array) -> Array:
        rows = jax.random.choice(key, count, (batch,))
        logits = data["a"][rows] @ params["x"] @ data["b"]
        return jnp.sum(jax.nn.softplus(-data["c"][rows] * logits))

    def measure(params: Any, data: Any) -> Array:
        logits = data["a"] @ params["x"] @ data["b"]
        return jnp.mean(jax.nn.softplus(-data["c"] * logits))

    def fast(rate: float) -> optax.Schedule:
        return decayed(rate, 0.95)

    # Every method has the same factors around its published step, and its best is compared.
    base = (1.5e-7, 2.5e-7, 0.1, 5e-3) if paper else (1e-5, 1e-5, 0.1, 5e-3)
    factors = (1.0,) if paper else (0.1, 0.3, 1.0, 3.0)
    methods: dict[str, Method] = {}
    for f in factors:
        methods |= {
            f"PolarSGD @{base[0] * f:g}": Method(polar(config, base[0] * f)),
            f"PolarSGD, decayed @{base[0] * f * 5 / 3:.2g}": Method(
                polar(config, fast(base[0] * f * 5 / 3))
            ),
            f"PolarSGDM @{base[1] * f:g}": Method(polar(config, base[1] * f, 0.95)),
            f"PolarSGDM, polar first @{base[1] * f:g}": Method(
                polar(config, base[1] * f, 0.95, "polar_first")
            ),
            f"Muon @{base[2] * f:g}": Method(muon(base[2] * f)),
            f"Muon, decayed @{base[2] * f * 2:g}": Method(muon(fast(base[2] * f * 2))),
            f"Adam @{base[3] * f:g}": Method(optax.adam(base[3] * f)),
            f"Adam, decayed @{base[3] * f * 2:g}": Method(optax.adam(fast(base[3] * f * 2))),
        }
    return Problem(
        init, loss, measure, lambda params, data: params["x"], methods, 1500 if paper else 600
    )


def completion(config: Config) -> Problem:
    paper = config.size == "paper"
    m, n, rank = (500, 250, 5) if paper else (100, 50, 3)

    def init(key: Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, 5)
        truth = uniform(keys[0], (m, rank)) @ uniform(keys[1], (n, rank)).T
        seen = jax.random.bernoulli(keys[2], 0.3, (m, n))
        params = {"x": uniform(keys[3], (m, rank)), "y": uniform(keys[4], (n, rank))}
        return params, {"truth": truth, "seen": seen}

    def value(params: Any, data: Any) -> Array:
        error = jnp.where(data["seen"], params["x"] @ params["y"].T - data["truth"], 0.0)
        return jnp.sum(error**2) / jnp.sum(data["seen"])

    entries = 0.3 * m * n
    unit = 1.0 if paper else entries / 37_500  # the gradient of a mean shrinks with the entries

    def later(rate: float) -> Any:
        return polar(config, rate, 0.5, "polar_first")

    def fast(rate: float) -> optax.Schedule:
        return decayed(rate, 0.95)

    methods = {
        "PolarGrad": Method(polar(config, 50 * unit)),
        "PolarGrad, decayed": Method(polar(config, fast(50 * unit))),
        "PolarGradM": Method(polar(config, 50 * unit, 0.5)),
        "PolarGradM, polar first": Method(later(100 * unit)),
        "Muon": Method(muon(0.25)),
        "Muon, decayed": Method(muon(fast(0.25))),
        "Adam": Method(optax.adam(0.05)),
        "Adam, decayed": Method(optax.adam(fast(0.05))),
        "gradient descent": Method(optax.sgd(50 * unit)),
    }
    if not paper:  # the published step is small here: both also at four times it
        methods |= {
            "PolarGrad, 4 times": Method(polar(config, 200 * unit)),
            "gradient descent, 4 times": Method(optax.sgd(200 * unit)),
        }
    return Problem(
        init,
        lambda params, data, key: value(params, data),
        value,
        lambda params, data: params["x"] @ params["y"].T - data["truth"],
        methods,
        1000 if paper else 600,
    )


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
    claims = [
        reproduction.Claim(
            f"{ours} ends below {theirs} at the same step (every seed)",
            bool(np.all(end[ours] < end[theirs])),
            f"{end[ours].mean():.2g} against {end[theirs].mean():.2g}",
        )
        for ours, theirs in pairs
    ]
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
    build, judge, measured = PROBLEMS[config.problem]
    with jax.enable_x64(True):
        problem = build(config)
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
            for name in reproduction.track(problem.methods)
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
