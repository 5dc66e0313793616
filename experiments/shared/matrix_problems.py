"""The three matrix problems of PolarGrad, and every method of its figures with its steps.

Source: Lau, Long and Su, arXiv 2505.21799, and the authors' scripts. Steps at the published sizes
are the published ones. Those scripts take two steps of QDWH in float32 for PolarGrad's factors,
which leave singular values between .7 and 1, and five for Muon's, which are exact;
`factors("qdwh_2")` does so too. With exact factors PolarGrad without momentum on the quadratic has
the step published for those, 3e-8; 4e-8 diverges then. At small sizes steps of PolarGrad on the
quadratic are multiples of 1/(L r), L its smoothness and r the rank, and those of the completion
scale with the observed entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import pgjax as pg
from pgjax.optim import MatrixSpec, Oracle, oracles

PROVEN = "PolarGrad at 1/(L r)"


class Factors(NamedTuple):
    """Oracles for PolarGrad and for Muon; `published`: PolarGrad's are those of the figures."""

    polar: Oracle
    exact: Oracle
    published: bool = False


def factors(name: str) -> Factors:
    """By a method of `pgjax.optim.polar`, for both, or by `qdwh_2`."""
    if name != "qdwh_2":
        oracle = oracles.polar(name)
        return Factors(oracle, oracle)
    two_steps = oracles.polar("qdwh", steps=2)

    def direction(w: Array) -> Array:
        unit = w / jnp.maximum(jnp.linalg.norm(w, axis=(-2, -1), keepdims=True), 1e-300)
        return two_steps(unit.astype(jnp.float32)).astype(w.dtype)  # its ε is where QDWH begins

    return Factors(Oracle(direction, transposes=True), oracles.polar("qdwh"), published=True)


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


def polar(oracle: Oracle, rate: Any, beta: float = 0.0, order: str = "momentum_first") -> Any:
    # Some runs arrive, in float64, at gradients smaller than the usual least nuclear norm.
    scaled = pg.optim.scale_by_polar(beta=beta, order=order, oracle=oracle, specs=_specs, eps=1e-30)
    return optax.chain(scaled, optax.scale_by_learning_rate(rate))


def muon(rate: Any, oracle: Oracle | None = None) -> optax.GradientTransformation:
    """With Keller's Newton-Schulz iteration, or another oracle."""
    scaled = pg.optim.scale_by_muon(shape="none", oracle=oracle, specs=_specs)
    return optax.chain(scaled, optax.scale_by_learning_rate(rate))


def decayed(rate: float, factor: float) -> optax.Schedule:
    """The rate, times the factor after every 25 steps."""
    return lambda count: rate * factor ** (count // 25)


def uniform(key: Array, shape: tuple[int, int]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def quadratic(paper: bool, factors: Factors) -> Problem:
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

    # Published for exact factors is 3e-8 alone; 3.56e-8 is to it as 4.75e-8 to 4e-8.
    usual, falling = (4e-8, 4.75e-8) if factors.published else (3e-8, 3.56e-8)

    def rate(units: float, published: float) -> float:
        return published if paper else units / min(m, n)

    def later(rate: Any) -> Any:
        return polar(factors.polar, rate, 0.95, "polar_first")

    own, slow = not paper, 0.99
    methods = {
        "PolarGrad": Method(polar(factors.polar, rate(3, usual)), own),
        PROVEN: Method(polar(factors.exact, 1 / min(m, n)), units=True),
        "PolarGrad, decayed": Method(polar(factors.polar, decayed(rate(3.5, falling), slow)), own),
        "PolarGradM": Method(polar(factors.polar, rate(6, 2e-7), 0.9), own),
        "PolarGradM, decayed": Method(
            polar(factors.polar, decayed(rate(7.5, 2.5e-7), slow), 0.9), own
        ),
        "PolarGradM, polar first": Method(later(rate(10, 4e-7)), own),
        "PolarGradM, polar first, decayed": Method(later(decayed(rate(12.5, 5e-7), slow)), own),
        "Muon": Method(muon(0.1)),
        "Muon, exact": Method(muon(0.1, factors.exact)),
        "Muon, decayed": Method(muon(decayed(0.05 if paper else 0.1, slow if paper else 0.9))),
        "Muon, exact, decayed": Method(
            muon(decayed(0.05 if paper else 0.1, slow if paper else 0.9), factors.exact)
        ),
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


def logistic(paper: bool, factors: Factors, around: tuple[float, ...] | None = None) -> Problem:
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

    # Every method has the same multiples of its published step, and its best is compared.
    base = (1.5e-7, 2.5e-7, 0.1, 5e-3) if paper else (1e-5, 1e-5, 0.1, 5e-3)
    around = around or ((1.0,) if paper else (0.1, 0.3, 1.0, 3.0))
    methods: dict[str, Method] = {}
    for f in around:
        methods |= {
            f"PolarSGD @{base[0] * f:g}": Method(polar(factors.polar, base[0] * f)),
            f"PolarSGD, decayed @{base[0] * f * 5 / 3:.2g}": Method(
                polar(factors.polar, fast(base[0] * f * 5 / 3))
            ),
            f"PolarSGDM @{base[1] * f:g}": Method(polar(factors.polar, base[1] * f, 0.9)),
            f"PolarSGDM, decayed @{base[1] * f:g}": Method(
                polar(factors.polar, fast(base[1] * f), 0.9)
            ),
            f"PolarSGDM, polar first @{base[1] * f:g}": Method(
                polar(factors.polar, base[1] * f, 0.95, "polar_first")
            ),
            f"PolarSGDM, polar first, decayed @{base[1] * f:g}": Method(
                polar(factors.polar, fast(base[1] * f), 0.95, "polar_first")
            ),
            f"Muon @{base[2] * f:g}": Method(muon(base[2] * f)),
            f"Muon, exact @{base[2] * f:g}": Method(muon(base[2] * f, factors.exact)),
            f"Muon, decayed @{base[2] * f * 2:g}": Method(muon(fast(base[2] * f * 2))),
            f"Muon, exact, decayed @{base[2] * f * 2:g}": Method(
                muon(fast(base[2] * f * 2), factors.exact)
            ),
            f"Adam @{base[3] * f:g}": Method(optax.adam(base[3] * f)),
            f"Adam, decayed @{base[3] * f * 2:g}": Method(optax.adam(fast(base[3] * f * 2))),
        }
    return Problem(
        init, loss, measure, lambda params, data: params["x"], methods, 1500 if paper else 600
    )


def completion(paper: bool, factors: Factors) -> Problem:
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
        return polar(factors.polar, rate, 0.5, "polar_first")

    def fast(rate: float) -> optax.Schedule:
        return decayed(rate, 0.95)

    methods = {
        "PolarGrad": Method(polar(factors.polar, 50 * unit)),
        "PolarGrad, decayed": Method(polar(factors.polar, fast(50 * unit))),
        "PolarGradM": Method(polar(factors.polar, 50 * unit, 0.5)),
        "PolarGradM, polar first": Method(later(100 * unit)),
        "Muon": Method(muon(0.25)),
        "Muon, exact": Method(muon(0.25, factors.exact)),
        "Muon, decayed": Method(muon(fast(0.25))),
        "Muon, exact, decayed": Method(muon(fast(0.25), factors.exact)),
        "Adam": Method(optax.adam(0.05)),
        "Adam, decayed": Method(optax.adam(fast(0.05))),
        "gradient descent": Method(optax.sgd(50 * unit)),
    }
    if not paper:  # the published step is small here: both also at four times it
        methods |= {
            "PolarGrad, 4 times": Method(polar(factors.polar, 200 * unit)),
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
