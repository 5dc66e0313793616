"""Quantised frozen bases: error bounds, published levels, bytes, and training on top of them."""

from __future__ import annotations

import functools
import math

import devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgjax as pg
from pgjax import models, train
from pgjax.models import linear, lora, matrices, quantization

CONFIG = models.DecoderConfig(
    vocab_size=13,
    hidden_size=64,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    mlp_size=128,
    max_length=32,
)
FORMATS = {
    "int8": quantization.int8,
    "nf4": functools.partial(quantization.nf4, block_size=32),
}
TOKENS = np.random.default_rng(1).integers(0, 13, (2, 7))


@functools.cache
def build(config=CONFIG):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        offset = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(0.15 * rng.normal(size=leaf.shape) + offset, leaf.dtype)

    decoder = models.FunctionalDecoder(config)
    return decoder, jax.tree_util.tree_map_with_path(draw, models.abstract_params(config))


def stack(shape, seed=0):
    """One leaf of attention as a tree of parameters."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    name = {3: ("mlp", "up"), 4: ("attention", "query")}[len(shape)]
    return values, {"layers": {name[0]: {name[1]: jnp.asarray(values)}}}


def only_leaf(tree):
    [(name, _)] = matrices.of(tree).items()
    return functools.reduce(lambda t, k: t[k], name.split("/"), tree)


def num_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 12, 3, 4)])
def test_int8_is_off_by_half_a_step_at_most(shape):
    values, params = stack(shape)
    values[1, :, 2] = 0.0  # an output of zeros
    values[0, 3, 1] = -50.0  # and one with an outlier
    params = {"layers": jax.tree.map(lambda _: jnp.asarray(values), params["layers"])}
    matrix = only_leaf(quantization.int8(params))
    assert matrix.values.dtype == jnp.int8 and matrix.shape == shape
    assert matrix.scale.shape == (2, 1, *shape[2:])
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(matrix.scale, np.where(step > 0, step, 1.0), rtol=1e-6)
    error = np.abs(np.asarray(linear.dense(matrix), np.float64) - values)
    assert (error <= step * (0.5 + 1e-4)).all()
    assert error.max() > 0.45 * step.max()  # the bound is reached, so it is the right one
    codes = np.asarray(matrix.values)
    assert np.abs(codes).max(axis=1).min() == 0 and np.abs(codes).max() == 127
    np.testing.assert_array_equal(error[1, :, 2], 0.0)


def test_nf4_levels_are_the_quantiles_of_the_published_construction():
    """Normal quantiles, eight above zero and seven below, as in the paper's released code."""
    norm = pytest.importorskip("scipy.stats").norm
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below]))
    np.testing.assert_allclose(quantization.NF4_LEVELS, levels / levels.max(), atol=1e-6)
    # bitsandbytes, csrc/kernels.cu
    published = [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
    assert list(quantization.NF4_LEVELS) == published


@pytest.mark.parametrize(
    ("family", "name", "shape", "axis"),
    [
        ("mlp", "up", (2, 24, 5), 1),
        ("attention", "query", (2, 24, 3, 4), 1),
        ("attention", "output", (2, 3, 24, 4), 2),
        ("moe", "down", (2, 3, 24, 4), 2),
    ],
)
def test_nf4_takes_the_nearest_level_of_each_block(family, name, shape, axis):
    values = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    values[(1,) + (slice(None),) * (axis - 1) + (slice(8, 16), 2)] = 0.0  # a block of zeros
    params = {"layers": {family: {name: jnp.asarray(values)}}}
    matrix = only_leaf(quantization.nf4(params, block_size=8))
    assert matrix.shape == shape and matrix.codes.dtype == jnp.uint8
    assert matrix.codes.size == values.size // 2 and matrix.scale.size == values.size // 8
    found = np.moveaxis(np.asarray(linear.dense(matrix), np.float64), axis, -1)
    given = np.moveaxis(values.astype(np.float64), axis, -1)
    levels = np.array(quantization.NF4_LEVELS)
    for row, dense in zip(given.reshape(-1, 24), found.reshape(-1, 24), strict=True):
        for start in range(0, 24, 8):
            block = row[start : start + 8]
            largest = np.abs(block).max()
            nearest = levels[np.abs(block[:, None] / (largest or 1.0) - levels).argmin(1)]
            np.testing.assert_allclose(dense[start : start + 8], largest * nearest, atol=1e-6)
    # A layer, sliced away by a scan, is the layer of the whole.
    _, layers = jax.lax.scan(lambda c, layer: (c, layer.dense()), 0, matrix)
    np.testing.assert_array_equal(layers, matrix.dense())


def test_nf4_of_normal_weights_has_the_expected_error():
    """The quantiser was made for them: 20 log10 of the error's ratio is near -20 dB."""
    values, params = stack((1, 256, 64))
    eight, four = (
        np.sqrt(np.mean((np.asarray(linear.dense(only_leaf(q(params)))) - values) ** 2))
        for q in (quantization.int8, quantization.nf4)
    )
    assert 0.085 < four < 0.1
    # Uniform error of half a step of max|W| / 127.
    step = np.abs(values).max(axis=1).mean() / 127
    assert eight == pytest.approx(step / math.sqrt(12), rel=0.05)


def test_bytes_in_memory_and_as_arguments():
    config = models.DecoderConfig(
        **{f: getattr(CONFIG, f) for f in ("vocab_size", "num_layers", "max_length")},
        hidden_size=128,
        num_heads=2,
        mlp_size=256,
    )
    decoder, params = build(config)
    shapes = {
        name: functools.reduce(lambda t, k: t[k], name.split("/"), params).shape
        for name in matrices.of(params)
    }
    weights = sum(map(math.prod, shapes.values()))
    outputs = sum(
        shapes[name][0] * math.prod(shapes[name][-layout.outs :])
        for name, layout in matrices.of(params).items()
    )
    others = num_bytes(params) - 4 * weights
    four, eight = quantization.nf4(params), quantization.int8(params)
    assert (num_bytes(four) - others) * 8 / weights == 4.5
    assert num_bytes(eight) - others == weights + 4 * outputs
    run = jax.jit(lambda p, tokens: decoder.logits(p, decoder.apply(p, tokens)))
    compiled = run.lower(four, TOKENS).compile().memory_analysis()
    assert compiled.argument_size_in_bytes == num_bytes(four) + TOKENS.size * 4
    # What it takes to run is not more than with float32 weights, which need no second copy.
    plain = run.lower(params, TOKENS).compile().memory_analysis()
    one_layer = 4 * weights / CONFIG.num_layers
    assert compiled.temp_size_in_bytes < plain.temp_size_in_bytes + one_layer


hidden_of = functools.partial(jax.jit, static_argnums=0)(
    lambda decoder, params, tokens: decoder.apply(params, tokens)
)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_decoder_is_the_decoder_of_the_dense_matrices(name):
    decoder, params = build()
    base = FORMATS[name](params)
    dense = jax.tree.map(linear.dense, base, is_leaf=matrices.is_leaf)
    assert jax.tree.structure(dense) == jax.tree.structure(params)
    found, exact = hidden_of(decoder, base, TOKENS), hidden_of(decoder, params, TOKENS)
    expected = hidden_of(decoder, dense, TOKENS)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    error = float(jnp.abs(found - exact).max())
    assert 0 < error < {"int8": 0.1, "nf4": 1.0}[name] * float(jnp.abs(exact).max())
    adapters = lora.init(base, jax.random.key(0), rank=2, alpha=4)
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    attached = hidden_of(decoder, lora.attach(base, adapters), TOKENS)
    merged = lora.merge(base, adapters)
    expected = hidden_of(decoder, merged, TOKENS)
    np.testing.assert_allclose(attached, expected, rtol=1e-3, atol=1e-3)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)


