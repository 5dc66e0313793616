"""Recipes with strata, halves, group weights and novelty: what they are made of, exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax import curriculum, diagnostics, objectives
from pgjax.advantages import conditional, novelty, reweight, stratified
from pgjax.diagnostics import problems
from pgjax.objectives import facts
from pgjax.objectives import stratified as recipes

WORTH = jnp.array([[[0, 0, 1], [1, 0, 0], [0, 1, 1]], [[0, 1, 0], [0, 0, 0], [1, 0, 1]]], float)


def two_tokens():
    """Two prompts, two tokens of three; the first decides how long the answer counts as."""

    def logits(params, tokens):
        first, second = params["first"][tokens[:, 0]], params["second"][tokens[:, 0], tokens[:, 1]]
        return jnp.stack([jnp.zeros_like(first), first, second], axis=1)

    return problems.TokenProblem(
        num_prompts=2,
        num_actions=3,
        horizon=2,
        logits=logits,
        reward=lambda tokens: WORTH[tokens[:, 0], tokens[:, 1], tokens[:, 2]],
        extras=lambda tokens: {"strata": tokens[:, 1] % 2, "steps": 1 + tokens[:, 1]},
    )


PROBLEM = two_tokens()
OUTPUTS = functools.partial(problems.outputs, PROBLEM)
PARAMS = {
    "first": jax.random.normal(jax.random.key(1), (2, 3)),
    "second": jax.random.normal(jax.random.key(2), (2, 3, 3)),
}


def strata(rollout):
    return rollout.extras["strata"]


def steps(rollout):
    return rollout.extras["steps"]


RECIPES = {
    "stratified_grpo": recipes.stratified_grpo(alpha=0.8, strata=strata),
    "stratified_grpo, by length": recipes.stratified_grpo(alpha=0.8, bucket_width=1),
    "canon": recipes.canon(length=4, mix=0.7, metric=steps),
    "canon_entropy": recipes.canon_entropy(length=4, low_discount=0.9),
    "adora": recipes.adora(max_length=4, lengths=steps),
    "g2rl": recipes.g2rl(),
}


@functools.cache
def batch(group_size=6, seed=0):
    return problems.sample(PROBLEM, PARAMS, jax.random.key(seed), group_size=group_size)


@functools.partial(jax.jit, static_argnums=0)
def prepared(objective, rollout):
    if objective.old_needs:
        rollout = rollout.replace(old=OUTPUTS(PARAMS, rollout, objective.old_needs))
    return objective.prepare(rollout)


@functools.partial(jax.jit, static_argnums=0)
def gradient(objective, rollout):
    def loss(params):
        return objective.value(OUTPUTS(params, rollout, objective.needs), rollout)

    return jax.grad(loss)(PARAMS)


def expected_gradient(objective, table, group_size, logits=None):
    function = functools.partial(
        diagnostics.expected_gradient, objective, rewards=table, group_size=group_size
    )
    return jax.jit(function)(LOGITS if logits is None else logits)


def same(found, want, **options):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), found, want)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_the_unified_one_with_the_recipes_advantages(name):
    objective = RECIPES[name]
    rollout = prepared(objective, batch())
    assert np.isfinite(rollout.advantages).all() and np.abs(rollout.advantages).max() > 0.1

    def unified(params):
        logprobs = OUTPUTS(params, rollout, frozenset()).logprobs
        old = rollout.behavior_logprobs
        loss = pg.surrogates.unified(logprobs, old, rollout.advantages, rollout.mask)
        return objective.aggregate(loss, rollout.mask)

    same(gradient(objective, rollout), jax.jit(jax.grad(unified))(PARAMS), atol=1e-6)


def in_two_rows(rollout, row):
    """The same batch, with one trajectory's two tokens in a row each."""
    rows = np.r_[: row + 1, row : rollout.tokens.shape[0]]
    wide = jax.tree.map(lambda x: x[rows], rollout)
    mask = np.array(wide.mask)
    mask[row, 2] = mask[row + 1, 1] = False
    return wide.replace(
        mask=jnp.asarray(mask),
        behavior_logprobs=jnp.where(mask, wide.behavior_logprobs, 0.0),
        trajectory_ids=jnp.asarray(rows) * 3 - 5,
    ), rows


