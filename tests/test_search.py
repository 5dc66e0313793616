"""A* and Q* search against sequential searches with a heap, breadth-first search and Dijkstra."""

import functools
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.csgraph
from jax.experimental import checkify

import pgjax as pg
from pgjax.envs import puzzles

SIZE = 6
PUZZLE = puzzles.pancake(SIZE)
STATES, DISTANCE = puzzles.shortest_distances(PUZZLE)
CODES = SIZE ** np.arange(SIZE)


def table_of(values):
    """An array by code, and a dict for the sequential searches."""
    dense = np.zeros(SIZE**SIZE, np.float32)
    dense[STATES @ CODES] = values
    by_state = {tuple(s): float(v) for s, v in zip(STATES.tolist(), values, strict=True)}
    return jnp.asarray(dense), by_state


def q_of(puzzle, heuristic):
    """c(s, a) + h(s') for all actions of all states."""

    def q(states):
        every = jnp.arange(puzzle.num_actions)
        following = jax.vmap(lambda s: jax.vmap(puzzle.move, (None, 0))(s, every))(states)
        return puzzle.costs + heuristic(following)

    return q


def searches(puzzle, heuristic, **options):
    """A* and Q* with the same estimates."""
    problem = {
        "transition": puzzle.transition,
        "is_goal": puzzle.is_goal,
        "num_actions": puzzle.num_actions,
        "capacity": 4096,
        "max_states": 2048,
        **options,
    }
    return (
        functools.partial(pg.search.a_star, heuristic=heuristic, **problem),
        functools.partial(pg.search.q_star, action_costs=q_of(puzzle, heuristic), **problem),
    )


@functools.cache
def compiled(which, depth, options):
    """`(table, roots, limits) -> results`, so that tests with other numbers share a program."""

    def run(table, roots, limits):
        heuristic = lambda states: table[states @ CODES]  # noqa: E731
        puzzle = puzzles.pancake(SIZE, depth=depth)
        search = searches(puzzle, heuristic, **dict(options), **limits)[which]
        return jax.lax.map(search, roots)

    return jax.jit(run)


COUNT = 30


def solve(which, table, roots, *, depth=1, limits=None, **options):
    """Results of A* (0) or Q* (1) for `COUNT` piles."""
    assert len(roots) == COUNT
    limits = {"weight": 1.0, "tolerance": 0.0, "max_iterations": 10_000, **(limits or {})}
    program = compiled(which, depth, tuple(options.items()))
    return jax.tree.map(np.asarray, program(table, jnp.asarray(roots), limits))


def each(found):
    """The results one by one."""
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(found.cost))]


def noisy(seed=0, high=3):
    rng = np.random.default_rng(seed)
    return np.maximum(0, DISTANCE - rng.integers(0, high, len(DISTANCE)))


def starts(seed=0):
    return np.random.default_rng(seed).choice(len(STATES), COUNT, replace=False)


def flipped(state, action):
    return (*state[: action + 2][::-1], *state[action + 2 :])


def sequential_q_star(root, h):
    """With a heap and a dict, one action at a time: (cost, generated, evaluated, keys)."""
    goal, order, closed, best = tuple(range(SIZE)), itertools.count(), {root: 0}, np.inf
    heap, keys, evaluated = [], [], 1

    def push(state, g):
        for action in range(SIZE - 1):
            f = g + 1 + h[flipped(state, action)]
            if f < best:
                heapq.heappush(heap, (f, next(order), state, action, g))

    push(root, 0)
    while heap:
        f, _, state, action, g = heapq.heappop(heap)
        if f >= best:
            break
        if g > closed[state]:
            continue
        keys.append(f)
        child = flipped(state, action)
        if g + 1 >= closed.get(child, np.inf):
            continue
        closed[child] = g + 1
        if child == goal:
            best = g + 1
        else:
            evaluated += 1
            push(child, g + 1)
    return best, len(keys), evaluated, keys


