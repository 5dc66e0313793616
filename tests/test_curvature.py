"""The head's second-order model: enumeration, automatic differentiation, dense NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.masks import curvature
from pgjax.types import TokenSupport

B, T, V, H = 3, 4, 6, 5
RATE = 0.3


@pytest.fixture(scope="module")
def batch():
    """Hidden states, head, tokens drawn, advantages; distributions of the whole vocabulary."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(B, T, H)), rng.normal(size=(V, H))
    logits = hidden @ head.T
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    tokens = rng.integers(0, V, (B, T))
    return hidden, p, tokens, rng.normal(size=(B, T))


def dense(hidden, p, tokens, a, direction, rate):
    """Gain and shift with explicit matrices, one token after the other."""
    gain, shift = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for at in np.ndindex(tokens.shape):
        v = np.eye(p.shape[-1])[tokens[at]] - p[at]
        gradient = a[at] * np.outer(v, hidden[at])
        step = direction(gradient)
        u = step @ hidden[at]
        variance = p[at] @ u**2 - (p[at] @ u) ** 2
        quadratic = a[at] * ((v @ u) ** 2 - variance)
        gain[at] = rate * np.sum(gradient * step) + rate**2 / 2 * quadratic
        shift[at] = rate**2 / 2 * (v @ u) ** 2
    return gain, shift


def whole(p, tokens):
    ids = np.broadcast_to(np.arange(p.shape[-1]), p.shape)
    return TokenSupport(jnp.asarray(p), jnp.asarray(ids), jnp.asarray(tokens))


def in_sums(hidden, p, tokens, a, rate=RATE):
    chosen = np.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]
    sums = (np.log(chosen), (p**2).sum(-1), (p**3).sum(-1), (hidden**2).sum(-1))
    arrays = (jnp.asarray(x, jnp.float32) for x in (*sums, a))
    return curvature.head_curvature_sgd(*arrays, learning_rate=rate)


def assert_equal(found, want, rtol=2e-4):
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-5)


def test_power_sums_give_the_dense_result(batch):
    assert_equal(in_sums(*batch), dense(*batch, lambda g: g, RATE))


def test_a_certain_token_has_neither_gain_nor_shift():
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    found = curvature.head_curvature_sgd(zero, one, one, 9 * one, one, learning_rate=1.0)
    assert found.gain == 0 and found.shift == 0


def test_the_whole_vocabulary_as_support_is_dense(batch):
    hidden, p, tokens, a = batch
    found = jax.jit(functools.partial(curvature.head_curvature, curvature.sgd_direction))(
        jnp.asarray(hidden, jnp.float32), whole(p, tokens), jnp.asarray(a), learning_rate=RATE
    )
    assert_equal(found, dense(*batch, lambda g: g, RATE))


def restricted(p, tokens, size):
    return curvature.head_support(jnp.log(jnp.asarray(p)), jnp.asarray(tokens), size=size)


def test_support_holds_the_likely_tokens_and_the_drawn_one(batch):
    _, p, tokens, _ = batch
    found = restricted(p, tokens, 3)
    for at in np.ndindex(tokens.shape):
        ids = np.asarray(found.ids[at])
        assert len(set(ids.tolist())) == 3 and ids[found.chosen[at]] == tokens[at]
        np.testing.assert_allclose(found.probabilities[at], p[at][ids], rtol=1e-5)
        top = np.argsort(-p[at])
        want = top[:3] if tokens[at] in top[:3] else [*top[:2], tokens[at]]
        assert set(ids.tolist()) == set(np.asarray(want).tolist())
    assert restricted(p, tokens, V).ids.shape == (B, T, V)


def test_a_support_of_likely_tokens_in_sums_and_in_full(batch):
    """On a support the power sums are its own."""
    hidden, p, tokens, a = batch
    support = restricted(p, tokens, 3)
    small = np.asarray(support.probabilities, float)
    want = dense(hidden, small, np.asarray(support.chosen), a, lambda g: g, RATE)
    found = curvature.head_curvature(
        curvature.sgd_direction,
        jnp.asarray(hidden, jnp.float32),
        support,
        jnp.asarray(a),
        learning_rate=RATE,
    )
    assert_equal(found, want)
    assert_equal(in_sums(hidden, small, np.asarray(support.chosen), a), want)


