"""The reproductions run through, in their smallest form, and write what they found."""

import json

import jax
import numpy as np
import pytest

from experiments import copo_vanishing, disco_difficulty, engine_mismatch, hpt_hybrid


@pytest.mark.parametrize("module", [disco_difficulty, copo_vanishing, hpt_hybrid, engine_mismatch])
def test_quick(module, tmp_path):
    code = module.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert code == (0 if all(claim["holds"] for claim in found["claims"]) else 1)
    assert found["table"] and found["claims"]
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_hybrids_policy_starts_as_its_task_says():
    config = hpt_hybrid.Config()
    task_key, key = jax.random.split(jax.random.key(1))
    task = hpt_hybrid.make_task(config, task_key)
    params = hpt_hybrid.initial(config, task, key)
    measured = hpt_hybrid.measure(task, params)
    assert float(measured["easy"]) == pytest.approx(0.5, abs=0.02)
    assert float(measured["hard"]) < 1e-3
    batch = hpt_hybrid.draw(config, task, params, key, shown=True)
    shown = np.asarray(batch.extras["demonstrated"])
    np.testing.assert_array_equal(batch.group_ids[shown], np.arange(2 * config.prompts))
    np.testing.assert_array_equal(batch.rewards[shown], 1.0)
    own_easy = ~shown & task.easy[np.asarray(batch.group_ids)]
    assert batch.rewards[own_easy].mean() == pytest.approx(0.5, abs=0.18)  # 4 errors of 128 samples