def sequential_a_star(root, h):
    """The same over states: (cost, generated, evaluated)."""
    goal, order, closed, best = tuple(range(SIZE)), itertools.count(), {root: 0}, np.inf
    heap, generated, evaluated = [(h[root], next(order), root, 0)], 0, 1
    while heap:
        f, _, state, g = heapq.heappop(heap)
        if f >= best:
            break
        if g > closed[state]:
            continue
        for action in range(SIZE - 1):
            generated += 1
            child = flipped(state, action)
            if g + 1 >= closed.get(child, np.inf):
                continue
            closed[child] = g + 1
            if child == goal:
                best = g + 1
            else:
                evaluated += 1
                if g + 1 + h[child] < best:
                    heapq.heappush(heap, (g + 1 + h[child], next(order), child, g + 1))
    return best, generated, evaluated


def replay(puzzle, root, found):
    """Takes the path's actions: the state and the cost at its end."""
    state, cost = jnp.asarray(root), 0.0
    for action in np.asarray(found.path)[: int(found.length)]:
        assert action >= 0
        state, step = puzzle.transition(state, int(action))
        cost += float(step)
    assert (np.asarray(found.path)[int(found.length) :] == -1).all()
    return state, cost


def test_one_at_a_time_is_the_sequential_search():
    table, h = table_of(noisy())
    roots = STATES[starts()]
    for which, reference in ((0, sequential_a_star), (1, sequential_q_star)):
        found = each(solve(which, table, roots))
        for root, best, one in zip(roots.tolist(), DISTANCE[starts()], found, strict=True):
            cost, generated, evaluated, *_ = reference(tuple(root), h)
            assert (one.cost, one.generated, one.evaluated) == (cost, generated, evaluated)
            assert cost == best


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("which", [0, 1])
def test_estimates_that_are_nowhere_too_high_give_shortest_paths(which, batch):
    options = {"batch": 7} if batch > 1 else {}
    for seed in range(4):
        table, _ = table_of(noisy(seed, 4))
        found = solve(which, table, STATES[starts(seed)], **options)
        np.testing.assert_array_equal(found.cost, DISTANCE[starts(seed)])
        np.testing.assert_array_equal(found.length, found.cost)
        np.testing.assert_array_equal(found.bound, found.cost)
        assert found.solved.all() and not found.overflowed.any()


def test_every_pile_of_tiles_by_manhattan_distance():
    puzzle = puzzles.sliding_tiles(2, 3)
    states, distance = puzzles.shortest_distances(puzzle)
    for search in searches(puzzle, manhattan(2, 3), capacity=2048, max_states=720, batch=4):
        found = jax.jit(lambda roots, s=search: jax.lax.map(s, roots))(jnp.asarray(states))
        np.testing.assert_array_equal(found.cost, distance)


def manhattan(rows, columns):
    """Moves of the tiles, were none in the way of another."""
    place = jnp.array([divmod(i, columns) for i in range(rows * columns)])

    def heuristic(states):
        away = jnp.abs(place - place[states]).sum(-1)
        return jnp.where(states == 0, 0, away).sum(-1).astype(jnp.float32)

    return heuristic


def test_exact_estimates_lead_along_shortest_paths_alone():
    table, h = table_of(DISTANCE)
    roots = STATES[starts()]
    for root, found in zip(roots.tolist(), each(solve(1, table, roots)), strict=True):
        level, edges, distance = {tuple(root)}, 0, int(h[tuple(root)])
        for left in range(distance, 0, -1):  # all actions on any shortest path
            taken = [(s, a) for s in level for a in range(SIZE - 1) if h[flipped(s, a)] == left - 1]
            edges += len(taken)
            level = {flipped(*edge) for edge in taken}
        assert int(found.cost) == distance <= int(found.generated) <= edges


