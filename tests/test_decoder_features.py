"""What the model families differ in: consistency of whole rows, caches, packing and experts."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import models
from pgjax.models import AttentionKind, MoEConfig, Rotary, attention, moe, rotary

BASE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_size": 24,
    "max_length": 64,
}
LOCAL = AttentionKind(window=3, rotary=Rotary(theta=100.0))
GLOBAL = AttentionKind(rotary=Rotary(theta=1000.0, scaling="linear", factor=2.0))
NOPE = AttentionKind(rotary=None)
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, expert_size=12, normalize_weights=True)
VARIANTS = {
    "plain": {"num_kv_heads": 4},
    "grouped": {},
    "multi_query_wide_heads": {"num_kv_heads": 1, "head_dim": 6},
    "window": {"attention_kinds": (LOCAL,)},
    "local_global": {"attention_kinds": (LOCAL, GLOBAL), "layer_kinds": (0, 1)},
    "period_and_rest": {
        "attention_kinds": (LOCAL, GLOBAL),
        "layer_kinds": (0, 0, 1, 0, 0),
        "num_layers": 5,
    },
    "nope": {"attention_kinds": (GLOBAL, NOPE), "layer_kinds": (0, 1, 0), "num_layers": 3},
    "gemma": {
        "norm_scale_offset": 1.0,
        "post_norms": True,
        "embedding_scale": 4.0,
        "attention_soft_cap": 2.0,
        "query_scale": 0.3,
        "qk_norm": "head",
    },
    "layer_norm": {
        "norm": "layer",
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": "gelu",
    },
    "sinks": {"attention_sinks": True, "attention_kinds": (LOCAL, GLOBAL), "layer_kinds": (0, 1)},
    "projection_norm": {"qk_norm": "projection"},
    "moe": {"moe": EXPERTS},
    "moe_everything": {
        "moe": dataclasses.replace(
            EXPERTS,
            normalize_weights=False,
            router_bias=True,
            expert_bias=True,
            shared_size=8,
            shared_gate=True,
        ),
        "activation": "clamped_swiglu",
    },
    "dynamic": {
        "attention_kinds": (
            AttentionKind(
                rotary=Rotary(scaling="dynamic", factor=4.0, original_max_length=4, theta=10.0)
            ),
        )
    },
}


@functools.cache
def build(**changes):
    config = models.DecoderConfig(**{**BASE, **changes})
    rng = np.random.default_rng(0)

    def draw(leaf):
        return jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype)

    return models.FunctionalDecoder(config), jax.tree.map(draw, models.abstract_params(config))


@functools.partial(jax.jit, static_argnums=0)
def apply(decoder, params, tokens, **options):
    return decoder.apply(params, tokens, **options)


def assert_close(found, expected, tolerance=3e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_and_decode_equal_whole_rows(name):
    decoder, params = build(**VARIANTS[name])
    rng = np.random.default_rng(2)
    lengths, samples, steps = np.array([3, 8, 1]), 2, 7
    prompts = rng.integers(0, 11, (3, 8))
    completions = rng.integers(0, 11, (3, samples, steps))
    hidden, prefix = jax.jit(decoder.prefill)(params, prompts, lengths)
    cache = models.empty_completion_cache(
        decoder.config, num_prompts=3, num_samples=samples, num_slots=steps
    )
    decode_step = jax.jit(decoder.decode_step)
    found = []
    for step in range(steps):
        out, cache = decode_step(params, completions[:, :, step], prefix, cache, step)
        found.append(out)
    for p in range(3):
        for g in range(samples):
            end = lengths[p] + steps
            row = np.zeros((1, 16), np.int32)
            row[0, :end] = np.concatenate([prompts[p, : lengths[p]], completions[p, g]])
            expected = apply(decoder, params, row)[0, lengths[p] - 1 : end]
            assert_close(hidden[p], expected[0])
            assert_close(np.stack([f[p, g] for f in found]), expected[1:])


@pytest.mark.parametrize("name", VARIANTS)
def test_extending_slots_equals_whole_rows(name):
    """Slots at different positions, several tokens at once, some taken back."""
    decoder, params = build(**VARIANTS[name])
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 11, (3, 24)).astype(np.int32)
    expected = apply(decoder, params, rows)
    lengths = np.array([2, 6, 1])
    _, prefix = jax.jit(decoder.prefill)(params, rows[:, :6], lengths)
    cache = models.empty_slot_cache(decoder.config, num_slots=4, capacity=30, lookahead=3)
    # Prompt 0 in slot 2, prompt 1 in slot 0, prompt 2 in slot 1, one left out; slot 3 is idle.
    cache = jax.jit(models.insert_prefix)(
        cache, prefix, np.array([0, 1, 2, 0]), np.array([2, 0, 1, 9])
    )
    row_of, position = np.array([1, 2, 0, 0]), np.array([6, 1, 2, 0])
    extend = jax.jit(decoder.extend)
    for kept in (3, 1, 2, 3, 1):
        tokens = np.stack([rows[r, p : p + 3] for r, p in zip(row_of, position, strict=True)])
        tokens[:, kept:] = (tokens[:, kept:] + 5) % 11  # drafts that are to be taken back
        out, cache = extend(params, tokens, cache, position)
        for slot in range(3):
            start = position[slot]
            assert_close(out[slot, :kept], expected[row_of[slot], start : start + kept])
        position = position + kept


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_rows_equal_separate_rows(name):
    decoder, params = build(**VARIANTS[name])
    rng = np.random.default_rng(4)
    lengths = (5, 2, 6)
    parts = [rng.integers(0, 11, n) for n in lengths]
    packed = np.concatenate([*parts, [0, 0, 0]])[None]
    ids = np.repeat([1, 2, 3, 0], [*lengths, 3])[None]
    positions = np.concatenate([*map(np.arange, lengths), np.arange(3)])[None]
    found = apply(decoder, params, packed, positions=positions, segment_ids=ids)[0]
    start = 0
    for part in parts:
        alone = apply(decoder, params, np.pad(part, (0, 8 - len(part)))[None])[0, : len(part)]
        assert_close(found[start : start + len(part)], alone)
        start += len(part)


@pytest.mark.parametrize("name", ["plain", "local_global", "sinks"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", ["QUERY_BLOCK", "LEAST_STAGE"])
def test_parts_of_queries_change_nothing(name, packed, size, monkeypatch):
    """Neither blocks nor stages, which do not divide the row evenly."""
    decoder, params = build(**VARIANTS[name])
    tokens = np.random.default_rng(5).integers(0, 11, (2, 23))
    options = {}
    if packed:
        ids = np.sort(np.random.default_rng(6).integers(0, 4, (2, 23)), axis=1)
        options = {"segment_ids": ids}

    def run(params):
        return jnp.sin(decoder.apply(params, tokens, **options)).sum()

    expected = jax.jit(jax.value_and_grad(run))(params)
    monkeypatch.setattr(attention, size, 5)
    found = jax.jit(jax.value_and_grad(lambda p: run(p)))(params)
    jax.tree.map(functools.partial(assert_close, tolerance=2e-4), found, expected)


def test_keys_that_no_query_of_a_stage_sees_cost_nothing(monkeypatch):
    query = jax.ShapeDtypeStruct((1, 512, 4, 16), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 2, 512, 16), jnp.float32)

    def flops(window):
        settings = attention.AttentionSettings(scale=0.25, window=window)
        attend = functools.partial(attention.sequence_attention, settings=settings)
        return jax.jit(attend).lower(query, key, key).compile().cost_analysis()["flops"]

    staged, narrow = flops(None), flops(32)
    monkeypatch.setattr(attention, "MAX_STAGES", 1)
    whole = flops(None)
    assert staged < 0.66 * whole  # (1 + 2 + 3 + 4) / 16 of the products
    assert narrow < 0.33 * whole  # 128 to 159 of 512 keys in every stage


def test_activation_memory_grows_linearly_in_length():
    def temporary(length):
        config = models.DecoderConfig(
            vocab_size=64,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            mlp_size=128,
            max_length=length,
            remat="full",
        )
        decoder = models.FunctionalDecoder(config)

        def loss(params, tokens):
            return decoder.apply(params, tokens).sum()

        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(models.abstract_params(config), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporary(2048 * n) for n in (1, 2, 4)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
    assert sizes[2] < 4.2 * sizes[0]


def test_window_layers_hold_only_their_window():
    decoder, _ = build(**VARIANTS["local_global"])
    cache = models.empty_slot_cache(decoder.config, num_slots=2, capacity=50, lookahead=4)
    assert [keys.shape[3] for keys in cache.keys] == [3 + 3, 50]
    completion = models.empty_completion_cache(
        decoder.config, num_prompts=1, num_samples=2, num_slots=40
    )
    assert [keys.shape[4] for keys in completion.keys] == [3, 40]
    params = models.abstract_params(decoder.config)
    tokens, lengths = jnp.zeros((1, 9), jnp.int32), jnp.ones(1, jnp.int32)
    prefix = jax.eval_shape(decoder.prefill, params, tokens, lengths)[1]
    assert [keys.shape[3] for keys in prefix.keys] == [3, 9]


def test_masks_from_positions():
    q, k = np.arange(5)[:, None], np.arange(5)
    np.testing.assert_array_equal(attention.attendable(q, k), np.tri(5, dtype=bool))
    banded = attention.attendable(q, k, window=2)
    np.testing.assert_array_equal(banded, np.tri(5, dtype=bool) & ~np.tri(5, k=-2, dtype=bool))


def test_sinks_take_weight_from_the_row():
    scores, sink = np.array([0.3, -1.0, 2.0]), 0.7
    weights = attention.masked_softmax(
        jnp.asarray(scores), jnp.array([True, False, True]), jnp.asarray(sink)
    )
    total = math.exp(0.3) + math.exp(2.0) + math.exp(0.7)
    assert_close(weights, np.array([math.exp(0.3), 0.0, math.exp(2.0)]) / total, 1e-6)
    low = attention.masked_softmax(jnp.asarray(scores), jnp.ones(3, bool), jnp.asarray(-1e30))
    assert_close(low, jax.nn.softmax(jnp.asarray(scores)), 1e-6)


def _plain_attention(query, key, value, sinks, *, seen, scale, soft_cap):
    """One row in NumPy, float64: query [T, heads, D], key and value [kv_heads, T, D]."""
    heads, out = query.shape[1], np.zeros(query.shape)
    for t in range(query.shape[0]):
        for h in range(heads):
            own = h // (heads // key.shape[0])
            scores = scale * key[own] @ query[t, h]
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            exps = np.where(seen[t], np.exp(scores), 0.0)
            out[t, h] = exps @ value[own] / (exps.sum() + np.exp(sinks[h]))
    return out


@pytest.mark.parametrize("blocks", [False, True])
def test_attention_and_its_derivatives_equal_a_loop_over_queries(blocks, monkeypatch):
    """Sinks, window, soft cap, packed row; the derivatives by central differences in float64."""
    if blocks:
        monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    rng = np.random.default_rng(11)
    length, heads, kv_heads, dim = 7, 4, 2, 3
    shapes = [(length, heads, dim), (kv_heads, length, dim), (kv_heads, length, dim), (heads,)]
    point, direction, other = ([rng.normal(size=s) for s in shapes] for _ in range(3))
    cotangent = rng.normal(size=shapes[0])
    ids = np.array([0, 0, 0, 1, 1, 1, 1])
    at = np.arange(length)
    seen = (at <= at[:, None]) & (at > at[:, None] - 3) & (ids == ids[:, None])

    def expected(*arrays):
        return _plain_attention(*arrays, seen=seen, scale=0.6, soft_cap=2.0)

    def along(function, step, *moves):
        """The mixed derivative along the moves."""
        if not moves:
            return function(*point)
        first, *rest = moves

        def difference(*arrays):
            ahead = function(*(a + step * d for a, d in zip(arrays, first, strict=True)))
            behind = function(*(a - step * d for a, d in zip(arrays, first, strict=True)))
            return (ahead - behind) / (2 * step)

        return along(difference, step, *rest)

    settings = attention.AttentionSettings(scale=0.6, window=3, soft_cap=2.0)

    def found(query, key, value, sinks):
        return attention.sequence_attention(
            query[None],
            key[None],
            value[None],
            settings=settings,
            segment_ids=jnp.asarray(ids[None], jnp.int32),
            sinks=sinks,
        )[0]

    def narrow(arrays):
        return tuple(jnp.asarray(a, jnp.float32) for a in arrays)

    def projected(*arrays):
        return jnp.vdot(found(*arrays), jnp.asarray(cotangent, jnp.float32))

    out, tangent = jax.jvp(found, narrow(point), narrow(direction))
    assert_close(out, expected(*point), 1e-6)
    change = along(expected, 1e-5, direction)
    assert_close(tangent, change, 1e-5)
    gradient = jax.grad(projected, argnums=(0, 1, 2, 3))
    backward = sum(np.vdot(g, d) for g, d in zip(gradient(*narrow(point)), direction, strict=True))
    assert_close(backward, np.vdot(change, cotangent), 1e-5)
    _, second = jax.jvp(gradient, narrow(point), narrow(direction))
    second = sum(np.vdot(g, d) for g, d in zip(second, other, strict=True))
    assert_close(second, np.vdot(along(expected, 1e-4, direction, other), cotangent), 1e-4)


def test_keeping_products_keeps_what_attention_gave():
    """Of the six products of a layer's attention and its gradient, "dots" makes the scores again,
    "full" the result as well."""
    tokens = jnp.zeros((2, 8), jnp.int32)

    def products(remat):
        decoder, params = build(remat=remat)

        def loss(params):
            return decoder.apply(params, tokens).sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        # Attention's are those of a batch; the loops over layers hold each once.
        return len(re.findall(r" dot\(.*lhs_batch_dims=", compiled.as_text()))

    assert {remat: products(remat) for remat in (None, "dots", "full")} == {
        None: 6,
        "dots": 7,
        "full": 8,
    }


def test_splash_attention_equals_the_portable_one():
    """In Pallas' interpreter; the TPU's own program is lowered, not run."""
    rng = np.random.default_rng(7)
    query = jnp.asarray(rng.normal(size=(1, 128, 2, 64)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(1, 1, 128, 64)), jnp.float32) for _ in range(2))
    ids = jnp.asarray(np.repeat([0, 1, 2], [50, 40, 38])[None], jnp.int32)
    for window, cap, segments in ((None, None, None), (20, None, None), (None, 5.0, ids)):
        settings = attention.AttentionSettings(scale=0.125, window=window, soft_cap=cap)
        found = attention._splash(
            query, key, value, settings=settings, segment_ids=segments, interpret=True
        )
        expected = attention.sequence_attention(
            query, key, value, settings=settings, segment_ids=segments
        )
        assert_close(found, expected, 2e-3)

        def loss(query, key, value, settings=settings, segments=segments):
            return attention._splash(
                query, key, value, settings=settings, segment_ids=segments
            ).sum()

        lowered = jax.jit(jax.grad(loss)).trace(query, key, value)
        assert "tpu_custom_call" in lowered.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("scaling", ["llama3", "yarn", "linear", "dynamic"])
def test_scaled_rotations_are_plain_where_nothing_is_scaled(scaling):
    plain = rotary.inverse_frequencies(Rotary(theta=500.0), 16)
    scaled = Rotary(theta=500.0, scaling=scaling, factor=1.0, original_max_length=32)
    assert_close(rotary.inverse_frequencies(scaled, 16), plain, 1e-6)
    positions = jnp.arange(32)
    for found, expected in zip(
        rotary.rotary_tables(positions, scaled, head_dim=16),
        rotary.rotary_tables(positions, Rotary(theta=500.0), head_dim=16),
        strict=True,
    ):
        assert_close(found, expected, 1e-5)


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    scaled = Rotary(theta=10_000.0, scaling="yarn", factor=4.0, original_max_length=2048)
    ratio = rotary.inverse_frequencies(scaled, 64) / rotary.inverse_frequencies(Rotary(), 64)
    assert_close(ratio[:8], 1.0, 1e-6)
    assert_close(ratio[-4:], 0.25, 1e-6)
    assert (np.diff(ratio) <= 1e-6).all()
    assert rotary.attention_factor(scaled) == pytest.approx(0.1 * math.log(4.0) + 1)


# Experts


def expert_params(rng, experts=4, hidden=6, inner=5):
    shapes = {"gate": (experts, hidden, inner), "up": (experts, hidden, inner)}
    shapes["down"] = (experts, inner, hidden)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_mixture_equals_a_loop_over_tokens():
    rng = np.random.default_rng(8)
    p = expert_params(rng)
    x, logits = rng.normal(size=(7, 6)), rng.normal(size=(7, 4))
    for normalize in (False, True):
        experts = moe.choose(jnp.asarray(logits), 2)
        weights = moe.routing_weights(jnp.asarray(logits), experts, normalize=normalize)
        found = moe.mixture(
            jnp.asarray(x, jnp.float32),
            experts,
            weights,
            **{name: jnp.asarray(w, jnp.float32) for name, w in p.items()},
            combine=lambda gate, up: jax.nn.relu(gate) * up,
        )
        expected = np.zeros_like(x)
        for n in range(7):
            probabilities = np.exp(logits[n]) / np.exp(logits[n]).sum()
            chosen = np.argsort(-logits[n])[:2]
            total = probabilities[chosen].sum() if normalize else 1.0
            for e in chosen:
                inner = np.maximum(x[n] @ p["gate"][e], 0) * (x[n] @ p["up"][e])
                expected[n] += probabilities[e] / total * (inner @ p["down"][e])
        assert_close(found, expected, 1e-4)


def test_no_choice_is_dropped_when_all_tokens_want_the_same_experts():
    rng = np.random.default_rng(9)
    p = {name: jnp.asarray(w, jnp.float32) for name, w in expert_params(rng).items()}
    x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    experts = jnp.tile(jnp.array([[2, 0]]), (9, 1))
    combine = lambda gate, up: gate * up  # noqa: E731
    found = moe.mixture(x, experts, jnp.ones((9, 2)) / 2, **p, combine=combine)
    expected = sum(((x @ p["gate"][e]) * (x @ p["up"][e])) @ p["down"][e] for e in (2, 0)) / 2
    assert_close(found, expected, 1e-4)


def test_replaying_the_natural_choice_changes_nothing_and_trains_the_router():
    decoder, params = build(**VARIANTS["moe_everything"])
    tokens = np.random.default_rng(10).integers(0, 11, (2, 7))
    hidden, routing = jax.jit(decoder.apply_with_routing)(params, tokens)
    assert routing.logits.shape == (2, 2, 7, 4) and routing.experts.shape == (2, 2, 7, 2)
    replayed = apply(decoder, params, tokens, experts=routing.experts)
    np.testing.assert_array_equal(hidden, replayed)
    other = (np.asarray(routing.experts) + 1) % 4
    assert np.abs(apply(decoder, params, tokens, experts=other) - hidden).max() > 1e-2

    only = np.zeros((2, 2, 7, 2), np.int32) + np.array([1, 3])
    grads = jax.jit(jax.grad(lambda p: jnp.sin(decoder.apply(p, tokens, experts=only)).sum()))(
        params
    )["layers"]["moe"]
    assert np.abs(grads["router"]).max() > 1e-4
    for name in ("gate", "up", "down"):
        per_expert = np.abs(grads[name]).max(axis=(0, 2, 3))
        assert (per_expert[[0, 2]] == 0).all() and (per_expert[[1, 3]] > 0).all()


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (np.zeros((2, 1, 3, 2), np.int32), "distinct ids"),
        (np.zeros((2, 1, 3, 2), np.int32) + np.array([0, 4]), r"ids in \[0, 4\)"),
        (np.zeros((2, 1, 3, 1), np.int32), r"experts: expected shape \(2, 1, 3, 2\)"),
        (np.zeros((2, 1, 3, 2)), "experts: expected an integer"),
    ],
)
def test_bad_replays_are_named(experts, message):
    decoder, params = build(**VARIANTS["moe"])
    with pytest.raises(ValueError, match=message):
        decoder.apply(params, np.zeros((1, 3), np.int32), experts=experts)


def test_replay_needs_a_mixture():
    decoder, params = build()
    tokens = np.zeros((1, 3), np.int32)
    with pytest.raises(ValueError, match="has no mixture"):
        decoder.apply(params, tokens, experts=np.zeros((2, 1, 3, 2), np.int32))
    with pytest.raises(ValueError, match="has no mixture"):
        decoder.apply_with_routing(params, tokens)
    cache = models.empty_slot_cache(decoder.config, num_slots=1, capacity=4)
    with pytest.raises(ValueError, match="has no mixture"):
        decoder.extend_with_routing(params, tokens, cache, np.zeros(1, np.int32))


def test_balanced_routing_has_the_least_loss_and_its_gradient_evens_out():
    rng = np.random.default_rng(11)
    logits = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    experts = np.asarray(moe.choose(jnp.asarray(logits), 2))
    mask = rng.random((3, 5)) < 0.7
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = 0.0
    for layer in range(2):
        for e in range(4):
            share = (experts[layer][mask] == e).sum() / mask.sum()
            expected += 4 * share * probabilities[layer][mask][:, e].mean() / 2
    assert_close(models.load_balancing_loss(logits, experts, mask), expected, 1e-5)
    even = np.tile(np.arange(4)[:, None], (1, 1, 5, 1)).reshape(1, 1, 20, 1) % 4
    flat = np.zeros((1, 1, 20, 4), np.float32)
    assert_close(models.load_balancing_loss(flat, even, np.ones((1, 20), bool)), 1.0, 1e-6)
    z = models.router_z_loss(logits, mask)
    log_sum = np.log(np.exp(logits).sum(-1))
    assert_close(z, np.mean([(log_sum[layer][mask] ** 2).mean() for layer in range(2)]), 1e-5)
    assert np.isfinite(models.load_balancing_loss(logits, experts, np.zeros((3, 5), bool)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_kinds": (0,)}, "layer_kinds: expected one for each of 2 layers, got 1"),
        ({"layer_kinds": (0, 1)}, "layer_kinds: expected each index below 1"),
        ({"attention_kinds": (LOCAL, GLOBAL)}, "layer_kinds: expected each index below 2"),
        ({"attention_kinds": (GLOBAL,), "rope_theta": 5.0}, "rope_theta: where attention_kinds"),
        ({"attention_kinds": (GLOBAL,), "learned_positions": True}, "no rotary with learned"),
        ({"qk_norm": "row"}, "qk_norm: expected one of"),
        ({"norm": "batch"}, "norm: expected one of 'rms', 'layer'"),
        ({"activation": "clamped_swiglu", "gated": False}, "gated: expected True"),
        ({"query_scale": -1.0}, "query_scale: expected a positive"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        models.DecoderConfig(**{**BASE, **changes})


def test_part_errors():
    with pytest.raises(ValueError, match="window: expected a positive int"):
        AttentionKind(window=0)
    with pytest.raises(ValueError, match="experts_per_token: expected at most num_experts 2"):
        MoEConfig(num_experts=2, experts_per_token=3, expert_size=4, normalize_weights=True)
    with pytest.raises(ValueError, match="shared_gate: needs a shared MLP"):
        dataclasses.replace(EXPERTS, shared_gate=True)
    with pytest.raises(ValueError, match="original_max_length: 'yarn' scaling needs it"):
        Rotary(scaling="yarn", factor=2.0)
    with pytest.raises(ValueError, match="scaling: expected one of"):
        Rotary(scaling="ntk")
    with pytest.raises(ValueError, match="factor"):
        Rotary(scaling="linear", factor=0.5)


def test_apply_errors():
    decoder, params = build()
    tokens = np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match="positions: need segment_ids"):
        decoder.apply(params, tokens, positions=tokens)
    with pytest.raises(ValueError, match=r"segment_ids: expected shape \(2, 3\)"):
        decoder.apply(params, tokens, segment_ids=np.zeros((2, 4), np.int32))
    cache = models.empty_slot_cache(decoder.config, num_slots=3, capacity=8)
    with pytest.raises(ValueError, match="one row for each of 3 slots"):
        decoder.extend(params, tokens, cache, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="lookahead"):
        models.empty_slot_cache(decoder.config, num_slots=3, capacity=8, lookahead=0)
