"""Surrogates and masks against formulas written out in NumPy, and against `unified`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgjax import masks, surrogates

B, T = 6, 7


@pytest.fixture
def batch():
    """Log-probs whose ratios straddle every clip bound, advantages of both signs and zero."""
    rng = np.random.default_rng(0)
    logprobs = -rng.gamma(2.0, 1.0, (B, T)).astype(np.float32)
    behavior = (logprobs - rng.normal(0, 0.7, (B, T))).astype(np.float32)
    advantages = rng.normal(0, 1, B).astype(np.float32)
    advantages[2] = 0.0
    mask = rng.random((B, T)) < 0.7
    mask[3] = False
    return logprobs, behavior, advantages, mask


def gradient(function, logprobs):
    return np.asarray(jax.grad(lambda lp: function(lp).sum())(jnp.asarray(logprobs)))


def test_importance_ratio_is_the_quotient_of_probabilities(batch):
    logprobs, behavior, *_ = batch
    want = np.exp(logprobs.astype(np.float64)) / np.exp(behavior.astype(np.float64))
    got = surrogates.importance_ratio(logprobs, behavior)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(
        gradient(lambda lp: surrogates.importance_ratio(lp, behavior), logprobs), want, rtol=2e-6
    )


def test_no_gradient_reaches_behavior_or_advantages(batch):
    logprobs, behavior, advantages, mask = batch

    def loss(behavior, advantages):
        ratio = surrogates.importance_ratio(logprobs, behavior)
        return (
            surrogates.clipped(ratio, advantages, low=0.2, high=0.2)
            + surrogates.dual_clipped(ratio, advantages, low=0.2, high=0.2)
            + surrogates.cispo(logprobs, behavior, advantages, high=0.2)
            + surrogates.unified(logprobs, behavior, advantages, mask)
            + surrogates.sequence_ratio(logprobs, behavior, mask)
            + surrogates.score_function(logprobs, advantages)
        ).sum()

    for g in jax.grad(loss, argnums=(0, 1))(behavior, advantages):
        assert np.all(np.asarray(g) == 0)


def test_extreme_log_ratios_stay_finite_and_keep_their_gradient():
    logprobs = jnp.array([[0.0, -500.0]])
    behavior = jnp.array([[-500.0, 0.0]])
    ratio = surrogates.importance_ratio(logprobs, behavior)
    np.testing.assert_allclose(ratio, np.exp([[20.0, -20.0]]), rtol=1e-6)
    g = gradient(lambda lp: surrogates.importance_ratio(lp, behavior), logprobs)
    np.testing.assert_allclose(g, np.exp([[20.0, -20.0]]), rtol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (1.0, 10.0)])
def test_clipped_is_the_pessimistic_minimum(batch, low, high):
    logprobs, behavior, advantages, _ = batch
    r = np.exp(logprobs.astype(np.float64) - behavior)
    a = advantages[:, None].astype(np.float64)
    want = -np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)
    ratio = surrogates.importance_ratio(logprobs, behavior)
    np.testing.assert_allclose(
        surrogates.clipped(ratio, advantages, low=low, high=high), want, rtol=3e-6, atol=1e-6
    )


def test_dual_clipped_caps_the_loss_of_bad_actions():
    ratio = jnp.array([[0.5, 1.0, 2.0, 3.5, 9.0]])
    loss = surrogates.dual_clipped(ratio, jnp.array([-1.0]), low=0.2, high=0.2, bound=3.0)
    np.testing.assert_allclose(loss, [[0.8, 1.0, 2.0, 3.0, 3.0]], rtol=1e-6)
    good = surrogates.dual_clipped(ratio, jnp.array([1.0]), low=0.2, high=0.2, bound=3.0)
    np.testing.assert_allclose(good, [[-0.5, -1.0, -1.2, -1.2, -1.2]], rtol=1e-6)


def test_clip_gradient_on_the_boundary_and_at_ratio_one():
    # A tie between the two arms must not split the gradient.
    for advantage in (1.0, -1.0):
        g = jax.grad(
            lambda r, a=advantage: surrogates.clipped(r, jnp.array([[a]]), low=0.0, high=0.0).sum()
        )(jnp.ones((1, 1)))
        assert float(g[0, 0]) == -advantage


def _instances(logprobs, behavior, advantages, mask):
    """name -> (loss of log-probs, denominator log-probs, multiplier), each derived by hand."""
    logprobs, behavior = logprobs.astype(np.float64), behavior.astype(np.float64)
    r, a = np.exp(logprobs - behavior), advantages[:, None].astype(np.float64)
    ones = np.ones_like(r)
    ppo = ((a >= 0) & (r <= 1.2)) | ((a < 0) & (r >= 0.8))
    dapo = ((a >= 0) & (r <= 1.28)) | ((a < 0) & (r >= 0.8))
    dual = ppo & ~((a < 0) & (r > 1.5))
    length = np.maximum(mask.sum(1, keepdims=True), 1)
    mean = np.where(mask, logprobs - behavior, 0).sum(1, keepdims=True) / length
    s = np.exp(mean)
    gspo = ((a >= 0) & (s <= 1.1)) | ((a < 0) & (s >= 0.9))
    tis = np.minimum(np.exp(behavior - (behavior + 0.3)), 2.0) * ones

    def ratio(lp):
        return surrogates.importance_ratio(lp, behavior)

    return {
        "score_function": (
            lambda lp: surrogates.score_function(lp, advantages),
            logprobs,
            ones,
        ),
        "importance_weighted": (
            lambda lp: surrogates.importance_weighted(ratio(lp), advantages),
            behavior,
            ones,
        ),
        "clipped": (
            lambda lp: surrogates.clipped(ratio(lp), advantages, low=0.2, high=0.2),
            behavior,
            ppo,
        ),
        "clip_higher": (
            lambda lp: surrogates.clipped(ratio(lp), advantages, low=0.2, high=0.28),
            behavior,
            dapo,
        ),
        "dual_clipped": (
            lambda lp: surrogates.dual_clipped(ratio(lp), advantages, low=0.2, high=0.2, bound=1.5),
            behavior,
            dual,
        ),
        "gspo": (
            lambda lp: surrogates.clipped(
                surrogates.sequence_ratio(lp, behavior, mask), advantages, low=0.1, high=0.1
            ),
            logprobs - mean,
            gspo & mask,
        ),
        "cispo": (
            lambda lp: surrogates.cispo(lp, behavior, advantages, low=0.3, high=0.5),
            logprobs - np.log(np.clip(r, 0.7, 1.5)),
            ones,
        ),
        "cispo_unbounded": (
            lambda lp: surrogates.cispo(lp, behavior, advantages, low=1.0, high=np.inf),
            behavior,
            ones,
        ),
        "truncated_weights": (
            lambda lp: (
                surrogates.truncated_weights(behavior, behavior + 0.3)
                * surrogates.clipped(ratio(lp), advantages, low=0.2, high=0.2)
            ),
            behavior,
            ppo * tis,
        ),
        "masked_weights_rejecting": (
            lambda lp: (
                surrogates.masked_weights(behavior, behavior - 1.0, high=2.0)
                * surrogates.clipped(ratio(lp), advantages, low=0.2, high=0.2)
            ),
            behavior,
            np.zeros_like(r),
        ),
    }


NAMES = [
    "score_function",
    "importance_weighted",
    "clipped",
    "clip_higher",
    "dual_clipped",
    "gspo",
    "cispo",
    "cispo_unbounded",
    "truncated_weights",
    "masked_weights_rejecting",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_surrogate_is_an_instance_of_unified(batch, name):
    logprobs, behavior, advantages, mask = batch
    instances = _instances(logprobs, behavior, advantages, mask)
    assert set(instances) == set(NAMES)
    loss, denominator, multiplier = instances[name]
    got = gradient(loss, logprobs)
    if name == "gspo":  # off the mask a sequence ratio says nothing: aggregation drops it
        got = np.where(mask, got, 0)
    want = gradient(
        lambda lp: surrogates.unified(
            lp,
            denominator.astype(np.float32),
            advantages,
            np.asarray(multiplier, np.float32),
        ),
        logprobs,
    )
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=1e-6)
    if name != "masked_weights_rejecting":
        assert np.abs(want).max() > 0.1  # the comparison is not between zeros


def test_unified_gradient_is_its_formula(batch):
    logprobs, behavior, advantages, mask = batch
    got = gradient(lambda lp: surrogates.unified(lp, behavior, advantages, mask), logprobs)
    want = -1.0 * mask * np.exp(logprobs.astype(np.float64) - behavior) * advantages[:, None]
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=1e-7)


def test_unified_ignores_rubbish_off_the_mask():
    logprobs = jnp.array([[-1.0, jnp.nan, -jnp.inf, 1e30]])
    mask = jnp.array([[True, False, False, False]])
    value, g = jax.value_and_grad(
        lambda lp: surrogates.unified(lp, jnp.zeros((1, 4)), jnp.array([2.0]), mask).sum()
    )(logprobs)
    np.testing.assert_allclose(value, -2 * np.exp(-1), rtol=1e-6)
    np.testing.assert_allclose(g, [[-2 * np.exp(-1), 0, 0, 0]], rtol=1e-6)


def test_on_policy_all_surrogates_agree(batch):
    logprobs, _, advantages, mask = batch
    one = np.ones_like(mask)
    losses = {
        "score": lambda lp: surrogates.score_function(lp, advantages),
        "clipped": lambda lp: surrogates.clipped(
            surrogates.importance_ratio(lp, logprobs), advantages, low=0.2, high=0.2
        ),
        "dual": lambda lp: surrogates.dual_clipped(
            surrogates.importance_ratio(lp, logprobs), advantages, low=0.2, high=0.2
        ),
        "sequence": lambda lp: surrogates.clipped(
            surrogates.sequence_ratio(lp, logprobs, one), advantages, low=0.2, high=0.2
        ),
        "cispo": lambda lp: surrogates.cispo(lp, logprobs, advantages, high=0.2),
    }
    want = np.broadcast_to(-advantages[:, None], (B, T))
    for name, loss in losses.items():
        np.testing.assert_allclose(gradient(loss, logprobs), want, atol=1e-6, err_msg=name)


def test_sequence_ratio_of_single_tokens_is_the_token_ratio(batch):
    logprobs, behavior, _, _ = batch
    one = np.zeros((B, T), bool)
    one[:, 2] = True
    got = surrogates.sequence_ratio(logprobs, behavior, one)[:, 2]
    want = surrogates.importance_ratio(logprobs, behavior)[:, 2]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    empty = surrogates.sequence_ratio(logprobs, behavior, np.zeros((B, T), bool))
    assert np.all(np.asarray(empty) == 1)


def test_importance_weights_of_the_mismatch_family():
    learner = jnp.array([[0.0, -1.0, -2.0]])
    sampler = jnp.array([[-1.0, -1.0, -1.0]])
    e = np.e
    np.testing.assert_allclose(
        surrogates.truncated_weights(learner, sampler, cap=2.0), [[2, 1, 1 / e]], rtol=1e-6
    )
    np.testing.assert_allclose(
        surrogates.truncated_weights(learner, sampler, cap=np.inf), [[e, 1, 1 / e]], rtol=1e-6
    )
    assert np.all(np.asarray(surrogates.truncated_weights(learner, sampler, cap=0.0)) == 0)
    np.testing.assert_allclose(
        surrogates.masked_weights(learner, sampler, low=0.5, high=2.0), [[0, 1, 0]], rtol=1e-6
    )
    mask = jnp.array([[True, True, False]])
    np.testing.assert_allclose(
        surrogates.truncated_sequence_weights(learner, sampler, mask, cap=9.0), [[e] * 3], rtol=1e-6
    )


def test_mismatch_masks():
    learner = jnp.array([[0.0, -1.0, -2.0], [-1.0, -1.0, -12.0]])
    sampler = jnp.full((2, 3), -1.0)
    mask = jnp.array([[True, True, True], [True, True, False]])
    np.testing.assert_array_equal(
        masks.token_mismatch(learner, sampler, mask, low=0.5, high=2.0),
        [[False, True, False], [True, True, True]],
    )
    np.testing.assert_array_equal(
        masks.sequence_mismatch(learner, sampler, mask, high=1.5), np.ones((2, 3), bool)
    )
    skewed = learner.at[0, 0].add(0.03)
    np.testing.assert_array_equal(
        masks.geometric_mismatch(skewed, sampler, mask), [[False] * 3, [True] * 3]
    )
    full = jnp.ones((2, 3), bool)
    np.testing.assert_array_equal(masks.veto(learner, sampler, full), [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(masks.veto(learner, sampler, mask), np.ones((2, 3), bool))


def test_selection_masks():
    rewards = jnp.array([1.0, 0.0, 1.0, 1.0, jnp.nan, 5.0, 0.1, 0.1, 0.1])
    ids = jnp.array([0, 0, 1, 1, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(
        masks.informative_groups(rewards, ids, num_groups=5), [True, True] + [False] * 7
    )
    np.testing.assert_array_equal(
        masks.finite_rewards(jnp.array([[0.0, jnp.inf], [1.0, 2.0]])), [False, True]
    )
    np.testing.assert_array_equal(masks.overlong_filter(jnp.array([True, False])), [False, True])


def test_value_losses():
    values, old, targets = jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 2.0]])
    np.testing.assert_allclose(surrogates.value_error(values, targets), [[0.5, 0.5]])
    # Clipped to old ± 0.2: errors 1.8²/2, the larger of the two each time.
    np.testing.assert_allclose(
        surrogates.clipped_value_error(values, targets, old, width=0.2), [[1.62, 1.62]], rtol=1e-6
    )


@given(
    ratio=st.floats(0.01, 100),
    advantage=st.floats(-5, 5, width=32, allow_subnormal=False),  # XLA takes those for 0
    low=st.floats(0, 1),
    high=st.floats(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_clip_mask_is_where_the_minimum_moves(ratio, advantage, low, high):
    """The mask is true exactly where min(rA, clip(r)A) takes the unclipped arm."""
    r, a = np.float32(ratio), np.float32(advantage)
    kept = bool(masks.ppo_clip(jnp.float32(r), jnp.float32(a), low=low, high=high))
    unclipped, bounded = r * a, np.clip(r, np.float32(1 - low), np.float32(1 + high)) * a
    if unclipped < bounded:
        assert kept
    elif unclipped > bounded:
        assert not kept


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: surrogates.clipped(jnp.ones((2, 3)), jnp.ones(2), low=1.5, high=0.2), "low"),
        (lambda: surrogates.clipped(jnp.ones((2, 3)), jnp.ones(2), low=0.2, high=-1.0), "high"),
        (
            lambda: surrogates.clipped(jnp.ones((2, 3)), jnp.ones(4), low=0.2, high=0.2),
            "advantages",
        ),
        (
            lambda: surrogates.clipped(jnp.ones((2, 3)), jnp.ones(2, int), low=0.2, high=0.2),
            "advantages",
        ),
        (
            lambda: surrogates.dual_clipped(
                jnp.ones((2, 3)), jnp.ones(2), low=0.2, high=0.2, bound=1.0
            ),
            "bound",
        ),
        (
            lambda: surrogates.importance_ratio(jnp.ones((2, 3)), jnp.ones((2, 4))),
            "behavior_logprobs",
        ),
        (lambda: surrogates.importance_ratio(jnp.ones((2, 3), int), jnp.ones((2, 3))), "logprobs"),
        (
            lambda: surrogates.sequence_ratio(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3))),
            "mask",
        ),
        (
            lambda: surrogates.cispo(
                jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(2), low=-0.1, high=1.0
            ),
            "low",
        ),
        (
            lambda: surrogates.truncated_weights(jnp.ones((2, 3)), jnp.ones((2, 3)), cap=-1.0),
            "cap",
        ),
        (
            lambda: surrogates.masked_weights(
                jnp.ones((2, 3)), jnp.ones((2, 3)), low=2.0, high=1.0
            ),
            "high",
        ),
        (
            lambda: surrogates.unified(
                jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 2), bool)
            ),
            "mask",
        ),
        (lambda: masks.overlong_filter(jnp.ones(2)), "truncated"),
        (
            lambda: surrogates.clipped_value_error(
                jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)), width=0.0
            ),
            "width",
        ),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        call()
