"""Recipes: their gradient is an instance of `unified`, their expectation is what theory says."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax import diagnostics, objectives

LENGTH = 5  # the constant of Dr. GRPO in these tests

RECIPES = {
    "reinforce": objectives.reinforce(),
    "rloo": objectives.rloo(),
    "reinforce_pp": objectives.reinforce_pp(),
    "ppo": objectives.ppo(),
    "grpo": objectives.grpo(),
    "dr_grpo": objectives.dr_grpo(length=LENGTH),
    "dapo": objectives.dapo(),
    "gspo": objectives.gspo(),
    "cispo": objectives.cispo(),
    "lite_ppo": objectives.lite_ppo(),
}


def test_every_recipe_of_the_base_layer_is_covered_here():
    homes = (objectives.group_relative, objectives.policy_gradient)
    recipes = {
        name
        for home in homes
        for name, value in vars(home).items()
        if name in objectives.__all__ and value.__module__ == home.__name__
    }
    assert recipes - {"supervised"} == set(RECIPES)


# --- advantages and weights, written out once more in NumPy ---------------------------------------


def group_stat(rewards, ids, function):
    return np.array([function(rewards[ids == i]) for i in ids])


def others_mean(rewards, ids):
    n = len(rewards)
    rows = [[j for j in range(n) if ids[j] == ids[i] and j != i] for i in range(n)]
    return np.array([np.mean(rewards[r]) if r else 0.0 for r in rows])


def normalized(rewards, ids):
    spread = group_stat(rewards, ids, lambda x: np.std(x, ddof=1))
    return (rewards - group_stat(rewards, ids, np.mean)) / (spread + 1e-6)


def sequence_advantage(name, rewards, ids):
    centered = rewards - group_stat(rewards, ids, np.mean)
    return {
        "reinforce": lambda: rewards,
        "rloo": lambda: rewards - others_mean(rewards, ids),
        "grpo": lambda: normalized(rewards, ids),
        "dr_grpo": lambda: centered,
        "dapo": lambda: normalized(rewards, ids),
        "gspo": lambda: normalized(rewards, ids),
        "cispo": lambda: normalized(rewards, ids),
        "lite_ppo": lambda: centered / (np.std(rewards, ddof=1) + 1e-6),
    }[name]()


def whitened(x, mask):
    chosen = x[mask]
    return np.where(mask, (x - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0.0)


def token_advantage(name, rewards, ids, mask, values):
    if name not in ("reinforce_pp", "ppo"):
        return np.broadcast_to(sequence_advantage(name, rewards, ids)[:, None], mask.shape)
    if name == "reinforce_pp":
        return whitened(np.broadcast_to(rewards[:, None], mask.shape), mask)
    gae = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        steps = np.flatnonzero(mask[b])
        carry = 0.0
        for n, t in reversed(list(enumerate(steps))):
            last = n == len(steps) - 1
            bootstrap = 0.0 if last else values[b, steps[n + 1]]
            delta = (rewards[b] if last else 0.0) + bootstrap - values[b, t]
            carry = delta + 0.95 * carry
            gae[b, t] = carry
    return whitened(gae, mask)


def token_weights(name, mask):
    lengths = mask.sum(1, keepdims=True)
    nonempty = (lengths > 0).sum()
    if name in ("reinforce", "rloo"):
        return mask / nonempty
    if name in ("grpo", "gspo"):
        return mask / np.maximum(lengths, 1) / nonempty
    if name == "dr_grpo":
        return mask / LENGTH / len(mask)
    return mask / mask.sum()


# --- 1. every recipe's gradient against unified ---------------------------------------------------


@pytest.fixture
def batch():
    """Three groups of unequal size, one without signal; off-policy, ragged, one row empty."""
    rng = np.random.default_rng(3)
    ids = np.array([7, -4, 7, 100, 7, -4, 100, 100, -4, 100])
    rewards = np.array([1.0, 0.0, 0.0, 2.0, 1.0, 3.0, 2.0, 2.0, 1.0, 2.0])
    size, length = len(ids), 6
    mask = rng.random((size, length)) < 0.7
    mask[4] = False
    logprobs = np.where(mask, -rng.gamma(2.0, 0.5, mask.shape), 0.0)
    behavior = np.where(mask, logprobs - rng.normal(0, 0.3, mask.shape), 0.0)
    values = np.where(mask, rng.normal(0, 1, mask.shape), 0.0)
    rollout = pg.Rollout(
        tokens=jnp.asarray(rng.integers(0, 9, mask.shape)),
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(behavior, jnp.float32),
        rewards=jnp.asarray(rewards, jnp.float32),
        group_ids=jnp.asarray(ids),
        truncated=jnp.zeros(size, bool),
        values=jnp.asarray(values, jnp.float32),
    )
    return rollout, logprobs, behavior, values, rewards, ids, mask


def outputs_for(logprobs, rollout):
    return pg.PolicyOutputs(logprobs=logprobs, values=rollout.values, entropy=-logprobs)


def value_gradient(objective, prepared, logprobs):
    def value(logprobs):
        return objective.value(outputs_for(logprobs, prepared), prepared)

    return np.asarray(jax.grad(value)(jnp.asarray(logprobs, jnp.float32)))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_gradient_is_an_instance_of_unified(batch, name):
    rollout, logprobs, behavior, values, rewards, ids, mask = batch
    # GSPO's own clip range is so narrow that nothing of this batch would be left.
    objective = objectives.gspo(low=0.1, high=0.1) if name == "gspo" else RECIPES[name]
    prepared = objective.prepare(rollout)
    if name == "dapo":
        mask = mask & (ids != 100)[:, None]  # the group whose rewards agree
    np.testing.assert_array_equal(prepared.mask, mask)
    a = token_advantage(name, rewards, ids, mask, values)
    a = np.where(mask, a, 0.0)

    ratio = np.exp(logprobs - behavior)
    low, high = {"dapo": (0.2, 0.28), "gspo": (0.1, 0.1)}.get(name, (0.2, 0.2))
    denominator, multiplier = behavior, np.ones(mask.shape)
    if name in ("reinforce", "rloo"):
        denominator = logprobs
    elif name == "cispo":
        denominator = logprobs - np.log(np.clip(ratio, 0.0, 5.0))
    else:
        if name == "gspo":
            length = np.maximum(mask.sum(1, keepdims=True), 1)
            log_ratio = np.where(mask, logprobs - behavior, 0).sum(1, keepdims=True) / length
            ratio = np.exp(log_ratio) * np.ones(mask.shape)
            denominator = logprobs - log_ratio
        multiplier = ((a >= 0) & (ratio <= 1 + high)) | ((a < 0) & (ratio >= 1 - low))
    weights = token_weights(name, mask)

    def reference(lp):
        loss = pg.surrogates.unified(
            lp,
            jnp.asarray(denominator, jnp.float32),
            jnp.asarray(a, jnp.float32),
            jnp.asarray(multiplier * mask, jnp.float32),
        )
        return jnp.sum(loss * weights)

    want = np.asarray(jax.grad(reference)(jnp.asarray(logprobs, jnp.float32)))
    got = value_gradient(objective, prepared, logprobs)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)
    assert np.abs(want).max() > 1e-3


# --- 2. expected gradients on a bandit of 2 prompts x 3 actions, by enumeration -------------------

LOGITS = np.array([[0.3, -0.5, 0.8], [-1.0, 0.2, 0.1]])
REWARDS = np.array([[1.0, 0.0, 0.4], [0.0, 2.0, 1.0]])


def numpy_expected(name, logits, rewards, group_size):
    """The expectation over all batches, in plain loops: one-token completions."""
    num_prompts, num_actions = logits.shape
    pi = np.exp(logits - logits.max(1, keepdims=True))
    pi /= pi.sum(1, keepdims=True)
    prompts = np.repeat(np.arange(num_prompts), group_size)
    size = len(prompts)
    total = np.zeros_like(logits)
    for draw in itertools.product(range(num_actions), repeat=size):
        draw = np.array(draw)
        r = rewards[prompts, draw]
        if name in ("reinforce_pp", "ppo"):
            c = (r - r.mean()) / np.sqrt(r.var(ddof=1) + 1e-8) / size
        elif name == "dapo":
            keep = group_stat(r, prompts, np.ptp) > 0
            c = np.where(keep, sequence_advantage(name, r, prompts), 0) / max(keep.sum(), 1)
        else:
            c = sequence_advantage(name, r, prompts) / size
            c = c / LENGTH if name == "dr_grpo" else c
        probability = np.prod(pi[prompts, draw])
        for coefficient, p, action in zip(c, prompts, draw, strict=True):
            total[p] += probability * coefficient * (np.eye(num_actions)[action] - pi[p])
    return total


@functools.cache
def exact(name, group_size=2, logits=None, rewards=None):
    logits = LOGITS if logits is None else np.array(logits)
    rewards = REWARDS if rewards is None else np.array(rewards)
    with jax.enable_x64(True):
        return np.asarray(
            diagnostics.expected_gradient(
                RECIPES[name], jnp.asarray(logits), jnp.asarray(rewards), group_size=group_size
            )
        )


def true_gradient(logits=LOGITS, rewards=REWARDS):
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mean = (pi * rewards).sum(1, keepdims=True)
    return pi * (rewards - mean) / len(logits)


def test_policy_gradient_is_the_closed_form():
    with jax.enable_x64(True):
        got = diagnostics.policy_gradient(jnp.asarray(LOGITS), jnp.asarray(REWARDS))
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, true_gradient(), rtol=1e-12)


@pytest.mark.parametrize("name", RECIPES)
def test_expected_gradient_matches_plain_enumeration(name):
    # float32 enters through the f32 casts of advantages at most; 1e-6 leaves room for nothing else
    np.testing.assert_allclose(
        exact(name), numpy_expected(name, LOGITS, REWARDS, 2), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("group_size", [1, 2, 3])
@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_unbiased(name, group_size):
    np.testing.assert_allclose(exact(name, group_size), true_gradient(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("group_size", [2, 3])
def test_dr_grpo_is_the_policy_gradient_up_to_a_known_factor(group_size):
    want = (1 - 1 / group_size) / LENGTH * true_gradient()
    np.testing.assert_allclose(exact("dr_grpo", group_size), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_grpo_family_forgets_the_scale_of_a_prompts_rewards(name):
    """The bias of dividing by the group's own deviation, with its sign and size.

    Scaling one prompt's rewards by 10 scales its policy gradient by 10, and leaves GRPO's as it
    was: hard or low-stake prompts are weighted up relative to the policy gradient.
    """
    scaled = REWARDS * np.array([[1.0], [10.0]])
    got = exact(name, 2, None, tuple(map(tuple, scaled)))
    np.testing.assert_allclose(got, exact(name), rtol=1e-4)
    np.testing.assert_allclose(
        true_gradient(rewards=scaled)[1], 10 * true_gradient()[1], rtol=1e-12
    )


def test_grpo_weights_binary_prompts_by_the_deviation_of_pairs():
    """Two samples, rewards 0/1: A is √2 times the centred reward, so E = (√2/2) ∇J exactly."""
    binary = ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0))
    want = np.sqrt(2) / 2 * true_gradient(rewards=np.array(binary))
    np.testing.assert_allclose(exact("grpo", 2, None, binary), want, rtol=3e-6)


@pytest.mark.parametrize("name", ["reinforce_pp", "ppo", "dapo", "lite_ppo", "grpo"])
def test_biased_recipes_point_uphill_but_elsewhere(name):
    got, true = exact(name, 2).ravel(), true_gradient().ravel()
    cosine = got @ true / np.linalg.norm(got) / np.linalg.norm(true)
    assert 0.5 < cosine < 1 - 1e-3


def test_token_mean_over_the_filtered_batch_weights_lone_informative_groups_up():
    """DAPO's denominator counts only kept tokens: more gradient than GRPO in every direction."""
    dapo, grpo = exact("dapo"), exact("grpo")
    assert np.all(np.abs(dapo) > np.abs(grpo))
    assert np.all(np.sign(dapo) == np.sign(grpo))


