"""D3S, GTPO and CAPO as objectives: limits that are other methods, and plain loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import aggregate, objectives
from pgjax.diagnostics import problems
from pgjax.masks import conflict, downsample
from pgjax.objectives import token_selection as selection

PROMPTS, ACTIONS, HORIZON, GROUP = 3, 3, 3, 4
TABLE = np.random.default_rng(7).normal(size=(PROMPTS, ACTIONS, ACTIONS, ACTIONS)).round()


def _reward(tokens):
    return jnp.asarray(TABLE, jnp.float32)[tuple(tokens.T)]


def _roles(tokens):
    """A completion ends after its first token 2."""
    ended = jnp.cumsum(tokens[:, 1:] == 2, axis=1) - (tokens[:, 1:] == 2) > 0
    found = jnp.where(ended, problems.NOBODY, problems.POLICY)
    return jnp.concatenate([jnp.zeros((tokens.shape[0], 1), found.dtype), found], axis=1)


PROBLEM = problems.TokenProblem(
    num_prompts=PROMPTS,
    num_actions=ACTIONS,
    horizon=HORIZON,
    logits=lambda params, tokens: params[tokens[:, 0]],
    reward=_reward,
    roles=_roles,
)
PARAMS = jax.random.normal(jax.random.key(0), (PROMPTS, 1 + HORIZON, ACTIONS))
OUTPUTS = functools.partial(problems.outputs, PROBLEM)


@functools.cache
def rollout(seed=0):
    made = jax.jit(lambda key: problems.sample(PROBLEM, PARAMS, key, group_size=GROUP))(
        jax.random.key(seed)
    )
    old = jax.jit(lambda r: OUTPUTS(PARAMS, r, objectives.objective.OLD_NEEDS))(made)
    return made.replace(old=old)


@functools.cache
def _jitted(objective):
    def run(given):
        prepared, memory = objective.prepare_and_remember(given)

        def loss(params):
            return objective.value(OUTPUTS(params, prepared, objective.needs), prepared)

        value, gradient = jax.value_and_grad(loss)(PARAMS * 1.05)
        return prepared, memory, value, gradient

    return jax.jit(run)


def outcome(objective, given):
    """Prepared rollout, memory, loss and gradient a little off-policy."""
    if objective.memory is not None and given.memory is None:
        given = given.replace(memory=objective.memory.init())
    return _jitted(objective)(given)


def assert_same(left, right):
    for a, b in zip(left[2:], right[2:], strict=True):
        np.testing.assert_array_equal(a, b)


SUBSET = jax.jit(downsample.max_variance_subset)

# --- D3S ------------------------------------------------------------------------------------------

BASE = dataclasses.replace(objectives.grpo(), aggregate=aggregate.token_mean)
D3S = selection.d3s(steps=10)


def after(objective, batches, given):
    memory = objective.memory.init()
    return given.replace(memory=memory._replace(added=jnp.int32(batches)))


def test_d3s_ends_as_its_base_bit_for_bit():
    objective = D3S
    want = outcome(BASE, rollout())
    for batches in (10, 25):
        assert_same(outcome(objective, after(objective, batches, rollout())), want)
    assert not np.array_equal(outcome(objective, rollout())[3], want[3])


def test_d3s_keeps_the_rows_and_tokens_it_should():
    objective = selection.d3s(steps=10, rows=(0.5, 1.0), tokens=(0.2, 0.8))
    given = rollout(1)
    advantages = np.asarray(outcome(BASE, given)[0].advantages)
    size = PROMPTS * GROUP
    for batches in (0, 3, 7):
        prepared, memory, *_ = outcome(objective, after(objective, batches, given))
        assert memory.added == batches + 1 and memory.own is None
        progress = batches / 10
        number = int(np.floor(size * (0.5 + 0.5 * progress) + 1e-6))
        rows = np.asarray(SUBSET(advantages, number))
        inside = np.asarray(given.mask) & rows[:, None]
        kept = np.asarray(prepared.mask)
        assert kept.sum() == int(np.ceil(inside.sum() * (0.2 + 0.6 * progress) - 1e-6))
        assert not kept[~inside].any()
        key = np.abs(advantages)[:, None] * np.asarray(given.old.entropy)
        assert key[kept].min() >= key[inside & ~kept].max()
        np.testing.assert_array_equal(prepared.advantages, advantages)  # not normalised anew


def test_d3s_without_signal_has_zero_loss():
    objective = D3S
    _, _, loss, gradient = outcome(objective, rollout().replace(rewards=jnp.full(12, 0.3)))
    assert loss == 0 and not gradient.any()
    silent = rollout().old.replace(entropy=jnp.zeros_like(rollout().old.entropy))
    first, second = (outcome(objective, rollout().replace(old=silent)) for _ in range(2))
    np.testing.assert_array_equal(first[0].mask, second[0].mask)
    assert np.isfinite(first[2])


def test_d3s_leaves_failed_verifiers_and_masked_rows_out():
    def no_first_group(rollout):
        return rollout.group_ids > 0

    objective = selection.with_down_sampling(
        dataclasses.replace(BASE, mask=no_first_group), steps=3, rows=(1.0, 1.0), tokens=(1.0, 1.0)
    )
    given = rollout()
    prepared, *_ = outcome(objective, given.replace(rewards=given.rewards.at[7].set(jnp.nan)))
    want = np.asarray(given.mask).copy()
    want[:4] = want[7] = False
    np.testing.assert_array_equal(prepared.mask, want)


def test_groups_can_be_chosen_from_one_by_one():
    objective = selection.with_down_sampling(
        BASE,
        steps=3,
        rows=(0.5, 1.0),
        tokens=(1.0, 1.0),
        subset=selection.most_varied_rows_of_groups,
    )
    prepared, *_ = outcome(objective, rollout())
    rows = np.asarray(prepared.mask).any(1).reshape(PROMPTS, GROUP)
    np.testing.assert_array_equal(rows.sum(1), 2)
    for rewards, kept in zip(np.asarray(rollout().rewards).reshape(rows.shape), rows, strict=True):
        assert np.ptp(rewards[kept]) == pytest.approx(np.ptp(rewards))


def test_rows_of_a_trajectory_stay_together():
    given = rollout().replace(trajectory_ids=jnp.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8]))
    objective = selection.with_down_sampling(BASE, steps=3, rows=(0.5, 1.0), tokens=(1.0, 1.0))
    prepared, *_ = outcome(objective, given)
    rows = np.asarray(prepared.mask).any(1)
    for pair in ((0, 1), (4, 5), (8, 9)):
        assert rows[pair[0]] == rows[pair[1]]
    assert len(set(np.asarray(given.trajectory_ids)[rows].tolist())) == 4  # floor of half of 9


def test_down_sampling_combines_with_other_parts_and_their_memory():
    """A GSPO ratio, token advantages and a memory of their own under the same selection."""

    def advantage(rollout):
        centred = rollout.rewards - rollout.memory["baseline"]
        return jnp.where(rollout.mask, centred[:, None], 0.0)

    base = dataclasses.replace(
        objectives.gspo(),
        advantage=advantage,
        memory=objectives.Memory(
            init=lambda: {"baseline": jnp.float32(0.5)},
            update=lambda memory, rollout: {"baseline": rollout.rewards.mean()},
        ),
    )
    objective = selection.with_down_sampling(base, steps=4, rows=(0.5, 0.5))
    prepared, memory, loss, _ = outcome(objective, rollout())
    assert memory.own["baseline"] == rollout().rewards.mean() and memory.added == 1
    want = np.asarray(rollout().rewards) - 0.5
    np.testing.assert_allclose(prepared.advantages[:, 1], want)
    assert 0 < prepared.mask.sum() < rollout().mask.sum() and np.isfinite(loss)


# --- GTPO -----------------------------------------------------------------------------------------

GTPO = selection.gtpo()
CONFLICTS = jax.jit(conflict.conflict_tokens)
OPEN = {"initial_entropy": 0.0, "threshold": float("inf")}  # the gate lets all through
GATED, UNGATED = selection.gtpo(initial_entropy=0.0), selection.gtpo(**OPEN)


def numpy_gtpo(given, *, gamma, boost, suppress, gate):
    """Gradient in the log-probs, one completion after the other."""
    rewards, ids = np.asarray(given.rewards), np.asarray(given.group_ids)
    mask, entropy = np.asarray(given.mask), np.asarray(given.old.entropy)
    a = rewards - np.array([rewards[ids == i].mean() for i in ids])
    found = CONFLICTS(given.tokens, given.mask, np.sign(a).astype(int), ids)
    want = np.zeros(mask.shape)
    for i in range(len(mask)):
        h = entropy[i][mask[i]].mean()
        if gate and h > np.log(2):
            continue
        factor = boost if a[i] > 0 else suppress if a[i] < 0 else 1.0
        weight = np.prod([np.where(np.asarray(f[i]), factor, 1.0) for f in found], axis=0)
        want[i] = mask[i] * weight * (gamma * h - a[i]) / mask[i].sum() / len(mask)
    return want


@functools.cache
def _in_logprobs(objective):
    def run(given):
        prepared = objective.prepare(given)
        outputs = OUTPUTS(PARAMS, prepared, objective.needs)
        gradient = jax.grad(lambda x: objective.value(outputs.replace(logprobs=x), prepared))
        return gradient(outputs.logprobs), prepared

    return jax.jit(run)


@pytest.mark.parametrize("gate", [False, True])
def test_gtpo_gradient_is_its_formula(gate):
    objective, given = (GATED if gate else UNGATED), rollout(2)
    mixed = jnp.where(jnp.arange(12) % 3 == 0, 0.5, 1.2)[:, None]  # rows on either side of ln 2
    given = given.replace(old=given.old.replace(entropy=given.old.entropy * 0 + mixed))
    found, prepared = _in_logprobs(objective)(given)
    want = numpy_gtpo(given, gamma=0.1, boost=2.0, suppress=0.0, gate=gate)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert np.abs(want).max() > 0.01
    assert set(np.unique(prepared.multipliers)) <= {0.0, 1.0, 2.0, 4.0}


def test_gtpo_without_its_parts_is_centred_advantages_with_sequence_means():
    objective = selection.gtpo(entropy_coefficient=0.0, boost=1.0, suppress=1.0, **OPEN)
    plain = objectives.Objective(
        advantage=objectives.dr_grpo(length=3).advantage,
        surrogate=objectives.reinforce().surrogate,
        aggregate=aggregate.sequence_mean_token_mean,
    )
    for a, b in zip(outcome(objective, rollout())[2:], outcome(plain, rollout())[2:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_gtpo_without_signal_still_lowers_entropy_unless_told_not_to():
    flat = rollout().replace(rewards=jnp.ones(12))
    prepared, _, _, gradient = outcome(UNGATED, flat)
    assert not prepared.advantages.any() and np.abs(gradient).max() > 1e-4
    _, _, loss, gradient = outcome(selection.gtpo(entropy_on_inactive=False, **OPEN), flat)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("closes", [False, True])
def test_gtpo_remembers_how_it_began(closes):
    """The gate works only where the first batch's entropy lies below ln 2."""
    objective = GTPO
    given = rollout()
    entropy = jnp.where(given.mask, 0.6 if closes else 0.8, 0.0)
    start = given.replace(old=given.old.replace(entropy=entropy))
    _, memory, *_ = outcome(objective, start)
    assert float(memory) == pytest.approx(0.6 if closes else 0.8)
    high = given.replace(
        old=given.old.replace(entropy=jnp.where(given.mask, 3.0, 0.0)), memory=memory
    )
    prepared, memory, loss, gradient = outcome(objective, high)
    assert float(memory) == pytest.approx(0.6 if closes else 0.8)
    if closes:
        assert loss == 0 and not gradient.any()
    else:
        assert np.abs(gradient).max() > 1e-4 and prepared.multipliers.max() >= 1


