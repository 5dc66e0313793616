"""Sparsity-constrained transport, against linear programs, quadratic programs and autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from pgjax.optim import transport, transport_router


def points(seed=0, rows=8, columns=4):
    """Squared distances and even marginals, in float64."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, 2)), rng.normal(size=(columns, 2))
    cost = ((x[:, None] - y) ** 2).sum(-1)
    return cost, np.full(rows, 1 / rows), np.full(columns, 1 / columns)


def linear_program(cost, a, b):
    """Optimal value and the rows' potentials of transport without regularisation."""
    rows, columns = cost.shape
    sums = np.zeros((rows + columns, rows, columns))
    for i in range(rows):
        sums[i, i] = 1
    for j in range(columns):
        sums[rows + j, :, j] = 1
    found = scipy.optimize.linprog(
        cost.ravel(), A_eq=sums.reshape(rows + columns, -1), b_eq=np.concatenate([a, b])
    )
    return found.fun, found.eqlin.marginals[:rows]


def quadratic_program(cost, a, b, gamma):
    """The plan of quadratic transport, by a general-purpose solver."""
    rows, columns = cost.shape

    def value(t):
        return cost.ravel() @ t + 0.5 * gamma * t @ t

    found = scipy.optimize.minimize(
        value,
        np.outer(a, b).ravel(),
        jac=lambda t: cost.ravel() + gamma * t,
        bounds=[(0, None)] * (rows * columns),
        constraints=[
            {"type": "eq", "fun": lambda t: t.reshape(rows, columns).sum(1) - a},
            {"type": "eq", "fun": lambda t: t.reshape(rows, columns).sum(0)[1:] - b[1:]},
        ],
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    return found.x.reshape(rows, columns)


semi_dual = jax.jit(transport.semi_dual, static_argnames="k")


@functools.cache
def solver(**options):
    return jax.jit(functools.partial(transport.sparse_plan, **options))


def plan(cost, a, b, **options):
    with jax.enable_x64(True):
        solve = solver(**{"tol": 1e-9, "gamma": 1.0, **options})
        return jax.device_get(solve(*(jnp.asarray(x, jnp.float64) for x in (cost, a, b))))


def test_projection_by_hand():
    x = jnp.array([0.5, 0.2, -0.1, 0.4])
    for k, want in (
        (1, [1, 0, 0, 0]),
        (2, [0.55, 0, 0, 0.45]),
        (4, [0.4666667, 0.1666667, 0, 0.3666667]),
        (9, [0.4666667, 0.1666667, 0, 0.3666667]),
    ):
        np.testing.assert_allclose(transport.project_simplex_topk(x, k=k), want, atol=1e-6)
    found = transport.project_orthant_topk(x, k=3)
    np.testing.assert_allclose(found, [0.5, 0.2, 0, 0.4], atol=1e-7)
    found = transport.project_orthant_topk(-x, k=2)
    np.testing.assert_allclose(found, [0, 0, 0.1, 0], atol=1e-7)


def test_projection_is_the_nearest_point_and_its_derivative():
    rng = np.random.default_rng(0)
    x = rng.normal(size=6)
    best, support = np.inf, None
    for mask in range(1, 64):  # every support of at most 3
        chosen = [i for i in range(6) if mask >> i & 1]
        if len(chosen) > 3:
            continue
        tau = (x[chosen].sum() - 1) / len(chosen)
        p = np.zeros(6)
        p[chosen] = x[chosen] - tau
        if p.min() >= 0 and np.sum((p - x) ** 2) < best:
            best, support, want = np.sum((p - x) ** 2), chosen, p
    found = transport.project_simplex_topk(jnp.asarray(x, jnp.float32), k=3)
    np.testing.assert_allclose(found, want, atol=1e-6)
    jac = jax.jacobian(lambda x: transport.project_simplex_topk(x, k=3))(
        jnp.asarray(x, jnp.float32)
    )
    inside = np.isin(np.arange(6), support).astype(float)
    np.testing.assert_allclose(
        jac, np.diag(inside) - np.outer(inside, inside) / inside.sum(), atol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_one_entry_has_the_value_of_the_linear_program(seed):
    cost, a, b = points(seed)
    value, potentials = linear_program(cost, a, b)
    with jax.enable_x64(True):
        found = float(semi_dual(potentials, cost, a, b, k=1))
        assert found == pytest.approx(value, abs=1e-9)
        # It is the best: no other potentials, and no larger k, give more.
        other = potentials + 0.1 * np.random.default_rng(seed).normal(size=a.size)
        assert semi_dual(other, cost, a, b, k=1) < found
        assert semi_dual(potentials, cost, a, b, k=8) <= found


def test_gradient_and_concavity():
    cost, a, b = points(1)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for k in (1, 3, 8):
            both = jax.jit(
                jax.value_and_grad(
                    functools.partial(transport.semi_dual, cost=cost, a=a, b=b, k=k, gamma=0.5)
                )
            )

            def value(alpha, both=both):
                return float(both(alpha)[0])

            one, two = rng.normal(size=(2, 8))
            gradient = both(one)[1]
            table = transport.transport_plan(one, cost, b, k=k, gamma=0.5)
            np.testing.assert_allclose(gradient, a - table.sum(1), atol=1e-12)
            numeric = scipy.optimize.approx_fprime(one, value, 1e-7)
            np.testing.assert_allclose(gradient, numeric, atol=1e-6)
            for share in (0.2, 0.5, 0.9):
                between = value(share * one + (1 - share) * two)
                assert between >= share * value(one) + (1 - share) * value(two) - 1e-12


@pytest.mark.parametrize("k", [3, 8])
def test_plan_is_one(k):
    cost, a, b = points()
    table, info = plan(cost, a, b, k=k, gamma=0.7)
    assert info.converged and info.row_error < 1e-6
    np.testing.assert_allclose(table.sum(1), a, atol=1e-6)
    np.testing.assert_allclose(table.sum(0), b, atol=1e-12)
    assert table.min() >= 0 and (table > 0).sum(0).max() <= k
    # The problem's value is the dual's: <T, C> + γ/2 (‖T‖² - Σ b²), the dual's constant removed.
    value = np.sum(table * cost) + 0.35 * (np.sum(table**2) - np.sum(b**2))
    assert float(info.value) == pytest.approx(value, abs=1e-7)


def test_many_entries_are_quadratic_transport():
    cost, _, _ = points(2, rows=5, columns=3)
    a = np.array([0.1, 0.3, 0.2, 0.25, 0.15])
    b = np.array([0.5, 0.2, 0.3])
    want = quadratic_program(cost, a, b, 2.0)
    found, info = plan(cost, a, b, k=5, gamma=2.0)
    assert info.converged
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_permutations_and_shifts():
    cost, a, b = points(3)
    want, info = plan(cost, a, b, k=3, gamma=0.7)
    assert info.converged
    rows, columns = np.random.default_rng(0).permutation(8), np.array([2, 0, 3, 1])
    found, _ = plan(cost[rows][:, columns], a[rows], b[columns], k=3, gamma=0.7)
    np.testing.assert_allclose(found, want[rows][:, columns], atol=1e-6)
    u, v = np.linspace(-1, 1, 8), np.array([3.0, 0.0, -2.0, 1.0])
    shifted, _ = plan(cost + u[:, None] + v, a, b, k=3, gamma=0.7)
    np.testing.assert_allclose(shifted, want, atol=1e-6)
    # Potentials are unique only if the plan's entries connect all rows, as they do for a large γ.
    _, info = plan(cost, a, b, k=8, gamma=20.0)
    _, moved = plan(cost + u[:, None] + v, a, b, k=8, gamma=20.0)
    np.testing.assert_allclose(moved.potentials, info.potentials + u - u.mean(), atol=1e-5)


def test_too_few_entries():
    cost, a, b = points()
    _, info = plan(cost, a, b, k=1, max_iters=50)  # four entries cannot serve eight rows
    assert not info.converged and info.row_error > 0.05 and info.iterations == 50


def test_empty_column_and_row():
    cost, _, _ = points(4, rows=5, columns=3)
    a, b = np.array([0.5, 0.5, 0.0, 0.0, 0.0]), np.array([0.6, 0.4, 0.0])
    table, info = plan(cost, a, b, k=5, gamma=2.0)
    assert info.converged
    np.testing.assert_allclose(table[:, 2], 0.0)
    np.testing.assert_allclose(table[2:], 0.0, atol=1e-6)


def test_derivative_of_the_plan():
    cost, a, b = points(3)
    rng = np.random.default_rng(0)
    weights, along = rng.normal(size=(8, 4)), rng.normal(size=(8, 4))
    with jax.enable_x64(True):

        @jax.jit
        @jax.value_and_grad
        def both(cost):
            table, _ = transport.sparse_plan(
                cost, jnp.asarray(a), jnp.asarray(b), k=8, gamma=0.5, tol=1e-11
            )
            return jnp.sum(weights * table)

        gradient = both(jnp.asarray(cost))[1]
        step = 1e-5
        numeric = (both(cost + step * along)[0] - both(cost - step * along)[0]) / (2 * step)
        assert abs(numeric) > 1e-2
        np.testing.assert_allclose(np.sum(gradient * along), numeric, rtol=1e-5)


def test_router_in_float32():
    """Sixteen tokens to four experts of at most four each, by Adam as a router does it."""
    logits = jax.random.normal(jax.random.key(0), (16, 4))
    share = jax.nn.softmax(logits)
    route = jax.jit(
        lambda s: transport.sparse_plan(
            -s, jnp.ones(16), jnp.full(4, 4.0), k=4, solver=optax.adam(1e-2), max_iters=20
        )
    )
    table, info = route(share)
    assert info.iterations == 20 and table.dtype == jnp.float32
    assert (table > 0).sum(0).max() <= 4
    np.testing.assert_allclose(table.sum(0), 4.0, rtol=1e-5)
    start = transport.transport_plan(jnp.zeros(16), -share, jnp.full(4, 4.0), k=4)
    assert jnp.abs(table.sum(1) - 1).mean() < jnp.abs(start.sum(1) - 1).mean()


def test_bad_input():
    cost, a, b = (jnp.asarray(x, jnp.float32) for x in points())
    for options, message in (
        ({"a": a.at[0].set(-0.1)}, "a: expected masses of at least 0"),
        ({"b": b.at[0].set(jnp.nan)}, "b: expected masses of at least 0, got nan"),
        ({"b": b * 1.001}, "b: expected the same mass as a"),
        ({"b": b[1:]}, "b: expected one for each column"),
        ({"a": a[1:]}, "a: expected one for each row"),
        ({"cost": cost[0]}, "cost: expected rank 2"),
        ({"cost": cost.at[0, 0].set(jnp.nan)}, "cost: expected finite"),
        ({"k": 0}, "k: expected a number"),
        ({"gamma": 0.0}, "gamma: expected a number"),
        ({"tol": 0.0}, "tol: expected a number"),
        ({"max_iters": 0}, "max_iters: expected a number"),
    ):
        given = {"cost": cost, "a": a, "b": b, "k": 2, **options}
        with pytest.raises(ValueError, match=message):
            transport.sparse_plan(**given)
    with pytest.raises(ValueError, match="potentials: expected shape"):
        transport.semi_dual(a[1:], cost, a, b, k=2)
    with pytest.raises(ValueError, match="k: expected a number"):
        transport.project_simplex_topk(a, k=0)
    with pytest.raises(ValueError, match="x: expected at least one"):
        transport.project_simplex_topk(a[:0], k=1)


def crowded(tokens=32, experts=4):
    """Logits by which two tokens in three would take the first expert."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(tokens, experts)) + np.array([1.5, 0, 0, 0]), jnp.float32)


def test_a_router_evens_out_what_its_favourite_gets():
    logits = crowded()
    weights = np.asarray(transport_router(logits, iterations=500))
    sent = weights > 0
    assert np.bincount(logits.argmax(-1), minlength=4).max() > 16
    assert sent.sum(0).max() <= 8  # 32 tokens, 4 experts
    assert sent.any(1).all()
    np.testing.assert_allclose(weights[sent], np.asarray(jax.nn.softmax(logits))[sent], rtol=1e-6)
    roomy = np.asarray(transport_router(logits, capacity_factor=2.0)) > 0
    assert 8 < roomy.sum(0).max() <= 16


def test_a_router_follows_its_tokens_and_its_gradient_is_the_softmaxs():
    logits, order = crowded(), np.random.default_rng(1).permutation(32)
    weights = jax.jit(transport_router)(logits)
    np.testing.assert_allclose(transport_router(logits[order]), weights[order], atol=1e-6)
    sent = weights > 0
    values = jnp.asarray(np.random.default_rng(2).normal(size=(32, 4)), jnp.float32)
    got = jax.grad(lambda x: jnp.sum(transport_router(x) * values))(logits)
    want = jax.grad(lambda x: jnp.sum(jnp.where(sent, jax.nn.softmax(x), 0) * values))(logits)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_router_says_what_is_wrong():
    with pytest.raises(ValueError, match="logits: expected .tokens, experts., got shape"):
        transport_router(jnp.zeros(4))
    with pytest.raises(ValueError, match="capacity_factor"):
        transport_router(jnp.zeros((4, 2)), capacity_factor=0.0)
    with pytest.raises(ValueError, match="iterations"):
        transport_router(jnp.zeros((4, 2)), iterations=0)
