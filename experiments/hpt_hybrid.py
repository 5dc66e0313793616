"""HPT (arXiv 2509.04419): imitate where nothing succeeds yet, reinforce everywhere else.

Prompts ask for a style and two tokens out of 32; each has one right answer in each of three styles.
Half of the prompts are easy: the policy succeeds half of the time, in two styles of its own. On the
others, the hard ones, it succeeds less than once in 10,000 times. Demonstrations are right and all
in the third style, one a prompt and step. Each seed draws its own task; accuracies are exact.

Logits are linear in random features of the prompt, half as many as there are prompts, so that what
is learnt for one disturbs the others. With a table of logits for each prompt nothing does: the
higher the learning rate the better, and HPT, LUFFY and imitation then GRPO all end above .99 on
hard prompts, which ranks nothing.

Compared after 40 updates, each at its best learning rate of one grid (by the mean of easy and hard
accuracy on other seeds): imitation, GRPO without demonstrations, imitation then GRPO (half of the
updates each), both losses added up, LUFFY, HPT's switch and its gradual switch. Only LUFFY looks at
the rewards of demonstrations, which gives it nothing while all are right. The best rates lie inside
the grid but for imitation's, which hardly depends on it from 2430 on (to nine times its highest).

Exits 1 unless HPT's easy accuracy is within 2 points of GRPO's, its hard accuracy above that of
every other method of which that is true, and it finds the styles that were not demonstrated more
often in 8 samples than imitation does, either by two standard errors of the paired difference.
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

Table = dict[str, dict[str, Any]]
Phases = list[tuple[pg.Objective, bool, int]]


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: int = 16
    """Easy ones, and as many hard ones."""
    features: int = 16
    """Of a prompt; no fewer than there are easy prompts."""
    digits: int = 2
    """Tokens of an answer, after its style."""
    actions: int = 32
    """Tokens to choose from."""
    group_size: int = 8
    """Own samples per prompt and step."""
    demonstration_accuracy: float = 1.0
    """Share of demonstrations that are right; the others end in a wrong token."""
    steps: int = 40
    """Updates."""
    rates: tuple[float, ...] = (90.0, 270.0, 810.0, 2430.0, 7290.0, 21870.0)
    """Learning rates tried for every method."""
    seeds: int = 12
    """Runs that are reported."""
    tuning_seeds: int = 4
    """Further runs on which learning rates are chosen."""
    first_seed: int = 100
    """Of the runs; those for tuning come first."""
    out: pathlib.Path = pathlib.Path("runs/hpt_hybrid")
    """Directory of results."""
    quick: bool = False
    """Few prompts, steps and methods, one rate."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The problem, its right answers, which prompts are easy, and what a policy sees of them."""

    problem: problems.TokenProblem
    answers: Int[Array, "P S L"]
    easy: Bool[np.ndarray, " P"]
    features: Float[Array, "P F"]


def make_task(config: Config, key: Array) -> Task:
    answer_key, feature_key = jax.random.split(key)
    number = 2 * config.prompts
    shape = (number, STYLES, 1 + config.digits)
    answers = jax.random.randint(answer_key, shape, 0, config.actions)
    answers = answers.at[:, :, 0].set(jnp.arange(STYLES))
    features = jax.random.normal(feature_key, (number, config.features))
    features /= jnp.linalg.norm(features, axis=1, keepdims=True)

    def logits(params: Array, tokens: Array) -> Array:
        """After the style, each position has logits for each prompt and style."""
        table = jnp.tensordot(features, params, 1)[tokens[:, 0]]
        style = jnp.minimum(tokens[:, 1], STYLES)
        digits = table[jnp.arange(len(table)), style, 1:]
        first = table[:, 0, :1]
        return jnp.concatenate([jnp.zeros_like(first), first, digits], axis=1)

    def reward(tokens: Array) -> Array:
        same = tokens[:, None, 1:] == answers[tokens[:, 0]]
        return same.all(-1).any(-1).astype(jnp.float32)

    problem = problems.TokenProblem(
        num_prompts=number,
        num_actions=config.actions,
        horizon=1 + config.digits,
        logits=logits,
        reward=reward,
    )
    return Task(problem, answers, np.arange(number) < config.prompts, features)


def initial(config: Config, task: Task, key: Array) -> Float[Array, "F S L A"]:
    """On easy prompts 90% of the first tokens are own styles, and their answers 5 / 9 right."""
    easy = np.arange(config.prompts)
    shape = (len(easy), STYLES + 1, 1 + config.digits, config.actions)
    table = 0.1 * jax.random.normal(key, shape)
    first = np.log(0.9 / (STYLES - 1)) - np.log(0.1 / (config.actions - (STYLES - 1)))
    digit = (5 / 9) ** (1 / config.digits)
    bonus = np.log(digit) - np.log((1 - digit) / (config.actions - 1))
    for style in set(range(STYLES)) - {DEMONSTRATED}:
        table = table.at[:, 0, 0, style].add(first)
        for position in range(1, 1 + config.digits):
            right = task.answers[easy, style, position]
            table = table.at[easy, style, position, right].add(bonus)
    return jnp.tensordot(jnp.linalg.pinv(task.features[easy]), table, 1)


