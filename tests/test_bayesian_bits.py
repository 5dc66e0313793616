"""Gated bit-widths and the adapters that learn them, against grids, closed forms and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pgjax import models, quantize
from pgjax.models import lora
from pgjax.quantize import blora


def adapter(seed=0, in_size=5, out_size=4, rank=3, **options):
    params = quantize.blora_init(jax.random.key(seed), in_size, out_size, rank=rank, **options)
    rng = np.random.default_rng(seed)
    weights = {
        n: jnp.asarray(rng.normal(size=w.shape), jnp.float32) for n, w in params.weights.items()
    }
    base = jnp.asarray(rng.normal(size=(out_size, in_size)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(7, in_size)), jnp.float32)
    return params._replace(weights=weights), base, x


def with_gates(params, **logits):
    gates = {n: jnp.full_like(phi, logits.get(n, 9.0)) for n, phi in params.gates.items()}
    return params._replace(gates=gates)


def test_probability_of_a_gate():
    phi = jnp.array([0.0, 6.0, -2.0])
    np.testing.assert_allclose(
        quantize.hard_concrete_prob(phi), [0.83182, 0.99950, 0.40098], atol=1e-5
    )
    draws = jax.vmap(lambda key: quantize.hard_concrete_sample(key, phi))(
        jax.random.split(jax.random.key(0), 40_000)
    )
    assert float(draws.min()) == 0.0 and float(draws.max()) == 1.0
    np.testing.assert_allclose((draws > 0).mean(0), quantize.hard_concrete_prob(phi), atol=0.01)
    edge = jnp.array([-0.9354, -0.9352, 0.0, -5.0])
    np.testing.assert_array_equal(quantize.hard_concrete_mode(edge), [0, 1, 1, 0])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("bits", "count"), [(2, 1), (4, 2), (8, 3), (16, 4)])
def test_all_gates_give_the_uniform_grid(bits, count, signed):
    beta = 1.7
    x = np.random.default_rng(0).uniform(-beta if signed else 0, beta, 4001).astype(np.float32)
    found = quantize.bayesian_bits(x, beta, [1.0] * count + [0.0] * (4 - count), signed=signed)
    step = (2 * beta if signed else beta) / (2**bits - 1)
    multiple = np.asarray(found, np.float64) / step
    assert np.abs(multiple - np.round(multiple)).max() < 2e-2 if bits == 16 else 1e-4
    assert np.abs(np.asarray(found, np.float64) - x).max() <= step / 2 + 4e-7
    off_ties = np.abs(x / step - np.floor(x / step) - 0.5) > (0.02 if bits == 16 else 1e-3)
    inside = np.abs(x) < beta - step
    want = step * np.round(x.astype(np.float64) / step)
    ok = off_ties & inside
    assert ok.sum() > 100 or bits == 2
    np.testing.assert_allclose(np.asarray(found)[ok], want[ok], atol=1e-6)
    if bits <= 4:
        levels = len(np.unique(np.round(multiple).astype(int)))
        assert levels == 2**bits - 1 if signed else 2**bits


def test_ends_never_reach_another_level():
    beta = np.random.default_rng(1).uniform(0.01, 100, 3000).astype(np.float32)
    for count, most in ((1, 1), (2, 7), (3, 127)):
        found = quantize.bayesian_bits(beta * 1.5, beta, [1.0] * count)
        step = 2 * beta / (2 ** (2**count) - 1)
        np.testing.assert_allclose(found / step, np.full(3000, most), rtol=1e-4)


def test_gates_are_nested():
    x = jnp.linspace(-0.9, 0.9, 41)
    two = quantize.bayesian_bits(x, 1.0, (1.0,))
    np.testing.assert_allclose(quantize.bayesian_bits(x, 1.0, (1.0, 0.0, 1.0, 1.0)), two)
    np.testing.assert_array_equal(quantize.bayesian_bits(x, 1.0, (0.0, 1.0, 1.0)), 0 * x)

    def total(fine, first):
        return quantize.bayesian_bits(x, 1.0, (1.0, first, *fine)).sum() + 0.0

    at = jnp.array([0.7, 0.4])
    np.testing.assert_array_equal(jax.grad(total)(at, 0.0), [0.0, 0.0])
    odd = jnp.linspace(-0.9, 0.8, 41)
    slopes = jax.grad(lambda f: quantize.bayesian_bits(odd, 1.0, (1.0, 1.0, *f)).sum())(at)
    assert np.abs(slopes).min() > 1e-5
    # z8 multiplies x8 + z16 x16.
    x8, x16 = (
        quantize.bayesian_bits(odd, 1.0, (1.0,) * n)
        - quantize.bayesian_bits(odd, 1.0, (1.0,) * (n - 1))
        for n in (3, 4)
    )
    np.testing.assert_allclose(slopes, [(x8 + 0.4 * x16).sum(), (0.7 * x16).sum()], atol=1e-4)


def test_gradient_is_straight_through():
    x = jnp.array([-1.4, -0.7, 0.01, 0.6, 1.2])
    for count in (1, 2, 4):
        slope = jax.vmap(jax.grad(lambda v, n=count: quantize.bayesian_bits(v, 1.0, (1.0,) * n)))(x)
        np.testing.assert_allclose(slope, [0, 1, 1, 1, 0], atol=1e-5)
    to_range = jax.grad(lambda b: quantize.bayesian_bits(jnp.float32(3.0), b, (1.0, 1.0)))(1.0)
    # Beyond the range: the last level, 14/15 of it.
    assert float(to_range) == pytest.approx(14 / 15, rel=1e-4)


def test_penalty():
    q = [1 / (1 + np.exp(-(p + 1.5986))) for p in (0.5, -1.0, 2.0)]
    found = quantize.gate_penalty([jnp.float32(0.5), jnp.float32(-1.0), jnp.float32(2.0)])
    assert float(found) == pytest.approx(q[0] * (1 + q[1] * (1 + q[2])), rel=1e-4)
    found = quantize.gate_penalty([None, jnp.float32(-1.0), jnp.float32(2.0)], (2.0, 4.0, 8.0))
    assert float(found) == pytest.approx(2 + q[1] * (4 + 8 * q[2]), rel=1e-4)
    ranks = [jnp.array([0.5, -1.0, 2.0]), jnp.float32(-1.0)]
    total = sum(p * (1 + q[1]) for p in q)
    assert float(quantize.gate_penalty(ranks, reduction="sum")) == pytest.approx(total, rel=1e-4)
    assert float(quantize.gate_penalty(ranks)) == pytest.approx(total / 3, rel=1e-4)
    params, *_ = adapter()
    slopes = jax.grad(lambda p: quantize.blora_penalty(p))(params)
    assert all((g > 0).all() for g in jax.tree.leaves(slopes.gates))
    assert not any(g.any() for g in jax.tree.leaves(slopes.weights))
    assert quantize.bop_weights(8, 10, 40) == (0.5, 1.0, 2.0)


def test_no_rank_is_the_base():
    params, base, x = adapter()
    params = with_gates(params, rank=-9.0)
    bias = jnp.arange(4.0)
    found, none = quantize.blora_apply(
        params, None, x, base=base, bias=bias, alpha=6.0, deterministic=True
    )
    assert none is None and int(quantize.effective_rank(params)) == 0
    kept = quantize.bayesian_bits(base, jnp.abs(base).max(), (1.0,) * 4)
    np.testing.assert_allclose(found, x @ kept.T + bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kept, base, atol=1e-4)  # 16 bits


def test_deterministic_is_the_merged_matrix():
    params, base, x = adapter()
    gates = {**params.gates, "rank": jnp.array([4.0, -4.0, 1.0])}
    gates["a"], gates["base"] = jnp.array([-3.0, 1.0, 1.0]), jnp.array([3.0, -3.0, 1.0])
    params = params._replace(gates=gates)
    options = {"base": base, "alpha": 6.0, "deterministic": True}
    found, _ = quantize.blora_apply(params, jax.random.key(1), x, **options)
    again, _ = quantize.blora_apply(params, jax.random.key(2), x, dropout=0.5, **options)
    np.testing.assert_array_equal(found, again)
    merged = quantize.merge(params, base, alpha=6.0)
    np.testing.assert_allclose(found, x @ merged.T, rtol=1e-4, atol=1e-4)
    assert int(quantize.effective_rank(params)) == 2
    bits = {n: int(b) for n, b in quantize.effective_bits(params).items()}
    assert (bits["a"], bits["base"], bits["b"]) == (2, 4, 16)
    # By the definition, component 1 being off.
    a = quantize.bayesian_bits(params.weights["a"], jnp.abs(params.weights["a"]).max(), (1.0,))
    e, b = params.weights["e"], params.weights["b"]
    kept = quantize.bayesian_bits(base, jnp.abs(base).max(), (1.0, 1.0))
    want = kept + 2.0 * (b * e * jnp.array([1.0, 0.0, 1.0])) @ a
    np.testing.assert_allclose(merged, want, atol=2e-3)


def test_adapter_of_a_decoder():
    """Trained gates and all, a stack of adapters becomes LoRA's."""
    config = models.DecoderConfig(
        vocab_size=7, hidden_size=5, num_layers=2, num_heads=1, head_dim=4, mlp_size=4, max_length=8
    )
    decoder, params = models.init(config, jax.random.key(0))
    stack = [adapter(seed)[0] for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stack)
    a, b = jax.vmap(blora.factors)(stacked)
    made = lora.Adapter(a=a, b=b, alpha=6.0)
    tree = lora.attach(params, {"layers": {"mlp": {"up": made}}})
    dense = lora.merge(params, {"layers": {"mlp": {"up": made}}})
    for layer, part in enumerate(stack):
        want = quantize.merge(part, jnp.zeros((4, 5)), alpha=6.0).T
        gap = dense["layers"]["mlp"]["up"][layer] - params["layers"]["mlp"]["up"][layer]
        np.testing.assert_allclose(gap, want, atol=1e-4)
    tokens = jnp.array([[1, 2, 3]])
    np.testing.assert_allclose(decoder.apply(tree, tokens), decoder.apply(dense, tokens), atol=1e-4)


