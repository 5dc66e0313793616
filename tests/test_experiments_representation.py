"""The reproductions about features and uncertain values from end to end, in their tiny versions."""

import importlib
import json

import pytest


@pytest.mark.parametrize("name", ["beer_rank", "ggd_chain", "taco_pixels"])
def test_a_quick_run_writes_its_files(name, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    assert experiment.main(["--quick", "--out", str(tmp_path / "run")]) in (0, 1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["claims"] and found["table"]
    for columns in found["table"].values():
        assert all(len(x) == 3 for x in columns.values())


def test_values_of_the_chain():
    import numpy as np

    from experiments import ggd_chain

    rewards = np.random.default_rng(0).normal(size=10).astype(np.float32)
    found = np.asarray(ggd_chain.true_values(rewards))
    after = np.append(found[1:], 0.0)
    np.testing.assert_allclose(found, rewards + ggd_chain.GAMMA * after, rtol=1e-4, atol=1e-5)


def test_values_of_the_random_walk():
    import numpy as np

    from experiments import beer_rank

    rewards = np.random.default_rng(0).normal(size=100).astype(np.float32)
    found = np.asarray(beer_rank.true_values(rewards))
    following = beer_rank.grid().following
    np.testing.assert_allclose(
        found, rewards + beer_rank.GAMMA * found[following].mean(1), rtol=1e-3, atol=1e-4
    )
    near = beer_rank.grid(0).following
    assert set(near[0]) == {0, 1, 10} and set(near[55]) == {45, 56, 65, 54}
    # All cells of a block of 4 x 4 follow each other.
    block = {10 * i + j for i in range(3, 7) for j in range(3, 7)}
    assert all(block - {cell} <= set(following[cell]) for cell in block)