def test_gtpo_divided_by_conflicts():
    given = rollout(2)
    (_, plain), (_, divided) = (
        _in_logprobs(objective)(given)
        for objective in (UNGATED, selection.gtpo(divide_by_conflicts=True, **OPEN))
    )
    signs = np.sign(np.asarray(plain.advantages)).astype(int)
    found = CONFLICTS(given.tokens, given.mask, signs, given.group_ids)
    number = np.asarray(found.forward | found.backward).sum(1, keepdims=True)
    assert number.max() >= 2
    want = np.asarray(plain.multipliers) / np.maximum(number, 1)
    np.testing.assert_allclose(divided.multipliers, want, rtol=1e-6)


# --- CAPO -----------------------------------------------------------------------------------------

GRPO = objectives.grpo(epsilon=1e-4)


def test_capo_without_limits_is_grpo_bit_for_bit():
    free = objectives.capo(learning_rate=0.1, gain_limit=jnp.inf, shift_limit=jnp.inf)
    assert_same(outcome(free, rollout()), outcome(GRPO, rollout()))


def numpy_shift(given, advantages, rate):
    p = np.asarray(jax.nn.softmax(PROBLEM.logits(PARAMS, given.tokens)))
    v = np.eye(ACTIONS)[np.asarray(given.tokens)] - p
    return rate**2 / 2 * (advantages[:, None] * (v**2).sum(-1)) ** 2


