"""The reproductions run and write what they found; whether claims hold takes their full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from experiments import consensus_gradient, samgs_toy, useful

NAMES = [
    "consensus_gradient",
    "samgs_toy",
    "sgd_sai",
    "sparse_ot",
    "sven_regression",
    "universal_transformer",
    "useful",
]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_run(name, tmp_path):
    _, columns = tiny_runs.run(name, tmp_path)
    size = 6 if name == "samgs_toy" else 3  # starts; seeds
    assert all(x.shape == (size,) for x in columns)


def test_canyon():
    assert float(consensus_gradient.canyon(jnp.zeros(2))) == pytest.approx(0.0, abs=1e-5)
    side = np.linspace(-10, 10, 401)
    grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), jnp.float32)
    values = np.asarray(jax.vmap(consensus_gradient.canyon)(grid))
    assert np.linalg.norm(grid[values.argmin()]) < 1e-6


def test_two_tasks_are_mirror_images():
    x = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32) * 5
    x[:, 1] = -np.abs(x[:, 1])
    mirrored = jax.vmap(samgs_toy.losses)(x * np.array([-1, 1], np.float32))
    np.testing.assert_allclose(
        jax.vmap(samgs_toy.losses)(x), mirrored[:, ::-1], rtol=1e-4, atol=1e-4
    )
    assert samgs_toy.least_value() == pytest.approx(-74.13, abs=0.01)


def test_examples_with_a_fast_feature():
    data = useful.draw(useful.Config(examples=4000), jax.random.key(0))
    there = np.asarray(data.fast)
    assert there.mean() == pytest.approx(0.9, abs=0.02)
    patches = np.asarray(data.patches) * np.asarray(data.labels)[:, None, None]
    np.testing.assert_allclose(patches[:, 0, 0], 0.4, rtol=1e-6)
    np.testing.assert_allclose(patches[there, 1, 1], 1.0, rtol=1e-6)
    assert not patches[~there, 1, :2].any() and not patches[:, 2, :2].any()
    assert patches[:, 2, 2:].std() == pytest.approx(0.15, rel=0.02)
