"""DisCO (arXiv 2505.12366): does an update without difficulty weights serve the hard questions?

GRPO's update of a question with success rate p is scaled by `sqrt(p (1 - p))`, Dr. GRPO's by
`p (1 - p)`; DisCO's by nothing, and a trust region holds it instead of a clip. (a) The weights are
measured on the library's own advantages. (b) 60 questions with initial success rates from 1% to
90%, evenly on a logarithmic scale, are learnt together; what counts is the accuracy on the hardest
third after a fixed number of batches, for every method at the setting (of as many for all: learning
rates, and clip widths or sizes of the trust region) that was best for its own hardest third on
other seeds.

What the paper is about needs three things. The questions share their weights, so that what one of
them asks for is weighed against the others; were there a row of logits for each, Adam would give
all of them steps of one size. Groups are large: of 8 samples at least one in 8 is right where there
is an update at all, and GRPO's weights of 1/8 and 1/2 differ by 1.5 times, of 32 by 2.9. And each
batch is updated on eight times, so that clip and trust region have work to do. DisCO's 1e-4 is in
nats a token of answers of thousands; here an answer is one token.

`--weights-alone` is a comparison without these: one step of plain gradient descent for each batch,
groups of 8, a row for each question beside the shared weights. There the gain does not show.

Exits 1 when the weights are not as stated, when DisCO is not ahead of GRPO, Dr. GRPO and DAPO on
the hardest third, or when its entropy grows or collapses.
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
from jaxtyping import Array, Bool, Float, PRNGKeyArray

import pgjax as pg
from experiments.shared import reproduction
from pgjax.diagnostics import problems
from pgjax.objectives import discriminative as recipes
from pgjax.surrogates import discriminative

# From the width of the clip or of the trust region.
METHODS: dict[str, Callable[[Any], pg.Objective]] = {
    "GRPO": lambda clip: pg.objectives.grpo(low=clip, high=clip),
    "Dr. GRPO": lambda clip: pg.objectives.dr_grpo(length=1, low=clip, high=clip),
    "DAPO": lambda clip: pg.objectives.dapo(low=clip, high=1.4 * clip),
    "DisCO-b": lambda delta: recipes.disco_b(delta=delta),
    "DisCO": lambda delta: recipes.disco(delta=delta),
}
BASELINES = ("GRPO", "Dr. GRPO", "DAPO")


@dataclasses.dataclass(frozen=True)
class Config:
    prompts: int = 60
    """Questions, a multiple of 3."""
    actions: int = 12
    """Answers to each."""
    right: int = 3
    """Of them."""
    rank: int = 32
    """Features of a question, drawn for every seed, through which it shares weights with others."""
    group_size: int = 32
    """Samples per question and batch."""
    batches: int = 60
    """Sampled."""
    updates: int = 8
    """Of Adam, on each batch."""
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    """Learning rates tried for every method."""
    clips: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Widths of the clip tried with each of them; upwards, DAPO's is 1.4 times as wide."""
    deltas: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """As many trust regions of DisCO, in nats."""
    seeds: int = 20
    """Runs that are reported, a multiple of those for tuning."""
    first_seed: int = 100
    """The others follow it."""
    tuning_seeds: int = 5
    """Further runs, from 0 on, on which settings are chosen."""
    weights_alone: bool = False
    """The comparison without clip, trust region and large groups."""
    out: pathlib.Path = pathlib.Path("runs/disco_difficulty")
    """Directory of results."""
    quick: bool = False
    """Few questions, batches and methods, one setting."""

    def __post_init__(self) -> None:
        if self.seeds % self.tuning_seeds:
            raise ValueError(
                f"seeds: expected a multiple of tuning_seeds={self.tuning_seeds}, got {self.seeds}"
            )
        if len(self.clips) != len(self.deltas):
            raise ValueError(
                f"deltas: expected as many as clips, {len(self.clips)}, got {len(self.deltas)}"
            )


def preset(config: Config) -> Config:
    if config.weights_alone:
        config = dataclasses.replace(
            config,
            actions=10,
            right=1,
            rank=8,
            group_size=8,
            updates=1,
            rates=(6.25, 12.5, 25.0, 50.0, 100.0, 200.0, 400.0),
            clips=(0.2,),
            deltas=(1e-4,),
            seeds=14,
            tuning_seeds=7,
        )
    if config.quick:
        config = dataclasses.replace(
            config,
            prompts=9,
            batches=4,
            rates=config.rates[-1:],
            clips=config.clips[:1],
            deltas=config.deltas[:1],
            seeds=2,
            tuning_seeds=2,
        )
    return config