def measure(task: Task, params: Array) -> dict[str, Array]:
    number, styles, _ = task.answers.shape
    prompts = np.repeat(np.arange(number), styles)[:, None]
    tokens = jnp.concatenate([prompts, task.answers.reshape(number * styles, -1)], axis=1)
    found = jnp.exp(problems.log_probability(task.problem, params, tokens)).reshape(number, styles)
    accuracy = found.sum(1)
    own_of_8 = 1 - (1 - accuracy + found[:, DEMONSTRATED]) ** 8
    return {
        "easy": accuracy[task.easy].mean(),
        "hard": accuracy[~task.easy].mean(),
        "own_of_8": own_of_8[task.easy].mean(),
    }


def demonstrate(config: Config, task: Task, key: Array) -> Int[Array, "P T"]:
    wrong_key, digit_key = jax.random.split(key)
    answers = task.answers[:, DEMONSTRATED]
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


def methods(config: Config) -> dict[str, Phases]:
    """Objectives, whether they see demonstrations, and for how many updates."""
    length, steps = 1 + config.digits, config.steps

    def mixed(alpha: float, beta: float) -> pg.Objective:
        return recipes.mixed(
            length=length,
            coefficients=lambda rate: (jnp.full_like(rate, alpha), jnp.full_like(rate, beta)),
        )

    imitate, grpo = mixed(0.0, 1.0), pg.objectives.grpo()
    gradual = recipes.mixed(length=length, coefficients=hybrid.soft_coefficients)
    return {
        "imitation": [(imitate, True, steps)],
        "GRPO": [(grpo, False, steps)],
        "imitation, then GRPO": [(imitate, True, steps // 2), (grpo, False, steps - steps // 2)],
        "sum": [(mixed(1.0, 1.0), True, steps)],
        "LUFFY": [(recipes.luffy(), True, steps)],
        "HPT": [(recipes.hpt(length=length), True, steps)],
        "HPT gradual": [(gradual, True, steps)],
    }


def learn(phases: Phases, config: Config) -> dict[str, Float[np.ndarray, "R S K"]]:
    """Curves of what `measure` gives, by learning rate and seed, those for tuning first."""

    def run_seed(rate: Array, key: Array) -> dict[str, Array]:
        task_key, init_key, key = jax.random.split(key, 3)
        task = make_task(config, task_key)
        outputs = functools.partial(problems.outputs, task.problem)
        optimizer = optax.sgd(rate)
        params = initial(config, task, init_key)
        state: Any = pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
        )

        def step(update: Callable[..., Any], shown: bool, state: Any, _: None) -> tuple[Any, Any]:
            batch_key = jax.random.fold_in(key, state.step)
            batch = draw(config, task, state.params, batch_key, shown=shown)
            state, _ = update(state, batch)
            return state, measure(task, state.params)

        curves = []
        for objective, shown, steps in phases:
            update = pg.train.make_update(outputs, objective, optimizer)
            one_step = functools.partial(step, update, shown)
            state, found = jax.lax.scan(one_step, state, None, length=steps)
            curves.append(found)
        return jax.tree.map(lambda *x: jnp.concatenate(x), *curves)

    seeds = config.first_seed + np.arange(config.tuning_seeds + config.seeds)
    keys = jax.vmap(jax.random.key)(seeds)
    by_seed = jax.vmap(run_seed, in_axes=(None, 0))
    found = jax.jit(jax.vmap(by_seed, in_axes=(0, None)))(jnp.array(config.rates), keys)
    return {name: np.asarray(x) for name, x in found.items()}


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config, prompts=2, digits=1, steps=4, rates=(810.0,), seeds=2, tuning_seeds=1
        )
    compared = methods(config)
    names = ("imitation", "GRPO", "HPT") if config.quick else tuple(compared)
    curves, table = {}, {}
    for name in reproduction.track(names):
        found = learn(compared[name], config)
        scores = (found["easy"] + found["hard"])[:, : config.tuning_seeds, -1].mean(1)
        best = int(np.argmax(scores))
        curves[name] = {key: x[best, config.tuning_seeds :] for key, x in found.items()}
        table[name] = {
            "learning rate": np.full(config.seeds, config.rates[best]),
            **{key: x[:, -1] for key, x in curves[name].items()},
        }
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
            title: {
                name: reproduction.band(1 + np.arange(config.steps), x[key])
                for name, x in curves.items()
            }
            for key, title in titles.items()
        },
    )


def claims(table: Table) -> list[reproduction.Claim]:
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
        exceeds("on hard prompts it beats all others of which that is true", table, best, "hard"),
        exceeds("it finds undemonstrated styles more often", table, "imitation", "own_of_8"),
    ]


def exceeds(text: str, table: Table, rival: str, column: str) -> reproduction.Claim:
    """HPT is above by two standard errors of the differences over seeds."""
    ours, theirs = table["HPT"][column], table[rival][column]
    lead, error = (ours - theirs).mean(), reproduction.standard_error(ours - theirs)
    seen = f"{ours.mean():.3f}, {rival} {theirs.mean():.3f}, lead {lead:.3f} ± {error:.3f}"
    return reproduction.Claim(text, bool(lead > 2 * error), seen)


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("hpt_hybrid", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
