"""Ways to train, judged from the same warmed-up models of the main job and at equal tokens.

For each task and seed one supervised warm-up; from it one reinforcement run per method. Methods
that write longer completions use more tokens, so accuracies are compared at the tokens that all
have used. Scores are interquartile means over seeds and tasks, with stratified bootstrap intervals
(arXiv 2108.13264), and their difference to a baseline's from the same warm-ups. Where a method has
several settings, one is chosen on a seed of its own that enters no score. What is finished is not
run again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np

import pgjax as pg
from experiments.random_calculation import config as main_job
from experiments.random_calculation import run as job
from experiments.random_calculation.comparison_report import Curve, report
from experiments.shared import command_line, runs

SEARCH_SEED = 1000
SMALL = main_job.Model(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_size=256)
TINY = main_job.Model(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_size=32)
Preset = Literal["quick", "cpu", "gpu"]


@dataclasses.dataclass(frozen=True)
class Common:
    """What every comparison has: tasks, seeds and the size of a run."""

    preset: Preset = "cpu"
    """Defaults for a kind of machine; any other flag overrides them."""
    tasks: tuple[Literal["micro9", "micro19", "mini99"], ...] = ("micro9", "micro19")
    """Data presets; each is a stratum of the bootstrap."""
    seeds: int = 3
    """Seeds 0, 1, ... of every task: initialisation, warm-up and reinforcement."""
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
    out: pathlib.Path = pathlib.Path("runs/comparison")
    """Directory; what is finished there is not run again."""
    data_dir: pathlib.Path | None = None
    """Where data sets live; default: TFDS_DATA_DIR or ~/tensorflow_datasets."""


QUICK: dict[str, Any] = {
    "preset": "quick", "tasks": ("micro9",), "seeds": 2, "steps": 2, "prompts": 2, "samples": 2,
    "levels": (1,), "warmup_steps": 2, "validation_prompts": 4, "every": 1, "model": TINY,
}  # fmt: skip
GPU: dict[str, Any] = {
    "preset": "gpu", "tasks": ("micro9", "micro19", "mini99"), "seeds": 5, "steps": 300,
    "prompts": 64, "samples": 16, "levels": (1, 2, 3, 4), "warmup_steps": 1000,
    "validation_prompts": 256, "every": 30, "model": main_job.PRESETS["gpu"].model,
}  # fmt: skip


def run_config(
    config: Common, task: str, seed: int, label: str, rl: Mapping[str, Any], **changes: Any
) -> main_job.Config:
    """The main job's settings for the run of that label, with what it alone has."""
    return main_job.Config(
        data_preset=task,  # type: ignore[arg-type]
        seed=seed,
        out=config.out / task / f"seed{seed}" / label,
        data_dir=config.data_dir,
        warmup_from=warmup_directory(config.out, task, seed),
        show_every=0,
        model=config.model,
        warmup=main_job.Warmup(steps=config.warmup_steps, levels=config.levels),
        rl=main_job.RL(
            steps=config.steps,
            prompts=config.prompts,
            samples=config.samples,
            levels=config.levels,
            microbatches=1,
            **rl,
        ),
        evaluation=main_job.Evaluation(
            levels=config.levels,
            test_prompts=config.validation_prompts,
            validation_prompts=config.validation_prompts,
            every=config.every,
        ),
        **changes,
    )


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is compared."""

    baseline: str
    candidates: Mapping[str, Sequence[Any]]
    """Of each method, the baseline among them, the settings its own is chosen from."""
    tasks: Sequence[str]
    seeds: int
    settings: Callable[[str, int, str, Any], main_job.Config]
    """Of a task, a seed, a method and its setting, the run, in a directory of its own."""
    out: pathlib.Path

    def __post_init__(self) -> None:
        if self.seeds < 1 or not self.tasks:
            raise ValueError("seeds, tasks: expected at least one each")
        if self.baseline not in self.candidates or not all(self.candidates.values()):
            raise ValueError(f"candidates: expected {self.baseline!r}, and settings for every one")


def warmup_directory(out: pathlib.Path, task: str, seed: int) -> pathlib.Path:
    return out / task / f"seed{seed}" / "warmup"


def warm_up(contest: Contest, task: str, seed: int) -> None:
    """The model that all methods of this task and seed start from."""
    setting = contest.candidates[contest.baseline][0]
    settings = contest.settings(task, seed, contest.baseline, setting)
    out = warmup_directory(contest.out, task, seed)
    settings = dataclasses.replace(
        settings, out=out, warmup_from=None, resume=(out / "config.json").exists()
    )
    _check_same(settings)
    this = job.Run(settings)
    job.warmed_up(this)
    this.close()


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


def trained(settings: main_job.Config) -> Curve:
    """Runs what is not finished yet, and reads what it came to."""
    assert settings.out is not None
    _check_same(settings)
    if not (settings.out / "results.json").exists():
        job.run(dataclasses.replace(settings, resume=(settings.out / "config.json").exists()))
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


def choose(contest: Contest, method: str, say: Callable[[str], None]) -> Any:
    """The setting with the best mean final accuracy over tasks, on the search's own seed."""
    settings = contest.candidates[method]
    if len(settings) == 1:
        return settings[0]
    final = []
    for setting in settings:
        ends = []
        for task in contest.tasks:
            say(f"search: {method} at {setting} on {task}")
            ends.append(trained(contest.settings(task, SEARCH_SEED, method, setting)).accuracy[-1])
        final.append(np.mean(ends))
    return settings[int(np.argmax(final))]


