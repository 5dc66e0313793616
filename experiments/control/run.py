"""A run: an agent on an environment, many seeds at once, in parts that can be resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pgjax as pg
from experiments.control import pictures, worlds
from experiments.shared import runs
from pgjax import envs, sampling
from pgjax.agents import Agent
from pgjax.diagnostics import intervals

RUNS = pathlib.Path("runs")


@dataclasses.dataclass(frozen=True)
class Config:
    """What every agent's run has."""

    env: str = "CartPole-v1"
    """An environment's name; an unknown one lists those there are."""
    seeds: int = 5
    """Independent runs, all at once."""
    first_seed: int = 0
    """The others follow it."""
    steps: int = 500_000
    """Environment steps of each seed; rounded up to whole parts."""
    parts: int = 20
    """Into which the run is cut: progress is shown and a checkpoint written after each."""
    episodes: int = 20
    """Of each seed without exploration, at the end."""
    out: pathlib.Path | None = None
    """Directory of results; default: the next number under runs/<agent>."""
    resume: bool = False
    """Continue the run in --out, or the newest one."""
    wandb: str | None = None
    """Project in which Weights & Biases also gets the metrics, where it is installed."""


_Config = TypeVar("_Config", bound=Config)
MakeAgent = Callable[[envs.Environment, int, _Config], Agent]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seeds:
    """All seeds after `step` parts, and what they have met, NaN where they have not been yet."""

    step: Array
    agents: Any
    returns: Float[Array, "S U"]

    @property
    def params(self) -> Any:
        """What the loop asks of whether it is finite."""
        learner = getattr(self.agents, "learner", self.agents)
        return learner.params


class Nothing:
    """The batches of an agent that collects its own."""

    def __next__(self) -> None:
        return None

    def get_state(self) -> None:
        return None

    def set_state(self, state: Any) -> None:
        del state


class Result(NamedTuple):
    """What a run came to, by seed.

    Attributes:
      returns: mean return of the episodes that ended in each update, `[S, U]`.
      final: mean over the last tenth of the updates.
      greedy: mean return without exploration.
      seconds: of this sitting's training, compilation included.
    """

    returns: Float[np.ndarray, "S U"]
    final: Float[np.ndarray, " S"]
    greedy: Float[np.ndarray, " S"]
    seconds: float


def sizes(config: Config, steps_of_update: int) -> tuple[int, int]:
    """Updates of each part, and parts."""
    updates = max(1, math.ceil(config.steps / steps_of_update))
    parts = min(config.parts, updates)
    return math.ceil(updates / parts), parts


def run(
    name: str,
    config: _Config,
    make_agent: MakeAgent[_Config],
    load: Callable[[str], tuple[envs.Environment, float | None]] = worlds.vectors,
) -> int:
    """Trains, evaluates, and says what came of it; 0, or 1 where the environment is not solved."""
    for field in ("seeds", "steps", "parts", "episodes"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field}: expected at least 1, got {getattr(config, field)}")
    env, solved = load(config.env)
    probe = make_agent(env, 1, config)  # for its steps; an annealed rate needs to know the updates
    updates, parts = sizes(config, probe.steps)
    agent = make_agent(env, updates * parts, config)
    directory = config.out or runs.next_run(RUNS / name)
    runs.claim(directory, config)
    began = time.perf_counter()
    agents, returns = learn(agent, config, directory, updates, parts)
    seconds = time.perf_counter() - began
    greedy = evaluate(agent, env, agents, config)
    last = returns[:, -max(1, returns.shape[1] // 10) :]
    final = np.array([_mean(row) for row in last])
    result = Result(returns, final, greedy, seconds)
    report(name, env, agent, agents, config, directory, result, solved)
    return 0 if solved is None or float(np.mean(final)) >= solved else 1


def learn(
    agent: Agent, config: Config, directory: pathlib.Path, updates: int, parts: int
) -> tuple[Any, Float[np.ndarray, "S U"]]:
    """The agents' states and returns after all parts, from the newest checkpoint on."""
    keys = jax.vmap(jax.random.key)(config.first_seed + jnp.arange(config.seeds))

    def begin(keys: Array) -> Seeds:
        empty = jnp.full((config.seeds, updates * parts), jnp.nan)
        # One after the other: a batch of orthogonal matrices takes twice as long to compile.
        return Seeds(jnp.int32(0), jax.lax.map(agent.init, keys), empty)

    def part(state: Seeds) -> tuple[Seeds, dict[str, Array]]:
        train = jax.vmap(lambda x: pg.agents.train(agent, x, num_updates=updates))
        agents, metrics = train(state.agents)
        start = (0, state.step * updates)
        returns = jax.lax.dynamic_update_slice(state.returns, metrics["return"], start)
        found = {name: jnp.nanmean(x) for name, x in metrics.items()}
        return Seeds(state.step + 1, agents, returns), found

    compiled = jax.jit(part, donate_argnums=0)

    def step(state: Any, _: None) -> tuple[Any, dict[str, Any]]:
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state))
        steps = config.seeds * updates * agent.steps
        return state, metrics | {"steps/s": steps / (time.perf_counter() - started)}

    writer = pg.train.metrics.MetricsWriter(directory, wandb=config.wandb)
    with pg.train.checkpoints.open(directory / "checkpoints", keep_last=2) as saved:
        state: Any = jax.jit(begin)(keys)
        if saved.latest_step() is not None:
            state, _ = saved.restore(like=state)
        writer.truncate_after(int(state.step), phase="train", phases=("train",))
        try:
            state = pg.train.fit(
                step,
                state,
                Nothing(),
                num_steps=parts,
                phase="train",
                writer=writer,
                checkpoints=saved,
                checkpoint_every=1,
                progress_fields=("return", "length", "entropy", "steps/s"),
            )
        finally:
            writer.close()
    return state.agents, np.asarray(state.returns)


