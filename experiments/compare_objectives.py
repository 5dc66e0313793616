"""Every objective from the same warm-up, on the same data, for the same number of tokens.

For each task and seed one supervised warm-up on RandomCalculation; from it one reinforcement run
per recipe, with prompts in the same order and the same number of completions. Methods that write
longer completions use more tokens, so accuracies are compared at the tokens that all have used.
Scores are interquartile means over seeds and tasks, with stratified bootstrap intervals
(arXiv 2108.13264), and their difference to GRPO's from the same warm-ups.

Nothing is tuned for one method only: all have the same optimizer, and where several learning rates
are given, each recipe's is chosen from the same list, on a seed of its own that enters no score.
What is finished is not run again: the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import pgjax as pg
from experiments.random_calculation import config as main_job
from experiments.random_calculation import run as job
from experiments.shared import runs
from experiments.shared.objectives import ObjectiveName
from pgjax.diagnostics import intervals

RECIPES: tuple[str, ...] = typing.get_args(ObjectiveName)
BASELINE = "grpo"
# Options without which a recipe cannot be made; the defaults stand for everything else.
OPTIONS: dict[str, tuple[str, ...]] = {
    "capo": ("learning_rate=2e-4",),
    "gcpo": ("length_reference=64",),
    "stratified_grpo": ("alpha=0.5", "bucket_width=8"),
}
SEARCH_SEED = 1000
SMALL = main_job.Model(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_size=256)

Preset = Literal["quick", "cpu", "gpu"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Recipes from the same warmed-up models."""

    preset: Preset = "cpu"
    """Defaults for a kind of machine; any other flag overrides them."""
    recipes: tuple[str, ...] = RECIPES
    """What is compared; GRPO always is."""
    tasks: tuple[Literal["micro9", "micro19", "mini99"], ...] = ("micro9", "micro19")
    """Data presets; each is a stratum of the bootstrap."""
    seeds: int = 3
    """Seeds 0, 1, ... of every task: initialisation, warm-up and reinforcement."""
    learning_rates: tuple[float, ...] = (4e-4,)
    """The search space, the same for every recipe; one value: no search."""
    steps: int = 60
    """Reinforcement steps of every run."""
    prompts: int = 16
    """Prompts per step."""
    samples: int = 8
    """Completions per prompt."""
    levels: tuple[int, ...] = (1, 2, 3)
    """Levels that are trained and judged."""
    warmup_steps: int = 300
    """Supervised steps before."""
    validation_prompts: int = 64
    """Held-out prompts per level in every point of a learning curve."""
    every: int = 15
    """Steps between points of a learning curve."""
    model: main_job.Model = SMALL
    out: pathlib.Path = pathlib.Path("runs/compare_objectives")
    """Directory; what is finished there is not run again."""
    data_dir: pathlib.Path | None = None
    """Where data sets live; default: TFDS_DATA_DIR or ~/tensorflow_datasets."""


PRESETS = {
    "quick": Config(
        preset="quick",
        recipes=("grpo", "rloo"),
        tasks=("micro9",),
        seeds=2,
        steps=2,
        prompts=2,
        samples=2,
        levels=(1,),
        warmup_steps=2,
        validation_prompts=4,
        every=1,
        model=main_job.Model(
            hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_size=32
        ),
    ),
    "cpu": Config(),
    "gpu": Config(
        preset="gpu",
        tasks=("micro9", "micro19", "mini99"),
        seeds=5,
        learning_rates=(1e-4, 2e-4, 4e-4),
        steps=300,
        prompts=64,
        samples=16,
        levels=(1, 2, 3, 4),
        warmup_steps=1000,
        validation_prompts=256,
        every=30,
        model=main_job.PRESETS["gpu"].model,
    ),
}


def run_config(
    config: Config, task: str, seed: int, recipe: str, learning_rate: float
) -> main_job.Config:
    """The main job's settings for one run."""
    root = config.out / task / f"seed{seed}"
    out = root / (recipe if len(config.learning_rates) == 1 else f"{recipe}_{learning_rate:g}")
    return main_job.Config(
        objective=recipe,  # type: ignore[arg-type]
        objective_options=OPTIONS.get(recipe, ()),
        data_preset=task,  # type: ignore[arg-type]
        seed=seed,
        out=out,
        resume=(out / "config.json").exists(),
        data_dir=config.data_dir,
        warmup_from=root / "warmup",
        show_every=0,
        model=config.model,
        warmup=main_job.Warmup(steps=config.warmup_steps, levels=config.levels),
        rl=main_job.RL(
            steps=config.steps,
            prompts=config.prompts,
            samples=config.samples,
            levels=config.levels,
            learning_rate=learning_rate,
            microbatches=1,
        ),
        evaluation=main_job.Evaluation(
            levels=config.levels,
            test_prompts=config.validation_prompts,
            validation_prompts=config.validation_prompts,
            every=config.every,
        ),
    )


