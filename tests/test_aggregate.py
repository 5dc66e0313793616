"""Reductions: explicit loops, weights, microbatches, devices."""

import functools

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgjax import aggregate

LENGTH = 7.0
REDUCTIONS = {
    "token_mean": aggregate.token_mean,
    "sequence_mean_token_mean": aggregate.sequence_mean_token_mean,
    "sequence_mean_token_sum": aggregate.sequence_mean_token_sum,
    "constant_length": functools.partial(aggregate.constant_length, length=LENGTH),
}
B, T = 6, 5
every = pytest.mark.parametrize("name", REDUCTIONS)


def reference(name, x, mask):
    sequences = [[x[i, t] for t in range(x.shape[1]) if mask[i, t]] for i in range(x.shape[0])]
    present = [s for s in sequences if s]
    if name == "constant_length":
        return sum(map(sum, sequences)) / LENGTH / len(x)
    if not present:
        return 0.0
    return {
        "token_mean": lambda: np.mean(np.concatenate(present)),
        "sequence_mean_token_mean": lambda: np.mean([np.mean(s) for s in present]),
        "sequence_mean_token_sum": lambda: np.mean([np.sum(s) for s in present]),
    }[name]()


compiled = {name: jax.jit(f) for name, f in REDUCTIONS.items()}
slope = {name: jax.jit(jax.grad(f)) for name, f in REDUCTIONS.items()}
numbers = hnp.arrays(np.float64, (B, T), elements=st.floats(-100, 100))
masks = hnp.arrays(bool, (B, T))


