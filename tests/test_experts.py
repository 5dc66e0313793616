"""Products by group, and experts on devices of their own."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgjax.models.grouped import grouped_matmul

SIZES = [
    (37, [10, 0, 20, 0, 5]),  # two rows of nobody at the end
    (37, [0, 0, 0, 0, 37]),
    (5, [1, 0, 1, 1, 0, 0, 1, 1]),
    (64, [0, 0, 0, 0]),
    (200, [100, 60, 40]),
    (3000, [1, 2999]),
]


def by_loop(x, weights, sizes):
    out, start = np.zeros((len(x), weights.shape[2])), 0
    for weight, size in zip(weights, sizes, strict=True):
        out[start : start + size] = x[start : start + size] @ weight
        start += size
    return out


@pytest.mark.parametrize(("rows", "sizes"), SIZES)
def test_grouped_products_and_gradients_equal_a_loop(rows, sizes):
    rng = np.random.default_rng(0)
    x, out = rng.normal(size=(rows, 6)), rng.normal(size=(rows, 7))
    weights = rng.normal(size=(len(sizes), 6, 7))
    narrow = [jnp.asarray(a, jnp.float32) for a in (x, weights)]
    found, back = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), *narrow)
    np.testing.assert_allclose(found, by_loop(x, weights, sizes), atol=1e-5)
    to_rows, to_weights = back(jnp.asarray(out, jnp.float32))
    np.testing.assert_allclose(to_rows, by_loop(out, weights.swapaxes(1, 2), sizes), atol=1e-5)
    ends = np.cumsum(sizes)
    expected = [x[e - n : e].T @ out[e - n : e] for e, n in zip(ends, sizes, strict=True)]
    np.testing.assert_allclose(to_weights, expected, atol=2e-6 * rows + 1e-5)


def test_grouped_products_round_half_precision_once():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, 64)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(2, 64, 8)), jnp.bfloat16)
    out = jnp.ones((512, 8), jnp.bfloat16)
    sizes = jnp.array([300, 212])
    found, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, weights)
    assert found.dtype == jnp.bfloat16 and [g.dtype for g in back(out)] == [jnp.bfloat16] * 2
    wide = np.asarray(x, np.float64)
    expected = by_loop(wide, np.asarray(weights, np.float64), [300, 212])
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)
    # 300 rows are several blocks, whose sums are not rounded in between.
    expected = np.stack([wide[:300].sum(0), wide[300:].sum(0)])[:, :, None] * np.ones(8)
    np.testing.assert_allclose(
        np.asarray(back(out)[1], np.float64), expected, rtol=2**-8, atol=1e-4
    )


def test_nothing_is_held_for_every_group():
    rows, groups, inner = 1024, 64, 32

    def loss(x, w):
        return jnp.sum(grouped_matmul(x, w, jnp.full(groups, rows // groups)) ** 2)

    shape = jax.ShapeDtypeStruct
    program = jax.jit(jax.grad(loss, (0, 1))).lower(
        shape((rows, inner), jnp.float32), shape((groups, inner, inner), jnp.float32)
    )
    one_copy = 4 * rows * inner
    assert program.compile().memory_analysis().temp_size_in_bytes < 8 * one_copy


EIGHT_DEVICES = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    import pgjax as pg
    from pgjax import parallel

    tokens = np.random.default_rng(0).integers(0, 96, (16, 16)).astype(np.int32)
    out = {"value": {}, "gradient": {}, "greedy": {}, "inside": {}}
    for bias in (False, True):
        config = pg.models.DecoderConfig(
            vocab_size=96, hidden_size=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8,
            mlp_size=64, max_length=32, remat="full",
            moe=pg.models.MoEConfig(num_experts=8, experts_per_token=2, expert_size=24,
                                    normalize_weights=True, expert_bias=bias, router_bias=bias),
        )
        alone, params = pg.models.init(config, jax.random.key(0))
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), params)

        def program(decoder):
            def loss(params, tokens):
                hidden, routing = decoder.apply_with_routing(params, tokens)
                return jnp.mean(jnp.sin(hidden)) + 1e-3 * jnp.mean(routing.logits)
            return jax.jit(jax.value_and_grad(loss))

        def greedy(decoder, params, tokens):
            lengths = jnp.full(len(tokens), tokens.shape[1], jnp.int32)
            rollout = pg.sampling.generate(
                decoder, params, tokens, lengths, jax.random.key(0),
                num_samples=2, max_new_tokens=6, temperature=0.0)
            return np.asarray(rollout.tokens)

        value, gradient = program(alone)(params, tokens)
        few = None if bias else program(alone)(params, tokens[:6])[0]
        text = greedy(alone, params, tokens) if bias else None
        specs = ["expert=4,data=2", "tensor=4,expert=2", "fsdp=2,tensor=2,expert=2"]
        for spec in specs[1:] if bias else ["data=8", "fsdp=8", "expert=8", *specs]:
            mesh = parallel.make_mesh(spec)
            decoder = pg.models.FunctionalDecoder(config, mesh)
            places = parallel.shardings(decoder.logical_axes(), mesh, shapes=params)
            spread = parallel.shard(params, places)
            rows = parallel.shard(tokens, parallel.batch_sharding(mesh))
            compiled = program(decoder).lower(spread, rows).compile()
            got, slope = compiled(spread, rows)
            name = f"{spec}, bias" if bias else spec
            out["value"][name] = abs(float(got - value))
            out["gradient"][name] = max(jax.tree.leaves(jax.tree.map(
                lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))),
                slope, gradient)))
            out["inside"][name] = [
                (c.kind, c.times * c.nbytes) for c in parallel.collectives(compiled.as_text(), 8)
                if c.in_loop]
            if not bias:
                fewer, _ = program(decoder)(spread, tokens[:6])  # most do not divide these
                out["value"][name + ", few"] = abs(float(fewer - few))
            else:
                out["greedy"][name] = bool((greedy(decoder, spread, rows) == text).all())
    frozen = pg.models.quantization.int8(params, targets=["layers/moe/*"])
    adapters = pg.models.lora.init(params, jax.random.key(2), rank=2, alpha=4.0)
    # At random: equal numbers would line up the rows, and rounding of the base's weights alone
    # would then move the gradient by 1e-5.
    adapters = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), adapters)

    def adapted(decoder):
        def loss(adapters, base, tokens):
            return jnp.mean(jnp.sin(decoder.apply(pg.models.lora.attach(base, adapters), tokens)))
        return jax.jit(jax.value_and_grad(loss))

    out["adapted"] = {}
    for spec, base in (("expert=4,data=2", params), ("fsdp=2,tensor=2,expert=2", frozen)):
        value, gradient = adapted(alone)(adapters, base, tokens)
        decoder = pg.models.FunctionalDecoder(config, parallel.make_mesh(spec))
        got, slope = adapted(decoder)(adapters, base, tokens)
        errors = jax.tree.leaves(jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b))), slope, gradient))
        size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradient))
        out["adapted"][spec] = [abs(float(got - value)), max(errors) / size]
    print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight():
    return devices.run(EIGHT_DEVICES)


def test_experts_on_their_own_devices_change_nothing(eight):
    assert len(eight["value"]) == 14
    np.testing.assert_array_less(list(eight["value"].values()), 1e-6)
    np.testing.assert_array_less(list(eight["gradient"].values()), 1e-5)


def test_adapters_and_quantised_experts_are_spread_too(eight):
    assert len(eight["adapted"]) == 2
    np.testing.assert_array_less(list(eight["adapted"].values()), 5e-6)


def test_greedy_text_is_the_same_on_every_mesh(eight):
    assert len(eight["greedy"]) == 2 and all(eight["greedy"].values()), eight["greedy"]


def test_rows_visit_the_experts_and_come_back_once_a_pass(eight):
    sent = eight["inside"]["expert=8"]
    width, rows, layers = 32, 16 * 16, 3
    back = sum(nbytes for kind, nbytes in sent if kind == "reduce-scatter")
    # What the experts add, forward, and backward the gradients of rows and of their two weights.
    assert back == layers * 4 * rows // 8 * (width + width + 2)
    assert not any(kind in ("all-to-all", "collective-permute") for kind, _ in sent)
    # Rows forward, again where the layer is rematerialised, and the gradient of what came back;
    # choices and weights twice. Of parameters the router alone, of 8 experts: no expert's matrix,
    # and no logits.
    gathered = sum(nbytes for kind, nbytes in sent if kind == "all-gather")
    assert gathered == layers * 4 * (rows * (3 * width + 2 * 2 * 2) + 2 * width * 8)
    assert not any(
        kind in ("all-gather", "reduce-scatter") for kind, _ in eight["inside"]["data=8"]
    )