def test_importance_weighting_is_unbiased_off_policy_and_clipping_is_not():
    behavior = LOGITS + np.array([[0.8, -0.6, 0.0], [0.5, 0.0, -0.9]])

    def surrogate(outputs, rollout):
        ratio = pg.surrogates.importance_ratio(outputs.logprobs, rollout.behavior_logprobs)
        return pg.surrogates.importance_weighted(ratio, rollout.advantages)

    weighted = dataclasses.replace(objectives.reinforce(), surrogate=surrogate)
    clipped = dataclasses.replace(weighted, surrogate=objectives.grpo().surrogate)
    with jax.enable_x64(True):
        arrays = jnp.asarray(LOGITS), jnp.asarray(REWARDS)
        options = {"group_size": 2, "behavior_logits": jnp.asarray(behavior)}
        plain = diagnostics.expected_gradient(objectives.reinforce(), *arrays, **options)
        exactly = diagnostics.expected_gradient(weighted, *arrays, **options)
        bounded = diagnostics.expected_gradient(clipped, *arrays, **options)
    np.testing.assert_allclose(exactly, true_gradient(), rtol=1e-9, atol=1e-12)
    assert np.abs(np.asarray(plain) - true_gradient()).max() > 0.01
    assert np.abs(np.asarray(bounded) - true_gradient()).max() > 0.01


