"""Advantages scaled by the entropy of their steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.advantages.entropy_modulated import (
    centered_steps,
    entropy_scale,
    future_clarity,
    modulate_by_entropy,
    normalized_entropy,
    step_entropy,
)


def random_steps(seed=0, rows=5, steps=4):
    rng = np.random.default_rng(seed)
    entropy = rng.random((rows, steps)).astype(np.float32)
    valid = np.arange(steps) < rng.integers(1, steps + 1, (rows, 1))
    return entropy, valid, rng.normal(size=rows).astype(np.float32)


def test_step_entropy_is_the_mean_over_the_steps_own_tokens():
    rng = np.random.default_rng(0)
    ids = np.array([[-1, 0, 0, 0, 2, 2], [0, -1, -1, 1, 1, 1], [-1] * 6])
    mask = np.array([[0, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [1] * 6], bool)
    entropy = rng.random(ids.shape).astype(np.float32)
    poisoned = np.where(mask & (ids >= 0), entropy, np.nan)
    for function in (step_entropy, jax.jit(step_entropy, static_argnames="num_steps")):
        found, valid = function(poisoned, ids, mask, num_steps=3)
        for b, s in np.ndindex(3, 3):
            tokens = mask[b] & (ids[b] == s)
            assert valid[b, s] == tokens.any()
            want = entropy[b, tokens].mean() if tokens.any() else 0.0
            assert float(found[b, s]) == pytest.approx(want, abs=1e-6)
    joined, _ = step_entropy(
        entropy[:2], ids[:2], mask[:2], num_steps=3, trajectory_ids=np.array([4, 4])
    )
    assert float(joined[0, 1]) == pytest.approx(entropy[1, 3:5].mean())
    assert not np.any(joined[1])


def test_the_scale_by_hand_and_in_the_mean():
    found = entropy_scale(jnp.array([[0.0, 1.0]]), np.ones((1, 2), bool))
    np.testing.assert_allclose(found, [[1.462117, 0.537883]], atol=1e-6)
    entropy, valid, _ = random_steps()
    for k in (0.0, 1.0, 3.0):
        scale = np.asarray(entropy_scale(entropy, valid, k=k))
        assert scale[valid].mean() == pytest.approx(1.0, abs=1e-6)
        assert not scale[~valid].any()
        low, high = entropy[valid].min(), entropy[valid].max()
        raw = np.exp(-k * (entropy - low) / (high - low))
        np.testing.assert_allclose(scale[valid], (raw / raw[valid].mean())[valid], rtol=1e-5)


def test_without_options_the_base_remains():
    entropy, valid, base = random_steps()
    found = modulate_by_entropy(base, entropy, valid, k=0.0, zeta=0.0)
    np.testing.assert_allclose(found, np.where(valid, base[:, None], 0.0), atol=1e-6)
    steps = np.random.default_rng(1).normal(size=entropy.shape).astype(np.float32)
    found = modulate_by_entropy(steps, entropy, valid, k=0.0, zeta=0.0)
    np.testing.assert_allclose(found, np.where(valid, steps, 0.0), atol=1e-6)


def test_equal_entropies_change_nothing_but_the_bonus():
    _, valid, base = random_steps()
    entropy = jnp.full(valid.shape, 0.7)
    np.testing.assert_array_equal(normalized_entropy(entropy, valid), 0.0)
    np.testing.assert_allclose(np.asarray(entropy_scale(entropy, valid))[valid], 1.0, rtol=1e-6)
    followed = valid & np.roll(valid, -1, axis=1) & (np.arange(valid.shape[1]) < 3)
    np.testing.assert_array_equal(future_clarity(entropy, valid), followed)
    found = modulate_by_entropy(base, entropy, valid, zeta=0.1)
    np.testing.assert_allclose(found, np.where(valid, base[:, None] + 0.1 * followed, 0), atol=1e-6)


def test_sure_steps_move_most_whether_right_or_wrong():
    entropy, valid = jnp.array([[0.1, 0.9]]), np.ones((1, 2), bool)
    for base in (-1.0, 1.0):
        low, high = np.abs(modulate_by_entropy(jnp.array([base]), entropy, valid, zeta=0.0))[0]
        assert low > 1.0 > high


def test_the_last_step_and_padding_give_no_bonus():
    entropy = np.array([[0.5, 0.2, 0.0, 0.0], [0.4, 0.0, 0.6, 0.0]], np.float32)
    valid = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], bool)
    clarity = np.asarray(future_clarity(entropy, valid, k=2.0))
    normal = np.where(valid, (entropy - 0.2) / 0.4, np.nan)
    np.testing.assert_allclose(clarity[0], [np.exp(-2 * normal[0, 1]), 0, 0, 0], rtol=1e-5)
    # The step that follows is the next one that exists.
    np.testing.assert_allclose(clarity[1], [np.exp(-2 * normal[1, 2]), 0, 0, 0], rtol=1e-5)
    longer = np.pad(entropy, ((0, 0), (0, 3))), np.pad(valid, ((0, 0), (0, 3)))
    np.testing.assert_array_equal(future_clarity(*longer, k=2.0)[:, :4], clarity)


def test_units_of_entropy_do_not_matter():
    entropy, valid, base = random_steps()
    one = modulate_by_entropy(base, entropy, valid)
    other = modulate_by_entropy(base, 1.4427 * entropy + 3.0, valid)
    np.testing.assert_allclose(one, other, atol=2e-6)


def test_centring_over_steps_and_over_tokens():
    entropy, valid, base = random_steps()
    raw = np.asarray(modulate_by_entropy(base, entropy, valid))
    centred = np.asarray(centered_steps(raw, valid))
    np.testing.assert_allclose(centred[valid], raw[valid] - raw[valid].mean(), atol=1e-6)
    assert not centred[~valid].any()
    tokens = np.random.default_rng(2).integers(1, 9, valid.shape)
    mean = np.sum((tokens * raw)[valid]) / tokens[valid].sum()
    found = np.asarray(centered_steps(raw, valid, weights=tokens))
    np.testing.assert_allclose(found[valid], (raw - mean)[valid], atol=1e-6)


def test_nothing_valid_gives_zeros():
    none = np.zeros((2, 3), bool)
    entropy = jnp.ones((2, 3))
    for function in (entropy_scale, future_clarity, normalized_entropy):
        np.testing.assert_array_equal(function(entropy, none), 0.0)
    modulated = modulate_by_entropy(jnp.ones(2), entropy, none)
    np.testing.assert_array_equal(centered_steps(modulated, none), 0.0)


def test_the_score_norm_grows_with_renyi_entropy():
    # E ‖∇_z log π(a)‖² = 1 - Σ π² = 1 - exp(-H_2), by summing over all actions.
    logits = 2 * jax.random.normal(jax.random.key(0), (6, 5))
    for z in logits:
        probabilities = np.asarray(jax.nn.softmax(z))
        scores = jax.jacobian(jax.nn.log_softmax)(z)
        expected = np.sum(probabilities * np.sum(np.asarray(scores) ** 2, axis=1))
        renyi = -np.log(np.sum(probabilities**2))
        assert expected == pytest.approx(1 - np.exp(-renyi), abs=1e-6)


def test_errors():
    ids, mask = np.array([[0, 1]]), np.ones((1, 2), bool)
    with pytest.raises(ValueError, match="entropy: expected numbers of at least 0"):
        step_entropy(jnp.array([[0.1, -0.2]]), ids, mask, num_steps=2)
    with pytest.raises(ValueError, match="step_ids: expected ids that do not decrease"):
        step_entropy(jnp.array([[0.1, 0.2]]), ids[:, ::-1], mask, num_steps=2)
    with pytest.raises(ValueError, match="turn_ids: expected ids in"):
        step_entropy(jnp.array([[0.1, 0.2]]), ids, mask, num_steps=1)
    with pytest.raises(ValueError, match="k: "):
        entropy_scale(jnp.ones((1, 2)), mask, k=-1.0)
    with pytest.raises(ValueError, match="k: "):
        future_clarity(jnp.ones((1, 2)), mask, k=-1.0)
    with pytest.raises(ValueError, match="zeta"):
        modulate_by_entropy(jnp.ones(1), jnp.ones((1, 2)), mask, zeta=-0.1)
    with pytest.raises(ValueError, match=r"advantages: expected shape \(1,\) or \(1, 2\)"):
        modulate_by_entropy(jnp.ones(3), jnp.ones((1, 2)), mask)
    with pytest.raises(ValueError, match="epsilon"):
        normalized_entropy(jnp.ones((1, 2)), mask, epsilon=0.0)
    with pytest.raises(ValueError, match="valid: expected dtype bool"):
        centered_steps(jnp.ones((1, 2)), jnp.ones((1, 2)))