def test_plain_steps_have_their_closed_form():
    """u = A ‖h‖² v and <g, G> = A² ‖v‖² ‖h‖², read off for a step so small that it is linear."""
    p, h, a, rate = np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0]), -1.5, 1e-3
    v = np.array([-0.5, 0.7, -0.2])
    token = np.array([[1]])
    found = in_sums(h[None, None], p[None, None], token, np.array([[a]]), rate=rate)
    norm, n = v @ v, h @ h
    assert float(found.gain[0, 0]) == pytest.approx(rate * a**2 * norm * n, rel=0.01)
    assert float(found.shift[0, 0]) == pytest.approx(rate**2 / 2 * (a * n * norm) ** 2, rel=1e-5)


def test_without_advantage_there_is_nothing_and_shift_scales_with_the_squared_rate(batch):
    hidden, p, tokens, a = batch
    found = in_sums(hidden, p, tokens, 0 * a)
    assert not found.gain.any() and not found.shift.any()
    one, three = in_sums(*batch), in_sums(*batch, rate=3 * RATE)
    np.testing.assert_allclose(three.shift, 9 * one.shift, rtol=1e-5)
    assert (one.shift >= 0).all()


# --- what the model says, by enumeration of one state's actions -----------------------------------


@pytest.fixture(scope="module")
def state():
    """One state: every action once, with a direction all of them share. In float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        head, h, rewards = rng.normal(size=(V, H)), rng.normal(size=H), rng.normal(size=V)
        step = rng.normal(size=(V, H))
        p = np.asarray(jax.nn.softmax(jnp.asarray(head @ h)))
        hidden = np.broadcast_to(h, (1, V, H))
        support = whole(np.broadcast_to(p, (1, V, V)), np.arange(V)[None])
        found = [
            curvature.head_curvature(
                lambda gradient, ids: jnp.asarray(step)[None],
                jnp.asarray(hidden),
                support,
                jnp.asarray(rewards)[None],
                learning_rate=rate,
            )
            for rate in (0.1, 0.2)
        ]
        found = [np.asarray(x)[..., 0, :] for x in found]
    return head, h, rewards, step, p, found


def test_expected_gain_is_the_second_order_expansion_of_the_objective(state):
    head, h, rewards, step, p, found = state
    with jax.enable_x64(True):

        def objective(rate):
            return jax.nn.softmax((head + rate * step) @ h) @ rewards

        slope = float(jax.grad(objective)(0.0))
        bend = float(jax.grad(jax.grad(objective))(0.0))
    for rate, (gain, _) in zip((0.1, 0.2), found, strict=True):
        assert p @ gain == pytest.approx(rate * slope + rate**2 / 2 * bend, rel=1e-9)


def test_expected_shift_is_the_fisher_form_and_the_divergence_to_third_order(state):
    head, h, _, step, p, found = state
    u = step @ h
    fisher = np.diag(p) - np.outer(p, p)
    errors = []
    for rate, (_, shift) in zip((0.1, 0.2), found, strict=True):
        assert p @ shift == pytest.approx(rate**2 / 2 * u @ fisher @ u, rel=1e-9)
        small = rate / 20
        moved = (head + small * step) @ h
        q = np.exp(moved) / np.exp(moved).sum()
        errors.append(abs(p @ np.log(p / q) - p @ shift / 400))
    assert errors[1] / errors[0] == pytest.approx(8, rel=0.2)  # third order


# --- Adam's step ----------------------------------------------------------------------------------


def numpy_adam(mean, square, n, gradient):
    m, q = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    return m / (1 - 0.9 ** (n + 1)) / (np.sqrt(q / (1 - 0.999 ** (n + 1))) + 1e-8)


@pytest.fixture(scope="module")
def moments():
    rng = np.random.default_rng(2)
    return curvature.ShadowAdam(
        jnp.asarray(rng.normal(size=(V, H)), jnp.float32),
        jnp.asarray(rng.gamma(1.0, 1.0, (V, H)), jnp.float32),
        jnp.int32(7),
    )


@pytest.mark.parametrize("size", [3, V])
def test_adams_step_on_likely_rows_is_dense_adam_on_those_rows(batch, moments, size):
    hidden, p, tokens, a = batch
    support = restricted(p, tokens, size)
    found = curvature.head_curvature(
        functools.partial(curvature.adam_direction, moments),
        jnp.asarray(hidden, jnp.float32),
        support,
        jnp.asarray(a),
        learning_rate=0.01,
    )
    for at in np.ndindex(tokens.shape):
        rows = np.asarray(support.ids[at])
        mean, square = np.asarray(moments.mean)[rows], np.asarray(moments.square)[rows]
        one = [x[at][None, None] for x in (hidden, np.asarray(support.probabilities, float))]
        chosen = np.asarray(support.chosen[at])[None, None]
        want = dense(
            *one,
            chosen,
            a[at][None, None],
            lambda g, m=mean, q=square: numpy_adam(m, q, 7, g),
            0.01,
        )
        assert_equal([x[at] for x in found], [x[0, 0] for x in want], rtol=1e-3)


def test_the_first_step_of_adam_is_its_sign(batch):
    gradient = jnp.array([[[0.5, -2.0], [1e-3, 0.0]]])
    start = curvature.shadow_adam_init(2, 2)
    got = curvature.adam_direction(start, gradient, jnp.array([[1, 0]]))
    np.testing.assert_allclose(got, np.sign(gradient), rtol=1e-4)


def test_head_gradient_is_the_mean_over_accepted_tokens(batch):
    hidden, p, tokens, a = batch
    support = restricted(p, tokens, 3)
    accepted = np.random.default_rng(3).random((B, T)) < 0.6
    want = np.zeros((V, H))
    for at in zip(*np.nonzero(accepted), strict=True):
        v = np.zeros(V)
        v[np.asarray(support.ids[at])] = -np.asarray(support.probabilities[at])
        v[tokens[at]] += 1
        want += a[at] * np.outer(v, hidden[at]) / accepted.sum()
    found = curvature.head_gradient(
        jnp.asarray(hidden, jnp.float32),
        support,
        jnp.asarray(a),
        jnp.asarray(accepted),
        num_rows=V,
    )
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_moments_follow_optax(moments):
    import optax

    gradients = np.random.default_rng(4).normal(size=(3, V, H)).astype(np.float32)
    state, adam = curvature.shadow_adam_init(V, H), optax.scale_by_adam()
    reference = adam.init(jnp.zeros((V, H)))
    ids = jnp.arange(V)[None]
    for gradient in gradients:
        planned = curvature.adam_direction(state, jnp.asarray(gradient)[None], ids)[0]
        step, reference = adam.update(jnp.asarray(gradient), reference)
        np.testing.assert_allclose(planned, step, rtol=1e-4, atol=1e-6)
        state = curvature.shadow_adam_update(state, gradient, jnp.ones((1, 1), bool))
        np.testing.assert_allclose(state.mean, reference.mu, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.square, reference.nu, rtol=1e-5, atol=1e-9)
        assert state.steps == reference.count
    after = curvature.shadow_adam_update(state, gradients[0], jnp.zeros((1, 1), bool))
    for new, old in zip(after, state, strict=True):
        np.testing.assert_array_equal(new, old)  # nothing accepted, no step


def test_memory_stays_below_all_outer_products():
    shape = (8, 64, 16, 128)  # B, T, K, H
    b, t, k, h = shape
    support = TokenSupport(
        *(jax.ShapeDtypeStruct((b, t, k), x) for x in (jnp.float32, jnp.int32)),
        jax.ShapeDtypeStruct((b, t), jnp.int32),
    )
    lowered = jax.jit(functools.partial(curvature.head_curvature, curvature.sgd_direction)).lower(
        jax.ShapeDtypeStruct((b, t, h), jnp.float32),
        support,
        jax.ShapeDtypeStruct((b,), jnp.float32),
        learning_rate=0.1,
    )
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    # Two copies of the hidden states and two positions' products, not those of all positions.
    assert used < 2 * 4 * b * t * h + 2 * 4 * b * k * h < 4 * b * t * k * h / 6


# --- the mask and bad input -----------------------------------------------------------------------


def test_mask_is_the_open_trust_region():
    gain = jnp.array([[0.0, 0.01, -0.01, 0.009, jnp.nan, -0.02]])
    shift = jnp.array([[0.0, 0.0, 0.0, 2e-4, 0.0, 0.0]])
    limits = {"gain_low": -0.01, "gain_high": 0.01, "shift_high": 1e-4}
    found = curvature.Curvature(gain, shift)
    assert curvature.curvature_mask(found, **limits).tolist() == [[True] + 5 * [False]]
    wide = {"gain_low": -0.03, "gain_high": 0.02, "shift_high": 1.0}
    assert curvature.curvature_mask(found, **wide)[0].tolist() == [1, 1, 1, 1, 0, 1]
    free = {"gain_low": -jnp.inf, "gain_high": jnp.inf, "shift_high": jnp.inf}
    assert curvature.curvature_mask(found, **free)[0].tolist() == [1, 1, 1, 1, 0, 1]


def test_errors(batch, moments):
    hidden, p, tokens, a = (jnp.asarray(x) for x in batch)
    sums = jnp.zeros((B, T))
    with pytest.raises(ValueError, match="learning_rate"):
        curvature.head_curvature_sgd(sums, sums, sums, sums, a, learning_rate=0.0)
    with pytest.raises(ValueError, match="cube_sum: expected shape"):
        curvature.head_curvature_sgd(sums, sums, sums[:2], sums, a, learning_rate=1.0)
    with pytest.raises(ValueError, match="advantages: expected shape"):
        curvature.head_curvature_sgd(sums, sums, sums, sums, a[:2], learning_rate=1.0)
    found = curvature.Curvature(sums, sums)
    with pytest.raises(ValueError, match="shift_high"):
        curvature.curvature_mask(found, gain_low=-1.0, gain_high=1.0, shift_high=0.0)
    with pytest.raises(ValueError, match="gain_high"):
        curvature.curvature_mask(found, gain_low=1.0, gain_high=1.0, shift_high=1.0)

    def of(support, direction=curvature.sgd_direction):
        return curvature.head_curvature(direction, hidden, support, a, learning_rate=0.1)

    good = whole(p, tokens)
    with pytest.raises(ValueError, match="probabilities: expected sums of at most 1"):
        of(good._replace(probabilities=p * 1.1))
    with pytest.raises(ValueError, match="chosen: expected a place in the support"):
        of(good._replace(chosen=tokens * 0 - 1))
    with pytest.raises(ValueError, match="chosen: expected shape"):
        of(good._replace(chosen=tokens[:, :2]))
    with pytest.raises(ValueError, match="moments: expected 5 features"):
        narrow = curvature.shadow_adam_init(V, H - 1)
        of(good, functools.partial(curvature.adam_direction, narrow))
    with pytest.raises(ValueError, match="ids: expected rows in"):
        curvature.adam_direction(moments, jnp.zeros((1, 1, H)), jnp.array([[V]]))
    with pytest.raises(ValueError, match="ids: expected rows in"):
        curvature.head_gradient(hidden, good, a, tokens > -1, num_rows=V - 1)
    with pytest.raises(ValueError, match="size"):
        curvature.head_support(p, tokens, size=V + 1)
    with pytest.raises(ValueError, match="gradient: expected shape"):
        curvature.shadow_adam_update(moments, jnp.zeros((V, 1)), tokens > 0)