@settings(max_examples=40, deadline=None)
@given(numbers, masks, st.permutations(range(B)))
def test_against_loops_in_any_order(x, mask, order):
    order = np.array(order)
    with jax.enable_x64(True):
        for name in REDUCTIONS:
            got = compiled[name](x, mask)
            assert got.shape == () and got.dtype == jnp.float64
            np.testing.assert_allclose(got, reference(name, x, mask), rtol=1e-12, atol=1e-12)
            moved = compiled[name](x[order], mask[order])
            np.testing.assert_allclose(moved, got, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(numbers, masks)
def test_values_off_the_mask_never_leak(x, mask):
    bad = np.where(mask, x, np.nan)
    for name in REDUCTIONS:
        value, gradient = compiled[name](bad, mask), np.asarray(slope[name](bad, mask))
        assert value == compiled[name](np.where(mask, x, 0.0), mask)
        assert np.all(np.isfinite(gradient)) and np.all(gradient[~mask] == 0)
        if mask.any():
            assert np.all(gradient[mask] > 0)
        else:
            assert value == 0


@every
def test_padding_changes_nothing_and_half_precision_is_summed_in_float32(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, 300)).astype(np.float32)
    mask = rng.random(x.shape) < 0.6
    f = REDUCTIONS[name]
    padded = np.pad(x, ((0, 0), (0, 9)), constant_values=np.nan)
    np.testing.assert_allclose(f(padded, np.pad(mask, ((0, 0), (0, 9)))), f(x, mask), rtol=1e-6)
    half = jnp.asarray(1 + 0.01 * x, jnp.bfloat16)
    got = f(half, mask)
    assert got.dtype == jnp.float32
    want = reference(name, np.asarray(half.astype(jnp.float32), np.float64), mask)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_a_token_weighs():
    """Lengths 1 and 9: the long sequence has nine times the weight under a token mean."""
    mask = jnp.arange(9) < jnp.array([[1], [9]])
    share = {name: np.asarray(aggregate.weights(f, mask)).sum(1) for name, f in REDUCTIONS.items()}
    np.testing.assert_allclose(share["token_mean"], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(share["sequence_mean_token_mean"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(share["sequence_mean_token_sum"], [0.5, 4.5], rtol=1e-6)
    np.testing.assert_allclose(share["constant_length"], [0.5 / 7, 4.5 / 7], rtol=1e-6)
    equal = jnp.ones((3, 4), bool)
    np.testing.assert_array_equal(
        aggregate.weights(aggregate.token_mean, equal),
        aggregate.weights(aggregate.sequence_mean_token_mean, equal),
    )


def test_sequences_without_tokens():
    """They are no sequence to the sequence means, but a row to the constant length."""
    x = jnp.ones((4, 3))
    mask = jnp.zeros((4, 3), bool).at[0].set(True)
    got = {name: float(f(x, mask)) for name, f in REDUCTIONS.items()}
    assert got == {
        "token_mean": 1.0,
        "sequence_mean_token_mean": 1.0,
        "sequence_mean_token_sum": 3.0,
        "constant_length": pytest.approx(3 / 7 / 4),
    }
    for name, f in REDUCTIONS.items():
        for shape in ((0, 3), (2, 0)):
            empty = np.zeros(shape), np.zeros(shape, bool)
            assert f(*empty) == 0 and aggregate.weights(f, empty[1]).shape == shape, name


def test_millions_of_tokens_in_float32():
    x = jnp.full((64, 65536), 0.1, jnp.float32)
    got = aggregate.token_mean(x, jnp.ones(x.shape, bool))
    np.testing.assert_allclose(got, np.float32(0.1), rtol=2e-6)


@settings(max_examples=20, deadline=None)
@given(masks, st.lists(st.integers(0, 3), min_size=B, max_size=B), st.integers(0, 99))
def test_any_split_adds_up_to_the_batch(mask, parts, seed):
    """Loss and gradient of a nonlinear model, accumulated over parts of very unequal lengths."""
    rng = np.random.default_rng(seed)
    x, w, parts = rng.normal(size=(B, T, 3)), rng.normal(size=3), np.array(parts)
    with jax.enable_x64(True):
        for name in REDUCTIONS:
            want, want_gradient = _whole(name)(w, x, mask)
            token_weights = aggregate.weights(REDUCTIONS[name], mask)
            value, gradient = 0.0, np.zeros(3)
            for part in range(4):
                rows = (parts == part)[:, None]  # the rows of a part, others weigh nothing
                v, g = _part(w, x, jnp.where(rows, token_weights, 0.0))
                value, gradient = value + v, gradient + g
            # The weights are float32, the sums are not.
            np.testing.assert_allclose(value, want, rtol=0, atol=5e-7)
            np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=5e-7)


@functools.cache
def _whole(name):
    return jax.jit(jax.value_and_grad(lambda w, x, mask: REDUCTIONS[name](jnp.tanh(x @ w), mask)))


_part = jax.jit(
    jax.value_and_grad(lambda w, x, weights: aggregate.weighted_sum(jnp.tanh(x @ w), weights))
)


def test_slices_add_up_where_their_means_do_not():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(8, 6)).astype(np.float32)
    mask = np.arange(6) < rng.integers(0, 7, (8, 1))
    parts = [slice(0, 1), slice(1, 5), slice(5, 8)]
    for name, f in REDUCTIONS.items():
        w = aggregate.weights(f, mask)
        shares = [aggregate.weighted_sum(x[p], w[p]) for p in parts]
        np.testing.assert_allclose(sum(shares), f(x, mask), rtol=2e-6)
        naive = np.mean([f(x[p], mask[p]) for p in parts])
        assert abs(naive - f(x, mask)) > 1e-2, name


def test_weighted_sum_ignores_what_weighs_nothing():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
    w = jnp.array([[0.5, 0.0], [0.0, 0.25]])
    assert aggregate.weighted_sum(x, w) == 1.0
    np.testing.assert_array_equal(jax.grad(aggregate.weighted_sum)(x, w), w)
    assert aggregate.weighted_sum(x.astype(jnp.bfloat16), w).dtype == jnp.float32


def test_weights_of_a_users_own_reduction():
    mask = jnp.array([[True, False], [True, True]])
    got = aggregate.weights(
        lambda x, m: jnp.sum(jnp.where(m, x, 0.0) * jnp.array([1.0, 3.0])), mask
    )
    np.testing.assert_array_equal(got, [[1, 0], [1, 3]])


@every
def test_jit_and_vmap(name):
    rng = np.random.default_rng(5)
    x, mask = rng.normal(size=(3, B, T)).astype(np.float32), rng.random((3, B, T)) < 0.5
    got = jax.jit(jax.vmap(REDUCTIONS[name]))(x, mask)
    want = [reference(name, x[i].astype(np.float64), mask[i]) for i in range(3)]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    stacked = jax.vmap(functools.partial(aggregate.weights, REDUCTIONS[name]))(mask)
    np.testing.assert_array_equal(stacked[1], aggregate.weights(REDUCTIONS[name], mask[1]))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, (2, 3, 2), elements=st.floats(-100, 100, width=32)), st.data())
def test_masked_diagnostics(x, data):
    mask = data.draw(hnp.arrays(bool, x.shape))
    bad = np.where(mask, x, data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))).astype("f4")
    chosen = x[mask].astype(np.float64)
    wants = [f(chosen) if chosen.size else 0.0 for f in (np.mean, np.min, np.max)]
    for f, want in zip(MASKED, wants, strict=True):
        np.testing.assert_allclose(f(bad, mask), want, rtol=1e-6, atol=2e-5)


MASKED = tuple(map(jax.jit, (aggregate.masked_mean, aggregate.masked_min, aggregate.masked_max)))