def compare(contest: Contest) -> tuple[dict[str, list[list[Curve]]], dict[str, Any]]:
    """Curves `[seed][task]` and the setting of every method."""
    searches = {m: len(s) for m, s in contest.candidates.items() if len(s) > 1}
    seeds = [*([SEARCH_SEED] if searches else []), *range(contest.seeds)]
    warmups = [(task, seed) for task in contest.tasks for seed in seeds]
    runs_each = contest.seeds * len(contest.candidates) + sum(searches.values())
    total = len(warmups) + len(contest.tasks) * runs_each
    done = 0

    def say(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {text}", flush=True)

    for task, seed in warmups:
        say(f"warm-up on {task}, seed {seed}")
        warm_up(contest, task, seed)
    curves: dict[str, list[list[Curve]]] = {}
    chosen: dict[str, Any] = {}
    for method in contest.candidates:
        chosen[method] = choose(contest, method, say)
        curves[method] = []
        for seed in range(contest.seeds):
            row = []
            for task in contest.tasks:
                say(f"{method} on {task}, seed {seed}")
                row.append(trained(contest.settings(task, seed, method, chosen[method])))
            curves[method].append(row)
    return curves, chosen


_Config = TypeVar("_Config", bound=Common)


def main(
    presets: Mapping[str, _Config],
    contest: Callable[[_Config], Contest],
    program: str,
    description: str | None,
    arguments: list[str] | None,
) -> int:
    """Compares, prints a table and draws a figure; says what went wrong, or how to go on."""
    arguments = sys.argv[1:] if arguments is None else arguments
    default = presets.get(runs.peek(arguments, "--preset") or "cpu", presets["cpu"])
    config = command_line.parse(
        type(default), program, description=description, arguments=arguments, default=default
    )
    try:
        this = contest(config)
        _share_compilations(config.out / "compiled")
        curves, chosen = compare(this)
    except pg.train.Interrupted as stop:
        print(f"\n{stop}. The same command goes on from there.")
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("\ninterrupted. The same command goes on from there.", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(
        curves,
        baseline=this.baseline,
        chosen=chosen,
        searched=any(len(settings) > 1 for settings in this.candidates.values()),
        tasks=this.tasks,
        config=config,
        out=this.out,
    )
    return 0


def _share_compilations(directory: pathlib.Path) -> None:
    """Keeps compiled programs, which runs have in common, where none are kept already."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
