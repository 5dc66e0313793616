"""The laboratory against closed forms, loops over batches, and itself by other ways."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax import objectives
from pgjax.diagnostics import lab_batches, lab_figure, lab_gradients, laboratory, problems
from pgjax.diagnostics.laboratory import estimator_report

TABLE = [[1.0, 0.0, 0.4], [0.0, 2.0, 1.0]]
LOGITS = [[0.3, -0.5, 0.8], [-1.0, 0.2, 0.1]]
OLD = [[0.1, 0.1, 0.4], [-0.6, 0.5, 0.0]]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def bandit():
    return problems.bandit(jnp.array(TABLE))


def staircase(table):
    """Up to two tokens; 0 ends the sequence. Sequences 0, 10 and 11, worth `table[prompt]`."""

    def roles(tokens):
        third = jnp.where(tokens[:, 1] == 1, problems.POLICY, problems.NOBODY)
        return jnp.stack([jnp.zeros_like(third), jnp.full_like(third, problems.POLICY), third], 1)

    def logits(params, tokens):
        rows = params[tokens[:, 0]]
        return jnp.concatenate([jnp.zeros_like(rows[:, :1]), rows], axis=1)

    table = jnp.asarray(table)
    return problems.TokenProblem(
        num_prompts=table.shape[0],
        num_actions=2,
        horizon=2,
        logits=logits,
        reward=lambda tokens: table[tokens[:, 0], tokens[:, 1:].sum(1)],
        roles=roles,
    )


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])


def importance_weighted_rloo():
    def surrogate(outputs, rollout):
        ratio = pg.surrogates.importance_ratio(outputs.logprobs, rollout.behavior_logprobs)
        return pg.surrogates.importance_weighted(ratio, rollout.advantages)

    return dataclasses.replace(objectives.rloo(), surrogate=surrogate)


@pytest.mark.parametrize(
    ("objective", "behavior"),
    [(objectives.lite_ppo(), None), (objectives.grpo(kl_coefficient=0.1), OLD)],
    ids=["on-policy", "off-policy"],
)
def test_agrees_with_the_bandit_enumeration(objective, behavior):
    logits = jnp.array(LOGITS)
    behavior = None if behavior is None else jnp.array(behavior)
    want = pg.diagnostics.expected_gradient(
        objective, logits, jnp.array(TABLE), group_size=2, behavior_logits=behavior
    )
    found = estimator_report(objective, bandit(), logits, group_size=2, behavior_params=behavior)
    np.testing.assert_allclose(found.expected.gradient, want, atol=1e-13)
    true = pg.diagnostics.policy_gradient(logits, jnp.array(TABLE))
    np.testing.assert_allclose(found.true_gradient, true, atol=1e-13)
    assert bool(found.exact) and int(found.num_batches) == 3**4
    bias = np.linalg.norm(np.asarray(want - true))
    assert float(found.expected.bias_norm.value) == pytest.approx(bias, abs=1e-13)


def test_numbers_of_a_direction_are_those_of_the_textbook():
    rng = np.random.default_rng(0)
    g, t = rng.normal(size=4), rng.normal(size=4)
    found = laboratory._compare(jnp.zeros(4), jnp.array(g), jnp.array(t), jnp.float64(0.0))
    cosine = g @ t / np.linalg.norm(g) / np.linalg.norm(t)
    scale = np.linalg.lstsq(t[:, None], g, rcond=None)[0][0]
    for name, want in {
        "bias_norm": np.linalg.norm(g - t),
        "norm_ratio": np.linalg.norm(g) / np.linalg.norm(t),
        "cosine": cosine,
        "scale": scale,
        "residual": np.linalg.norm(g - scale * t) / np.linalg.norm(g),
    }.items():
        np.testing.assert_allclose(getattr(found, name), [want] * 3, rtol=1e-12, err_msg=name)


def test_intervals_hold_all_that_the_ball_can_do():
    rng = np.random.default_rng(1)
    for radius in (0.1, 0.8, 3.0):
        g, t = rng.normal(size=3), rng.normal(size=3)
        found = laboratory._compare(jnp.zeros(3), jnp.array(g), jnp.array(t), jnp.float64(radius))
        noise = rng.normal(size=(20_000, 3))
        noise *= radius / np.linalg.norm(noise, axis=1, keepdims=True)
        length = np.linalg.norm(g + noise, axis=1)
        along = (g + noise) @ t / np.linalg.norm(t)
        for name, seen in {
            "norm_ratio": length / np.linalg.norm(t),
            "cosine": along / length,
            "scale": along / np.linalg.norm(t),
            "residual": np.sqrt(np.maximum(1 - (along / length) ** 2, 0)),
            "bias_norm": np.linalg.norm(g + noise - t, axis=1),
        }.items():
            estimate = getattr(found, name)
            assert estimate.low <= seen.min() + 1e-7 and seen.max() - 1e-7 <= estimate.high, name
            # and no wider than that, where the centre does not cut it short
            if radius < np.linalg.norm(g) and radius < np.linalg.norm(g - t):
                assert estimate.low >= seen.min() - 0.05, name
                assert estimate.high <= seen.max() + 0.05, name


def test_covariance_of_reinforce_is_the_closed_form():
    logits, rewards = np.array([0.3, -0.5, 0.8]), np.array([1.0, -0.5, 0.4])
    p = np.exp(logits) / np.exp(logits).sum()
    score = np.eye(3) - p
    gradient = (p * rewards) @ score
    one = np.einsum("a,a,ai,aj->ij", p, rewards**2, score, score) - np.outer(gradient, gradient)
    problem = problems.bandit(jnp.array(rewards[None]))
    found = estimator_report(objectives.reinforce(), problem, jnp.array(logits[None]), group_size=3)
    np.testing.assert_allclose(found.covariance, one / 3, atol=1e-14)
    want = gradient @ gradient / np.trace(one / 3)
    assert float(found.signal_to_noise.value) == pytest.approx(want, rel=1e-10)
    assert float(found.variance.value) == pytest.approx(np.trace(one) / 3, rel=1e-10)


def test_trees_with_ends_of_different_length():
    problem = staircase([[0.2, 1.0, 0.0], [0.0, 0.3, 2.0]])
    params = jax.random.normal(jax.random.key(0), (2, 2, 2))
    for objective, scale in (
        (objectives.rloo(), 1.0),
        (objectives.dr_grpo(length=5), (1 - 1 / 3) / 5),
    ):
        found = estimator_report(objective, problem, params, group_size=3)
        assert float(found.expected.scale.value) == pytest.approx(scale, rel=1e-11)
        assert found.expected.residual.value < 1e-11
        assert int(found.num_batches) == 3**6
    biased = estimator_report(objectives.grpo(), problem, params, group_size=3)
    assert biased.expected.residual.value > 0.05


def test_one_order_stands_for_all_where_order_does_not_matter():
    problem, params = bandit(), jnp.array(LOGITS)
    for objective, equal in ((objectives.rloo(), True), (by_order(), False)):
        one = estimator_report(objective, problem, params, group_size=3, exchangeable=True)
        every = estimator_report(objective, problem, params, group_size=3)
        assert int(one.num_batches) == 10**2 and int(every.num_batches) == 3**6
        same = np.allclose(one.expected.gradient, every.expected.gradient, atol=1e-13)
        same_spread = np.allclose(one.covariance, every.covariance, atol=1e-13)
        assert (same and same_spread) == equal


def by_order():
    """Only the first sample of each group learns."""

    def mask(rollout):
        return pg.segments.first_rows(rollout.group_ids)

    return dataclasses.replace(objectives.reinforce(), mask=mask)


def test_batches_are_all_and_their_probabilities_add_up():
    sizes, group = [2, 3], 3
    p = [np.array([0.4, 0.6]), np.array([0.2, 0.3, 0.5])]
    every = np.concatenate(p)
    for exchangeable in (False, True):
        indices, log_counts = lab_batches.enumerate_batches(sizes, group, exchangeable=exchangeable)
        assert len(indices) == lab_batches.count(sizes, group, exchangeable=exchangeable)
        weights = np.exp(log_counts) * every[indices].prod(1)
        assert weights.sum() == pytest.approx(1.0)
        # Expected number of the second prompt's last sequence in a batch.
        assert weights @ (indices == 4).sum(1) == pytest.approx(group * 0.5)
    ordered, _ = lab_batches.enumerate_batches(sizes, group, exchangeable=False)
    want = itertools.product(*[range(2)] * 3, *[range(2, 5)] * 3)
    assert sorted(map(tuple, ordered)) == sorted(want)


def test_off_policy_and_mismatched_samplers():
    problem, params, old = bandit(), jnp.array(LOGITS), jnp.array(OLD)
    corrected = importance_weighted_rloo()
    found = estimator_report(corrected, problem, params, group_size=2, behavior_params=old)
    np.testing.assert_allclose(found.expected.bias_norm.value, 0.0, atol=1e-14)
    plain = estimator_report(objectives.rloo(), problem, params, group_size=2, behavior_params=old)
    assert plain.expected.bias_norm.value > 0.01

    # Learner's old policy in between: π/π_old times π_old/μ is π/μ again.
    sampler = old + jnp.array([[0.3, 0.0, -0.2], [0.0, 0.4, 0.0]])
    twice = objectives.with_mismatch_weights(corrected, weights=lambda old, mu: jnp.exp(old - mu))
    found = estimator_report(
        twice, problem, params, group_size=2, behavior_params=sampler, old_params=old
    )
    np.testing.assert_allclose(found.expected.bias_norm.value, 0.0, atol=1e-14)


def test_rollouts_are_filled_as_by_a_trainer():
    problem, params, old = bandit(), jnp.array(LOGITS), jnp.array(OLD)
    sampler, reference = old + 0.1 * params, 2.0 * old
    tokens = jnp.array([[0, 1], [0, 2], [1, 0], [1, 0]], jnp.int32)
    recorder = dataclasses.replace(
        objectives.reinforce(), old_needs=frozenset({"entropy", "score_features"})
    )
    rollout = lab_gradients.filled_rollout(
        recorder, problem, lab_gradients.Policies(params, sampler, old, reference), tokens
    )

    def chosen(logits):
        return np.asarray(jax.nn.log_softmax(logits))[tokens[:, 0], tokens[:, 1]]

    np.testing.assert_allclose(rollout.behavior_logprobs[:, 1], chosen(sampler))
    np.testing.assert_allclose(rollout.proximal_logprobs[:, 1], chosen(old))
    np.testing.assert_allclose(rollout.reference_logprobs[:, 1], chosen(reference))
    p = np.asarray(jax.nn.softmax(old))
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(rollout.old.entropy[:, 1], entropy[tokens[:, 0]])
    assert rollout.old.score_features.shape == (4, 3) and rollout.old.square_sum is None


def test_memory_reaches_the_objective():
    objective = dataclasses.replace(
        objectives.reinforce(),
        advantage=lambda rollout: rollout.rewards * rollout.memory["factor"],
        memory=objectives.Memory(
            init=lambda: {"factor": jnp.float64(1.0)}, update=lambda memory, rollout: memory
        ),
    )
    problem, params = bandit(), jnp.array(LOGITS)
    initial = estimator_report(objective, problem, params, group_size=2)
    later = estimator_report(
        objective, problem, params, group_size=2, memory={"factor": jnp.float64(3.0)}
    )
    assert float(initial.expected.scale.value) == pytest.approx(1.0)
    assert float(later.expected.scale.value) == pytest.approx(3.0)


def test_controls_have_expectation_zero():
    problem = staircase([[0.2, 1.0, 0.0], [0.0, 0.3, 2.0]])
    params = jax.random.normal(jax.random.key(1), (2, 2, 2))
    rows = problems.all_sequences(problem)
    sizes = lab_batches.sequences_per_prompt(rows, 2)
    indices, log_counts = lab_batches.enumerate_batches(sizes, 2, exchangeable=False)
    true = jax.grad(lambda p: problems.expected_reward(problem, p))(params)
    of = lab_gradients.controls(problem, params, flat(true))
    policies = lab_gradients.Policies(params, params, params, params)

    def one(tokens):
        return of(lab_gradients.filled_rollout(objectives.reinforce(), problem, policies, tokens))

    values = jax.jit(jax.vmap(one))(jnp.asarray(rows)[indices])
    logs = problems.log_probability(problem, params, jnp.asarray(rows))
    weights = np.exp(np.asarray(logs)[indices].sum(1) + log_counts)
    assert values.shape == (3**4, 3 * 8) and np.abs(values).max() > 0.1
    np.testing.assert_allclose(weights @ np.asarray(values), 0.0, atol=1e-14)


def test_sampling_agrees_with_summing_and_its_intervals_cover():
    problem, params = bandit(), jnp.array(LOGITS)
    exact = estimator_report(objectives.grpo(), problem, params, group_size=3, exchangeable=True)

    @jax.jit
    @jax.vmap
    def sampled(key):
        return estimator_report(
            objectives.grpo(),
            problem,
            params,
            group_size=3,
            key=key,
            max_batches=0,
            samples=300,
            clip_norm=0.3,
        )

    found = sampled(jax.random.split(jax.random.key(0), 200))
    error = np.asarray(found.expected.gradient - exact.expected.gradient).reshape(200, -1)
    covered = np.linalg.norm(error, axis=1) <= np.asarray(found.expected.radius)
    assert 0.91 <= covered.mean() <= 0.99
    inside = (found.variance.low <= exact.variance.value) & (
        exact.variance.value <= found.variance.high
    )
    assert 0.90 <= np.asarray(inside).mean() <= 0.99
    for name in ("bias_norm", "norm_ratio", "cosine", "scale", "residual"):
        estimate, want = getattr(found.expected, name), getattr(exact.expected, name).value
        hit = (estimate.low <= want) & (want <= estimate.high)
        assert np.asarray(hit).mean() >= 0.93, name
    ratio = found.signal_to_noise
    hit = (ratio.low <= exact.signal_to_noise.value) & (exact.signal_to_noise.value <= ratio.high)
    assert np.asarray(hit).mean() >= 0.93
    # Controls leave a fraction of the noise: squared errors against those of plain means.
    plain = float(exact.variance.value) / 300
    assert (error**2).sum(1).mean() < 0.5 * plain
    np.testing.assert_allclose(found.covariance.mean(0), exact.covariance, atol=0.003)
    assert not found.exact.any() and np.all(found.num_batches == 300)


def test_what_the_controls_span_is_known_without_noise():
    found = estimator_report(
        objectives.rloo(),
        bandit(),
        jnp.array(LOGITS),
        group_size=4,
        key=jax.random.key(0),
        max_batches=100,
        samples=100,
    )
    assert found.expected.bias_norm.value < 1e-12 and found.expected.radius < 1e-12
    assert found.expected.bias_norm.low == 0.0
    assert found.variance.value > 0.01 and found.variance.low < found.variance.value


def test_clipping_bends_the_mean():
    problem, params = problems.bandit(jnp.array([[5.0, 1.0, 0.0]])), jnp.array([[0.3, -0.5, 0.8]])
    p = np.asarray(jax.nn.softmax(params))[0]
    gradients = np.array([5.0, 1.0, 0.0])[:, None] * (np.eye(3) - p)
    clip_norms = (0.5, 2.0, 1e3)
    found = jax.jit(
        jax.vmap(
            lambda norm: estimator_report(
                objectives.reinforce(), problem, params, group_size=1, clip_norm=norm
            )
        )
    )(jnp.array(clip_norms))
    for i, norm in enumerate(clip_norms):
        norms = np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-30)
        want = p @ (gradients * np.minimum(1.0, norm / norms))
        np.testing.assert_allclose(found.clipped.gradient[i, 0], want, atol=1e-13)
        assert (found.clipped.cosine.value[i] > 1 - 1e-12) == (norm == 1e3)
        np.testing.assert_allclose(found.expected.gradient[i, 0], p @ gradients, atol=1e-13)


def test_any_pytree_any_transformation():
    table = jnp.array(TABLE)

    def problem(table):
        return dataclasses.replace(
            problems.bandit(table),
            logits=lambda params, tokens: problems.bandit(table).logits(
                params["shift"] + params["logits"], tokens
            ),
        )

    def report(table, params):
        return estimator_report(objectives.grpo(), problem(table), params, group_size=2)

    params = {"logits": jnp.array(LOGITS), "shift": jnp.array([0.5])}
    plain = jax.jit(report)(table, params)
    assert plain.true_gradient["logits"].shape == (2, 3)
    np.testing.assert_allclose(plain.expected.gradient["shift"], 0.0, atol=1e-14)
    assert plain.covariance.shape == (7, 7)
    stacked = jax.jit(jax.vmap(report, in_axes=(0, None)))(jnp.stack([table, 2 * table]), params)
    first = jax.tree.map(lambda x: x[0], stacked)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), plain, first)
    np.testing.assert_allclose(
        stacked.true_gradient["logits"][1], 2 * plain.true_gradient["logits"]
    )


def test_nothing_to_learn_and_nothing_but_signal():
    problem, params = problems.bandit(jnp.ones((1, 3))), jnp.array([[0.3, -0.5, 0.8]])
    found = estimator_report(objectives.reinforce(), problem, params, group_size=2)
    assert found.signal_to_noise.value == 0.0 and found.variance.value > 0.0
    found = estimator_report(objectives.rloo(), problem, params, group_size=2)
    for number in (*found.expected.cosine, *found.expected.residual, *found.expected.scale):
        assert number == 0.0
    assert found.signal_to_noise.value == 0.0 and found.variance.value == 0.0
    sure = dataclasses.replace(
        objectives.supervised(),
        surrogate=lambda outputs, rollout: jnp.zeros_like(outputs.logprobs),
        regularizers=(objectives.entropy_bonus(1.0),),
    )
    found = estimator_report(sure, problem, params, group_size=2)
    assert found.signal_to_noise.value > 1e20 and found.expected.residual.value == 1.0
    drawn = estimator_report(
        objectives.rloo(), problem, params, group_size=2, max_batches=0, samples=50,
        key=jax.random.key(0),
    )  # fmt: skip
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(drawn))
    assert drawn.signal_to_noise.value == 0.0


def test_an_undefined_gradient_is_not_taken_for_none(tmp_path):
    objective = dataclasses.replace(
        objectives.reinforce(), advantage=lambda rollout: rollout.rewards * jnp.nan
    )
    found = estimator_report(objective, bandit(), jnp.array(LOGITS), group_size=1)
    for number in (found.expected.residual, found.expected.cosine, found.signal_to_noise):
        assert np.isnan(number.value)
    lab_figure.draw_atlas({"undefined": {"bandit": found}}, tmp_path / "atlas.png")


def test_float32_is_enough_for_a_look():
    table, params = jnp.array(TABLE, jnp.float32), jnp.array(LOGITS, jnp.float32)
    found = estimator_report(objectives.rloo(), problems.bandit(table), params, group_size=2)
    assert found.covariance.dtype == jnp.float32
    assert found.expected.residual.value < 1e-5


def test_tables_and_figures(tmp_path):
    problem, params = bandit(), jnp.array(LOGITS)
    exact = estimator_report(objectives.grpo(), problem, params, group_size=2)
    rows = exact.table()
    assert [set(row) for row in rows] == [{"quantity", "value"}] * len(rows)
    assert rows[2]["quantity"] == "cosine to true"
    assert rows[2]["value"] == pytest.approx(float(exact.expected.cosine.value))
    drawn = estimator_report(
        objectives.grpo(), problem, params, group_size=2, max_batches=0, samples=50,
        key=jax.random.key(0),
    )  # fmt: skip
    assert all(row["low"] <= row["value"] <= row["high"] for row in drawn.table())
    path = tmp_path / "atlas.png"
    reports = {"one": {"a": exact, "b": drawn}, "two": {"a": exact, "b": exact}}
    lab_figure.draw_atlas(reports, path, title="title", note="note", marks={"one": "mark"})
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"reports\['two'\]: expected \['a', 'b'\]"):
        lab_figure.draw_atlas({"one": reports["one"], "two": {"a": exact}}, path)
    with pytest.raises(ValueError, match="reports: expected at least one"):
        lab_figure.draw_atlas({}, path)


def test_errors():
    problem, params, rloo = bandit(), jnp.array(LOGITS), objectives.rloo()
    with pytest.raises(ValueError, match="group_size"):
        estimator_report(rloo, problem, params, group_size=0)
    with pytest.raises(ValueError, match="clip_norm"):
        estimator_report(rloo, problem, params, group_size=2, clip_norm=0.0)
    with pytest.raises(ValueError, match="key: 81 batches are more than max_batches=80"):
        estimator_report(rloo, problem, params, group_size=2, max_batches=80)
    with pytest.raises(ValueError, match="samples"):
        estimator_report(
            rloo, problem, params, group_size=2, max_batches=0, samples=37, key=jax.random.key(0)
        )
    broken = problems.bandit(jnp.array([[0.0, jnp.nan]]))
    with pytest.raises(ValueError, match="problem: expected finite rewards"):
        estimator_report(rloo, broken, jnp.zeros((1, 2)), group_size=2)


def test_whatever_an_objective_may_need_is_there():
    problem, params, rloo = bandit(), jnp.array(LOGITS), objectives.rloo()
    wanting = dataclasses.replace(
        rloo,
        own_needs=objectives.objective.NEEDS,
        old_needs=objectives.objective.OLD_NEEDS,
    )
    plain = estimator_report(rloo, problem, params, group_size=2)
    chex.assert_trees_all_equal(estimator_report(wanting, problem, params, group_size=2), plain)
