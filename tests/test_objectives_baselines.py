"""Recipes that choose what a reward is compared with."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import advantages, objectives, train
from pgjax.advantages import optimal_baseline, sets
from pgjax.diagnostics import problems
from pgjax.objectives import baselines

PROBLEM = problems.bandit(jnp.array([[0.0, 1.0, 0.5, 0.2], [0.3, 0.0, 1.0, 0.6]]))
OUTPUTS = functools.partial(problems.outputs, PROBLEM)
PARAMS = jnp.array([[2.0, 0.0, -1.0, 0.5], [0.0, 0.3, -0.4, 1.0]])


def batch(*, group_size=4, key=0, needs=frozenset({"square_sum"}), **extras):
    rollout = problems.sample(PROBLEM, PARAMS, jax.random.key(key), group_size=group_size)
    rollout = rollout.replace(extras={n: jnp.asarray(x) for n, x in extras.items()} or None)
    return rollout.replace(old=OUTPUTS(PARAMS, rollout, needs))


def norms(rollout):
    policy = np.asarray(jax.nn.softmax(PARAMS))[np.asarray(rollout.tokens[:, 0])]
    return ((np.eye(4)[np.asarray(rollout.tokens[:, 1])] - policy) ** 2).sum(-1)


def test_oblr_weighs_by_score_norms():
    rollout = batch(group_size=5)
    prepared = baselines.oblr().prepare(rollout)
    want = optimal_baseline.weighted_leave_one_out(
        rollout.rewards, norms(rollout).astype(np.float32), rollout.group_ids, num_groups=2
    )
    np.testing.assert_allclose(prepared.advantages, want, rtol=1e-4, atol=1e-6)
    assert not np.allclose(want, objectives.rloo().prepare(rollout).advantages, atol=1e-3)
    # Weights that say nothing: leave-one-out means.
    plain = baselines.oblr(weights=lambda r: jnp.ones(r.rewards.shape))
    np.testing.assert_allclose(
        plain.prepare(rollout).advantages,
        objectives.rloo().prepare(rollout).advantages,
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match=r"rollout.old.square_sum: this objective needs it"):
        baselines.oblr().prepare(rollout.replace(old=None))


def test_oblr_counts_a_trajectory_of_two_rows_once():
    rollout = batch(group_size=3)
    want = np.asarray(baselines.oblr().prepare(rollout).advantages)
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), rollout)
    twice = twice.replace(trajectory_ids=jnp.array([0, 1, 2, 3, 4, 5, 0]))
    found = np.asarray(baselines.oblr().prepare(twice).advantages)
    assert found[6] == found[0]
    # Its own baseline is the others'; for the others it weighs as much as its two rows.
    np.testing.assert_allclose(found[[0, 3, 4, 5]], want[[0, 3, 4, 5]], rtol=1e-5)
    weights = norms(rollout) * np.array([2, 1, 1, 1, 1, 1])
    again = optimal_baseline.weighted_leave_one_out(
        rollout.rewards, weights.astype(np.float32), rollout.group_ids, num_groups=2
    )
    np.testing.assert_allclose(found[:6], again, rtol=1e-4, atol=1e-6)


def test_history_goes_from_batch_to_batch():
    objective = baselines.oblr_with_history(num_prompts=7, decay=0.5)
    optimizer = optax.sgd(0.0)
    state = train.init(jnp.array(PARAMS), optimizer, jax.random.key(0), objective=objective)
    update = train.make_update(OUTPUTS, objective, optimizer)
    prompts = np.array([6, 2])
    top, bottom = np.zeros(7), np.zeros(7)
    for step in range(3):
        rollout = batch(key=step, prompt_ids=np.repeat(prompts, 4))
        prepared = objective.prepare(rollout.replace(memory=state.memory))
        rewards, weights = np.asarray(rollout.rewards), norms(rollout)
        ids = np.asarray(rollout.extras["prompt_ids"])
        if step:
            want = rewards - (top / np.maximum(bottom, 1e-9))[ids]
        else:  # nothing known yet
            want = baselines.oblr().prepare(rollout).advantages
        np.testing.assert_allclose(prepared.advantages, want, rtol=1e-4, atol=1e-5)
        state, _ = update(state, rollout)
        for p in prompts:
            top[p] = 0.5 * top[p] + (weights * rewards)[ids == p].sum()
            bottom[p] = 0.5 * bottom[p] + weights[ids == p].sum()
        np.testing.assert_allclose(state.memory.weighted_reward, top, rtol=1e-5)
        np.testing.assert_allclose(state.memory.weight, bottom, rtol=1e-5)
    with pytest.raises(ValueError, match=r"rollout.extras: expected 'prompt_ids', got \[\]"):
        objective.prepare(batch())
    for options in ({"num_prompts": 0}, {"num_prompts": 2, "decay": 1.0}):
        with pytest.raises(ValueError, match="num_prompts|decay"):
            baselines.oblr_with_history(**options)


def mixed():
    """Groups in which some samples are the same and some rewards differ."""
    tokens = jnp.array([[0, 0], [0, 1], [0, 1], [0, 2], [1, 0], [1, 0], [1, 2], [1, 3]])
    return problems.rollout_of(PROBLEM, tokens, PARAMS)


def test_polychromic_by_hand():
    rollout = mixed()
    prepared = baselines.polychromic(group_size=4, set_size=2).prepare(rollout)
    rewards, actions = np.asarray(rollout.rewards), np.asarray(rollout.tokens[:, 1])
    raw = np.zeros(8)
    for group in (range(4), range(4, 8)):
        pairs = list(itertools.combinations(group, 2))
        scores = [rewards[list(s)].mean() * len(set(actions[list(s)])) / 2 for s in pairs]
        for i in group:
            raw[i] = np.mean([f for f, s in zip(scores, pairs, strict=True) if i in s])
            raw[i] -= np.mean(scores)
    want = (raw - raw.mean()) / (raw.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(prepared.advantages, want, rtol=1e-3, atol=1e-5)
    assert np.ptp(want) > 1.0


def test_polychromic_with_other_parts():
    rollout = mixed()
    alike = baselines.polychromic(
        group_size=4, set_size=2, signatures=lambda r: jnp.zeros(r.tokens.shape[0], jnp.int32)
    )
    plain = dataclasses.replace(
        alike, advantage=baselines.normalized(center=advantages.centered, scale=advantages.unscaled)
    )
    # All alike: the mean reward of sets, so the deviations from the mean, normalised.
    mean = plain.prepare(rollout).advantages
    np.testing.assert_allclose(
        alike.prepare(rollout).advantages,
        advantages.batch_normalize(mean),
        rtol=1e-3,
        atol=1e-5,
    )
    one_diverse = baselines.polychromic(
        group_size=4, set_size=2, diversity=lambda s: jnp.ones(s.shape[:-1])
    )
    np.testing.assert_allclose(
        one_diverse.prepare(rollout).advantages, alike.prepare(rollout).advantages, rtol=1e-4
    )
    given = baselines.polychromic(group_size=4, set_members=sets.all_sets(4, 2))
    np.testing.assert_array_equal(
        given.prepare(rollout).advantages,
        baselines.polychromic(group_size=4, set_size=2).prepare(rollout).advantages,
    )
    order = np.array([4, 0, 5, 1, 2, 6, 7, 3])
    shuffled = jax.tree.map(lambda x: x[order], rollout)
    np.testing.assert_allclose(
        given.prepare(shuffled).advantages,
        given.prepare(rollout).advantages[order],
        rtol=1e-4,
        atol=1e-6,
    )


def test_polychromic_without_some_rewards():
    rollout = mixed()
    rollout = rollout.replace(rewards=rollout.rewards.at[1].set(jnp.nan))
    prepared = baselines.polychromic(group_size=4, set_size=2).prepare(rollout)
    # Three pairs are left of the first group: scores 1/2, 1/4, 3/4 and mean 1/2.
    raw = np.array([-1 / 8, np.nan, 1 / 8, 0, -13 / 120, -13 / 120, 7 / 40, 1 / 24])
    want = np.nan_to_num(raw / (np.nanstd(raw, ddof=1) + 1e-6))
    np.testing.assert_allclose(prepared.advantages, want, atol=1e-4)
    assert not prepared.mask[1].any()
    with pytest.raises(ValueError, match="trajectory_ids: sets are of single rows"):
        baselines.polychromic(group_size=4).prepare(rollout.replace(trajectory_ids=jnp.arange(8)))
    with pytest.raises(ValueError, match="group_size=3"):
        baselines.polychromic(group_size=3, set_size=2).prepare(rollout)
    with pytest.raises(ValueError, match="set_size"):
        baselines.polychromic(group_size=3, set_size=4)


def tool_batch():
    """Zeros and ones; using the tool helps in group 0 and harms in group 1."""
    rollout = batch(
        group_size=4,
        used=np.array([True, True, False, False] * 2),
        forced=np.array([False, True, True, False] * 2),
    )
    return rollout.replace(rewards=jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]))


def test_gcpo_without_weights_is_grpo():
    rollout = tool_batch()
    found = baselines.gcpo(length_reference=4.0, use_weight=0.0, length_weight=0.0)
    np.testing.assert_allclose(
        found.prepare(rollout).advantages, objectives.grpo().prepare(rollout).advantages, rtol=1e-5
    )


def test_gcpo_rewards_use_only_where_it_helps():
    rollout = tool_batch()
    prepared = baselines.gcpo(length_reference=4.0, length_weight=0.0).prepare(rollout)
    shaped = np.array([1.5, 1.5, 0, 0, -0.5, -0.5, 1, 1])
    want = advantages.group_normalize(
        jnp.asarray(shaped, jnp.float32), rollout.group_ids, num_groups=2
    )
    np.testing.assert_allclose(prepared.advantages, want, rtol=1e-5)
    np.testing.assert_array_equal(prepared.rewards, rollout.rewards)  # what was given stays
    # The length counts too: one token of four.
    longer = baselines.gcpo(length_reference=4.0, length_weight=0.4).rewards(rollout)
    np.testing.assert_allclose(longer, shaped + 0.1, rtol=1e-5)


def test_gcpo_learns_nothing_from_contrast_samples():
    rollout = tool_batch()
    objective = baselines.gcpo(
        length_reference=4.0, length_weight=0.0, contrast=lambda r: r.extras["forced"]
    )
    prepared = objective.prepare(rollout)
    forced = np.asarray(rollout.extras["forced"])
    assert not prepared.mask[forced].any() and prepared.mask[~forced].any(-1).all()
    shaped = jnp.array([1.5, 0.0, -0.5, 1.0])
    want = advantages.group_normalize(shaped, jnp.array([0, 0, 1, 1]), num_groups=2)
    np.testing.assert_allclose(prepared.advantages[~forced], want, rtol=1e-5)
    with pytest.raises(ValueError, match=r"rollout.extras: expected 'used', got \[\]"):
        baselines.gcpo(length_reference=4.0).prepare(batch())
    for options in ({"margin": -1.0}, {"length_reference": 0.0}, {"use_weight": -1.0}):
        with pytest.raises(ValueError, match="margin|reference|use_weight"):
            baselines.gcpo(**{"length_reference": 4.0, **options}).prepare(rollout)


CENTERS = {
    "group": advantages.centered,
    "batch": advantages.batch_centered,
    "none": advantages.uncentered,
}
SCALES = {
    "group": advantages.by_group_std,
    "batch": advantages.by_batch_std,
    "none": advantages.unscaled,
}


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_center_with_every_scale(center, scale):
    rollout = batch(group_size=4, key=1)
    rollout = rollout.replace(rewards=rollout.rewards.at[6].set(jnp.nan))
    found = baselines.normalized(center=CENTERS[center], scale=SCALES[scale])(rollout)
    rewards, ids = np.asarray(rollout.rewards, np.float64), np.asarray(rollout.group_ids)
    known = np.isfinite(rewards)
    for i in range(8):
        peers = {"group": known & (ids == ids[i]), "batch": known}
        mean = rewards[peers[center]].mean() if center != "none" else 0.0
        std = rewards[peers[scale]].std(ddof=1) + 1e-6 if scale != "none" else 1.0
        want = (rewards[i] - mean) / std if known[i] else 0.0
        assert float(found[i]) == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_published_normalisations_are_pairs_of_parts():
    rollout = batch(group_size=4, key=2)
    options = {"num_groups": 2}
    for center, scale, want in (
        (
            "group",
            "group",
            advantages.group_normalize(rollout.rewards, rollout.group_ids, **options),
        ),
        (
            "group",
            "batch",
            advantages.group_mean_batch_std(rollout.rewards, rollout.group_ids, **options),
        ),
        ("group", "none", advantages.centered(rollout.rewards, rollout.group_ids, **options)),
        ("batch", "batch", advantages.batch_normalize(rollout.rewards)),
        ("none", "none", rollout.rewards),
    ):
        found = baselines.normalized(center=CENTERS[center], scale=SCALES[scale])(rollout)
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_degenerate_batches(scale):
    part = SCALES[scale]
    one = part(jnp.array([0.7]), jnp.array([0.7]), jnp.array([0]), num_groups=1)
    np.testing.assert_array_equal(one, 0.0)
    same = part(jnp.array([0.7] * 3), jnp.array([0.7] * 3), jnp.array([0] * 3), num_groups=1)
    np.testing.assert_array_equal(same, 0.0)
    with pytest.raises(ValueError, match="epsilon"):
        part(jnp.ones(2), jnp.ones(2), jnp.zeros(2, int), num_groups=1, epsilon=-1.0)
