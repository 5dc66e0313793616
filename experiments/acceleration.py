"""Gradient descent, heavy ball, Nesterov's and the triple momentum method, and their limits.

Three parts. Rates: on quadratics whose eigenvalues are spread over [μ, L], errors must fall as the
formulas say, within 2% of the slope of the logarithm, from several random starts. Cycle: on a
convex function with kinks in its slope the heavy ball must settle on three points, none of them
the optimum, while Nesterov's and the triple momentum method converge. Limits: iterates with step s
must come nearer to the differential equation as √s. Exits with 1 if that does not show.

Source: Parimi et al., Dynamics of acceleration, 2025, arXiv 2509.18346; the cycle: Lessard, Recht
and Packard, 2016, arXiv 1408.3595.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.shared import reproduction
from pgjax.optim import momentum_family as family
from pgjax.optim import ode

MU, L = 1.0, 25.0
ROOT = math.sqrt(L / MU)
METHODS: dict[str, tuple[family.MomentumParams, float]] = {
    "gradient descent": (family.gd_params(MU, L), (L - MU) / (L + MU)),
    "heavy ball": (family.heavy_ball_params(MU, L), (ROOT - 1) / (ROOT + 1)),
    "Nesterov": (family.nesterov_params(MU, L), 1 - 1 / ROOT),
    "triple momentum": (family.triple_momentum_params(MU, L), 1 - 1 / ROOT),
}
CYCLE = np.array([-1.80245, 0.64653, 2.11592])


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; μ is 1 and L is 25."""

    dimension: int = 50
    """Of the quadratic."""
    seeds: int = 5
    """Random starts."""
    steps: int = 2000
    """On the quadratic; slopes are taken where errors are between 1e-4 and 1e-100 of the first."""
    start: float = 3.3
    """Of the heavy ball's cycle."""
    step_sizes: tuple[float, ...] = (1e-2, 2.5e-3, 6.25e-4, 1.5625e-4)
    """s, each a quarter of the last."""
    horizon: float = 3.0
    """Time to which iterates and differential equation are compared."""
    quick: bool = False
    """A tiny version, for tests."""
    out: pathlib.Path = pathlib.Path("runs/acceleration")
    """Directory for table and plot."""


def iterates(
    coefficients: family.MomentumParams,
    grad_f: Callable[[Array], Any],
    start: Any,
    steps: int,
) -> Float[np.ndarray, "K ..."]:
    """x_0 to x_steps, K of them, in double precision."""
    method = family.three_parameter_method(coefficients)
    with jax.enable_x64(True):
        x0 = jnp.asarray(start, jnp.float64)

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            x, state = carry
            gradient = grad_f(family.query_point(coefficients, state, x))
            update, state = method.update(gradient, state, x)
            return (x + update, state), x + update

        _, xs = jax.jit(lambda x: jax.lax.scan(step, (x, method.init(x)), length=steps))(x0)
        return np.concatenate([np.asarray(x0)[None], np.asarray(xs)])


def slope(errors: Float[np.ndarray, " K"]) -> float:
    """Of the logarithm of errors, past the start and before what underflows."""
    keep = (errors < 1e-4 * errors[0]) & (errors > 1e-100 * errors[0])
    return float(np.polyfit(np.flatnonzero(keep), np.log(errors[keep]), 1)[0])


def kinked(x: Array) -> Array:
    """A slope that rises by 25, then 1, then 25; the function's optimum is 0."""
    return jnp.where(x < 1, 25 * x, jnp.where(x < 2, x + 24, 25 * x - 24))