def test_experts_can_be_quantised():
    config = models.DecoderConfig(
        vocab_size=13,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        mlp_size=24,
        max_length=16,
        moe=models.MoEConfig(
            num_experts=3, experts_per_token=2, expert_size=8, normalize_weights=True
        ),
    )
    decoder, params = build(config)
    base = quantization.int8(params, targets=["*/up"])
    base = quantization.nf4(base, targets=["*/gate", "*/down"], block_size=8)
    kinds = {name: type(x).__name__ for name, x in base["layers"]["moe"].items()}
    assert kinds == {
        "router": "ArrayImpl",
        "gate": "NF4Matrix",
        "up": "Int8Matrix",
        "down": "NF4Matrix",
    }
    dense = jax.tree.map(linear.dense, base, is_leaf=matrices.is_leaf)
    found, expected = (hidden_of(decoder, p, TOKENS) for p in (base, dense))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-3)


def test_the_backward_pass_keeps_no_dense_matrices():
    """Neither of a quantised base nor of a float one: what it takes is of one layer, not of six."""
    config = models.DecoderConfig(
        vocab_size=13,
        hidden_size=128,
        num_layers=6,
        num_heads=2,
        mlp_size=512,
        max_length=8,
    )
    decoder, params = models.FunctionalDecoder(config), models.abstract_params(config)
    adapters = jax.eval_shape(lambda p: lora.init(p, jax.random.key(0), rank=1, alpha=1), params)

    def loss(adapters, base):
        return decoder.apply(lora.attach(base, adapters), jnp.zeros((1, 4), jnp.int32)).sum()

    def temporary(base):
        compiled = jax.jit(jax.grad(loss)).lower(adapters, base).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    base = jax.eval_shape(_abstract_nf4, params)
    one_layer = 4 * sum(
        math.prod(functools.reduce(lambda t, k: t[k], name.split("/"), params).shape[1:])
        for name in matrices.of(params)
    )
    assert temporary(base) < 2 * one_layer
    assert temporary(params) < 2 * one_layer


