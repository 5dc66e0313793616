"""Log-probs, entropies and KL estimators against NumPy, SciPy and exact enumeration."""

# NumPy arrays go where jax arrays are declared: jax takes them, the type checker does not.
# mypy: disable-error-code="arg-type,index,misc,has-type"

from __future__ import annotations

import functools
import math
import re

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import logprobs as lp

B, T, H, V = 3, 5, 7, 37


def problem(seed: int = 0, *, scale: float = 2.0, shape=(B, T, H, V)):
    b, t, h, v = shape
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(b, t, h))
    unembedding = rng.normal(size=(h, v)) / math.sqrt(h)
    return hidden, unembedding, rng.integers(0, v, size=(b, t))


def numpy_logits(hidden, unembedding, *, temperature=1.0, soft_cap=None):
    x = hidden.astype(np.float64) @ unembedding.astype(np.float64)
    return (x if soft_cap is None else soft_cap * np.tanh(x / soft_cap)) / temperature


def numpy_logprobs(logits, tokens):
    out = np.zeros(tokens.shape)
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            out[b, t] = log_p[b, t - 1, tokens[b, t]]
    return out


def numpy_entropy(logits):
    """Entropy of each token's own distribution, at the token's index."""
    out = np.zeros(logits.shape[:2])
    out[:, 1:] = scipy.special.entr(scipy.special.softmax(logits, axis=-1)).sum(-1)[:, :-1]
    return out


def naive(hidden, unembedding, tokens, *, temperature=1.0, soft_cap=None):
    """Log-probs and entropies through the full logits: an independent formula for gradients."""
    x = jnp.einsum("bth,hv->btv", hidden, unembedding)
    x = (x if soft_cap is None else soft_cap * jnp.tanh(x / soft_cap)) / temperature
    log_p = jax.nn.log_softmax(x[:, :-1])
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    entropy = -(jnp.exp(log_p) * log_p).sum(-1)
    return tuple(jnp.pad(a, ((0, 0), (1, 0))) for a in (chosen, entropy))


def relative(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


# ------------------------------------------------------------------------------- from_logits


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_from_logits_equals_explicit_loops(temperature):
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(B, T, V)) * 4, rng.integers(0, V, size=(B, T))
    want = numpy_logprobs(logits / temperature, tokens)
    got = lp.from_logits(jnp.float32(logits), tokens, temperature=temperature)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=4e-6)
    with jax.enable_x64(True):
        got = lp.from_logits(jnp.asarray(logits), tokens, temperature=temperature)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, atol=1e-13)


def test_from_logits_gradient_equals_naive_in_float64():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        logits, tokens = jnp.asarray(rng.normal(size=(B, T, V))), rng.integers(0, V, size=(B, T))
        g = jnp.asarray(rng.normal(size=(B, T)))
        got = jax.grad(lambda x: (lp.from_logits(x, tokens, temperature=0.7) * g).sum())(logits)
        p = scipy.special.softmax(np.asarray(logits) / 0.7, axis=-1)
        want = np.zeros((B, T, V))
        for b in range(B):
            for t in range(1, T):
                onehot = np.eye(V)[tokens[b, t]]
                want[b, t - 1] = float(g[b, t]) * (onehot - p[b, t - 1]) / 0.7
        np.testing.assert_allclose(got, want, atol=1e-14)


def test_from_logits_with_ruled_out_tokens():
    logits = np.array([[[0.0, -np.inf, 1.0], [-np.inf] * 3, [0.0, 0.0, 0.0]]], np.float32)
    tokens = np.array([[0, 2, 1]])
    got = lp.from_logits(logits, tokens)
    assert got[0, 0] == 0 and got[0, 2] == -np.inf
    np.testing.assert_allclose(got[0, 1], -np.log1p(np.exp(-1.0)), rtol=1e-6)
    # A ruled-out token, and a row with no token at all, still have finite gradients.
    for row, token in ((logits[:, :2], [[0, 1]]), (logits[:, 1:], [[0, 1]])):
        d = jax.grad(lambda x, t=token: lp.from_logits(x, np.array(t))[0, 1])(jnp.asarray(row))
        assert np.isfinite(d).all()


def test_from_logits_is_accurate_at_large_logits_and_in_low_precision():
    logits = np.array([[[3e4, 3e4 - 1, -3e4], [0, 0, 0]]])
    want = numpy_logprobs(logits, np.array([[0, 1]]))
    got = lp.from_logits(jnp.float32(logits), np.array([[0, 1]]))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    half = jnp.bfloat16([[[1.0, 2.0, 3.0], [0, 0, 0]]])
    got = lp.from_logits(half, np.array([[0, 1]]))
    assert got.dtype == jnp.float32
    want = numpy_logprobs(np.asarray(half, np.float64), np.array([[0, 1]]))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1])
