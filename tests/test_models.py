"""The decoder against a float64 loop written from the definitions, and its functional contract."""

from __future__ import annotations

import functools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax import models

BASE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_size": 24,
    "max_length": 32,
}
VARIANTS = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "multi_query_wide_heads": {"num_kv_heads": 1, "head_dim": 6},
    "tied": {"tied_embeddings": True},
    "soft_cap": {"logit_soft_cap": 2.0},
    "qk_norm": {"qk_norm": True, "num_kv_heads": 2},
    "relu_not_gated": {"activation": "relu", "gated": False},
    "gelu": {"activation": "gelu"},
    "theta_epsilon": {"rope_theta": 50.0, "norm_epsilon": 1e-2},
    "one_layer": {"num_layers": 1},
}


@functools.cache
def build(**changes):
    """A decoder with random parameters; norm scales too, so that a missing one shows."""
    config = models.DecoderConfig(**{**BASE, **changes})
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = 0.3 * rng.normal(size=leaf.shape)
        values += "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(values, leaf.dtype)

    shapes = models.abstract_params(config)
    return models.FunctionalDecoder(config), jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_logits(decoder, params, tokens):
    hidden = decoder.apply(params, tokens)
    return hidden, decoder.logits(params, hidden)


def loop_hidden(config, params, tokens):
    """Hidden states of one unpadded row: float64, one position, head and key at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    dim, heads, kv_heads = config.head_dim, config.num_heads, config.num_kv_heads

    def norm(x, scale):
        return x / math.sqrt(sum(v * v for v in x) / len(x) + config.norm_epsilon) * scale

    def rotated(x, position):
        out = np.empty(dim)
        for i in range(dim // 2):
            angle = position / config.rope_theta ** (2 * i / dim)
            a, b = x[i], x[i + dim // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + dim // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def activation(x):
        if config.activation == "relu":
            return np.array([max(v, 0.0) for v in x])
        if config.activation == "silu":
            return np.array([v / (1 + math.exp(-v)) for v in x])
        c = math.sqrt(2 / math.pi)
        return np.array([0.5 * v * (1 + math.tanh(c * (v + 0.044715 * v**3))) for v in x])

    stream = [p["embedding"][t] for t in tokens]
    for layer in range(config.num_layers):
        w = jax.tree.map(lambda x, i=layer: x[i], p["layers"])
        att = w["attention"]
        queries, keys, values = [], [], []
        for position, x in enumerate(stream):
            h = norm(x, w["attention_norm"])
            q = [h @ att["query"][:, n] for n in range(heads)]
            k = [h @ att["key"][:, n] for n in range(kv_heads)]
            if config.qk_norm:
                q = [norm(v, att["query_norm"]) for v in q]
                k = [norm(v, att["key_norm"]) for v in k]
            queries.append([rotated(v, position) for v in q])
            keys.append([rotated(v, position) for v in k])
            values.append([h @ att["value"][:, n] for n in range(kv_heads)])
        for t in range(len(stream)):
            update = np.zeros(config.hidden_size)
            for n in range(heads):
                m = n // (heads // kv_heads)
                scores = [queries[t][n] @ keys[s][m] / math.sqrt(dim) for s in range(t + 1)]
                exps = [math.exp(v - max(scores)) for v in scores]
                mixed = sum(e / sum(exps) * values[s][m] for s, e in enumerate(exps))
                update = update + mixed @ att["output"][n]
            stream[t] = stream[t] + update
        for t, x in enumerate(stream):
            h = norm(x, w["mlp_norm"])
            inner = h @ w["mlp"]["up"]
            gated = config.gated
            inner = activation(h @ w["mlp"]["gate"]) * inner if gated else activation(inner)
            stream[t] = x + inner @ w["mlp"]["down"]
    return np.stack([norm(x, p["norm"]) for x in stream])


def loop_logits(config, params, hidden):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    logits = hidden @ (p["embedding"].T if config.tied_embeddings else p["unembedding"])
    if config.logit_soft_cap is not None:
        logits = config.logit_soft_cap * np.tanh(logits / config.logit_soft_cap)
    return logits


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_equals_float64_loop(name):
    decoder, params = build(**VARIANTS[name])
    tokens = np.random.default_rng(1).integers(0, 11, (2, 7))
    hidden, logits = hidden_and_logits(decoder, params, tokens)
    assert logits.dtype == jnp.float32
    for row in range(2):
        expected = loop_hidden(decoder.config, params, tokens[row])
        np.testing.assert_allclose(hidden[row], expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(
            logits[row], loop_logits(decoder.config, params, expected), rtol=2e-5, atol=3e-5
        )


def test_padding_and_the_future_never_matter():
    decoder, params = build(num_kv_heads=2)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 11, (3, 8))
    other = tokens.copy()
    other[:, 5:] = rng.integers(0, 11, (3, 3))
    assert (other != tokens).any()
    first, second = (hidden_and_logits(decoder, params, x)[0] for x in (tokens, other))
    np.testing.assert_array_equal(first[:, :5], second[:, :5])
    assert (np.asarray(first[:, 5:]) != np.asarray(second[:, 5:])).any()
    wider = hidden_and_logits(decoder, params, np.pad(tokens[:, :5], ((0, 0), (0, 9))))[0]
    np.testing.assert_allclose(wider[:, :5], first[:, :5], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_unembedding_times_hidden_is_logits(tied):
    decoder, params = build(tied_embeddings=tied)
    matrix = decoder.unembedding(params)
    assert matrix.shape == (16, 11)
    assert ("unembedding" in params) == (not tied)
    hidden, logits = hidden_and_logits(decoder, params, np.arange(6)[None])
    np.testing.assert_allclose(
        logits,
        np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64),
        rtol=1e-5,
        atol=1e-5,
    )


def test_remat_changes_memory_not_gradients():
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 11, (4, 16)))

    def gradient(remat):
        decoder, params = build(num_layers=3, remat=remat)

        def loss(p):
            return jnp.mean(jnp.sin(decoder.logits(p, decoder.apply(p, tokens))))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    expected, most = gradient(None)
    for remat in ("full", "dots"):
        found, temporary = gradient(remat)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), expected, found
        )
        assert temporary < most
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(expected))


def test_traced_program_does_not_grow_with_depth():
    def equations(jaxpr):
        inner = [j for e in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(e.params)]
        return len(jaxpr.eqns) + sum(equations(j) for j in inner)

    def size(layers):
        decoder = models.FunctionalDecoder(models.DecoderConfig(**{**BASE, "num_layers": layers}))
        params = models.abstract_params(decoder.config)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

        def loss(p, x):
            return decoder.apply(p, x).sum()

        return equations(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr)

    assert size(2) == size(40) > 50


def test_parameters_are_a_plain_dict_with_the_documented_shapes():
    config = models.DecoderConfig(**{**BASE, "num_kv_heads": 2, "qk_norm": True})
    _, params = models.init(config, jax.random.key(0))
    shapes = jax.tree.map(lambda x: x.shape, params)
    assert shapes == {
        "embedding": (11, 16),
        "layers": {
            "attention_norm": (2, 16),
            "attention": {
                "query": (2, 16, 4, 4),
                "key": (2, 16, 2, 4),
                "value": (2, 16, 2, 4),
                "output": (2, 4, 4, 16),
                "query_norm": (2, 4),
                "key_norm": (2, 4),
            },
            "mlp_norm": (2, 16),
            "mlp": {"gate": (2, 16, 24), "up": (2, 16, 24), "down": (2, 24, 16)},
        },
        "norm": (16,),
        "unembedding": (16, 11),
    }
    assert type(params) is dict and type(params["layers"]["mlp"]) is dict
    assert all(type(x) is type(jnp.zeros(1)) for x in jax.tree.leaves(params))
    assert float(params["layers"]["mlp"]["up"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(params["layers"]["mlp"]["down"].std()) == pytest.approx(0.01, rel=0.1)
    np.testing.assert_array_equal(params["norm"], 1.0)
    abstract = models.abstract_params(config)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"qk_norm": True}])
def test_logical_axes_match_the_parameters(changes):
    config = models.DecoderConfig(**{**BASE, **changes, "num_kv_heads": 2, "head_dim": 6})
    sizes = {
        "layers": 2,
        "embed": 16,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "mlp": 24,
        "vocab": 11,
    }
    axes = models.FunctionalDecoder(config).logical_axes()
    named = jax.tree.map(
        lambda names: tuple(sizes[n] for n in names), axes, is_leaf=lambda x: type(x) is tuple
    )
    assert named == jax.tree.map(lambda x: x.shape, models.abstract_params(config))


def test_init_draws_independent_layers_with_the_configured_spread():
    config = models.DecoderConfig(
        **{**BASE, "hidden_size": 128, "mlp_size": 256, "init_stddev": None, "num_layers": 4}
    )
    _, params = models.init(config, jax.random.key(1))
    layers = params["layers"]
    residual = (2 * 4) ** -0.5
    for leaf, stddev in (
        (layers["attention"]["query"], 128**-0.5),
        (layers["attention"]["output"], 128**-0.5 * residual),
        (layers["mlp"]["up"], 128**-0.5),
        (layers["mlp"]["down"], 256**-0.5 * residual),
        (params["unembedding"], 128**-0.5),
    ):
        assert float(leaf.std()) == pytest.approx(stddev, rel=0.06)
    query = np.asarray(layers["attention"]["query"]).reshape(4, -1)
    correlations = np.corrcoef(query) - np.eye(4)
    assert np.abs(correlations).max() < 0.05


def test_decoders_are_hashable_and_equal_by_configuration():
    one, two = (models.FunctionalDecoder(models.DecoderConfig(**BASE)) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    other = models.DecoderConfig(**{**BASE, "dtype": jnp.bfloat16})
    assert one != models.FunctionalDecoder(other)


def test_bfloat16_compute_stays_near_float32_and_keeps_float32_logits():
    wide, params = build(num_kv_heads=2)
    narrow = models.FunctionalDecoder(
        models.DecoderConfig(**{**BASE, "num_kv_heads": 2, "dtype": jnp.bfloat16})
    )
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, 11, (4, 9)))
    hidden, logits = hidden_and_logits(narrow, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    expected = hidden_and_logits(wide, params, tokens)[1]
    # bfloat16 keeps 8 bits: errors of a few times 2**-8 of the logits' spread.
    assert 0 < float(jnp.abs(logits - expected).max()) < 0.05 * float(jnp.abs(expected).max())
    gradient = jax.jit(jax.grad(lambda p: narrow.apply(p, tokens).astype(jnp.float32).sum()))(
        params
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradient))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected a positive int, got 0"),
        ({"num_layers": 1.5}, "num_layers: expected a positive int, got 1.5"),
        ({"num_heads": 3}, "num_heads: expected a divisor of hidden_size 16"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads 4, got 3"),
        ({"head_dim": 5}, "head_dim: expected an even number"),
        ({"activation": "tanh"}, "activation: expected one of 'silu', 'gelu', .*, got 'tanh'"),
        ({"remat": "some"}, "remat: expected one of None, 'full', 'dots', got 'some'"),
        ({"rope_theta": 0.0}, "rope_theta: expected a positive finite number, got 0.0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon: expected a positive finite number"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap: expected a positive finite number"),
        ({"init_stddev": 0.0}, "init_stddev: expected a positive finite number"),
        ({"dtype": jnp.int32}, "dtype: expected a floating dtype, got int32"),
        ({"max_length": 0}, "max_length: expected a positive int, got 0"),
    ],
)
def test_config_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        models.DecoderConfig(**{**BASE, **changes})


def test_apply_rejects_bad_tokens():
    decoder, params = build()
    with pytest.raises(ValueError, match="tokens: expected rank 2"):
        decoder.apply(params, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="tokens: expected an integer dtype"):
        decoder.apply(params, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="at most max_length 32 tokens"):
        decoder.apply(params, jnp.zeros((2, 33), jnp.int32))
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\), got \(3,\)"):
        decoder.prefill(params, jnp.zeros((2, 3), jnp.int32), jnp.ones(3, jnp.int32))


def test_value_head_is_zero_at_first_and_linear():
    config = models.DecoderConfig(**BASE)
    params = models.value_head_init(config, jax.random.key(0))
    hidden = jnp.asarray(np.random.default_rng(7).normal(size=(2, 5, 16)), jnp.bfloat16)
    values = models.value_head_apply(params, hidden)
    assert values.shape == (2, 5) and values.dtype == jnp.float32
    np.testing.assert_array_equal(values, 0.0)
    kernel = np.random.default_rng(8).normal(size=16).astype(np.float32)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.float32(0.5)}
    expected = np.asarray(hidden, np.float64) @ kernel.astype(np.float64) + 0.5
    np.testing.assert_allclose(models.value_head_apply(params, hidden), expected, rtol=1e-5)
    axes = models.value_head_logical_axes()
    assert {k: len(v) for k, v in axes.items()} == {k: v.ndim for k, v in params.items()}
    with pytest.raises(ValueError, match="hidden: expected last axis 16"):
        models.value_head_apply(params, hidden[..., :3])
