"""Which way every objective points on average, and through how much noise: exactly.

All recipes of `pgjax.objectives` on small trees with two prompts whose every batch can be summed
over: dense and sparse rewards, an easy beside a hard prompt, rewards that go with length, prompts
with rewards of different size, samples that are some steps old, and a sampler that is not quite
the learner. Nothing is sampled and nothing is trained. Writes a picture, a table and all numbers;
exits with 1 if an objective that is documented as unbiased, or as exactly proportional to the
policy gradient, is not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import pgjax as pg
from experiments.shared import command_line, runs
from pgjax.diagnostics import lab_figure, laboratory, problems

LENGTH = 3
TOLERANCE = 1e-9


def token_index(rollout: pg.Rollout) -> Array:
    """Every token as a turn of its own."""
    return jnp.where(rollout.mask, jnp.arange(-1, rollout.mask.shape[1] - 1), -1)


def options_of(name: str, group_size: int) -> dict[str, Any]:
    """What a recipe cannot do without; one line a recipe, nothing for most."""
    needed: dict[str, dict[str, Any]] = {
        "adora": {"max_length": LENGTH + 1},
        "canon": {"length": LENGTH},
        "canon_entropy": {"length": LENGTH},
        "capo": {"learning_rate": 0.1, "gain_limit": 0.02, "shift_limit": 2e-3},
        "capo_adam": {
            "learning_rate": 0.1,
            "gain_limit": 0.05,
            "shift_limit": 2e-3,
            "vocab_size": 2,
            "hidden_size": 1,
        },
        "d3s": {"steps": 100},
        "dr_grpo": {"length": LENGTH},
        "empg": {"steps": token_index},
        "gcpo": {"length_reference": LENGTH},
        "hpt": {"length": LENGTH},
        "mixed": {"length": LENGTH, "coefficients": lambda rate: (jnp.ones_like(rate), 0 * rate)},
        "oblr_with_history": {"num_prompts": 2},
        "polychromic": {"group_size": group_size, "set_size": min(2, group_size)},
        "stratified_grpo": {"alpha": 0.5, "bucket_width": 1},
        "trloo": {"turn_ids": token_index},
    }
    return needed.get(name, {})


# Not policy gradients of a reward, so not on the map.
LEFT_OUT = frozenset({"supervised"})


def public_recipes() -> dict[str, Callable[..., pg.Objective]]:
    """Every function in a module of `pgjax.objectives` that makes an objective out of options."""
    found = {}
    for module in pkgutil.iter_modules(pg.objectives.__path__):
        if module.name.startswith("_"):
            continue
        members = vars(importlib.import_module(f"pgjax.objectives.{module.name}"))
        for name, function in members.items():
            if not inspect.isfunction(function) or name.startswith("_"):
                continue
            signature = inspect.signature(function)
            keywords = all(p.kind == p.KEYWORD_ONLY for p in signature.parameters.values())
            if signature.return_annotation == "Objective" and keywords:
                found[name] = function
    return {name: found[name] for name in sorted(found) if name not in LEFT_OUT}


def documented(recipe: Callable[..., pg.Objective]) -> str:
    """What the docstring claims of the expected gradient: `unbiased`, `proportional` or nothing."""
    text = " ".join((recipe.__doc__ or "").split())
    if re.search(r"Expected gradient: the policy gradient, unbiased", text):
        return "unbiased"
    if re.search(r"Expected gradient: `[^`]*` times the policy gradient", text):
        return "proportional"
    return ""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Rewards of the four sequences of each prompt, and three policies."""

    rewards: Any
    current: Any
    behavior: Any
    old: Any
    on_policy: bool = True

    @property
    def arrays(self) -> tuple[Array, ...]:
        values = (self.rewards, self.current, self.behavior, self.old)
        return tuple(jnp.asarray(x, float) for x in values)


def tree(rewards: Array) -> problems.TokenProblem:
    """Two prompts; token 1 goes on and token 0 ends, after at most three: 0, 10, 110, 111.

    The policy's parameters are its logits, `[prompt, position, token]`.
    """

    def roles(tokens: Array) -> Array:
        ones = jnp.ones_like(tokens[:, :1])
        going = jnp.cumprod(jnp.concatenate([0 * ones, ones, tokens[:, 1:-1]], 1)[:, 1:], axis=1)
        going = jnp.concatenate([0 * ones, going], axis=1)
        return jnp.where(going > 0, problems.POLICY, problems.NOBODY)

    def logits(params: Array, tokens: Array) -> Array:
        rows = params[tokens[:, 0]]
        return jnp.concatenate([jnp.zeros_like(rows[:, :1]), rows], axis=1)

    def extras(tokens: Array) -> dict[str, Array]:
        steps = tokens[:, 1:].sum(1)
        return {
            "strata": steps,
            "answer_ids": steps,
            "prompt_ids": tokens[:, 0],
            "used": tokens[:, 1] > 0,
            "demonstrated": jnp.zeros(tokens.shape[0], bool),
        }

    return problems.TokenProblem(
        num_prompts=2,
        num_actions=2,
        horizon=3,
        logits=logits,
        reward=lambda tokens: rewards[tokens[:, 0], tokens[:, 1:].sum(1)],
        roles=roles,
        extras=extras,
    )