def test_rows_that_predict_nothing_are_zero(steps):
    hidden, unembedding, _ = problem()
    hidden, tokens = jnp.float32(hidden[:, :steps]), np.zeros((B, steps), np.int32)
    unembedding = jnp.float32(unembedding)
    for got in (
        lp.from_logits(hidden @ unembedding, tokens),
        lp.from_hidden(hidden, unembedding, tokens),
        *lp.from_hidden_with_entropy(hidden, unembedding, tokens),
    ):
        assert got.shape == (B, steps) and not np.any(got)


# ------------------------------------------------------------------------------- from_hidden

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "soft cap": {"soft_cap": 1.5},
    "both": {"temperature": 1.7, "soft_cap": 2.0},
}
# 8 leaves a rest of 5, 36 of 1; 100 is more than there are.
BLOCKS = [("plain", n) for n in (None, 1, 8, 36, 100)] + [("soft cap", 8), ("both", 8)]


@pytest.mark.parametrize(("case", "block_size"), BLOCKS)
def test_from_hidden_equals_numpy_in_float64(case, block_size):
    hidden, unembedding, tokens = problem()
    logits = numpy_logits(hidden, unembedding, **CASES[case])
    with jax.enable_x64(True):
        options = {**CASES[case], "block_size": block_size}
        got = lp.from_hidden(jnp.asarray(hidden), jnp.asarray(unembedding), tokens, **options)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, numpy_logprobs(logits, tokens), atol=1e-13)
        got, entropy = lp.from_hidden_with_entropy(
            jnp.asarray(hidden), jnp.asarray(unembedding.T), tokens, vocab_axis=0, **options
        )
        np.testing.assert_allclose(got, numpy_logprobs(logits, tokens), atol=1e-13)
        np.testing.assert_allclose(entropy, numpy_entropy(logits), atol=1e-13)


@pytest.mark.parametrize(
    ("case", "block_size", "vocab_axis"),
    [("plain", 37, 0), ("plain", 8, 1), ("temperature", 36, 1), ("soft cap", 8, 1), ("both", 8, 0)],
)
def test_from_hidden_gradients_equal_naive_in_float64(case, block_size, vocab_axis):
    with jax.enable_x64(True):
        hidden, unembedding, tokens = map(jnp.asarray, problem(1))
        g, g_entropy = jnp.asarray(np.random.default_rng(2).normal(size=(2, B, T)))

        def theirs(h, w, ge):
            logprobs, entropy = naive(h, w, tokens, **CASES[case])
            return (logprobs * g).sum() + (entropy * ge).sum()

        def ours(h, w, ge):
            options = {**CASES[case], "block_size": block_size, "vocab_axis": vocab_axis}
            w = w if vocab_axis == 1 else w.T
            if ge is g_entropy:
                logprobs, entropy = lp.from_hidden_with_entropy(h, w, tokens, **options)
                return (logprobs * g).sum() + (entropy * ge).sum()
            return (lp.from_hidden(h, w, tokens, **options) * g).sum()

        for ge in (0 * g, g_entropy):
            want = jax.jit(jax.grad(theirs, (0, 1)))(hidden, unembedding, ge)
            got = jax.grad(ours, (0, 1))(hidden, unembedding, ge)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-12)


def test_float32_gradients_equal_naive_to_1e_5():
    hidden, unembedding, tokens = problem(3, shape=(2, 24, 32, 1000))
    g = np.random.default_rng(4).normal(size=tokens.shape)
    args = jnp.float32(hidden), jnp.float32(unembedding)

    def loss(f):
        return jax.grad(lambda h, w: (f(h, w) * g).sum(), (0, 1))

    got = jax.jit(loss(lambda h, w: lp.from_hidden(h, w, tokens, block_size=256)))(*args)
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(np.asarray(a, np.float64)) for a in args)
        want = jax.jit(loss(lambda h, w: naive(h, w, tokens)[0]))(*exact)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        assert relative(a, b) < 1e-5