def _abstract_nf4(params):
    """Shapes of `nf4`, which wants concrete arrays."""
    tree = jax.tree.map(lambda x: x, params)
    for name, layout in matrices.of(params).items():
        *path, leaf = name.split("/")
        node = functools.reduce(lambda t, k: t[k], path, tree)
        axis = -layout.outs - 1
        shape = list(node[leaf].shape)
        shape[axis] //= 2
        codes = jnp.zeros(shape, jnp.uint8)
        shape[axis] //= 32
        node[leaf] = quantization.NF4Matrix(codes=codes, scale=jnp.zeros(shape), axis=axis)
    return tree


def test_bfloat16_adapters_train_on_a_quantised_base(tmp_path):
    config = models.DecoderConfig(
        **{
            **{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__},
            "dtype": jnp.bfloat16,
            "param_dtype": jnp.bfloat16,
        }
    )
    decoder, params = build(config)
    base = {"decoder": quantization.nf4(params, block_size=32)}
    before = jax.tree.map(np.asarray, base)
    adapters = lora.init(base["decoder"], jax.random.key(0), rank=4, alpha=8, dtype=jnp.bfloat16)
    optimizer = optax.adam(1e-2)
    state = train.init({"decoder": adapters}, optimizer, jax.random.key(1))
    update = train.make_update(
        train.language_model_outputs(decoder), pg.objectives.supervised(), optimizer
    )
    rng = np.random.default_rng(2)
    rollout = pg.types.Rollout(
        tokens=jnp.asarray(rng.integers(0, 13, (4, 8)), jnp.int32),
        mask=jnp.ones((4, 8), bool).at[:, 0].set(False),
        behavior_logprobs=jnp.zeros((4, 8)),
        rewards=jnp.ones(4),
        group_ids=jnp.arange(4, dtype=jnp.int32),
    )
    losses = []
    for _ in range(15):
        state, metrics = update(state, rollout, None, base)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, base, before)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    # A quantised base can be saved and restored as well.
    with train.checkpoints.open(tmp_path) as saved:
        saved.save(0, base)
        saved.wait()
        jax.tree.map(np.testing.assert_array_equal, saved.restore(like=base)[0], before)


def test_bad_input_is_named():
    _, params = build()
    with pytest.raises(ValueError, match="targets: 'layers/mlp/.*wide' matches none of the matri"):
        quantization.int8(params, targets=["layers/mlp/*wide"])
    with pytest.raises(ValueError, match="block_size: expected an even number, got 7"):
        quantization.nf4(params, block_size=7)
    with pytest.raises(ValueError, match="block_size: expected a number"):
        quantization.nf4(params, block_size=0)
    with pytest.raises(ValueError, match="block_size: 48 does not divide .* of layers/"):
        quantization.nf4(params, block_size=48)
    with pytest.raises(ValueError, match="expected a JAX array, got Int8Matrix"):
        quantization.int8(quantization.int8(params))


EIGHT_DEVICES = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    from pgjax import models, parallel
    from pgjax.models import quantization

    config = models.DecoderConfig(vocab_size=16, hidden_size=64, num_layers=2, num_heads=2,
                                  num_kv_heads=1, head_dim=32, mlp_size=64, max_length=16)
    decoder, params = models.init(config, jax.random.key(0))
    tokens = np.arange(16).reshape(2, 8)
    mesh = parallel.make_mesh("fsdp=4,tensor=2")
    placed = parallel.shard(params, parallel.shardings(decoder.logical_axes(), mesh, shapes=params))
    out = {}

    def spec(x):
        entries = list(x.sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        return entries

    some = ["*/key", "*/up"]
    for name, function in (
            ("int8", lambda p: quantization.int8(p, targets=some)),
            ("nf4", lambda p: quantization.nf4(p, targets=some, block_size=16))):
        alone, sharded = function(params), function(placed)
        same = [bool((np.asarray(a) == np.asarray(b)).all())
                for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(sharded))]
        up, key = sharded["layers"]["mlp"]["up"], sharded["layers"]["attention"]["key"]
        big = up.values if name == "int8" else up.codes
        out[name] = {
            "same": all(same),
            "specs": [spec(x) for x in (big, up.scale, key.scale)],
            "error": float(np.abs(np.asarray(jax.jit(decoder.apply)(sharded, tokens))
                           - np.asarray(jax.jit(decoder.apply)(alone, tokens))).max()),
        }
    print(json.dumps(out))
    """


def test_a_sharded_base_is_quantised_where_it_lies():
    out = devices.run(EIGHT_DEVICES)
    for name in ("int8", "nf4"):
        assert out[name]["same"] and out[name]["error"] < 1e-4
    split = [None, "fsdp", "tensor"]
    # An int8 scale has no input axis, and one key head is not split over two devices.
    assert out["int8"]["specs"] == [split, [None, None, "tensor"], []]
    assert out["nf4"]["specs"] == [split, split, [None, "fsdp"]]
