"""Few gradients of the smooth part, many of the other: sliding without restarts.

A quadratic (L = 100, one flat direction) plus a mean of absolute values plus `½ ‖x‖²`. Without
restarts the logarithm of the gap must fall linearly with the gradients of the quadratic, each by
0.9 `log(1 - γ)` or more; with noisy subgradients, subgradients times gap must stay bounded over
three decades of subgradients; and accelerated, with the absolute values smoothed, operator calls
times the root of the gap. Beside it: proximal subgradient steps, sliding with Lan's convex
parameters, the same restarted. Exits with 1 if that does not show.

Source: Wu, Xu and Zhang, 2026, arXiv 2602.04161, with parameters derived here; Lan, 2016,
arXiv 1406.0919.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.optim import mirror, schedules, sliding
from pgjax.optim import smoothed_sliding as fast

MU, L = 1.0, 100.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The problem has μ = 1, L = 100."""

    dimension: int = 20
    """Of x."""
    rows: int = 30
    """Absolute values."""
    outer: int = 70
    """Gradients of the quadratic, subgradients exact."""
    noisy_outer: int = 100
    """The same with noisy subgradients: half a million of them."""
    accelerated_outer: int = 150
    """The same, accelerated."""
    noise: float = 0.5
    """Standard deviation of each coordinate of a subgradient."""
    chains: int = 8
    """Noisy runs of each problem, whose gaps are averaged."""
    lan_outer: int = 100
    """Gradients of Lan's sliding."""
    phase: int = 23
    """Gradients of one phase of the restarted one: √(5 L / μ)."""
    plain: int = 1000
    """Gradients of proximal subgradient steps."""
    seeds: int = 5
    """Problems."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/gradient_sliding")
    """Directory for table and plot."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """`½ (x - a)ᵀ Q (x - a) + mean |B x - c| + ½ ‖x‖²` from 0, and the least value."""

    q: Float[np.ndarray, "D D"]
    a: Float[np.ndarray, " D"]
    b: Float[np.ndarray, "R D"]
    c: Float[np.ndarray, " R"]
    best: Float[np.ndarray, " D"]
    least: float

    def total(self, x: Any) -> Any:
        """The objective."""
        smooth = 0.5 * (x - self.a) @ (self.q @ (x - self.a))
        return smooth + jnp.mean(jnp.abs(self.b @ x - self.c)) + MU / 2 * x @ x

    def gap(self, x: Array) -> Array:
        return self.total(x) - self.least

    def grad_f(self, x: Any) -> Any:
        return self.q @ (x - self.a)

    def subgrad_h(self, x: Any) -> Any:
        return jnp.sign(self.b @ x - self.c) @ self.b / len(self.c)

    @property
    def lipschitz(self) -> float:
        """Of the mean of absolute values, at most."""
        return float(np.linalg.norm(self.b, axis=1).mean())


def prox(v: Array, weight: Any) -> Array:
    """Of `½ ‖x‖²`."""
    return weight * v / (weight + MU)


def problem(config: Config, seed: int) -> Problem:
    """A random one, solved by its dual: a quadratic in a box, whose value is a bound from below."""
    rng = np.random.default_rng(seed)
    basis = scipy.stats.ortho_group.rvs(config.dimension, random_state=rng)
    values = np.concatenate([[0.0], np.geomspace(0.1, L, config.dimension - 1)])
    q = (basis * values) @ basis.T
    a, b = rng.normal(size=config.dimension), rng.normal(size=(config.rows, config.dimension))
    c = rng.normal(size=config.rows)
    inverse = np.linalg.inv(q + MU * np.eye(config.dimension))

    def minimiser(y: np.ndarray) -> np.ndarray:
        return inverse @ (q @ a - b.T @ y)

    def negative_dual(y: np.ndarray) -> tuple[float, np.ndarray]:
        x = minimiser(y)
        value = 0.5 * (x - a) @ q @ (x - a) + MU / 2 * x @ x + y @ (b @ x - c)
        return -value, -(b @ x - c)

    side = 1 / config.rows
    found = scipy.optimize.minimize(
        negative_dual,
        np.zeros(config.rows),
        jac=True,
        bounds=[(-side, side)] * config.rows,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 100_000, "maxfun": 100_000},
    )
    return Problem(q, a, b, c, minimiser(found.x), -float(found.fun))


def without_restarts(config: Config, task: Problem) -> tuple[np.ndarray, sliding.SlidingTrace]:
    """Gaps and counts, exact subgradients."""
    _, trace = sliding.gradient_sliding(
        task.grad_f,
        task.subgrad_h,
        prox,
        jnp.zeros(config.dimension),
        policy=sliding.restart_free(MU, L),
        n_outer=config.outer,
        metric=task.gap,
    )
    return np.asarray(trace.metric), trace


def with_noise(config: Config, task: Problem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean gaps over noisy runs, and subgradients of each."""

    def noisy(x: Array, key: Array) -> Array:
        return task.subgrad_h(x) + config.noise * jax.random.normal(key, x.shape)

    policy = sliding.restart_free(MU, L)

    def one(key: Array) -> Array:
        _, trace = sliding.gradient_sliding(
            task.grad_f,
            noisy,
            prox,
            jnp.zeros(config.dimension),
            policy=policy,
            n_outer=config.noisy_outer,
            key=key,
            metric=task.gap,
        )
        return trace.metric

    gaps = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), config.chains))
    return np.asarray(gaps).mean(0), np.cumsum(policy(config.noisy_outer).inner)