def test_enumeration_refuses_what_it_cannot_finish():
    with pytest.raises(ValueError, match="at most 200000"):
        diagnostics.all_draws(4, 10, 2)


# --- 3. composition, invariances, degenerate and bad input ----------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_order_labels_and_padding_do_not_matter(batch, name):
    rollout, logprobs, *_ = batch
    objective = RECIPES[name]
    order = np.random.default_rng(0).permutation(len(logprobs))

    def value(rollout, logprobs):
        prepared = objective.prepare(rollout)
        return objective.loss(outputs_for(jnp.asarray(logprobs, jnp.float32), prepared), prepared)

    loss, diagnostics_ = value(rollout, logprobs)
    shuffled = jax.tree.map(lambda x: x[order], rollout)
    shuffled = shuffled.replace(group_ids=shuffled.group_ids * 3 - 11)

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 3))) if x.ndim == 2 else x

    for other, lp in (
        (shuffled, logprobs[order]),
        (jax.tree.map(pad, rollout), np.pad(logprobs, ((0, 0), (0, 3)))),
    ):
        other_loss, other_diagnostics = value(other, lp)
        np.testing.assert_allclose(other_loss, loss, rtol=2e-5, atol=1e-6)
        for key in diagnostics_:
            np.testing.assert_allclose(
                other_diagnostics[key], diagnostics_[key], rtol=2e-5, atol=1e-6, err_msg=key
            )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("parts", [1, 2, 5, 10])
