"""Rewarding sets of walks keeps several ways to the goal alive (Poly-PPO, arXiv 2509.25424).

Four rooms; the walker starts in one corner and is to come to the opposite one, past the room on
either side. A small network that sees where it stands was pretrained on the shortest ways, mixed
with random moves, from every cell. Then it is trained from the one start, with PPO's clip and a
penalty on the divergence from the behaviour: PPO on whole walks, with entropy bonuses of several
strengths too, or Poly-PPO, which draws vines from states along each walk, scores sets of them by
mean success times the share of different sets of rooms visited, and uses that in the vines' first
steps. All draw about the same number of walks a batch.

Exact, from the chain of cells: success from the training start; from all other cells; with a door
of the way shut (the worse of the two that leave the first room); and with the goal moved to other
cells of its room, in 16 attempts. Each method is reported at its best learning rate by success from
the training start. Exits 1 unless Poly-PPO is, by more than two standard errors, better than PPO
from other cells, with a door shut and with the goal moved, and from the training start at most 2
points below.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

import pgjax as pg
from experiments.shared import reproduction
from pgjax import advantages, aggregate, returns, surrogates
from pgjax.advantages import sets
from pgjax.envs import four_rooms
from pgjax.sampling import vines

MEASURES = ("training start", "other starts", "door shut", "goal moved, pass@16")


@dataclasses.dataclass(frozen=True)
class Config:
    """World, network and the methods' numbers; those of Poly-PPO are the paper's."""

    out: pathlib.Path = pathlib.Path("runs/poly_rooms")
    """Where results go."""
    seeds: int = 8
    """Independent runs of every method and learning rate."""
    steps: int = 150
    """Batches."""
    room: int = 5
    """Cells along a room's side."""
    horizon: int = 60
    """Moves of a walk."""
    walks: int = 16
    """Walks in a batch of Poly-PPO, besides their vines."""
    states: int = 2
    """States of a walk at which vines begin."""
    vines: int = 8
    """From each of these states."""
    set_size: int = 4
    """Vines of a set; all subsets are scored."""
    window: int = 5
    """First moves of a vine that are credited with its sets."""
    randomness: float = 0.4
    """Share of random moves in what is imitated."""
    pretraining: int = 500
    """Updates of Adam on all cells."""
    learning_rates: tuple[float, ...] = (0.0003, 0.001, 0.003)
    """Of Adam."""
    bonuses: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Coefficients of PPO's entropy bonus."""
    kl_coefficient: float = 0.01
    """Of KL(behaviour, policy)."""
    epochs: int = 2
    """Passes over a batch."""
    hidden: int = 64
    """Units of the network's one layer."""
    quick: bool = False
    """A tiny version, for tests."""


@pg.types.pytree_dataclass
class Walks:
    """What is learnt from, `[R, T]`; `set_advantage` `[R]` is NaN for walks that are in no set."""

    observation: Float[Array, "R T O"]
    action: Array
    log_prob: Array
    reward: Array
    mask: Array
    terminated: Array
    set_advantage: Array


def network(params: Any, observation: Float[Array, "*b O"]) -> tuple[Array, Array]:
    """Log-probs of the four moves, and the value."""
    hidden = jnp.tanh(observation @ params["in"] + params["in_bias"])
    value_hidden = jnp.tanh(observation @ params["value_in"] + params["value_bias"])
    return jax.nn.log_softmax(hidden @ params["out"]), value_hidden @ params["value_out"]


def init(key: PRNGKeyArray, size: int, hidden: int) -> Any:
    keys = jax.random.split(key, 2)
    weights = jax.random.normal(keys[0], (2, size, hidden)) / 2**0.5  # two entries are 1
    return {
        "in": weights[0],
        "in_bias": jnp.zeros(hidden),
        "out": 0.01 * jax.random.normal(keys[1], (hidden, len(four_rooms.MOVES))),
        "value_in": weights[1],
        "value_bias": jnp.zeros(hidden),
        "value_out": jnp.zeros(hidden),
    }


def every_observation(env: four_rooms.FourRooms) -> Float[Array, "C O"]:
    def of(cell: Array) -> Array:
        return four_rooms.reset(env, jax.random.key(0), start=cell, goal=0)[1]

    return jax.vmap(of)(jnp.arange(env.num_cells))