def losses_of(prepared):
    return GRPO.per_token(OUTPUTS(PARAMS * 1.05, prepared, frozenset()), prepared)


def test_capo_rejects_tokens_beyond_the_limit_and_averages_over_the_rest():
    limit = 0.02
    objective = objectives.capo(learning_rate=0.5, gain_limit=jnp.inf, shift_limit=limit)
    prepared, memory, loss, _ = outcome(objective, rollout())
    shift = numpy_shift(rollout(), np.asarray(prepared.advantages), 0.5)
    accepted = np.asarray(rollout().mask) & (shift < limit)
    np.testing.assert_array_equal(prepared.mask, accepted)
    assert 0.1 < accepted.sum() / rollout().mask.sum() < 0.9 and memory == 1
    losses = np.asarray(jax.jit(losses_of)(prepared))
    means = [losses[i][k].mean() for i, k in enumerate(accepted) if k.any()]
    assert float(loss) == pytest.approx(np.mean(means), rel=1e-4)


def test_capo_limits_the_gain_too():
    tight = objectives.capo(learning_rate=0.5, gain_limit=0.05, shift_limit=jnp.inf)
    kept = np.asarray(outcome(tight, rollout())[0].mask)
    assert 0 < kept.sum() < rollout().mask.sum()
    without = rollout().replace(rewards=jnp.zeros(12))
    np.testing.assert_array_equal(outcome(tight, without)[0].mask, without.mask)  # A = 0: gain 0


