"""HPT (arXiv 2509.04419): imitate where nothing succeeds yet, reinforce everywhere else.

Prompts ask for a style and two tokens out of 32; each has one right answer in each of three styles.
Half of the prompts are easy: the policy already succeeds half of the time, in two styles of its
own. The others are hard: it succeeds once in 10,000 times. Demonstrations are all in the third
style, and one in ten ends in a wrong token (with flawless ones nothing would limit imitation by a
table of logits). One demonstration a prompt and step, or none for GRPO; accuracies are exact.

Compared, each at its best learning rate of one grid (by the mean of easy and hard accuracy on other
seeds): imitation, GRPO, imitation then GRPO (half of the steps each), both losses added up, LUFFY,
HPT's switch and its gradual switch. Only LUFFY looks at the rewards of demonstrations, and so
does not imitate wrong ones.

Exits 1 unless HPT has the best accuracy on hard prompts among the methods whose easy accuracy is
within 2 points of GRPO's, and finds the styles that were not demonstrated more often in 8 samples
than imitation does.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

import pgjax as pg
from experiments.shared import reproduction
from pgjax.advantages import hybrid
from pgjax.diagnostics import problems
from pgjax.objectives import hybrid as recipes

STYLES = 3
DEMONSTRATED = 0
METHODS = ("imitation", "GRPO", "imitation, then GRPO", "sum", "LUFFY", "HPT", "HPT gradual")


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: int = 8
    """Easy ones, and as many hard ones."""
    digits: int = 2
    """Tokens of an answer, after its style."""
    actions: int = 32
    """Tokens to choose from."""
    group_size: int = 8
    """Own samples per prompt and step."""
    demonstration_accuracy: float = 0.9
    """Share of demonstrations that are right."""
    steps: int = 200
    """Updates."""
    every: int = 10
    """Updates between measurements."""
    rates: tuple[float, ...] = (90.0, 270.0)
    """Learning rates tried for every method."""
    seeds: int = 5
    """Runs that are reported."""
    tuning_seeds: int = 2
    """Further runs on which learning rates are chosen."""
    out: pathlib.Path = pathlib.Path("runs/hpt_hybrid")
    """Directory of results."""
    quick: bool = False
    """Few prompts, steps and methods, one rate."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The problem, its right answers `[P, styles, 1 + digits]`, and which prompts are easy."""

    problem: problems.TokenProblem
    answers: Int[np.ndarray, "P S L"]
    easy: Bool[np.ndarray, " P"]


def make_task(config: Config) -> Task:
    rng = np.random.default_rng(0)
    number = 2 * config.prompts
    answers = rng.integers(0, config.actions, (number, STYLES, 1 + config.digits))
    answers[:, :, 0] = np.arange(STYLES)
    right = jnp.asarray(answers)

    def logits(params: Array, tokens: Array) -> Array:
        """After the style, each position has a table for each prompt and style."""
        prompt = tokens[:, 0]
        digits = params[prompt, tokens[:, 1], 1:]
        first = params[prompt, 0, :1]
        return jnp.concatenate([jnp.zeros_like(first), first, digits], axis=1)

    def reward(tokens: Array) -> Array:
        same = tokens[:, None, 1:] == right[tokens[:, 0]]
        return same.all(-1).any(-1).astype(jnp.float32)

    problem = problems.TokenProblem(
        num_prompts=number,
        num_actions=config.actions,
        horizon=1 + config.digits,
        logits=logits,
        reward=reward,
    )
    return Task(problem, answers, np.arange(number) < config.prompts)