def test_bfloat16_inputs_are_summed_in_float32():
    hidden, unembedding, tokens = problem(5, shape=(2, 16, 64, 300))
    h, w = jnp.bfloat16(hidden), jnp.bfloat16(unembedding)
    h64, w64 = np.asarray(h, np.float64), np.asarray(w, np.float64)
    logits = numpy_logits(h64, w64)
    got, entropy = lp.from_hidden_with_entropy(h, w, tokens, block_size=64)
    assert got.dtype == entropy.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32: what is left is the sums' rounding.
    np.testing.assert_allclose(got, numpy_logprobs(logits, tokens), atol=1e-5)
    np.testing.assert_allclose(entropy, numpy_entropy(logits), atol=1e-5)

    d = jax.grad(lambda h, w: lp.from_hidden(h, w, tokens, block_size=64).sum(), (0, 1))(h, w)
    with jax.enable_x64(True):
        want = jax.jit(jax.grad(lambda h, w: naive(h, w, tokens)[0].sum(), (0, 1)))(
            jnp.asarray(h64), jnp.asarray(w64)
        )
    for a, b in zip(d, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative(a, b) < 2**-8  # one rounding to 8 bits of the largest entry


@pytest.mark.parametrize(
    "dtypes", [(np.float16, np.float16), (jnp.bfloat16, np.float32), (np.float32, jnp.bfloat16)]
)
def test_gradients_have_the_inputs_dtypes(dtypes):
    hidden, unembedding, tokens = problem(6)
    h, w = jnp.asarray(hidden, dtypes[0]), jnp.asarray(unembedding, dtypes[1])
    want = numpy_logprobs(
        numpy_logits(np.asarray(h, np.float64), np.asarray(w, np.float64)), tokens
    )
    got, pull = jax.vjp(lambda h, w: lp.from_hidden(h, w, tokens, block_size=8), h, w)
    np.testing.assert_allclose(got, want, atol=5e-6)
    dh, dw = pull(jnp.ones_like(got))
    assert (dh.dtype, dw.dtype) == (h.dtype, w.dtype)


@pytest.mark.parametrize("entropy", [False, True])
def test_zero_cotangent_gives_exactly_zero_gradient_even_beside_nan(entropy):
    hidden, unembedding, tokens = problem(7)
    h, w = jnp.float32(hidden), jnp.float32(unembedding)
    mask = np.ones((B, T), bool)
    mask[0, 3:], mask[1, :] = False, False
    # Position t predicts token t + 1: these predict masked tokens, or none.
    idle = np.concatenate([~mask[:, 1:], np.ones((B, 1), bool)], axis=1)

    def loss(h, w):
        if entropy:
            logprobs, ent = lp.from_hidden_with_entropy(h, w, tokens, block_size=8)
            logprobs = logprobs + 0.3 * ent
        else:
            logprobs = lp.from_hidden(h, w, tokens, block_size=8)
        return jnp.where(mask, logprobs, 0).sum()

    loss = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (dh, dw) = loss(h, w)
    spoiled = jnp.where(idle[..., None], jnp.nan, h)
    value_2, (dh_2, dw_2) = loss(spoiled, w)
    assert not np.any(dh[idle]) and np.all(np.any(dh[~idle], axis=-1))
    assert np.any(dw) and np.isfinite(dw).all()
    assert value == value_2
    np.testing.assert_array_equal(dh, dh_2)
    np.testing.assert_array_equal(dw, dw_2)


def test_last_position_predicts_nothing():
    hidden, unembedding, tokens = problem(8)
    h, w = jnp.float32(hidden), jnp.float32(unembedding)
    other = h.at[:, -1].set(123.0)
    np.testing.assert_array_equal(lp.from_hidden(h, w, tokens), lp.from_hidden(other, w, tokens))
    moved = tokens.copy()
    moved[:, 0] = (moved[:, 0] + 1) % V  # nor is the first token predicted
    np.testing.assert_array_equal(lp.from_hidden(h, w, tokens), lp.from_hidden(h, w, moved))


def test_extreme_logits_stay_finite():
    hidden, unembedding, tokens = problem(9)
    h, w = jnp.float32(1e4 * hidden), jnp.float32(unembedding)

    def f(h, w):
        logprobs, entropy = lp.from_hidden_with_entropy(h, w, tokens, block_size=8)
        return (logprobs + entropy).sum(), entropy

    (value, entropy), grads = jax.value_and_grad(f, (0, 1), has_aux=True)(h, w)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)
    want = numpy_entropy(numpy_logits(np.asarray(h), np.asarray(w)))
    np.testing.assert_allclose(entropy, want, atol=2e-2)  # logits near 1e5 are known to 1e-2
    assert (entropy >= 0).all()


def test_one_token_vocabulary():
    h, w, tokens = jnp.ones((2, 3, 4)), jnp.ones((4, 1)), np.zeros((2, 3), np.int32)
    logprobs, entropy = lp.from_hidden_with_entropy(h, w, tokens)
    assert not np.any(logprobs) and not np.any(entropy)
    assert not np.any(jax.grad(lambda h: lp.from_hidden(h, w, tokens).sum())(h))


def test_tied_embedding_gradient_flows_through_both_uses():
    with jax.enable_x64(True):
        rng = np.random.default_rng(10)
        table = jnp.asarray(rng.normal(size=(V, H)))
        tokens = jnp.asarray(rng.integers(0, V, size=(B, T)))

        def loss(f):
            return jax.jit(jax.grad(lambda e: f(jnp.tanh(e[tokens]), e).sum()))(table)

        want = loss(lambda h, e: naive(h, e.T, tokens)[0])
        for f in (
            lambda h, e: lp.from_hidden(h, e, tokens, vocab_axis=0, block_size=8),
            lambda h, e: lp.from_hidden(h, e.T, tokens, block_size=8),
        ):
            np.testing.assert_allclose(loss(f), want, atol=1e-12)


