"""Rewards against closed forms, loops in float64, and their laws."""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import rewards

# ------------------------------------------------------------------ numeric


def _numeric(pred, ref, ok=True, **options):
    return float(
        rewards.numeric_reward(jnp.asarray(pred), jnp.asarray(ref), jnp.asarray(ok), **options)
    )


@pytest.mark.parametrize(
    ("pred", "ref", "wanted"),
    [
        (10.0, 10.0, 1.0),
        (0.0, 0.0, 1.0),
        (9.99, 10.0, 0.9945),
        (11.0, 10.0, 0.45),
        (5.0, 0.0, 0.0),
        (0.0, 10.0, 0.0),
        (math.nan, 10.0, 0.0),
        (math.inf, 10.0, 0.0),
        (-math.inf, 10.0, 0.0),
        (10.0, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (3e38, -3e38, 0.0),
    ],
)
def test_numeric_reward_values(pred, ref, wanted):
    assert _numeric(pred, ref) == pytest.approx(wanted, abs=2e-6)
    assert _numeric(-pred, -ref) == _numeric(pred, ref)
    assert _numeric(pred, ref, ok=False) == 0.0


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
@settings(max_examples=80, deadline=None)
def test_numeric_reward_formula(a, b):
    d = abs(a - b)
    wanted = 1 - 0.5 * min(d, 1) - 0.5 * min(d / (abs(b) + 1e-6), 1)
    got = _numeric(np.float32(a), np.float32(b))
    assert 0 <= got <= 1
    # The relative part divides by numbers down to 1e-6, where float32 rounds to 1e-7 relative.
    assert got == pytest.approx(wanted, abs=1e-5)


def test_numeric_reward_falls_with_distance():
    for ref in (-7.0, 0.0, 0.3, 12.0):
        for sign in (-1, 1):
            pred = ref + sign * jnp.linspace(0, 20, 400)
            got = rewards.numeric_reward(pred, jnp.full(400, ref), jnp.ones(400, bool))
            assert (np.diff(got) <= 1e-6).all()
            assert float(got[0]) == 1.0


def test_integer_answers_score_one_or_at_most_a_half():
    pred = jnp.arange(-30, 30)
    got = np.asarray(rewards.numeric_reward(pred, jnp.full(60, 7), jnp.ones(60, bool)))
    assert got[37] == 1.0
    others = np.delete(got, 37)
    assert (others < 0.5).all() and (others >= 0).all()


def test_neighbouring_large_integers_are_told_apart():
    a, b = jnp.array([2**24 + 1, 999_999_999]), jnp.array([2**24, 999_999_998])
    got = rewards.numeric_reward(a, b, jnp.ones(2, bool))
    np.testing.assert_allclose(got, [0.5, 0.5], atol=1e-6)
    np.testing.assert_array_equal(rewards.exact_reward(a, b, jnp.ones(2, bool)), [0, 0])
    np.testing.assert_array_equal(rewards.exact_reward(a, a, jnp.ones(2, bool)), [1, 1])


def test_numeric_reward_dtypes_and_epsilon():
    ok = jnp.ones(2, bool)
    half = rewards.numeric_reward(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16), ok)
    assert half.dtype == jnp.float32
    assert _numeric(0.5, 0.0, epsilon=1.0) == pytest.approx(0.5)
    assert _numeric(0.5, 0.0, epsilon=1e-6) == pytest.approx(0.25)
    with jax.enable_x64(True):
        got = rewards.numeric_reward(jnp.array([9.99]), jnp.array([10.0]), jnp.array([True]))
        assert got.dtype == jnp.float64
        assert float(got[0]) == pytest.approx(1 - 0.005 - 0.5 * 0.01 / (10 + 1e-6), abs=1e-12)


def test_exact_reward():
    pred, ref = jnp.array([3, 4, 0, 5]), jnp.array([3, 5, 0, 5])
    ok = jnp.array([True, True, False, True])
    got = jax.jit(rewards.exact_reward)(pred, ref, ok)
    np.testing.assert_array_equal(got, [1, 0, 0, 1])
    assert got.dtype == jnp.float32
    nan = jnp.array([jnp.nan])
    assert float(rewards.exact_reward(nan, nan, jnp.array([True]))[0]) == 0.0
    grouped = rewards.exact_reward(
        jnp.array([[1, 2], [2, 2]]), jnp.array([[1], [2]]), ok.reshape(2, 2)
    )
    np.testing.assert_array_equal(grouped, [[1, 0], [0, 1]])


