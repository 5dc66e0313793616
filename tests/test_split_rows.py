"""Rows whose tokens are split over the mesh's `sequence` axis, on eight virtual devices."""

import devices
import pytest

EIGHT_DEVICES = """
    import functools, json
    import jax, jax.numpy as jnp, numpy as np
    import pgjax as pg
    from pgjax import parallel
    from pgjax.models import attention

    attention.QUERY_BLOCK = 5  # several blocks to a device, the last of them padded

    def config(**changes):
        return pg.models.DecoderConfig(**{
            "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4,
            "num_kv_heads": 2, "head_dim": 4, "mlp_size": 32, "max_length": 4096,
            "remat": "full", **changes,
        })

    cases = {
        "plain": config(),
        "windows": config(
            attention_kinds=(pg.models.AttentionKind(window=6), pg.models.AttentionKind()),
            layer_kinds=(0, 1),
        ),
        "soft caps and sinks": config(attention_soft_cap=2.0, attention_sinks=True),
        "experts": config(moe=pg.models.MoEConfig(
            num_experts=4, experts_per_token=2, expert_size=8, normalize_weights=True)),
    }
    rng = np.random.default_rng(0)
    rows, length = 4, 24
    tokens = jnp.asarray(rng.integers(0, 40, (rows, length)), jnp.int32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (rows, length)), axis=1), jnp.int32)
    starts = jnp.asarray([[int(np.argmax(row == s)) for s in row] for row in np.asarray(segments)])
    places = jnp.arange(length) - starts
    weights = jnp.asarray(rng.normal(size=(rows, length)), jnp.float32)

    def found(decoder, params, tokens, packed):
        def loss(params):
            extra = {"positions": places, "segment_ids": segments} if packed else {}
            hidden = decoder.apply(params, tokens, **extra)
            logprobs = pg.logprobs.from_hidden(hidden, decoder.unembedding(params), tokens)
            return jnp.sum(weights[:, : tokens.shape[1]] * logprobs), logprobs
        return jax.jit(jax.grad(loss, has_aux=True))(params)

    out = {}
    for name, settings in cases.items():
        alone, params = pg.models.init(settings, jax.random.key(0))
        noise = jax.random.key(1)
        params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), params)
        for packed in (False, True) if name == "windows" else (False,):
            wanted = jax.tree.map(np.asarray, found(alone, params, tokens, packed))
            for spec in ("sequence=8", "sequence=2,fsdp=2,tensor=2", "sequence=4,expert=2"):
                if "expert" in spec and settings.moe is None:
                    continue
                mesh = parallel.make_mesh(spec)
                decoder = pg.models.FunctionalDecoder(settings, mesh)
                axes = parallel.shardings(decoder.logical_axes(), mesh, shapes=params)
                placed = jax.device_put(tokens, parallel.batch_sharding(mesh))
                got = found(decoder, parallel.shard(params, axes), placed, packed)
                off = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), got, wanted)
                out[f"{name}, {spec}{', packed' if packed else ''}"] = max(jax.tree.leaves(off))

    # A length that the axis does not divide is left whole.
    mesh = parallel.make_mesh("sequence=8")
    alone, params = pg.models.init(cases["plain"], jax.random.key(0))
    placed = parallel.shard(params, parallel.replicated(mesh))
    odd = tokens[:, :21]
    got = found(pg.models.FunctionalDecoder(cases["plain"], mesh), placed, odd, False)[1]
    wanted = found(alone, params, odd, False)[1]
    out["odd"] = float(np.abs(np.asarray(got) - np.asarray(wanted)).max())

    # Memory and what is sent, at a length where activations are most of it.
    attention.QUERY_BLOCK = 16
    settings = config(hidden_size=64, mlp_size=512)
    params = pg.models.abstract_params(settings)
    long = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    facts = {}
    for spec in ("sequence=1", "sequence=2", "sequence=8"):
        count = int(spec[-1])
        mesh = parallel.make_mesh(spec, devices=jax.devices()[:count])
        decoder = pg.models.FunctionalDecoder(settings, mesh)
        whole = parallel.replicated(mesh)

        def loss(params, tokens):
            hidden = decoder.apply(params, tokens)
            return pg.logprobs.from_hidden(hidden, decoder.unembedding(params), tokens).sum()

        compiled = jax.jit(jax.grad(loss)).lower(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params),
            jax.ShapeDtypeStruct(long.shape, long.dtype, sharding=whole),
        ).compile()
        inside = [c for c in parallel.collectives(compiled.as_text(), count) if c.in_loop]
        facts[count] = {
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "gathered": [sum(c.times for c in inside if c.kind == "all-gather"),
                         sum(c.times * c.nbytes for c in inside if c.kind == "all-gather")],
            "kinds": sorted({c.kind for c in inside}),
        }
    out["facts"] = facts
    print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight():
    return devices.run(EIGHT_DEVICES)


def test_split_rows_equal_whole_ones(eight):
    errors = {name: x for name, x in eight.items() if name != "facts"}
    assert len(errors) == 2 + 2 * 2 + 2 + 3 + 1
    assert max(errors.values()) < 2e-5, errors


def test_memory_falls_with_the_axis_and_keys_and_values_are_all_that_is_gathered(eight):
    facts = eight["facts"]
    assert facts["8"]["temporary"] < facts["2"]["temporary"] / 2 < facts["1"]["temporary"] / 3
    assert facts["1"]["kinds"] == []
    layers, once = 2, 2 * 2048 * 2 * 4 * 4  # keys and values: 2 heads of 4 numbers of 4 bytes
    for count in ("2", "8"):
        times, sent = facts[count]["gathered"]
        # Forward, and again where the backward pass computes the layer anew.
        assert sent == 2 * layers * once, facts
        assert times == 2 * layers * 2