def test_without_a_heuristic_it_is_uniform_cost_search():
    table, _ = table_of(np.zeros(len(DISTANCE)))
    roots = STATES[starts()]
    found = each(solve(1, table, roots))
    for root, distance, one in zip(roots.tolist(), DISTANCE[starts()], found, strict=True):
        assert one.cost == distance
        reached, level = {tuple(root)}, {tuple(root)}
        sizes = [1]
        for _ in range(distance):
            level = {flipped(s, a) for s in level for a in range(SIZE - 1)} - reached
            reached |= level
            sizes.append(len(level))
        # Every action of every state nearer to the root than the goal by two, some of those by one.
        nearer = sum(sizes[: max(distance - 1, 0)]) * (SIZE - 1)
        most = sizes[distance - 1] * (SIZE - 1) if distance else 0
        assert nearer <= int(one.generated) <= nearer + most


def test_fewer_states_are_generated_than_by_a_star():
    # Half the distance never falls by more than an action costs, so keys never fall along a path.
    table, h = table_of(DISTANCE // 2)
    roots = STATES[starts()]
    nodes, edges = solve(0, table, roots), solve(1, table, roots)
    for root, distance, generated in zip(
        roots.tolist(), DISTANCE[starts()], nodes.generated, strict=True
    ):
        *_, keys = sequential_q_star(tuple(root), h)
        below = sum(key < distance for key in keys)
        assert below <= generated  # ties at the cost of the path depend on their order
    assert edges.generated.sum() < nodes.generated.sum()


def test_a_root_that_is_solved():
    table, _ = table_of(noisy())
    for which in (0, 1):
        found = solve(which, table, np.tile(np.arange(SIZE), (COUNT, 1)))
        assert found.solved.all() and (found.path == -1).all()
        for name in ("cost", "length", "iterations", "generated", "evaluated"):
            assert not getattr(found, name).any()


@pytest.mark.parametrize("options", [{"capacity": 40}, {"max_states": 30}])
def test_overflow_is_reported_and_paths_stay_right(options):
    table, _ = table_of(np.zeros(len(DISTANCE)))
    seen = set()
    for which in (0, 1):
        roots = STATES[starts()]
        found = each(solve(which, table, roots, max_path=200, **options))
        for root, distance, one in zip(roots, DISTANCE[starts()], found, strict=True):
            if one.solved:
                state, cost = replay(PUZZLE, root, one)
                assert PUZZLE.is_goal(state) and cost == one.cost >= distance
            else:
                assert np.isinf(one.cost) and one.length == 0
            assert one.overflowed or one.cost == distance
            seen.add((bool(one.solved), bool(one.overflowed)))
    assert (False, True) in seen or (True, True) in seen


@pytest.mark.parametrize(("depth", "options"), [(1, {}), (2, {"batch": 5, "capacity": 8192})])
@pytest.mark.parametrize("which", [0, 1])
def test_paths_lead_to_the_goal_at_their_cost(which, depth, options):
    puzzle = puzzles.pancake(SIZE, depth=depth)
    table, _ = table_of(noisy(3))
    roots = STATES[starts()]
    found = each(solve(which, table, roots, depth=depth, **options))
    for root, distance, one in zip(roots, DISTANCE[starts()], found, strict=True):
        state, cost = replay(puzzle, root, one)
        assert puzzle.is_goal(state) and cost == one.cost == distance


@pytest.mark.parametrize("weight", [0.3, 0.6])
@pytest.mark.parametrize("which", [0, 1])
def test_a_small_weight_costs_at_most_its_inverse(which, weight):
    for seed in range(3):
        table, _ = table_of(noisy(seed))
        found = solve(which, table, STATES[starts(seed)], limits={"weight": weight})
        best = DISTANCE[starts(seed)]
        assert (found.cost <= best / weight + 1e-4).all()
        assert (found.bound <= best + 1e-4).all()


def test_it_may_stop_at_the_first_goal():
    # Estimates below 0 next to the goal are not too high, but lead to it before it is proven best.
    short = np.random.default_rng(0).integers(0, 5, len(DISTANCE))
    table, _ = table_of(DISTANCE - short)
    longer, fewer = np.zeros(2), np.zeros(2)
    for which, seed in itertools.product((0, 1), range(3)):
        first, proven = (
            solve(which, table, STATES[starts(seed)], limits={"tolerance": t}) for t in (np.inf, 0)
        )
        np.testing.assert_array_equal(proven.cost, DISTANCE[starts(seed)])
        assert first.solved.all() and (first.generated <= proven.generated).all()
        longer[which] += (first.cost > proven.cost).sum()
        fewer[which] += (first.generated < proven.generated).sum()
    assert (fewer > 0).all() and (longer > 0).all()


def test_it_gives_up_when_told_to():
    table, _ = table_of(noisy())
    for which in (0, 1):
        found = solve(which, table, STATES[-COUNT:], limits={"max_iterations": 2})
        assert not found.solved.any() and (found.iterations == 2).all()
        assert np.isinf(found.cost).all() and (found.path == -1).all()
        # Nothing that was not yet proven: the bound is one on the true cost.
        assert (found.bound <= DISTANCE[-COUNT:]).all()


class Graph:
    """A random one, with costs that may be 0 or forbid an action."""

    def __init__(self, seed, nodes=60, actions=4):
        rng = np.random.default_rng(seed)
        self.to = rng.integers(0, nodes - 10, (nodes, actions))
        self.to[10:20] = rng.integers(10, 20, (10, actions))  # no way out
        cost = rng.choice(
            [0.0, 0.5, 1.0, 2.25, np.inf], (nodes, actions), p=[0.1, *[0.25] * 3, 0.15]
        )
        self.cost = cost.astype(np.float32)
        weights = np.full((nodes, nodes), np.inf)
        np.minimum.at(weights, (np.arange(nodes)[:, None], self.to), np.maximum(cost, 1e-9))
        graph = scipy.sparse.csgraph.csgraph_from_dense(weights, null_value=np.inf)
        self.to_goal = scipy.sparse.csgraph.dijkstra(graph.T, indices=0)

    def transition(self, state, action):
        return jnp.asarray(self.to)[state[0], action][None], jnp.asarray(self.cost)[
            state[0], action
        ]

    def is_goal(self, state):
        return state[0] == 0


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("which", [0, 1])
def test_random_graphs_by_dijkstra(which, batch):
    """Costs of 0, forbidden actions, goals that cannot be reached, estimates that jump."""

    @jax.jit
    def run(to, cost, h, roots):
        def transition(state, action):
            return to[state[0], action][None], cost[state[0], action]

        options = {
            "transition": transition,
            "is_goal": lambda state: state[0] == 0,
            "num_actions": 4,
            "capacity": 2000,
            "max_states": 120,
            "batch": batch,
        }
        a = functools.partial(pg.search.a_star, heuristic=lambda s: h[s[:, 0]], **options)
        q = functools.partial(
            pg.search.q_star, action_costs=lambda s: cost[s[:, 0]] + h[to[s[:, 0]]], **options
        )
        return jax.lax.map((a, q)[which], roots)

    unsolved = 0
    for seed in range(4):
        graph = Graph(seed)
        part = np.random.default_rng(seed).random(60)
        h = np.where(np.isfinite(graph.to_goal), graph.to_goal, 0.0) * part
        roots = np.arange(60)[:, None]
        found = run(graph.to, graph.cost, h.astype(np.float32), roots)
        np.testing.assert_allclose(found.cost, graph.to_goal, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found.solved, np.isfinite(graph.to_goal))
        unsolved += int((~found.solved).sum())
        assert np.isinf(found.bound[~found.solved]).all()
        assert (np.asarray(found.bound) <= graph.to_goal + 1e-5).all()
        assert not found.overflowed.any()
        for root, one in zip(roots, each(jax.tree.map(np.asarray, found)), strict=True):
            if one.solved:
                state, cost = replay(graph, root, one)
                assert graph.is_goal(state)
                np.testing.assert_allclose(cost, one.cost, rtol=1e-5)
    assert unsolved > 0


def test_states_too_many_to_count():
    puzzle = puzzles.sliding_tiles(4, 4)
    root = puzzles.scramble(puzzle, jax.random.key(3), moves=30, max_moves=30)
    found = [jax.jit(s)(root) for s in searches(puzzle, manhattan(4, 4), batch=8)]
    assert found[0].solved and found[0].cost == found[1].cost <= 30
    state, cost = replay(puzzle, root, found[1])
    assert puzzle.is_goal(state) and cost == found[1].cost
    assert found[1].generated < found[0].generated


def test_many_at_once():
    table, _ = table_of(noisy())
    roots = jnp.asarray(STATES[starts()])
    heuristic = lambda states: table[states @ CODES]  # noqa: E731
    for which, search in enumerate(searches(PUZZLE, heuristic, capacity=512, max_states=512)):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.jit(jax.vmap(search))(roots),
            solve(which, table, roots),
        )