def test_capo_with_everything_rejected_learns_nothing():
    objective = objectives.capo(learning_rate=1.0, gain_limit=1e-9, shift_limit=1e-9)
    given = rollout().replace(rewards=jnp.tile(jnp.array([0.0, 1.0, 2.0, 4.0]), 3))
    prepared, memory, loss, gradient = outcome(objective, given)
    assert not prepared.mask.any() and loss == 0 and not gradient.any()
    assert memory == 1  # the count is of batches


def test_capo_follows_a_schedule_and_a_temperature():
    given = rollout()
    kept = {}
    for name, options in {
        "constant": {"learning_rate": 0.25},
        "schedule": {"learning_rate": optax.linear_schedule(0.0, 0.5, 10)},
        "cooler": {"learning_rate": 1.0, "temperature": 2.0},
    }.items():
        objective = objectives.capo(gain_limit=jnp.inf, shift_limit=0.01, **options)
        kept[name] = outcome(objective, given.replace(memory=jnp.int32(5)))[0].mask
    assert 0 < kept["constant"].sum() < given.mask.sum()
    np.testing.assert_array_equal(kept["constant"], kept["schedule"])
    np.testing.assert_array_equal(kept["constant"], kept["cooler"])  # n / T² and η: alike


# --- CAPO with Adam's steps -----------------------------------------------------------------------

FREE = {"gain_limit": jnp.inf, "shift_limit": jnp.inf}
ADAM = {"vocab_size": ACTIONS, "hidden_size": 1}


def test_capo_adam_without_limits_is_grpo_bit_for_bit():
    free = objectives.capo_adam(learning_rate=0.1, **FREE, **ADAM)
    prepared, memory, *rest = outcome(free, rollout())
    want, _, *others = outcome(GRPO, rollout())
    assert_same((prepared, None, *rest), (want, None, *others))
    assert memory.steps == memory.moments.steps == 1


def numpy_capo_adam(given, advantages, moments, rate, limits):
    """Accepted tokens and the moments after them, by a loop over tokens; a bias is the head."""
    mean, square, n = moments
    p = np.asarray(jax.nn.softmax(PROBLEM.logits(PARAMS, given.tokens)), float)
    accepted, total = np.zeros(given.mask.shape, bool), np.zeros(ACTIONS)
    for i, t in zip(*np.nonzero(np.asarray(given.mask)), strict=True):
        v = np.eye(ACTIONS)[given.tokens[i, t]] - p[i, t]
        g = advantages[i] * v
        first = (0.9 * mean + 0.1 * g) / (1 - 0.9 ** (n + 1))
        second = (0.999 * square + 0.001 * g**2) / (1 - 0.999 ** (n + 1))
        u = first / (np.sqrt(second) + 1e-8)
        spread = p[i, t] @ u**2 - (p[i, t] @ u) ** 2
        gain = rate * g @ u + rate**2 / 2 * advantages[i] * ((v @ u) ** 2 - spread)
        shift = rate**2 / 2 * (v @ u) ** 2
        if abs(gain) < limits[0] and shift < limits[1]:
            accepted[i, t] = True
            total += g
    gradient = total / max(accepted.sum(), 1)
    after = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2, n + 1
    return accepted, after