def test_masked_diagnostics_of_scalars_nothing_and_integers():
    for f in MASKED:
        assert f(jnp.float32(3), jnp.array(True)) == 3 and f(jnp.float32(3), jnp.array(False)) == 0
        assert f(jnp.zeros(0), jnp.zeros(0, bool)) == 0
        assert f(jnp.array([2, 2]), jnp.array([True, False])).dtype == jnp.float32
        gradient = jax.grad(f)(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
        assert gradient.tolist() == [1, 0]
        assert jax.grad(f)(jnp.array([1.0, jnp.nan]), jnp.zeros(2, bool)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (np.ones(3), np.ones(3, bool), r"values: expected rank 2, got shape \(3,\)"),
        (np.ones((2, 3)), np.ones((2, 2), bool), r"mask: expected shape \(2, 3\) like values"),
        (np.ones((2, 3)), np.ones((2, 3)), "mask: expected dtype bool, got float"),
        (np.ones((2, 3), int), np.ones((2, 3), bool), "values: expected a floating dtype, got int"),
    ],
)
def test_errors(x, mask, message):
    for f in REDUCTIONS.values():
        with pytest.raises(ValueError, match=message):
            f(x, mask)


def test_more_errors():
    x, mask = np.ones((2, 3)), np.ones((2, 3), bool)
    for length in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="length: expected a number in"):
            aggregate.constant_length(x, mask, length=length)
    with pytest.raises(ValueError, match="mask: expected rank 2"):
        aggregate.weights(aggregate.token_mean, np.ones(3, bool))
    with pytest.raises(ValueError, match="weights: expected shape"):
        aggregate.weighted_sum(x, x[:, :2])
    with pytest.raises(ValueError, match="mask: expected shape"):
        aggregate.masked_mean(x, mask[:1])


EIGHT_DEVICES = """
    import functools, json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from pgjax import aggregate

    assert jax.device_count() == 8
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, 5, 3)), jnp.float32)
    # Device 0 has no token at all, device 1 has most.
    mask = rng.random((16, 5)) < np.repeat([0, 1, 0.2, 0.2, 0.4, 0.4, 0.4, 0.4], 2)[:, None]
    w = jnp.asarray(rng.normal(size=3), jnp.float32)
    rows = NamedSharding(mesh, P("data"))
    X, M = jax.device_put(x, rows), jax.device_put(mask, rows)
    mapped = functools.partial(jax.shard_map, mesh=mesh)

    out = {}
    for f in (aggregate.token_mean, aggregate.sequence_mean_token_mean,
              aggregate.sequence_mean_token_sum,
              functools.partial(aggregate.constant_length, length=7)):
        def loss(w, x, mask, **kw):
            return f(jnp.tanh(x @ w), mask, **kw)

        step = jax.value_and_grad(loss)
        value, gradient = step(w, x, jnp.asarray(mask))
        weights = aggregate.weights(f, jnp.asarray(mask))
        off = {}

        def compare(what, v, g):
            off[what] = float(max(np.max(np.abs(v - value)), np.max(np.abs(g - gradient))))

        compare("jit", *jax.jit(step)(w, X, M))
        for checked in (True, False):
            def local(w, x, mask):
                v, g = step(w, x, mask, axis_name="data")
                if not checked:  # else the gradient of a replicated parameter is summed already
                    g = jax.lax.psum(g, "data")
                return jax.lax.psum(v, "data"), g

            specs = {"in_specs": (P(), P("data"), P("data")), "check_vma": checked}
            compare(f"shard_map {checked}",
                    *jax.jit(mapped(local, out_specs=P(), **specs))(w, X, M))
            part = functools.partial(aggregate.weights,
                                     functools.partial(f, axis_name="data"))
            got = jax.jit(mapped(part, in_specs=P("data"), out_specs=P("data"),
                                 check_vma=checked))(M)
            off[f"weights {checked}"] = float(np.max(np.abs(got - weights)))
        whole = mapped(lambda w, x, m: jax.lax.psum(loss(w, x, m, axis_name="data"), "data"),
                       in_specs=(P(), P("data"), P("data")), out_specs=P())
        compare("differentiated outside", *jax.jit(jax.value_and_grad(whole))(w, X, M))
        pmapped = jax.pmap(
            lambda w, x, m: jax.lax.psum(step(w, x, m, axis_name="d"), "d"),
            axis_name="d", in_axes=(None, 0, 0))
        compare("pmap", *pmapped(w, x.reshape(8, 2, 5, 3), mask.reshape(8, 2, 5)))
        share = mapped(lambda w, x, m: loss(w, x, m, axis_name="data")[None],
                       in_specs=(P(), P("data"), P("data")), out_specs=P("data"))(w, X, M)
        assert share[0] == 0  # a device without tokens has no share
        name = getattr(f, "__name__", "constant_length")
        out[name] = {"off": off, "scale": float(np.max(np.abs(gradient)))}
    print(json.dumps(out))
    """


def test_eight_devices():
    result = devices.run(EIGHT_DEVICES)
    assert set(result) == set(REDUCTIONS)
    for name, found in result.items():
        assert found["scale"] > 1e-3
        assert len(found["off"]) == 7
        for how, error in found["off"].items():
            assert error < 5e-7, (name, how, error)
