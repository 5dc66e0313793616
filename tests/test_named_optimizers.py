"""The optimizers that experiments know by name, and the comparison of four of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from experiments import compare_optimizers
from experiments.shared import optimizers

SIZE = pg.models.DecoderConfig(
    vocab_size=11, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, mlp_size=32,
    max_length=8, remat=None,
)  # fmt: skip


def update(name, rate, adam_rate=None):
    params = pg.models.init(SIZE, jax.random.key(0))[1]
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), params)
    rates = [None if r is None else optimizers.rising(r, 1) for r in (rate, adam_rate)]
    made = optimizers.make(name, rates[0], adam_rate=rates[1], weight_decay=0.0)
    state = made.update(gradient, made.init(params), params)[1]
    found = made.update(gradient, state, params)[0]  # SOAP's first update is zero
    return {
        jax.tree_util.keystr(path): np.abs(x).mean()
        for path, x in jax.tree_util.tree_leaves_with_path(found)
    }


@pytest.mark.parametrize("name", ["muon", "moonshot_muon", "polar_grad", "symmetry", "soap"])
def test_what_is_left_to_adam_has_a_rate_of_its_own(name):
    both, one = update(name, 1e-2, 1e-4), update(name, 1e-2)
    ratios = {k: both[k] / one[k] for k in one}
    untouched = {k for k, ratio in ratios.items() if ratio == pytest.approx(1, rel=1e-5)}
    left = 0.01 if name != "symmetry" else 1e-4 / 2.5e-2  # vectors stand to matrices by 2.5
    assert all(ratios[k] == pytest.approx(left, rel=1e-4) for k in ratios.keys() - untouched)
    assert untouched and untouched != ratios.keys()
    assert all("norm" not in k for k in untouched)
    assert all("attention" in k or "mlp" in k for k in untouched) or name == "symmetry"


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lion"])
def test_others_leave_nothing_to_adam(name):
    with pytest.raises(ValueError, match=f"adam_learning_rate: '{name}' leaves nothing"):
        update(name, 1e-2, 1e-4)


def test_rising_reaches_its_peak_and_stays():
    schedule = optimizers.rising(0.5, 5)
    seen = [float(schedule(jnp.int32(k))) for k in range(8)]
    np.testing.assert_allclose(seen, [0.1, 0.18, 0.26, 0.34, 0.42, 0.5, 0.5, 0.5], rtol=1e-6)


def test_every_stack_chooses_from_as_many_rates():
    config = compare_optimizers.Config()
    contest = compare_optimizers.contest(config)
    assert {len(rates) for rates in contest.candidates.values()} == {6}
    made = [
        contest.settings("micro19", 0, stack, rates)
        for stack, each in contest.candidates.items()
        for rates in each
    ]
    assert len({settings.out for settings in made}) == len(made) == 24
    assert {settings.warmup_from for settings in made} == {
        config.out / "micro19" / "seed0" / "warmup"
    }
    for changes, message in (
        ({"others": (1e-4,)}, "as many to choose from"),
        ({"seeds": 0}, "seeds"),
        ({"tasks": ()}, "tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_optimizers.contest(dataclasses.replace(config, **changes))
