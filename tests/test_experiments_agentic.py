"""The experiments on agents run and write what they should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import empg_chain, lazy_kernel, multiturn_budget, multiturn_guide, trloo_bias
from experiments.shared import quest
from pgjax.diagnostics import problems
from pgjax.envs import textquest
from pgjax.sampling import multiturn


@pytest.mark.parametrize(
    "module",
    [trloo_bias, lazy_kernel, empg_chain, multiturn_guide, multiturn_budget],
)
def test_a_quick_run_writes_its_files(module, tmp_path):
    assert module.main(["--quick", "--out", str(tmp_path)]) in (0, 1)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["claims"] and found["table"]
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_lazy_kernels_shares_are_exact():
    params = lazy_kernel.start((0.15, 0.6))
    task = lazy_kernel.problem(lazy_kernel.correctness, tasks=2)
    measured = lazy_kernel.measure(params)
    assert float(measured["correct"]) == pytest.approx(
        float(problems.expected_reward(task, params)), rel=1e-5
    )
    skill = jax.nn.softmax(params[:, 1]) @ jnp.asarray(lazy_kernel.CORRECT_FUSED)
    np.testing.assert_allclose(skill, [0.15, 0.6], rtol=1e-5)


@pytest.mark.parametrize("lost", [False, True])
def test_the_chains_success_is_exact(lost):
    task = empg_chain.problem(lost=lost)
    params = jnp.asarray(empg_chain.START) * jnp.array([[2.0], [1.0], [1.0]])
    params = params.at[1, :2].set(2.0)
    chance = float(empg_chain.measure(params)["success"])
    rollout = problems.sample(task, params, jax.random.key(1), group_size=5_000)
    error = (chance * (1 - chance) / 20_000) ** 0.5
    assert float(rollout.rewards.mean()) == pytest.approx(chance, abs=4 * error)


@pytest.mark.parametrize("lost", [False, True])
def test_the_chains_divergence_is_that_of_its_episodes(lost):
    task = empg_chain.problem(lost=lost)
    old, new = 0.5 * jax.random.normal(jax.random.key(0), (2, 3, empg_chain.ACTIONS))
    found = empg_chain.largest_kl(jnp.stack([old, new, new]), lost=lost)
    rows = problems.sample(task, old, jax.random.key(1), group_size=5_000).tokens
    drawn = problems.log_probability(task, old, rows) - problems.log_probability(task, new, rows)
    per_decision = np.asarray(drawn) / empg_chain.LENGTH
    error = float(per_decision.std()) / len(rows) ** 0.5
    assert float(found) == pytest.approx(float(per_decision.mean()), abs=4 * error)


def test_updates_at_a_divergence_lie_between_those_of_two_rates():
    rates = np.array([[4.0, 1.0], [1.0, 2.0], [2.0, 4.0], [0.25, 0.5]])
    found = empg_chain.frontier(0.05 * rates**2, 3 / rates)
    wanted = 3 * (np.array(empg_chain.LARGEST_KL) / 0.05) ** -0.5
    np.testing.assert_allclose(found, [wanted, wanted.clip(max=6.0)])


def test_the_sampler_and_the_learner_agree_on_every_token():
    params = quest.init(jax.random.key(0), 8)
    params["head"] = 20 * params["head"]
    record, groups = quest.episodes(quest.EASY, params, jax.random.key(1), tasks=4, group_size=3)
    rollout = multiturn.flatten_turns(**record, group_ids=groups, eos=textquest.EOS)
    found = quest.outputs(params, rollout, frozenset({"values"}))
    np.testing.assert_allclose(found.logprobs, rollout.behavior_logprobs, atol=1e-5)
    lengths = np.asarray(record["action_lengths"])
    assert {2, 3} <= set(lengths.ravel())
    multiturn.check_turns(rollout)


def test_who_wanders_says_every_command_and_nothing_else():
    rows = quest.wander(quest.HARD, jax.random.key(0), 20)
    chosen = np.asarray(rows.tokens)[np.asarray(rows.mask)].reshape(-1, textquest.COMMAND_LENGTH)
    ways = {(textquest.GO, way, textquest.EOS) for way in textquest.DIRECTIONS}
    deeds = {
        (verb, textquest.OBJECTS + i, textquest.EOS)
        for verb in (textquest.TAKE, textquest.PUT)
        for i in range(2)
    }
    said, counts = np.unique(chosen, axis=0, return_counts=True)
    assert {tuple(map(int, command)) for command in said} == ways | deeds
    # Eight alike: all within four standard deviations of an eighth.
    share, n = 1 / 8, counts.sum()
    assert np.abs(counts / n - share).max() < 4 * (share * (1 - share) / n) ** 0.5


def test_reading_teaches_commands_and_no_quest():
    params = jax.jit(lambda key: quest.pretrained(key, 16, updates=60))(jax.random.key(0))
    rows = quest.wander(quest.HARD, jax.random.key(1), 20)
    found = quest.outputs(params, rows, frozenset())
    surprise = -float(found.logprobs.sum() / rows.mask.sum())
    # Three tokens a command, one of eight commands, the last token certain.
    assert surprise < 1.2 * np.log(8) / 3
    assert float(quest.success(quest.HARD, params, jax.random.key(2), 64)) < 0.05


def test_demonstrations_finish_the_quest_and_mask_what_was_observed():
    rows = quest.demonstrate(quest.EASY, jax.random.key(0), 6)
    words = textquest.COMMAND_LENGTH * quest.EASY.max_turns
    counts = np.asarray(rows.mask.sum(1))
    assert (counts % textquest.COMMAND_LENGTH == 0).all() and (counts >= 6).all()
    assert (counts < words).all()  # every quest ended before the turns did
    chosen = np.asarray(rows.tokens)[np.asarray(rows.mask)].reshape(-1, textquest.COMMAND_LENGTH)
    assert set(chosen[:, 0]) <= {textquest.GO, textquest.TAKE, textquest.PUT}
    assert (chosen[:, 2] == textquest.EOS).all()


def test_a_budget_is_split_and_never_exceeded():
    config = multiturn_budget.Config()
    batch = config.tasks * config.group_size
    for share in config.shares:
        bought, updates = multiturn_budget.split(config, share)
        spent = bought * config.demonstration_cost + updates * batch
        assert 0 <= config.updates * batch - spent < batch + config.demonstration_cost
    with pytest.raises(ValueError, match="shares"):
        multiturn_budget.Config(shares=(0.0, 1.5))
