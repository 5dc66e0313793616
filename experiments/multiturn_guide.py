"""Which recipe and which reward for agents of many turns: a small comparison on a token quest.

A recurrent policy reads and writes the tokens of `envs.textquest`; every recipe gets the same
episodes per update, once with a reward at every sub-goal (dense) and once for success alone
(sparse). Trained on a small map, tested there and on a larger one with more objects. Shows the
claims, and exits 0, if RLOO beats the untrained policy by 10 points (so the gain comes from the
multi-turn formulation, not from PPO's additions), PPO is at least as good as RLOO on the larger
map, and dense rewards help PPO more than RLOO. The split of a budget between demonstrations and
reinforcement learning is not part of it.

Source: Wang and Ammanabrolu 2025, arXiv 2510.01132 (language models on TextWorld).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import pgjax as pg
from experiments.shared import reproduction
from pgjax import objectives
from pgjax.envs import textquest
from pgjax.objectives import agentic
from pgjax.rewards import density
from pgjax.sampling import multiturn

EASY = textquest.TextQuest(width=2, objects=1, length=2, max_turns=8)
HARD = textquest.TextQuest(width=4, objects=2, length=3, max_turns=20)
VOCABULARY = HARD.vocabulary
Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """How to train."""

    updates: int = 200
    """Batches of each run."""
    tasks: int = 8
    """Different starts in a batch."""
    group_size: int = 8
    """Episodes from the same start."""
    hidden: int = 32
    """Units of the recurrent policy."""
    learning_rate: float = 3e-3
    """Of Adam, the same for all."""
    seeds: int = 3
    """Independent runs."""
    out: pathlib.Path = pathlib.Path("runs/multiturn_guide")
    """Directory for results."""
    quick: bool = False
    """Two updates of two small runs, PPO and RLOO alone."""


def init(key: PRNGKeyArray, hidden: int) -> Params:
    """A gated recurrent unit between token embeddings and two heads."""
    keys = jax.random.split(key, 4)
    scale = hidden**-0.5
    return {
        "embedding": jax.random.normal(keys[0], (VOCABULARY, hidden)),
        "input": scale * jax.random.normal(keys[1], (hidden, 3 * hidden)),
        "recurrent": scale * jax.random.normal(keys[2], (hidden, 3 * hidden)),
        "bias": jnp.zeros(3 * hidden),
        "head": 0.1 * scale * jax.random.normal(keys[3], (hidden, VOCABULARY)),
        "value": jnp.zeros(hidden),
    }


def read(params: Params, hidden: Array, token: Array) -> Array:
    """The state after one more token."""
    x = params["embedding"][token] @ params["input"] + params["bias"]
    xz, xr, xn = jnp.split(x, 3, axis=-1)
    hz, hr, hn = jnp.split(hidden @ params["recurrent"], 3, axis=-1)
    update = jax.nn.sigmoid(xz + hz)
    candidate = jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn)
    return update * hidden + (1 - update) * candidate


def distribution(params: Params, hidden: Array, third: Array) -> Array:
    """Log-probs of the next token; the third token of a command can only be its end."""
    only_end = jnp.where(jnp.arange(VOCABULARY) == textquest.EOS, 0.0, -1e9)
    logits = hidden @ params["head"]
    return jax.nn.log_softmax(jnp.where(third[..., None], only_end, logits))


def outputs(params: Params, rollout: pg.Rollout, needs: frozenset[str]) -> pg.PolicyOutputs:
    """Log-probs and values of a rollout's tokens."""
    start = jnp.zeros((rollout.tokens.shape[0], params["value"].size))

    def step(hidden: Array, token: Array) -> tuple[Array, Array]:
        return read(params, hidden, token), hidden

    _, before = jax.lax.scan(step, start, rollout.tokens.T)
    before = before.swapaxes(0, 1)
    mask = rollout.mask
    third = mask[:, 2:] & mask[:, 1:-1] & mask[:, :-2]
    third = jnp.pad(third, ((0, 0), (2, 0)))
    logprobs = distribution(params, before, third)
    chosen = jnp.take_along_axis(logprobs, rollout.tokens[..., None], axis=-1)[..., 0]
    return pg.PolicyOutputs(
        logprobs=jnp.where(mask, chosen, 0.0),
        values=jnp.where(mask, before @ params["value"], 0.0) if "values" in needs else None,
    )


def play(quest: textquest.TextQuest, params: Params, key: PRNGKeyArray, start: Any) -> Any:
    """One episode: what `flatten_turns` takes, by turn."""
    state, observation = start

    def word(carry: Any, inputs: Any) -> tuple[Any, Any]:
        hidden, open_ = carry
        key, third = inputs
        logprobs = distribution(params, hidden, third)
        token = jnp.where(open_, jax.random.categorical(key, logprobs), textquest.PAD)
        said = jnp.where(open_, logprobs[token], 0.0)
        # The end is read as well, like every token of the row.
        hidden = jnp.where(open_, read(params, hidden, token), hidden)
        return (hidden, open_ & (token != textquest.EOS)), (token, said, open_)

    def turn(carry: Any, key: Array) -> tuple[Any, Any]:
        state, observation, hidden, alive = carry
        heard, _ = jax.lax.scan(lambda h, t: (read(params, h, t), None), hidden, observation)
        thirds = jnp.arange(textquest.COMMAND_LENGTH) == 2
        keys = jax.random.split(key, textquest.COMMAND_LENGTH)
        (after, _), (command, said, open_) = jax.lax.scan(word, (heard, alive), (keys, thirds))
        result = textquest.step(quest, state, command)
        record = {
            "observations": observation,
            "observation_lengths": jnp.where(alive, textquest.OBSERVATION_LENGTH, 0),
            "actions": command,
            "action_lengths": open_.sum(),
            "action_logprobs": said,
            "turn_rewards": jnp.where(alive, result.reward, 0.0),
        }
        alive_after = alive & ~result.terminated & ~result.truncated
        return (result.state, result.observation, after, alive_after), record

    hidden = jnp.zeros(params["value"].size)
    carry = (state, observation, hidden, jnp.bool_(True))
    return jax.lax.scan(turn, carry, jax.random.split(key, quest.max_turns))[1]