def test_temperature_gets_no_gradient():
    hidden, unembedding, tokens = problem(11)
    h, w = jnp.float32(hidden), jnp.float32(unembedding)
    for f in (
        lambda t: lp.from_hidden(h, w, tokens, temperature=t).sum(),
        lambda t: lp.from_logits(h @ w, tokens, temperature=t).sum(),
        lambda t: lp.entropy_from_logits(h @ w, temperature=t).sum(),
    ):
        assert jax.jit(jax.grad(f))(0.8) == 0
        assert abs(f(jnp.float32(0.8)) - f(1.0)) > 1e-2


def test_jit_vmap_and_remat_equal_the_plain_call():
    hidden, unembedding, tokens = problem(12)
    h, w = jnp.float32(hidden), jnp.float32(unembedding)
    f = functools.partial(lp.from_hidden, block_size=8)
    want = f(h, w, tokens)
    np.testing.assert_allclose(jax.jit(f)(h, w, tokens), want, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda h, w: f(h, w, tokens))(h, w), want, atol=1e-6)

    stack_h, stack_w = jnp.stack([h, 2 * h]), jnp.stack([w, -w])
    stack_y = jnp.stack([jnp.asarray(tokens), (jnp.asarray(tokens) + 1) % V])
    got = jax.vmap(f)(stack_h, stack_w, stack_y)
    for i in range(2):
        np.testing.assert_allclose(got[i], f(stack_h[i], stack_w[i], stack_y[i]), atol=1e-6)

    # Per-sample gradients: one row at a time, the unembedding shared.
    def row_loss(w, h, y):
        return f(h[None], w, y[None]).sum()

    each = jax.jit(jax.vmap(jax.grad(row_loss), (None, 0, 0)))(w, h, jnp.asarray(tokens))
    total = jax.grad(lambda w: f(h, w, tokens).sum())(w)
    np.testing.assert_allclose(each.sum(0), total, atol=1e-5)
    remat = jax.grad(jax.checkpoint(lambda w: f(h, w, tokens).sum()))(w)
    np.testing.assert_allclose(remat, total, atol=1e-6)


def test_out_of_range_tokens():
    hidden, unembedding, tokens = problem(13)
    h, w = jnp.float32(hidden), jnp.float32(unembedding)
    for bad in (-1, V):
        spoiled = tokens.copy()
        spoiled[1, 2] = bad
        with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 37\)"):
            lp.from_hidden(h, w, spoiled)
        with pytest.raises(ValueError, match=r"tokens: expected ids in \[0, 37\)"):
            lp.from_logits(h @ w, spoiled)
        # Traced ids cannot be checked: NaN marks them, and no gradient comes from them.
        for f in (
            lambda h, y: lp.from_hidden(h, w, y, block_size=8),
            lambda h, y: lp.from_logits(h @ w, y),
        ):
            got, pull = jax.vjp(jax.jit(f), h, jnp.asarray(spoiled))
            bad_at = np.zeros((B, T), bool)
            bad_at[1, 2] = True
            np.testing.assert_array_equal(np.isnan(got), bad_at)
            np.testing.assert_allclose(got[~bad_at], f(h, tokens)[~bad_at], atol=1e-6)
            dh = pull(jnp.ones_like(got))[0]
            assert np.isfinite(dh).all() and not np.any(dh[1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((B, T), np.float32)}, "hidden: expected rank 3"),
        ({"hidden": np.zeros((B, T, H), np.int32)}, "hidden: expected a floating dtype"),
        ({"unembedding": np.zeros((H + 1, V), np.float32)}, "unembedding: expected 7 features"),
        ({"unembedding": np.zeros((V, H), np.float32)}, "unembedding: expected 7 features"),
        ({"vocab_axis": 0}, "unembedding: expected 7 features"),
        ({"vocab_axis": 2}, "vocab_axis: expected one of"),
        ({"unembedding": np.zeros((H, 0), np.float32)}, "vocabulary: expected at least one"),
        ({"tokens": np.zeros((B, T + 1), np.int32)}, "tokens: expected shape"),
        ({"tokens": np.zeros((B, T), np.float32)}, "tokens: expected an integer dtype"),
        ({"tokens": np.zeros((B,), np.int32)}, "tokens: expected rank 2"),
        ({"temperature": 0.0}, "temperature: expected a number"),
        ({"temperature": math.nan}, "temperature: expected a number"),
        ({"temperature": np.ones((B,))}, "temperature: expected rank 0"),
        ({"soft_cap": 0.0}, "soft_cap: expected a number"),
        ({"soft_cap": math.inf}, "soft_cap: expected a number"),
        ({"block_size": 0}, "block_size: expected at least 1"),
    ],
)
def test_from_hidden_names_the_bad_argument(change, message):
    given_ = {
        "hidden": np.zeros((B, T, H), np.float32),
        "unembedding": np.zeros((H, V), np.float32),
        "tokens": np.zeros((B, T), np.int32),
    } | change
    arrays = [given_.pop(k) for k in ("hidden", "unembedding", "tokens")]
    for f in (lp.from_hidden, lp.from_hidden_with_entropy):
        with pytest.raises(ValueError, match=message):
            f(*arrays, **given_)