def test_parts_of_a_weighed_batch_add_up_to_the_whole(batch, name, parts):
    rollout, logprobs, *_ = batch
    objective = RECIPES[name]
    prepared = objective.prepare(rollout)
    whole = value_gradient(objective, prepared, logprobs)
    weighed = objective.weigh(prepared)
    pieces = []
    for rows in np.array_split(np.arange(len(logprobs)), parts):
        piece = jax.tree.map(lambda x, rows=rows: x[rows], weighed)
        pieces.append(value_gradient(objective, piece, logprobs[rows]))
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RECIPES)
def test_degenerate_batches_give_zero_loss_and_gradient(batch, name):
    rollout, logprobs, *_ = batch
    objective = RECIPES[name]
    cases = {
        "nothing sampled": rollout.replace(mask=jnp.zeros_like(rollout.mask)),
        "every verifier failed": rollout.replace(rewards=jnp.full_like(rollout.rewards, jnp.nan)),
    }
    if name not in ("reinforce", "ppo"):
        cases["all rewards equal"] = rollout.replace(rewards=jnp.full_like(rollout.rewards, 0.1))
    if name == "rloo":  # a baseline of the others' mean may round: equal up to that only
        del cases["all rewards equal"]
    for case, given in cases.items():
        prepared = objective.prepare(given)
        surrogate_only = dataclasses.replace(objective, regularizers=())
        out = outputs_for(jnp.asarray(logprobs, jnp.float32), prepared)
        loss, info = surrogate_only.loss(out, prepared)
        assert float(loss) == 0.0, case
        assert np.all(value_gradient(surrogate_only, prepared, logprobs) == 0.0), case
        assert all(np.isfinite(x) for x in info.values()), case
    assert float(info["invalid_rewards"]) in (0.0, 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_failed_verifier_costs_only_its_own_sample(batch, name):
    """A NaN reward behaves as if the row were not there at all."""
    rollout, logprobs, *_ = batch
    objective = RECIPES[name]
    broken = rollout.replace(rewards=rollout.rewards.at[5].set(jnp.nan))
    prepared = objective.prepare(broken)
    got = value_gradient(objective, prepared, logprobs)
    rows = np.delete(np.arange(len(logprobs)), 5)
    without = jax.tree.map(lambda x: x[rows], rollout)
    want = value_gradient(objective, objective.prepare(without), logprobs[rows])
    if name == "dr_grpo":  # its constant counts every row
        want = want * len(rows) / len(logprobs)
    np.testing.assert_allclose(got[rows], want, rtol=1e-5, atol=1e-7)
    assert np.all(got[5] == 0)
    out = outputs_for(jnp.asarray(logprobs, jnp.float32), prepared)
    np.testing.assert_allclose(objective.diagnostics(out, prepared)["invalid_rewards"], 0.1)


def test_trajectories_split_into_rows_count_once():
    ids = jnp.array([0, 0, 0, 0])
    mask = jnp.ones((4, 2), bool)
    rollout = pg.Rollout(
        tokens=jnp.zeros((4, 2), jnp.int32),
        mask=mask,
        behavior_logprobs=jnp.zeros((4, 2)),
        rewards=jnp.array([1.0, 1.0, 1.0, 0.0]),
        group_ids=ids,
        trajectory_ids=jnp.array([4, 4, 4, 9]),
    )
    np.testing.assert_allclose(
        objectives.dr_grpo(length=2).prepare(rollout).advantages, [0.5, 0.5, 0.5, -0.5]
    )
    np.testing.assert_allclose(objectives.rloo().prepare(rollout).advantages, [1, 1, 1, -1])


def test_diagnostics_against_numpy(batch):
    rollout, logprobs, behavior, _, _rewards, _ids, mask = batch
    objective = objectives.grpo()
    prepared = objective.prepare(rollout)
    out = pg.PolicyOutputs(logprobs=jnp.asarray(logprobs, jnp.float32))
    _, info = objective.loss(out, prepared)
    ratio = np.exp(logprobs - behavior)[mask]
    a = np.broadcast_to(np.asarray(prepared.advantages)[:, None], mask.shape)[mask]
    want = {
        "ratio_min": ratio.min(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_fraction_low": np.mean((a < 0) & (ratio < 0.8)),
        "clip_fraction_high": np.mean((a > 0) & (ratio > 1.2)),
        "approx_kl": np.mean(ratio - 1 - np.log(ratio)),
        "entropy": -logprobs[mask].mean(),
        "effective_sample_size": ratio.sum() ** 2 / (ratio**2).sum() / len(ratio),
        "groups_without_signal": 1 / 3,
        "invalid_rewards": 0.0,
        "advantage_magnitude": np.abs(a).mean(),
    }
    assert set(info) == set(want)
    for key, value in want.items():
        np.testing.assert_allclose(info[key], value, rtol=2e-5, atol=1e-6, err_msg=key)
    assert want["clip_fraction_low"] > 0 and want["clip_fraction_high"] > 0


def test_kl_penalty_adds_the_k3_gradient(batch):
    rollout, logprobs, behavior, *_ = batch
    rollout = rollout.replace(reference_logprobs=jnp.asarray(behavior, jnp.float32))
    plain, penalised = objectives.grpo(), objectives.grpo(kl_coefficient=0.3)
    assert plain.needs == frozenset() and penalised.needs == {"reference_logprobs"}
    prepared = plain.prepare(rollout)
    difference = value_gradient(penalised, prepared, logprobs) - value_gradient(
        plain, prepared, logprobs
    )
    mask = np.asarray(prepared.mask)
    want = 0.3 * (1 - np.exp(-(logprobs - behavior))) * token_weights("grpo", mask)
    np.testing.assert_allclose(difference, want, rtol=1e-4, atol=1e-6)


def test_reinforce_pp_puts_the_kl_into_the_reward():
    mask = jnp.array([[False, True, True, False, True], [False, True, False, False, False]])
    behavior = jnp.where(mask, -1.0, 0.0)
    reference = jnp.where(mask, -1.5, 0.0)
    rollout = pg.Rollout(
        tokens=jnp.zeros(mask.shape, jnp.int32),
        mask=mask,
        behavior_logprobs=behavior,
        reference_logprobs=reference,
        rewards=jnp.array([1.0, 0.0]),
        group_ids=jnp.array([0, 0]),
    )
    objective = objectives.reinforce_pp(kl_coefficient=0.2)
    assert objective.needs == {"reference_logprobs"}
    to_go = np.array([0.7, 0.8, 0.9, -0.1])  # R minus 0.1 for this and each later token
    want = (to_go - to_go.mean()) / np.sqrt(to_go.var(ddof=1) + 1e-8)
    got = np.asarray(objective.prepare(rollout).advantages)[np.asarray(mask)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_mismatch_correction_is_truncated_importance_sampling(batch):
    rollout, logprobs, behavior, *_ = batch
    proximal = np.where(np.asarray(rollout.mask), behavior + 0.2, 0.0)
    corrected = objectives.with_mismatch_weights(
        objectives.grpo(),
        weights=functools.partial(pg.surrogates.truncated_weights, cap=1.1),
    )
    assert corrected.needs == {"proximal_logprobs"}
    prepared = corrected.prepare(
        rollout.replace(proximal_logprobs=jnp.asarray(proximal, jnp.float32))
    )
    got = value_gradient(corrected, prepared, logprobs)
    anchored = prepared.replace(behavior_logprobs=prepared.proximal_logprobs)
    want = 1.1 * value_gradient(objectives.grpo(), anchored, logprobs)  # e^0.2 > 1.1 everywhere
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_swapping_one_part_is_one_line(batch):
    rollout, logprobs, *_ = batch
    mixed = dataclasses.replace(
        objectives.grpo(),
        advantage=lambda r: pg.advantages.leave_one_out(
            r.rewards, r.group_ids, num_groups=r.rewards.shape[0]
        ),
        aggregate=pg.aggregate.token_mean,
    )
    prepared = mixed.prepare(rollout)
    np.testing.assert_allclose(prepared.advantages, objectives.rloo().prepare(rollout).advantages)
    assert np.abs(value_gradient(mixed, prepared, logprobs)).max() > 0


def test_dapo_penalises_overlong_and_filters_truncated(batch):
    rollout, *_ = batch
    lengths = np.asarray(rollout.mask).sum(1)
    objective = objectives.dapo(max_length=5, cache_length=3, filter_truncated=True)
    prepared = objective.prepare(rollout.replace(truncated=rollout.truncated.at[0].set(True)))
    assert not np.asarray(prepared.mask)[0].any()
    penalty = np.clip((2 - lengths) / 3, -1, 0)
    ids = np.asarray(rollout.group_ids)
    shaped = np.asarray(rollout.rewards) + penalty
    np.testing.assert_allclose(prepared.advantages, normalized(shaped, ids), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(prepared.rewards, rollout.rewards)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mask": jnp.ones((10, 6))}, "mask"),
        ({"mask": jnp.ones((10, 5), bool)}, "mask"),
        ({"rewards": jnp.ones(9)}, "rewards"),
        ({"rewards": jnp.ones(10, int)}, "rewards"),
        ({"group_ids": jnp.zeros(10)}, "group_ids"),
        ({"group_ids": jnp.zeros(3, int)}, "group_ids"),
        ({"tokens": jnp.zeros((10,), int)}, "tokens"),
        ({"behavior_logprobs": jnp.zeros((10, 7))}, "behavior_logprobs"),
    ],
)
def test_a_wrong_rollout_names_its_field(batch, change, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        objectives.grpo().prepare(batch[0].replace(**change))


def test_other_bad_input(batch):
    rollout, logprobs, *_ = batch
    out = pg.PolicyOutputs(logprobs=jnp.asarray(logprobs, jnp.float32))
    with pytest.raises(ValueError, match="call prepare first"):
        objectives.grpo().loss(out, rollout)
    with pytest.raises(ValueError, match="reference_logprobs: this objective needs it"):
        objectives.grpo(kl_coefficient=0.1).prepare(rollout)
    with pytest.raises(ValueError, match="values: this objective needs it"):
        objectives.ppo().prepare(rollout.replace(values=None))
    with pytest.raises(ValueError, match="outputs.values"):
        objectives.ppo().loss(out, objectives.ppo().prepare(rollout))
    with pytest.raises(ValueError, match="^low"):
        objectives.grpo(low=2.0)
    with pytest.raises(ValueError, match="^kl_coefficient"):
        objectives.grpo(kl_coefficient=-1.0)
    with pytest.raises(ValueError, match="^length"):
        objectives.dr_grpo(length=0)
    with pytest.raises(ValueError, match="both or neither"):
        objectives.dapo(max_length=10)
    with pytest.raises(ValueError, match="^needs"):
        pg.Regularizer("x", lambda o, r: o.logprobs, 1.0, frozenset({"logits"}))
    with pytest.raises(ValueError, match="at least one sequence"):
        objectives.grpo().prepare(jax.tree.map(lambda x: x[:0], rollout))