def accelerated(config: Config, task: Problem) -> tuple[np.ndarray, sliding.SlidingTrace]:
    """Gaps and counts where the absolute values are a maximum over a box."""
    side = 1 / config.rows
    start = float(task.gap(jnp.zeros(config.dimension)))
    diameter_square = config.rows * (2 * side) ** 2

    def dual(v: Array, eta: Array) -> Array:
        return jnp.clip((v - task.c) / eta, -side, side)

    _, trace = fast.accelerated_sliding(
        task.grad_f,
        lambda x: task.b @ x,
        lambda y: y @ task.b,
        dual,
        prox,
        jnp.zeros(config.dimension),
        mu=MU,
        smoothness=L,
        operator_norm=float(np.linalg.norm(task.b, 2)),
        eta0=2 * start / diameter_square,
        n_outer=config.accelerated_outer,
        metric=task.gap,
    )
    return np.asarray(trace.metric), trace


def lan(config: Config, task: Problem) -> tuple[float, int, int]:
    """Gap, gradients and subgradients with the convex parameters."""
    x, trace = sliding.gradient_sliding(
        task.grad_f,
        task.subgrad_h,
        prox,
        jnp.zeros(config.dimension),
        policy=sliding.lan_convex(L, task.lipschitz, float(task.best @ task.best)),
        n_outer=config.lan_outer,
    )
    return float(task.gap(x)), config.lan_outer, int(trace.inner[-1])


def restarted(config: Config, task: Problem) -> tuple[float, int, int]:
    """The same in phases, each from the last one's result for half the squared distance."""
    x, spent = jnp.zeros(config.dimension), 0
    phases = max(1, config.lan_outer // config.phase)
    for number in range(phases):
        distance = float(task.best @ task.best) / 2**number
        x, trace = sliding.gradient_sliding(
            task.grad_f,
            task.subgrad_h,
            prox,
            x,
            policy=sliding.lan_convex(L, task.lipschitz, distance),
            n_outer=config.phase,
        )
        spent += int(trace.inner[-1])
    return float(task.gap(x)), phases * config.phase, spent


def plain(config: Config, task: Problem) -> tuple[float, int, int]:
    """Proximal subgradient steps of decaying size, each with a gradient of the quadratic."""
    schedule = schedules.strongly_convex_decay(MU, L / MU, variant=2)

    def step(x: Array, count: Array) -> tuple[Array, None]:
        slope = task.grad_f(x) + task.subgrad_h(x)
        return mirror.mirror_step(
            x, slope, schedule(count), prox=lambda u, lr: prox(u, 1 / lr)
        ), None

    x, _ = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(config.plain)))(
        jnp.zeros(config.dimension)
    )
    return float(task.gap(x)), config.plain, config.plain


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config, outer=30, noisy_outer=40, accelerated_outer=40, chains=2, plain=100, seeds=3
        )
    with jax.enable_x64(True):
        return _run(config)