def test_from_logits_names_the_bad_argument():
    logits, tokens = np.zeros((B, T, V), np.float32), np.zeros((B, T), np.int32)
    for args, message in (
        ((logits[0], tokens), "logits: expected rank 3"),
        ((logits, tokens[:, 1:]), "tokens: expected shape"),
        ((logits.astype(int), tokens), "logits: expected a floating dtype"),
        ((logits, tokens.astype(bool)), "tokens: expected an integer dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            lp.from_logits(*args)
    with pytest.raises(ValueError, match="temperature"):
        lp.from_logits(logits, tokens, temperature=-1.0)


# -------------------------------------------------------------------- the compiled programs


def compiled(f, shape, dtype, *, vocab_axis=1):
    b, t, h, v = shape
    table = (h, v) if vocab_axis == 1 else (v, h)
    return (
        jax.jit(jax.value_and_grad(lambda *a: f(*a).sum(), (0, 1)))
        .lower(
            jax.ShapeDtypeStruct((b, t, h), dtype),
            jax.ShapeDtypeStruct(table, dtype),
            jax.ShapeDtypeStruct((b, t), jnp.int32),
        )
        .compile()
    )


def shapes_in(program) -> set[tuple[int, ...]]:
    found = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]*)\]", program.as_text())
    return {tuple(map(int, s.split(","))) for s in found if s}


def test_memory_is_a_fifth_of_naive_at_most():
    shape = (2, 256, 256, 65536)
    ours = compiled(lp.from_hidden, shape, jnp.float32)
    theirs = compiled(lambda *a: naive(*a)[0], shape, jnp.float32)
    ours, theirs = (c.memory_analysis().temp_size_in_bytes for c in (ours, theirs))
    assert 0 < ours <= theirs / 5


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_no_full_logits_in_the_program_at_a_large_vocabulary(vocab_axis, entropy):
    b, t, h, v = shape = (2, 256, 64, 151936)
    block = 4096  # the default for this many tokens

    def f(*args):
        if entropy:
            return sum(lp.from_hidden_with_entropy(*args, vocab_axis=vocab_axis))
        return lp.from_hidden(*args, vocab_axis=vocab_axis)

    program = compiled(f, shape, jnp.bfloat16, vocab_axis=vocab_axis)
    shapes = shapes_in(program)
    table = (h, v) if vocab_axis == 1 else (v, h)
    assert table in shapes  # the parser sees the program's arrays
    large = {s for s in shapes if math.prod(s) > b * t * block}
    assert large == {table}  # no logits above one block, no transposed table
    # Temporaries: a few blocks in float32, at most one bfloat16 copy of the table, none in float32.
    assert program.memory_analysis().temp_size_in_bytes < 4 * (4 * b * t * block) + 2 * h * v
    assert not re.search(rf"f32\[{table[0]},{table[1]}\]", program.as_text())


def test_the_check_above_finds_full_logits_in_the_naive_program():
    program = compiled(lambda *a: naive(*a)[0], (2, 256, 64, 151936), jnp.bfloat16)
    assert any(math.prod(s) >= 2 * 255 * 151936 for s in shapes_in(program))


SHARDED = """
    import functools, json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from pgjax import logprobs as lp

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    h, w = rng.normal(size=(4, 6, 8)), rng.normal(size=(8, 64))
    y, g = rng.integers(0, 64, size=(4, 6)), rng.normal(size=(4, 6))

    def naive(h, w):
        lp_ = jax.nn.log_softmax(jnp.einsum("bth,hv->btv", h, w)[:, :-1])
        chosen = jnp.take_along_axis(lp_, y[:, 1:, None], -1)[..., 0]
        return (chosen * g[:, 1:]).sum() - (jnp.exp(lp_) * lp_ * g[:, 1:, None]).sum()

    def ours(h, w, y, g):
        a, b = lp.from_hidden_with_entropy(h, w, y, block_size=24)
        return ((a + b) * g).sum()

    value, (dh, dw) = jax.value_and_grad(naive, (0, 1))(h, w)

    checked = []

    def check(name, got):
        v, (a, b) = got
        for x, z in ((v, value), (a, dh), (b, dw)):
            np.testing.assert_allclose(x, z, atol=1e-12, err_msg=name)
        checked.append(name)

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    f = jax.jit(jax.value_and_grad(ours, (0, 1)))
    for name, hs, ws, ys in (
        ("batch", ("data",), (), ("data",)),
        ("vocabulary", (), (None, "tensor"), ()),
        ("batch and vocabulary", ("data",), (None, "tensor"), ("data",)),
        ("features", (None, None, "tensor"), ("tensor",), ()),
        ("sequence", ("data", "tensor"), (), ("data",)),
    ):
        if name == "sequence":  # six positions do not divide by four
            hs = ("data",)
        check(name, f(put(h, *hs), put(w, *ws), put(y, *ys), put(g, *ys)))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P("data"), P("data")),
        out_specs=P(),
    )
    def mapped(h, w, y, g):
        return jax.lax.psum(ours(h, w, y, g), "data")

    check("shard_map", jax.value_and_grad(mapped, (0, 1))(h, w, jnp.asarray(y), jnp.asarray(g)))
    print(json.dumps(checked))
"""