def pretrained(config: Config, env: four_rooms.FourRooms, key: PRNGKeyArray) -> Any:
    """A network that follows the shortest ways, in part, wherever it stands."""
    away = four_rooms.distances(env, env.num_cells - 1)
    shorter = away[four_rooms.successors(env)] < away[:, None]
    ways = shorter / np.maximum(shorter.sum(1, keepdims=True), 1)
    target = (1 - config.randomness) * ways + config.randomness / len(four_rooms.MOVES)
    observations = every_observation(env)
    optimizer = optax.adam(1e-2)

    def loss(params: Any) -> Array:
        return -jnp.mean(jnp.sum(target * network(params, observations)[0], axis=1))

    def update(_: Array, carry: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = init(key, observations.shape[1], config.hidden)
    return jax.lax.fori_loop(0, config.pretraining, update, (params, optimizer.init(params)))[0]


def success(
    env: four_rooms.FourRooms, params: Any, goal: int, *, shut: int | None = None
) -> Float[Array, " C"]:
    """Exact chance, from each cell, to come to the goal in time."""
    moves = jnp.exp(network(params, every_observation(env))[0])
    successors = four_rooms.successors(env)
    if shut is not None:
        successors = np.where(successors == shut, np.arange(env.num_cells)[:, None], successors)

    def before(chance: Array, _: None) -> tuple[Array, None]:
        return jnp.sum(moves * chance[successors], axis=1).at[goal].set(1.0), None

    there = jnp.zeros(env.num_cells).at[goal].set(1.0)
    return jax.lax.scan(before, there, None, length=env.max_steps)[0]


def measure(env: four_rooms.FourRooms, params: Any) -> dict[str, Array]:
    start, goal = 0, env.num_cells - 1
    away = four_rooms.distances(env, goal)
    room, rooms = four_rooms.rooms(env)[goal], four_rooms.rooms(env)
    from_all = success(env, params, goal)
    others = np.setdiff1d(np.arange(env.num_cells), [start, goal])
    doors = np.flatnonzero(rooms == four_rooms.NO_ROOM)
    leaving = doors[np.argsort(-away[doors], kind="stable")[:2]]  # those far from the goal
    shut = jnp.stack([success(env, params, goal, shut=int(door))[start] for door in leaving])
    moved = np.setdiff1d(np.flatnonzero(rooms == room), [goal])
    hit = jnp.stack([success(env, params, int(cell))[start] for cell in moved])
    found = (from_all[start], from_all[others].mean(), shut.min(), (1 - (1 - hit) ** 16).mean())
    return dict(zip(MEASURES, found, strict=True))


def draw(
    config: Config, env: four_rooms.FourRooms, params: Any, key: PRNGKeyArray, *, poly: bool
) -> Walks:
    """Walks of the current policy, and for Poly-PPO their vines with the sets' advantages."""

    def step(state: Any, action: Array, key: PRNGKeyArray) -> tuple[Any, Array, Array]:
        found = four_rooms.step(env, state, action)
        return found.state, found.reward, found.terminated

    def policy(observation: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        logprobs = network(params, observation)[0]
        action = jax.random.categorical(key, logprobs)
        return action, logprobs[action]

    def begin(key: PRNGKeyArray) -> Any:
        return four_rooms.reset(env, key, start=0, goal=env.num_cells - 1)[0]

    observe = functools.partial(four_rooms.observe, env)
    walk = functools.partial(vines.unroll, step, observe, policy, horizon=config.horizon)

    def rows(steps: vines.Steps, advantage: Array) -> Walks:
        flat = jax.tree.map(
            lambda x: x.reshape(-1, config.horizon, *x.shape[steps.mask.ndim :]),
            {name: getattr(steps, name) for name in WALK_FIELDS},
        )
        return Walks(**flat, set_advantage=advantage.reshape(-1))

    if not poly:
        count = config.walks * (1 + config.states * config.vines)
        steps = jax.vmap(lambda key: walk(begin(key), key))(jax.random.split(key, count))
        return rows(steps, jnp.full(count, jnp.nan))

    def with_vines(key: PRNGKeyArray) -> vines.Vines:
        return vines.vine_rollout(
            step,
            observe,
            policy,
            begin(key),
            key,
            num_states=config.states,
            num_vines=config.vines,
            horizon=config.horizon,
        )

    found = jax.vmap(with_vines)(jax.random.split(key, config.walks))
    chosen = jnp.asarray(sets.all_sets(config.vines, config.set_size))
    branches = found.branches
    scores = sets.set_scores(
        sets.polychromic, chosen, branches.reward.sum(-1), branches.last_state.visited
    )
    advantage = sets.set_advantage(scores, chosen, num_members=config.vines)
    trunk = rows(found.trunk, jnp.full(config.walks, jnp.nan))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), trunk, rows(branches, advantage))


WALK_FIELDS = ("observation", "action", "log_prob", "reward", "mask", "terminated")


def advantages_of(config: Config, params: Any, walks: Walks) -> tuple[Array, Array]:
    """Standardised over the batch, and the targets of the values; `[R, T]` each."""
    values = network(params, walks.observation)[1]
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    more = jnp.pad(walks.mask[:, 1:], ((0, 0), (0, 1)))  # time that is up counts as an end
    gae = returns.gae(
        walks.reward,
        values,
        following,
        1.0 - walks.terminated,
        lambda_=0.95,
        truncated=walks.mask & ~more & ~walks.terminated,
        mask=walks.mask,
    )
    in_set = ~jnp.isnan(walks.set_advantage)
    of_set = sets.in_first_steps(
        jnp.where(in_set, walks.set_advantage, 0.0), gae.T, window=config.window
    ).T
    mixed = jnp.where(in_set[:, None], of_set, gae)
    normal = advantages.batch_normalize(mixed.reshape(-1), where=walks.mask.reshape(-1))
    return normal.reshape(mixed.shape), gae + values


