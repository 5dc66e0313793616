"""Symmetry-compatible updates, routing by role, and contracts that every transformation keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import pgjax as pg
from pgjax import _paths, optim
from pgjax.optim import symmetry


def gaussian(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0].astype(np.float32)


UPDATES = {
    "rows": lambda m: optim.row_norm_update(m),
    "centred rows": lambda m: optim.row_norm_update(m, center=True),
    "hybrid": lambda m: optim.hybrid_update(m),
    "centred hybrid": lambda m: optim.hybrid_update(m, center=True),
    "polar then row": lambda m: optim.hybrid_update(m, order="polar_then_row"),
    "left": lambda m: optim.left_spectral(m),
    "centred left": lambda m: optim.left_spectral(m, center=True),
    "right": lambda m: optim.right_spectral(m),
}


@pytest.mark.parametrize("name", list(UPDATES))
def test_permuting_rows_and_turning_columns_commute_with_the_update(name):
    with jax.enable_x64(True):
        m, permutation = gaussian(6, 9, dtype=np.float64), np.random.default_rng(1).permutation(6)
        m, q = (m.T, orthogonal(6, 2)) if name == "right" else (m, orthogonal(9, 2))
        permutation = permutation if name != "right" else np.arange(9)[::-1]
        q = np.linalg.qr(q.astype(np.float64))[0]
        update = UPDATES[name]
        turned = update(m[permutation] @ q)
        np.testing.assert_allclose(turned, update(m)[permutation] @ q, atol=1e-5)


@pytest.mark.parametrize("name", ["centred rows", "centred hybrid", "centred left"])
def test_centred_updates_do_not_see_what_a_softmax_does_not(name):
    m, shift = gaussian(6, 9), gaussian(9, seed=1)
    update = UPDATES[name]
    np.testing.assert_allclose(update(m).sum(-2), 0, atol=2e-5)
    np.testing.assert_allclose(update(m + shift), update(m), atol=1e-4)


def test_rows_have_the_length_they_say():
    m = gaussian(5, 7).at[2].set(0.0) * 1e-7
    length = np.linalg.norm(np.asarray(m, np.float64), axis=1)
    got = np.linalg.norm(optim.row_norm_update(m), axis=1)
    np.testing.assert_allclose(got, length / (length + 1e-8), rtol=1e-4)
    np.testing.assert_array_equal(optim.row_norm_update(m)[2], 0)


@pytest.mark.parametrize("a", [0.0, 0.5, 1.0])
def test_left_and_right_spectral_are_the_polar_factor(a):
    m = gaussian(6, 9)
    left, _, right = np.linalg.svd(np.asarray(m, np.float64), full_matrices=False)
    nuclear = np.linalg.svd(np.asarray(m), compute_uv=False).sum()
    wanted = nuclear**a * left @ right
    np.testing.assert_allclose(optim.left_spectral(m, a=a, eps=1e-9), wanted, rtol=1e-3, atol=1e-3)
    # Of wide matrices the right Gram matrix is singular; of tall ones it is not.
    np.testing.assert_allclose(
        optim.right_spectral(m.T, a=a, eps=1e-9), wanted.T, rtol=1e-3, atol=1e-3
    )


def test_permuting_neurons_of_a_gated_mlp_permutes_its_updates():
    gate, up, down = gaussian(8, 5), gaussian(8, 5, seed=1), gaussian(5, 8, seed=2)
    p = np.random.default_rng(3).permutation(8)

    def of(matrix, kind):
        return optim.unorient(optim.hybrid_update(optim.orient(matrix, kind)), kind)

    for matrix in (gate, up):
        np.testing.assert_allclose(of(matrix[p], "row"), of(matrix, "row")[p], atol=1e-4)
    np.testing.assert_allclose(of(down[:, p], "column"), of(down, "column")[:, p], atol=1e-4)
    # One row a neuron: gate and up of the same neuron share its length.
    halves = jnp.concatenate([gate, up])
    pair = optim.row_norm_update(optim.orient(halves, "halves_pair"))
    np.testing.assert_allclose(np.linalg.norm(pair, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", symmetry.ORIENTATIONS)
def test_orientations_are_undone(kind):
    x = gaussian(3, 6, 8)
    np.testing.assert_array_equal(optim.unorient(optim.orient(x, kind), kind), x)


def test_pairs_put_gate_and_up_of_a_neuron_in_one_row():
    gate, up = gaussian(5, 4), gaussian(5, 4, seed=1)  # inputs by neurons
    interleaved = jnp.stack([gate, up], -1).reshape(5, 8)
    wanted = jnp.concatenate([gate.T, up.T], -1)
    np.testing.assert_array_equal(optim.orient(interleaved, "interleaved_pair"), wanted)
    halves = jnp.concatenate([gate.T, up.T], 0)
    np.testing.assert_array_equal(optim.orient(halves, "halves_pair"), wanted)


def test_two_experts_have_their_own_scale():
    experts = jnp.stack([gaussian(4, 6), 100 * gaussian(4, 6)])
    nu = np.linalg.norm(optim.left_spectral(experts), axis=(1, 2))
    np.testing.assert_allclose(nu[1] / nu[0], 100, rtol=1e-3)


def test_without_scale_and_rows_it_is_muon():
    m = gaussian(6, 9)
    np.testing.assert_allclose(
        optim.left_spectral(m, a=0.0), optim.polar(m, method="svd"), atol=1e-3
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: optim.orient(gaussian(4, 5), "interleaved_pair"), "needs an even axis -1"),
        (lambda: optim.orient(gaussian(5, 4), "halves_pair"), "needs an even axis -2"),
        (lambda: optim.orient(gaussian(5, 4), "diagonal"), "kind: expected one of"),
        (lambda: optim.hybrid_update(gaussian(5, 4), order="both"), "order: expected one of"),
        (lambda: optim.symmetry_stack(head="soft"), "head: expected one of"),
        (lambda: optim.symmetry_stack(router="soft"), "router: expected one of"),
        (lambda: optim.symmetry_stack(mlp="soft"), "mlp: expected one of"),
        (lambda: optim.symmetry_stack(embedding="soft"), "embedding: expected one of"),
        (lambda: optim.symmetry_stack(eps=0.0), "eps: expected a number in"),
        (lambda: optim.row_norm_update(gaussian(5, 4), eps=0.0), "eps: expected a number in"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- Routing ---


def decoder(**options):
    config = pg.models.DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=24,
        max_length=16,
        **options,
    )
    return pg.models.init(config, jax.random.key(0))[1]


MOE = pg.models.MoEConfig(
    num_experts=4,
    experts_per_token=2,
    expert_size=8,
    normalize_weights=True,
    router_bias=True,
    expert_bias=True,
    shared_size=8,
    shared_gate=True,
)


def test_every_leaf_of_the_decoder_has_its_role():
    dense = decoder(tied_embeddings=False, qk_norm="head")
    names = {path: role.name for path, role in optim.default_roles(dense).items()}
    assert names == {
        "embedding": "embedding",
        "unembedding": "head",
        "norm": "norm",
        "layers/attention_norm": "norm",
        "layers/mlp_norm": "norm",
        "layers/attention/query_norm": "norm",
        "layers/attention/key_norm": "norm",
        **{f"layers/attention/{p}": f"attention/{p}" for p in ("query", "key", "value", "output")},
        **{f"layers/mlp/{p}": f"mlp/{p}" for p in ("gate", "up", "down")},
    }
    sparse = optim.default_roles(decoder(tied_embeddings=True, moe=MOE))
    assert sparse["layers/moe/router"].name == "router"
    assert sparse["layers/moe/gate"].name == "experts/gate"
    assert sparse["layers/moe/shared_gate_proj"].name == "mlp/gate"
    assert sparse["layers/moe/down_bias"].name == "bias"
    adapters = pg.models.lora.init(dense, jax.random.key(0), rank=2, alpha=4.0)
    assert {role.name for role in optim.default_roles(adapters).values()} == {"lora/a", "lora/b"}


def test_matrices_of_the_decoder_are_its_linear_maps():
    params = decoder(tied_embeddings=False)
    specs = optim.default_specs(_matrices(params))
    x = gaussian(16)
    query = params["layers"]["attention"]["query"]
    canonical = optim.to_canonical(query, specs["layers/attention/query"])
    np.testing.assert_allclose(
        canonical[1] @ x, jnp.einsum("e,ehd->hd", x, query[1]).reshape(-1), atol=1e-5
    )
    output = params["layers"]["attention"]["output"]
    mixed = gaussian(4, 4)
    np.testing.assert_allclose(
        optim.to_canonical(output, specs["layers/attention/output"])[0] @ mixed.reshape(-1),
        jnp.einsum("hd,hde->e", mixed, output[0]),
        atol=1e-5,
    )
    heads = optim.per_head_specs(_matrices(params))
    assert optim.to_canonical(query, heads["layers/attention/query"]).shape == (8, 4, 16)
    assert optim.to_canonical(output, heads["layers/attention/output"]).shape == (8, 16, 4)
    np.testing.assert_array_equal(
        optim.to_canonical(query, heads["layers/attention/query"])[5], query[1, :, 1].T
    )


def _matrices(params):
    layers = params["layers"]
    return {"layers": {"attention": layers["attention"], "mlp": layers["mlp"]}}


def test_flax_layers_are_known():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, kernel_size=(3, 3), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 8, 8, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.embed = nnx.Embed(10, 8, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

    params = nnx.to_pure_dict(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    names = {path: role.name for path, role in optim.default_roles(params).items()}
    assert names["conv/kernel"] == "conv"
    assert names["attention/query/kernel"] == "attention/query"
    assert names["attention/out/kernel"] == "attention/output"
    assert names["embed/embedding"] == "embedding"
    assert names["out/kernel"] == "dense"
    assert names["norm/scale"] == "norm" and names["out/bias"] == "bias"
    specs = optim.default_specs({"conv": {"kernel": params["conv"]["kernel"]}})
    assert optim.to_canonical(params["conv"]["kernel"], specs["conv/kernel"]).shape == (1, 8, 27)
    updates, _ = (t := optim.muon()).update(params, t.init(params), params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_leaves_without_a_place_are_named():
    odd = {"layers": {"mystery": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match=r"^layers/mystery: no role fits .* \(2, 3, 4\)"):
        optim.muon().init(odd)
    only = optim.by_role({"attention/*": optax.sgd(0.1), "mlp/*": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="^embedding: no transformation for its role 'embedding'"):
        only.init(decoder(tied_embeddings=True))
    with pytest.raises(ValueError, match="^b: no rule fits this leaf; rules: a"):
        optim.route([("a", "x")], {"a": jnp.ones(1), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match="rules: 'c' matches none of the leaves: a"):
        optim.route([("*", "x"), ("c", "y")], {"a": jnp.ones(1)})


def test_rules_by_path_label_each_leaf_once():
    params = decoder(tied_embeddings=False)
    labels = optim.route(
        [("layers/attention/query", "slow"), ("layers/*", "fast"), ("*", "rest")], params
    )
    named = _paths.named_leaves(labels)
    assert named["layers/attention/query"] == "slow"
    assert named["layers/mlp/up"] == "fast" and named["embedding"] == "rest"


def test_the_table_says_who_gets_what():
    params = decoder(tied_embeddings=False, moe=MOE)
    text = optim.describe(params, [*optim.routing.MATRICES, "*"])
    lines = {line.split()[0]: line for line in text.splitlines()[2:]}
    assert set(lines) == set(_paths.named_leaves(params))
    assert "8 × (8, 16)" in lines["layers/moe/gate"] and "experts/*" in lines["layers/moe/gate"]
    assert "router" in lines["layers/moe/router"] and "  *  " in lines["layers/moe/router"]
    assert lines["embedding"].split()[-1] == "512"


def test_tied_embeddings_follow_the_heads_rule():
    params = {"embedding": gaussian(12, 6), "norm": jnp.ones(6)}
    g = jax.tree.map(lambda p: gaussian(*p.shape, seed=4), params)
    stack = optim.symmetry_stack(optim.Rates(embedding=7.0, head=1.0))
    updates, _ = stack.update(g, stack.init(params), params)
    wanted = -optim.row_norm_update(0.05 * g["embedding"], center=True)
    np.testing.assert_allclose(updates["embedding"], wanted, atol=1e-5)
    untied = {**params, "unembedding": gaussian(6, 12)}
    g = jax.tree.map(lambda p: gaussian(*p.shape, seed=4), untied)
    updates, _ = stack.update(g, stack.init(untied), untied)
    np.testing.assert_allclose(
        updates["embedding"], -7 * optim.row_norm_update(0.05 * g["embedding"]), atol=1e-4
    )
    np.testing.assert_allclose(np.sum(updates["unembedding"], axis=1), 0, atol=1e-5)


# --- Contracts of every transformation ---

RATES = ("embedding", "head", "router", "matrices", "vectors")
ALL = {
    "muon": lambda rate: optim.muon(rate, weight_decay=0.01, adam_learning_rate=rate),
    "moonshot": lambda rate: optim.muon(rate, kind="heavy_ball_nesterov", shape="moonshot"),
    "polar_grad": lambda rate: optim.polar_grad_with_adam(rate),
    "polar_first": lambda rate: optim.polar_grad_with_adam(rate, order="polar_first"),
    "polar_muon": lambda rate: optim.polar_grad_with_adam(rate, order="muon"),
    "polar_heavy_ball": lambda rate: optim.with_adam(optim.polar_heavy_ball(rate), optax.sgd(rate)),
    "scion": lambda rate: optim.with_adam(optim.scion(rate), optax.adamw(rate)),
    "dion": lambda rate: optim.with_adam(
        optax.chain(optim.scale_by_dion(jax.random.key(0), rank=3), optax.scale(-rate)),
        optax.sgd(rate),
    ),
    "dion2": lambda rate: optim.with_adam(
        optax.chain(optim.scale_by_dion2(), optax.scale(-rate)), optax.sgd(rate)
    ),
    "shampoo": lambda rate: optim.with_adam(
        optax.chain(optim.scale_by_shampoo(), optax.scale(-rate)), optax.sgd(rate)
    ),
    "soap": lambda rate: optim.with_adam(
        optax.chain(optim.scale_by_soap(), optax.scale(-rate)), optax.sgd(rate)
    ),
    "symmetry": lambda rate: optim.symmetry_stack(optim.Rates(**dict.fromkeys(RATES, rate))),
    "symmetry_hybrid": lambda rate: optim.symmetry_stack(
        mlp="hybrid", embedding="hybrid", head="centred_hybrid", router="centred_rows"
    ),
}


@pytest.fixture(scope="module")
def model():
    return decoder(tied_embeddings=False, moe=MOE)


@pytest.mark.parametrize("name", list(ALL))
def test_updates_keep_shapes_and_dtypes_under_jit_and_are_finite(name, model):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)
    transform = ALL[name](0.01)
    update = jax.jit(transform.update)
    for params in (model, half):
        state = transform.init(params)
        structure = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        for k in range(2):
            g = jax.tree.map(lambda p, k=k: gaussian(*p.shape, seed=k).astype(p.dtype), params)
            updates, state = update(g, state, params)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == structure
            for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
                assert u.dtype == p.dtype and u.shape == p.shape
                assert np.isfinite(np.asarray(u, np.float32)).all()


@pytest.mark.parametrize("name", list(ALL))
def test_zero_gradients_leave_zero_parameters_where_they_are(name, model):
    zeros = jax.tree.map(jnp.zeros_like, model)
    transform = ALL[name](0.01)
    updates, _ = transform.update(zeros, transform.init(zeros), zeros)
    for u in jax.tree.leaves(updates):
        np.testing.assert_array_equal(u, 0)


@pytest.mark.parametrize("name", ["muon", "polar_grad", "symmetry", "soap", "dion"])
def test_states_are_saved_and_read(name, model, tmp_path):
    transform = ALL[name](0.01)
    g = jax.tree.map(lambda p: gaussian(*p.shape), model)
    _, state = transform.update(g, transform.init(model), model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "state", transform.init(model))
    jax.tree.map(np.testing.assert_array_equal, read, state)
    u, _ = transform.update(g, state, model)
    again, _ = transform.update(g, read, model)
    jax.tree.map(np.testing.assert_array_equal, u, again)


def test_hyperparameters_are_injected_scheduled_accumulated_and_masked():
    params = {"w": gaussian(4, 6), "v": gaussian(6, 4, seed=1)}
    injected = optax.inject_hyperparams(optim.polar_grad, static_args=("order", "alpha"))(
        learning_rate=0.1, beta=0.5
    )
    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    updates, _ = jax.jit(injected.update)(params, state, params)
    plain = optim.polar_grad(0.2, beta=0.5)
    wanted, _ = plain.update(params, plain.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, wanted)
    # Schedules see the count of updates.
    scheduled = optim.polar_grad(lambda count: 0.1 * (count + 1), beta=0.0)
    state = scheduled.init(params)
    first, state = scheduled.update(params, state, params)
    second, _ = scheduled.update(params, state, params)
    np.testing.assert_allclose(second["w"], 2 * first["w"], rtol=1e-5)
    # Of two microbatches, the mean.
    multi = optax.MultiSteps(optim.polar_grad(0.1, beta=0.0), 2)
    state = multi.init(params)
    other = jax.tree.map(lambda p: -0.5 * p, params)
    _, state = multi.update(params, state, params)
    updates, _ = multi.update(other, state, params)
    one = optim.polar_grad(0.1, beta=0.0)
    wanted, _ = one.update(jax.tree.map(lambda p: 0.25 * p, params), one.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), updates, wanted)
    # A mask keeps paths, so specs by path still find their leaf.
    specs = {"w": optim.MatrixSpec((0,), (1,)), "v": optim.MatrixSpec((0,), (1,))}
    masked = optax.masked(optim.scale_by_muon(specs=specs), {"w": True, "v": False})
    updates, _ = masked.update(params, masked.init(params), params)
    np.testing.assert_array_equal(updates["v"], params["v"])
    assert np.abs(np.asarray(updates["w"] - params["w"])).max() > 0.01
