"""Decoders with packed matrices: the same numbers, the bytes they should take, errors by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import models, quantize
from pgjax.models import linear, lora, matrices
from pgjax.models.low_bit import network, trace

LLAMA = models.DecoderConfig(
    vocab_size=11,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=24,
    max_length=16,
    qkv_bias=True,
)
VARIED = models.DecoderConfig(
    vocab_size=11,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_size=24,
    gated=False,
    activation="relu",
    norm="layer",
    mlp_bias=True,
    output_bias=True,
    learned_positions=True,
    tied_embeddings=True,
    max_length=16,
)
GEMMA = models.DecoderConfig(
    vocab_size=11,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_size=24,
    activation="gelu",
    norm_scale_offset=1.0,
    post_norms=True,
    qk_norm=True,
    attention_soft_cap=20.0,
    attention_kinds=(models.AttentionKind(window=3), models.AttentionKind()),
    layer_kinds=(0, 1),
    max_length=16,
)
TOKENS = np.random.default_rng(1).integers(0, 11, (6, 9))


@functools.cache
def build(config):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = "norm" in jax.tree_util.keystr(path) and "bias" not in jax.tree_util.keystr(path)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape) + offset, leaf.dtype)

    decoder = models.FunctionalDecoder(config)
    return decoder, jax.tree_util.tree_map_with_path(draw, models.abstract_params(config))


def rtn(bits, group=None):
    return lambda site: quantize.rtn(site.weight, bits=bits, group=group, scale_dtype=jnp.bfloat16)


def gptq(bits, group=None, **options):
    return lambda site: quantize.gptq(
        site.weight, site.hessian, bits=bits, group=group, scale_dtype=jnp.bfloat16, **options
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(decoder, params, tokens):
    return decoder.apply(params, tokens)


@pytest.mark.parametrize("config", [LLAMA, VARIED, GEMMA], ids=["llama", "varied", "gemma"])
def test_layers_one_by_one_are_the_decoder(config):
    decoder, params = build(config)
    x = trace.embedded(decoder, params, TOKENS)
    for index, kind in enumerate(config.kind_indices):
        layer = jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
        x = trace.outputs(params, layer, x, decoder=decoder, kind=kind, batch_size=3)
    got = decoder._merge(params)._final_norm(x)
    np.testing.assert_allclose(got, apply(decoder, params, TOKENS), atol=1e-5)


def test_inputs_of_the_first_layer():
    """Of query, key and value, and of up, from the formulas; masked tokens do not count."""
    decoder, params = build(LLAMA)
    mask = np.arange(9) < np.array([[9], [9], [5], [3], [9], [1]])
    found = models.low_bit.layer_moments(decoder, params, TOKENS, mask=mask, batch_size=2)[0]
    x = np.asarray(params["embedding"], np.float64)[TOKENS]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    x = (x * np.asarray(params["layers"]["attention_norm"][0]))[mask]
    np.testing.assert_allclose(
        found["attention/query"], 2 * x.T @ x / mask.sum(), rtol=1e-4, atol=1e-5
    )
    assert {n: h.shape for n, h in found.items()} == {
        "attention/query": (16, 16),
        "attention/output": (24, 24),
        "mlp/gate": (16, 16),
        "mlp/down": (24, 24),
    }


@pytest.mark.parametrize(("bits", "group"), [(3, 8), (8, None)])
def test_packed_decoder_is_the_rounded_one_and_takes_the_bytes_it_says(bits, group):
    decoder, params = build(LLAMA)
    found = models.low_bit.quantize_decoder(decoder, params, TOKENS, rtn(bits, group), bits=bits)
    layouts = matrices.of(params)
    packed = found.params
    leaves = dict(zip(layouts, [None] * len(layouts), strict=True))
    expected = 0
    for name in leaves:
        _, block, leaf = name.split("/")
        matrix, old = packed["layers"][block][leaf], params["layers"][block][leaf]
        assert isinstance(matrix, models.low_bit.PackedMatrix) and matrix.shape == old.shape
        layout = layouts[name]
        ins = int(np.prod(old.shape[1 : 1 + layout.ins]))
        outs = int(np.prod(old.shape[1 + layout.ins :]))
        groups = 1 if group is None else ins // group
        expected += (
            2
            * outs
            * (quantize.packed_width(ins, bits) + 2 * groups + quantize.packed_width(groups, bits))
        )
        for layer in range(2):
            rows = np.asarray(old[layer]).reshape(ins, outs).T
            want = quantize.rtn(jnp.asarray(rows), bits=bits, group=group, scale_dtype=jnp.bfloat16)
            np.testing.assert_allclose(
                np.asarray(matrix.dense()[layer]).reshape(ins, outs).T, want.q, atol=1e-7
            )
    assert found.bytes_after == expected
    assert found.bytes_before == sum(
        params["layers"][n.split("/")[1]][n.split("/")[2]].nbytes for n in leaves
    )
    saved = quantize.num_bytes(params) - quantize.num_bytes(packed)
    assert saved == found.bytes_before - found.bytes_after
    dense = models.low_bit.dense_params(packed)
    np.testing.assert_allclose(
        apply(decoder, packed, TOKENS), apply(decoder, dense, TOKENS), atol=1e-5
    )
    if bits == 8:
        np.testing.assert_allclose(
            apply(decoder, packed, TOKENS), apply(decoder, params, TOKENS), atol=0.2
        )


def test_generation_gradients_and_adapters_on_packed_matrices():
    decoder, params = build(LLAMA)
    packed = models.low_bit.quantize_decoder(decoder, params, TOKENS, gptq(4, 8), bits=4).params
    dense = models.low_bit.dense_params(packed)
    many = decoder.for_many_steps(packed)
    cache = models.empty_slot_cache(LLAMA, num_slots=6, capacity=16, lookahead=2)
    cache = decoder.caches_for_many_steps(cache)
    got, _ = decoder.extend(many, TOKENS[:, :2], cache, jnp.zeros(6, jnp.int32))
    np.testing.assert_allclose(got, apply(decoder, dense, TOKENS)[:, :2], atol=1e-4)
    adapters = lora.init(packed, jax.random.key(0), rank=2, alpha=4.0, targets=("*/query", "*/up"))

    def loss(adapters, params):
        return jnp.square(decoder.apply(lora.attach(params, adapters), TOKENS)).sum()

    got = jax.jit(jax.grad(loss))(adapters, packed)
    want = jax.jit(jax.grad(loss))(adapters, dense)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
        assert np.isfinite(np.asarray(a)).all()


def test_stages_see_what_was_quantised_before():
    decoder, params = build(GEMMA)
    seen = []

    def watch(site):
        seen.append(site)
        return rtn(2)(site)

    found = models.low_bit.quantize_decoder(decoder, params, TOKENS, watch, bits=2, batch_size=2)
    order = [f"layers/{name}" for stage in network.STAGES for name in stage]
    assert [(s.layer, s.name) for s in seen] == [(i, name) for i in range(2) for name in order]
    # Nothing before the first stage was quantised; everything after it is off.
    assert float(jnp.abs(seen[0].mismatch).max()) == 0.0
    assert all(float(jnp.abs(s.mismatch).max()) > 1e-3 for s in seen[3:])
    # The Hessian of a later stage is the quantised decoder's own, the mismatch leads to the other.
    dense = models.low_bit.dense_params(found.params)
    own = models.low_bit.layer_moments(decoder, dense, TOKENS)
    for site in seen:
        stage = next(s[0] for s in network.STAGES if site.name.removeprefix("layers/") in s)
        np.testing.assert_allclose(site.hessian, own[site.layer][stage], rtol=1e-3, atol=1e-3)
    for name, errors in found.errors.items():
        for layer in range(2):
            site = next(s for s in seen if (s.layer, s.name) == (layer, name))
            want = quantize.quadratic_error(
                site.weight,
                quantize.rtn(site.weight, bits=2, scale_dtype=jnp.bfloat16).q,
                site.hessian,
            )
            assert errors[layer] == pytest.approx(float(want), rel=1e-4)


def test_act_order_and_targets():
    decoder, params = build(VARIED)
    found = models.low_bit.quantize_decoder(
        decoder,
        params,
        TOKENS,
        gptq(3, 8, act_order=True, block=8),
        bits=3,
        targets=("layers/mlp/*",),
        act_order=True,
    )
    up = found.params["layers"]["mlp"]["up"]
    assert isinstance(up, models.low_bit.PackedMatrix) and up.g_idx.dtype == jnp.uint16
    assert isinstance(found.params["layers"]["attention"]["query"], jax.Array)
    assert set(found.errors) == {"layers/mlp/up", "layers/mlp/down"}
    # Nothing before the first layer's MLP was quantised.
    want = quantize.gptq(
        params["layers"]["mlp"]["up"][0].T,
        models.low_bit.layer_moments(decoder, params, TOKENS)[0]["mlp/gate"],
        bits=3,
        group=8,
        block=8,
        act_order=True,
        scale_dtype=jnp.bfloat16,
    )
    np.testing.assert_allclose(linear.dense(up)[0].T, want.q, atol=1e-5)
    np.testing.assert_allclose(
        apply(decoder, found.params, TOKENS),
        apply(decoder, models.low_bit.dense_params(found.params), TOKENS),
        atol=1e-5,
    )


@pytest.mark.parametrize("config", [LLAMA, VARIED], ids=["llama", "varied"])
def test_folded_scales_change_no_output(config):
    decoder, params = build(config)
    rng = np.random.default_rng(4)
    tuned = jax.tree.map(
        lambda p: p + jnp.asarray(rng.normal(size=p.shape) * (rng.random(p.shape) < 0.6), p.dtype),
        params,
    )
    importance = models.low_bit.finetune_importance(params, tuned)
    assert all((value >= 1).all() and value.shape[0] == 2 for value in importance.values())
    # Bits so few and groups so wide that scales are chosen.
    scaled, ratios = models.low_bit.scale_channels(
        decoder, params, TOKENS, importance, bits=2, group=None, n_grid=5
    )
    assert max(r.max() for r in ratios.values()) > 0
    changed = [
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(scaled), jax.tree.leaves(params), strict=True)
    ]
    assert max(changed) > 0.01
    np.testing.assert_allclose(
        apply(decoder, scaled, TOKENS), apply(decoder, params, TOKENS), rtol=1e-4, atol=1e-5
    )


def test_importance_of_a_decoder_is_that_of_its_matrices():
    _, params = build(LLAMA)
    rng = np.random.default_rng(5)
    tuned = jax.tree.map(
        lambda p: p + 0.1 * rng.exponential(size=p.shape).astype(np.float32), params
    )
    found = models.low_bit.finetune_importance(params, tuned, ratio=4.0)
    sizes = {
        name: np.abs(np.asarray(tuned["layers"][b][leaf] - params["layers"][b][leaf]))
        for name in matrices.of(params)
        for _, b, leaf in [name.split("/")]
    }
    stats = quantize.update_stats(sizes)
    rows = sizes["layers/attention/output"][1].reshape(24, 16).T
    want = quantize.channel_importance(jnp.asarray(rows), stats, ratio=4.0)
    np.testing.assert_allclose(found["attention/output"][1], want, rtol=1e-4)
    rows = sizes["layers/mlp/gate"][0].T
    want = quantize.channel_importance(jnp.asarray(rows), stats, ratio=4.0)
    np.testing.assert_allclose(found["mlp/gate"][0], want, rtol=1e-4)


def test_bad_input():
    decoder, params = build(LLAMA)
    run = functools.partial(
        models.low_bit.quantize_decoder, decoder, params, TOKENS, rtn(3), bits=3
    )
    with pytest.raises(ValueError, match="targets: 'mlp' matches none of the matrices"):
        run(targets=("mlp",))
    with pytest.raises(ValueError, match="batch_size: expected a divisor of 6 rows, got 4"):
        run(batch_size=4)
    with pytest.raises(ValueError, match="mask: expected shape"):
        run(mask=np.ones((6, 8), bool))
    with pytest.raises(ValueError, match="mask: expected dtype bool"):
        run(mask=np.ones((6, 9)))
    packed = run(targets=("*/up",)).params
    with pytest.raises(ValueError, match="layers/mlp/up: expected a JAX array, got PackedMatrix"):
        models.low_bit.quantize_decoder(decoder, packed, TOKENS, rtn(3), bits=3)
    with pytest.raises(ValueError, match="method: expected a result of shape"):
        models.low_bit.quantize_decoder(
            decoder, params, TOKENS, lambda s: quantize.rtn(s.weight[:2], bits=3), bits=3
        )
    moe = models.DecoderConfig(
        vocab_size=5,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        mlp_size=4,
        max_length=9,
        moe=models.MoEConfig(
            num_experts=2, experts_per_token=1, expert_size=4, normalize_weights=True
        ),
    )
    with pytest.raises(ValueError, match="decoder: expected dense layers, got a mixture"):
        models.low_bit.quantize_decoder(
            *models.init(moe, jax.random.key(0)), TOKENS, rtn(3), bits=3
        )
    with pytest.raises(ValueError, match="importance: expected one of"):
        models.low_bit.scale_channels(
            decoder, params, TOKENS, {"mlp/up": jnp.ones((2, 16))}, bits=3
        )
    with pytest.raises(ValueError, match="importance: expected 2 layers"):
        models.low_bit.scale_channels(
            decoder, params, TOKENS, {"mlp/gate": jnp.ones((3, 16))}, bits=3, group=None
        )
    result = quantize.rtn(jnp.ones((4, 6)), bits=3)
    with pytest.raises(ValueError, match="ins, outs: expected axes"):
        models.low_bit.packed(result, bits=3, ins=(4,), outs=(6,))