@pytest.mark.parametrize("function", [rewards.exact_reward, rewards.numeric_reward])
def test_numeric_bad_input(function):
    x, ok = jnp.ones(3), jnp.ones(3, bool)
    with pytest.raises(ValueError, match="ok: expected dtype bool"):
        function(x, x, x)
    with pytest.raises(ValueError, match="ok: expected shape"):
        function(x, x, ok[:2])
    for bad in (jnp.ones(2), jnp.ones((3, 3))):
        with pytest.raises(ValueError, match="ref: expected a shape that broadcasts"):
            function(x, bad, ok)
    with pytest.raises(ValueError, match="epsilon"):
        rewards.numeric_reward(x, x, ok, epsilon=0.0)


# ------------------------------------------------------------------ spurious


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0])
def test_random_reward_has_its_mean(gamma):
    n = 40_000
    got = np.asarray(rewards.random_reward(jax.random.key(3), n, gamma=gamma))
    assert set(np.unique(got)) <= {0.0, 1.0} and got.dtype == np.float32
    assert abs(got.mean() - gamma) <= 4 * math.sqrt(gamma * (1 - gamma) / n)


def test_random_reward_depends_on_the_key_only():
    def draw(key):
        return np.asarray(rewards.random_reward(jax.random.key(key), 64, gamma=0.5))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
    assert rewards.random_reward(jax.random.key(0), 0, gamma=0.5).shape == (0,)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_random_reward_bad_input(gamma):
    with pytest.raises(ValueError, match="gamma: expected a number in"):
        rewards.random_reward(jax.random.key(0), 3, gamma=gamma)


def test_random_reward_bad_count():
    with pytest.raises(ValueError, match="n: expected"):
        rewards.random_reward(jax.random.key(0), -1, gamma=0.5)


@given(st.lists(st.floats(0, 1, width=32), min_size=9, max_size=9))
@settings(max_examples=40, deadline=None)
def test_inverting_twice_gives_the_reward_back(values):
    r = jnp.asarray(values, jnp.float32)
    once = rewards.inverted_reward(r)
    np.testing.assert_allclose(once, 1 - np.asarray(values, np.float64), atol=1e-7)
    np.testing.assert_allclose(rewards.inverted_reward(once), r, atol=1e-7)


def test_inverting_right_and_wrong_is_exact():
    r = jnp.array([0.0, 1.0, 0.5])
    np.testing.assert_array_equal(rewards.inverted_reward(r), [1, 0, 0.5])
    with pytest.raises(ValueError, match="rewards: expected a floating"):
        rewards.inverted_reward(jnp.array([0, 1]))


def _groups(size):
    sample = st.tuples(st.integers(-2, 3), st.booleans())
    group = st.tuples(st.lists(sample, min_size=size, max_size=size), st.integers(-2, 3))
    return st.lists(group, min_size=3, max_size=3)


@given(st.sampled_from([1, 6]).flatmap(_groups))
@settings(max_examples=80, deadline=None)
def test_majority_incorrect_against_counting(groups):
    pred = jnp.array([[a for a, _ in samples] for samples, _ in groups])
    ok = jnp.array([[valid for _, valid in samples] for samples, _ in groups])
    ref = jnp.array([r for _, r in groups])
    got = np.asarray(rewards.majority_incorrect_reward(pred, ok, ref))
    label, exists = rewards.majority_incorrect_label(pred, ok, ref)
    assert not got[np.asarray(pred) == np.asarray(ref)[:, None]].any()
    for row, (samples, right) in enumerate(groups):
        votes = collections.Counter(a for a, valid in samples if valid and a != right)
        assert bool(exists[row]) == bool(votes)
        if votes:
            top = max(votes.values())
            wrong = min(a for a, n in votes.items() if n == top)
            assert int(label[row]) == wrong
            wanted = [float(valid and a == wrong) for a, valid in samples]
        else:
            assert int(label[row]) == 0
            wanted = [0.0] * len(samples)
        np.testing.assert_array_equal(got[row], wanted)