def loss(
    config: Config, params: Any, old: Any, walks: Walks, given: Array, targets: Array, bonus: float
) -> Array:
    logprobs, values = network(params, walks.observation)
    before = network(old, walks.observation)[0]
    taken = jnp.take_along_axis(logprobs, walks.action[..., None], axis=-1)[..., 0]
    policy = surrogates.clipped(jnp.exp(taken - walks.log_prob), given, low=0.2, high=0.2)
    divergence = jnp.sum(jnp.exp(before) * (before - logprobs), axis=-1)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    each = policy + config.kl_coefficient * divergence - bonus * entropy
    each += 0.5 * (values - targets) ** 2
    return aggregate.masked_mean(each, walks.mask)


def learn(
    config: Config, env: four_rooms.FourRooms, *, poly: bool, bonus: float
) -> dict[str, Float[np.ndarray, "R S K"]]:
    """Curves of what `measure` gives, by learning rate and seed."""

    def run(rate: Array, key: PRNGKeyArray) -> dict[str, Array]:
        start_key, key = jax.random.split(key)
        optimizer = optax.adam(rate)
        start = pretrained(config, env, start_key)

        def step(carry: Any, key: PRNGKeyArray) -> tuple[Any, dict[str, Array]]:
            old, _ = carry
            walks = draw(config, env, old, key, poly=poly)
            given, targets = advantages_of(config, old, walks)
            params, state = carry
            for _ in range(config.epochs):
                grads = jax.grad(loss, argnums=1)(config, params, old, walks, given, targets, bonus)
                updates, state = optimizer.update(grads, state)
                params = optax.apply_updates(params, updates)
            return (params, state), measure(env, old)

        keys = jax.random.split(key, config.steps + 1)
        return jax.lax.scan(step, (start, optimizer.init(start)), keys)[1]

    keys = jax.vmap(jax.random.key)(np.arange(config.seeds))
    by_seed = jax.vmap(run, in_axes=(None, 0))
    runs = [jax.jit(by_seed)(jnp.float32(rate), keys) for rate in config.learning_rates]
    return {name: np.stack([x[name] for x in runs]) for name in MEASURES}


def run(config: Config) -> reproduction.Findings:
    if config.quick:
        config = dataclasses.replace(
            config,
            seeds=3,
            steps=3,
            room=2,
            horizon=12,
            walks=2,
            vines=4,
            set_size=2,
            pretraining=20,
            learning_rates=(0.001,),
            bonuses=(0.03,),
            hidden=8,
        )
    env = four_rooms.FourRooms(room=config.room, max_steps=config.horizon)
    methods: dict[str, dict[str, Any]] = {
        "PPO": {"poly": False, "bonus": 0.0},
        **{f"PPO, entropy bonus {b:g}": {"poly": False, "bonus": b} for b in config.bonuses},
        "Poly-PPO": {"poly": True, "bonus": 0.0},
    }
    curves, table = {}, {}
    for name, options in reproduction.track(methods.items()):
        found = learn(config, env, **options)
        best = int(np.argmax(found[MEASURES[0]][..., -1].mean(1)))
        curves[name] = {column: x[best] for column, x in found.items()}
        table[name] = {
            "learning rate": np.full(config.seeds, config.learning_rates[best]),
            **{column: x[:, -1] for column, x in curves[name].items()},
        }
    table["pretrained"] = {column: x[:, 0] for column, x in curves["PPO"].items()}
    return reproduction.Findings(
        title="Ways through four rooms",
        table=table,
        claims=claims(table),
        panels={
            column: {
                name: reproduction.band(np.arange(config.steps + 1), x[column])
                for name, x in curves.items()
            }
            for column in MEASURES
        },
    )


def claims(table: dict[str, dict[str, Any]]) -> list[reproduction.Claim]:
    poly, ppo = table["Poly-PPO"], table["PPO"]
    result = []
    for column in MEASURES[1:]:
        gain = poly[column] - ppo[column]
        error = reproduction.standard_error(gain)
        result.append(
            reproduction.Claim(
                f"{column}: Poly-PPO is better than PPO",
                bool(gain.mean() > 2 * error),
                f"{poly[column].mean():.3f} against {ppo[column].mean():.3f}, difference "
                f"{gain.mean():.3f} ± {error:.3f}",
            )
        )
    loss_of = float(np.mean(ppo[MEASURES[0]]) - np.mean(poly[MEASURES[0]]))
    result.append(
        reproduction.Claim(
            "from the training start it is at most 2 points below",
            loss_of <= 0.02,
            f"{poly[MEASURES[0]].mean():.3f} against {ppo[MEASURES[0]].mean():.3f}",
        )
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return reproduction.main("poly_rooms", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