def policy(going_on: Sequence[Sequence[float]]) -> np.ndarray:
    """Logits `[2, 3, 2]` from the log-odds of going on."""
    odds = np.asarray(going_on, float)
    return np.stack([np.zeros_like(odds), odds], axis=-1)


def ascended(params: np.ndarray, rewards: Any, steps: int, rate: float) -> np.ndarray:
    """Parameters after some steps of exact gradient ascent."""
    problem = tree(jnp.asarray(rewards, float))
    value = jax.jit(jax.grad(lambda p: _value(problem, p)))
    now = jnp.asarray(params, float)
    for _ in range(steps):
        now = now + rate * value(now)
    return np.asarray(now)


def _value(problem: problems.TokenProblem, params: Array) -> Array:
    with jax.ensure_compile_time_eval():
        return problems.expected_reward(problem, params)


@functools.cache
def settings() -> dict[str, Setting]:
    """The columns of the map, in float64."""
    with jax.enable_x64(True):
        return _settings()


def _settings() -> dict[str, Setting]:
    base = policy([[0.4, 0.0, 0.3], [0.9, 0.5, -0.4]])
    timid = policy([[0.4, 0.0, 0.3], [-0.6, 0.5, -0.4]])
    dense = [[0.1, 0.7, 0.4, 0.9], [0.8, 0.2, 0.5, 0.3]]
    sparse = [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
    easy_hard = [[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]
    lengthy = [[0.0, 0.2, 0.9, 0.8], [0.1, 0.0, 1.0, 0.7]]
    unequal = [[0.1, 0.7, 0.4, 0.9], [4.0, 1.0, 2.5, 1.5]]
    off = base + np.random.default_rng(0).normal(0.0, 0.25, base.shape)

    def at(rewards: Any, params: Any) -> Setting:
        return Setting(rewards, params, params, params)

    def stale(steps: int) -> Setting:
        now = ascended(base, dense, steps, rate=1.5)
        return Setting(dense, now, base, base, on_policy=False)

    return {
        "dense": at(dense, base),
        "sparse": at(sparse, base),
        "easy + hard": at(easy_hard, timid),
        "by length": at(lengthy, base),
        "unequal scale": at(unequal, base),
        "1 step old": stale(1),
        "4 steps old": stale(4),
        "other sampler": Setting(dense, base, off, base, on_policy=False),
    }


@dataclasses.dataclass(frozen=True)
class Config:
    """Every objective on every problem, by summing over all batches."""

    group_size: int = 4
    """Samples per prompt; 4^(2 G) batches are summed over."""
    recipes: tuple[str, ...] = ()
    """Names of the recipes to put on the map; default: all there are."""
    quick: bool = False
    """Groups of two, for a first look."""
    out: pathlib.Path = pathlib.Path("runs/estimator_atlas")
    """Directory for atlas.png and results.json."""


Reports = dict[str, dict[str, laboratory.EstimatorReport]]


def measure(config: Config) -> tuple[dict[str, str], Reports]:
    """What each recipe claims, and its report in each setting, in float64."""
    recipes = public_recipes()
    for name in config.recipes:
        if name not in recipes:
            raise ValueError(f"recipes: expected some of {', '.join(recipes)}, got {name!r}")
    chosen = {n: f for n, f in recipes.items() if not config.recipes or n in config.recipes}
    group_size = 2 if config.quick else config.group_size
    columns = settings()
    claims, reports = {}, {}
    with pg.train.metrics.progress(
        len(chosen), fields=("seconds", "residual"), description="objectives"
    ) as bar:
        for name, recipe in chosen.items():
            started = time.perf_counter()
            claims[name] = documented(recipe)
            objective = recipe(**options_of(name, group_size))
            run = jax.jit(functools.partial(_report, objective, group_size=group_size))
            reports[name] = {
                column: jax.device_get(run(*setting.arrays)) for column, setting in columns.items()
            }
            seen = max(float(r.expected.residual.value) for r in reports[name].values())
            bar.advance({"seconds": time.perf_counter() - started, "residual": seen})
    return claims, reports


def _report(
    objective: pg.Objective, rewards: Array, current: Array, behavior: Array, old: Array,
    *, group_size: int,
) -> laboratory.EstimatorReport:  # fmt: skip
    return laboratory.estimator_report(
        objective,
        tree(rewards),
        current,
        group_size=group_size,
        behavior_params=behavior,
        old_params=old,
    )


def broken_claims(claims: dict[str, str], reports: Reports) -> list[str]:
    """Documented properties that do not hold on-policy, each as a sentence."""
    found = []
    on_policy = [column for column, setting in settings().items() if setting.on_policy]
    for name, claim in claims.items():
        multiples = []
        for column in on_policy if claim else ():
            expected = reports[name][column].expected
            residual, scale = float(expected.residual.value), float(expected.scale.value)
            multiples.append(scale)
            if not residual <= TOLERANCE:  # NaN fails too
                found.append(f"{name}, {column}: residual {residual:.2e} off the policy gradient")
            if claim == "unbiased" and not abs(scale - 1) <= TOLERANCE:
                found.append(f"{name}, {column}: {scale:.6f} times the policy gradient")
        if claim and np.ptp(multiples) > TOLERANCE:
            found.append(f"{name}: not the same multiple of the policy gradient everywhere")
    return found


def in_order(claims: dict[str, str], reports: Reports) -> list[str]:
    """Documented ones first, then by the mean on-policy residual."""
    on_policy = [column for column, setting in settings().items() if setting.on_policy]
    rank = {"unbiased": 0, "proportional": 1, "": 2}

    def key(name: str) -> tuple[int, float, str]:
        residuals = [float(reports[name][c].expected.residual.value) for c in on_policy]
        mean = float(np.mean([r for r in residuals if np.isfinite(r)] or [1.0]))
        return rank[claims[name]], 0.0 if claims[name] else mean, name

    return sorted(reports, key=key)


def numbers(report: laboratory.EstimatorReport) -> dict[str, float | None]:
    """What results.json holds; None for what is not a number."""
    expected = report.expected
    found = {
        "bias_norm": expected.bias_norm,
        "norm_ratio": expected.norm_ratio,
        "cosine": expected.cosine,
        "scale": expected.scale,
        "residual": expected.residual,
        "variance": report.variance,
        "signal_to_noise": report.signal_to_noise,
        "clipped_cosine": report.clipped.cosine,
        "clipped_norm_ratio": report.clipped.norm_ratio,
    }
    values = {name: float(estimate.value) for name, estimate in found.items()}
    return {name: x if np.isfinite(x) else None for name, x in values.items()}


def main(arguments: list[str] | None = None) -> int:
    import rich

    config = command_line.parse(Config, "estimator_atlas", description=__doc__, arguments=arguments)
    started = time.perf_counter()
    try:
        with jax.enable_x64(True):
            claims, reports = measure(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written. The same command starts again.", file=sys.stderr)
        return 130
    order = in_order(claims, reports)
    columns = list(settings())
    rows = [
        {"objective": name, "documented": claims[name]}
        | {c: _percent(float(reports[name][c].expected.residual.value)) for c in columns}
        for name in order
    ]
    title = "Share of the expected gradient off the policy gradient, % (0: exact in direction)"
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    broken = broken_claims(claims, reports)
    for sentence in broken:
        rich.print(f"[red]no [/] {sentence}")
    if not broken:
        kept = sum(bool(claim) for claim in claims.values())
        rich.print(f"[green]yes[/] all {kept} documented expectations hold to {TOLERANCE:g}")

    some = next(iter(next(iter(reports.values())).values()))
    batches = int(some.num_batches)
    runs_out = config.out
    runs_out.mkdir(parents=True, exist_ok=True)
    runs.write_json(
        runs_out / "results.json",
        {
            "config": dataclasses.asdict(config),
            "batches": batches,
            "seconds": time.perf_counter() - started,
            "documented": {name: claims[name] for name in order},
            "broken": broken,
            "results": {n: {c: numbers(reports[n][c]) for c in columns} for n in order},
        },
    )
    lab_figure.draw_atlas(
        {name: reports[name] for name in order},
        runs_out / "atlas.png",
        title="An atlas of policy-gradient estimators",
        note=f"Exact expectations in float64 over all {batches:,} batches of each problem. Green: "
        "the direction of the policy gradient; ● documented as unbiased, ○ as proportional to it. "
        "–: none.",
        marks={
            name: {"unbiased": "●", "proportional": "○"}.get(c, "") for name, c in claims.items()
        },
    )
    rich.print(f"  {runs_out / 'results.json'}\n  {runs_out / 'atlas.png'}")
    return 1 if broken else 0


def _percent(residual: float) -> str:
    if np.isnan(residual):
        return "–"
    return "0" if residual < TOLERANCE else f"{100 * residual:.1f}"


if __name__ == "__main__":
    sys.exit(main())
