"""Advantages by stratum, half and group weight, and novelty, against NumPy and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import advantages, curriculum, logprobs
from pgjax.advantages import conditional, novelty, reweight, stratified

ONE_GROUP = np.zeros(4, np.int32)


def san(rewards, ids, strata, *, alpha=1.0, num_groups=4, epsilon=1e-8, ddof=0):
    function = compiled_san(num_groups, epsilon, ddof)
    rewards = np.asarray(rewards, np.float32)
    return np.asarray(function(rewards, ids, np.asarray(strata, np.int32), alpha))


@functools.cache
def compiled_san(num_groups, epsilon, ddof):
    return jax.jit(
        lambda rewards, ids, strata, alpha: stratified.stratified_advantage(
            rewards, ids, strata, num_groups=num_groups, alpha=alpha, epsilon=epsilon, ddof=ddof
        )
    )


def random_batch(seed, rows=40, groups=4, strata=3):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=rows).astype(np.float32),
        rng.integers(0, groups, rows).astype(np.int32),
        rng.integers(0, strata, rows).astype(np.int32),
    )


# --- strata ---------------------------------------------------------------------------------------


def test_strata_of_the_worked_example():
    rewards, strata = [1.0, 0.0, 3.0, 1.0], [0, 0, 1, 1]
    np.testing.assert_allclose(
        san(rewards, ONE_GROUP, strata, epsilon=0.0), [1, -1, 1, -1], rtol=1e-6
    )
    np.testing.assert_allclose(
        san(rewards, ONE_GROUP, strata, alpha=0.0, epsilon=0.0),
        [-0.229416, -1.147079, 1.605910, -0.229416],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        san(rewards, ONE_GROUP, strata, alpha=0.8, epsilon=0.0),
        0.8 * np.array([1, -1, 1, -1])
        + 0.2 * np.array([-0.229416, -1.147079, 1.605910, -0.229416]),
        rtol=1e-5,
    )


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_strata_equal_a_loop(alpha, ddof):
    rewards, ids, strata = random_batch(0)
    epsilon = 0.01
    want = np.zeros(len(rewards))
    for i in range(len(rewards)):
        group = rewards[ids == ids[i]]
        own = rewards[(ids == ids[i]) & (strata == strata[i])]
        within = (
            0.0 if len(own) == 1 else (rewards[i] - own.mean()) / (own.std(ddof=ddof) + epsilon)
        )
        overall = (rewards[i] - group.mean()) / (group.std(ddof=ddof) + epsilon)
        want[i] = alpha * within + (1 - alpha) * overall
    found = san(rewards, ids, strata, alpha=alpha, epsilon=epsilon, ddof=ddof)
    np.testing.assert_allclose(found, want, atol=2e-6)
    # Labels are only labels, also where their product with the groups would overflow int32.
    other = np.array([-7, 2**31 - 1, 11], np.int32)[strata]
    np.testing.assert_array_equal(
        san(rewards, ids, other, alpha=alpha, epsilon=epsilon, ddof=ddof), found
    )


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_one_stratum_is_group_normalisation(alpha):
    rewards, ids, _ = random_batch(1)
    plain = advantages.group_normalize(rewards, ids, num_groups=4, epsilon=1e-8, ddof=0)
    found = san(rewards, ids, np.zeros_like(ids), alpha=alpha)
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_no_blend_is_group_normalisation_exactly():
    rewards, ids, strata = random_batch(2)
    rewards[3] = np.nan
    plain = advantages.group_normalize(rewards, ids, num_groups=4, epsilon=1e-8, ddof=0)
    np.testing.assert_array_equal(san(rewards, ids, strata, alpha=0.0), plain)


def test_a_stratum_each_leaves_nothing_to_compare():
    rewards, ids, _ = random_batch(3)
    each = np.arange(len(rewards))
    assert not san(rewards, ids, each, alpha=1.0).any()
    plain = san(rewards, ids, each, alpha=0.0)
    np.testing.assert_allclose(san(rewards, ids, each, alpha=0.25), 0.75 * plain, rtol=1e-6)


def test_within_strata_level_and_scale_do_not_matter():
    rewards, ids, strata = random_batch(4)
    plain = san(rewards, ids, strata, epsilon=0.0)
    moved = rewards * np.array([2.0, 0.5, 4.0])[strata] + np.array([3.0, -1.0, 0.5])[strata]
    np.testing.assert_allclose(san(moved, ids, strata, epsilon=0.0), plain, atol=1e-5)


def test_moments_and_the_two_decompositions():
    rewards, ids, strata = random_batch(5, rows=60, groups=1)
    whole = san(rewards, ids, strata, epsilon=0.0)
    overall = san(rewards, ids, strata, alpha=0.0, epsilon=0.0)
    assert abs(whole.mean()) < 1e-6
    mean, spread, within = rewards.mean(), rewards.std(), np.zeros(60)
    between = 0.0
    for k in range(3):
        own = strata == k
        assert abs(whole[own].mean()) < 1e-6
        assert whole[own].var() == pytest.approx(1.0, abs=1e-5)
        level, scale = rewards[own].mean(), rewards[own].std()
        within[own] = rewards[own] - level
        between += own.sum() / 60 * (level - mean) ** 2
        np.testing.assert_allclose(
            overall[own], scale / spread * whole[own] + (level - mean) / spread, atol=1e-5
        )
    # The same deviations by the library's own centring, whose variance falls by what lies between.
    centered = np.asarray(advantages.centered(rewards, ids, num_groups=1))
    by_stratum = np.asarray(advantages.centered(rewards, strata, num_groups=3))
    np.testing.assert_allclose(by_stratum, within, atol=1e-6)
    assert centered.var() - by_stratum.var() == pytest.approx(between, abs=1e-6)


def test_pure_strata_lack_the_gradient_of_the_choice_between_them():
    # A population: arm a of stratum k occurs counts[k, a] times, so batch means are expectations.
    counts = np.array([[1, 2, 1], [3, 3, 2]])
    values = np.array([[0.0, 1.0, 2.0], [5.0, 2.0, 4.0]])
    p = (counts / counts.sum()).ravel()
    mean = (counts * values).sum(1) / counts.sum(1)
    spread = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1))
    values = values / spread[:, None]  # every stratum's spread is 1: A is R - mean_k itself
    mean = mean / spread
    arms = np.repeat(np.arange(6), counts.ravel())
    found = san(values.ravel()[arms], np.zeros_like(arms), arms // 3, epsilon=0.0)
    score = np.eye(6)[arms] - p  # ∇ log π of a softmax over the six arms
    expected = (found[:, None] * score).mean(0)

    def objective(logits):
        q = jax.nn.softmax(logits)
        by_stratum = q.reshape(2, 3).sum(1)
        return q @ values.ravel() - by_stratum @ mean

    want = jax.grad(objective)(jnp.log(jnp.asarray(p)))
    np.testing.assert_allclose(expected, want, atol=1e-5)
    # In a policy that first chooses the stratum, that choice has exactly no gradient.
    np.testing.assert_allclose(expected.reshape(2, 3).sum(1), 0.0, atol=1e-6)
    blended = san(values.ravel()[arms], np.zeros_like(arms), arms // 3, alpha=0.5, epsilon=0.0)
    assert abs((blended[:, None] * score).mean(0).reshape(2, 3).sum(1)).min() > 0.05


def test_rows_that_do_not_count_and_failed_verifiers():
    rewards = jnp.array([1.0, 0.0, np.nan, 1.0, 9.0])
    ids, strata = np.zeros(5, np.int32), np.array([0, 0, 0, 1, 1], np.int32)
    where = jnp.array([True, True, True, True, False])
    found = stratified.stratified_advantage(
        rewards, ids, strata, num_groups=1, alpha=1.0, where=where
    )
    np.testing.assert_allclose(found, [1, -1, 0, 0, 0], atol=1e-6)


def test_strata_without_jit():
    rewards, ids, strata = random_batch(6)
    found = stratified.stratified_advantage(rewards, ids, strata, num_groups=4, alpha=0.3)
    np.testing.assert_allclose(found, san(rewards, ids, strata, alpha=0.3), rtol=1e-5)
    outside = np.r_[9, ids[1:]].astype(np.int32)
    assert np.isnan(san(rewards, outside, strata)[0])


def test_buckets_of_counts():
    counts = jnp.array([-1, 0, 1, 2, 3, 9])
    assert stratified.stratum_of_count(counts, (1, 3)).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="edges: expected ascending"):
        stratified.stratum_of_count(counts, (3, 3))
    with pytest.raises(ValueError, match="counts: expected an integer"):
        stratified.stratum_of_count(jnp.ones(3), (1,))


def test_bad_strata():
    rewards, ids, strata = random_batch(7)
    function = functools.partial(stratified.stratified_advantage, num_groups=4, alpha=0.5)
    with pytest.raises(ValueError, match="alpha: expected a number in"):
        function(rewards, ids, strata, alpha=1.1)
    with pytest.raises(ValueError, match="strata: expected shape"):
        function(rewards, ids, strata[1:])
    with pytest.raises(ValueError, match="strata: expected an integer"):
        function(rewards, ids, strata.astype(np.float32))
    with pytest.raises(ValueError, match="expected ids in"):
        function(rewards, ids, strata, num_groups=2)
    with pytest.raises(ValueError, match="ddof"):
        function(rewards, ids, strata, ddof=2)


# --- halves ---------------------------------------------------------------------------------------


def canon(rewards, metric, ids=None, *, num_groups=1, **options):
    ids = np.zeros(len(rewards), np.int32) if ids is None else ids
    rewards, metric = np.asarray(rewards, np.float32), np.asarray(metric, np.float32)
    options = {"mix": 1.0, "high_discount": 1.0, "low_discount": 1.0, "offset": 0.0, **options}
    return np.asarray(compiled_canon(num_groups)(rewards, metric, ids, options))


@functools.cache
def compiled_canon(num_groups):
    @jax.jit
    def function(rewards, metric, ids, options):
        high = conditional.median_split(metric, ids, num_groups=num_groups)
        return conditional.conditional_advantage(
            rewards, ids, high, num_groups=num_groups, **options
        )

    return function


def test_halves_of_the_worked_example():
    rewards, metric = [1.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.3, 0.4]
    assert canon(rewards, metric, mix=1.0).tolist() == [0, -1, 0.5, 0.5]
    assert canon(rewards, metric, mix=0.0).tolist() == [0.5, -0.5, 0, 0]
    assert canon(rewards, metric, mix=0.5).tolist() == [0.25, -0.75, 0.25, 0.25]


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_halves_equal_a_loop(seed, mix):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(7), np.arange(1, 8))).astype(np.int32)
    rewards = rng.normal(size=28).astype(np.float32)
    metric = rng.integers(0, 4, 28)  # with ties
    want = np.zeros(28)
    for group in range(7):
        rows = np.flatnonzero(ids == group)
        ranked = sorted(rows, key=lambda i: metric[i])
        low, high = ranked[: len(rows) // 2], ranked[len(rows) // 2 :]
        for i in rows:
            own, other = (high, low) if i in high else (low, high)
            inter = rewards[i] - (rewards[other].mean() if other else 0.0)
            intra = rewards[i] - (rewards[own].mean() if len(rows) > 1 else 0.0)
            want[i] = mix * inter + (1 - mix) * intra
    found = canon(rewards, metric, ids, num_groups=7, mix=mix)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_even_groups_at_one_half_are_centred(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=14).astype(np.float32)
    ids = rng.permutation(np.repeat(np.arange(3), [2, 4, 8])).astype(np.int32)
    want = rewards - np.array([rewards[ids == i].mean() for i in ids])
    for metric in (rng.normal(size=14), np.zeros(14)):
        found = canon(rewards, metric, ids, num_groups=3, mix=0.5)
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_sums_directions_and_transforms_of_halves():
    rng = np.random.default_rng(0)
    rewards, metric = rng.normal(size=8).astype(np.float32), rng.normal(size=8)
    high = np.asarray(conditional.median_split(metric, np.zeros(8, np.int32), num_groups=1))
    assert high.sum() == 4 and metric[high].min() > metric[~high].max()
    intra, inter = canon(rewards, metric, mix=0.0), canon(rewards, metric, mix=1.0)
    for half in (high, ~high):
        assert abs(intra[half].sum()) < 1e-5
    assert abs(inter.sum()) < 1e-5
    for mix in (0.0, 0.3, 1.0):
        found = canon(rewards, metric, mix=mix)
        np.testing.assert_allclose(canon(rewards, -metric, mix=mix), found, atol=1e-6)
        np.testing.assert_array_equal(canon(rewards, np.exp(3 * metric) + 7, mix=mix), found)


def test_small_groups_and_equal_rewards():
    for mix in (0.0, 0.5, 1.0):
        assert canon([3.0], [1.0], mix=mix).tolist() == [3.0]
        assert not canon([0.1] * 5, np.arange(5), mix=mix).any()
    assert canon([3.0, 1.0], [1.0, 2.0], mix=1.0).tolist() == [2.0, -2.0]


def test_all_right_answers_in_one_half():
    rewards, metric = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0], [0, 1, 5, 2, 4, 3]
    found = canon(rewards, metric, mix=1.0)
    # The upper half is rows 2, 4, 5, of mean 2/3.
    np.testing.assert_allclose(found, [-2 / 3, -2 / 3, 1, -2 / 3, 1, 0], atol=1e-6)


def test_tilted_halves():
    rewards, metric = np.array([1.0, 0.0, 1.0, 0.5]), [0, 1, 2, 3]  # means 1/2 and 3/4
    found = canon(rewards, metric, high_discount=0.8)
    np.testing.assert_allclose(found, [1 - 0.6, -0.6, 0.8 - 0.5, 0.4 - 0.5], atol=1e-6)
    found = canon(rewards, metric, low_discount=0.8)
    np.testing.assert_allclose(found, [0.8 - 0.75, -0.75, 1 - 0.4, 0.5 - 0.4], atol=1e-6)
    plain = canon(rewards, metric)
    np.testing.assert_allclose(
        canon(rewards, metric, offset=0.1) - plain, [-0.1, -0.1, 0.1, 0.1], atol=1e-6
    )
    np.testing.assert_allclose(  # the tilt is of `inter` alone
        canon(rewards, metric, mix=0.0, high_discount=0.5, offset=1.0),
        canon(rewards, metric, mix=0.0),
    )


def test_halves_with_rows_that_do_not_count():
    rewards = jnp.array([1.0, np.nan, 0.0, 1.0, 0.0, 5.0])
    ids = np.zeros(6, np.int32)
    where = jnp.array([True, True, True, True, True, False])
    counted = jnp.isfinite(rewards) & where
    metric = jnp.array([0.0, -5.0, 1.0, 2.0, 3.0, 2.5])
    high = conditional.median_split(metric, ids, num_groups=1, where=counted)
    assert high.tolist() == [False, False, False, True, True, True]
    found = conditional.conditional_advantage(rewards, ids, high, num_groups=1, where=where)
    np.testing.assert_allclose(found, [0.5, 0, -0.5, 0.5, -0.5, 4.5], atol=1e-6)


def test_halves_without_jit():
    rewards, ids, metric = random_batch(8)
    high = conditional.median_split(metric, ids, num_groups=4)
    found = conditional.conditional_advantage(rewards, ids, high, num_groups=4, mix=0.3)
    want = canon(rewards, metric, ids, num_groups=4, mix=0.3)
    np.testing.assert_allclose(found, want, atol=1e-6)
    outside = np.r_[9, ids[1:]].astype(np.int32)
    assert np.isnan(canon(rewards, metric, outside, num_groups=4)[0])


def test_bad_halves():
    rewards, high = jnp.zeros(4), jnp.zeros(4, bool)
    split = functools.partial(conditional.median_split, num_groups=1)
    advantage = functools.partial(conditional.conditional_advantage, num_groups=1)
    with pytest.raises(ValueError, match="metric: expected numbers, got NaN"):
        split(np.array([0.0, np.nan, 1.0, 2.0]), ONE_GROUP)
    with pytest.raises(ValueError, match="group_ids: expected shape"):
        split(np.zeros(3), ONE_GROUP)
    with pytest.raises(ValueError, match="mix: "):
        advantage(rewards, ONE_GROUP, high, mix=1.5)
    with pytest.raises(ValueError, match="high_discount: "):
        advantage(rewards, ONE_GROUP, high, high_discount=-0.1)
    with pytest.raises(ValueError, match="high: expected dtype bool"):
        advantage(rewards, ONE_GROUP, rewards)
    with pytest.raises(ValueError, match="high: expected shape"):
        advantage(rewards, ONE_GROUP, high[1:])


# --- mixing ---------------------------------------------------------------------------------------


def test_mix_by_accuracy():
    rewards = jnp.array([1.0, 0.0, np.nan, 1.0, 0.2])
    assert float(curriculum.accuracy_mix(rewards)) == pytest.approx(0.5)
    where = jnp.array([True, True, True, False, True])
    assert float(curriculum.accuracy_mix(rewards, where=where)) == pytest.approx(1 / 3)
    assert float(curriculum.accuracy_mix(jnp.array([np.nan]))) == 0.0
    with pytest.raises(ValueError, match="rewards: expected rank 1"):
        curriculum.accuracy_mix(jnp.zeros((2, 2)))


def test_cosine_restarts():
    schedule = jax.jit(jax.vmap(curriculum.cosine_restarts))
    steps = jnp.array([0, 15, 30, 50, 70, 90, 110, 130, 149, 150, 999])
    last = 0.3 * (1 + np.cos(np.pi * 39 / 40))
    want = [0.0, 0.3, 0.6, 0.3, 0.6, 0.3, 0.6, 0.3, last, 0.0, 0.0]
    np.testing.assert_allclose(schedule(steps), want, atol=1e-6)
    assert float(curriculum.cosine_restarts(0, warmup=0, total=10, cycles=1)) == pytest.approx(0.6)
    for options in ({"total": 30}, {"cycles": 0}, {"peak": 1.2}, {"floor": 0.7}, {"warmup": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            curriculum.cosine_restarts(0, **options)


# --- weights of groups ----------------------------------------------------------------------------


def utility(rewards, lengths, *, max_length=100, ids=None, num_groups=1, threshold=0.5):
    """By groups, padded to one shape by rows of a group that is then dropped."""
    ids = np.zeros(len(rewards), np.int32) if ids is None else ids
    pad = (0, 8 - len(rewards))
    found = compiled_utility(max_length, threshold)(
        np.pad(np.asarray(rewards, np.float32), pad),
        np.pad(np.asarray(lengths, np.int32), pad, constant_values=1),
        np.pad(ids, pad, constant_values=2),
    )
    return reweight.RolloutUtility(*(x[:num_groups] for x in found))


@functools.cache
def compiled_utility(max_length, threshold):
    return jax.jit(
        functools.partial(
            reweight.rollout_utility,
            num_groups=3,
            max_length=max_length,
            success_threshold=threshold,
        )
    )


def test_longest_success_against_mean_failure():
    rewards = [1.0, 1.0, 0.0, 0.0] * 2
    ids = np.repeat(np.arange(2), 4).astype(np.int32)
    found = utility(rewards, [10, 50, 20, 30, 10, 20, 30, 50], ids=ids, num_groups=2)
    assert found.longest_success.tolist() == [50, 20]
    assert found.mean_failure.tolist() == [25, 40]
    assert reweight.success_is_longer(found).tolist() == [True, False]
    assert not reweight.success_is_longer(utility([1.0, 0.0], [5, 5]))[0]  # strictly longer


@pytest.mark.parametrize("cut", [100, 150, 10_000])
def test_failures_that_were_cut_off_do_not_enter_the_mean(cut):
    found = utility([1.0, 0.0, 0.0], [30, 20, cut])
    assert float(found.mean_failure[0]) == 20 and found.has_failure[0]
    assert float(found.success_rate[0]) == pytest.approx(1 / 3)
    assert reweight.success_is_longer(found)[0]
    assert not utility([1.0, 0.0], [30, cut]).has_failure[0]


def test_rare_success():
    for right, rare in ((4, True), (5, False), (0, True)):
        found = utility([1.0] * right + [0.0] * (8 - right), [5] * 8)
        assert bool(reweight.success_is_rare(found)[0]) == rare
    strict = utility([3.0, 1.0], [5, 5], threshold=1.01)
    assert float(strict.success_rate[0]) == 0.5


def test_groups_without_success_or_failure():
    none, every = utility([0.0, 0.0], [5, 6]), utility([1.0, 1.0], [5, 6])
    empty = utility([np.nan], [5])
    longer = reweight.success_is_longer
    assert [bool(longer(u)[0]) for u in (none, every, empty)] == [False, False, False]
    assert bool(longer(none, without_success=True)[0])
    assert bool(longer(every, without_failure=True)[0])
    for found in (none, every, empty):
        assert all(np.isfinite(x).all() for x in found)
        for test in (longer, reweight.success_is_rare):
            weight = reweight.utility_weights(test(found), low=0.1, high=1.0)
            assert float(weight[0]) in (pytest.approx(0.1), 1.0)


def test_group_weights_under_jit_and_by_a_loop():
    rng = np.random.default_rng(1)
    rewards = rng.integers(0, 2, 30).astype(np.float32)
    lengths = rng.integers(1, 120, 30)
    ids = rng.integers(0, 4, 30).astype(np.int32)

    @jax.jit
    def function(rewards, lengths, ids):
        found = reweight.rollout_utility(rewards, lengths, ids, num_groups=4, max_length=100)
        chosen = reweight.success_is_longer(found) & reweight.success_is_rare(found)
        return reweight.utility_weights(chosen)

    want = []
    for group in range(4):
        own = ids == group
        right = lengths[own & (rewards == 1)]
        wrong = lengths[own & (rewards == 0) & (lengths < 100)]
        longer = right.size and wrong.size and right.max() > wrong.mean()
        want.append(2.0 if longer and right.size / own.sum() <= 0.5 else 1.0)
    assert len(set(want)) == 2
    np.testing.assert_array_equal(function(rewards, lengths, ids), want)


def test_bad_group_weights():
    def utility(rewards, lengths, **options):
        return reweight.rollout_utility(
            jnp.asarray(rewards),
            jnp.asarray(lengths),
            ONE_GROUP[: len(rewards)],
            num_groups=1,
            **{"max_length": 5, **options},
        )

    with pytest.raises(ValueError, match="lengths: expected numbers of at least 0"):
        utility([1.0], [-1])
    with pytest.raises(ValueError, match="max_length: "):
        utility([1.0], [1], max_length=0)
    with pytest.raises(ValueError, match="lengths: expected shape"):
        utility([1.0], [1, 2])
    with pytest.raises(ValueError, match="rate: "):
        reweight.success_is_rare(utility([1.0], [1]), rate=1.5)
    with pytest.raises(ValueError, match="low: "):
        reweight.utility_weights(jnp.array([True]), low=-1.0)
    with pytest.raises(ValueError, match="advantageous: expected dtype bool"):
        reweight.utility_weights(jnp.array([1.0]))


# --- novelty --------------------------------------------------------------------------------------


def novel(features, rewards, ids=None):
    """In groups, padded to one shape by rows of a group that is then dropped."""
    ids = np.zeros(len(rewards), np.int32) if ids is None else ids
    features = np.asarray(features, np.float32)
    rows, columns = (0, 12 - len(rewards)), (0, 3 - features.shape[1])
    found = NOVELTY(
        np.pad(features, (rows, columns)),
        np.pad(np.asarray(rewards, np.float32), rows),
        np.pad(ids, rows, constant_values=3),
    )
    return np.asarray(found)[: len(rewards)]


NOVELTY = jax.jit(functools.partial(novelty.feature_novelty, num_groups=4))


def test_score_features_are_the_gradient_in_the_hidden_states():
    rng = np.random.default_rng(0)
    head = jnp.asarray(rng.normal(size=(6, 9)), jnp.float32)
    hidden = jnp.asarray(rng.normal(size=(2, 4, 6)), jnp.float32)
    tokens = rng.integers(0, 9, (2, 4))
    mask = np.array([[0, 1, 1, 0], [0, 0, 0, 1]], bool)

    def mean_logprob(row):
        logits = row @ head / 0.7
        chosen = jax.nn.log_softmax(logits)[jnp.arange(3), tokens[b, 1:]]
        return jnp.sum(chosen * mask[b, 1:]) / mask[b].sum()

    found = logprobs.score_features(hidden, head, tokens, mask, temperature=0.7)
    for b in range(2):
        want = 0.7 * jax.grad(mean_logprob)(hidden[b, :-1]).sum(0)
        np.testing.assert_allclose(found[b], want, atol=1e-5)


def test_novelty_equals_a_loop():
    rng = np.random.default_rng(1)
    features, ids = rng.normal(size=(12, 3)), rng.integers(0, 3, 12).astype(np.int32)
    rewards = rng.choice([-1.0, 1.0], 12)
    want = np.zeros(12)
    for i in range(12):
        peers = [j for j in range(12) if ids[j] == ids[i] and j != i]
        weights = np.exp(rewards[peers]) / np.exp(rewards[peers]).sum()
        norm = np.linalg.norm(features, axis=1)
        cosine = features[peers] @ features[i] / norm[peers] / norm[i]
        want[i] = max(1 - (weights * cosine**2).sum(), 0)
    found = novel(features, rewards, ids)
    np.testing.assert_allclose(found, want, atol=1e-5)
    order = rng.permutation(12)
    shuffled = novel(features[order], rewards[order], ids[order])
    np.testing.assert_allclose(shuffled, found[order], atol=1e-6)
    scaled = features * rng.uniform(1e-30, 1e30, (12, 1))
    np.testing.assert_allclose(novel(scaled, rewards, ids), found, atol=1e-5)


def test_equal_opposite_and_orthogonal_features():
    rewards = [1.0, -1.0, 1.0]
    np.testing.assert_allclose(novel(np.ones((3, 2)), rewards), 0, atol=1e-6)
    np.testing.assert_array_equal(novel(np.eye(3), rewards), 1)
    np.testing.assert_allclose(novel([[1.0, 2.0], [-2.0, -4.0]], [1.0, 1.0]), 0, atol=1e-6)


def test_peers_weigh_by_reward():
    # Row 0 equals the right peer and is orthogonal to the wrong one: ν is the wrong one's weight.
    found = novel([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [1.0, 1.0, -1.0])
    assert found[0] == pytest.approx(np.exp(-1) / (np.exp(1) + np.exp(-1)), abs=1e-6)
    extreme = novel([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [500.0, -200.0, -800.0])
    assert np.isfinite(extreme).all() and extreme[0] == pytest.approx(0.0, abs=1e-6)


def test_novelty_of_samples_without_peers_or_features():
    assert novel(np.ones((1, 2)), [1.0]).tolist() == [1.0]
    assert novel(np.zeros((3, 2)), [1.0, -1.0, 1.0]).tolist() == [1, 1, 1]
    # A failed verifier's sample is nobody's peer.
    found = novel([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [1.0, np.nan, 1.0])
    np.testing.assert_allclose(found[[0, 2]], 1.0)
    assert np.isfinite(found).all()


def test_relative_novelty():
    ids = np.array([0, 0, 0, 1, 1, 2], np.int32)
    scores = jnp.array([0.2, 0.4, 0.3, 0.7, 0.7 + 1e-7, 0.9])
    function = functools.partial(novelty.relative_novelty, scores, ids, num_groups=3)
    np.testing.assert_allclose(function(), [0, 1, 0.5, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(function(without_spread=0.5)[3:], 0.5)
    where = jnp.array([True, False, True, True, True, True])
    np.testing.assert_allclose(function(where=where)[:3], [0, 1, 1], atol=1e-6)


SHAPES = {
    "printed": (novelty.printed_novelty_reward, 0.0),
    "scaled": (novelty.scaled_novelty_reward, 0.0),
    "signed": (novelty.signed_novelty_reward, 0.5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shaped_rewards(name):
    shape, neutral = SHAPES[name]
    rewards = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    scores = jnp.array([0.0, 0.5, 1.0, 0.0, 0.5, 1.0])
    want = {
        "printed": [1, 1.25, 1.5, -1, -0.75, -0.5],
        "scaled": [1, 1.25, 1.5, -1, -1.25, -1.5],
        "signed": [0.5, 1, 1.5, -0.5, -1, -1.5],
    }[name]
    np.testing.assert_allclose(shape(rewards, scores, strength=0.5), want, atol=1e-6)
    np.testing.assert_array_equal(shape(rewards, scores, strength=0.0), rewards)
    np.testing.assert_array_equal(shape(rewards, neutral + 0 * scores, strength=0.9), rewards)
    assert np.abs(shape(rewards, scores, strength=9.0)).max() == 3.0
    assert np.abs(shape(rewards, scores, strength=9.0, bound=1.5)).max() == 1.5
    tight = np.asarray(shape(rewards, scores, strength=0.99))
    assert tight[:3].min() > tight[3:].max()
    failed = shape(jnp.array([np.nan, 1.0]), jnp.array([1.0, 1.0]), strength=0.5)
    assert np.isnan(failed[0]) and np.isfinite(failed[1])


def test_a_sample_alone_keeps_its_reward():
    found = jnp.asarray(novel(np.ones((1, 2)), [-1.0]))
    for shape, neutral in SHAPES.values():
        relative = novelty.relative_novelty(
            found, np.zeros(1, np.int32), num_groups=1, without_spread=neutral
        )
        assert shape(jnp.array([-1.0]), relative, strength=0.7).tolist() == [-1.0]


def test_novelty_of_many_rows_and_ids_out_of_range():
    rng = np.random.default_rng(2)
    features, rewards = rng.normal(size=(600, 3)).astype(np.float32), np.ones(600, np.float32)
    ids = np.repeat(np.arange(150), 4).astype(np.int32)
    found = novelty.feature_novelty(features, rewards, ids, num_groups=150)
    np.testing.assert_allclose(found[-4:], novel(features[-4:], rewards[-4:]), atol=1e-6)
    assert np.isnan(novel(features[:4], rewards[:4], np.array([0, 0, 9, 0], np.int32))[2])


def test_bad_novelty():
    def novel(features, rewards):
        rewards = jnp.asarray(rewards)
        ids = ONE_GROUP[: rewards.size]
        return novelty.feature_novelty(features, rewards, ids, num_groups=1)

    with pytest.raises(ValueError, match="features: expected 2 rows"):
        novel(np.ones((3, 2)), [1.0, 1.0])
    with pytest.raises(ValueError, match="features: expected 1 rows like rewards, of at least 1"):
        novel(np.ones((1, 0)), [1.0])
    with pytest.raises(ValueError, match="features: expected rank 2"):
        novel(np.ones(2), [1.0, 1.0])
    for shape, _ in SHAPES.values():
        with pytest.raises(ValueError, match="strength: "):
            shape(jnp.ones(2), jnp.ones(2), strength=-0.1)
        with pytest.raises(ValueError, match="bound: "):
            shape(jnp.ones(2), jnp.ones(2), strength=0.1, bound=0.0)
        with pytest.raises(ValueError, match="novelty: expected shape"):
            shape(jnp.ones(2), jnp.ones(3), strength=0.1)
    with pytest.warns(UserWarning, match="rewards: expected -1 and 1"):
        novelty.printed_novelty_reward(jnp.array([0.0, 1.0]), jnp.ones(2), strength=0.5)
    with pytest.raises(ValueError, match="without_spread: "):
        novelty.relative_novelty(jnp.ones(2), ONE_GROUP[:2], num_groups=1, without_spread=2.0)