def test_sharded_inputs_give_the_same_values_and_gradients():
    assert len(devices.run(SHARDED)) == 6


# ----------------------------------------------------------------------------------- entropy


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 40]), st.floats(0.01, 60.0))
def test_entropy_equals_scipy(seed, size, scale):
    rng = np.random.default_rng(seed)
    logits = np.float32(scale * rng.normal(size=(3, size)))
    logits[rng.random(logits.shape) < 0.2] = -np.inf
    logits[:, 0] = 0.0  # at least one token is possible
    want = scipy.special.entr(scipy.special.softmax(np.float64(logits), axis=-1)).sum(-1)
    got = lp.entropy_from_logits(logits)
    np.testing.assert_allclose(got, want, atol=3e-6, rtol=3e-6)
    assert (got >= 0).all() and (got <= math.log(size) * (1 + 1e-6)).all()
    shift = lp.entropy_from_logits(logits + np.float32(0.5))
    np.testing.assert_allclose(shift, want, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(lp.entropy_from_logits(logits[:, ::-1]), got, atol=3e-6)


def test_entropy_extremes():
    inf = np.inf
    rows = np.float32(
        [[0, 0, 0, 0], [-inf, 0, -inf, -inf], [-inf] * 4, [1e30, 0, 0, 0], [0, -inf, 0, -inf]]
    )
    want = np.array([math.log(4), 0, 0, 0, math.log(2)])
    np.testing.assert_allclose(lp.entropy_from_logits(rows), want, rtol=1e-6)
    d = jax.jit(jax.grad(lambda x: lp.entropy_from_logits(x).sum()))(rows)
    assert np.isfinite(d).all() and not np.any(d[np.isinf(rows)])
    for bad in (np.float32(0.0), np.zeros((3, 0), np.float32)):
        with pytest.raises(ValueError, match="logits: expected shape"):
            lp.entropy_from_logits(bad)


def test_entropy_gradient_is_the_closed_form():
    x = np.random.default_rng(0).normal(size=(4, 9)) * 3
    with jax.enable_x64(True):
        d = jax.grad(lambda x: lp.entropy_from_logits(x, temperature=0.5).sum())(jnp.asarray(x))
    log_p = scipy.special.log_softmax(x / 0.5, axis=-1)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1, keepdims=True)
    np.testing.assert_allclose(d, -p * (log_p + entropy) / 0.5, atol=1e-13)


def test_large_logits_keep_the_entropys_digits():
    # Two tokens one nat apart at 1e4 where float32 has steps of 1e-3: exact inputs, exact answer.
    want = scipy.special.entr(scipy.special.softmax([1.0, 0.0])).sum()
    np.testing.assert_allclose(lp.entropy_from_logits(np.float32([1e4 + 1, 1e4])), want, rtol=1e-6)


# ---------------------------------------------------------------------------------- sequences


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 6]))
def test_sequence_sums_and_means(seed, padding):
    rng = np.random.default_rng(seed)
    x, mask = np.float32(rng.normal(size=(4, 6))), rng.random((4, 6)) < 0.5
    mask[0] = False
    junk = np.where(mask, x, rng.choice([np.nan, np.inf, -np.inf, 5.0], size=x.shape))
    total, mean = np.zeros(4), np.zeros(4)
    for b in range(4):
        chosen = [float(x[b, t]) for t in range(6) if mask[b, t]]
        total[b] = sum(chosen)
        mean[b] = sum(chosen) / len(chosen) if chosen else 0.0
    wide = np.pad(junk, ((0, 0), (0, padding)), constant_values=np.nan)
    wide_mask = np.pad(mask, ((0, 0), (0, padding)))
    np.testing.assert_allclose(lp.sequence(wide, wide_mask), total, atol=1e-5)
    np.testing.assert_allclose(lp.sequence_mean(wide, wide_mask), mean, atol=1e-5)
    np.testing.assert_array_equal(lp.where_mask(junk, mask), np.where(mask, x, 0))
    d = jax.grad(lambda x: lp.sequence_mean(x, mask).sum())(jnp.asarray(junk))
    np.testing.assert_allclose(d, mask / np.maximum(mask.sum(-1, keepdims=True), 1), rtol=1e-6)