def test_a_path_longer_than_there_is_room():
    table, _ = table_of(noisy())
    want = solve(1, table, STATES[-COUNT:])
    found = solve(1, table, STATES[-COUNT:], max_path=2)
    np.testing.assert_array_equal(found.length, DISTANCE[-COUNT:])
    np.testing.assert_array_equal(found.path, want.path[:, :2])


def test_wide_numbers_change_nothing():
    want = solve(1, table_of(noisy())[0], STATES[starts()])
    with jax.enable_x64(True):
        table, _ = table_of(noisy())
        puzzle = puzzles.pancake(SIZE)
        _, search = searches(puzzle, lambda states: table[states @ CODES])
        found = jax.jit(lambda roots: jax.lax.map(search, roots))(jnp.asarray(STATES[starts()]))
        assert found.cost.dtype == jnp.float32
        np.testing.assert_array_equal(found.cost, want.cost)
        np.testing.assert_array_equal(found.generated, want.generated)


def test_bad_searches():
    table, _ = table_of(noisy())
    heuristic = lambda states: table[states @ CODES]  # noqa: E731
    root = STATES[-1]
    for search in (pg.search.a_star, pg.search.q_star):
        judge = "heuristic" if search is pg.search.a_star else "action_costs"
        options = {
            "transition": PUZZLE.transition,
            "is_goal": PUZZLE.is_goal,
            "num_actions": 5,
            "capacity": 100,
            judge: heuristic if judge == "heuristic" else q_of(PUZZLE, heuristic),
        }
        for name, value in {
            "weight": 0.0,
            "tolerance": -1.0,
            "batch": 0,
            "num_actions": 0,
            "max_states": 0,
            "max_path": 0,
        }.items():
            with pytest.raises(ValueError, match=f"^{name}"):
                search(root, **{**options, name: value})
        with pytest.raises(ValueError, match="^capacity.*batch x num_actions = 5"):
            search(root, **{**options, "capacity": 4})
        with pytest.raises(ValueError, match="^root.*integer"):
            search(jnp.ones(SIZE), **options)
        with pytest.raises(ValueError, match="^root.*rank"):
            search(STATES, **options)
        paid = lambda s, a: (PUZZLE.move(s, a), jnp.float32(-1.0))  # noqa: E731
        with pytest.raises(ValueError, match="^transition.*at least 0, got -1"):
            search(root, **{**options, "transition": paid})

        def late(state, action):  # an action pays for itself, but not where the search begins
            first = jnp.all(state == jnp.asarray(root))
            return PUZZLE.move(state, action), jnp.where(first | (action > 0), 1.0, -1.0)

        if search is pg.search.a_star:
            continue  # the same code
        run = functools.partial(search, **{**options, "transition": late})
        assert jax.jit(run)(root).iterations > 0
        error, _ = checkify.checkify(jax.jit(run))(jnp.asarray(root))
        assert "transition: expected costs of at least 0" in error.get()