@pytest.mark.parametrize("limits", [(np.inf, 1e-3), (0.05, np.inf)])
def test_capo_adam_plans_adams_steps_batch_after_batch(limits):
    objective = objectives.capo_adam(
        learning_rate=0.05, gain_limit=limits[0], shift_limit=limits[1], **ADAM
    )
    moments, memory = (np.zeros(ACTIONS), np.zeros(ACTIONS), 0), None
    for seed in range(3):
        prepared, memory, _, _ = outcome(objective, rollout(seed).replace(memory=memory))
        accepted, moments = numpy_capo_adam(
            rollout(seed), np.asarray(prepared.advantages, float), moments, 0.05, limits
        )
        np.testing.assert_array_equal(prepared.mask, accepted)
        assert 0 < accepted.sum() < rollout(seed).mask.sum()
        np.testing.assert_allclose(memory.moments.mean[:, 0], moments[0], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(memory.moments.square[:, 0], moments[1], rtol=1e-4, atol=1e-9)
        assert memory.steps == memory.moments.steps == seed + 1


def test_capo_adam_with_everything_rejected_keeps_its_moments():
    objective = objectives.capo_adam(learning_rate=1.0, gain_limit=1e-12, shift_limit=1e-12, **ADAM)
    given = rollout().replace(rewards=jnp.tile(jnp.array([0.0, 1.0, 2.0, 4.0]), 3))
    prepared, memory, loss, gradient = outcome(objective, given)
    assert not prepared.mask.any() and loss == 0 and not gradient.any()
    assert memory.steps == 1 and memory.moments.steps == 0 and not memory.moments.mean.any()


def test_capo_adam_needs_a_head_of_its_size():
    wrong = objectives.capo_adam(learning_rate=0.1, vocab_size=ACTIONS, hidden_size=4)
    with pytest.raises(ValueError, match="moments: expected 1 features"):
        wrong.prepare(rollout())
    with pytest.raises(ValueError, match="shift_limit"):
        objectives.capo_adam(learning_rate=0.1, shift_limit=0.0, **ADAM)


# --- all ------------------------------------------------------------------------------------------

RECIPES = {
    "d3s": D3S,
    "gtpo": GTPO,
    "capo": objectives.capo(learning_rate=0.5, shift_limit=0.02, gain_limit=0.2),
    "capo_adam": objectives.capo_adam(
        learning_rate=0.05, shift_limit=4e-3, gain_limit=0.07, **ADAM
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_order_labels_and_padding_do_not_matter(name):
    objective, given = RECIPES[name], rollout(3)
    loss = outcome(objective, given)[2]
    order = np.random.default_rng(0).permutation(12)
    shuffled = jax.tree.map(lambda x: x[order], given.replace(old=None, extras=None))
    old = jax.tree.map(lambda x: x[order], given.old)
    shuffled = shuffled.replace(group_ids=shuffled.group_ids * 3 - 11, old=old)
    np.testing.assert_allclose(outcome(objective, shuffled)[2], loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_empty_batches_and_failed_verifiers(name):
    objective, given = RECIPES[name], rollout()
    for broken in (
        given.replace(mask=jnp.zeros_like(given.mask)),
        given.replace(rewards=jnp.full_like(given.rewards, jnp.nan)),
    ):
        _, _, loss, gradient = outcome(objective, broken)
        assert loss == 0 and not gradient.any()


def test_errors():
    with pytest.raises(ValueError, match="steps"):
        selection.d3s(steps=0)
    for options in ({"rows": (0.0, 1.0)}, {"tokens": (0.2, 1.5)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            selection.d3s(steps=3, **options)
    for options in (
        {"boost": -1.0},
        {"suppress": -0.1},
        {"threshold": 0.0},
        {"entropy_coefficient": -1.0},
        {"initial_entropy": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            selection.gtpo(**options)
    for options in (
        {"gain_limit": 0.0},
        {"shift_limit": 0.0},
        {"temperature": 0.0},
        {"learning_rate": 0.0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            objectives.capo(**{"learning_rate": 0.1, **options})
    for objective in RECIPES.values():
        with pytest.raises(ValueError, match=r"rollout.old\."):
            objective.prepare(rollout().replace(old=None))
