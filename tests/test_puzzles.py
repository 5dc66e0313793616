"""Puzzles against published numbers of their states, and linear algebra where there is some."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax.envs import puzzles


def by_distance(puzzle, **options):
    return np.bincount(puzzles.shortest_distances(puzzle, **options)[1]).tolist()


@pytest.mark.parametrize(
    ("puzzle", "counts"),
    [
        # Known: the piles of 7 pancakes by their number of flips.
        (puzzles.pancake(7), [1, 6, 30, 149, 543, 1357, 1903, 1016, 35]),
        (puzzles.pancake(5), [1, 4, 12, 35, 48, 20]),
        # The puzzle of 2 x 3: 360 = 6!/2 states, one of them 21 moves away.
        (
            puzzles.sliding_tiles(2, 3),
            [1, 2, 3, 5, 6, 7, 10, 12, 12, 16, 23, 25, 28, 39, 44, 40, 29, 21, 18, 12, 6, 1],
        ),
        # In 3 x 3 any pattern of buttons is another pattern of lamps: binomial coefficients.
        (puzzles.lights_out(3), [1, 9, 36, 84, 126, 126, 84, 36, 9, 1]),
    ],
)
def test_how_many_states_are_how_far(puzzle, counts):
    assert by_distance(puzzle) == counts


def test_larger_puzzles_near_their_goals():
    assert by_distance(puzzles.cube_2x2x2(), max_distance=4) == [1, 9, 54, 321, 1847]
    found = by_distance(puzzles.sliding_tiles(3, 3), max_distance=12)
    assert found == [1, 2, 4, 8, 16, 20, 39, 62, 116, 152, 286, 396, 748]


def test_solvable_lamps_are_the_span_of_the_buttons():
    puzzle = puzzles.lights_out(4)
    states, _ = puzzles.shortest_distances(puzzle)
    buttons = np.stack([puzzle.move(puzzle.goal, a) for a in range(16)]) % 2
    left, rank = buttons.copy(), 0
    for column in range(16):
        rows = np.flatnonzero(left[rank:, column]) + rank
        if rows.size:
            left[[rank, rows[0]]] = left[[rows[0], rank]]
            others = [r for r in range(16) if r != rank and left[r, column]]
            left[others] ^= left[rank]
            rank += 1
    assert len(states) == 2**rank == 4096


def test_moves_of_the_cube():
    puzzle = puzzles.cube_2x2x2()
    state = puzzles.scramble(puzzle, jax.random.key(0), moves=20, max_moves=20)
    assert np.bincount(np.asarray(state)).tolist() == [4] * 6
    for face in range(3):
        quarter, half, three = (puzzle.move(state, 3 * face + turn) for turn in range(3))
        again = puzzle.move(quarter, 3 * face)
        np.testing.assert_array_equal(again, half)
        np.testing.assert_array_equal(puzzle.move(again, 3 * face), three)
        np.testing.assert_array_equal(puzzle.move(three, 3 * face), state)
        assert int((quarter != state).sum()) <= 12  # 4 + 8 stickers of a face move
        fixed = [i for i in range(24) if i < 3]  # those of the corner (-1, -1, -1)
        np.testing.assert_array_equal(np.asarray(quarter)[fixed], np.asarray(state)[fixed])


@pytest.mark.parametrize(("depth", "count"), [(1, 6), (2, 42), (3, 258)])
def test_sequences_of_flips_as_moves(depth, count):
    puzzle, single = puzzles.pancake(7, depth=depth), puzzles.pancake(7)
    assert puzzle.num_actions == count
    assert np.bincount(np.asarray(puzzle.costs).astype(int)).tolist() == [
        0,
        *(6**d for d in range(1, depth + 1)),
    ]
    if depth > 1:  # the move behind the single ones is the first flip twice, the next first, second
        state = jnp.array([3, 1, 4, 0, 5, 2, 6])
        np.testing.assert_array_equal(puzzle.move(state, 6), state)
        want = single.move(single.move(state, 0), 1)
        np.testing.assert_array_equal(puzzle.move(state, 7), want)


def test_tiles_slide():
    puzzle = puzzles.sliding_tiles(2, 3)
    goal = puzzle.goal
    assert goal.tolist() == [0, 1, 2, 3, 4, 5]
    moved = [puzzle.move(goal, a).tolist() for a in range(4)]
    assert moved[0] == moved[3] == goal.tolist()  # into the frame
    assert moved[1] == [1, 0, 2, 3, 4, 5] and moved[2] == [3, 1, 2, 0, 4, 5]
    assert puzzle.is_goal(goal) and not puzzle.is_goal(jnp.array(moved[1]))


def test_scrambles_are_as_far_as_their_moves_at_most():
    puzzle = puzzles.pancake(6)
    states, distance = puzzles.shortest_distances(puzzle)
    far = {tuple(s): d for s, d in zip(states.tolist(), distance, strict=True)}
    keys = jax.random.split(jax.random.key(0), 200)
    moves = jnp.arange(200) % 5
    drawn = jax.jit(jax.vmap(lambda k, m: puzzles.scramble(puzzle, k, moves=m, max_moves=6)))(
        keys, moves
    )
    for state, number in zip(np.asarray(drawn).tolist(), moves.tolist(), strict=True):
        assert far[tuple(state)] <= number
    assert (np.asarray(drawn)[np.asarray(moves) == 0] == np.arange(6)).all()


def test_a_puzzle_as_an_environment():
    puzzle = puzzles.pancake(4, depth=2)
    env = puzzles.as_environment(puzzle, max_moves=3)
    state, observation = env.reset(jax.random.key(1))
    np.testing.assert_array_equal(observation.reshape(4, 4).argmax(1), state)
    step = env.step(jax.random.key(0), puzzle.move(puzzle.goal, 1), jnp.int32(1))
    assert step.terminated and float(step.reward) == -1.0 and not step.truncated
    double = env.step(jax.random.key(0), puzzle.goal, jnp.int32(3 + 1))
    assert float(double.reward) == -2.0 and not double.terminated
    running = pg.sampling.start_environments(env, jax.random.key(0), 5)
    act = lambda key, observation: pg.sampling.Decision(jnp.zeros(5, jnp.int32))  # noqa: E731
    _, seen, _ = pg.sampling.unroll_environments(env, act, running, jax.random.key(1), num_steps=3)
    assert seen.observation.shape == (3, 5, 16)


def test_bad_puzzles():
    with pytest.raises(ValueError, match="^size"):
        puzzles.pancake(1)
    with pytest.raises(ValueError, match="^depth"):
        puzzles.pancake(4, depth=0)
    with pytest.raises(ValueError, match="^columns"):
        puzzles.sliding_tiles(3, 1)
    with pytest.raises(ValueError, match="^side"):
        puzzles.lights_out(0)
    with pytest.raises(ValueError, match=r"^puzzle\.costs"):
        puzzles.shortest_distances(puzzles.pancake(4, depth=2))
    with pytest.raises(ValueError, match="^moves"):
        puzzles.scramble(puzzles.pancake(4), jax.random.key(0), moves=3, max_moves=2)
    with pytest.raises(ValueError, match="^max_moves"):
        puzzles.as_environment(puzzles.pancake(4), max_moves=0)