def warm_up(config: Config, task: str, seed: int) -> None:
    """The model that all recipes of this task and seed start from."""
    settings = run_config(config, task, seed, BASELINE, config.learning_rates[0])
    out = config.out / task / f"seed{seed}" / "warmup"
    settings = dataclasses.replace(
        settings, out=out, warmup_from=None, resume=(out / "config.json").exists()
    )
    _check_same(settings)
    this = job.Run(settings)
    job.warmed_up(this)
    this.writer.close()


def _check_same(settings: main_job.Config) -> None:
    assert settings.out is not None
    path = settings.out / "config.json"
    if not path.exists():
        return
    wanted = json.dumps(
        dataclasses.asdict(dataclasses.replace(settings, resume=False)), default=str
    )
    if json.loads(path.read_text()) != json.loads(wanted):
        raise ValueError(
            f"{settings.out}: holds a run with other settings; pass another --out, or remove it"
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy on held-out problems, mean over levels, by sampled tokens; and on the test's."""

    tokens: Float[np.ndarray, " N"]
    accuracy: Float[np.ndarray, " N"]
    test_before: float
    test_after: float

    def at(self, tokens: float) -> float:
        return float(np.interp(tokens, self.tokens, self.accuracy))


def trained(settings: main_job.Config) -> Curve:
    """Runs what is not finished yet, and reads what it came to."""
    assert settings.out is not None
    _check_same(settings)
    if not (settings.out / "results.json").exists():
        job.run(settings)
    results = json.loads((settings.out / "results.json").read_text())
    records = pg.train.metrics.read_metrics(settings.out)
    steps, tokens = runs.curve(records, "rl", "tokens")
    points, accuracy = runs.curve(records, "rl_evaluation", "accuracy")
    used = np.concatenate([[0.0], np.cumsum(tokens)])
    before, after = (
        float(np.mean([level["average"] for level in results[when].values()]))
        for when in ("before", "after")
    )
    # A curve starts with the warmed-up model, which has been tested before the first step.
    start = () if points.size and points[0] == 0 else (0,)
    at = np.concatenate([start, points]).astype(int)
    steps = np.concatenate([[0], steps])
    used_at = np.interp(at, steps, used)
    values = np.concatenate([[before] * len(start), accuracy])
    return Curve(used_at, values, before, after)


def chosen_rate(config: Config, recipe: str) -> float:
    """The learning rate with the best mean final accuracy over tasks, on the search's own seed."""
    rates = config.learning_rates
    if len(rates) == 1:
        return rates[0]
    final = [
        np.mean(
            [
                trained(run_config(config, task, SEARCH_SEED, recipe, rate)).accuracy[-1]
                for task in config.tasks
            ]
        )
        for rate in rates
    ]
    return rates[int(np.argmax(final))]


def compare(config: Config) -> tuple[dict[str, list[list[Curve]]], dict[str, float]]:
    """Curves `[seed][task]` and the learning rate of every recipe."""
    recipes = tuple(dict.fromkeys((BASELINE, *config.recipes)))
    for name in recipes:
        if name not in RECIPES:
            raise ValueError(f"recipes: expected some of {', '.join(RECIPES)}, got {name!r}")
    searched = [SEARCH_SEED] if len(config.learning_rates) > 1 else []
    # Warm-ups and searches are steps of the bar too, so that it moves evenly.
    warmups = [(task, seed) for task in config.tasks for seed in [*searched, *range(config.seeds)]]
    curves: dict[str, list[list[Curve]]] = {}
    rates: dict[str, float] = {}
    total = len(warmups) + len(recipes) * config.seeds * len(config.tasks)
    done = 0

    def say(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {text}", flush=True)

    for task, seed in warmups:
        say(f"warm-up on {task}, seed {seed}")
        warm_up(config, task, seed)
    for recipe in recipes:
        rates[recipe] = chosen_rate(config, recipe)
        curves[recipe] = []
        for seed in range(config.seeds):
            row = []
            for task in config.tasks:
                say(f"{recipe} on {task}, seed {seed}")
                row.append(trained(run_config(config, task, seed, recipe, rates[recipe])))
            curves[recipe].append(row)
    return curves, rates


def scores_at_equal_tokens(
    curves: dict[str, list[list[Curve]]],
) -> tuple[dict[str, Float[np.ndarray, "R K"]], Float[np.ndarray, "R K"]]:
    """Accuracy of each recipe at the tokens all of them have used; and those tokens."""
    budget = np.array([[[c.tokens[-1] for c in row] for row in rows] for rows in curves.values()])
    budget = budget.min(0)
    scores = {
        name: np.array(
            [[curve.at(budget[i, k]) for k, curve in enumerate(row)] for i, row in enumerate(rows)]
        )
        for name, rows in curves.items()
    }
    return scores, budget


def with_interval(values: Float[np.ndarray, "R K"]) -> tuple[float, float, float]:
    """Interquartile mean and its stratified bootstrap interval."""
    scores = jnp.asarray(values)
    middle = float(intervals.interquartile_mean(scores))
    low, high = intervals.stratified_bootstrap(
        scores, intervals.interquartile_mean, jax.random.key(0)
    )
    return middle, float(low), float(high)


def main(arguments: list[str] | None = None) -> int:
    import rich
    import tyro

    arguments = sys.argv[1:] if arguments is None else arguments
    preset = PRESETS.get(runs.peek(arguments, "--preset") or "cpu", PRESETS["cpu"])
    config = tyro.cli(
        Config,
        args=arguments,
        default=preset,
        prog="python -m experiments.compare_objectives",
        description=__doc__,
    )
    if config.seeds < 1 or not config.learning_rates or not config.tasks:
        print("error: seeds, learning_rates, tasks: expected at least one each", file=sys.stderr)
        return 2
    _share_compilations(config.out / "compiled")
    try:
        curves, rates = compare(config)
    except pg.train.Interrupted as stop:
        print(f"\n{stop}. The same command goes on from there.")
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on from there.", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores, budget = scores_at_equal_tokens(curves)
    summary = {name: with_interval(values) for name, values in scores.items()}
    gains = {name: with_interval(values - scores[BASELINE]) for name, values in scores.items()}
    order = sorted(summary, key=lambda name: -summary[name][0])
    rows = [
        {
            "recipe": name,
            "IQM % [95%]": _percent(summary[name]),
            f"minus {BASELINE}": "" if name == BASELINE else _percent(gains[name], sign=True),
            "test % before": f"{100 * _mean(curves[name], 'test_before'):.1f}",
            "test % after": f"{100 * _mean(curves[name], 'test_after'):.1f}",
            "tokens": int(_mean_tokens(curves[name])),
        }
        | ({"rate": f"{rates[name]:g}"} if len(config.learning_rates) > 1 else {})
        for name in order
    ]
    title = (
        f"Held-out accuracy after {int(budget.mean()):,} sampled tokens, {config.seeds} seeds "
        f"on {', '.join(config.tasks)}"
    )
    rich.print(pg.train.metrics.summary_table(rows, title=title))
    runs.write_json(
        config.out / "results.json",
        {
            "config": dataclasses.asdict(config),
            "tokens": budget.tolist(),
            "scores": {name: scores[name].tolist() for name in order},
            "interquartile_mean": {name: summary[name] for name in order},
            f"minus_{BASELINE}": {name: gains[name] for name in order},
            "learning_rates": rates,
        },
    )
    _plot(config.out / "comparison.png", order, summary, gains, title)
    rich.print(f"  {config.out / 'results.json'}\n  {config.out / 'comparison.png'}")
    return 0


def _share_compilations(directory: pathlib.Path) -> None:
    """Keeps compiled programs, which runs have in common, where none are kept already."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _percent(numbers: tuple[float, float, float], *, sign: bool = False) -> str:
    middle, low, high = (100 * x for x in numbers)
    return (
        f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
        if sign
        else f"{middle:.1f} [{low:.1f}, {high:.1f}]"
    )


def _mean(rows: list[list[Curve]], name: str) -> float:
    return float(np.mean([[getattr(curve, name) for curve in row] for row in rows]))


def _mean_tokens(rows: list[list[Curve]]) -> float:
    return float(np.mean([[curve.tokens[-1] for curve in row] for row in rows]))


def _plot(
    path: pathlib.Path,
    order: list[str],
    summary: dict[str, tuple[float, float, float]],
    gains: dict[str, tuple[float, float, float]],
    title: str,
) -> None:
    """Scores and differences with their intervals, best first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 0.26 * len(order) + 1.5))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    panels: list[tuple[Any, str]] = [
        (summary, "interquartile mean accuracy, %"),
        (gains, f"difference to {BASELINE}, points"),
    ]
    rows = np.arange(len(order))
    for axis, (numbers, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        middle, low, high = 100 * np.array([numbers[name] for name in order]).T
        axis.hlines(rows, low, high, color="#8fb3d9", linewidth=5, capstyle="round")
        axis.plot(middle, rows, "o", color="#1f4e79", markersize=5)
        axis.set_xlabel(label, fontsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8.5, length=0)
        if numbers is gains:
            axis.axvline(0, color="#555555", linewidth=0.8)
    axis.set_yticks(rows, order)
    axis.set_ylim(len(order) - 0.4, -0.6)
    figure.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    sys.exit(main())
