"""The world of four rooms: its map, its moves, its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.envs import four_rooms

ENV = four_rooms.FourRooms(room=2, max_steps=7)
# The map of the module's docstring, `D` a door.
MAP = ["..#..", "..D..", "#D#D#", "..D..", "..#.."]


def test_the_map_is_that_of_the_picture():
    expected = [(r, c) for r, line in enumerate(MAP) for c, x in enumerate(line) if x != "#"]
    assert [tuple(x) for x in four_rooms.positions(ENV).tolist()] == expected
    assert len(expected) == ENV.num_cells
    doors = [four_rooms.rooms(ENV)[i] for i, (r, c) in enumerate(expected) if MAP[r][c] == "D"]
    assert doors == [four_rooms.NO_ROOM] * 4
    assert np.bincount(four_rooms.rooms(ENV) + 1).tolist() == [4, 4, 4, 4, 4]


def test_moves_go_to_the_neighbour_or_stay_at_a_wall():
    cells = [tuple(x) for x in four_rooms.positions(ENV).tolist()]
    for i, (row, column) in enumerate(cells):
        for action, (down, right) in enumerate(four_rooms.MOVES):
            target = (row + down, column + right)
            expected = target if target in cells else (row, column)
            assert cells[four_rooms.successors(ENV)[i, action]] == expected


def test_distances_are_shortest_ways():
    """Against powers of the matrix of moves."""
    neighbours = np.zeros((ENV.num_cells, ENV.num_cells), int)
    for i, row in enumerate(four_rooms.successors(ENV)):
        neighbours[i, row] = 1
    for goal in (0, ENV.num_cells - 1):
        reach, expected = np.eye(ENV.num_cells, dtype=int), np.full(ENV.num_cells, -1)
        for moves in range(ENV.num_cells):
            expected[(expected < 0) & (reach[:, goal] > 0)] = moves
            reach = (reach @ (neighbours + np.eye(ENV.num_cells, dtype=int)) > 0).astype(int)
        np.testing.assert_array_equal(four_rooms.distances(ENV, goal), expected)


def walk(actions, **options):
    state, observation = four_rooms.reset(ENV, jax.random.key(0), **options)
    found = [(state, observation)]
    for action in actions:
        result = four_rooms.step(ENV, found[-1][0], jnp.int32(action))
        found.append(result)
    return found


def test_a_walk_through_a_door_ends_at_the_goal_or_in_time():
    # From the corner south, then east through the door into the next room: cells (1, 0) ... (1, 3).
    cells = [tuple(x) for x in four_rooms.positions(ENV).tolist()]
    goal = cells.index((1, 3))
    found = walk([2, 1, 1, 1], start=0, goal=goal)
    assert [int(x[0].visited) for x in found] == [1, 1, 1, 1, 3]
    assert [float(x.reward) for x in found[1:]] == [0, 0, 0, 1]
    assert [bool(x.terminated) for x in found[1:]] == [False] * 3 + [True]
    row, column = np.split(np.asarray(found[-1].observation), 2)
    assert (row.argmax(), column.argmax(), row.sum(), column.sum()) == (1, 3, 1, 1)
    found = walk([0] * 7, start=0, goal=goal)
    assert [bool(x.truncated) for x in found[1:]] == [False] * 6 + [True]
    assert not any(bool(x.terminated) for x in found[1:])


def test_a_goal_reached_in_the_last_step_is_reached():
    cells = [tuple(x) for x in four_rooms.positions(ENV).tolist()]
    found = walk([0, 0, 0, 2, 1, 1, 1], start=0, goal=cells.index((1, 3)))
    assert bool(found[-1].terminated) and not bool(found[-1].truncated)


def test_random_starts_are_not_at_the_goal():
    keys = jax.random.split(jax.random.key(1), 500)
    state, _ = jax.vmap(lambda key: four_rooms.reset(ENV, key))(keys)
    assert not bool(jnp.any(state.cell == state.goal))
    assert set(np.asarray(state.cell).tolist()) == set(range(ENV.num_cells))


def test_bad_input():
    with pytest.raises(ValueError, match="room: .*0"):
        four_rooms.FourRooms(room=0)
    with pytest.raises(ValueError, match="max_steps: .*0"):
        four_rooms.FourRooms(max_steps=0)
    with pytest.raises(ValueError, match="start: .*20"):
        four_rooms.reset(ENV, jax.random.key(0), start=20)
    with pytest.raises(ValueError, match="goal: .*-1"):
        four_rooms.reset(ENV, jax.random.key(0), goal=-1)
