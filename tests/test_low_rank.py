"""Completion from anchors: exact recovery, perturbation theory, and value iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from pgjax import values as pv


def low_rank(seed=0, m=60, n=50, rank=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))


def complete(q, rows, columns, **options):
    return pv.anchor_complete(q[:, columns], q[np.ix_(rows, columns)], q[rows], **options)


def chosen(seed, m, n, count):
    rng = np.random.default_rng(seed)
    return rng.choice(m, count, replace=False), rng.choice(n, count, replace=False)


def test_a_matrix_of_low_rank_comes_back_exactly():
    q = low_rank()
    rows, columns = chosen(0, 60, 50, 6)
    with jax.enable_x64(True):
        found = complete(q, rows, columns)
        assert found.matrix.dtype == jnp.float64
        np.testing.assert_allclose(found.matrix, q, atol=1e-12)
        np.testing.assert_allclose(complete(q, rows, columns, rank=3).matrix, q, atol=1e-12)
        values = np.linalg.svd(q[np.ix_(rows, columns)], compute_uv=False)[:3]
        np.testing.assert_allclose(found.condition, values[0] / values[2], rtol=1e-8)
    assert pv.observed_entries(60, 50, rows=6, columns=6) == 624  # 20.8% of 3000
    np.testing.assert_allclose(complete(q.astype(np.float32), rows, columns).matrix, q, atol=1e-3)


def test_all_anchors_give_what_was_given():
    q = np.random.default_rng(1).normal(size=(8, 6))
    with jax.enable_x64(True):
        found = complete(q, np.arange(8), np.arange(6))
        np.testing.assert_allclose(found.matrix, q, atol=1e-12)


def test_order_does_not_matter():
    rng = np.random.default_rng(2)
    q = low_rank(2) + 1e-2 * rng.normal(size=(60, 50))
    rows, columns = chosen(2, 60, 50, 6)
    across, down = rng.permutation(50), rng.permutation(60)
    with jax.enable_x64(True):
        want = complete(q, rows, columns, rank=3).matrix[down][:, across]
        new_rows, new_columns = np.argsort(down)[rows], np.argsort(across)[columns]
        moved = complete(q[down][:, across], new_rows, new_columns, rank=3)
        np.testing.assert_allclose(moved.matrix, want, atol=1e-10)
        shuffled = complete(q, rng.permutation(rows), rng.permutation(columns), rank=3)
        np.testing.assert_allclose(shuffled.matrix[down][:, across], want, atol=1e-10)


@pytest.mark.parametrize("kind", ["zero", "repeated", "rank one"])
def test_singular_blocks_have_finite_results(kind):
    q = {"zero": np.zeros((9, 7)), "rank one": low_rank(3, 9, 7, 1), "repeated": low_rank(3, 9, 7)}[
        kind
    ]
    rows, columns = np.arange(4), np.arange(4)
    if kind == "repeated":
        q[1] = q[0]
        q[:, 2] = q[:, 3]
    found = complete(jnp.asarray(q, jnp.float32), rows, columns)
    assert np.isfinite(found.matrix).all() and np.isfinite(found.condition)
    if kind == "zero":
        assert found.condition == 0 and not found.matrix.any()
    else:
        assert found.condition >= 1
    if kind == "rank one":
        np.testing.assert_allclose(found.matrix, q, atol=1e-5)
        np.testing.assert_allclose(found.condition, 1.0)


def test_small_errors_grow_as_the_derivative_says():
    """|ΔQ̄| ≤ ε (|x|₁ + |y|₁ + |x|₁|y|₁) to first order, with x = q B⁻¹ and y = B⁻¹ q."""
    q = low_rank(4, 30, 25)
    rng = np.random.default_rng(4)
    eps = 1e-9
    with jax.enable_x64(True):
        for seed in range(5):
            rows, columns = chosen(seed, 30, 25, 3)
            block = q[np.ix_(rows, columns)]
            x = np.abs(q[:, columns] @ np.linalg.inv(block)).sum(1)
            y = np.abs(np.linalg.inv(block) @ q[rows]).sum(0)
            bound = eps * (x[:, None] + y[None] + x[:, None] * y[None])
            noisy = q + eps * rng.choice([-1, 1], q.shape)
            error = np.abs(np.asarray(complete(noisy, rows, columns).matrix) - q)
            assert (error <= bound * (1 + 1e-3) + 1e-13).all()
            assert error.max() > 0.05 * bound.max()  # not by far too large a bound


def test_truncation_pays_where_there_are_more_anchors_than_the_rank():
    largest = {}
    with jax.enable_x64(True):
        for count, rank in ((3, 3), (6, 3), (6, 6), (12, 3), (12, 12)):
            errors = []
            for seed in range(40):
                q = low_rank(seed)
                noisy = q + 1e-3 * np.random.default_rng(100 + seed).normal(size=q.shape)
                rows, columns = chosen(seed, 60, 50, count)
                found = complete(noisy, rows, columns, rank=rank)
                errors.append(np.abs(np.asarray(found.matrix) - q).max())
            largest[count, rank] = np.median(errors)
    assert largest[6, 3] < largest[6, 6] / 4 and largest[6, 3] < largest[3, 3] / 4
    assert largest[12, 3] < largest[12, 12] and largest[12, 3] < largest[6, 3]
    assert 0.001 < largest[12, 3] < 0.006 and 0.002 < largest[6, 3] < 0.012


def test_completion_under_transformations():
    q = jnp.asarray(low_rank(5, 12, 10), jnp.float32)
    rows, columns = chosen(5, 12, 10, 4)

    def total(q):
        return jnp.sum(complete(q, rows, columns, rank=3).matrix[0])

    many = jax.jit(jax.vmap(lambda s: complete(s * q, rows, columns, rank=3).matrix))
    np.testing.assert_allclose(many(jnp.array([1.0, 2.0]))[1], 2 * q, atol=1e-3)
    slope = jax.grad(total)(q)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_pivots_are_those_of_qr():
    for seed, (m, k) in enumerate([(40, 8), (40, 3), (6, 9)]):
        columns = np.random.default_rng(seed).normal(size=(m, k))
        count = min(m, k)
        want = scipy.linalg.qr(columns.T, pivoting=True)[2][:count]
        found = jax.jit(pv.pivoted_anchors, static_argnames="count")(
            jnp.asarray(columns, jnp.float32), count=count
        )
        np.testing.assert_array_equal(found, want)
    degenerate = pv.pivoted_anchors(jnp.zeros((7, 2)), count=7)
    assert sorted(degenerate.tolist()) == list(range(7))


def test_anchors_by_other_rules():
    found = pv.random_anchors(jax.random.key(0), 20, count=20)
    assert sorted(found.tolist()) == list(range(20))
    assert pv.chebyshev_anchors(101, count=5).tolist() == [0, 15, 50, 85, 100]
    for num in range(1, 30):
        for count in range(1, num + 1):
            at = np.asarray(pv.chebyshev_anchors(num, count=count))
            assert len(at) == count and (np.diff(at) > 0).all() and 0 <= at[0] <= at[-1] < num


# A chain of 7 states and 5 actions, of which the next state and the reward are known.
STATES, ACTIONS = jnp.arange(7), jnp.arange(5)
TO = np.random.default_rng(7).integers(0, 7, (7, 5))
REWARD = np.random.default_rng(8).normal(size=(7, 5)).astype(np.float32)


def sure(key, state, action):
    return jnp.asarray(REWARD)[state, action], jnp.asarray(TO)[state, action]


def risky(key, state, action):
    """To the next state, or as likely to state 0."""
    reward, to = sure(key, state, action)
    return reward, jnp.where(jax.random.bernoulli(key), to, 0)


OPTIONS = {"sample": sure, "nearest": lambda state: state, "num_samples": 2, "discount": 0.7}


def test_everything_sampled_is_value_iteration():
    q, value = None, np.zeros(7)
    for _ in range(12):
        q = REWARD + 0.7 * value[TO]
        value = q.max(1)
    found = pv.low_rank_value_iteration(
        jax.random.key(0),
        STATES,
        ACTIONS,
        num_iterations=12,
        value_range=(-20.0, 20.0),
        action_anchors=jnp.array([2, 0, 4, 1, 3]),
        select_states=lambda key, columns: pv.random_anchors(key, 7, count=7),
        rcond=0.0,
        **OPTIONS,
    )
    np.testing.assert_allclose(found.action_values, q, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.values, value, rtol=1e-4, atol=1e-4)
    assert found.conditions.shape == found.changes.shape == (12,)
    assert (found.conditions >= 1).all() and found.changes[-1] < 0.7**10 * found.changes[0]


def test_backups_are_means_of_what_can_come():
    value = np.random.default_rng(9).normal(size=7)
    want = REWARD + 0.7 * (value[TO] + value[0]) / 2
    options = {**OPTIONS, "sample": risky, "num_samples": 4000}
    found = pv.sampled_backup(
        jax.random.key(0), jnp.asarray(value, jnp.float32), STATES, ACTIONS, **options
    )
    error = 0.7 * np.abs(value[TO] - value[0]) / 2 / 4000**0.5
    assert (np.abs(found - want) <= 4.5 * error + 1e-5).all()
    assert np.unique(np.asarray(found - want)[error > 0]).size > 20  # draws of their own


def test_an_iteration_samples_rows_and_columns_and_completes_the_rest():
    rng = np.random.default_rng(10)
    left, right = rng.normal(size=(7, 2)), rng.normal(size=(2, 5))
    table = jnp.asarray(left @ right, jnp.float32)
    options = {**OPTIONS, "sample": lambda key, s, a: (table[s, a], s), "discount": 0.0}
    columns = jnp.array([3, 0])
    rows = jnp.array([6, 2])
    seen = []

    def select(key, sampled):
        seen.append(np.asarray(sampled))
        return rows

    found = pv.low_rank_backup(
        jax.random.key(0),
        jnp.zeros(7),
        STATES,
        ACTIONS,
        action_anchors=columns,
        select_states=select,
        rank=2,
        **options,
    )
    np.testing.assert_allclose(seen[0], np.asarray(table)[:, [3, 0]], rtol=1e-6)
    np.testing.assert_allclose(found.matrix, table, atol=1e-4)


def test_bad_completions():
    q = jnp.asarray(low_rank(0, 9, 8), jnp.float32)
    with pytest.raises(ValueError, match="^rank: expected 1 to 4.* got 5"):
        complete(q, np.arange(4), np.arange(4), rank=5)
    with pytest.raises(ValueError, match="^rank"):
        complete(q, np.arange(4), np.arange(4), rank=0)
    with pytest.raises(ValueError, match="^block"):
        pv.anchor_complete(q[:, :3], q[:4, :4], q[:4])
    with pytest.raises(ValueError, match="^rows.*rank"):
        pv.anchor_complete(q[:, :3], q[:4, :3], q[0])
    with pytest.raises(ValueError, match="^columns.*floating"):
        pv.anchor_complete(jnp.ones((9, 3), int), q[:4, :3], q[:4])
    with pytest.raises(ValueError, match="^rcond"):
        complete(q, np.arange(4), np.arange(4), rcond=-1.0)
    with pytest.raises(ValueError, match="^count"):
        pv.random_anchors(jax.random.key(0), 3, count=4)
    with pytest.raises(ValueError, match="^count"):
        pv.chebyshev_anchors(3, count=0)
    with pytest.raises(ValueError, match="^count"):
        pv.pivoted_anchors(q, count=10)
    with pytest.raises(ValueError, match="^rows"):
        pv.observed_entries(3, 4, rows=4, columns=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discount": 1.0}, "^discount"),
        ({"num_samples": 0}, "^num_samples"),
        ({"num_iterations": 0}, "^num_iterations"),
        ({"value_range": (1.0, 0.0)}, "^value_range"),
        ({"action_anchors": jnp.array([0, 5])}, r"^action_anchors.*\[0, 5\)"),
        ({"action_anchors": jnp.array([1, 1])}, "^action_anchors.*twice"),
        ({"action_anchors": jnp.array([0.0, 1.0])}, "^action_anchors.*integer"),
        ({"action_anchors": jnp.zeros(0, int)}, "^action_anchors.*1 to 5"),
        ({"select_states": lambda key, c: np.array([0, 0])}, "^select_states.*twice"),
        ({"select_states": lambda key, c: np.array([0, 7])}, r"^select_states.*\[0, 7\)"),
        ({"rank": 3}, "^rank"),
        ({"states": STATES[:0]}, "^states"),
        ({"actions": ACTIONS[:0]}, "^actions"),
        ({"sample": lambda key, s, a: (jnp.nan, s)}, "^sample.*finite"),
    ],
)
def test_bad_iterations(changes, message):
    options = {
        "states": STATES,
        "actions": ACTIONS,
        "num_iterations": 2,
        "value_range": (-5.0, 5.0),
        "action_anchors": jnp.array([0, 1]),
        "select_states": lambda key, columns: jnp.array([0, 1]),
        **OPTIONS,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        pv.low_rank_value_iteration(jax.random.key(0), **options)