def _run(config: Config) -> reproduction.Findings:
    exact, quick_ones, noisy = [], [], []
    table: dict[str, dict[str, Any]] = {}
    others: dict[str, list[tuple[float, int, int]]] = {}
    first = 10
    for seed in reproduction.track(range(config.seeds), "problems"):
        task = problem(config, seed)
        gaps, sliding_trace = without_restarts(config, task)
        exact.append(gaps)
        mean, subgradients = with_noise(config, task, seed)
        noisy.append(mean)
        gaps, fast_trace = accelerated(config, task)
        quick_ones.append(gaps)
        for name, method in (
            ("proximal subgradient", plain),
            ("Lan", lan),
            ("Lan, restarted", restarted),
        ):
            others.setdefault(name, []).append(method(config, task))
    for name, rows in others.items():
        gap, gradients, inner = np.array(rows).T
        table[name] = {"log10 gap": np.log10(gap), "∇f": gradients, "subgradients or K": inner}
    for name, curves, inner in (
        ("without restarts", exact, sliding_trace.inner),
        ("with noise", noisy, subgradients),
        ("accelerated", quick_ones, fast_trace.inner),
    ):
        for at in sorted({len(inner) - 40, len(inner) - 20, len(inner)} & set(range(1, 1000))):
            table[f"{name}, {at}"] = {
                "log10 gap": np.log10([curve[at - 1] for curve in curves]),
                "∇f": np.array([at]),
                "subgradients or K": np.array([inner[at - 1]]),
            }
    claims = []
    for name, curves in (("without restarts", exact), ("accelerated", quick_ones)):
        logs = np.log(np.array(curves)[:, first:])
        steps = np.arange(logs.shape[1])
        fits = [scipy.stats.linregress(steps, row) for row in logs]
        determination = np.array([fit.rvalue**2 for fit in fits])
        slopes = np.array([fit.slope for fit in fits])
        rate = math.log(1 - sliding.sliding_rate(MU, L))
        claims.append(
            reproduction.Claim(
                f"{name}: log gap falls linearly, R² at least 0.98, by 0.9 log(1 - γ) or more",
                bool(determination.min() >= 0.98 and slopes.max() <= 0.9 * rate),
                f"R² {determination.min():.4f} or more, slopes {slopes.min():.3f} to "
                f"{slopes.max():.3f} against {rate:.3f}",
            )
        )
    products = {
        "noisy: subgradients × gap": np.array(noisy) * subgradients,
        "accelerated: K × √gap": np.sqrt(np.array(quick_ones)) * fast_trace.inner,
    }
    counts = {
        "noisy: subgradients × gap": subgradients,
        "accelerated: K × √gap": np.asarray(fast_trace.inner),
    }
    for name, product in products.items():
        decades = 3 if name.startswith("noisy") else 1
        window = counts[name] >= counts[name][-1] / 10**decades
        kept = product[:, window]
        worst = (kept.max(1) / kept[:, 0]).max()
        claims.append(
            reproduction.Claim(
                f"{name} over the last factor {10**decades} never exceeds twice where it starts",
                bool(worst <= 2),
                f"at most {worst:.2f} times; it ends at {kept[:, -1].mean():.2f} from "
                f"{kept[:, 0].mean():.2f}",
            )
        )
    panels: dict[str, dict[str, Any]] = {
        "log10 gap, by gradients of f": {
            "without restarts": reproduction.band(np.arange(1, config.outer + 1), np.log10(exact)),
            "accelerated": reproduction.band(
                np.arange(1, config.accelerated_outer + 1), np.log10(quick_ones)
            ),
        },
        "log10 of subgradients × gap (K × √gap), by gradients of f": {
            name: reproduction.band(np.arange(1, x.shape[1] + 1), np.log10(x))
            for name, x in products.items()
        },
    }
    return reproduction.Findings(
        title="Gaps, gradients of f, and calls of the other part",
        table=table,
        claims=claims,
        panels=panels,
        x_label="gradients of f",
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main(
        "gradient_sliding", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