@pytest.mark.parametrize("name", RECIPES)
def test_a_trajectory_in_two_rows_counts_once(name):
    objective, rollout = RECIPES[name], batch()
    split, rows = in_two_rows(rollout, 3)
    found = prepared(objective, split).advantages
    np.testing.assert_allclose(found, prepared(objective, rollout).advantages[rows], atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_failed_verifiers_and_order_change_nothing_for_the_others(name):
    objective, rollout = RECIPES[name], batch()
    plain = prepared(objective, rollout).advantages
    # A thirteenth sample whose reward is not known, and all rows in another order.
    rows = np.r_[:12, 2]
    more = jax.tree.map(lambda x: x[rows], rollout)
    more = more.replace(rewards=more.rewards.at[12].set(jnp.nan))
    # Ties of the metric are broken by order, so groups keep theirs.
    order = np.argsort(np.r_[np.linspace(0, 1, 6), np.linspace(0.05, 1.1, 6), 0.5], kind="stable")
    found = prepared(objective, jax.tree.map(lambda x: x[order], more))
    want = np.r_[plain, 0.0][order]
    np.testing.assert_allclose(found.advantages, want, atol=1e-5)
    assert not found.mask[int(np.flatnonzero(order == 12)[0])].any()


@pytest.mark.parametrize("name", RECIPES)
def test_training_goes_uphill(name):
    # Rewards by novelty or metric bend the path; the way is still up.
    found = train(RECIPES[name], steps=40)
    assert found > float(problems.expected_reward(PROBLEM, PARAMS)) + 0.15


def train(objective, *, steps):
    optimizer = optax.sgd(2.0)
    update = pg.train.make_update(OUTPUTS, objective, optimizer)
    state = pg.train.init(
        jax.tree.map(jnp.array, PARAMS), optimizer, jax.random.key(0), objective=objective
    )

    def step(state, key):
        return update(state, problems.sample(PROBLEM, state.params, key, group_size=16))

    keys = jax.random.split(jax.random.key(3), steps)
    state, metrics = jax.jit(lambda state: jax.lax.scan(step, state, keys))(state)
    assert np.isfinite(metrics["loss"]).all()
    return float(problems.expected_reward(PROBLEM, state.params))


def test_parts_combine_with_other_recipes():
    rollout = batch()
    mixed = dataclasses.replace(objectives.gspo(), advantage=RECIPES["canon"].advantage)
    np.testing.assert_array_equal(
        prepared(mixed, rollout).advantages, prepared(RECIPES["canon"], rollout).advantages
    )
    weighted = recipes.with_utility_weights(
        objectives.dr_grpo(length=4),
        max_length=4,
        lengths=steps,
        advantageous=reweight.success_is_rare,
    )
    plain = prepared(objectives.dr_grpo(length=4), rollout).advantages
    rate = np.array([np.mean(rollout.rewards[:6]), np.mean(rollout.rewards[6:])])
    want = plain * np.repeat(np.where(rate <= 0.5, 2.0, 1.0), 6)
    np.testing.assert_allclose(prepared(weighted, rollout).advantages, want)


# --- strata ---------------------------------------------------------------------------------------


def test_stratified_grpo_is_the_blend():
    rollout = batch()
    for alpha in (0.0, 0.6):
        found = prepared(recipes.stratified_grpo(alpha=alpha, strata=strata), rollout).advantages
        want = stratified.stratified_advantage(
            rollout.rewards, rollout.group_ids, strata(rollout), num_groups=2, alpha=alpha
        )
        np.testing.assert_allclose(found, want, atol=1e-6)
    plain = objectives.grpo(ddof=0, epsilon=1e-8)
    none = recipes.stratified_grpo(alpha=0.0, strata=strata)
    a, b = prepared(plain, rollout), prepared(none, rollout)
    np.testing.assert_array_equal(a.advantages, b.advantages)
    same(gradient(plain, a), gradient(none, b), rtol=0)


def test_pure_strata_never_move_their_own_probabilities():
    # Stratum = first token: whatever is drawn, advantages sum to 0 over each first token.
    objective = recipes.stratified_grpo(alpha=1.0, strata=lambda r: r.tokens[:, 1])
    for seed in range(3):
        rollout = prepared(objective, batch(seed=seed))
        found = gradient(objective, rollout)
        np.testing.assert_allclose(found["first"], 0.0, atol=1e-6)
    assert np.abs(found["second"]).max() > 0.01


def test_turns_and_lengths_as_strata():
    mask = jnp.array([[0, 1, 1, 0, 1], [0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    turns = jnp.array(
        [[-1, 0, 0, -1, 1], [-1, 0, 0, 0, 0], [-1, 0, -1, 1, -1], [-1, -1, -1, -1, -1]]
    )
    rollout = pg.Rollout(
        tokens=jnp.zeros((4, 5), jnp.int32),
        mask=mask,
        behavior_logprobs=jnp.zeros((4, 5)),
        rewards=jnp.array([1.0, 0.0, 1.0, 0.0]),
        group_ids=jnp.zeros(4, jnp.int32),
        turn_ids=turns,
    )
    assert facts.number_of_turns(rollout).tolist() == [2, 1, 1, 0]
    assert facts.response_length(rollout).tolist() == [3, 4, 1, 0]
    assert facts.length_bucket(rollout, width=2).tolist() == [1, 2, 0, 0]
    joined = rollout.replace(trajectory_ids=jnp.array([7, 7, 1, 2]))
    assert facts.number_of_turns(joined).tolist() == [2, 2, 1, 0]
    assert facts.response_length(joined).tolist() == [7, 7, 1, 0]
    by_turns = recipes.stratified_grpo(alpha=1.0).prepare(rollout)
    np.testing.assert_allclose(by_turns.advantages, [0, -1, 1, 0], atol=1e-6)
    by_length = recipes.stratified_grpo(alpha=1.0, bucket_width=2).prepare(rollout)
    np.testing.assert_allclose(by_length.advantages, [0, 0, 1, -1], atol=1e-6)
    with pytest.raises(ValueError, match=r"rollout.turn_ids: needed to count turns, got None"):
        recipes.stratified_grpo(alpha=1.0).prepare(rollout.replace(turn_ids=None))


# --- halves ---------------------------------------------------------------------------------------


TABLE = jnp.array([[0.0, 1.0, 0.4], [0.7, -0.5, 0.2]])
LOGITS = jnp.array([[0.3, -0.2, 0.1], [0.0, 0.5, -0.7]])


def by_action(rollout):
    return rollout.tokens[:, 1]


def test_canon_at_one_half_has_the_gradient_of_dr_grpo():
    halves = recipes.canon(length=5, mix=0.5, metric=by_action)
    found = expected_gradient(halves, TABLE, 4)
    plain = objectives.dr_grpo(length=5, high=0.28)
    want = expected_gradient(plain, TABLE, 4)
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_allclose(
        want, 0.75 / 5 * diagnostics.policy_gradient(LOGITS, TABLE), atol=1e-6
    )


@pytest.mark.parametrize("metric", [by_action, lambda r: -r.tokens[:, 1]])
def test_canon_between_pairs_is_unbiased(metric):
    objective = recipes.canon(length=1, metric=metric)
    found = expected_gradient(objective, TABLE, 2)
    np.testing.assert_allclose(found, diagnostics.policy_gradient(LOGITS, TABLE), atol=1e-6)


def test_canon_amplifies_what_the_metric_has_to_do_with_the_reward():
    # Reward rises with the action on prompt 0 and falls on prompt 1: both are learnt faster.
    table = jnp.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    halves = recipes.canon(length=1, metric=by_action)
    found = expected_gradient(halves, table, 4, jnp.zeros((2, 3)))
    plain = diagnostics.policy_gradient(jnp.zeros((2, 3)), table)
    assert (found[0, 2] > 1.2 * plain[0, 2]) and (found[1, 0] > 1.2 * plain[1, 0])
    np.testing.assert_allclose(found[0], found[1, ::-1], atol=1e-6)


def test_canon_reads_entropy_and_length():
    rollout = batch()
    filled = rollout.replace(old=OUTPUTS(PARAMS, rollout, frozenset({"entropy"})))
    p = np.asarray(jax.nn.softmax(PARAMS["first"]))
    q = np.asarray(jax.nn.softmax(PARAMS["second"]))
    tokens = np.asarray(rollout.tokens)
    first, second = -(p * np.log(p)).sum(-1), -(q * np.log(q)).sum(-1)
    want = 0.5 * (first[tokens[:, 0]] + second[tokens[:, 0], tokens[:, 1]])
    np.testing.assert_allclose(facts.mean_entropy(filled), want, rtol=1e-5)
    high = conditional.median_split(want, rollout.group_ids, num_groups=2)
    objective = recipes.canon_entropy(length=4, mix=0.25, low_discount=0.9)
    np.testing.assert_allclose(
        objective.prepare(filled).advantages,
        conditional.conditional_advantage(
            rollout.rewards, rollout.group_ids, high, num_groups=2, mix=0.25, low_discount=0.9
        ),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match=r"rollout.old.entropy: this objective needs it"):
        objective.prepare(rollout)
    shorter = rollout.replace(mask=rollout.mask.at[::2, 2].set(False))
    found = recipes.canon(length=4).prepare(shorter).advantages
    high = jnp.arange(12) % 2 == 1
    want = conditional.conditional_advantage(rollout.rewards, rollout.group_ids, high, num_groups=2)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_canon_with_a_mix_that_changes():
    rollout = batch()

    def with_mix(mix):
        return recipes.canon(length=4, metric=steps, mix=mix)

    by_accuracy = with_mix(lambda rollout: curriculum.accuracy_mix(rollout.rewards))
    want = with_mix(float(np.mean(rollout.rewards))).prepare(rollout)
    np.testing.assert_allclose(by_accuracy.prepare(rollout).advantages, want.advantages, atol=1e-6)

    def scheduled(rollout):
        return curriculum.cosine_restarts(rollout.memory, warmup=4, total=8, cycles=1)

    objective = dataclasses.replace(with_mix(scheduled), memory=objectives.step_count())
    optimizer = optax.sgd(0.0)
    update = pg.train.make_update(OUTPUTS, objective, optimizer)
    state = pg.train.init(
        jax.tree.map(jnp.array, PARAMS), optimizer, jax.random.key(0), objective=objective
    )
    for step in range(3):
        want = with_mix(0.15 * step).prepare(rollout).advantages
        state, metrics = update(state, rollout)
        expected = np.mean(np.abs(want))
        np.testing.assert_allclose(metrics["advantage_magnitude"], expected, rtol=1e-5)
    assert int(state.memory) == 3


# --- weights of groups ----------------------------------------------------------------------------


def test_adora_multiplies_whole_groups():
    rollout = batch().replace(
        rewards=jnp.array([1.0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]),
        extras={"steps": jnp.array([1, 9, 3, 4, 90, 2, 1, 2, 3, 4, 90, 2])},
    )
    objective = recipes.adora(max_length=50, lengths=steps)
    plain = prepared(objectives.grpo(), rollout).advantages
    found = prepared(objective, rollout).advantages
    np.testing.assert_allclose(found, plain * np.repeat([2.0, 1.0], 6), rtol=1e-6)
    attenuated = recipes.adora(
        max_length=50, lengths=steps, low_weight=0.1, high_weight=1.0, rate=1.0
    )
    found = prepared(attenuated, rollout).advantages
    np.testing.assert_allclose(found, plain * np.repeat([1.0, 0.1], 6), rtol=1e-6)
    neutral = recipes.adora(max_length=50, lengths=steps, high_weight=1.0)
    np.testing.assert_array_equal(prepared(neutral, rollout).advantages, plain)
    # Success is no longer rare in the first group.
    easier = rollout.replace(rewards=rollout.rewards.at[2:4].set(1.0))
    found = prepared(objective, easier).advantages
    np.testing.assert_array_equal(found, prepared(objectives.grpo(), easier).advantages)


def test_adora_takes_lengths_from_the_mask():
    rollout = batch()
    rollout = rollout.replace(
        mask=rollout.mask.at[:3, 2].set(False),
        rewards=jnp.array([0.0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]),
    )
    plain = prepared(objectives.grpo(), rollout).advantages
    found = prepared(recipes.adora(max_length=3), rollout).advantages
    # First group: the longest success has 2 tokens, failures 5/4 on average; second: 2 and 2.
    np.testing.assert_allclose(found, plain * np.repeat([2.0, 1.0], 6), rtol=1e-6)


# --- novelty --------------------------------------------------------------------------------------


def test_g2rl_step_by_step():
    rollout = batch(seed=4)
    p = np.asarray(jax.nn.softmax(PARAMS["first"]))
    q = np.asarray(jax.nn.softmax(PARAMS["second"]))
    a, b, c = np.asarray(rollout.tokens).T
    features = ((np.eye(3)[b] - p[a]) + (np.eye(3)[c] - q[a, b])) / 2
    signs = 2 * np.asarray(rollout.rewards) - 1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for shape, form in {
        novelty.signed_novelty_reward: lambda r, n: r * (1 + 0.5 * (2 * n - 1)),
        novelty.printed_novelty_reward: lambda r, n: r * (1 + 0.5 * r * n),
        novelty.scaled_novelty_reward: lambda r, n: r * (1 + 0.5 * n),
    }.items():
        want = []
        for group in (slice(0, 6), slice(6, 12)):
            cosines, r = unit[group] @ unit[group].T, signs[group]
            weights = np.exp(np.broadcast_to(r, (6, 6))) * (1 - np.eye(6))
            scores = 1 - (weights * cosines**2).sum(1) / weights.sum(1)
            relative = (scores - scores.min()) / (scores.max() - scores.min())
            shaped = form(r, relative)
            want.append((shaped - shaped.mean()) / (shaped.std() + 1e-6))
        found = prepared(recipes.g2rl(shape=shape), rollout)
        np.testing.assert_allclose(found.advantages, np.concatenate(want), rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(found.rewards, rollout.rewards)  # what was given is seen


def test_g2rl_without_strength_is_grpo():
    rollout = batch(seed=1)
    signed = rollout.replace(rewards=2 * rollout.rewards - 1)
    plain = prepared(objectives.grpo(ddof=0), signed).advantages
    np.testing.assert_array_equal(prepared(recipes.g2rl(strength=0.0), rollout).advantages, plain)


def test_g2rl_with_other_features():
    objective = recipes.g2rl(features=lambda rollout: jax.nn.one_hot(rollout.tokens[:, 2], 3))
    rollout = batch(seed=4)
    assert not objective.old_needs
    found = objective.prepare(rollout).advantages
    assert np.abs(found - prepared(recipes.g2rl(), rollout).advantages).max() > 0.05
    # Features that all agree leave rewards, and so GRPO's advantages, alone.
    flat = recipes.g2rl(features=lambda rollout: jnp.ones((12, 2)))
    plain = prepared(objectives.grpo(ddof=0), rollout.replace(rewards=2 * rollout.rewards - 1))
    np.testing.assert_array_equal(flat.prepare(rollout).advantages, plain.advantages)


def test_bad_options():
    with pytest.raises(ValueError, match="alpha: "):
        recipes.stratified_grpo(alpha=-0.1)
    with pytest.raises(ValueError, match="strata and bucket_width: expected at most one"):
        recipes.stratified_grpo(alpha=0.5, strata=strata, bucket_width=3)
    with pytest.raises(ValueError, match="bucket_width: "):
        recipes.stratified_grpo(alpha=0.5, bucket_width=0)
    with pytest.raises(ValueError, match="mix: "):
        recipes.canon(length=4, mix=2.0)
    with pytest.raises(ValueError, match="length: "):
        recipes.canon(length=0)
    with pytest.raises(ValueError, match="max_length: "):
        recipes.adora(max_length=0)
    with pytest.raises(ValueError, match="low_weight: "):
        recipes.adora(max_length=5, low_weight=-1.0)
    with pytest.raises(ValueError, match="rate: "):
        recipes.adora(max_length=5, rate=2.0)
    with pytest.raises(ValueError, match="strength: "):
        recipes.g2rl(strength=-1.0)
    with pytest.raises(ValueError, match="bound: "):
        recipes.g2rl(bound=0.0)