def success_rates(config: Config) -> Float[np.ndarray, " P"]:
    return np.geomspace(0.01, 0.9, config.prompts)


def make_problem(config: Config) -> tuple[problems.TokenProblem, Bool[Array, "P A"]]:
    """The questions, and which answers to each are right."""
    order = np.random.default_rng(0).random((config.prompts, config.actions)).argsort(axis=1)
    right = jnp.asarray(order < config.right)

    def logits(params: Any, tokens: Array) -> Array:
        own, features = params["own"], jax.lax.stop_gradient(params["features"])
        own = own if config.weights_alone else jax.lax.stop_gradient(own)
        rows = (own + features @ params["shared"])[tokens[:, 0]]
        return jnp.stack([jnp.zeros_like(rows), rows], axis=1)

    problem = problems.TokenProblem(
        num_prompts=config.prompts,
        num_actions=config.actions,
        horizon=1,
        logits=logits,
        reward=lambda tokens: right[tokens[:, 0], tokens[:, 1]].astype(jnp.float32),
    )
    return problem, right


def initial(config: Config, right: Bool[Array, "P A"], key: PRNGKeyArray) -> dict[str, Array]:
    """Parameters with the given success rates; how right and wrong are spread is the seed's."""
    p = jnp.asarray(success_rates(config), jnp.float32)[:, None]
    noise_key, features_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, right.shape)
    within = [jax.nn.log_softmax(jnp.where(side, noise, -jnp.inf)) for side in (right, ~right)]
    features = jax.random.normal(features_key, (config.prompts, config.rank))
    return {
        "own": jnp.where(right, within[0] + jnp.log(p), within[1] + jnp.log(1 - p)),
        "features": features / config.rank**0.5,
        "shared": jnp.zeros((config.rank, config.actions)),
    }


def measure(
    problem: problems.TokenProblem, right: Bool[Array, "P A"], params: Any
) -> dict[str, Array]:
    prompts = jnp.arange(problem.num_prompts)
    tokens = jnp.stack([prompts, jnp.zeros_like(prompts)], axis=1)
    logprobs = jax.nn.log_softmax(problem.logits(params, tokens)[:, 1])
    accuracy = jnp.sum(jnp.where(right, jnp.exp(logprobs), 0.0), axis=1)
    thirds = accuracy.reshape(3, -1).mean(1)
    return {
        "hard": thirds[0],
        "medium": thirds[1],
        "easy": thirds[2],
        "accuracy": accuracy.mean(),
        "entropy_exact": -jnp.sum(jnp.exp(logprobs) * logprobs, axis=1).mean(),
    }


Curves = Callable[[float, float, Sequence[int]], dict[str, Float[np.ndarray, "S K"]]]


