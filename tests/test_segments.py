"""Statistics by id, against explicit loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import checkify

from pgjax import segments

B, S = 12, 5
PER_SEGMENT = ("total", "mean", "variance", "std", "maximum", "minimum")
PER_ROW = ("deviations", "leave_one_out_mean")


def reference(name, x, ids, where, ddof=0):
    """The definition, one segment or row at a time."""
    x = np.asarray(x, np.float64)
    if name in PER_ROW:
        out = np.zeros(len(x))
        for i in range(len(x)):
            rows = [j for j in range(len(x)) if ids[j] == ids[i] and where[j]]
            if name == "leave_one_out_mean":
                rows = [j for j in rows if j != i]
                out[i] = np.mean(x[rows]) if rows else 0.0
            else:
                out[i] = x[i] - (np.mean(x[rows]) if rows else 0.0)
        return out
    out = np.zeros(S)
    for s in range(S):
        rows = x[(ids == s) & where]
        if name == "total":
            out[s] = rows.sum()
        elif name in ("variance", "std"):
            v = np.sum((rows - rows.mean()) ** 2) / (len(rows) - ddof) if len(rows) > ddof else 0.0
            out[s] = v if name == "variance" else np.sqrt(v)
        elif len(rows):
            out[s] = {"mean": np.mean, "maximum": np.max, "minimum": np.min}[name](rows)
    return out


@functools.cache
def compiled(name, ddof=None):
    options = {} if ddof is None else {"ddof": ddof}
    return jax.jit(functools.partial(getattr(segments, name), num_segments=S, **options))


def call(name, x, ids, where, ddof=None):
    return np.asarray(compiled(name, ddof)(jnp.asarray(x), jnp.asarray(ids), where=where))


finite = hnp.arrays(np.float64, B, elements=st.floats(-1e3, 1e3))
some_ids = hnp.arrays(np.int32, B, elements=st.integers(0, S - 1))
some_rows = hnp.arrays(bool, B)


@settings(max_examples=40, deadline=None)
@given(finite, some_ids, some_rows, st.integers(0, 2))
def test_against_loops_in_float64(x, ids, where, ddof):
    with jax.enable_x64(True):
        for name in PER_SEGMENT + PER_ROW:
            spread = name in ("variance", "std")
            got = call(name, x, ids, where, ddof if spread else None)
            want = reference(name, x, ids, where, ddof)
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-10, err_msg=name)
    want = [np.sum((ids == s) & where) for s in range(S)]
    got = segments.count(ids, num_segments=S, where=where)
    assert got.dtype == jnp.int32 and got.tolist() == want


@settings(max_examples=30, deadline=None)
@given(finite, some_ids, some_rows, st.permutations(range(B)), st.permutations(range(S)))
def test_order_of_rows_and_names_of_segments_do_not_matter(x, ids, where, order, names):
    order, names = np.array(order), np.array(names, np.int32)
    with jax.enable_x64(True):
        for name in PER_SEGMENT + PER_ROW:
            plain = call(name, x, ids, where)
            moved = call(name, x[order], names[ids][order], where[order])
            want = plain[order] if name in PER_ROW else plain[np.argsort(names)]
            np.testing.assert_allclose(moved, want, rtol=1e-12, atol=1e-10, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(finite, some_ids, some_rows, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_excluded_rows_never_leak(x, ids, where, poison):
    x = x.astype(np.float32)
    bad = np.where(where, x, np.float32(poison))
    clean = np.where(where, x, np.float32(0))
    for name in PER_SEGMENT + PER_ROW:
        got, want = call(name, bad, ids, where), call(name, clean, ids, where)
        kept = where if name == "deviations" else slice(None)  # x_i - mean is x_i's own affair
        np.testing.assert_array_equal(got[kept], want[kept], err_msg=name)


@pytest.mark.parametrize("name", PER_SEGMENT + PER_ROW)
def test_gradients(name):
    """Against central differences; what excluded rows hold changes nothing."""
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, S - 1, B))  # the last segment is empty
    where = rng.random(B) < 0.7
    x = rng.permutation(B) + rng.uniform(0, 0.3, B)  # distinct, so that extremes are smooth
    f = functools.partial(getattr(segments, name), ids=ids, num_segments=S, where=where)
    weight = np.arange(1.0, 1.0 + (B if name in PER_ROW else S))

    @jax.jit
    @jax.value_and_grad
    def step(x):
        out = f(x)
        return jnp.sum(weight * (jnp.where(where, out, 0.0) if name in PER_ROW else out))

    with jax.enable_x64(True):
        nudges = 1e-5 * np.eye(B)
        want = [(step(x + d)[0] - step(x - d)[0]) / 2e-5 for d in nudges]
        np.testing.assert_allclose(step(x)[1], want, rtol=1e-6, atol=1e-7)
        got = step(np.where(where, x, np.nan))[1]
        assert np.all(np.asarray(got)[~where] == 0)
        np.testing.assert_array_equal(got, step(np.where(where, x, 0.0))[1])


def test_gradients_at_ties_and_without_spread():
    ids = jnp.array([0, 0, 0, 1, 2, 2])
    x = jnp.array([3.0, 3.0, 3.0, 7.0, 1.0, 2.0])

    def gradient(f):
        return np.asarray(jax.grad(lambda x: f(x, ids, num_segments=4).sum())(x))

    spread = 0.5**0.5
    np.testing.assert_allclose(gradient(segments.std), [0, 0, 0, 0, -0.5, 0.5], rtol=1e-6)
    with_one = functools.partial(segments.std, ddof=1)
    np.testing.assert_allclose(gradient(with_one), [0, 0, 0, 0, -spread, spread], rtol=1e-6)
    third = 1 / 3
    np.testing.assert_allclose(
        gradient(segments.maximum), [third, third, third, 1, 0, 1], rtol=1e-6
    )
    np.testing.assert_allclose(
        gradient(segments.minimum), [third, third, third, 1, 1, 0], rtol=1e-6
    )


def test_large_offsets_cost_no_precision():
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(np.arange(4), 64))
    bits = rng.integers(0, 2, ids.shape).astype(np.float64)
    x = jnp.asarray(1e6 + bits, jnp.float32)
    options = {"num_segments": 4}
    p = np.array([bits[ids == s].mean() for s in range(4)])
    np.testing.assert_allclose(
        segments.deviations(x, ids, **options), bits - p[ids], rtol=0, atol=2e-7
    )
    np.testing.assert_allclose(segments.variance(x, ids, **options), p * (1 - p), rtol=1e-6)
    np.testing.assert_allclose(
        segments.std(x, ids, ddof=1, **options), np.sqrt(p * (1 - p) * 64 / 63), rtol=1e-6
    )
    # 1e6 + p itself is representable to 1/16 only.
    np.testing.assert_allclose(segments.mean(x, ids, **options) - 1e6, p, rtol=0, atol=1 / 32)


@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_equal_values_are_exact(n):
    @jax.jit
    def statistics(x):
        ids = jnp.zeros(n, jnp.int32)
        f = functools.partial
        zero = (segments.deviations, segments.std, f(segments.variance, ddof=1))
        same = (segments.mean, segments.maximum, segments.minimum)
        others = segments.leave_one_out_mean(x, ids, num_segments=1)
        return [[g(x, ids, num_segments=1) for g in group] for group in (zero, same)], others

    for value in (0.1, 1 / 3, 1e6 + 0.1, 1e30, -0.7):
        x = np.full(n, value, np.float32)
        (zero, same), others = statistics(x)
        assert all(np.all(np.asarray(z) == 0) for z in zero)
        assert all(np.all(np.asarray(m) == x[0]) for m in same)
        assert np.all(np.asarray(others) == (0.0 if n == 1 else x[0]))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e25, 1e37])
def test_std_survives_where_squares_leave_the_range(scale):
    x = np.float32(scale) * np.array([1.0, 2.0, 6.0], np.float32)
    got = segments.std(x, np.zeros(3, int), num_segments=1, ddof=1)[0]
    np.testing.assert_allclose(got, np.std(x.astype(np.float64), ddof=1), rtol=1e-6)


def test_empty_segments_and_no_rows():
    x, ids = jnp.array([2.0, jnp.nan]), jnp.array([1, 3])
    where = jnp.array([True, False])
    options = {"num_segments": 5, "where": where}
    assert segments.count(ids, **options).tolist() == [0, 1, 0, 0, 0]
    assert segments.mean(x, ids, **options).tolist() == [0, 2, 0, 0, 0]
    assert segments.maximum(x, ids, **options).tolist() == [0, 2, 0, 0, 0]
    assert segments.minimum(-x, ids, **options).tolist() == [0, -2, 0, 0, 0]
    assert segments.variance(x, ids, **options).tolist() == [0] * 5
    assert segments.leave_one_out_mean(x, ids, **options).tolist() == [0, 0]
    none = jnp.zeros(0)
    no_ids = jnp.zeros(0, jnp.int32)
    for name in PER_SEGMENT:
        assert getattr(segments, name)(none, no_ids, num_segments=2).tolist() == [0, 0]
    for name in PER_ROW:
        assert getattr(segments, name)(none, no_ids, num_segments=2).shape == (0,)


@pytest.mark.parametrize("name", PER_SEGMENT + PER_ROW)
def test_trailing_axes_vmap_and_dtype(name):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(B, 2, 3)).astype(np.float32)
    ids, where = rng.integers(0, S, B), rng.random(B) < 0.8
    f = compiled(name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=5e-7)
    got = f(x, ids, where=where)
    for i in range(2):
        for j in range(3):
            close(got[:, i, j], f(x[:, i, j], ids, where=where))
    batched = jax.vmap(lambda x, ids, where: f(x, ids, where=where))(
        x.T[0], np.stack([ids, (ids + 1) % S]), np.stack([where, ~where])
    )
    close(batched[0], f(x[:, 0, 0], ids, where=where))
    close(batched[1], f(x[:, 1, 0], (ids + 1) % S, where=~where))
    small = jnp.asarray(x[:, 0, 0], jnp.bfloat16)
    widened = f(small, ids, where=where)
    assert widened.dtype == jnp.float32
    np.testing.assert_array_equal(widened, f(small.astype(jnp.float32), ids, where=where))
    assert jax.eval_shape(f, np.arange(B, dtype=np.int32), ids).dtype == jnp.float32


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.int32, 9, elements=st.integers(-3, 3) | st.integers(-(2**31), 2**31 - 1)))
def test_dense_ids_and_first_rows(ids):
    labels = jax.jit(segments.dense_ids)(ids)
    assert labels.dtype == jnp.int32
    np.testing.assert_array_equal(labels, np.unique(ids, return_inverse=True)[1])
    want = [i == ids.tolist().index(ids[i]) for i in range(9)]
    assert jax.jit(segments.first_rows)(ids).tolist() == want


def test_relabelling_under_vmap_and_of_nothing():
    ids = jnp.array([[4, -1, 4], [2, 2, 2]])
    assert jax.vmap(segments.dense_ids)(ids).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert jax.vmap(segments.first_rows)(ids).tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    none = jnp.zeros(0, jnp.int32)
    assert segments.dense_ids(none).shape == segments.first_rows(none).shape == (0,)


def test_per_row():
    statistic = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    assert segments.per_row(statistic, jnp.array([1, 0, 1])).tolist() == [[3, 4], [1, 2], [3, 4]]
    assert segments.per_row(jnp.array([5, 7]), jnp.array([1])).dtype == jnp.float32


def test_ids_out_of_range():
    x, ids = jnp.array([1.0, 2.0, 4.0]), jnp.array([0, -1, 3])
    for name in PER_SEGMENT + PER_ROW:
        with pytest.raises(
            ValueError, match=r"ids: expected ids in \[0, 3\), got values in \[-1, 3"
        ):
            getattr(segments, name)(x, ids, num_segments=3)
    # Traced: no other segment's number is handed out, and checkify reports it.
    loo = jax.jit(functools.partial(segments.leave_one_out_mean, num_segments=3))
    np.testing.assert_array_equal(loo(x, ids), [0.0, np.nan, np.nan])
    deviations = jax.jit(functools.partial(segments.deviations, num_segments=3))
    np.testing.assert_array_equal(deviations(x, ids), [0.0, np.nan, np.nan])
    total = jax.jit(functools.partial(segments.total, num_segments=3))
    assert total(x, ids).tolist() == [1, 0, 0]
    for f in (loo, deviations, total):
        error, _ = checkify.checkify(f)(x, ids)
        assert "ids: expected ids in [0, 3)" in error.get()
        assert checkify.checkify(f)(x, jnp.array([0, 1, 2]))[0].get() is None


def test_concrete_ids_inside_jit():
    ids = jnp.array([0, 1, 1])
    got = jax.jit(lambda x: segments.mean(x, ids, num_segments=2))(jnp.array([1.0, 2.0, 4.0]))
    assert got.tolist() == [1, 3]
    with pytest.raises(ValueError, match="got values in"):
        jax.jit(lambda x: segments.mean(x, ids, num_segments=1))(jnp.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), np.zeros((3, 1), int), 2, None), r"ids: expected rank 1, got shape \(3, 1\)"),
        ((np.ones(3), np.zeros(3), 2, None), "ids: expected an integer dtype, got float"),
        ((np.ones(4), np.zeros(3, int), 2, None), "values: expected 3 rows like ids, got shape"),
        ((np.float32(1), np.zeros(3, int), 2, None), "values: expected 3 rows"),
        ((np.ones(3), np.zeros(3, int), 0, None), "at least 1, got 0"),
        ((np.ones(3), np.zeros(3, int), 2, np.ones(3)), "where: expected dtype bool"),
        ((np.ones(3), np.zeros(3, int), 2, np.ones(2, bool)), "where: expected shape"),
    ],
)
def test_errors(arguments, message):
    values, ids, size, where = arguments
    for name in PER_SEGMENT + PER_ROW:
        with pytest.raises(ValueError, match=message):
            getattr(segments, name)(values, ids, num_segments=size, where=where)


def test_more_errors():
    x, ids = np.ones(3), np.zeros(3, int)
    with pytest.raises(ValueError, match="ddof: expected a number in"):
        segments.variance(x, ids, num_segments=1, ddof=-1)
    for f in (segments.dense_ids, segments.first_rows):
        with pytest.raises(ValueError, match="ids: expected an integer dtype"):
            f(x)
        with pytest.raises(ValueError, match="ids: expected rank 1"):
            f(np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="num_segments: expected at least 1, got 0"):
        jax.jit(lambda i: segments.count(i, num_segments=0))(ids)
    with pytest.raises(ValueError, match="statistic: expected at least one axis"):
        segments.per_row(np.float32(1), ids)


def test_a_program_made_again_is_the_same_text():
    """So that a compiled one is found again, by another run or for another seed."""

    def lowered():
        def function(values, ids):
            return segments.mean(values, ids, num_segments=3)

        return jax.jit(function).lower(jnp.ones(4), jnp.zeros(4, jnp.int32)).as_text()

    assert lowered() == lowered()