def test_sequence_is_float32_whatever_comes_in():
    x = jnp.full((1, 1000), -0.1, jnp.bfloat16)
    got = lp.sequence(x, np.ones((1, 1000), bool))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1000 * float(x[0, 0]), rtol=1e-5)


def test_shift_right_moves_to_the_tokens_index():
    x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(lp.shift_right(x), [[0, 0, 1], [0, 3, 4]])
    assert lp.shift_right(jnp.zeros((2, 0))).shape == (2, 0)
    assert lp.shift_right(jnp.ones((2, 1), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("f", [lp.sequence, lp.sequence_mean, lp.where_mask])
def test_sequence_names_the_bad_argument(f):
    x, mask = np.zeros((2, 3), np.float32), np.ones((2, 3), bool)
    with pytest.raises(ValueError, match="mask: expected shape"):
        f(x, mask[:, :2])
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        f(x, mask.astype(np.float32))
    with pytest.raises(ValueError, match="expected rank 2"):
        f(x[0], mask[0])


# ------------------------------------------------------------------------------ divergences

ESTIMATORS = (lp.kl_k1, lp.kl_k2, lp.kl_k3, lp.kl_k3_straight_through)


def categorical_pair(seed: int = 0, size: int = 6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=size), rng.normal(size=size)


def enumerated(estimator, x, y):
    """Σ_v π_v estimator(v), and Σ_v π_v ∂estimator(v)/∂logits with the token held fixed."""
    log_q = jnp.asarray(scipy.special.log_softmax(y))
    p = scipy.special.softmax(x)
    values = estimator(jax.nn.log_softmax(jnp.asarray(x)), log_q)
    rows = jax.jit(jax.jacobian(lambda x: estimator(jax.nn.log_softmax(x), log_q)))(x)
    return float(p @ np.asarray(values)), p @ np.asarray(rows)


def kl(a, b):
    return jnp.sum(jnp.exp(a) * (a - b))


def exact_gradients(x, y):
    log_q = jnp.asarray(scipy.special.log_softmax(y))
    reverse = jax.jit(jax.grad(lambda x: kl(jax.nn.log_softmax(x), log_q)))(x)
    forward = jax.jit(jax.grad(lambda x: kl(log_q, jax.nn.log_softmax(x))))(x)
    return reverse, forward


@pytest.mark.parametrize("seed", range(2))
def test_estimators_values_and_gradients_by_enumeration(seed):
    with jax.enable_x64(True):
        x, y = categorical_pair(seed)
        log_p, log_q = scipy.special.log_softmax(x), scipy.special.log_softmax(y)
        exact = float(np.sum(np.exp(log_p) * (log_p - log_q)))
        reverse, forward = exact_gradients(x, y)
        assert np.abs(reverse - forward).max() > 1e-2  # the two directions differ here

        value, gradient = enumerated(lp.kl_k1, x, y)
        assert abs(value - exact) < 1e-14
        np.testing.assert_allclose(gradient, 0, atol=1e-15)

        value, gradient = enumerated(lp.kl_k2, x, y)
        half_square = 0.5 * np.sum(np.exp(log_p) * (log_p - log_q) ** 2)
        assert abs(value - half_square) < 1e-14
        np.testing.assert_allclose(gradient, reverse, atol=1e-14)

        value, gradient = enumerated(lp.kl_k3, x, y)
        assert abs(value - exact) < 1e-14
        np.testing.assert_allclose(gradient, forward, atol=1e-14)

        value, gradient = enumerated(lp.kl_k3_straight_through, x, y)
        assert abs(value - exact) < 1e-14
        np.testing.assert_allclose(gradient, reverse, atol=1e-14)


def test_k1_in_the_reward_gives_the_gradient_of_the_reverse_kl():
    with jax.enable_x64(True):
        x, y = categorical_pair(3)
        reverse, _ = exact_gradients(x, y)
        log_p, log_q = scipy.special.log_softmax(x), scipy.special.log_softmax(y)
        cost = np.asarray(lp.kl_k1(jnp.asarray(log_p), jnp.asarray(log_q)))
        score = np.eye(len(x)) - np.exp(log_p)  # ∂ log π_v / ∂ logits, row v
        np.testing.assert_allclose((np.exp(log_p) * cost) @ score, reverse, atol=1e-14)


def test_k2_is_right_to_second_order_only():
    with jax.enable_x64(True):
        x, y = categorical_pair(4)
        errors = []
        for step in (1e-2, 5e-3):
            value, _ = enumerated(lp.kl_k2, y + step * (x - y), y)
            errors.append(
                value - float(lp.kl_categorical(*map(jnp.asarray, (y + step * (x - y), y))))
            )
        assert 7 < errors[0] / errors[1] < 9  # a third-order error falls eightfold


@settings(max_examples=25, deadline=None)
@given(st.floats(-200, 0), st.floats(-200, 0))
def test_estimators_equal_numpy_with_the_documented_clamp(a, b):
    d = np.clip(np.float64(np.float32(a) - np.float32(b)), -20, 20)
    args = jnp.float32(a), jnp.float32(b)
    for f, want in (
        (lp.kl_k1, d),
        (lp.kl_k2, d * d / 2),
        (lp.kl_k3, np.expm1(-d) + d),
        (lp.kl_k3_straight_through, np.expm1(-d) + d),
    ):
        np.testing.assert_allclose(f(*args), want, rtol=2e-5, atol=1e-6)
    assert lp.kl_k3(*args) >= 0
    # The gradient is the one at the bound: never released.
    for f, want in (
        (lp.kl_k1, 1.0),
        (lp.kl_k2, d),
        (lp.kl_k3, -np.expm1(-d)),
        (lp.kl_k3_straight_through, d),
    ):
        np.testing.assert_allclose(jax.grad(f)(*args), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("f", ESTIMATORS)
def test_estimators_are_finite_for_any_pair(f):
    edge = np.float32([0.0, -1e-6, -50.0, -3e38, -np.inf])
    a, b = map(jnp.asarray, np.meshgrid(edge, edge))
    value, pull = jax.vjp(f, a, b)
    assert np.isfinite(value).all() and value.dtype == jnp.float32
    assert all(np.isfinite(g).all() for g in pull(jnp.ones_like(value)))
    assert not np.any(jnp.diagonal(value))  # -inf in both is no difference
    np.testing.assert_array_equal(jax.vmap(f)(a, b), value)
    np.testing.assert_allclose(jax.jit(f)(a, b), value, rtol=1e-6)


@pytest.mark.parametrize("f", ESTIMATORS)
def test_estimators_name_the_bad_argument(f):
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="reference_logprobs: expected shape"):
        f(x, x[:1])
    with pytest.raises(ValueError, match="logprobs: expected a floating dtype"):
        f(x.astype(int), x)
    for clamp in (0.0, -1.0, 81.0, math.nan):
        with pytest.raises(ValueError, match="clamp: expected a number"):
            f(x, x, clamp=clamp)
    assert f(x - 50, x, clamp=3.0).max() == f(x - 3, x).max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 20]), st.floats(0.01, 20.0))