def initial(config: Config, task: Task, key: Array) -> Float[Array, "P A L A"]:
    """On easy prompts 90% of the first tokens are own styles, and their answers 5 / 9 right."""
    number = len(task.easy)
    shape = (number, config.actions, 1 + config.digits, config.actions)
    table = 0.1 * jax.random.normal(key, shape)
    easy = np.flatnonzero(task.easy)
    others = config.actions - (STYLES - 1)
    first = np.log(0.9 / (STYLES - 1)) - np.log(0.1 / others)
    digit = (5 / 9) ** (1 / config.digits)
    bonus = np.log(digit) - np.log((1 - digit) / (config.actions - 1))
    for style in range(STYLES):
        if style == DEMONSTRATED:
            continue
        table = table.at[easy, 0, 0, style].add(first)
        for position in range(1, 1 + config.digits):
            table = table.at[easy, style, position, task.answers[easy, style, position]].add(bonus)
    return table


def measure(task: Task, params: Array) -> dict[str, Array]:
    number, styles, _ = task.answers.shape
    prompts = np.repeat(np.arange(number), styles)[:, None]
    tokens = jnp.asarray(np.concatenate([prompts, task.answers.reshape(number * styles, -1)], 1))
    found = jnp.exp(problems.log_probability(task.problem, params, tokens)).reshape(number, styles)
    accuracy = found.sum(1)
    own = accuracy - found[:, DEMONSTRATED]
    own_of_8 = 1 - (1 - own) ** 8
    return {
        "easy": accuracy[task.easy].mean(),
        "hard": accuracy[~task.easy].mean(),
        "own_of_8": own_of_8[task.easy].mean(),
    }


def demonstrate(config: Config, task: Task, key: Array) -> Int[Array, "P T"]:
    wrong_key, digit_key = jax.random.split(key)
    answers = jnp.asarray(task.answers[:, DEMONSTRATED], jnp.int32)
    wrong = jax.random.bernoulli(wrong_key, 1 - config.demonstration_accuracy, answers.shape[:1])
    offset = jax.random.randint(digit_key, wrong.shape, 1, config.actions)
    last = (answers[:, -1] + jnp.where(wrong, offset, 0)) % config.actions
    prompts = jnp.arange(len(answers), dtype=jnp.int32)[:, None]
    return jnp.concatenate([prompts, answers[:, :-1], last[:, None]], axis=1)


def draw(config: Config, task: Task, params: Array, key: Array, *, shown: bool) -> pg.Rollout:
    """Own samples, and after them one demonstration of each prompt."""
    own_key, shown_key = jax.random.split(key)
    own = problems.sample(task.problem, params, own_key, group_size=config.group_size)
    if not shown:
        return own
    given = problems.rollout_of(task.problem, demonstrate(config, task, shown_key), params)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own, given)
    flags = jnp.arange(both.tokens.shape[0]) >= own.tokens.shape[0]
    return both.replace(extras={"demonstrated": flags})