def evaluate(
    agent: Agent, env: envs.Environment, agents: Any, config: Config
) -> Float[np.ndarray, " S"]:
    """Mean return of the first episodes of as many environments, without exploration."""

    def of(state: Any, key: Array) -> Array:
        return jnp.nanmean(
            sampling.episode_returns(
                env,
                lambda key, observation: agent.act(state, key, observation),
                key,
                num_episodes=config.episodes,
            )
        )

    keys = jax.random.split(jax.random.key(config.first_seed + 10_000), config.seeds)
    return np.asarray(jax.jit(jax.vmap(of))(agents, keys))


def report(
    name: str,
    env: envs.Environment,
    agent: Agent,
    agents: Any,
    config: Config,
    directory: pathlib.Path,
    result: Result,
    solved: float | None,
) -> None:
    """Table, curve, a drawn episode, and where all of it lies."""
    import rich

    rows: list[dict[str, Any]] = [
        {
            "seed": str(config.first_seed + i),
            "return, last tenth": f"{result.final[i]:.1f}",
            "without exploration": f"{result.greedy[i]:.1f}",
        }
        for i in range(config.seeds)
    ]
    summary = {
        "return, last tenth": _with_interval(result.final),
        "without exploration": _with_interval(result.greedy),
    }
    rows.append({"seed": "interquartile mean [95%]", **summary})
    rich.print(pg.train.metrics.summary_table(rows, title=f"{name} on {env.name}"))
    total = config.seeds * result.returns.shape[1] * agent.steps
    rich.print(f"{total:,} steps of all seeds; this sitting {result.seconds:.1f} s")
    if solved is not None:
        mean = float(np.mean(result.final))
        mark = "[green]yes[/]" if mean >= solved else "[red]no [/]"
        rich.print(f"{mark} mean return of the last tenth {mean:.1f} (solved from {solved:g})")
    files = [directory / "results.json", directory / "curves.png"]
    runs.write_json(
        files[0],
        {
            "config": json.loads((directory / "config.json").read_text()),
            "final": result.final.tolist(),
            "greedy": result.greedy.tolist(),
            "returns": result.returns.tolist(),
        },
    )
    x, curves = smoothed(result.returns)
    steps = (1 + x) * agent.steps
    panels = {
        "return": {
            name: (steps, np.mean(curves, 0), np.min(curves, 0), np.max(curves, 0)),
        }
    }
    pg.train.metrics.plot_curves(
        panels, files[1], x_label="environment steps", title=f"{name} on {env.name}"
    )
    first = jax.tree.map(lambda leaf: leaf[0], agents)
    drawn = pictures.episode(env, lambda key, o: agent.act(first, key, o), directory / "episode")
    for path in [*files, *drawn, directory / "metrics.jsonl", directory / "checkpoints"]:
        rich.print(f"  {path}")


def smoothed(returns: Float[np.ndarray, "S U"]) -> tuple[np.ndarray, Float[np.ndarray, "S K"]]:
    """Means over hundredths of the run; updates in which no episode ended have no say."""
    bins = np.array_split(np.arange(returns.shape[1]), min(100, returns.shape[1]))
    found = np.array([[_mean(row[b]) for b in bins] for row in returns])
    return np.array([b[-1] for b in bins]), found


def _mean(x: np.ndarray) -> float:
    known = x[np.isfinite(x)]
    return float(known.mean()) if known.size else math.nan


def _with_interval(scores: Float[np.ndarray, " S"]) -> str:
    mean = float(intervals.interquartile_mean(jnp.asarray(scores)))
    if len(scores) < 2:
        return f"{mean:.1f}"
    low, high = intervals.stratified_bootstrap(
        jnp.asarray(scores)[:, None], intervals.interquartile_mean, jax.random.key(0)
    )
    return f"{mean:.1f} [{float(low):.1f}, {float(high):.1f}]"


def main(
    name: str,
    default: _Config,
    make_agent: MakeAgent[_Config],
    *,
    description: str | None,
    arguments: Sequence[str] | None = None,
    load: Callable[[str], tuple[envs.Environment, float | None]] = worlds.vectors,
) -> int:
    """Runs an agent from the command line, on an environment as `load` makes it of its name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    where = runs.peek(given, "--out")
    try:
        config = runs.parse(
            type(default),
            given,
            presets={"default": default},
            default_preset="default",
            root=RUNS / name,
            program=name,
            description=description,
        )
        return run(name, config, make_agent, load)
    except pg.train.Interrupted as stop:
        again = "" if where is None else f" --out {where}"
        print(f"\n{stop}. Continue with:\n  python -m experiments.{name} --resume{again}")
        return 128 + stop.signal_number
    except pg.train.NonFinite as stuck:
        print(f"\n{stuck}; try a lower learning rate", file=sys.stderr)
        return 3
    except runs.USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
