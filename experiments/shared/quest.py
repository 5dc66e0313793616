"""A small recurrent policy that plays `envs.textquest`, who shows it how, their rows.

A pretrained language model knows words and grammar of commands before it plays. Here that is
`pretrained`: it has read a player who gives well-formed commands at random on the larger map.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import pgjax as pg
from experiments.shared.imitation import imitated
from pgjax.envs import textquest
from pgjax.sampling import multiturn

# Whatever an object is called on the larger map, it may be called on the smaller one.
EASY = textquest.TextQuest(width=2, objects=1, spare_names=1, length=2, max_turns=8)
HARD = textquest.TextQuest(width=4, objects=2, length=3, max_turns=20)
VOCABULARY = HARD.vocabulary
Params = dict[str, Array]


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


def pretrained(
    key: PRNGKeyArray, hidden: int, *, updates: int, learning_rate: float = 3e-3
) -> Params:
    """`init`, then that many updates of Adam on 32 episodes of `wander` each."""
    return imitated(
        outputs,
        init(key, hidden),
        lambda batch_key: wander(HARD, batch_key, 32),
        key,
        updates=updates,
        learning_rate=learning_rate,
    )


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
    """One episode of the policy: what `flatten_turns` takes, by turn."""

    def word(carry: Any, inputs: Any) -> tuple[Any, Any]:
        hidden, open_ = carry
        key, third = inputs
        logprobs = distribution(params, hidden, third)
        token = jnp.where(open_, jax.random.categorical(key, logprobs), textquest.PAD)
        said = jnp.where(open_, logprobs[token], 0.0)
        # The end is read as well, like every token of the row.
        hidden = jnp.where(open_, read(params, hidden, token), hidden)
        return (hidden, open_ & (token != textquest.EOS)), (token, said, open_)

    def command(hidden: Array, _: Any, observation: Array, alive: Array, key: Array) -> Any:
        heard, _ = jax.lax.scan(lambda h, t: (read(params, h, t), None), hidden, observation)
        thirds = jnp.arange(textquest.COMMAND_LENGTH) == 2
        keys = jax.random.split(key, textquest.COMMAND_LENGTH)
        (after, _), said = jax.lax.scan(word, (heard, alive), (keys, thirds))
        return after, said

    return _turns(quest, command, jnp.zeros(params["value"].size), key, start)


def demonstrate(quest: textquest.TextQuest, key: PRNGKeyArray, count: int) -> pg.Rollout:
    """Episodes of `textquest.expert` from random starts, as rows for `objectives.supervised`."""
    return _shown(quest, lambda state, key: textquest.expert(quest, state), key, count)


def wander(quest: textquest.TextQuest, key: PRNGKeyArray, count: int) -> pg.Rollout:
    """Episodes of well-formed commands at random, as rows for `objectives.supervised`."""
    ways = [(textquest.GO, way) for way in textquest.DIRECTIONS]
    names = range(textquest.OBJECTS, quest.vocabulary)
    deeds = [(verb, name) for verb in (textquest.TAKE, textquest.PUT) for name in names]
    commands = jnp.array([(*pair, textquest.EOS) for pair in ways + deeds], jnp.int32)
    return _shown(quest, lambda state, key: jax.random.choice(key, commands), key, count)


def _shown(quest: textquest.TextQuest, player: Any, key: PRNGKeyArray, count: int) -> pg.Rollout:
    """`player(state, key)` gives a command."""

    def command(carry: Any, state: Any, observation: Array, alive: Array, key: Array) -> Any:
        tokens = jnp.where(alive, player(state, key), textquest.PAD)
        none = jnp.zeros(textquest.COMMAND_LENGTH)
        return carry, (tokens, none, jnp.broadcast_to(alive, none.shape))

    start_key, play_key = jax.random.split(key)
    starts = jax.vmap(functools.partial(textquest.reset, quest))(jax.random.split(start_key, count))
    keys = jax.random.split(play_key, count)
    record = jax.vmap(lambda key, start: _turns(quest, command, (), key, start))(keys, starts)
    rows = multiturn.flatten_turns(**record, group_ids=jnp.arange(count), eos=textquest.EOS)
    return pg.train.demonstrations(rows.tokens, rows.mask)


def _turns(quest: textquest.TextQuest, command: Any, carry: Any, key: Array, start: Any) -> Any:
    """`command(carry, state, observation, alive, key)` gives a new carry and what was said."""
    state, observation = start

    def turn(loop: Any, key: Array) -> tuple[Any, Any]:
        state, observation, carry, alive = loop
        carry, (words, said, open_) = command(carry, state, observation, alive, key)
        result = textquest.step(quest, state, words)
        record = {
            "observations": observation,
            "observation_lengths": jnp.where(alive, textquest.OBSERVATION_LENGTH, 0),
            "actions": words,
            "action_lengths": open_.sum(),
            "action_logprobs": said,
            "turn_rewards": jnp.where(alive, result.reward, 0.0),
        }
        alive_after = alive & ~result.terminated & ~result.truncated
        return (result.state, result.observation, carry, alive_after), record

    loop = (state, observation, carry, jnp.bool_(True))
    return jax.lax.scan(turn, loop, jax.random.split(key, quest.max_turns))[1]


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
