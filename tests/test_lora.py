"""Adapters and the products they take part in, against float64 arithmetic and merged matrices."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pgjax as pg
from pgjax import models
from pgjax.models import linear, lora, matrices

BASE = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_size": 40,
    "max_length": 32,
}
TOKENS = np.random.default_rng(1).integers(0, 13, (2, 7))


def randomized(tree, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(scale * rng.normal(size=leaf.shape) + offset, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


@functools.cache
def build(**changes):
    config = models.DecoderConfig(**{**BASE, **changes})
    return models.FunctionalDecoder(config), randomized(models.abstract_params(config))


def adapters_of(params, *, rank=3, alpha=6.0, targets=("*",), seed=5, **options):
    """Adapters whose b is not zero either."""
    fresh = lora.init(params, jax.random.key(0), rank=rank, alpha=alpha, targets=targets, **options)
    return randomized(fresh, seed)


def wide(x):
    return np.asarray(x, np.float64)


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ins", "outs"), [((5,), (7,)), ((5,), (2, 3)), ((2, 3), (5,)), ((2, 3), (4, 2))]
)
def test_products_equal_float64_sums(ins, outs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, *ins))
    base, a, b = (rng.normal(size=s) for s in ((*ins, *outs), (*ins, 2), (2, *outs)))
    flat = base.reshape(math.prod(ins), -1)
    update = 1.5 * a.reshape(-1, 2) @ b.reshape(2, -1)
    rows = x.reshape(12, -1)
    narrow = [jnp.asarray(v, jnp.float32) for v in (x, base, a, b)]
    plain = linear.project(narrow[0], narrow[1], in_axes=len(ins))
    np.testing.assert_allclose(plain, (rows @ flat).reshape(3, 4, *outs), rtol=2e-5, atol=2e-5)
    weight = linear.LowRank(base=narrow[1], a=narrow[2], b=narrow[3], scaling=1.5)
    assert (weight.shape, weight.ndim, weight.dtype) == (base.shape, base.ndim, jnp.float32)
    product = linear.project(narrow[0], weight, in_axes=len(ins))
    expected = (rows @ (flat + update)).reshape(3, 4, *outs)
    np.testing.assert_allclose(product, expected, rtol=2e-5, atol=5e-5)
    np.testing.assert_allclose(
        linear.dense(weight), (flat + update).reshape(base.shape), rtol=1e-5, atol=1e-5
    )
    # NumPy arrays are weights too, and the activations' dtype is the product's.
    again = linear.project(narrow[0], np.asarray(narrow[1]), in_axes=len(ins))
    np.testing.assert_array_equal(plain, again)
    half = linear.project(narrow[0].astype(jnp.bfloat16), weight, in_axes=len(ins))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(half), expected, rtol=0.1, atol=0.3)


def test_a_plain_product_is_the_einsum_it_replaces():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.bfloat16)
    weight = jnp.asarray(rng.normal(size=(8, 2, 6)), jnp.float32)
    expected = jnp.einsum("...h,hnd->...nd", x, weight.astype(x.dtype))
    np.testing.assert_array_equal(linear.project(x, weight), expected)


def test_gradients_are_those_through_the_merged_matrix_and_none_for_the_base():
    rng = np.random.default_rng(1)
    x, base, a, b = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((5, 2, 3), (2, 3, 4), (2, 3, 2), (2, 4))
    )

    def low_rank(x, base, a, b):
        weight = linear.LowRank(base=base, a=a, b=b, scaling=0.7)
        return jnp.sum(jnp.sin(linear.project(x, weight, in_axes=2)))

    def merged(x, base, a, b):
        matrix = base + 0.7 * jnp.einsum("ndr,ro->ndo", a, b)
        return jnp.sum(jnp.sin(jnp.einsum("tnd,ndo->to", x, matrix)))

    found = jax.jit(jax.grad(low_rank, argnums=(0, 1, 2, 3)))(x, base, a, b)
    expected = jax.grad(merged, argnums=(0, 1, 2, 3))(x, base, a, b)
    for index in (0, 2, 3):
        np.testing.assert_allclose(found[index], expected[index], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(found[1], 0.0)
    assert float(jnp.abs(expected[1]).max()) > 0.1
    # Forward mode passes through the rematerialised product as well.
    tangent = jax.jvp(lambda v: low_rank(x, base, v, b), (a,), (jnp.ones_like(a),))[1]
    np.testing.assert_allclose(tangent, jnp.sum(expected[2]), rtol=1e-3, atol=1e-4)


def test_ragged_products_equal_a_loop_over_experts():
    rng = np.random.default_rng(2)
    sizes = np.array([3, 0, 4])
    x, base = rng.normal(size=(7, 5)), rng.normal(size=(3, 5, 6))
    a, b = rng.normal(size=(3, 5, 2)), rng.normal(size=(3, 2, 6))
    experts = np.repeat(np.arange(3), sizes)
    adapted = base + 0.5 * np.einsum("eir,ero->eio", a, b)
    narrow = [jnp.asarray(v, jnp.float32) for v in (x, base, a, b)]
    weight = linear.LowRank(base=narrow[1], a=narrow[2], b=narrow[3], scaling=0.5)

    def of(matrix):
        return np.stack([row @ matrix[e] for row, e in zip(x, experts, strict=True)])

    groups = jnp.asarray(sizes, jnp.int32)
    plain = linear.ragged_project(narrow[0], narrow[1], groups)
    np.testing.assert_allclose(plain, of(base), rtol=2e-5, atol=2e-5)
    product = linear.ragged_project(narrow[0], weight, groups)
    np.testing.assert_allclose(product, of(adapted), rtol=2e-5, atol=5e-5)

    def loss(weight):
        return jnp.sum(jnp.sin(linear.ragged_project(narrow[0], weight, groups)))

    gradient = jax.grad(loss)(weight)
    cosines = np.cos(of(adapted))
    for e in range(3):
        rows = experts == e
        of_matrix = x[rows].T @ cosines[rows]
        np.testing.assert_allclose(gradient.a[e], 0.5 * of_matrix @ b[e].T, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(gradient.b[e], 0.5 * a[e].T @ of_matrix, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(gradient.base, 0.0)


def test_products_name_what_does_not_fit():
    x = jnp.zeros((3, 4))
    with pytest.raises(ValueError, match="in_axes: expected 1 to 1 for .* got 2"):
        linear.project(x, jnp.zeros((4, 5)), in_axes=2)
    with pytest.raises(ValueError, match=r"weight: expected first axes \(4,\) .* \(5, 4\)"):
        linear.project(x, jnp.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"weight: expected shape \[E, in, out\]"):
        linear.ragged_project(x, jnp.zeros((2, 5, 4)), jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"group_sizes: expected shape \(2,\), got \(3,\)"):
        linear.ragged_project(x, jnp.zeros((2, 4, 4)), jnp.array([1, 1, 1]))
    with pytest.raises(ValueError, match="weight: expected an array, a LowRank"):
        linear.dense("query")


# --- adapters -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def logits_of(decoder, params, tokens):
    return decoder.logits(params, decoder.apply(params, tokens))


MIXTURE = {
    "num_experts": 3,
    "experts_per_token": 2,
    "expert_size": 10,
    "normalize_weights": True,
    "shared_size": 12,
}


@pytest.mark.parametrize("kind", ["dense", "mixture", "tied_not_gated"])
def test_attached_and_merged_decoders_agree(kind):
    changes = {
        "dense": {},
        "mixture": {"moe": models.MoEConfig(**MIXTURE)},
        "tied_not_gated": {"tied_embeddings": True, "gated": False},
    }[kind]
    decoder, params = build(**changes)
    adapters = adapters_of(params)
    base = logits_of(decoder, params, TOKENS)
    attached = logits_of(decoder, lora.attach(params, adapters), TOKENS)
    merged_params = lora.merge(params, adapters)
    merged = logits_of(decoder, merged_params, TOKENS)
    assert float(jnp.abs(attached - base).max()) > 0.1
    np.testing.assert_allclose(attached, merged, rtol=1e-3, atol=2e-4)
    assert jax.tree.structure(merged_params) == jax.tree.structure(params)
    # The merged matrices are W + alpha/r · a·b, layer by layer and in float64.
    for name, layout in matrices.of(params).items():
        *path, leaf = name.split("/")
        weight, adapter, merged_weight = (
            functools.reduce(lambda t, k: t[k], [*path, leaf], tree)
            for tree in (params, adapters, merged_params)
        )
        lead = weight.shape[: layout.lead]
        flat_a = wide(adapter.a).reshape(*lead, -1, 3)
        flat_b = wide(adapter.b).reshape(*lead, 3, -1)
        expected = wide(weight) + 2.0 * (flat_a @ flat_b).reshape(weight.shape)
        np.testing.assert_allclose(merged_weight, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_attached_and_merged_decoders_sample_the_same():
    decoder, params = build()
    adapters = adapters_of(params)
    options = {"num_samples": 2, "max_new_tokens": 5, "temperature": 0.0}
    prompts, lengths = np.array([[3, 4, 5], [6, 7, 0]], np.int32), np.array([3, 2], np.int32)
    attached, merged, base = (
        pg.sampling.generate(decoder, p, prompts, lengths, jax.random.key(0), **options)
        for p in (lora.attach(params, adapters), lora.merge(params, adapters), params)
    )
    np.testing.assert_array_equal(attached.tokens, merged.tokens)
    np.testing.assert_allclose(attached.logprobs, merged.logprobs, atol=1e-3)
    assert (np.asarray(attached.tokens) != np.asarray(base.tokens)).any()


def test_fresh_adapters_change_nothing():
    decoder, params = build()
    fresh = lora.init(params, jax.random.key(0), rank=4, alpha=8)
    with_fresh = lora.attach(params, fresh)
    np.testing.assert_array_equal(
        logits_of(decoder, with_fresh, TOKENS), logits_of(decoder, params, TOKENS)
    )
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, fresh), params)
    # Only b has a gradient at first, since a's is multiplied by b.
    gradient = jax.grad(
        lambda adapters: logits_of(decoder, lora.attach(params, adapters), TOKENS).var()
    )(fresh)
    for adapter in jax.tree.leaves(gradient, is_leaf=lora.is_adapter):
        assert float(jnp.abs(adapter.a).max()) == 0.0 < float(jnp.abs(adapter.b).max())


def test_fresh_adapters_have_the_documented_spread_and_shapes():
    config = models.DecoderConfig(**{**BASE, "hidden_size": 64, "mlp_size": 256, "num_layers": 4})
    params = models.abstract_params(config)  # shapes are enough
    fresh = lora.init(params, jax.random.key(3), rank=8, alpha=1)
    for path, inputs in (
        (("attention", "query"), 64),
        (("attention", "output"), 24),
        (("mlp", "down"), 256),
    ):
        adapter = fresh["layers"][path[0]][path[1]]
        bound = inputs**-0.5
        values = np.asarray(adapter.a)
        assert 0.98 * bound < np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert np.abs(np.corrcoef(values.reshape(4, -1)) - np.eye(4)).max() < 0.3
        np.testing.assert_array_equal(adapter.b, 0.0)
    attention = fresh["layers"]["attention"]
    assert attention["key"].a.shape == (4, 64, 8) and attention["key"].b.shape == (4, 8, 2, 6)
    assert attention["output"].a.shape == (4, 4, 6, 8)
    assert attention["output"].b.shape == (4, 8, 64)
    assert set(fresh) == {"layers"} and set(fresh["layers"]) == {"attention", "mlp"}


def test_values_do_not_depend_on_the_other_targets():
    _, params = build()
    all_of_them = lora.init(params, jax.random.key(0), rank=4, alpha=8)
    one = lora.init(params, jax.random.key(0), rank=4, alpha=8, targets=["*/mlp/up"])
    assert list(one["layers"]) == ["mlp"] and list(one["layers"]["mlp"]) == ["up"]
    np.testing.assert_array_equal(
        one["layers"]["mlp"]["up"].a, all_of_them["layers"]["mlp"]["up"].a
    )
    other = lora.init(params, jax.random.key(1), rank=4, alpha=8)
    assert (other["layers"]["mlp"]["up"].a != all_of_them["layers"]["mlp"]["up"].a).all()


@pytest.mark.parametrize(("rule", "power"), [("standard", 1.0), ("rank_stabilized", 0.5)])
def test_scaling_laws(rule, power):
    _, params = build()
    for rank in (1, 4, 9):
        fresh = lora.init(
            params, jax.random.key(0), rank=rank, alpha=12, scaling=rule, targets=["*/up"]
        )
        adapter = fresh["layers"]["mlp"]["up"]
        assert adapter.rank == rank
        assert adapter.scaling == pytest.approx(12 / rank**power)
    # The norm of the update to the activations: with a of unit rows and b of unit columns drawn
    # anew, it grows as sqrt(r) times the scaling.
    weight = jnp.zeros((64, 64))
    x = jax.random.normal(jax.random.key(0), (256, 64))

    def spread(rank):
        a, b = (
            jax.random.normal(jax.random.key(i), s) / 8
            for i, s in enumerate(((64, rank), (rank, 64)))
        )
        adapter = lora.Adapter(a=a, b=b, alpha=1.0, rule=rule)
        return float(jnp.std(linear.project(x, lora.attached(weight, adapter, "w"))))

    assert spread(64) / spread(4) == pytest.approx(16 ** (0.5 - power), rel=0.2)


def test_ranks_and_alphas_by_pattern():
    _, params = build()
    fresh = lora.init(
        params,
        jax.random.key(0),
        rank={"*/attention/query": 2, "*/attention/*": 5, "*": 7},
        alpha={"*/mlp/*": 3.0, "*": 10.0},
        targets=("layers/attention/*", "layers/mlp/up"),
        dtype=jnp.bfloat16,
    )
    ranks = jax.tree.map(lambda x: (x.rank, x.alpha), fresh, is_leaf=lora.is_adapter)
    attention = {"query": (2, 10.0)} | dict.fromkeys(("key", "value", "output"), (5, 10.0))
    assert ranks == {"layers": {"attention": attention, "mlp": {"up": (7, 3.0)}}}
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(fresh))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["layers/attention/querry"]}, "targets: 'layers/attention/querry' matches no"),
        ({"targets": ["embedding"]}, "layers/attention/query, .*layers/mlp/up"),
        ({"targets": "layers/*"}, "targets: expected a sequence of patterns"),
        ({"targets": []}, "targets: expected at least one pattern"),
        ({"rank": 0}, "rank: expected a positive int for layers/.* got 0"),
        ({"rank": 2.0}, "rank: expected a positive int"),
        ({"rank": {"*/attention/*": 4}}, "rank: no pattern of .* matches layers/mlp/"),
        ({"rank": {"*": 4, "*/experts": 2}}, r"rank: '\*/experts' matches none of the targets"),
        ({"alpha": 0.0}, r"alpha of .*: expected a number in \(0"),
        ({"scaling": "sqrt"}, "scaling: expected one of 'standard', 'rank_stabilized'"),
        ({"dtype": jnp.int32}, "dtype: expected a floating dtype, got int32"),
    ],
)
def test_bad_options_are_named(options, message):
    _, params = build()
    with pytest.raises(ValueError, match=message):
        lora.init(params, jax.random.key(0), **{"rank": 4, "alpha": 8, **options})


def test_adapters_that_do_not_fit_are_named():
    _, params = build()
    adapters = adapters_of(params, targets=["*/query"])
    query = adapters["layers"]["attention"]["query"]
    with pytest.raises(ValueError, match="layers/attention/query has an adapter already"):
        lora.attach(lora.attach(params, adapters), adapters)
    with pytest.raises(ValueError, match="layers/attention/key has a of shape .* do not fit"):
        lora.attach(params, {"layers": {"attention": {"key": query}}})
    with pytest.raises(ValueError, match="adapters: layers/attention/kez is not among"):
        lora.attach(params, {"layers": {"attention": {"kez": query}}})
    with pytest.raises(ValueError, match="adapters: expected an Adapter at layers/attention"):
        lora.attach(params, {"layers": {"attention": 3}})
    with pytest.raises(ValueError, match="adapters: expected a matrix under layers, got dict"):
        lora.attach(params, {"layers": query})
    with pytest.raises(ValueError, match="axes: expected the axes of a matrix for layers/attent"):
        lora.logical_axes({"layers": {}}, adapters)


def test_logical_axes_are_those_of_the_matrices():
    decoder, params = build(moe=models.MoEConfig(**MIXTURE))
    axes = lora.logical_axes(decoder.logical_axes(), adapters_of(params))["layers"]
    assert axes["attention"]["query"].a == ("layers", "embed", None)
    assert axes["attention"]["query"].b == ("layers", None, "heads", "head_dim")
    assert axes["attention"]["output"].a == ("layers", "heads", "head_dim", None)
    assert axes["attention"]["output"].b == ("layers", None, "embed")
    assert axes["moe"]["down"].a == ("layers", "expert", "mlp", None)
    assert axes["moe"]["down"].b == ("layers", "expert", None, "embed")
    assert axes["moe"]["shared_up"].b == ("layers", None, "mlp")
