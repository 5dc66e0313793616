"""COPO's entropy, factor, weight and advantage across prompts, against sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.advantages import consistency


@functools.partial(jax.jit, static_argnames=("num_groups", "base"))
def entropy(answers, ids, where=None, *, num_groups=1, base=2.0):
    return consistency.answer_entropy(answers, ids, num_groups=num_groups, base=base, where=where)


@pytest.mark.parametrize(
    ("answers", "want"),
    [([7, 7, -3, -3], 1.0), ([5, 5, 5, 5], 0.0), ([1, 2, 3, 4], 2.0), ([9, 9, 9, 1], 0.8112781)],
)
def test_entropy_of_known_answers(answers, want):
    found = entropy(np.array(answers), np.zeros(4, int))[0]
    assert float(found) == pytest.approx(want, abs=1e-6)
    if want == 0:
        assert float(found) == 0


def test_entropy_by_group_for_any_order_and_size():
    rng = np.random.default_rng(0)
    ids, answers = rng.integers(0, 5, 40), rng.integers(-2, 3, 40) * 1_000_003
    ids[ids == 3] = 0  # leaves one group empty
    where = rng.random(40) < 0.8
    want = np.zeros(6)
    for g in np.unique(ids):
        _, counts = np.unique(answers[(ids == g) & where], return_counts=True)
        p = counts / counts.sum()
        want[g] = -(p * np.log(p) / np.log(3)).sum()
    found = entropy(answers, ids, where, num_groups=6, base=3.0)
    np.testing.assert_allclose(found, want, atol=1e-6)
    order = rng.permutation(40)
    again = entropy(-answers[order] - 5, ids[order], where[order], num_groups=6, base=3.0)
    np.testing.assert_allclose(found, again, atol=1e-6)


def test_factor_keeps_one_share_of_what_is_inconsistent():
    found = consistency.consistency_factor(
        jnp.array([0.0, 3.0, 1.0, 0.0, 0.0]), jnp.array([8, 8, 8, 1, 0])
    )
    np.testing.assert_allclose(found, [1, 1 / 8, 1 - 0.875 / 3, 1, 1], rtol=1e-6)
    nats = consistency.consistency_factor(jnp.log(jnp.array([8.0])), jnp.array([8]), base=np.e)
    np.testing.assert_allclose(nats, 1 / 8, rtol=1e-5)


@functools.partial(jax.jit, static_argnames=("num_groups", "ddof"))
def across(rewards, ids, factors=None, where=None, *, num_groups=4, ddof=1):
    return consistency.global_prompt_advantage(
        rewards, ids, num_groups=num_groups, factors=factors, ddof=ddof, where=where
    )


@pytest.mark.parametrize("ddof", [0, 1])
def test_prompts_are_compared_by_their_mean(ddof):
    ids = np.array([2, 0, 1, 0, 2, 2, 1, 0])  # group 3 is empty
    rewards = np.array([1, 0, 0, 1, 1, 0, 0, 1], np.float32)
    factors = np.array([0.5, 1.0, 0.9, 5.0], np.float32)
    for f in (None, factors):
        means = np.array([rewards[ids == g].mean() for g in range(3)])
        means = means if f is None else means * f[:3]
        want = (means - means.mean()) / (means.std(ddof=ddof) + 1e-6)
        found = np.asarray(across(rewards, ids, f, ddof=ddof))
        np.testing.assert_allclose(found, want[ids], rtol=1e-5)
        per_prompt = [found[ids == g][0] for g in range(3)]
        assert abs(sum(per_prompt)) < 1e-5


def test_nothing_to_compare_gives_zero():
    ids = np.array([0, 0, 1, 1])
    for rewards, groups in (
        (np.array([1.0, 0.0, 0.0, 1.0]), ids),  # equal means
        (np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4, int)),  # one prompt
        (np.full(4, np.nan), ids),
    ):
        np.testing.assert_array_equal(across(rewards.astype(np.float32), groups), 0.0)


def test_what_does_not_count_changes_nothing():
    ids = np.array([0, 0, 1, 1, 2, 2])
    rewards = np.array([1, 0, 1, np.nan, 0, 0], np.float32)
    means = np.array([0.5, 1.0, 0.0])
    want = (means - means.mean()) / means.std(ddof=1)
    want = np.where(np.isnan(rewards), 0, want[ids])
    np.testing.assert_allclose(across(rewards, ids), want, rtol=1e-5)
    rewards = np.array([1, 0, 1, 0, 0, 0], np.float32)
    where = np.array([1, 1, 1, 0, 1, 1], bool)
    np.testing.assert_allclose(across(rewards, ids, None, where)[:3], want[:3], rtol=1e-5)


def test_weight_is_a_half_at_rho_and_increases():
    values = jnp.linspace(0, 3, 13)
    found = consistency.consistency_weight(values, gamma=3.0, rho=1.5)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-3 * (values - 1.5))), rtol=1e-5)
    assert float(found[6]) == 0.5 and np.all(np.diff(found) > 0)
    np.testing.assert_array_equal(consistency.consistency_weight(values, rho=np.inf), 0.0)
    np.testing.assert_array_equal(consistency.consistency_weight(values, rho=-np.inf), 1.0)


def test_errors():
    ids = jnp.zeros(2, int)
    with pytest.raises(ValueError, match="base: expected a number in"):
        consistency.answer_entropy(ids, ids, num_groups=1, base=1.0)
    with pytest.raises(ValueError, match="answer_ids: expected an integer dtype"):
        consistency.answer_entropy(jnp.zeros(2), ids, num_groups=1)
    with pytest.raises(ValueError, match="group_ids: expected shape"):
        consistency.answer_entropy(jnp.zeros(3, int), ids, num_groups=1)
    with pytest.raises(ValueError, match=r"ids: expected ids in \[0, 1\)"):
        consistency.answer_entropy(ids, jnp.array([0, 1]), num_groups=1)
    with pytest.raises(ValueError, match="gamma: "):
        consistency.consistency_weight(jnp.zeros(2), gamma=-1.0)
    with pytest.raises(ValueError, match="base: "):
        consistency.consistency_factor(jnp.zeros(1), jnp.ones(1, int), base=0.5)
    with pytest.raises(ValueError, match="factors: expected shape"):
        consistency.global_prompt_advantage(jnp.zeros(2), ids, num_groups=1, factors=jnp.ones(2))
    with pytest.raises(ValueError, match="ddof: expected one of"):
        consistency.global_prompt_advantage(jnp.zeros(2), ids, num_groups=1, ddof=2)