def test_start():
    params = quantize.blora_init(jax.random.key(0), 40, 50, rank=30)
    assert float(params.weights["a"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(params.weights["e"].std()) == pytest.approx(1.0, rel=0.4)
    assert float(jnp.abs(params.weights["b"]).max()) > 0
    np.testing.assert_array_equal(params.gates["a"], [1.0, 6.0, 6.0])
    np.testing.assert_array_equal(params.gates["rank"], np.full(30, 6.0))
    params = quantize.blora_init(jax.random.key(0), 4, 5, rank=3, zero_init_b=True, max_bits=4)
    assert params.gates["a"].shape == (1,)
    base, x = jnp.ones((5, 4)), jnp.ones((2, 4))
    found, _ = quantize.blora_apply(
        params, jax.random.key(1), x, base=base, alpha=1.0, deterministic=True
    )
    np.testing.assert_allclose(found, np.full((2, 5), 4 * 14 / 15), rtol=1e-4)


def test_activations_have_running_ranges():
    params, base, x = adapter()
    params, ranges = with_gates(params), quantize.blora_ranges()
    options = {"base": base, "alpha": 6.0}

    @jax.jit
    def apply(key, x, ranges):
        return quantize.blora_apply(params, key, x, deterministic=False, ranges=ranges, **options)

    y, first = apply(jax.random.key(0), x, ranges)
    assert set(first) == set(blora.ACTIVATIONS)
    biggest = jnp.abs(x @ quantize.merge(with_gates(params, rank=-9.0), base, alpha=6.0).T).max()
    assert float(first["base_output"]) == pytest.approx(float(biggest), rel=0.05)
    _, second = apply(jax.random.key(0), 3 * x, first)
    assert float(second["base_output"]) == pytest.approx(
        float(0.9 * first["base_output"] + 0.1 * 3 * first["base_output"]), rel=1e-3
    )
    held, same = quantize.blora_apply(params, None, x, deterministic=True, ranges=second, **options)
    assert {n: float(v) for n, v in same.items()} == {n: float(v) for n, v in second.items()}
    plain, _ = quantize.blora_apply(params, None, x, deterministic=True, **options)
    np.testing.assert_allclose(held, plain, atol=0.05 * float(jnp.abs(plain).max()))
    assert np.abs(np.asarray(held - plain)).max() > 0
    assert np.isfinite(np.asarray(y)).all()


def test_two_optimizers():
    params, base, x = adapter()
    optimizer = optax.partition(
        {"weights": optax.sgd(0.1), "gates": optax.set_to_zero()},
        blora.BLora(weights="weights", gates="gates"),
    )

    def loss(params):
        y, _ = quantize.blora_apply(
            params, jax.random.key(0), x, base=base, alpha=6.0, deterministic=False, dropout=0.2
        )
        return jnp.square(y).mean() + quantize.blora_penalty(params)

    slopes = jax.grad(loss)(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slopes))
    assert float(jnp.abs(slopes.gates["rank"]).max()) > 0
    update, _ = optimizer.update(slopes, optimizer.init(params), params)
    assert not any(u.any() for u in jax.tree.leaves(update.gates))
    assert float(jnp.abs(update.weights["a"]).max()) > 0
    fixed = jax.grad(
        lambda b: quantize.blora_apply(params, None, x, base=b, alpha=6.0, deterministic=True)[
            0
        ].sum()
    )(base)
    np.testing.assert_array_equal(fixed, 0 * base)


def test_bad_input():
    params, base, x = adapter()
    for beta in (0.0, -1.0, jnp.array([1.0, 0.0])):
        with pytest.raises(ValueError, match="beta_q: expected positive"):
            quantize.bayesian_bits(jnp.ones(2), beta, (1.0,))
    for gates in ((), (1.0,) * 6):
        with pytest.raises(ValueError, match="gates: expected 1 to 5"):
            quantize.bayesian_bits(x, 1.0, gates)
    for bits in (3, 0, 64, 12):
        with pytest.raises(ValueError, match="max_bits: expected a power of two"):
            quantize.num_gates(bits)
    with pytest.raises(ValueError, match="max_bits: expected a power of two of 4"):
        quantize.blora_init(jax.random.key(0), 2, 2, rank=1, max_bits=2)
    for rank in (0, -1, 1.5):
        with pytest.raises(ValueError, match="rank: expected a positive int"):
            quantize.blora_init(jax.random.key(0), 2, 2, rank=rank)
    for strength in (0.0, -1.0):
        with pytest.raises(ValueError, match="strength: expected"):
            quantize.blora_penalty(params, strength=strength)
    with pytest.raises(ValueError, match="parts: expected one of"):
        quantize.blora_penalty(params, parts=("c",))
    with pytest.raises(ValueError, match="phis: expected a scalar for 4 bits, got shape"):
        quantize.gate_penalty([None, jnp.ones(3)])
    with pytest.raises(ValueError, match="phis: expected a scalar or a vector for 2 bits"):
        quantize.gate_penalty([jnp.ones((2, 2))])
    with pytest.raises(ValueError, match="phis: expected logits"):
        quantize.gate_penalty([])
    with pytest.raises(ValueError, match="weights: expected 1 of them"):
        quantize.gate_penalty([jnp.zeros([])], (1.0, 2.0))
    with pytest.raises(ValueError, match="weights: expected a number"):
        quantize.gate_penalty([jnp.zeros([])], (0.0,))
    with pytest.raises(ValueError, match="reduction: expected one of"):
        quantize.gate_penalty([jnp.zeros([])], reduction="max")
    options = {"base": base, "alpha": 1.0, "deterministic": True}
    with pytest.raises(ValueError, match="params: expected a of shape"):
        quantize.blora_apply(params, None, x[:, :3], **options)
    with pytest.raises(ValueError, match="params: expected b of shape"):
        quantize.blora_apply(params, None, x, **{**options, "base": base[:2]})
    with pytest.raises(ValueError, match="base: expected shape"):
        quantize.blora_apply(params, None, x, **{**options, "base": base[:, :2]})
    with pytest.raises(ValueError, match="bias: expected shape"):
        quantize.blora_apply(params, None, x, bias=jnp.ones(3), **options)
    with pytest.raises(ValueError, match="key: expected a key"):
        quantize.blora_apply(params, None, x, **{**options, "deterministic": False})
    wrong = params._replace(gates={**params.gates, "rank": jnp.ones(2)})
    with pytest.raises(ValueError, match="expected 3 rank gates"):
        quantize.blora_apply(wrong, None, x, **options)
    with pytest.raises(ValueError, match="dropout"):
        quantize.blora_apply(params, None, x, dropout=1.0, **options)
