"""Batch-size tests and sample moments by hand and against NumPy; AdaGrad-Norm against Optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from pgjax.curriculum import batch_size as tests_of
from pgjax.optim import adagrad as an
from pgjax.optim import per_sample

ROWS = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 2.0], [2.0, -2.0]], np.float32)


def all_tests(rows):
    moments = per_sample.per_sample_moments(rows)
    return {
        "norm": float(tests_of.norm_test(moments, eta=0.5)),
        "inner": float(tests_of.inner_product_test(rows, theta=0.7)),
        "orthogonal": float(tests_of.orthogonality_test(rows, nu=1.3)),
        "coordinate": float(tests_of.coordinate_test(moments, eta=0.5)),
    }


def split(rows):
    """The same gradients as a tree."""
    return {"a": rows[:, :2].reshape(-1, 1, 2), "b": rows[:, 2:]}


def test_by_hand():
    moments = per_sample.per_sample_moments(ROWS)
    np.testing.assert_allclose(moments.mean, [2, 0])
    np.testing.assert_allclose(moments.variance, [2 / 3, 8 / 3], rtol=1e-6)
    assert float(moments.trace) == pytest.approx(10 / 3)
    assert float(moments.square_norm) == 4 and int(moments.size) == 4
    required = tests_of.norm_test(moments, eta=0.5)
    assert float(required) == pytest.approx(10 / 3)
    assert tests_of.next_batch_size(2, required, maximum=100) == 4
    assert float(tests_of.inner_product_test(ROWS, theta=0.5)) == pytest.approx(2 / 3)
    assert float(tests_of.orthogonality_test(ROWS, nu=1.0)) == pytest.approx(2 / 3)
    assert np.isinf(tests_of.coordinate_test(moments, eta=0.5, floor=0.0))
    # With the floor: 8/3 over a quarter of half of a mean square of 2.
    capped = tests_of.coordinate_test(moments, eta=0.5, floor=0.5)
    assert float(capped) == pytest.approx((8 / 3) / (0.25 * 1.0))
    least = tests_of.coordinate_test(moments, eta=0.5, quantile=0.0)
    assert float(least) == pytest.approx((2 / 3) / (0.25 * 4))


def test_equal_samples_ask_for_nothing():
    for rows in (np.tile([[0.3, -1.7, 0.2]], (5, 1)).astype(np.float32), np.zeros((5, 3))):
        found = all_tests(jnp.asarray(rows, jnp.float32))
        assert all(x == pytest.approx(0, abs=1e-10) for x in found.values())
        assert tests_of.next_batch_size(8, found["norm"], maximum=100, multiple=4) == 8


def test_no_mean_asks_for_the_maximum():
    rows = jnp.array([[1.0, 2.0], [-1.0, -2.0]])
    found = all_tests(rows)
    assert all(np.isinf(x) for x in found.values())
    size = tests_of.next_batch_size(8, found["norm"], maximum=100, multiple=8)
    assert size == 96 and isinstance(size, int)


def test_scale_and_rotation():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(9, 5)) + 1).astype(np.float64)
    with jax.enable_x64(True):
        want = all_tests(jnp.asarray(rows))
        for scale in (1e-6, 1e6):
            assert all_tests(jnp.asarray(scale * rows)) == pytest.approx(want, rel=1e-9)
        turned = all_tests(jnp.asarray(rows @ scipy.stats.ortho_group.rvs(5, random_state=1)))
        for name in ("norm", "inner", "orthogonal"):
            assert turned[name] == pytest.approx(want[name], rel=1e-9)
        assert turned["coordinate"] != pytest.approx(want["coordinate"], rel=0.01)
        signed = rows[:, [3, 0, 4, 1, 2]] * np.array([1, -1, -1, 1, -1])
        assert all_tests(jnp.asarray(signed)) == pytest.approx(want, rel=1e-9)


def test_variance_splits_along_and_across():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(7, 6)) + 0.5
    with jax.enable_x64(True):
        for gradients in (jnp.asarray(rows), split(jnp.asarray(rows))):
            found = all_tests(gradients)
            total = found["inner"] * (0.7 / 0.5) ** 2 + found["orthogonal"] * (1.3 / 0.5) ** 2
            assert found["norm"] == pytest.approx(total, rel=1e-12)
            mean = rows.mean(0)
            want = np.var(rows @ mean, ddof=1) / (0.7**2 * (mean @ mean) ** 2)
            assert found["inner"] == pytest.approx(want, rel=1e-12)


def test_leaf_by_leaf_inner_products():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(6, 5)) + 0.5
    mean = rows.mean(0)
    parts = (rows[:, :2] @ mean[:2], rows[:, 2:] @ mean[2:])
    want = sum(np.var(p, ddof=1) for p in parts) / (0.25 * (mean @ mean) ** 2)
    found = tests_of.inner_product_test(
        split(jnp.asarray(rows, jnp.float32)), theta=0.5, per_leaf=True
    )
    assert float(found) == pytest.approx(want, rel=1e-5)


def test_gradients_of_each_sample():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=5)
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32), "b": jnp.float32(0.3)}

    def loss(p, sample):
        return 0.5 * (sample["x"] @ p["w"] + p["b"] - sample["y"]) ** 2

    found = per_sample.per_sample_grads(
        loss, params, {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    )
    error = x @ np.asarray(params["w"]) + 0.3 - y
    np.testing.assert_allclose(found["w"], error[:, None] * x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["b"], error, rtol=1e-4, atol=1e-5)


def test_shards_together_are_one_batch():
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(12, 5)) * 3 + 1).astype(np.float32)
    shards = jnp.asarray(rows.reshape(3, 4, 5))
    whole = per_sample.per_sample_moments(split(jnp.asarray(rows)))

    def shard(part):
        local = per_sample.per_sample_moments(split(part))
        return local, per_sample.combine_moments(local, "data")

    local, combined = jax.vmap(shard, axis_name="data")(shards)
    for got, want in zip(jax.tree.leaves(combined), jax.tree.leaves(whole), strict=True):
        for replica in got:
            np.testing.assert_allclose(replica, want, rtol=1e-5)
    # The released formula differs by what local variances divide by, and by nothing else.
    means, variances = np.asarray(local.mean["b"]), np.asarray(local.variance["b"])
    released = variances.mean(0) + (means**2).mean(0) - means.mean(0) ** 2
    exact = rows[:, 2:].var(0, ddof=1)
    corrected = released - variances.mean(0) / 4
    np.testing.assert_allclose(corrected * 12 / 11, exact, rtol=1e-4)
    assert not np.allclose(released, exact, rtol=1e-3)


def test_microbatches_together_are_one_batch():
    rng = np.random.default_rng(6)
    rows = jnp.asarray(rng.normal(size=(20, 5)) + 2, jnp.float32)

    @jax.jit
    def moments(number):
        def of(index):
            part = jax.lax.dynamic_slice_in_dim(rows, 4 * index, 4)
            return per_sample.per_sample_moments(split(part))

        return tests_of.accumulate_moments(of, number)

    for number in (1, 2, 5):
        want = per_sample.per_sample_moments(split(rows[: 4 * number]))
        for got, expected in zip(
            jax.tree.leaves(moments(number)), jax.tree.leaves(want), strict=True
        ):
            np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert moments._cache_size() == 1
    with jax.enable_x64(True):
        jax.eval_shape(moments, 3)  # dtypes do not drift


def test_next_batch_sizes():
    def after(b, required, **options):
        return tests_of.next_batch_size(b, required, **{"maximum": 100, **options})

    assert after(8, 3.0) == 8  # never smaller
    assert after(8, 8.0) == 8 and after(8, 8.01) == 9
    assert after(8, 17.0, multiple=8) == 24
    assert after(8, 1e30) == 100 and after(8, jnp.inf, multiple=8) == 96
    assert after(8, jnp.nan) == 8
    assert after(8, jnp.float32(20.5)) == 21
    assert isinstance(after(np.int64(8), 20.0), int)


def test_adagrad_norm_by_hand():
    optimizer = an.adagrad_norm(0.5, initial=0.25)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    state = optimizer.init(params)
    gradient = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([2.0])}
    total = 0.25
    for _ in range(3):
        update, state = optimizer.update(gradient, state, params)
        total += 9.0
        np.testing.assert_allclose(update["a"], -0.5 * np.array([1, -2]) / total**0.5, rtol=1e-6)
        np.testing.assert_allclose(update["b"], -0.5 * 2 / total**0.5, rtol=1e-6)


def test_one_parameter_is_adagrad():
    ours = an.adagrad_norm(0.3, initial=0.1)
    theirs = optax.adagrad(0.3, initial_accumulator_value=0.1, eps=0.0)
    params = jnp.array([1.0])
    states = [ours.init(params), theirs.init(params)]
    for g in (0.5, -2.0, 0.0, 1e-3):
        gradient = jnp.array([g])
        one, states[0] = ours.update(gradient, states[0], params)
        two, states[1] = theirs.update(gradient, states[1], params)
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_one_sum_for_each_output():
    transform = an.scale_by_adagrad_norm(initial=0.0, per_row=True)
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2), "scale": jnp.zeros(())}
    gradient = {
        "kernel": jnp.array([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0]]),
        "bias": jnp.array([4.0, 0.0]),
        "scale": jnp.float32(-2.0),
    }
    found, state = transform.update(gradient, transform.init(params))
    np.testing.assert_allclose(found["kernel"], [[1 / 3, 0], [2 / 3, 0], [2 / 3, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], [1, 0])
    assert float(found["scale"]) == -1
    np.testing.assert_allclose(state.sums["kernel"], [9, 0])


def test_adagrad_norm_of_nothing_is_nothing():
    transform = an.scale_by_adagrad_norm(initial=0.0)
    gradient = {"a": jnp.zeros(2, jnp.bfloat16)}
    found, _ = transform.update(gradient, transform.init(gradient))
    assert found["a"].dtype == jnp.bfloat16 and not np.asarray(found["a"]).any()


def test_bad_input():
    moments = per_sample.per_sample_moments(ROWS)
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="eta"):
            tests_of.norm_test(moments, eta=bad)
        with pytest.raises(ValueError, match="eta"):
            tests_of.coordinate_test(moments, eta=bad)
        with pytest.raises(ValueError, match="theta"):
            tests_of.inner_product_test(ROWS, theta=bad)
        with pytest.raises(ValueError, match="nu"):
            tests_of.orthogonality_test(ROWS, nu=bad)
    with pytest.raises(ValueError, match="quantile"):
        tests_of.coordinate_test(moments, eta=0.5, quantile=1.1)
    with pytest.raises(ValueError, match="floor"):
        tests_of.coordinate_test(moments, eta=0.5, floor=-1.0)
    for test in (
        per_sample.per_sample_moments,
        lambda g: tests_of.inner_product_test(g, theta=0.5),
        lambda g: tests_of.orthogonality_test(g, nu=0.5),
    ):
        with pytest.raises(ValueError, match="gradients: expected at least 2 samples, got 1"):
            test(ROWS[:1])
        with pytest.raises(ValueError, match="gradients: expected leaves with the same number"):
            test({"a": ROWS, "b": ROWS[:3]})
        with pytest.raises(ValueError, match="gradients: expected leaves with the same number"):
            test({})
    with pytest.raises(ValueError, match="batch: expected leaves with the same number"):
        per_sample.per_sample_grads(lambda p, x: p, 1.0, {"a": ROWS, "b": ROWS[:3]})
    with pytest.raises(ValueError, match="second.mean"):
        per_sample.merge_moments(moments, per_sample.per_sample_moments(ROWS[:, :1]))
    for name, arguments in (
        ("batch_size", {"batch_size": 1}),
        ("maximum", {"maximum": 7}),
        ("multiple", {"multiple": 0}),
        ("batch_size: expected a multiple of 3", {"multiple": 3}),
        ("required", {"required": -1.0}),
    ):
        given = {"batch_size": 8, "required": 5.0, "maximum": 100, "multiple": 1} | arguments
        with pytest.raises(ValueError, match=name):
            tests_of.next_batch_size(**given)
    with pytest.raises(ValueError, match="num_microbatches"):
        tests_of.accumulate_moments(lambda i: moments, 0)
    with pytest.raises(ValueError, match="initial"):
        an.adagrad_norm(0.1, initial=-1.0)
