"""The reproductions run and write what they found; whether claims hold takes their full size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from experiments import gcpo_tool, oblr_variance, poly_coverage, poly_rooms, tricks_grid
from pgjax.diagnostics import problems
from pgjax.envs import four_rooms

NAMES = ["oblr_variance", "poly_coverage", "poly_rooms", "gcpo_tool", "tricks_grid"]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_run(name, tmp_path):
    _, columns = tiny_runs.run(name, tmp_path)
    assert all(x.shape == (3,) for x in columns)


def test_exact_variance_is_what_is_sampled():
    problem = problems.bandit(jnp.array([[0.3, 1.0, 0.0]]))
    params = jnp.array([[1.0, -0.5, 0.2]])
    tokens = jnp.asarray(problems.all_sequences(problem))
    policy = np.exp(params[0]) / np.exp(params[0]).sum()
    scores = np.eye(3) - policy
    rewards = np.array([0.3, 1.0, 0.0])
    draws = (rewards - 0.4)[:, None] * scores
    want = policy @ (draws**2).sum(-1) - ((policy @ draws) ** 2).sum()
    found = oblr_variance.exact_variance(problem, params, jnp.float32(0.4), tokens)
    assert float(found) == pytest.approx(want, rel=1e-5)
    mean, best = oblr_variance.optimal_baselines(problem, params, tokens)
    weights = policy * (scores**2).sum(-1)
    assert float(mean) == pytest.approx(policy @ rewards, rel=1e-5)
    assert float(best) == pytest.approx(weights @ rewards / weights.sum(), rel=1e-5)


def test_hidden_configurations():
    problem = poly_coverage.hidden_bandit(10)
    params = jnp.arange(10.0) / 5
    policy = np.exp(params) / np.exp(params).sum()
    found = poly_coverage.coverage(params)
    assert float(found["pass@1"]) == pytest.approx(
        float(problems.expected_reward(problem, params)), rel=1e-5
    )
    want = poly_coverage.FREQUENCIES @ (1 - (1 - policy[:4]) ** 16)
    assert float(found["pass@16"]) == pytest.approx(want, rel=1e-4)


def test_tools_help_half_of_the_prompts():
    params = jnp.full(4, 50.0)  # always
    plain = gcpo_tool.tool_problem(4, contrast=0.0)
    assert float(problems.expected_reward(plain, params)) == pytest.approx(0.55, rel=1e-5)
    doubled = gcpo_tool.tool_problem(4, contrast=0.5)
    rows = jnp.asarray(problems.all_sequences(doubled))
    chances = np.exp(problems.log_probability(doubled, jnp.zeros(4), rows))
    rollout = problems.rollout_of(doubled, rows, jnp.zeros(4))
    forced = np.asarray(rollout.extras["forced"])
    assert chances.sum() == pytest.approx(4.0, rel=1e-5)
    assert chances[forced].sum() == pytest.approx(2.0, rel=1e-5)
    assert not rollout.mask[forced].any() and rollout.mask[~forced].sum(-1).min() == 1


def test_digit_sums():
    config = tricks_grid.Config(policy="table")
    problem = tricks_grid.digit_sums(config, "hard")
    rows = jnp.array([[0, 3, 1, 0, 0, 0, 0], [0, 3, 2, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]])
    rollout = problems.rollout_of(problem, rows, tricks_grid.start(config, "hard"))
    assert rollout.rewards.tolist() == [1, 0, 0]
    assert rollout.mask.sum(-1).tolist() == [3, 3, 6]
    assert rollout.extras["truncated"].tolist() == [False, False, True]
    for mix, low, high in (
        *(("hard", 0.03, 0.1), ("medium", 0.4, 0.6)),
        *(("easy", 0.93, 0.97), ("split", 0.47, 0.53)),
        *(("hard, tail", 0.02, 0.08), ("easy, tail", 0.68, 0.74)),
    ):
        params = tricks_grid.start(config, mix)
        problem = tricks_grid.digit_sums(config, mix)
        assert low < float(problems.expected_reward(problem, params)) < high


def test_a_network_starts_as_the_table_does_but_where_it_is_untrained():
    config = tricks_grid.Config(prompts=4, longest=4, warm_up=150)

    def accuracies(mix):
        problem = tricks_grid.digit_sums(config, mix)
        keys = jax.random.split(jax.random.key(0), 4)
        params = jax.jit(
            lambda keys: jax.lax.map(lambda k: tricks_grid.initial(config, mix, k), keys)
        )
        return jax.vmap(lambda p: problems.expected_reward(problem, p))(params(keys))

    table = dataclasses.replace(config, policy="table")
    problem = tricks_grid.digit_sums(table, "split")
    want = float(problems.expected_reward(problem, tricks_grid.start(table, "split")))
    found = np.asarray(accuracies("split"))
    assert np.abs(found - want).max() < 0.1 and abs(found.mean() - want) < 0.05
    assert np.asarray(accuracies("hard")).max() < 0.3


def test_exact_success_is_what_walks_have():
    config = poly_rooms.Config(room=2, horizon=14, walks=400, states=1, vines=9)
    env = four_rooms.FourRooms(room=2, max_steps=14)
    params = poly_rooms.pretrained(config, env, jax.random.key(0))
    walks = poly_rooms.draw(config, env, params, jax.random.key(1), poly=False)
    seen, number = float(walks.reward.sum() / len(walks.reward)), len(walks.reward)
    exact = float(poly_rooms.success(env, params, env.num_cells - 1)[0])
    assert 0.1 < exact < 0.9
    assert abs(seen - exact) < 4 * (exact * (1 - exact) / number) ** 0.5


def test_vines_are_credited_with_their_sets_in_their_first_moves_alone():
    config = poly_rooms.Config(room=2, horizon=14, walks=3, states=2, vines=4, set_size=2, window=2)
    env = four_rooms.FourRooms(room=2, max_steps=14)
    params = poly_rooms.pretrained(config, env, jax.random.key(0))
    walks = poly_rooms.draw(config, env, params, jax.random.key(1), poly=True)
    assert walks.mask.shape == (3 + 3 * 2 * 4, 14)
    np.testing.assert_array_equal(np.isnan(walks.set_advantage), np.arange(27) < 3)
    credit, _ = poly_rooms.advantages_of(config, params, walks)
    alone = dataclasses.replace(walks, set_advantage=walks.set_advantage + jnp.nan)
    without, _ = poly_rooms.advantages_of(config, params, alone)
    # Standardised differently, but equal up to that wherever no set has a say.
    late = np.asarray(walks.mask)[:, 2:]
    a, b = np.asarray(credit)[:, 2:][late], np.asarray(without)[:, 2:][late]
    np.testing.assert_allclose(np.polyval(np.polyfit(b, a, 1), b), a, atol=1e-4)
    early = np.asarray(credit)[3:, :2][np.asarray(walks.mask)[3:, :2]]
    rows = np.repeat(np.asarray(walks.set_advantage)[3:, None], 2, 1)
    rows = rows[np.asarray(walks.mask)[3:, :2]]
    np.testing.assert_allclose(np.polyval(np.polyfit(rows, early, 1), rows), early, atol=1e-4)