def learner(method: str, config: Config) -> Curves:
    """Curves at a learning rate and a width, by seed: before each batch, and after the last."""
    problem, right = make_problem(config)
    outputs = functools.partial(problems.outputs, problem)
    make_optimizer = optax.sgd if config.weights_alone else optax.adam

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    def runs(rate: Array, width: Array, key: PRNGKeyArray) -> dict[str, Array]:
        optimizer = make_optimizer(rate)
        update = pg.train.make_update(outputs, METHODS[method](width), optimizer)
        init_key, update_key, sample_key = jax.random.split(key, 3)
        params = initial(config, right, init_key)
        state = pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=update_key
        )

        def batch(state: Any, index: Array) -> tuple[Any, dict[str, Array]]:
            found = measure(problem, right, state.params)
            rollout = problems.sample(
                problem,
                state.params,
                jax.random.fold_in(sample_key, index),
                group_size=config.group_size,
            )
            # Whole batches, so that the order of rows does not matter and none is drawn.
            state, _ = jax.lax.scan(
                lambda state, _: (update(state, rollout)[0], None),
                state,
                None,
                length=config.updates,
            )
            return state, found

        state, curves = jax.lax.scan(batch, state, jnp.arange(config.batches))
        last = measure(problem, right, state.params)
        return {name: jnp.append(x, last[name]) for name, x in curves.items()}

    def curves(rate: float, width: float, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        # As many at once as for tuning, so that it is compiled once.
        parts = np.asarray(seeds).reshape(-1, config.tuning_seeds)
        found = [
            runs(jnp.float32(rate), jnp.float32(width), jax.vmap(jax.random.key)(part))
            for part in parts
        ]
        return {name: np.concatenate([x[name] for x in found]) for name in found[0]}

    return curves


def best_setting(curves: Curves, config: Config, widths: Sequence[float]) -> tuple[float, float]:
    """The learning rate and width with which the hardest third ends highest on tuning seeds."""
    seeds = range(config.tuning_seeds)
    ends = {
        (rate, width): curves(rate, width, seeds)["hard"][:, -1].mean()
        for rate in config.rates
        for width in widths
    }
    return max(ends, key=lambda setting: float(ends[setting]))


def update_weights(group_size: int) -> dict[str, Float[np.ndarray, " K"]]:
    """What the right samples of a question weigh together, for each number of them."""
    right = np.arange(1, group_size)
    rewards = jnp.asarray(np.arange(group_size) < right[:, None], jnp.float32).reshape(-1)
    ids = jnp.repeat(jnp.arange(right.size), group_size)
    options: dict[str, Any] = {"num_groups": right.size}

    def of(advantages: Array) -> Float[np.ndarray, " K"]:
        positive = jnp.maximum(advantages, 0.0)
        return np.asarray(pg.segments.total(positive, ids, num_segments=right.size))

    return {
        "GRPO": of(
            pg.advantages.group_normalize(rewards, ids, ddof=0, epsilon=0.0, **options) / group_size
        ),
        "Dr. GRPO": of(pg.advantages.centered(rewards, ids, **options) / group_size),
        "DisCO": of(discriminative.class_balanced(rewards, ids, **options)),
    }


def run(config: Config) -> reproduction.Findings:
    config = preset(config)
    curves, table = {}, {}
    for name in reproduction.track(("GRPO", "DisCO") if config.quick else METHODS):
        curves_of = learner(name, config)
        widths = config.clips if name in BASELINES else config.deltas
        rate, width = best_setting(curves_of, config, widths)
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        curves[name] = curves_of(rate, width, seeds)
        table[name] = {
            "learning rate": np.full(config.seeds, rate),
            "clip or delta": np.full(config.seeds, width),
            **{key: x[:, -1] for key, x in curves[name].items() if key != "accuracy"},
        }
    rates = np.arange(1, config.group_size) / config.group_size
    weights = update_weights(config.group_size)
    stated = {
        "GRPO": np.sqrt(rates * (1 - rates)),
        "Dr. GRPO": rates * (1 - rates),
        "DisCO": np.ones_like(rates),
    }
    error = max(float(np.abs(weights[name] - stated[name]).max()) for name in stated)
    batches = np.arange(config.batches + 1)
    return reproduction.Findings(
        title="accuracy by difficulty, every method at its best setting",
        table=table,
        claims=[
            reproduction.Claim(
                "update weights are sqrt(p(1-p)), p(1-p) and 1", error < 1e-5, f"off by {error:.1e}"
            ),
            *(
                reproduction.ahead(
                    f"DisCO is ahead of {name} on the hardest third",
                    table["DisCO"]["hard"],
                    table[name]["hard"],
                )
                for name in BASELINES
                if name in table
            ),
            _entropy(curves),
        ],
        panels={
            "weight of a question's update (x: success rate in %)": {
                name: (100 * rates, x) for name, x in weights.items()
            },
            "accuracy on the hardest third": {
                name: reproduction.band(batches, x["hard"]) for name, x in curves.items()
            },
            "accuracy": {
                name: reproduction.band(batches, x["accuracy"]) for name, x in curves.items()
            },
            "entropy (nats)": {
                name: reproduction.band(batches, x["entropy_exact"]) for name, x in curves.items()
            },
        },
        x_label="batch",
    )


def _entropy(curves: dict[str, dict[str, Float[np.ndarray, "S K"]]]) -> reproduction.Claim:
    lowest = {}
    for name, found in curves.items():
        entropy, accuracy = found["entropy_exact"].mean(0), found["accuracy"].mean(0)
        lowest[name] = entropy[accuracy < 0.9].min() / entropy[0]
    entropy = curves["DisCO"]["entropy_exact"].mean(0)
    final = entropy[-1] / entropy[0]
    others = ", ".join(f"{name} {x:.1%}" for name, x in lowest.items() if name in BASELINES)
    return reproduction.Claim(
        "DisCO's entropy keeps 10% of its start until 90% accuracy, and does not grow",
        bool(lowest["DisCO"] >= 0.1 and final <= 1),
        f"{lowest['DisCO']:.1%} until then ({others}), {final:.1%} at the end",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main(
        "disco_difficulty", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