def test_majority_incorrect_under_jit_vmap_and_bad_input():
    pred = jnp.array([[1, 1, 2, 3], [3, 3, 3, 3], [5, 5, 4, 4]])
    ok = jnp.ones((3, 4), bool)
    ref = jnp.array([1, 3, 9])
    wanted = [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(jax.jit(rewards.majority_incorrect_reward)(pred, ok, ref), wanted)
    stacked = jax.vmap(rewards.majority_incorrect_reward)(pred[None], ok[None], ref[None])
    np.testing.assert_array_equal(stacked[0], wanted)
    with pytest.raises(ValueError, match="pred: expected rank 2"):
        rewards.majority_incorrect_reward(pred[0], ok[0], ref)
    with pytest.raises(ValueError, match="ref: expected shape"):
        rewards.majority_incorrect_reward(pred, ok, ref[:2])
    with pytest.raises(ValueError, match="pred: expected an integer"):
        rewards.majority_incorrect_reward(pred * 1.0, ok, ref)


# ------------------------------------------------------------------ shaping


@given(st.integers(1, 40), st.integers(0, 40), st.lists(st.integers(0, 90), min_size=9, max_size=9))
@settings(max_examples=60, deadline=None)
def test_soft_overlong_penalty_formula(limit, cache, lengths):
    cache = min(cache, limit)

    def one(length):
        if length <= limit - cache:
            return 0.0
        return -1.0 if length > limit else (limit - cache - length) / cache

    got = rewards.soft_overlong_penalty(jnp.array(lengths), max_length=limit, cache_length=cache)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [one(n) for n in lengths], atol=1e-6)


def test_soft_overlong_penalty_at_its_borders():
    lengths = jnp.array([16384, 16385, 18432, 20480, 20481, 10**9])
    got = rewards.soft_overlong_penalty(lengths, max_length=20480, cache_length=4096)
    np.testing.assert_allclose(got, [0, -1 / 4096, -0.5, -1, -1, -1], atol=1e-7)
    step = rewards.soft_overlong_penalty(jnp.array([5, 6]), max_length=5, cache_length=0)
    np.testing.assert_array_equal(step, [0, -1])


@pytest.mark.parametrize(
    ("limit", "cache", "name"),
    [(10, 11, "cache_length"), (10, -1, "cache_length"), (0, 0, "max_length")],
)
def test_soft_overlong_penalty_bad_input(limit, cache, name):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        rewards.soft_overlong_penalty(jnp.array([1]), max_length=limit, cache_length=cache)
    with pytest.raises(ValueError, match="lengths: expected an integer"):
        rewards.soft_overlong_penalty(jnp.array([1.0]), max_length=5, cache_length=2)


# ------------------------------------------------------------------ calling verifiers


def test_call_verifier_passes_pairs_in_order():
    def verifier(completion, example):
        return completion == str(example["answer"])

    got, failures = rewards.call_verifier(
        verifier, ["3", "4", "5"], [{"answer": n} for n in (3, 3, 5)]
    )
    np.testing.assert_array_equal(got, [1, 0, 1])
    assert got.dtype == np.float32 and failures == []
    empty, none = rewards.call_verifier(verifier, [], [])
    assert empty.shape == (0,) and none == []


def test_call_verifier_records_exceptions_and_goes_on():
    def verifier(completion, example):
        if completion == "inf":
            return math.inf
        return 1 / int(completion)

    got, failures = rewards.call_verifier(verifier, ["1", "0", "x", "inf", "2"], [{}] * 5)
    np.testing.assert_array_equal(got, [1, np.nan, np.nan, np.nan, 0.5])
    assert [f.index for f in failures] == [1, 2, 3]
    assert [type(f.error) for f in failures] == [ZeroDivisionError, ValueError, ValueError]


@pytest.mark.parametrize("good", [1, True, 1.0, np.float32(1), np.int64(1), np.bool_(True)])
def test_call_verifier_takes_any_real_scalar(good):
    got, _ = rewards.call_verifier(lambda c, e: good, ["a"], [{}])
    np.testing.assert_array_equal(got, [1])
    got, _ = rewards.call_verifier(lambda c, e: jnp.asarray(good), ["a"], [{}])
    np.testing.assert_array_equal(got, [1])


@pytest.mark.parametrize("bad", [None, "1", [1.0], np.ones(1), np.ones((2, 1)), 1j, {"reward": 1}])
def test_call_verifier_rejects_what_is_no_number(bad):
    with pytest.raises(ValueError, match="verifier: expected one number for completion 1"):
        rewards.call_verifier(lambda c, e: 0.0 if c == "a" else bad, ["a", "b"], [{}, {}])


def test_call_verifier_needs_an_example_each_and_lets_interrupts_through():
    with pytest.raises(ValueError, match="examples: expected one for each of 2 completions, got 1"):
        rewards.call_verifier(lambda c, e: 1.0, ["a", "b"], [{}])

    def interrupted(completion, example):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.call_verifier(interrupted, ["a"], [{}])
