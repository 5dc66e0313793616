"""Puzzles with one goal and moves of known cost: pancakes, sliding tiles, lights out, a small cube.

A state is a vector of small integers, and a puzzle a few pure functions of one state, for searches,
and as an `Environment` for agents. `shortest_distances` looks through all of a small one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Box, Discrete, Environment, Step

State = Int[Array, " S"]


class Puzzle(NamedTuple):
    """What is to be brought to its goal.

    Attributes:
      goal: int32 `[S]`.
      move: `(state, action) -> state`; a move that is not possible leaves it as it is.
      costs: of the actions, f32 `[A]`.
      num_values: entries of states are in [0, num_values).
    """

    goal: State
    move: Callable[[State, Int[Array, ""]], State]
    costs: Float[Array, " A"]
    num_values: int

    @property
    def num_actions(self) -> int:
        """A."""
        return self.costs.shape[0]

    def transition(self, state: State, action: Int[Array, ""]) -> tuple[State, Float[Array, ""]]:
        """The state after a move, and what the move cost."""
        return self.move(state, action), self.costs[action]

    def is_goal(self, state: State) -> Bool[Array, ""]:
        """Whether the state is the goal."""
        return jnp.all(state == self.goal)


def pancake(size: int, *, depth: int = 1) -> Puzzle:
    """A pile of pancakes to be sorted by turning over the upper ones, at least two at a time.

    Args:
      size: N ≥ 2; states are permutations of 0 to N - 1, N - 1 flips, each of cost 1.
      depth: ≥ 1; with it also all sequences of up to so many flips are single moves, which cost as
        much as their flips: N - 1 + (N - 1)² + … moves. Shortest paths cost what they did.

    Raises:
      ValueError: a number out of range.
    """
    _checks.in_range("size", size, 2)
    _checks.in_range("depth", depth, 1)
    flips = [np.r_[np.arange(k)[::-1], np.arange(k, size)] for k in range(2, size + 1)]
    moves, costs = [], []
    for length in range(1, depth + 1):
        for sequence in itertools.product(flips, repeat=length):
            places = np.arange(size)
            for flip in sequence:
                places = places[flip]
            moves.append(places)
            costs.append(length)
    return _of_permutations(np.arange(size), moves, costs)


def sliding_tiles(rows: int = 3, columns: int = 3) -> Puzzle:
    """Tiles in a frame with one gap (0, at the end in the first corner), moved into it one by one.

    The moves push the gap up, right, down, left, each at cost 1; half of all arrangements can be
    solved.

    Args:
      rows, columns: at least 2 each.

    Raises:
      ValueError: a number out of range.
    """
    _checks.in_range("rows", rows, 2)
    _checks.in_range("columns", columns, 2)
    size = rows * columns
    to = np.tile(np.arange(size)[:, None], 4)  # of the gap, by its place and the move
    for place, (row, column) in enumerate(np.ndindex(rows, columns)):
        for action, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            if 0 <= row + down < rows and 0 <= column + right < columns:
                to[place, action] = (row + down) * columns + column + right
    targets = jnp.asarray(to, jnp.int32)

    def move(state: State, action: Int[Array, ""]) -> State:
        gap = jnp.argmin(state)
        target = targets[gap, action]
        return state.at[gap].set(state[target]).at[target].set(0)

    return Puzzle(jnp.arange(size, dtype=jnp.int32), move, jnp.ones(4), size)


def lights_out(side: int = 5) -> Puzzle:
    """Lamps in a square to be put out; each button turns its own lamp and those beside it over.

    Args:
      side: ≥ 1; side² lamps, as many buttons, each of cost 1. In some sizes, such as 5, not all
        patterns can be put out.

    Raises:
      ValueError: a number out of range.
    """
    _checks.in_range("side", side, 1)
    place = np.stack(np.unravel_index(np.arange(side**2), (side, side)), 1)
    apart = np.abs(place[:, None] - place[None]).sum(-1)
    turned = jnp.asarray(apart <= 1, jnp.int32)
    return Puzzle(
        jnp.zeros(side**2, jnp.int32),
        lambda state, action: state ^ turned[action],
        jnp.ones(side**2),
        2,
    )


def cube_2x2x2() -> Puzzle:
    """The cube of 2 x 2 x 2, of which one corner stays where it is.

    States: the colours, 0 to 5, of its 24 stickers; 9 moves of cost 1: three faces by a quarter, a
    half and three quarters. 3,674,160 states, at most 11 moves from the goal.
    """
    # A sticker is the corner it is on, with coordinates -1 and 1, and the direction it looks.
    stickers = [
        (*corner, axis) for corner in itertools.product((-1, 1), repeat=3) for axis in range(3)
    ]
    number = {sticker: i for i, sticker in enumerate(stickers)}
    moves = []
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.arange(24)
        for i, (*corner, looks) in enumerate(stickers):
            if corner[axis] == 1:
                new = list(corner)
                new[first], new[second] = -corner[second], corner[first]
                looks = {axis: axis, first: second, second: first}[looks]
                turn[number[(*new, looks)]] = i
        moves += [turn, turn[turn], turn[turn][turn]]
    colours = [2 * axis + (corner[axis] == 1) for *corner, axis in stickers]
    return _of_permutations(np.array(colours), moves, [1] * 9)


def scramble(
    puzzle: Puzzle, key: PRNGKeyArray, *, moves: int | Int[Array, ""], max_moves: int
) -> State:
    """The goal after so many moves, each drawn uniformly.

    Args:
      puzzle: where the goal and the moves are from. Moves that lead away from the goal must be
        reversible for the state to be solvable.
      key: of the moves.
      moves: in [0, max_moves]; may be traced.
      max_moves: static.

    Raises:
      ValueError: a `max_moves` below 0, concrete `moves` out of range.
    """
    _checks.in_range("max_moves", max_moves, 0)
    _checks.in_range("moves", moves, 0, max_moves)
    actions = jax.random.randint(key, (max_moves,), 0, puzzle.num_actions)

    def one(state: State, step: tuple[Array, Array]) -> tuple[State, None]:
        number, action = step
        return jnp.where(number < moves, puzzle.move(state, action), state), None

    return jax.lax.scan(one, puzzle.goal, (jnp.arange(max_moves), actions))[0]


def as_environment(puzzle: Puzzle, *, max_moves: int) -> Environment:
    """Episodes that begin 1 to `max_moves` random moves from the goal and end as it is reached.

    Random moves may have led back, so some begin at the goal itself. The reward is minus the cost
    of a move; observations are one-hot, f32 `[S num_values]`.

    Raises:
      ValueError: a `max_moves` below 1.
    """
    _checks.in_range("max_moves", max_moves, 1)

    def reset(key: PRNGKeyArray) -> tuple[State, Float[Array, " O"]]:
        count_key, move_key = jax.random.split(key)
        moves = jax.random.randint(count_key, (), 1, max_moves + 1)
        state = scramble(puzzle, move_key, moves=moves, max_moves=max_moves)
        return state, observe(puzzle, state)

    def step(key: PRNGKeyArray, state: State, action: Int[Array, ""]) -> Step:
        state, cost = puzzle.transition(state, action)
        return Step(state, observe(puzzle, state), -cost, puzzle.is_goal(state), jnp.bool_(False))

    size = puzzle.goal.size * puzzle.num_values
    return Environment(reset, step, Box((size,), 0.0, 1.0), Discrete(puzzle.num_actions), "Puzzle")


def observe(puzzle: Puzzle, state: Int[Array, "*B S"]) -> Float[Array, "*B O"]:
    """States one-hot, as flat vectors."""
    every = jax.nn.one_hot(state, puzzle.num_values)
    return every.reshape(*state.shape[:-1], -1)


def shortest_distances(
    puzzle: Puzzle, *, max_distance: int | None = None, chunk: int = 4096
) -> tuple[Int[np.ndarray, "M S"], Int[np.ndarray, " M"]]:
    """All states from which the goal can be reached, and how far each is, by breadth-first search.

    Args:
      puzzle: with moves of cost 1 that can be undone at that cost.
      max_distance: farther ones are left out; None: all.
      chunk: states moved at once.

    Returns:
      states int32 `[M, S]`, in order of distance; distances int32 `[M]`. In NumPy: their number is
      not known before.

    Raises:
      ValueError: costs other than 1.
    """
    if not np.all(np.asarray(puzzle.costs) == 1):
        raise ValueError(f"puzzle.costs: expected 1 each, got {np.unique(puzzle.costs)}")
    actions = jnp.arange(puzzle.num_actions)
    follow = jax.jit(jax.vmap(lambda s: jax.vmap(puzzle.move, (None, 0))(s, actions)))
    size = puzzle.goal.size
    levels = [np.asarray(puzzle.goal, np.int32)[None]]
    seen = _packed(levels[0])
    while levels[-1].size and (max_distance is None or len(levels) <= max_distance):
        found = []
        for part in range(0, len(levels[-1]), chunk):
            states = levels[-1][part : part + chunk]
            padded = np.resize(states, (chunk, size))  # one shape, compiled once
            found.append(np.asarray(follow(padded))[: len(states)].reshape(-1, size))
        packed, first = np.unique(_packed(np.concatenate(found)), return_index=True)
        new = ~np.isin(packed, seen)
        levels.append(np.concatenate(found)[first[new]])
        # Moves can be undone: what they lead to is at most one farther than where they began.
        seen = np.concatenate([_packed(x) for x in levels[-2:]])
    distances = np.repeat(np.arange(len(levels)), [len(x) for x in levels])
    return np.concatenate(levels), distances.astype(np.int32)


def _packed(states: Int[np.ndarray, "M S"]) -> np.ndarray:
    """Each state as one element, by which NumPy can sort."""
    rows = np.ascontiguousarray(states, np.uint8)
    return rows.view(np.dtype((np.void, rows.shape[1]))).reshape(-1)


def _of_permutations(goal: np.ndarray, moves: Sequence[np.ndarray], costs: Sequence[int]) -> Puzzle:
    """Moves by which each place gets what was at another one."""
    places = jnp.asarray(np.stack(moves), jnp.int32)
    return Puzzle(
        jnp.asarray(goal, jnp.int32),
        lambda state, action: state[places[action]],
        jnp.asarray(costs, jnp.float32),
        int(goal.max()) + 1,
    )
