"""Spectra of gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.diagnostics import spectra


def test_known_spectra():
    x = jnp.stack([jnp.diag(jnp.array([4.0, 2.0])), jnp.eye(2), jnp.zeros((2, 2))])
    np.testing.assert_allclose(spectra.condition_number(x), [2, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(spectra.nuclear_norm(x), [6, 2, 0], rtol=1e-6)
    p = np.array([2 / 3, 1 / 3])
    wanted = [np.exp(-np.sum(p * np.log(p))), 2, 0]
    np.testing.assert_allclose(spectra.effective_rank(x), wanted, rtol=1e-6)
    rank_one = jnp.outer(jnp.ones(3), jnp.arange(4.0))
    np.testing.assert_allclose(spectra.effective_rank(rank_one), 1, rtol=1e-3)


def test_against_numpy_for_any_shape():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(spectra.condition_number(x), np.linalg.cond(x), rtol=1e-4)
    np.testing.assert_allclose(
        spectra.nuclear_norm(x), np.linalg.norm(x, "nuc", (-2, -1)), rtol=1e-4
    )


def test_bad_input():
    with pytest.raises(ValueError, match="g: expected rank 2 or more"):
        spectra.nuclear_norm(jnp.ones(3))
    with pytest.raises(ValueError, match="g: expected a floating dtype"):
        spectra.effective_rank(jnp.ones((2, 2), int))
