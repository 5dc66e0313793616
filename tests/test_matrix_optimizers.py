"""Matrix optimizers: the parts, and that each named one is what its formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import optim
from pgjax.optim import MatrixSpec, oracles

EXACT = oracles.polar("svd")


def gaussian(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def factor(x):
    left, _, right = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return left @ right


def nuclear(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False).sum(-1)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0].astype(np.float32)


def step(transform, gradients, params=None, times=1):
    """The last of several updates with the same gradients."""
    params = gradients if params is None else params
    state = transform.init(params)
    for _ in range(times):
        updates, state = transform.update(gradients, state, params)
    return updates


# --- Parts ---


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2]))
def test_canonical_form_and_back(order, outs, ins, blocks):
    shape = (2, 3, 4, 6)
    out, into = tuple(order[:outs]), tuple(order[outs : outs + ins])
    even = next((axis for axis in out if shape[axis] % 2 == 0), None)
    spec = MatrixSpec(out, into, ((even, blocks),) if even is not None else ())
    x = gaussian(*shape)
    y = optim.to_canonical(x, spec)
    n = np.prod([shape[a] for a in into])
    assert y.shape[2] == n and y.size == x.size
    np.testing.assert_array_equal(optim.from_canonical(y, spec, shape), x)


def test_rows_are_outputs():
    x = gaussian(5, 3, 4, 2)  # layers, inputs, heads, head size
    spec = MatrixSpec(out_axes=(2, 3), in_axes=(1,))
    y = optim.to_canonical(x, spec)
    np.testing.assert_array_equal(y[1], x[1].reshape(3, 8).T)
    blocks = optim.to_canonical(x.reshape(5, 3, 8), MatrixSpec((2,), (1,), ((2, 4),)))
    np.testing.assert_array_equal(blocks[4], x[1, :, 0].T)


def test_shape_factors():
    assert optim.shape_factor(8, 2, "keller") == 2 and optim.shape_factor(2, 8, "keller") == 1
    assert optim.shape_factor(2, 8, "spectral") == 0.5
    assert optim.shape_factor(9, 4, "moonshot") == pytest.approx(0.6)
    assert optim.shape_factor(9, 4, "none") == 1
    # The root mean square of a Moonshot step is 0.2.
    for shape in ((9, 4), (4, 30), (7, 7)):
        u = optim.shape_factor(*shape, "moonshot") * factor(gaussian(*shape))
        np.testing.assert_allclose(np.sqrt(np.mean(u**2)), 0.2, rtol=1e-6)


def test_dual_scale_is_of_each_matrix():
    x = jnp.stack([gaussian(3, 5), 10 * gaussian(3, 5)])
    u = optim.polar(x, method="svd")
    np.testing.assert_allclose(optim.dual_scale(x, u, alpha=1.0), nuclear(x), rtol=1e-5)
    np.testing.assert_allclose(optim.dual_scale(x, u, alpha=0.5), nuclear(x) ** 0.5, rtol=1e-5)
    np.testing.assert_array_equal(optim.dual_scale(jnp.zeros_like(x), u, alpha=0.0), 1)
    np.testing.assert_allclose(optim.dual_scale(jnp.zeros_like(x), u, alpha=1.0), 1e-8)


def test_momenta_are_as_defined():
    gradients = np.random.default_rng(0).normal(size=(4, 3, 2))
    beta = 0.8
    for kind in ("ema", "ema_nesterov", "heavy_ball", "heavy_ball_nesterov"):
        share = 1 - beta if kind.startswith("ema") else 1.0
        transform = optim.momentum(beta, kind)
        state, m = transform.init(jnp.zeros((3, 2))), np.zeros((3, 2))
        for g in gradients:
            m = beta * m + share * g
            wanted = beta * m + share * g if kind.endswith("nesterov") else m
            got, state = transform.update(jnp.asarray(g, jnp.float32), state)
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_oracles_maximise_over_their_balls():
    w = gaussian(4, 6)
    rng = np.random.default_rng(1)
    balls = {
        EXACT: lambda v: np.linalg.norm(v, 2),
        oracles.rows(): lambda v: np.linalg.norm(v, axis=1).max(),
        oracles.columns(): lambda v: np.linalg.norm(v, axis=0).max(),
        oracles.sign(): lambda v: np.abs(v).max(),
        oracles.frobenius(): np.linalg.norm,
    }
    for oracle, norm in balls.items():
        u = np.asarray(oracle(w))
        assert norm(u) <= 1 + 1e-5
        others = rng.normal(size=(200, 4, 6))
        best = max(float(np.sum(np.asarray(w) * v / norm(v))) for v in [*others, np.asarray(w)])
        assert np.sum(np.asarray(w) * u) >= best - 1e-5
        flipped = np.asarray(oracle(w.T)).T
        assert np.allclose(flipped, u, atol=1e-6) or not oracle.transposes


# --- The mechanism ---


def params_and_specs():
    params = {
        "a": gaussian(8, 6),
        "b": gaussian(6, 8, seed=1),
        "stack": gaussian(3, 8, 6, seed=2),
        "heads": gaussian(3, 8, 2, 3, seed=3),
    }
    specs = {
        "a": MatrixSpec((1,), (0,)),
        "b": MatrixSpec((1,), (0,)),
        "stack": MatrixSpec((2,), (1,)),
        "heads": MatrixSpec((2, 3), (1,)),
    }
    return params, specs


@pytest.mark.parametrize("options", [{}, {"consistent_rms": 0.2}, {"nesterov": False}])
def test_agrees_with_optax_in_what_both_can_do(options):
    params, specs = params_and_specs()
    dims = optax.contrib.MuonDimensionNumbers
    numbers = {"a": dims((0,), (1,)), "b": dims((0,), (1,)), "stack": dims((1,), (2,))}
    numbers["heads"] = dims((1,), (2, 3))
    theirs = optax.contrib.muon(
        0.1, weight_decay=0.01, muon_weight_dimension_numbers=numbers, **options
    )
    ours = optax.chain(
        optim.matrix_transform(
            oracles.polar("ns", eps=1e-8),
            shape="moonshot" if "consistent_rms" in options else "keller",
            momentum=optim.momentum(
                0.95, "ema" if "nesterov" in options else "ema_nesterov", debias=True
            ),
            specs=specs,
        ),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(0.1),
    )
    state, other = ours.init(params), theirs.init(params)
    update = jax.jit(ours.update)
    for seed in range(4):
        g = jax.tree.map(lambda p, seed=seed: gaussian(*p.shape, seed=10 + seed), params)
        mine, state = update(g, state, params)
        wanted, other = theirs.update(g, other, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), mine, wanted)


def test_agrees_with_optax_where_the_dual_norm_scales_a_single_matrix():
    params = {"w": gaussian(8, 6)}
    theirs = optax.contrib.scale_by_muon(
        adaptive=True,
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers((0,), (1,))},
    )
    ours = optim.matrix_transform(
        oracles.polar("ns", eps=1e-8),
        alpha=1.0,
        momentum=optim.momentum(0.95, "ema_nesterov", debias=True),
        specs={"w": optim.MatrixSpec((1,), (0,))},
    )
    mine, wanted = step(ours, params, times=3)["w"], step(theirs, params, times=3)["w"]
    np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["momentum_first", "oracle_first"])
@pytest.mark.parametrize("oracle", [EXACT, oracles.rows(), lambda w: jnp.tanh(w)])
def test_leaves_together_are_leaves_alone(order, oracle):
    params, specs = params_and_specs()
    options = {"alpha": 0.5, "shape": "spectral", "order": order, "momentum": optim.momentum(0.9)}
    together = step(optim.matrix_transform(oracle, specs=specs, **options), params, times=2)
    for name, leaf in params.items():
        alone = optim.matrix_transform(oracle, specs={name: specs[name]}, **options)
        np.testing.assert_allclose(
            together[name], step(alone, {name: leaf}, times=2)[name], atol=1e-5
        )
    # And of a stack, each matrix by itself.
    for k in range(3):
        alone = optim.matrix_transform(oracle, specs={"x": MatrixSpec((1,), (0,))}, **options)
        one = step(alone, {"x": params["stack"][k]}, times=2)["x"]
        np.testing.assert_allclose(together["stack"][k], one, atol=1e-5)


def test_one_call_of_the_oracle_for_each_shape():
    calls = []

    def counted(w):
        calls.append(w.shape)
        return optim.polar(w, method="ns")

    params, specs = params_and_specs()
    transform = optim.matrix_transform(optim.Oracle(counted, transposes=True), specs=specs)
    step(transform, params)
    assert calls == [(8, 6, 8)]  # 1 + 1 + 3 + 3 matrices, the short side first
    calls.clear()
    step(optim.matrix_transform(counted, specs=specs), params)
    assert sorted(calls) == [(1, 8, 6), (7, 6, 8)]


def test_coupled_matrices_share_their_scale():
    experts = jnp.stack([gaussian(4, 6), 100 * gaussian(4, 6)])[None]  # a layer of two
    own = step(
        optim.matrix_transform(EXACT, alpha=1.0, specs={"e": optim.matrix.DENSE}), {"e": experts}
    )
    np.testing.assert_allclose(
        np.linalg.norm(own["e"][0, 1]) / np.linalg.norm(own["e"][0, 0]), 100, rtol=1e-4
    )
    both = step(
        optim.matrix_transform(EXACT, alpha=1.0, specs={"e": optim.matrix.DENSE}, couple=2),
        {"e": experts},
    )["e"][0]
    total = nuclear(experts[0]).sum()
    np.testing.assert_allclose(both, total * factor(experts[0]), rtol=1e-3, atol=1e-2)


def test_entries_that_are_not_finite_count_as_nothing():
    g = {"w": gaussian(4, 5).at[1, 2].set(jnp.nan).at[0, 0].set(jnp.inf)}
    clean = {"w": g["w"].at[1, 2].set(0.0).at[0, 0].set(0.0)}
    got = step(optim.scale_by_muon(), g, params=clean, times=3)
    np.testing.assert_array_equal(got["w"], step(optim.scale_by_muon(), clean, times=3)["w"])
    assert optim.nonfinite_leaves({"fine": clean["w"], **g}) == ["w"]


# --- Named optimizers ---


def test_polar_grad_of_known_matrices():
    plain = optim.polar_grad(1.0, beta=0.0)
    diagonal = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
    np.testing.assert_allclose(step(plain, diagonal)["w"], -4 * np.eye(2), atol=1e-5)
    u, v = np.array([0.6, 0.8, 0.0]), np.array([0.0, 1.0])
    rank_one = {"w": jnp.asarray(3 * np.outer(u, v), jnp.float32)}
    np.testing.assert_allclose(step(plain, rank_one)["w"], -rank_one["w"], atol=1e-5)
    scalar = {"w": jnp.array([[-0.3]])}
    np.testing.assert_allclose(step(plain, scalar)["w"], [[0.3]], atol=1e-6)
    sign = optim.scale_by_polar(alpha=0.0)
    np.testing.assert_allclose(step(sign, scalar)["w"], [[-1.0]], atol=1e-6)


def test_polar_grad_is_equivariant_and_homogeneous():
    g, q, r = gaussian(5, 7), orthogonal(5, 1), orthogonal(7, 2)
    for alpha in (0.0, 0.5, 1.0):
        transform = optim.scale_by_polar(alpha=alpha)
        u = step(transform, {"w": g})["w"]
        turned = step(transform, {"w": q @ g @ r})["w"]
        np.testing.assert_allclose(turned, q @ u @ r, atol=1e-3)
        np.testing.assert_allclose(
            step(transform, {"w": 4 * g})["w"], 4.0**alpha * u, rtol=1e-3, atol=1e-5
        )


def test_orders_of_polar_grad():
    gradients = [gaussian(4, 6, seed=seed) for seed in range(3)]
    params = {"w": jnp.zeros((4, 6))}
    beta, m = 0.7, np.zeros((4, 6))
    units = np.zeros((4, 6))
    wanted = {"momentum_first": [], "polar_first": [], "muon": []}
    for g in map(np.asarray, gradients):
        m = beta * m + (1 - beta) * g
        units = beta * units + (1 - beta) * factor(g)
        ahead = beta * m + (1 - beta) * g
        wanted["momentum_first"].append(nuclear(m) * factor(m))
        wanted["polar_first"].append(nuclear(g) * units)
        wanted["muon"].append(nuclear(ahead) * factor(ahead))
    for order, expected in wanted.items():
        transform = optim.scale_by_polar(beta=beta, order=order)
        state = transform.init(params)
        for g, u in zip(gradients, expected, strict=True):
            got, state = transform.update({"w": g}, state, params)
            np.testing.assert_allclose(got["w"], u, rtol=2e-4, atol=1e-4)
        still = optim.scale_by_polar(beta=0.0, order=order)
        g = gradients[0]
        np.testing.assert_allclose(
            step(still, {"w": g})["w"], nuclear(g) * factor(g), rtol=1e-4, atol=1e-4
        )


def test_polar_heavy_ball_moves_by_its_last_step():
    params = {"w": gaussian(3, 4)}
    rate, beta = (lambda count: 0.1 / (1 + count)), 0.6
    transform = optim.polar_heavy_ball(rate, beta=beta)
    state = transform.init(params)
    before = now = np.asarray(params["w"], np.float64)
    for k in range(4):
        g = gaussian(3, 4, seed=k)
        updates, state = transform.update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
        before, now = now, now - rate(k) * nuclear(g) * factor(g) + beta * (now - before)
        np.testing.assert_allclose(params["w"], now, atol=2e-4)
    displacement = optim.add_displacement(0.5)
    with pytest.raises(ValueError, match="params: a heavy ball needs the parameters"):
        displacement.update({"w": g}, displacement.init(params))


def test_polar_grad_without_scale_is_muon():
    g = {"w": gaussian(5, 8)}
    muon = optim.scale_by_muon(oracle=EXACT, shape="none")
    polar = optim.scale_by_polar(beta=0.95, order="muon", alpha=0.0, oracle=EXACT)
    np.testing.assert_allclose(step(muon, g, times=3)["w"], step(polar, g, times=3)["w"], atol=1e-6)


def test_polar_grad_descends_as_fast_as_proved():
    """`f(X₊) ≤ f(X) - ‖G‖²_* / (2 L r)` at the step `1 / (L r)` on a random quadratic."""
    with jax.enable_x64(True):
        a, b = gaussian(9, 5, dtype=np.float64), gaussian(4, 8, seed=1, dtype=np.float64)
        c = gaussian(9, 8, seed=2, dtype=np.float64)
        smooth = np.linalg.norm(a, 2) ** 2 * np.linalg.norm(b, 2) ** 2
        rank = 4

        def loss(x):
            return 0.5 * jnp.sum((a @ x["x"] @ b - c) ** 2)

        params = {"x": gaussian(5, 4, seed=3, dtype=np.float64)}
        transform = optim.polar_grad(1 / (smooth * rank), beta=0.0)
        state = transform.init(params)
        for _ in range(30):
            value, g = jax.value_and_grad(loss)(params)
            updates, state = transform.update(g, state, params)
            params = optax.apply_updates(params, updates)
            assert loss(params) <= value - nuclear(g["x"]) ** 2 / (2 * smooth * rank) + 1e-9


def test_scion_steps_are_extreme_points():
    w = gaussian(6, 4)  # inputs by outputs: m = 4, n = 6
    canonical = np.asarray(w).T
    spectral = optim.scion(0.5, "spectral", scale=3.0, averaging=1.0, oracle=EXACT)
    wanted = -0.5 * np.asarray(w) - 0.5 * 3 * (factor(canonical) * np.sqrt(4 / 6)).T
    np.testing.assert_allclose(step(spectral, {"w": w})["w"], wanted, atol=1e-5)
    free = optim.scion(0.5, "sign", averaging=1.0, constrained=False)
    np.testing.assert_allclose(step(free, {"w": w})["w"], -0.5 * np.sign(w) / 6, atol=1e-6)
    lmo = {
        norm: np.asarray(optim.scion_lmo(norm, oracle=EXACT)(canonical))
        for norm in ("spectral_max", "columns", "columns_normalized", "rows", "bias")
    }
    np.testing.assert_allclose(lmo["spectral_max"], factor(canonical), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(lmo["columns"], axis=0), 2.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(lmo["columns_normalized"], axis=0), 2 / 6, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(lmo["rows"], axis=1), 6**-0.5, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(np.mean(lmo["bias"] ** 2)), 1.0, rtol=1e-5)
    # Averaging a keeps 1 - a of what was.
    slow = optim.scion(1.0, "spectral", averaging=0.1, constrained=False, oracle=EXACT)
    np.testing.assert_allclose(
        step(slow, {"w": w}, times=2)["w"], -(factor(canonical) * np.sqrt(4 / 6)).T, atol=1e-5
    )


def test_scion_stays_in_its_ball():
    params = {"w": jnp.zeros((6, 4))}
    transform = optim.scion(0.3, "spectral", scale=2.0, oracle=EXACT)
    state = transform.init(params)
    for k in range(20):
        updates, state = transform.update({"w": gaussian(6, 4, seed=k)}, state, params)
        params = optax.apply_updates(params, updates)
        assert np.linalg.norm(params["w"], 2) <= 2 * np.sqrt(4 / 6) + 1e-5


def test_dion_settles_on_muons_step_and_feeds_back_what_it_left_out():
    g = {"w": gaussian(6, 4)}
    whole = optim.scale_by_dion(jax.random.key(0), mu=0.0)
    # Without feedback of the applied part, a full rank leaves nothing in the momentum.
    state = whole.init(g)
    _, state = whole.update(g, state)
    np.testing.assert_allclose(state.momentum["w"], 0.0, atol=1e-5)
    transform = optim.scale_by_dion(jax.random.key(0), mu=0.95, rank=2)
    state = transform.init(g)
    canonical = np.asarray(g["w"], np.float64).T
    p, _ = np.linalg.qr(canonical @ np.asarray(state.basis["w"][0], np.float64))
    r = canonical.T @ p
    q = r / np.linalg.norm(r, axis=0)
    updates, after = transform.update(g, state)
    np.testing.assert_allclose(updates["w"], (np.sqrt(4 / 6) * p @ q.T).T, atol=1e-5)
    np.testing.assert_allclose(after.momentum["w"], (canonical - 0.05 * p @ r.T).T, atol=1e-5)
    assert np.linalg.matrix_rank(updates["w"], tol=1e-4) == 2


def test_dion_with_a_settled_basis_is_muon():
    # Singular values apart: the power steps of a constant gradient end at its singular vectors.
    left, right = orthogonal(6, 1)[:, :4], orthogonal(4, 2)
    g = {"w": jnp.asarray(left * np.array([8.0, 4.0, 2.0, 1.0]) @ right)}
    got = step(optim.scale_by_dion(jax.random.key(1)), g, times=40)["w"]
    np.testing.assert_allclose(got, np.sqrt(4 / 6) * left @ right, atol=1e-4)


def test_dion2_moves_its_largest_rows_only():
    g = {"w": gaussian(12, 8)}  # m = 8 outputs are the shorter side
    transform = optim.scale_by_dion2(fraction=0.25, decay=0.5, oracle=EXACT)
    state = transform.init(g)
    updates, after = transform.update(g, state)
    canonical = np.asarray(g["w"]).T
    top = np.argsort(-np.linalg.norm(canonical, axis=1))[:2]
    wanted = np.zeros_like(canonical)
    wanted[np.sort(top)] = np.sqrt(8 / 12) * factor(canonical[np.sort(top)])
    np.testing.assert_allclose(updates["w"].T, wanted, atol=1e-5)
    kept = canonical.copy()
    kept[top] *= 0.5
    np.testing.assert_allclose(after.momentum["w"].T, kept, atol=1e-6)
    whole = optim.scale_by_dion2(fraction=1.0, oracle=EXACT)
    np.testing.assert_allclose(
        step(whole, g)["w"].T, np.sqrt(8 / 12) * factor(canonical), atol=1e-5
    )


def test_shampoo_without_memory_is_the_polar_factor():
    g = {"w": gaussian(5, 8)}
    now = optim.scale_by_shampoo(beta=0.0, eps=1e-9)
    np.testing.assert_allclose(step(now, g)["w"], factor(g["w"]), atol=2e-2)
    sums = optim.scale_by_shampoo(eps=1e-9)
    np.testing.assert_allclose(step(sums, g, times=4)["w"], factor(g["w"]) / 2, atol=2e-2)


def test_soap_is_adam_in_the_eigenbasis():
    with jax.enable_x64(True):
        g = {"w": gaussian(4, 4, dtype=np.float64)}
        transform = optim.scale_by_soap(b1=0.9, b2=0.8, every=2)
        state = transform.init(g)
        first, state = transform.update(g, state)
        np.testing.assert_array_equal(first["w"], 0)
        start = np.asarray(g["w"]).T
        stats = [0.2 * start @ start.T, 0.2 * start.T @ start]
        bases = [np.linalg.eigh(stat)[1] for stat in stats]  # each up to signs and order
        mu, nu = np.zeros((4, 4)), np.zeros((4, 4))
        for t in (1, 2, 3):
            if t == 3:  # the second step refreshed: one power step, then orthogonal again
                order = [
                    np.argsort(-np.diag(b.T @ s @ b)) for b, s in zip(bases, stats, strict=True)
                ]
                nu = nu[order[0]][:, order[1]]
                bases = [
                    np.linalg.qr((s @ b)[:, o])[0]
                    for b, s, o in zip(bases, stats, order, strict=True)
                ]
            x = gaussian(4, 4, seed=t, dtype=np.float64)
            updates, state = transform.update({"w": x}, state)
            x = np.asarray(x).T
            turned = bases[0].T @ x @ bases[1]
            mu, nu = 0.9 * mu + 0.1 * x, 0.8 * nu + 0.2 * turned**2
            adam = bases[0].T @ (mu / (1 - 0.9**t)) @ bases[1]
            adam = adam / (np.sqrt(nu / (1 - 0.8**t)) + 1e-8)
            np.testing.assert_allclose(updates["w"].T, bases[0] @ adam @ bases[1].T, atol=1e-6)
            stats = [0.8 * s + 0.2 * g for s, g in zip(stats, (x @ x.T, x.T @ x), strict=True)]


def test_soap_leaves_long_sides_alone():
    g = {"w": gaussian(5, 3)}
    transform = optim.scale_by_soap(b1=0.0, b2=0.5, limit=2)
    got = step(transform, g, times=3)["w"]
    np.testing.assert_allclose(got, np.sign(g["w"]), atol=1e-4)  # Adam of a constant gradient


# --- Bad input ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optim.scale_by_polar(order="later"), "order: expected one of"),
        (lambda: optim.scale_by_polar(beta=1.0), "beta: expected a number in"),
        (lambda: optim.scale_by_polar(alpha=-1.0), "alpha: expected a number in"),
        (lambda: optim.polar_heavy_ball(beta=1.5), "beta: expected a number in"),
        (lambda: optim.matrix_transform(3), "oracle: expected a function"),
        (lambda: optim.matrix_transform(EXACT, shape="tall"), "shape: expected one of"),
        (lambda: optim.matrix_transform(EXACT, couple=0), "couple: expected an integer"),
        (lambda: optim.matrix_transform(EXACT, order="last"), "order: expected one of"),
        (lambda: optim.matrix_transform(EXACT, eps=0.0), "eps: expected a number in"),
        (lambda: optim.momentum(0.9, "adam"), "kind: expected one of"),
        (lambda: optim.momentum(0.9, "heavy_ball", debias=True), "debias: only averages"),
        (lambda: optim.shape_factor(0, 2, "keller"), "expected sides of at least 1"),
        (lambda: optim.scion(0.1, "nuclear"), "norm: expected one of"),
        (lambda: optim.scion(0.1, averaging=0.0), "averaging: expected a number in"),
        (lambda: optim.scale_by_dion(jax.random.key(0), rank=0), "rank: expected an integer"),
        (lambda: optim.scale_by_dion2(fraction=0.0), "fraction: expected a number in"),
        (lambda: optim.scale_by_shampoo(eps=0.0), "eps: expected a number in"),
        (lambda: optim.scale_by_soap(every=0), "every: expected an integer"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("params", "specs", "message"),
    [
        (
            {"deep": {"n": jnp.ones((2, 2), jnp.int32)}},
            None,
            "^deep/n: .* floating leaf, got int32",
        ),
        ({"bias": jnp.ones(3)}, None, r"^bias: .* rank 2 or more, got shape \(3,\)"),
        ({"w": jnp.ones((2, 3, 4))}, None, "^w: which axes of its shape"),
        ({"w": jnp.ones((2, 3))}, {"v": MatrixSpec((0,), (1,))}, "^w: no MatrixSpec"),
        ({"w": jnp.ones((2, 3))}, {"w": MatrixSpec((0,), (2,))}, "^w: in_axes has axis 2"),
        ({"w": jnp.ones((2, 3))}, {"w": MatrixSpec((0,), (-2,))}, "^w: .* overlap"),
        ({"w": jnp.ones((2, 3))}, {"w": MatrixSpec((), (1,))}, "^w: out_axes .* names no axis"),
        (
            {"w": jnp.ones((2, 9))},
            {"w": MatrixSpec((1,), (0,), ((1, 4),))},
            r"^w: 4 blocks do not divide axis 1 of shape \(2, 9\)",
        ),
    ],
)
def test_leaves_that_are_no_matrices_are_named(params, specs, message):
    builders = [optim.scale_by_muon, optim.scale_by_shampoo, optim.scale_by_dion2]
    for builder in builders:
        transform = builder(**({} if specs is None else {"specs": specs}))
        with pytest.raises(ValueError, match=message):
            transform.init(params)


def test_matrices_that_do_not_make_whole_groups_are_named():
    transform = optim.matrix_transform(EXACT, couple=2, specs={"w": optim.matrix.DENSE})
    with pytest.raises(ValueError, match="^w: couple 2 does not divide its 3 matrices"):
        step(transform, {"w": jnp.ones((3, 4, 5))})
