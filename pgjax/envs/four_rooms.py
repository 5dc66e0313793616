"""Four rooms in a square, joined by four doors; a walker, and a goal in one of the cells.

```
. . # . .
. . D . .
# D # D #
. . D . .
. . # . .
```

Cells are numbered row by row, walls left out. All functions are of one episode; `jax.vmap` makes
batches. The world is that of Sutton, Precup and Singh 1999, here with rooms of one size.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pgjax import _checks
from pgjax.envs.core import Step
from pgjax.types import pytree_dataclass

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # north, east, south, west
NO_ROOM = -1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourRooms:
    """How large the rooms are.

    Attributes:
      room: cells along each side of a room, ≥ 1. The doors are in the middle of the walls.
      max_steps: after which an episode is cut off; the state is then truncated, not terminal.
    """

    room: int = 5
    max_steps: int = 60

    def __post_init__(self) -> None:
        _checks.in_range("room", self.room, 1)
        _checks.in_range("max_steps", self.max_steps, 1)

    @property
    def side(self) -> int:
        """Rows, and columns, of the square."""
        return 2 * self.room + 1

    @property
    def num_cells(self) -> int:
        """Cells one can stand on: four rooms and four doors."""
        return 4 * self.room**2 + 4


@pytree_dataclass
class State:
    """`visited` has bit k set once room k was entered; rooms are 0 and 1 above 2 and 3."""

    cell: Int[Array, ""]
    goal: Int[Array, ""]
    visited: Int[Array, ""]
    steps: Int[Array, ""]


def reset(
    env: FourRooms,
    key: PRNGKeyArray,
    *,
    start: int | Int[Array, ""] | None = None,
    goal: int | Int[Array, ""] | None = None,
) -> tuple[State, Float[Array, " O"]]:
    """The beginning of an episode.

    Args:
      env: how large it is.
      key: of what is not given.
      start, goal: cells; None: drawn at random, and not the same if both are.

    Returns:
      the state and the first observation.

    Raises:
      ValueError: a concrete cell outside [0, num_cells).
    """
    for name, cell in (("start", start), ("goal", goal)):
        if cell is not None and _checks.is_concrete(cell):
            _checks.in_range(name, int(cell), 0, env.num_cells - 1)
    start_key, goal_key = jax.random.split(key)
    if start is None:
        start = jax.random.randint(start_key, (), 0, env.num_cells)
    if goal is None:
        shift = jax.random.randint(goal_key, (), 1, env.num_cells)
        goal = (start + shift) % env.num_cells
    state = State(
        cell=jnp.asarray(start, jnp.int32),
        goal=jnp.asarray(goal, jnp.int32),
        visited=_bit(env, jnp.asarray(start, jnp.int32)),
        steps=jnp.int32(0),
    )
    return state, observe(env, state)


def step(env: FourRooms, state: State, action: Int[Array, ""]) -> Step:
    """Moves by `MOVES[action]`, or stays where a wall is; reward 1 at the goal, where it ends."""
    cell = jnp.asarray(successors(env))[state.cell, action]
    state = State(
        cell=cell,
        goal=state.goal,
        visited=state.visited | _bit(env, cell),
        steps=state.steps + 1,
    )
    there = cell == state.goal
    return Step(
        state=state,
        observation=observe(env, state),
        reward=there.astype(jnp.float32),
        terminated=there,
        truncated=~there & (state.steps >= env.max_steps),
    )


def observe(env: FourRooms, state: State) -> Float[Array, " O"]:
    """Row and column of the walker, one-hot each, `[2 side]`; where the goal is cannot be seen."""
    row, column = jnp.asarray(positions(env))[state.cell]
    return jnp.concatenate([jax.nn.one_hot(row, env.side), jax.nn.one_hot(column, env.side)])


@functools.lru_cache(maxsize=16)
def positions(env: FourRooms) -> Int[np.ndarray, "C 2"]:
    """Row and column of every cell."""
    free = np.ones((env.side, env.side), bool)
    free[env.room, :] = free[:, env.room] = False
    for door in (env.room // 2, env.side - 1 - env.room // 2):
        free[env.room, door] = free[door, env.room] = True
    return np.argwhere(free).astype(np.int32)


@functools.lru_cache(maxsize=16)
def successors(env: FourRooms) -> Int[np.ndarray, "C 4"]:
    """The cell that each move leads to from each cell."""
    cells = positions(env)
    number = {tuple(x): i for i, x in enumerate(cells.tolist())}
    return np.array(
        [
            [number.get((row + down, column + right), i) for down, right in MOVES]
            for i, (row, column) in enumerate(cells.tolist())
        ],
        np.int32,
    )


def rooms(env: FourRooms) -> Int[np.ndarray, " C"]:
    """The room of every cell, `NO_ROOM` for doors."""
    row, column = positions(env).T
    inside = (row != env.room) & (column != env.room)
    return np.where(inside, 2 * (row > env.room) + (column > env.room), NO_ROOM).astype(np.int32)


def distances(env: FourRooms, goal: int) -> Int[np.ndarray, " C"]:
    """Moves that the shortest way from every cell to the goal takes."""
    found = np.full(env.num_cells, -1, np.int32)
    found[goal], reached = 0, [goal]
    neighbours = successors(env)
    for cell in reached:
        for other in neighbours[cell]:  # moves can be taken back
            if found[other] < 0:
                found[other] = found[cell] + 1
                reached.append(int(other))
    return found


def _bit(env: FourRooms, cell: Int[Array, ""]) -> Int[Array, ""]:
    room = jnp.asarray(rooms(env))[cell]
    return jnp.where(room == NO_ROOM, 0, 1 << jnp.maximum(room, 0)).astype(jnp.int32)