def phases(name: str, config: Config) -> list[tuple[pg.Objective, bool, int]]:
    """Objectives, whether they see demonstrations, and for how many updates."""
    length, steps = 1 + config.digits, config.steps

    def mixed(alpha: float, beta: float) -> pg.Objective:
        return recipes.mixed(
            length=length,
            coefficients=lambda rate: (jnp.full_like(rate, alpha), jnp.full_like(rate, beta)),
        )

    grpo = pg.objectives.grpo()
    return {
        "imitation": [(mixed(0.0, 1.0), True, steps)],
        "GRPO": [(grpo, False, steps)],
        "imitation, then GRPO": [
            (mixed(0.0, 1.0), True, steps // 2),
            (grpo, False, steps - steps // 2),
        ],
        "sum": [(mixed(1.0, 1.0), True, steps)],
        "LUFFY": [(recipes.luffy(), True, steps)],
        "HPT": [(recipes.hpt(length=length), True, steps)],
        "HPT gradual": [
            (recipes.mixed(length=length, coefficients=hybrid.soft_coefficients), True, steps)
        ],
    }[name]


def learn(name: str, config: Config, task: Task) -> dict[str, Float[np.ndarray, "R S K"]]:
    """Curves of what `measure` gives, by learning rate and seed, those for tuning first."""
    outputs = functools.partial(problems.outputs, task.problem)

    def run_seed(rate: Array, key: Array) -> dict[str, Array]:
        optimizer = optax.sgd(rate)
        plan = [
            (pg.train.make_update(outputs, objective, optimizer), shown, steps)
            for objective, shown, steps in phases(name, config)
        ]
        init_key, key = jax.random.split(key)
        params = initial(config, task, init_key)
        state: Any = pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
        )
        curves = []
        for update, shown, steps in plan:

            def step(
                state: Any, _: None, update: Callable[..., Any] = update, shown: bool = shown
            ) -> tuple[Any, None]:
                batch_key = jax.random.fold_in(key, state.step)
                batch = draw(config, task, state.params, batch_key, shown=shown)
                return update(state, batch)[0], None

            def interval(
                state: Any, _: None, step: Callable[..., Any] = step
            ) -> tuple[Any, dict[str, Array]]:
                state, _ = jax.lax.scan(step, state, None, length=config.every)
                return state, measure(task, state.params)

            state, found = jax.lax.scan(interval, state, None, length=steps // config.every)
            curves.append(found)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *curves)

    keys = jax.vmap(jax.random.key)(np.arange(config.tuning_seeds + config.seeds))
    by_seed = jax.vmap(run_seed, in_axes=(None, 0))
    found = jax.jit(jax.vmap(by_seed, in_axes=(0, None)))(jnp.array(config.rates), keys)
    return {name: np.asarray(x) for name, x in found.items()}


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config, prompts=2, digits=1, steps=4, every=2, rates=(90.0,), seeds=2, tuning_seeds=1
        )
    task = make_task(config)
    curves, table = {}, {}
    for name in reproduction.track(("imitation", "GRPO", "HPT") if config.quick else METHODS):
        found = learn(name, config, task)
        scores = (found["easy"] + found["hard"])[:, : config.tuning_seeds, -1].mean(1)
        best = int(np.argmax(scores))
        curves[name] = {key: x[best, config.tuning_seeds :] for key, x in found.items()}
        table[name] = {
            "learning rate": np.full(config.seeds, config.rates[best]),
            **{key: x[:, -1] for key, x in curves[name].items()},
        }
    steps = config.every * (1 + np.arange(curves["HPT"]["easy"].shape[1]))
    titles = {
        "easy": "accuracy on easy prompts",
        "hard": "accuracy on hard prompts",
        "own_of_8": "an undemonstrated style within 8 samples, easy prompts",
    }
    return reproduction.Findings(
        title="accuracy by difficulty, every method at its best learning rate",
        table=table,
        claims=claims(table),
        panels={
            title: {name: reproduction.band(steps, x[key]) for name, x in curves.items()}
            for key, title in titles.items()
        },
    )


def claims(table: dict[str, dict[str, Any]]) -> list[reproduction.Claim]:
    def mean(name: str, column: str) -> float:
        return float(table[name][column].mean())

    floor = mean("GRPO", "easy") - 0.02
    able = [name for name in table if mean(name, "easy") >= floor]
    rivals = [name for name in able if not name.startswith("HPT")]
    best = max(rivals, key=lambda name: mean(name, "hard"))
    return [
        reproduction.Claim(
            "HPT's easy accuracy is within 2 points of GRPO's",
            "HPT" in able,
            f"{mean('HPT', 'easy'):.3f}, GRPO {mean('GRPO', 'easy'):.3f}",
        ),
        reproduction.Claim(
            "and no other method of which that is true is as good on hard prompts",
            mean("HPT", "hard") > mean(best, "hard"),
            f"HPT {mean('HPT', 'hard'):.3f}, {best} {mean(best, 'hard'):.3f}",
        ),
        reproduction.Claim(
            "HPT finds undemonstrated styles more often than imitation",
            mean("HPT", "own_of_8") > mean("imitation", "own_of_8"),
            f"{mean('HPT', 'own_of_8'):.3f} and {mean('imitation', 'own_of_8'):.3f}",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("hpt_hybrid", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