def distance_from_path(config: Config, kind: str, step: float) -> float:
    """Largest distance of iterates k from the differential equation at time k √s."""
    values: Any = np.array([1.0, 9.0])
    steps, fine = round(config.horizon / math.sqrt(step)), 8
    weight = (1 - math.sqrt(step)) / (1 + math.sqrt(step))  # μ = 1
    options: dict[str, float] = {"mu": 1.0}
    if kind == "convex":
        options = {}

        def rising(k: Any) -> Any:
            return k / (k + 3)

        coefficients = family.MomentumParams(step, rising, rising, 0.0)
    else:
        shift = weight if kind == "Nesterov" else 0.0
        coefficients = family.MomentumParams(step, weight, shift, 0.0)
    x = iterates(coefficients, lambda x: values * x, np.ones(2), steps)
    with jax.enable_x64(True):
        motion = ode.accelerated_ode(
            lambda x: values * x, "convex" if kind == "convex" else "strongly_convex", **options
        )
        _, (path, _) = ode.rk4(
            motion, (jnp.ones(2), jnp.zeros(2)), dt=math.sqrt(step) / fine, steps=fine * steps
        )
        return float(np.linalg.norm(np.asarray(path)[::fine] - x, axis=1).max())


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(config, dimension=10, seeds=3, step_sizes=(1e-2, 2.5e-3))
    table: dict[str, dict[str, Any]] = {}
    claims = []
    panels: dict[str, dict[str, Any]] = {"quadratic: log10 of the error": {}, "kinked: x": {}}
    values: Any = np.linspace(MU, L, config.dimension)
    for name, (coefficients, rate) in reproduction.track(METHODS.items()):
        starts = np.random.default_rng(0).normal(size=(config.seeds, config.dimension))
        x = iterates(coefficients, lambda x: values * x, starts, config.steps)
        errors = np.linalg.norm(x, axis=-1).T
        slopes = np.array([slope(e) for e in errors])
        with jax.enable_x64(True):
            spectral = float(family.quadratic_rate(coefficients, jnp.asarray(values)))
        table[name] = {"rate": np.exp(slopes), "formula": np.array([rate])}
        off = np.abs(slopes / math.log(rate) - 1).max()
        claims.append(
            reproduction.Claim(
                f"{name}: the rate is {rate:.4f}",
                bool(off < 0.02 and abs(spectral - rate) < 1e-6),
                f"{np.exp(slopes.mean()):.4f}, slopes off by at most {off:.2%}; "
                f"by eigenvalues {spectral:.6f}",
            )
        )
        shown = slice(0, 100)
        panels["quadratic: log10 of the error"][name] = reproduction.band(
            np.arange(config.steps + 1)[shown], np.log10(errors[:, shown])
        )
        if name != "gradient descent":
            x = iterates(coefficients, kinked, config.start, 400)
            panels["kinked: x"][name] = (np.arange(40), x[:40])
            if name == "heavy ball":
                claims.append(
                    reproduction.Claim(
                        "heavy ball: settles on three points off the optimum",
                        bool(np.abs(np.sort(x[-3:]) - CYCLE).max() < 1e-5),
                        ", ".join(f"{z:.5f}" for z in np.sort(x[-3:])),
                    )
                )
            else:
                near = int(np.flatnonzero(np.abs(x) >= 1e-3)[-1]) + 1
                claims.append(
                    reproduction.Claim(
                        f"{name}: comes within 1e-3 of the optimum in 40 steps, and stays",
                        near <= 40,
                        f"from {near} on, ends at {abs(x[-1]):.1e}",
                    )
                )
    roots = np.sqrt(config.step_sizes)
    panels["distance from the limit: log10"] = {}
    for kind in ("heavy ball", "Nesterov", "convex"):
        far = np.array([distance_from_path(config, kind, s) for s in config.step_sizes])
        order = np.polyfit(np.log(roots), np.log(far), 1)[0]
        table[f"limit, {kind}"] = {"order in √s": np.array([order])}
        claims.append(
            reproduction.Claim(
                f"{kind}: the distance from the limit is of order √s (0.85 to 1.15)",
                bool(0.85 <= order <= 1.15),
                f"√s to the power {order:.3f}; {far[0]:.3f} to {far[-1]:.4f}",
            )
        )
        panels["distance from the limit: log10"][kind] = (np.log10(roots), np.log10(far))
    return reproduction.Findings(
        title="Rates for κ = 25; orders of the limits", table=table, claims=claims, panels=panels
    )


def main(arguments: list[str] | None = None) -> int:
    return reproduction.main("acceleration", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