def test_kl_categorical_equals_numpy(seed, size, scale):
    rng = np.random.default_rng(seed)
    x, y = np.float32(scale * rng.normal(size=(2, 3, size)))
    log_p, log_q = (scipy.special.log_softmax(np.float64(a), axis=-1) for a in (x, y))
    want = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    got = lp.kl_categorical(x, y)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lp.kl_categorical(x, x + np.float32(1)), 0, atol=1e-6)


def test_kl_categorical_gradients_in_both_arguments():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, y = map(jnp.asarray, rng.normal(size=(2, 4, 9)))

        def exact(x, y):
            a, b = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
            return kl(a, b)

        want = jax.grad(exact, (0, 1))(x, y)
        got = jax.grad(lambda x, y: lp.kl_categorical(x, y).sum(), (0, 1))(x, y)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-14)


def test_kl_categorical_of_close_policies_keeps_its_digits():
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=1000))
    y = x + np.float32(1e-3 * rng.normal(size=1000))
    log_p, log_q = (scipy.special.log_softmax(np.float64(a)) for a in (x, y))
    want = np.sum(np.exp(log_p) * (log_p - log_q))
    assert want < 1e-6
    np.testing.assert_allclose(lp.kl_categorical(x, y), want, rtol=0.1)


def test_kl_categorical_support():
    inf = np.inf
    x = np.float32([[0, 0, -inf], [0, 0, 0], [-inf] * 3, [0, -inf, -inf], [0, 0, -inf]])
    y = np.float32([[0, 0, 0], [0, 0, -inf], [0, 0, 0], [-inf] * 3, [0, 0, -inf]])
    want = [math.log(1.5), inf, 0.0, inf, 0.0]
    np.testing.assert_allclose(lp.kl_categorical(x, y), want, atol=1e-6)
    d = jax.jit(jax.grad(lambda *a: lp.kl_categorical(*a).sum(), (0, 1)))(x, y)
    assert all(np.isfinite(g).all() for g in d)
    infinite = np.isinf(want)  # there the gradient is defined as zero
    assert not np.any(d[0][infinite]) and not np.any(d[1][infinite])
    np.testing.assert_allclose(d[1][0], [-1 / 6, -1 / 6, 1 / 3], atol=1e-6)  # q - p
    for bad in (np.float32(0), np.zeros((2, 0), np.float32)):
        with pytest.raises(ValueError, match="logits: expected shape"):
            lp.kl_categorical(bad, bad)
    with pytest.raises(ValueError, match="reference_logits: expected shape"):
        lp.kl_categorical(x, y[:, :2])
