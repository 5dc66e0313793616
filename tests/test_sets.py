"""Advantages of sets: closed forms, exact enumeration, vines in a counting environment."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from pgjax import aggregate, diagnostics, surrogates
from pgjax.advantages import sets
from pgjax.objectives import _parts, baselines
from pgjax.sampling import vines


def mean_only(returns):
    return returns.mean(-1)


def test_subsets():
    found = sets.all_sets(4, 2)
    assert found.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    drawn = np.asarray(sets.random_sets(jax.random.key(0), 6, 3, 50))
    assert drawn.shape == (50, 3) and drawn.min() == 0 and drawn.max() == 5
    assert all(len(set(row)) == 3 for row in drawn.tolist())


def test_sets_of_one_are_the_mean_baseline():
    rewards = np.random.default_rng(0).uniform(size=(2, 5)).astype(np.float32)
    chosen = sets.all_sets(5, 1)
    scores = sets.set_scores(mean_only, chosen, rewards)
    found = sets.set_advantage(scores, chosen, num_members=5)
    np.testing.assert_allclose(found, rewards - rewards.mean(-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_additive_scores_in_closed_form(size):
    rewards = np.random.default_rng(1).uniform(size=6).astype(np.float32)
    chosen = sets.all_sets(6, size)
    found = sets.set_advantage(sets.set_scores(mean_only, chosen, rewards), chosen, num_members=6)
    want = (6 - size) / (size * 5) * (rewards - rewards.mean())
    np.testing.assert_allclose(found, want, atol=1e-6)
    if size == 6:
        np.testing.assert_allclose(found, 0.0, atol=1e-7)


def test_equal_to_a_loop_over_sets():
    rng = np.random.default_rng(2)
    rewards = rng.uniform(size=5)
    labels = np.array([0, 1, 0, 3, 1])
    chosen = np.array([[0, 1, 2], [3, 1, 0], [2, 3, 0]])  # member 4 is in none
    scores = np.array([rewards[s].mean() * len(set(labels[s])) / 3 for s in chosen])
    want = np.zeros(5)
    for i in range(4):
        want[i] = np.mean(
            [f - scores.mean() for f, s in zip(scores, chosen, strict=True) if i in s]
        )
    got = sets.set_scores(sets.polychromic, chosen, rewards.astype(np.float32), labels)
    np.testing.assert_allclose(got, scores, rtol=1e-6)
    found = sets.set_advantage(got, chosen, num_members=5)
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert found[4] == 0.0
    # A set that does not count.
    where = np.array([True, False, True])
    found = sets.set_advantage(got, chosen, num_members=5, where=where)
    mean = scores[where].mean()
    np.testing.assert_allclose(found[1], scores[0] - mean, atol=1e-6)
    np.testing.assert_allclose(found[3], scores[2] - mean, atol=1e-6)


def test_polychromic_scores():
    assert sets.unique_fraction(np.array([[3, 3, 3, 3], [1, 2, 1, 5]])).tolist() == [0.25, 0.75]
    returns = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    labels = np.array([[0, 1], [0, 1], [7, 7]])
    np.testing.assert_allclose(sets.polychromic(returns, labels), [0.5, 0.0, 0.5])
    none = sets.polychromic(returns, labels, diversity=lambda s: jnp.zeros(s.shape[:-1]))
    np.testing.assert_array_equal(none, 0.0)


def test_the_unique_one_of_equal_returns_gains_most():
    chosen = sets.all_sets(4, 2)
    returns, labels = np.ones(4, np.float32), np.array([0, 0, 2, 3])
    scores = sets.set_scores(sets.polychromic, chosen, returns, labels)
    found = np.asarray(sets.set_advantage(scores, chosen, num_members=4))
    assert found[0] == pytest.approx(found[1]) and found[2] == pytest.approx(found[3])
    assert found[2] > found[0] + 0.1
    assert found.sum() == pytest.approx(0.0, abs=1e-6)


def test_labels_of_equal_completions():
    tokens = np.array([[9, 1, 2, 3], [9, 1, 2, 3], [9, 1, 2, 4], [8, 1, 2, 5], [9, 1, 2, 0]])
    mask = np.array([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]], bool)
    # The prompt and what is behind the end do not count.
    assert sets.duplicate_labels(tokens, mask).tolist() == [0, 0, 2, 3, 3]
    twice = sets.duplicate_labels(np.stack([tokens, tokens[::-1]]), np.stack([mask, mask[::-1]]))
    assert twice.tolist() == [[0, 0, 2, 3, 3], [0, 0, 2, 3, 3]]


LOGITS = jnp.array([[0.8, -0.3, 0.1]])
REWARDS = jnp.array([[1.0, 0.8, 0.0]])


def expected_score(logits, size):
    """E f over independent draws, differentiably."""
    policy = jax.nn.softmax(logits[0])
    draws = jnp.array(list(itertools.product(range(3), repeat=size)))
    scores = sets.polychromic(REWARDS[0][draws], draws)
    return jnp.sum(jnp.prod(policy[draws], axis=-1) * scores)


def raw_objective(group_size, chosen, *, offset=0.0):
    def advantage(rollout):
        found = sets.grouped_set_advantage(
            sets.polychromic,
            chosen,
            rollout.group_ids,
            jnp.isfinite(rollout.rewards),
            rollout.rewards,
            rollout.tokens[:, 1],
            group_size=group_size,
        )
        return found + offset

    return dataclasses.replace(
        baselines.polychromic(group_size=group_size, set_size=1),
        advantage=advantage,
        surrogate=_parts.score_function,
        aggregate=aggregate.sequence_mean_token_sum,
    )


@pytest.mark.parametrize(("group_size", "size"), [(3, 2), (4, 3)])
def test_expected_gradient_over_all_subsets(group_size, size):
    found = diagnostics.expected_gradient(
        raw_objective(group_size, sets.all_sets(group_size, size)),
        LOGITS,
        REWARDS,
        group_size=group_size,
    )
    want = (1 / size - 1 / group_size) * jax.grad(expected_score)(LOGITS, size)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_expected_gradient_of_a_fixed_choice_of_sets():
    """Member i of k_i of M sets: (1 - k_i / M) / n; members of no set: nothing. A constant added to
    all changes nothing."""
    chosen = np.array([[0, 1], [0, 2]])
    found = diagnostics.expected_gradient(
        raw_objective(4, chosen, offset=0.7), LOGITS, REWARDS, group_size=4
    )
    share = (0.0 + 0.5 + 0.5 + 0.0) / 2 / 4
    want = share * jax.grad(expected_score)(LOGITS, 2)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_score_function_of_one_set_is_the_gradient():
    """E[(f - b) Σ_i ∇ log π(y_i)] for a set alone, whatever the baseline b."""
    size = 3
    draws = np.array(list(itertools.product(range(3), repeat=size)))
    policy = jax.nn.softmax(LOGITS[0])
    scores = sets.polychromic(REWARDS[0][draws], draws)

    def surrogate(logits, baseline):
        logprobs = jax.nn.log_softmax(logits)[0][draws]
        losses = surrogates.score_function(logprobs, scores - baseline)
        return -jnp.sum(jnp.prod(policy[draws], axis=-1) * losses.sum(-1))

    want = jax.grad(expected_score)(LOGITS, size)
    for baseline in (0.0, float(expected_score(LOGITS, size)), 3.0):
        found = jax.grad(surrogate)(LOGITS, baseline)
        np.testing.assert_allclose(found, want, atol=2e-6)


def test_flat_rows_in_any_order():
    rng = np.random.default_rng(3)
    rewards = rng.uniform(size=8).astype(np.float32)
    labels = rng.integers(0, 3, 8)
    ids = np.array([5, 2, 2, 5, 2, 5, 5, 2])
    valid = np.ones(8, bool)
    valid[4] = False
    rewards[4] = np.nan
    chosen = sets.all_sets(4, 2)
    found = jax.jit(
        lambda i, v, r, s: sets.grouped_set_advantage(
            sets.polychromic, chosen, i, v, r, s, group_size=4
        )
    )(ids, valid, rewards, labels)
    for group in (2, 5):
        rows = np.flatnonzero(ids == group)
        for i in rows:
            scores, mine = [], []
            for pair in itertools.combinations(rows, 2):
                if valid[list(pair)].all():
                    scores.append(rewards[list(pair)].mean() * len(set(labels[list(pair)])) / 2)
                    mine.append(i in pair)
            want = (np.array(scores)[mine] - np.mean(scores)).mean() if any(mine) else 0.0
            assert float(found[i]) == pytest.approx(want, abs=1e-6)
    # Groups of another size: an error where ids can be seen, otherwise visible.
    wrong = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="every id on 4 rows, got one on 5"):
        sets.group_order(wrong, group_size=4)

    def run(i):
        return sets.grouped_set_advantage(
            mean_only, chosen, i, jnp.ones(8, bool), jnp.ones(8), group_size=4
        )

    assert np.isnan(jax.jit(run)(wrong)).any()
    error, _ = checkify.checkify(jax.jit(run), errors=checkify.user_checks)(jnp.asarray(wrong))
    assert "expected every id on 4 rows" in error.get()


def test_first_steps_of_a_vine():
    found = sets.in_first_steps(jnp.array([5.0, 6.0]), jnp.arange(6.0).reshape(3, 2), window=2)
    np.testing.assert_array_equal(found, [[5, 6], [5, 6], [4, 5]])


def test_bad_sets():
    with pytest.raises(ValueError, match="set_size"):
        sets.all_sets(3, 4)
    with pytest.raises(ValueError, match="at most 100000 subsets"):
        sets.all_sets(40, 10)
    with pytest.raises(ValueError, match="num_sets"):
        sets.random_sets(jax.random.key(0), 4, 2, 0)
    with pytest.raises(ValueError, match="set_size"):
        sets.random_sets(jax.random.key(0), 4, 5, 1)
    returns = np.ones(4, np.float32)
    for wrong, message in (
        (np.zeros((0, 2), int), "at least one set"),
        (np.array([[0, 0]]), "got one twice"),
        (np.array([[0, 4]]), r"members in \[0, 4\)"),
        (np.array([[0, 1, 2, 3, 4]]), "at most 4 members"),
        (np.array([0, 1]), "rank 2"),
    ):
        with pytest.raises(ValueError, match=message):
            sets.set_scores(mean_only, wrong, returns)
    with pytest.raises(ValueError, match="one for each set"):
        sets.set_advantage(returns, np.array([[0, 1]]), num_members=4)
    for wrong in (1.5, -0.5):
        with pytest.raises(ValueError, match=r"returns: expected numbers in \[0, 1\]"):
            sets.polychromic(returns * wrong, np.arange(4))
    checked = checkify.checkify(jax.jit(sets.polychromic), errors=checkify.user_checks)
    assert "returns: expected" in checked(2 * returns, np.arange(4))[0].get()
    with pytest.raises(ValueError, match="8 rows cannot be groups of group_size=3"):
        sets.group_order(np.zeros(8, int), group_size=3)
    with pytest.raises(ValueError, match="window"):
        sets.in_first_steps(jnp.ones(2), jnp.ones((3, 2)), window=-1)
    with pytest.raises(ValueError, match="others: expected shape"):
        sets.in_first_steps(jnp.ones(2), jnp.ones((3, 3)), window=1)


# Vines: a walk on the integers that ends at its goal and pays there.


def walk(state, action, key):
    moved = {"x": state["x"] + action, "goal": state["goal"], "noise": jax.random.normal(key)}
    done = moved["x"] >= moved["goal"]
    return moved, done.astype(jnp.float32), done


def observe(state):
    return state["x"]


def policy(observation, key):
    action = jax.random.bernoulli(key, 0.5).astype(jnp.int32)
    return action, jnp.log(0.5)


def start(goal):
    return {"x": jnp.int32(0), "goal": jnp.int32(goal), "noise": jnp.float32(0)}


def test_evenly_spaced_states():
    mask = np.arange(10) < 7
    assert sets_of(mask, 2) == [0, 3] and sets_of(mask, 3) == [0, 2, 4]
    assert sets_of(np.arange(10) < 1, 3) == [0, 0, 0]


def sets_of(mask, count):
    return vines.evenly_spaced(mask, num_states=count).tolist()


def test_vines_begin_where_the_trajectory_was():
    run = jax.jit(
        lambda key: vines.vine_rollout(
            walk, observe, policy, start(4), key, num_states=3, num_vines=5, horizon=12
        )
    )
    for seed in range(4):
        found = run(jax.random.key(seed))
        trunk, branches = found.trunk, found.branches
        length = int(trunk.mask.sum())
        assert trunk.mask.tolist() == [t < length for t in range(12)]
        # Positions are the running sum of actions, and stand still behind the goal.
        taken = np.where(trunk.mask, trunk.action, 0)
        np.testing.assert_array_equal(trunk.state["x"], np.cumsum(taken) - taken)
        assert int(trunk.last_state["x"]) == taken.sum() <= 4
        assert float(trunk.reward.sum()) == float(taken.sum() == 4) == float(trunk.terminated.sum())
        assert found.starts.tolist() == [k * length // 3 for k in range(3)]
        assert branches.reward.shape == (3, 5, 12)
        begin = np.asarray(trunk.state["x"])[np.asarray(found.starts)]
        np.testing.assert_array_equal(branches.state["x"][:, :, 0], np.repeat(begin[:, None], 5, 1))
        assert np.all(branches.state["goal"] == 4)
        taken = np.where(branches.mask, branches.action, 0)
        np.testing.assert_array_equal(branches.last_state["x"], begin[:, None] + taken.sum(-1))
        # Continuations are independent: they differ from each other.
        assert len({tuple(row) for row in np.asarray(branches.action)[0].tolist()}) > 1
        np.testing.assert_allclose(branches.log_prob, np.where(branches.mask, np.log(0.5), 0.0))


def test_vines_of_an_episode_that_is_over_have_no_steps():
    found = vines.unroll(
        walk, observe, policy, start(2), jax.random.key(0), horizon=5, ended=jnp.bool_(True)
    )
    assert not found.mask.any() and not found.reward.any()
    assert int(found.last_state["x"]) == 0


def test_vines_and_sets_together():
    """Success of continuations from one state, scored in sets, for many trajectories at once."""

    def one(key):
        return vines.vine_rollout(
            walk,
            observe,
            policy,
            start(3),
            key,
            num_states=2,
            num_vines=4,
            horizon=8,
            vine_horizon=5,
        )

    found = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 6)).branches
    returns, steps = found.reward.sum(-1), found.mask.sum(-1)
    assert returns.shape == (6, 2, 4)
    chosen = sets.all_sets(4, 2)
    scores = sets.set_scores(sets.polychromic, chosen, returns, steps)
    advantage = sets.set_advantage(scores, chosen, num_members=4)
    np.testing.assert_allclose(advantage.sum(-1), 0.0, atol=1e-5)
    whole = jnp.moveaxis(jnp.zeros(found.reward.shape), -1, 0)
    mixed = sets.in_first_steps(advantage, whole, window=3)
    np.testing.assert_array_equal(mixed[2], advantage)
    assert not mixed[3:].any()


def test_bad_vines():
    options = {"num_states": 1, "num_vines": 2, "horizon": 3}
    for name in options:
        with pytest.raises(ValueError, match=name):
            vines.vine_rollout(
                walk, observe, policy, start(2), jax.random.key(0), **{**options, name: 0}
            )
    for state in (object(), {"simulator": "handle"}, {}):
        with pytest.raises(ValueError, match="state: expected a pytree of arrays"):
            vines.unroll(walk, observe, policy, state, jax.random.key(0), horizon=3)