def episodes(
    quest: textquest.TextQuest, params: Params, key: PRNGKeyArray, *, tasks: int, group_size: int
) -> tuple[dict[str, Any], Array]:
    """Groups of episodes from the same start, and their group ids."""
    start_key, play_key = jax.random.split(key)
    starts = jax.vmap(functools.partial(textquest.reset, quest))(jax.random.split(start_key, tasks))
    starts = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), starts)
    keys = jax.random.split(play_key, tasks * group_size)
    record = jax.vmap(functools.partial(play, quest, params))(keys, starts)
    return record, jnp.repeat(jnp.arange(tasks), group_size)


def success(
    quest: textquest.TextQuest, params: Params, key: PRNGKeyArray, episodes_: int
) -> Float[Array, ""]:
    """Share of finished quests."""
    record, _ = episodes(quest, params, key, tasks=episodes_, group_size=1)
    return jnp.mean(record["turn_rewards"].sum(-1) > 0.99)


def train(config: Config, objective: pg.Objective) -> dict[str, dict[str, Any]]:
    """For both rewards: success in training, and on both maps before and after, by seed."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))
    update = pg.train.make_update(outputs, objective, optimizer)
    tasks, group_size = (2, 2) if config.quick else (config.tasks, config.group_size)
    updates, tests, seeds = (2, 4, 2) if config.quick else (config.updates, 256, config.seeds)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def learn(dense: Array, key: PRNGKeyArray) -> dict[str, Array]:
        init_key, test_key, key = jax.random.split(key, 3)
        params = init(init_key, config.hidden)
        state = pg.train.TrainState(
            params=params, opt_state=optimizer.init(params), step=jnp.int32(0), key=key
        )

        def step(state: Any, _: None) -> tuple[Any, Array]:
            record, groups = episodes(
                EASY,
                state.params,
                jax.random.fold_in(key, state.step),
                tasks=tasks,
                group_size=group_size,
            )
            rewards = record["turn_rewards"]
            done = jnp.mean(rewards.sum(-1) > 0.99)
            sparse = density.only_complete(rewards, record["action_lengths"] > 0, goal=1.0)
            record["turn_rewards"] = jnp.where(dense, rewards, sparse)
            rollout = multiturn.flatten_turns(**record, group_ids=groups, eos=textquest.EOS)
            return update(state, rollout)[0], done

        state, curve = jax.lax.scan(step, state, None, length=updates)
        both = jax.tree.map(lambda *x: jnp.stack(x), params, state.params)
        untrained, small = jax.vmap(lambda p: success(EASY, p, test_key, tests))(both)
        return {
            "training": curve,
            "small map": small,
            "large map": success(HARD, state.params, test_key, tests),
            "untrained": untrained,
        }

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    found = jax.tree.map(np.asarray, learn(jnp.array([False, True]), keys))
    return {
        reward: {name: x[i] for name, x in found.items()}
        for i, reward in enumerate(("sparse", "dense"))
    }


def run(config: Config) -> reproduction.Findings:
    """All recipes with both rewards."""
    recipes = {
        "PPO": objectives.ppo(),
        "RLOO": agentic.with_total_rewards(objectives.rloo()),
        "GRPO": agentic.with_total_rewards(objectives.grpo()),
        "REINFORCE++": agentic.with_total_rewards(objectives.reinforce_pp()),
    }
    if config.quick:
        recipes = {name: recipes[name] for name in ("PPO", "RLOO")}
    found = {
        (name, reward): result
        for name, objective in recipes.items()
        for reward, result in train(config, objective).items()
    }

    def mean(name: str, reward: str, column: str) -> float:
        return float(found[name, reward][column].mean())

    gain = mean("RLOO", "dense", "small map") - mean("RLOO", "dense", "untrained")
    lead = mean("PPO", "dense", "large map") - mean("RLOO", "dense", "large map")
    helps = {
        name: mean(name, "dense", "small map") - mean(name, "sparse", "small map")
        for name in ("PPO", "RLOO")
    }
    claims = [
        reproduction.Claim(
            "RLOO beats the untrained policy by 10 points", gain >= 0.1, f"{gain:+.3f}"
        ),
        reproduction.Claim(
            "PPO is at least as good as RLOO on the larger map", lead >= 0, f"{lead:+.3f}"
        ),
        reproduction.Claim(
            "dense rewards help PPO more than RLOO",
            helps["PPO"] > helps["RLOO"],
            f"{helps['PPO']:+.3f} against {helps['RLOO']:+.3f}",
        ),
    ]
    return reproduction.Findings(
        title="Recipes and rewards for many turns",
        table={
            f"{name}, {reward}": {
                column: result[column] for column in ("small map", "large map", "untrained")
            }
            for (name, reward), result in found.items()
        },
        claims=claims,
        panels={
            f"success in training, {reward}": {
                name: reproduction.band(
                    np.arange(found[name, reward]["training"].shape[1]),
                    found[name, reward]["training"],
                )
                for name in recipes
            }
            for reward in ("sparse", "dense")
        },
        x_label="update",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs the experiment from the command line."""
    return reproduction.main(
        "multiturn_guide", Config, run, description=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    sys.exit(main())
