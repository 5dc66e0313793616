"""What do more actions cost a search that judges actions instead of states?

Piles of 7 pancakes, sorted by 6 flips of cost 1; with all sequences of two, and of three, flips as
single moves of cost 2 and 3 there are 42 and 258 actions, and the shortest paths cost the same.
A* generates and judges all children of a state that it opens, Q* one child for each action that it
takes. Both see the same estimate: the exact distance less noise of 0, 1 or 2, so that it is nowhere
too high. Generated are the states that actions were taken to, evaluated those that were new, or
reached more cheaply, and so given to the estimate; for Q* one evaluation is of all actions of a
state, by one pass of a network.

Then a small network learns q(s, a) for the 6 flips by Q-learning from scrambled goals, with the
actions drawn from a softmax of -q and not all tried, and leads both searches; for A*, h(s) is the
least q(s, a).

Exits 0 if all paths under the noisy estimates are shortest; if from 6 to 258 actions the states
that A* generates grow at least 20-fold, those of Q* at most a tenth of that, and the evaluations of
Q*, passes of what would be a network, less than 4-fold; and if with the learned q Q* solves all, at
no more than 1.05 times the least cost, with less than half the states that A* generates. The paper,
on larger puzzles with 157 times the actions: less than 4 times the time, and 3 times the nodes. The
growth of Q*'s nodes by itself is shown and not judged.

Source: A* Search Without Expansions, Agostinelli et al. 2021, arXiv 2102.04518.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from experiments.shared import reproduction
from pgjax import search, surrogates, values
from pgjax.envs import puzzles
from pgjax.models import mlp
from pgjax.policies import distributions


@dataclasses.dataclass(frozen=True)
class Config:
    """Piles to sort, and a network to train."""

    size: int = 7
    """Pancakes."""
    depths: tuple[int, ...] = (1, 2, 3)
    """Longest sequence of flips that is one action; the first and the last are compared."""
    starts: int = 50
    """Piles to sort for each seed."""
    noise: int = 3
    """The estimate is short of the distance by 0 up to one less than this."""
    seeds: int = 5
    """Of noise, starts, and networks."""
    updates: int = 4000
    """Of the network."""
    batch_size: int = 256
    """Scrambled states in an update."""
    scrambles: int = 12
    """Largest number of random flips from the goal."""
    temperature: float = 1 / 3
    """Of the softmax of -q that actions are drawn from in training."""
    refresh: int = 100
    """Updates after which the target network is replaced."""
    learning_rate: float = 1e-3
    """Of Adam."""
    hidden: int = 128
    """Width of the two hidden layers."""
    quick: bool = False
    """Piles of 5, two depths, few starts and updates, three seeds, for tests."""
    out: pathlib.Path = pathlib.Path("runs/qstar_pancake")
    """Directory for table and plot."""


def code(states: Int[Array, "*B S"]) -> Int[Array, "*B"]:
    """A number for each permutation."""
    size = states.shape[-1]
    return states @ (size ** jnp.arange(size))


def noisy_table(
    key: Array, states: Int[np.ndarray, "M S"], distance: Int[np.ndarray, " M"], *, noise: int
) -> Float[Array, " C"]:
    """By `code`, distances less noise, at least 0."""
    short = jax.random.randint(key, distance.shape, 0, noise)
    size = states.shape[-1]
    return (
        jnp.zeros(size**size).at[code(jnp.asarray(states))].set(jnp.maximum(0.0, distance - short))
    )


def both(
    puzzle: puzzles.Puzzle,
    heuristic: Callable[[Any, Array], Array],
    action_costs: Callable[[Any, Array], Array],
) -> dict[str, Callable[[Any, Array], search.SearchResult]]:
    """A* and Q* from many roots, one after the other: `(params, roots) -> results`."""
    options: dict[str, Any] = {
        "transition": puzzle.transition,
        "is_goal": puzzle.is_goal,
        "num_actions": puzzle.num_actions,
        "capacity": 2**17,
        "max_states": 2**14,
    }

    def nodes(params: Any, roots: Array) -> search.SearchResult:
        judge = functools.partial(heuristic, params)
        return jax.lax.map(lambda r: search.a_star(r, heuristic=judge, **options), roots)

    def edges(params: Any, roots: Array) -> search.SearchResult:
        judge = functools.partial(action_costs, params)
        return jax.lax.map(lambda r: search.q_star(r, action_costs=judge, **options), roots)

    return {"A*": jax.jit(nodes), "Q*": jax.jit(edges)}


def by_table(puzzle: puzzles.Puzzle) -> dict[str, Callable[[Any, Array], search.SearchResult]]:
    """Both searches with a table of h, by `code`."""

    def heuristic(table: Array, states: Array) -> Array:
        return table[code(states)]

    def action_costs(table: Array, states: Array) -> Array:
        every = jnp.arange(puzzle.num_actions)
        following = jax.vmap(lambda s: jax.vmap(puzzle.move, (None, 0))(s, every))(states)
        return puzzle.costs + heuristic(table, following)

    return both(puzzle, heuristic, action_costs)


def by_network(puzzle: puzzles.Puzzle) -> dict[str, Callable[[Any, Array], search.SearchResult]]:
    """Both searches with a network q; h is the least q(s, a), and 0 at the goal."""

    def heuristic(params: Any, states: Array) -> Array:
        at_goal = jax.vmap(puzzle.is_goal)(states)
        return jnp.where(at_goal, 0.0, judged(puzzle, params, states).min(axis=1))

    return both(puzzle, heuristic, functools.partial(judged, puzzle))


def judged(puzzle: puzzles.Puzzle, params: Any, states: Int[Array, "K S"]) -> Float[Array, "K A"]:
    """q of the network."""
    return mlp.apply(params, puzzles.observe(puzzle, states), activation=jax.nn.relu)


def learn(key: Array, puzzle: puzzles.Puzzle, config: Config, updates: int) -> Any:
    """Q-learning of costs: q(s, a) → c at the goal, else c + min_a' q'(s', a')."""
    size = puzzle.goal.size
    init_key, key = jax.random.split(key)
    sizes = (size * puzzle.num_values, config.hidden, config.hidden, puzzle.num_actions)
    params = mlp.init(init_key, sizes)
    optimizer = optax.adam(config.learning_rate)

    def loss(params: Any, target: Any, states: Array, actions: Array) -> Array:
        following, cost = jax.vmap(puzzle.transition)(states, actions)
        going_on = 1.0 - jax.vmap(puzzle.is_goal)(following)
        least = judged(puzzle, target, following).min(axis=1)
        wanted = values.one_step_targets(cost, least, going_on)
        taken = values.taken_values(judged(puzzle, params, states), actions)
        return surrogates.value_error(taken, wanted).mean()

    def update(state: Any, inputs: tuple[Array, Array]) -> tuple[Any, None]:
        params, target, opt_state = state
        number, key = inputs
        count_key, move_key, action_key = jax.random.split(key, 3)
        counts = jax.random.randint(count_key, (config.batch_size,), 1, config.scrambles + 1)
        states = jax.vmap(
            lambda k, n: puzzles.scramble(puzzle, k, moves=n, max_moves=config.scrambles)
        )(jax.random.split(move_key, config.batch_size), counts)
        logits = -judged(puzzle, params, states) / config.temperature
        actions = distributions.categorical().sample(action_key, logits)
        renew = number % config.refresh == 0
        target = jax.tree.map(lambda new, old: jnp.where(renew, new, old), params, target)
        slope = jax.grad(loss)(params, target, states, actions)
        changes, opt_state = optimizer.update(slope, opt_state)
        return (optax.apply_updates(params, changes), target, opt_state), None

    state = params, params, optimizer.init(params)
    inputs = jnp.arange(updates), jax.random.split(key, updates)
    return jax.lax.scan(update, state, inputs)[0][0]


def run(config: Config) -> reproduction.Findings:
    """Both searches with all sets of actions, then with a learned estimate."""
    size, depths = (5, (1, 2)) if config.quick else (config.size, config.depths)
    seeds, count = (3, 6) if config.quick else (config.seeds, config.starts)
    updates = 50 if config.quick else config.updates
    if len(depths) < 2:
        raise ValueError(f"depths: expected at least two to compare, got {depths}")
    single = puzzles.pancake(size)
    states, distance = puzzles.shortest_distances(single)
    keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(seeds)]
    tables = [noisy_table(k[0], states, distance, noise=config.noise) for k in keys]
    places = [np.asarray(jax.random.choice(k[1], len(states), (count,), False)) for k in keys]

    def measured(method: Callable[..., search.SearchResult], estimates: Any) -> dict[str, Any]:
        columns: dict[str, list[float]] = {
            name: [] for name in ("generated", "evaluated", "solved", "shortest", "cost / least")
        }
        for estimate, place in zip(estimates, places, strict=True):
            found = jax.tree.map(np.asarray, method(estimate, jnp.asarray(states[place])))
            if found.overflowed.any():
                raise ValueError("a search overflowed: the counts would not be those of the method")
            columns["generated"].append(found.generated.mean())
            columns["evaluated"].append(found.evaluated.mean())
            columns["solved"].append(found.solved.mean())
            columns["shortest"].append((found.cost == distance[place]).mean())
            columns["cost / least"].append(found.cost.sum() / distance[place].sum())
        return {name: np.array(column) for name, column in columns.items()}

    table: dict[str, dict[str, Any]] = {}
    generated: dict[str, list[Any]] = {"A*": [], "Q*": []}
    evaluated: dict[str, list[Any]] = {"A*": [], "Q*": []}
    numbers, shortest = [], []
    for depth in reproduction.track(depths, "sets of actions"):
        puzzle = puzzles.pancake(size, depth=depth)
        numbers.append(puzzle.num_actions)
        for name, method in by_table(puzzle).items():
            row = measured(method, tables)
            table[f"{name}, {puzzle.num_actions} actions"] = row
            generated[name].append(row["generated"])
            evaluated[name].append(row["evaluated"])
            shortest.append(row["shortest"])
    train = jax.jit(lambda key: learn(key, single, config, updates))
    networks = [train(k[2]) for k in reproduction.track(keys, "networks")]
    learned = {}
    for name, method in by_network(single).items():
        learned[name] = measured(method, networks)
        table[f"{name}, {single.num_actions} actions, learned q"] = learned[name]
    growth = {name: float(np.mean(x[-1] / x[0])) for name, x in generated.items()}
    passes = float(np.mean(evaluated["Q*"][-1] / evaluated["Q*"][0]))
    share = learned["Q*"]["generated"].mean() / learned["A*"]["generated"].mean()
    solved, cost = learned["Q*"]["solved"].min(), learned["Q*"]["cost / least"].mean()
    more = f"{numbers[0]} to {numbers[-1]} actions"
    return reproduction.Findings(
        title=f"Sorting {size} pancakes with more and more actions",
        table=table,
        claims=[
            reproduction.Claim(
                "all paths under noisy estimates are shortest",
                bool(np.min(shortest) == 1.0),
                f"{np.min(shortest):.3f} of the paths at least",
            ),
            reproduction.Claim(
                f"{more}: A* generates at least 20 times as many states",
                growth["A*"] >= 20.0,
                f"{growth['A*']:.1f}",
            ),
            reproduction.Claim(
                f"{more}: the growth of Q* is at most a tenth of that",
                growth["Q*"] <= growth["A*"] / 10,
                f"{growth['Q*']:.1f} times as many states",
            ),
            reproduction.Claim(
                f"{more}: Q* evaluates less than 4 times as many",
                passes < 4.0,
                f"{passes:.1f}",
            ),
            reproduction.Claim(
                "Q* with the learned q solves all, at 1.05 times the least cost or less",
                bool(solved == 1.0 and cost <= 1.05),
                f"{solved:.3f} solved, {cost:.3f} times the least cost",
            ),
            reproduction.Claim(
                "it generates less than half of what A* does",
                bool(share < 0.5),
                f"{share:.2f} of it",
            ),
        ],
        panels={
            "states generated, log10": {
                name: reproduction.band(numbers, np.log10(np.stack(x, axis=1)))
                for name, x in generated.items()
            }
        },
        x_label="actions",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs, prints and saves; 0 if the claims hold."""
    return reproduction.main("qstar_pancake", Config, run, description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
